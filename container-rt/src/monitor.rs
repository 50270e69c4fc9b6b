// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The monitor of one container: a process that creates it, stays as the parent of its init, serves its console and
//! its other terminals, and writes down how it ended. `create --monitor` forks it; the manager may come and go meanwhile.
//!
//! ```text
//!  atoll-ct create --monitor --fork--> monitor (session leader, subreaper) --libcontainer--> init
//!        |  <------ pipe: created, or the error ------|                                       |
//!      exits                                          | poll: console, init's pidfd, signals  |
//!                                                     +-- exit.json <------ the init ends ----+
//! ```

use std::fs::File;
use std::io::{BufRead, BufReader, PipeReader, PipeWriter, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::{dup2_stderr, dup2_stdin, dup2_stdout, setsid};
use oci_spec::runtime::Spec;

use crate::console::{Console, Source};
use crate::create::{self, Request};
use crate::error::{Context, Error, Result, one_line};
use crate::process::{ProcessFd, ProcessId, wait_child};
use crate::state::{Directory, ExitRecord, Line, Saved, now, to_json, write_atomically};
use crate::sys::{self, Fork};
use crate::terminal::{self, Signals};
use crate::{bundle, cgroup, mknod, terminals};

/// Creates a container that has a monitor. Returns when the container is created and its console can be reached.
pub fn create(root: &Path, request: &Request) -> Result<()> {
    let (from_monitor, report) = std::io::pipe().context(|| "create a pipe".to_owned())?;
    let pid = match sys::fork().context(|| "fork".to_owned())? {
        Fork::Parent(pid) => pid,
        Fork::Child => {
            drop(from_monitor);
            let code = monitor(root, request, report);
            sys::exit_now(code);
        }
    };
    drop(report);
    let mut answer = String::new();
    // The init holds the pipe, too, until it executes its program: so one line is read, not all there is, and it takes
    // more than the pipe to see that the monitor was killed.
    if speaks(&from_monitor, &ProcessFd::of_child(pid)?)? {
        BufReader::new(from_monitor)
            .read_line(&mut answer)
            .context(|| "read from the monitor".to_owned())?;
    }
    match answer.trim_end() {
        "created" => Ok(()),
        "" => Err(Error::Argument(
            "the monitor died before the container was created".to_owned(),
        )),
        error => Err(Error::Argument(error.to_owned())),
    }
}

/// Waits until there is something to read; false when the monitor has ended without a word.
fn speaks(pipe: &PipeReader, monitor: &ProcessFd) -> Result<bool> {
    loop {
        let mut polled = [
            PollFd::new(pipe.as_fd(), PollFlags::POLLIN),
            PollFd::new(monitor.as_fd(), PollFlags::POLLIN),
        ];
        match poll(&mut polled, PollTimeout::NONE) {
            Ok(_) => return Ok(polled[0].any().unwrap_or(false)),
            Err(Errno::EINTR) => {}
            Err(source) => return Err(source).context(|| "poll".to_owned()),
        }
    }
}

/// The monitor's life. Its exit code is for nobody.
fn monitor(root: &Path, request: &Request, mut report: PipeWriter) -> i32 {
    match begin(root, request) {
        Ok(watch) => {
            let told = report.write_all(b"created\n");
            drop(report);
            if told.is_err() || detach_stdio().is_err() {
                return 1;
            }
            i32::from(watch.until_end().is_err())
        }
        Err(error) => {
            writeln!(report, "{}", one_line(&error)).ok();
            1
        }
    }
}

/// A created container and what its monitor holds.
struct Watch {
    directory: Directory,
    init: ProcessFd,
    /// The console, if there is one, then the other terminals.
    consoles: Vec<Console>,
    signals: Signals,
    /// Answers the container's seccomp filter, where it asks about device nodes.
    agent: Option<mknod::Agent>,
}

fn begin(root: &Path, request: &Request) -> Result<Watch> {
    setsid().context(|| "start a session".to_owned())?;
    sys::become_subreaper().context(|| "become a subreaper".to_owned())?;
    let signals = Signals::block()?;
    let mut passed = create::Console::default();
    let bundle = bundle::load(request)?;
    let further = terminals::wanted(&bundle.spec)?;
    // Before there is a filter that looks for it.
    let agent = mknod::Agent::listen(&bundle.spec)?;
    let spec = bundle.spec.clone();
    let size = bundle
        .spec
        .process()
        .as_ref()
        .and_then(oci_spec::runtime::Process::console_size);
    let mut terminal = None;
    let mut output = None;
    if request.console_socket.is_some() {
        // Somebody else serves the terminal; we only wait.
    } else if bundle::has_terminal(&bundle.spec) {
        let (ours, theirs) = UnixStream::pair().context(|| "create a socket pair".to_owned())?;
        passed.terminal = Some(theirs.into());
        terminal = Some(ours);
    } else {
        let (read, write) = std::io::pipe().context(|| "create a pipe".to_owned())?;
        let null = File::open("/dev/null").context(|| "open /dev/null".to_owned())?;
        let second = write
            .try_clone()
            .context(|| "duplicate a pipe".to_owned())?;
        passed.stdio = Some([null.into(), write.into(), second.into()]);
        output = Some(read);
    }
    let mut saved = create::create(root, request, bundle, &passed)?;
    drop(passed);
    let directory = Directory::of(root, &request.id)?;
    let source = match (terminal, output) {
        (Some(socket), _) => {
            Some(terminal::receive_fd(&socket).map(|pty| Source::Terminal { pty }))
        }
        (None, output) => output.map(|read| {
            Ok(Source::Pipe {
                output: read.into(),
            })
        }),
    };
    let result = source.transpose().and_then(|source| {
        let mut lines: Vec<_> = source
            .map(|source| (Line::Console, source))
            .into_iter()
            .collect();
        lines.extend(further_lines(&spec, &saved, further)?);
        watch(directory.clone(), &mut saved, lines, size, signals)
    });
    let result = result.map(|watch| Watch { agent, ..watch });
    if result.is_err() {
        cgroup::dissolve(&saved.cgroups, saved.unit.as_deref()).ok();
        directory.remove().ok();
    }
    result
}

/// The terminals besides the console.
fn further_lines(spec: &Spec, saved: &Saved, count: u8) -> Result<Vec<(Line, Source)>> {
    if count == 0 {
        return Ok(Vec::new());
    }
    let terminals = terminals::open(spec, &init_of(saved)?, count)?;
    let line = |(number, pty)| (Line::Tty(number), Source::Terminal { pty });
    Ok((1..).zip(terminals).map(line).collect())
}

fn init_of(saved: &Saved) -> Result<ProcessFd> {
    let init = saved
        .init
        .ok_or_else(|| Error::Argument("the container has no init".to_owned()))?;
    ProcessFd::of_child(init.pid)
}

fn watch(
    directory: Directory,
    saved: &mut Saved,
    lines: Vec<(Line, Source)>,
    size: Option<oci_spec::runtime::Box>,
    signals: Signals,
) -> Result<Watch> {
    let mut consoles = Vec::new();
    for (line, source) in lines {
        if let (Source::Terminal { pty }, Some(size)) = (&source, size) {
            let clamp = |n: u64| u16::try_from(n).unwrap_or(u16::MAX);
            sys::set_window_size(pty.as_fd(), clamp(size.width()), clamp(size.height())).ok();
        }
        consoles.push(Console::open(&directory, line, source)?);
    }
    saved.monitor = Some(ProcessId::of(std::process::id().cast_signed())?);
    directory.save(saved)?;
    Ok(Watch {
        init: init_of(saved)?,
        directory,
        consoles,
        signals,
        agent: None,
    })
}

/// Lets go of the caller's standard streams, which may be pipes that somebody reads to the end.
fn detach_stdio() -> Result<()> {
    let null = File::options().read(true).write(true).open("/dev/null");
    let null = null.context(|| "open /dev/null".to_owned())?;
    dup2_stdin(&null)
        .and_then(|()| dup2_stdout(&null))
        .and_then(|()| dup2_stderr(&null))
        .context(|| "detach from the terminal".to_owned())
}

impl Watch {
    /// Serves the terminals until the init ends, and records how it did.
    fn until_end(mut self) -> Result<()> {
        loop {
            let mut polled = vec![
                PollFd::new(self.init.as_fd(), PollFlags::POLLIN),
                PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
            ];
            polled.extend(self.consoles.iter().flat_map(Console::poll_fds));
            polled.extend(self.agent.iter().flat_map(mknod::Agent::poll_fds));
            match poll(&mut polled, PollTimeout::NONE) {
                Ok(_) | Err(Errno::EINTR) => {}
                Err(source) => return Err(source).context(|| "poll".to_owned()),
            }
            let ended = polled[0].any().unwrap_or(false);
            let signalled = polled[1].any().unwrap_or(false);
            self.consoles.iter_mut().for_each(Console::serve);
            self.agent.iter_mut().for_each(mknod::Agent::serve);
            if ended {
                return self.record_end();
            }
            if signalled {
                // Whatever it was, it does not end the container; orphans that became ours are reaped.
                while self.signals.take().is_some() {}
                sys::reap_orphans(self.init.as_fd());
            }
        }
    }

    fn record_end(mut self) -> Result<()> {
        let status = wait_child(&self.init)?;
        self.consoles.iter_mut().for_each(Console::finish);
        let record = ExitRecord {
            exit_code: status.code,
            signal: status.signal,
            time: now(),
        };
        let written = write_atomically(&self.directory.exit_record(), &to_json(&record)?);
        self.consoles.into_iter().for_each(Console::close);
        written
    }
}
