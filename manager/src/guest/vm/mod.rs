// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Virtual machines as this node sees them: a process `atoll-vmm`, its control socket, its taps.
//!
//! ```text
//! run/vm-100/   spec.json  api.sock  serial.sock  pid  log
//! ```

pub mod create;
pub mod resolve;
pub mod start;
pub mod stop;

use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use atoll_vmm_protocol::api::{Info, MachineState, Request};
use atoll_vmm_protocol::client::{Client, ClientError};

use crate::error::Error;
use crate::guest::cgroup::Group;
use crate::guest::site::Seat;
use crate::guest::{Guest, Load, Phase};
use crate::network::link;
use crate::process::Process;

/// Longest wait for one answer of a running machine.
const ANSWER_MAX: Duration = Duration::from_secs(5);

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

    /// Its process, if it runs. The number in the file may be another program's by now: ours names our spec.
    pub fn process(&self) -> Option<Process> {
        let text = std::fs::read_to_string(self.pid_file()).ok()?;
        let process = Process::open(text.trim().parse().ok()?)?;
        let spec = self.spec_file();
        let ours = process
            .arguments()?
            .iter()
            .any(|argument| spec.as_os_str() == argument.as_str());
        ours.then_some(process)
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

    /// Removes what a machine that has ended leaves: taps, control group, run folder.
    pub async fn clean_up(&self) -> Result<(), Error> {
        for (name, guest) in link::guest_links() {
            if guest == self.seat.id {
                link::delete(&name).await?;
            }
        }
        self.group().remove().await;
        self.seat.remove_run_folder().await
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

    fn api_socket(&self) -> PathBuf {
        self.seat.run_folder().join("api.sock")
    }

    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Client) -> Result<T, ClientError> + Send + 'static,
    ) -> Result<T, Error> {
        let client = Client::new(self.api_socket()).with_timeout(ANSWER_MAX);
        let answer = tokio::task::spawn_blocking(move || question(&client)).await;
        answer
            .map_err(|e| Error::failed("ask the virtual machine", e))?
            .map_err(|e| Error::failed(format!("{} does not obey", self.seat.title()), e))
    }
}

#[async_trait]
impl Guest for Vm {
    fn phase(&self) -> Phase {
        match self.process() {
            Some(process) => Phase::Running { pid: process.pid() },
            None if self.seat.run_folder().exists() => Phase::Ended,
            None => Phase::Stopped,
        }
    }

    async fn is_paused(&self) -> bool {
        let info = self.info().await;
        info.is_ok_and(|info| info.state == MachineState::Paused)
    }

    fn console(&self) -> Result<PathBuf, Error> {
        Ok(resolve::serial_socket(&self.seat.run_folder()))
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

    async fn clean_up(&self) -> Result<(), Error> {
        Vm::clean_up(self).await
    }
}
