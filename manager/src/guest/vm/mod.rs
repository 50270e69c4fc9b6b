// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Virtual machines as this node sees them: a process `atoll-vmm`, its control socket, its taps.
//!
//! ```text
//! run/vm-100/   spec.json  api.sock  serial.sock  pid  log
//! ```

pub mod boot;
pub mod capabilities;
pub mod cloud_init;
pub mod create;
pub mod drives;
pub mod live;
pub mod mirror;
pub mod resolve;
pub mod saved;
pub mod start;
pub mod suspend;

use std::fs::File;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use atoll_vmm_protocol::api::{
    Acted, Added, Info, MachineState, MirrorInfo, Mirrors, Removal, RemoveDevice, Request,
    SavingInfo, Snapshot, SnapshotTaken,
};
use atoll_vmm_protocol::client::{Client, ClientError};
use rustix::process::Signal;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::Error;
use crate::guest::cgroup::Group;
use crate::guest::site::Seat;
use crate::guest::{Console, Guest, Load, Phase};
use crate::network::link;
use crate::process::Process;
use crate::task::TaskContext;

/// Time that a machine has to end after it was told to through its API, before it is killed.
const END_MAX: Duration = Duration::from_secs(10);
/// Longest wait for one answer of a running machine.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Longest wait until a machine has written its memory.
const WRITE_MAX: Duration = Duration::from_secs(3600);

/// A virtual machine of this node, running or not.
#[derive(Debug, Clone)]
pub struct Vm {
    seat: Seat,
}

impl Vm {
    /// The machine on this seat.
    pub fn new(seat: Seat) -> Self {
        Self { seat }
    }

    /// What the machine says about itself.
    pub async fn info(&self) -> Result<Info, Error> {
        self.ask(|client| client.info()).await
    }

    /// Makes the machine do something.
    pub async fn act(&self, request: Request) -> Result<(), Error> {
        self.ask(move |client| client.act(request)).await?;
        Ok(())
    }

    /// Makes the machine do something that takes a body.
    pub async fn ask_for(
        &self,
        request: Request,
        body: impl Serialize + Send + 'static,
    ) -> Result<(), Error> {
        let _: Acted = self
            .ask(move |client| client.ask_with(request, &body))
            .await?;
        Ok(())
    }

    /// Makes the machine do something that takes a body and an open file.
    pub async fn ask_for_with_file(
        &self,
        request: Request,
        body: impl Serialize + Send + 'static,
        file: File,
    ) -> Result<(), Error> {
        let _: Acted = self
            .ask(move |client| client.ask_with_files(request, &body, &[file.as_fd()]))
            .await?;
        Ok(())
    }

    /// Plugs a device in, with the open file that it needs.
    pub async fn plug(
        &self,
        request: Request,
        body: impl Serialize + Send + 'static,
        file: Option<OwnedFd>,
    ) -> Result<(), Error> {
        let _: Added = self.answer_to(request, body, file).await?;
        Ok(())
    }

