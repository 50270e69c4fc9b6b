// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `ctl upgrade`: starts the new program with this process's rights, which it needs to confine itself, connects it with
//! the machine's process, and tells how it ended.

use std::ffi::OsString;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::Context;
use atoll_vmm_protocol::api::{MigrationInfo, MigrationStage, Request, Upgrade};
use atoll_vmm_protocol::client::Client;

/// How long the new process may take to answer, or to end, when the old one does not know whose the machine is.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked at.
const POLL: Duration = Duration::from_millis(20);
/// Most that is read of what a program says about its failure.
const SAID_BYTES_MAX: u64 = 4096;

/// Has the machine go on in a new process of the program `body.to`. Blocks until it does, or until that has failed: then
/// the new process is gone, and the error says why.
pub(super) fn upgrade(client: &Client, body: &Upgrade) -> anyhow::Result<MigrationInfo> {
    let program = std::path::absolute(&body.to)?;
    // Before the machine is asked, and whatever the program is.
    let context = || format!("start {}", program.display());
    let (near, far) = UnixStream::pair().context("make a pair of sockets")?;
    let (mut report, told) = UnixStream::pair().context("make a pair of sockets")?;
    let child = Command::new(&program)
        .args(arguments(client.path(), body)?)
        .stdin(OwnedFd::from(far))
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn();
    let mut child = Starting(Some(child.with_context(context)?));
    let files = [near.as_fd(), told.as_fd()];
    let _: MigrationInfo = client.ask_with_files(Request::Upgrade, body, &files)?;
    // The machine's process has its own handles: the end of one side is to be seen by the other.
    drop((near, told));
    let mut text = Vec::new();
    // Its end without a word, or with half of it, is looked at below.
    let _ = report.read_to_end(&mut text);
    let mut info = match serde_json::from_slice::<MigrationInfo>(&text) {
        Ok(info) => info,
        Err(_) => unknown(),
    };
    if info.stage == MigrationStage::InDoubt {
        info.stage = match whose(client, &mut child) {
            Whose::New => MigrationStage::Completed,
            Whose::Old => MigrationStage::Failed,
            Whose::Unknown => {
                let pid = child.keep();
                anyhow::bail!(
                    "whether process {pid} has the machine is not known: it runs, and does not answer; when it has ended \
                     and the old one is there, resume that one"
                );
            }
        };
        if info.stage == MigrationStage::Failed && client.act(Request::Resume).is_err() {
            anyhow::bail!("both processes have ended: {}", child.end());
        }
    }
    if info.stage == MigrationStage::Completed {
        let pid = child.keep();
        if let Some(path) = &body.pid_file {
            let written = std::fs::write(path, format!("{pid}\n"));
            written
                .with_context(|| format!("the machine runs as process {pid}; pid file {path}"))?;
        }
        return Ok(info);
    }
    let error = info.error.unwrap_or_default();
    let said = child.end();
    match error.contains("the other side: ") {
        true => anyhow::bail!("the machine stays: {error}"),
        false => anyhow::bail!("the machine stays: {error} ({}: {said})", program.display()),
    }
}

/// What is known when the old process has ended without a word.
fn unknown() -> MigrationInfo {
    MigrationInfo {
        stage: MigrationStage::InDoubt,
        rounds: 0,
        sent_bytes: 0,
        remaining_bytes: 0,
        elapsed_ms: 0,
        downtime_us: 0,
        throttle_percent: 0,
        disks: Vec::new(),
        error: None,
    }
}

/// Which process has a machine.
enum Whose {
    New,
    Old,
    Unknown,
}

/// Whose the machine is when the old process does not know. A new one that has not got it ends by itself, since the
/// connection with the old one has ended; so one that goes on is never ended here: it may be the guest's.
fn whose(client: &Client, child: &mut Starting) -> Whose {
    let deadline = Instant::now() + PATIENCE;
    let pid = child.id();
    while Instant::now() < deadline {
        if client.info().is_ok_and(|info| info.pid == pid) {
            return Whose::New;
        }
        if !child.runs() {
            return Whose::Old;
        }
        std::thread::sleep(POLL);
    }
    Whose::Unknown
}

/// What the new process is told.
fn arguments(socket: &Path, body: &Upgrade) -> anyhow::Result<Vec<OsString>> {
    let mut all: Vec<OsString> = vec!["receive".into(), "--upgrade".into()];
    let mut add = |name: &str, value: OsString| all.extend([name.into(), value]);
    let absolute = |path: &dyn AsRef<Path>| std::path::absolute(path).map(PathBuf::into_os_string);
    add("--api-socket", absolute(&socket)?);
    for group in &body.cgroup {
        add("--cgroup", absolute(group)?);
    }
    if let Some(file) = &body.log_file {
        add("--log-file", absolute(file)?);
    }
    let words = [("--sandbox", &body.sandbox), ("--seccomp", &body.seccomp)];
    for (name, word) in words {
        if let Some(word) = word {
            add(name, word.into());
        }
    }
    for (name, number) in [("--uid", body.uid), ("--gid", body.gid)] {
        if let Some(number) = number {
            add(name, number.to_string().into());
        }
    }
    Ok(all)
}

/// The new process, which is ended when nothing has come of it.
struct Starting(Option<Child>);

impl Starting {
    fn child(&mut self) -> &mut Child {
        self.0
            .as_mut()
            .expect("taken by the last that is done with it")
    }

    fn id(&mut self) -> u32 {
        self.child().id()
    }

    fn runs(&mut self) -> bool {
        matches!(self.child().try_wait(), Ok(None))
    }

    /// It has the machine: it stays.
    fn keep(&mut self) -> u32 {
        self.0.take().map_or(0, |child| child.id())
    }

    /// Ends it, if it has not ended by itself; what it said, or how it ended.
    fn end(&mut self) -> String {
        let Some(mut child) = self.0.take() else {
            return String::new();
        };
        let mut said = Vec::new();
        // One that was let go by the machine's process ends by itself; another one does not.
        let deadline = Instant::now() + Duration::from_secs(2);
        while Instant::now() < deadline && matches!(child.try_wait(), Ok(None)) {
            std::thread::sleep(POLL);
        }
        match child.kill() {
            Err(error) if error.kind() != ErrorKind::InvalidInput => {}
            _ => {}
        }
        let status = child.wait();
        if let Some(error) = child.stderr.take() {
            let _ = error.take(SAID_BYTES_MAX).read_to_end(&mut said);
        }
        let said = String::from_utf8_lossy(&said);
        let line = said.lines().rfind(|line| !line.trim().is_empty());
        match (line, status) {
            (Some(line), _) => line.trim().to_owned(),
            (None, Ok(status)) => status.to_string(),
            (None, Err(error)) => error.to_string(),
        }
    }
}

impl Drop for Starting {
    fn drop(&mut self) {
        if let Some(child) = &mut self.0 {
            // Both fail when it has ended.
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}
