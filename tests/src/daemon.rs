// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A node of the test's own: `atolld` with a temporary state, in namespaces of its own.
//!
//! Network, mounts and processes are the node's alone, so that tests run beside each other and nothing of a test
//! outlives it: when the node's first process is killed, the kernel ends its guests, mounts, bridges and `dnsmasq`.
//! It is killed when the [`Daemon`] is dropped, and by the kernel when the test itself is killed.
//! Only cgroups are shared with the machine; tests that start guests belong to the test group `node`.

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use serde::Deserialize;
use tempfile::TempDir;

use crate::tree;

/// How long the node may take until it answers: it makes its keys and hashes a password first, in a debug build.
const START_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(50);
/// Lines of the node's log that a failed test shows.
const LOG_LINES: usize = 60;

/// How to sign in: the file that the node writes for its first administrator.
#[derive(Debug, Clone, Deserialize)]
pub struct Login {
    /// Where the page and the API are.
    pub url: String,
    /// With the realm.
    pub username: String,
    /// Of that user.
    pub password: String,
    /// What signed the node's certificate.
    pub ca_file: String,
}

#[derive(Deserialize)]
struct Running {
    port: u16,
}

/// A running node; it ends when this is dropped.
pub struct Daemon {
    process: Child,
    state: TempDir,
    login: Login,
}

/// Why a node cannot be isolated on this machine, if so: needs root or the equivalent.
pub fn isolation() -> Result<(), String> {
    match isolated(Path::new("true")).output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => Err(format!(
            "no namespaces of one's own here: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        )),
        Err(error) => Err(format!("setpriv cannot be run: {error}")),
    }
}

/// A command in new namespaces, with its loopback interface up, which ends with the calling thread.
fn isolated(program: &Path) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "unshare"]);
    command.args(["--net", "--mount", "--pid", "--fork", "--kill-child"]);
    command.args(["--mount-proc", "--", "sh", "-c"]);
    command.args([r#"ip link set lo up && exec "$@""#, "sh"]);
    command.arg(program);
    command
}

impl Daemon {
    /// Starts a node named `n1` on a free port and waits until it serves.
    pub fn launch() -> Result<Self> {
        let state = tempfile::tempdir()?;
        let log = File::create(state.path().join("log"))?;
        let process = isolated(&tree::binary("atolld"))
            .arg("--state")
            .arg(state.path())
            .args(["--listen", "127.0.0.1", "--port", "0", "--node", "n1"])
            .arg("--bin-dir")
            .arg(tree::bin_dir())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start setpriv")?;
        let mut daemon = Self {
            process,
            state,
            login: Login {
                url: String::new(),
                username: String::new(),
                password: String::new(),
                ca_file: String::new(),
            },
        };
        daemon.wait_until_serving()?;
        Ok(daemon)
    }

    fn wait_until_serving(&mut self) -> Result<()> {
        let deadline = Instant::now() + START_MAX;
        loop {
            if let Some(status) = self.process.try_wait()? {
                bail!("atolld ended with {status}:\n{}", self.log_tail());
            }
            if let (Ok(login), Ok(running)) = (
                self.read::<Login>("initial-login.json"),
                self.read::<Running>("run/atolld.json"),
            ) {
                let url = format!("https://127.0.0.1:{}", running.port);
                self.login = Login { url, ..login };
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!(
                    "atolld does not serve after {START_MAX:?}:\n{}",
                    self.log_tail()
                );
            }
            std::thread::sleep(POLL);
        }
    }

    fn read<T: serde::de::DeserializeOwned>(&self, name: &str) -> Result<T> {
        Ok(serde_json::from_slice(&std::fs::read(
            self.state.path().join(name),
        )?)?)
    }

    /// How to sign in; the URL is reached by [`Daemon::command`]s.
    pub fn login(&self) -> &Login {
        &self.login
    }

    /// The node's state directory.
    pub fn state(&self) -> &Path {
        self.state.path()
    }

    /// A command in the node's network, to talk to it.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--net", "--target", &self.process.id().to_string(), "--"]);
        command.arg(program);
        command
    }

    fn log_tail(&self) -> String {
        let log = std::fs::read_to_string(self.state.path().join("log")).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(LOG_LINES)..].join("\n")
    }
}

impl Drop for Daemon {
    #[expect(
        clippy::print_stderr,
        reason = "a failed test shows what its node said"
    )]
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("the node's log ends:\n{}", self.log_tail());
        }
        // Both fail only when it has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