    /// What the machine answers to a request with a body, and perhaps an open file.
    pub async fn answer_to<T: DeserializeOwned + Send + 'static>(
        &self,
        request: Request,
        body: impl Serialize + Send + 'static,
        file: Option<OwnedFd>,
    ) -> Result<T, Error> {
        let question = move |client: &Client| {
            let files: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
            client.ask_with_files(request, &body, &files)
        };
        self.ask(question).await
    }

    /// Asks the guest to let a device go, and waits as long as the body says.
    pub async fn remove_device(&self, body: RemoveDevice) -> Result<Removal, Error> {
        self.ask(move |client| client.remove_device(&body)).await
    }

    /// Makes it write its spec, its state and its memory to these files; it is held meanwhile. `to` is for its log.
    pub async fn write_state(&self, files: [File; 3], to: String) -> Result<SnapshotTaken, Error> {
        let question = move |client: &Client| {
            let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
            client.ask_with_files(
                Request::Snapshot,
                &Snapshot {
                    to,
                    ..Snapshot::default()
                },
                &files,
            )
        };
        self.ask_within(WRITE_MAX, question).await
    }

    /// Begins the same; the machine is held for a moment only, or for as long as it is paused, and what is written is of that
    /// moment ([`Vm::last_saving`]). The last file is an open `/dev/userfaultfd`. Within the answer: why this machine has to be
    /// held.
    pub async fn begin_state(
        &self,
        files: [File; 4],
        to: String,
    ) -> Result<Result<SnapshotTaken, String>, Error> {
        let question = move |client: &Client| {
            let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
            let body = Snapshot {
                to,
                live: Some(true),
                ..Snapshot::default()
            };
            match client.ask_with_files(Request::Snapshot, &body, &files) {
                Err(ClientError::Refused { status: 409, error }) => Ok(Err(error)),
                other => other.map(Ok),
            }
        };
        self.ask(question).await
    }

    /// How far what was begun last is, if anything was.
    pub async fn last_saving(&self) -> Result<Option<SavingInfo>, Error> {
        let question = |client: &Client| match client.ask(Request::Saving) {
            Err(ClientError::Refused { status: 404, .. }) => Ok(None),
            other => other.map(Some),
        };
        self.ask(question).await
    }

    /// Gives it up, if it is not complete.
    pub async fn cancel_saving(&self) -> Result<(), Error> {
        let _: SavingInfo = self
            .ask(|client| client.ask(Request::CancelSnapshot))
            .await?;
        Ok(())
    }

    /// Mirrors of its disks, and how they ended.
    pub async fn mirrors(&self) -> Result<Vec<MirrorInfo>, Error> {
        let told: Mirrors = self.ask(|client| client.ask(Request::Mirrors)).await?;
        Ok(told.mirrors)
    }

    /// The guest that it is.
    pub fn seat(&self) -> &Seat {
        &self.seat
    }

    /// Its control group.
    pub fn group(&self) -> Group {
        Group::new(self.seat.name())
    }

    fn pid_file(&self) -> PathBuf {
        self.seat.run_folder().join("pid")
    }

    fn spec_file(&self) -> PathBuf {
        self.seat.run_folder().join("spec.json")
    }

    fn log_file(&self) -> PathBuf {
        self.seat.run_folder().join("log")
    }

    /// Its control socket.
    pub fn api_socket(&self) -> PathBuf {
        self.seat.run_folder().join("api.sock")
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Client) -> Result<T, ClientError> + Send + 'static,
    ) -> Result<T, Error> {
        self.ask_within(ANSWER_MAX, question).await
    }

    async fn ask_within<T: Send + 'static>(
        &self,
        patience: Duration,
        question: impl FnOnce(&Client) -> Result<T, ClientError> + Send + 'static,
    ) -> Result<T, Error> {
        let client = Client::new(self.api_socket()).with_timeout(patience);
        let answer = tokio::task::spawn_blocking(move || question(&client)).await;
        answer
            .map_err(|e| Error::failed("ask the virtual machine", e))?
            .map_err(|e| Error::failed(format!("{} does not obey", self.seat.title()), e))
    }
}

#[async_trait]
impl Guest for Vm {
    /// The number in the file may be another program's by now: ours names our spec.
    fn process(&self) -> Option<Process> {
        let text = std::fs::read_to_string(self.pid_file()).ok()?;
        let process = Process::open(text.trim().parse().ok()?)?;
        let spec = self.spec_file();
        let ours = process
            .arguments()?
            .iter()
            .any(|argument| spec.as_os_str() == argument.as_str());
        ours.then_some(process)
    }

    async fn is_paused(&self) -> bool {
        let info = self.info().await;
        info.is_ok_and(|info| info.state == MachineState::Paused)
    }

    fn left_traces(&self) -> bool {
        self.seat.run_folder().exists()
    }

    async fn pause(&self) -> Result<(), Error> {
        self.act(Request::Pause).await
    }

    async fn resume(&self) -> Result<(), Error> {
        self.act(Request::Resume).await
    }

    async fn power_off(&self, _: &TaskContext) -> Result<(), Error> {
        self.act(Request::PowerButton).await
    }

    async fn end(&self, task: &TaskContext) -> Result<(), Error> {
        let Some(process) = self.process() else {
            return Ok(());
        };
        if let Err(error) = self.act(Request::Shutdown).await {
            task.log(&format!("{}, killing it", error.chain()));
            process.signal(Signal::KILL);
        }
        if process.ended_before(Instant::now() + END_MAX).await {
            return Ok(());
        }
        task.log("the machine does not end, killing it");
        process.signal(Signal::KILL);
        if process.ended_before(Instant::now() + END_MAX).await {
            return Ok(());
        }
        Err(Error::refused("the machine's process does not die"))
    }

    fn console(&self) -> Result<Console, Error> {
        let socket = resolve::serial_socket(&self.seat.run_folder());
        Ok(Console::main(socket))
    }

    async fn load(&self) -> Load {
        let Phase::Running { pid } = self.phase() else {
            return Load::default();
        };
        let traffic = link::guest_traffic(self.seat.id);
        let mut load = Load {
            cpu_ns: crate::process::cpu_ns(pid),
            memory_bytes: crate::process::resident_bytes(pid),
            received_bytes: traffic.sent_bytes,
            sent_bytes: traffic.received_bytes,
            ..Load::default()
        };
        if let Ok(counters) = self.ask(|client| client.counters()).await {
            load.read_bytes = counters.disks.iter().map(|disk| disk.read_bytes).sum();
            load.written_bytes = counters.disks.iter().map(|disk| disk.written_bytes).sum();
        }
        load
    }

    /// Taps, control group, run folder.
    async fn clean_up(&self) -> Result<(), Error> {
        link::delete_all(self.seat.id).await?;
        self.group().remove().await;
        self.seat.remove_run_folder().await
    }
}
