// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The only place of this crate that runs host programs: an argument vector, a deadline, captured output.
//!
//! Not here: a shell, ever; children that live and die with this process. Callers: storage and network,
//! the guests' task steps.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::{Child, Command};

use crate::error::Error;

/// Time a program has when the caller names none. Anything that only asks the kernel is done in milliseconds; but on a
/// machine short of processors a mount alone has taken more than half a minute.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// Most output that is kept of one program, in bytes; whatever it writes beyond that is read and dropped.
const OUTPUT_BYTES_MAX: usize = 16 << 20;

/// Where Debian keeps administrators' programs; a daemon's PATH may lack them.
const SEARCH_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Debian's packages of the programs that are run here and that not every system has.
const PACKAGES: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("bridge", "iproute2"),
    ("tc", "iproute2"),
    ("nft", "nftables"),
    ("dnsmasq", "dnsmasq-base"),
    ("mkfs.ext4", "e2fsprogs"),
    ("resize2fs", "e2fsprogs"),
    ("busybox", "busybox-static"),
    ("zstd", "zstd"),
    ("xz", "xz-utils"),
    ("gpgv", "gpgv"),
];

/// Why a program did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// It is not installed, or may not be executed.
    #[error("start {program}")]
    Start {
        /// Name or path of the program.
        program: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// Talking to it failed.
    #[error("{program}: input or output")]
    Pipe {
        /// Name or path of the program.
        program: String,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It ran and reported failure.
    #[error("{program} failed ({status}): {message}")]
    Failed {
        /// Name or path of the program.
        program: String,
        /// How it ended.
        status: ExitStatus,
        /// Last line that it wrote to its standard error.
        message: String,
    },
    /// It did not end in time and was killed.
    #[error("{program} did not end within {} s and was killed", deadline.as_secs())]
    Deadline {
        /// Name or path of the program.
        program: String,
        /// The time it had.
        deadline: Duration,
    },
}

impl From<ExecError> for Error {
    fn from(error: ExecError) -> Self {
        let text = match &error {
            ExecError::Start { program, source }
                if source.kind() == std::io::ErrorKind::NotFound =>
            {
                let package = PACKAGES.iter().find(|(name, _)| name == program);
                let remedy = package.map_or(String::new(), |(_, package)| {
                    format!(" (install it: apt-get install {package})")
                });
                format!("{program} is not installed{remedy}")
            }
            _ => "a host program failed".to_owned(),
        };
        Self::failed(text, error)
    }
}

/// One program to be run.
#[derive(Debug, Clone)]
pub struct Program {
    path: OsString,
    args: Vec<OsString>,
    stdin: Option<Vec<u8>>,
    deadline: Duration,
}

impl Program {
    /// A program by name (searched in the system's directories) or by path.
    pub fn new(path: impl AsRef<OsStr>) -> Self {
        Self {
            path: path.as_ref().to_owned(),
            args: Vec::new(),
            stdin: None,
            deadline: DEADLINE,
        }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds several arguments.
    #[must_use]
    pub fn args<I, S>(mut self, args: I) -> Self
    where
        I: IntoIterator<Item = S>,
        S: AsRef<OsStr>,
    {
        self.args
            .extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Gives it bytes on standard input; without them it reads end of file.
    #[must_use]
    pub fn stdin(mut self, bytes: impl Into<Vec<u8>>) -> Self {
        self.stdin = Some(bytes.into());
        self
    }

    /// Sets the time after which it is killed.
    #[must_use]
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Runs it to its end and returns what it wrote to standard output. Dropping the future kills it.
    pub async fn run(self) -> Result<String, ExecError> {
        let name = self.name();
        let mut command = self.command();
        command
            .stdin(if self.stdin.is_some() {
                Stdio::piped()
            } else {
                Stdio::null()
            })
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true);
        let child = command.spawn().map_err(|source| ExecError::Start {
            program: name.clone(),
            source,
        })?;
        let (status, stdout, stderr) =
            tokio::time::timeout(self.deadline, converse(child, self.stdin))
                .await
                .map_err(|_| ExecError::Deadline {
                    program: name.clone(),
                    deadline: self.deadline,
                })?
                .map_err(|source| ExecError::Pipe {
                    program: name.clone(),
                    source,
                })?;
        if !status.success() {
            return Err(ExecError::Failed {
                program: name,
                status,
                message: last_line(&stderr),
            });
        }
        Ok(String::from_utf8_lossy(&stdout).into_owned())
    }

    /// Starts it in a session of its own, so that it outlives this process, with both outputs appended to `log`.
    /// Whoever drops the child only loses the exit status.
    pub fn spawn_detached(self, log: &Path) -> Result<Child, ExecError> {
        let name = self.name();
        let start = |source| ExecError::Start {
            program: name.clone(),
            source,
        };
        let output = File::options()
            .create(true)
            .append(true)
            .open(log)
            .map_err(start)?;
        let errors = output.try_clone().map_err(start)?;
        // setsid(1) executes the program in its own place: the process id stays.
        let mut detached = Self::new("setsid").arg(&self.path);
        detached.args.extend(self.args);
        detached
            .command()
            .stdin(Stdio::null())
            .stdout(output)
            .stderr(errors)
            .spawn()
            .map_err(start)
    }

    /// Starts it in a session of its own, as [`spawn_detached`](Self::spawn_detached) does, with its input and output
    /// given. What it writes to its standard error is dropped.
    pub fn spawn_detached_on(self, input: OwnedFd, output: File) -> Result<Child, ExecError> {
        let name = self.name();
        let mut detached = Self::new("setsid").arg(&self.path);
        detached.args.extend(self.args);
        detached
            .command()
            .stdin(Stdio::from(input))
            .stdout(output)
            .stderr(Stdio::null())
            .spawn()
            .map_err(|source| ExecError::Start {
                program: name,
                source,
            })
    }

    /// Starts it in a session of its own whose terminal is `terminal`. It is told when that ends, by SIGHUP.
    pub fn spawn_on_terminal(self, terminal: OwnedFd) -> Result<Child, ExecError> {
        let name = self.name();
        let start = |source| ExecError::Start {
            program: name.clone(),
            source,
        };
        let input = terminal.try_clone().map_err(start)?;
        let output = terminal.try_clone().map_err(start)?;
        let mut on_terminal = Self::new("setsid").arg("--ctty").arg(&self.path);
        on_terminal.args.extend(self.args);
        on_terminal
            .command()
            .env("TERM", "xterm-256color")
            .stdin(Stdio::from(input))
            .stdout(Stdio::from(output))
            .stderr(Stdio::from(terminal))
            .spawn()
            .map_err(start)
    }

    /// Whether a program of that name is installed.
    pub fn installed(name: &str) -> bool {
        SEARCH_PATH
            .split(':')
            .any(|folder| Path::new(folder).join(name).is_file())
    }

    fn name(&self) -> String {
        PathBuf::from(&self.path).file_name().map_or_else(
            || self.path.to_string_lossy().into_owned(),
            |name| name.to_string_lossy().into_owned(),
        )
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.path);
        command
            .args(&self.args)
            .env("PATH", SEARCH_PATH)
            .env("LC_ALL", "C")
            .current_dir("/");
        command
    }
}

/// Feeds, drains and awaits a child at the same time, so that no full pipe can hold it.
async fn converse(
    mut child: Child,
    stdin: Option<Vec<u8>>,
) -> std::io::Result<(ExitStatus, Vec<u8>, Vec<u8>)> {
    let input = child.stdin.take();
    let feed = async {
        if let (Some(mut pipe), Some(bytes)) = (input, stdin) {
            // A program that ends without reading its input tells why by its status, not by our EPIPE.
            let _ = pipe.write_all(&bytes).await;
        }
    };
    let (stdout, stderr) = (child.stdout.take(), child.stderr.take());
    let (status, (), stdout, stderr) =
        tokio::join!(child.wait(), feed, drain(stdout), drain(stderr));
    Ok((status?, stdout?, stderr?))
}

async fn drain(pipe: Option<impl AsyncReadExt + Unpin>) -> std::io::Result<Vec<u8>> {
    let mut kept = Vec::new();
    let Some(mut pipe) = pipe else {
        return Ok(kept);
    };
    let mut chunk = vec![0; 16 << 10];
    loop {
        let count = pipe.read(&mut chunk).await?;
        if count == 0 {
            return Ok(kept);
        }
        let room = OUTPUT_BYTES_MAX.saturating_sub(kept.len()).min(count);
        kept.extend_from_slice(&chunk[..room]);
    }
}

fn last_line(stderr: &[u8]) -> String {
    let text = String::from_utf8_lossy(stderr);
    text.lines()
        .rev()
        .map(str::trim)
        .find(|line| !line.is_empty())
        .unwrap_or("it wrote no message")
        .to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn output_is_captured_and_arguments_are_not_interpreted() {
        let text = Program::new("printf")
            .args(["%s|", "a b", "$HOME;id", "*"])
            .run()
            .await
            .unwrap();
        assert_eq!(text, "a b|$HOME;id|*|");
    }

    #[tokio::test]
    async fn input_larger_than_a_pipe_passes() {
        let text = Program::new("cat")
            .stdin(vec![b'x'; 1 << 20])
            .run()
            .await
            .unwrap();
        assert_eq!(text.len(), 1 << 20);
    }

    #[tokio::test]
    async fn failure_names_program_and_last_line() {
        let error = Program::new("ls")
            .arg("/nonexistent/x")
            .run()
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "ls failed (exit status: 2): ls: cannot access '/nonexistent/x': No such file or directory"
        );
    }

    #[tokio::test]
    async fn a_missing_program_is_named() {
        let error = Error::from(
            Program::new("no-such-program-here")
                .run()
                .await
                .unwrap_err(),
        );
        assert_eq!(error.to_string(), "no-such-program-here is not installed");
    }

    #[tokio::test]
    async fn the_deadline_kills() {
        let error = Program::new("sleep")
            .arg("60")
            .deadline(Duration::from_millis(50))
            .run()
            .await
            .unwrap_err();
        assert!(matches!(error, ExecError::Deadline { .. }), "{error}");
    }
}
