// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One conversation with CRIU, the program that turns processes into files and back: `criu swrk FD` takes a request
//! from a socket, tells what it has come to, and answers. Its messages are those of the crate `rust-criu`; that crate's
//! own calls cannot say in which cgroups to restore, and leave errors to whoever reads standard error.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockType, send as send_bytes, socketpair,
};
use nix::unistd::{dup, dup2_stderr, dup2_stdin, dup2_stdout};
use oci_spec::runtime::Spec;
use protobuf::Message;
use rust_criu::rust_criu_protobuf::rpc;

use crate::error::{Context, Error, Result};
use crate::process::{ProcessFd, wait_child};
use crate::sys::{self, Fork, Pid};
use crate::{program, terminal};

/// Most that one message holds; CRIU's longest is an error in words.
const MESSAGE_BYTES_MAX: usize = 64 << 10;

/// Read by CRIU when it exists, unless an annotation names another: where an administrator of runc's has settings.
const SETTINGS: &str = "/etc/criu/runc.conf";

/// An error by name, from which CRIU goes on: without CAP_SYS_RESOURCE it opens no more files than it may.
const HARMLESS: &str = "rlimit: Can't setup";

/// Names a file of settings for this container, as under runc and crun; empty: none.
const SETTINGS_ANNOTATION: &str = "org.criu.config";

/// What a checkpoint and a restore are told alike.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// CRIU itself: a path, or a name to look for.
    pub program: String,
    /// Directory of the images.
    pub images: PathBuf,
    /// Directory of the log, if not that of the images.
    pub work: Option<PathBuf>,
    /// Keep established TCP connections.
    pub tcp_established: bool,
    /// Keep Unix sockets whose other end is outside.
    pub external_unix_sockets: bool,
    /// Keep a session and terminal of the caller's.
    pub shell_job: bool,
    /// Keep file locks.
    pub file_locks: bool,
    /// Drop pages from earlier images once they are in later ones.
    pub auto_dedup: bool,
    /// How much of the cgroups is restored.
    pub cgroups: Cgroups,
}

/// What CRIU does about cgroups: criu(8), --manage-cgroups.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Cgroups {
    /// Properties of cgroups that it makes.
    #[default]
    Soft,
    /// Properties of all.
    Full,
    /// The same, and none may exist.
    Strict,
    /// Nothing: processes stay in the container's cgroup.
    Ignore,
}

impl Options {
    /// What the request says in either direction. `log` is the name of the log file.
    pub(crate) fn request(&self, spec: &Spec, log: &str) -> rpc::Criu_opts {
        let mut options = rpc::Criu_opts::new();
        options.set_log_level(4);
        options.set_log_file(log.to_owned());
        options.set_notify_scripts(true);
        options.set_tcp_established(self.tcp_established);
        options.set_ext_unix_sk(self.external_unix_sockets);
        options.set_shell_job(self.shell_job);
        options.set_file_locks(self.file_locks);
        options.set_auto_dedup(self.auto_dedup);
        options.set_orphan_pts_master(true);
        options.set_manage_cgroups(true);
        options.set_manage_cgroups_mode(match self.cgroups {
            Cgroups::Soft => rpc::Criu_cg_mode::SOFT,
            Cgroups::Full => rpc::Criu_cg_mode::FULL,
            Cgroups::Strict => rpc::Criu_cg_mode::STRICT,
            Cgroups::Ignore => rpc::Criu_cg_mode::IGNORE,
        });
        // Interfaces come from outside, as for a new container.
        options.set_empty_ns(libc::CLONE_NEWNET.cast_unsigned());
        let annotations = spec.annotations().as_ref();
        let settings = annotations.and_then(|a| a.get(SETTINGS_ANNOTATION));
        let settings = settings.map_or(SETTINGS, String::as_str);
        if !settings.is_empty() {
            options.set_config_file(settings.to_owned());
        }
        options
    }

    /// Opens the directories, and makes those that are missing. Answers the images' and the log's.
    pub(crate) fn open_directories(&self) -> Result<(File, Option<File>)> {
        let open = |path: &Path| {
            let mut builder = fs::DirBuilder::new();
            std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
            builder.recursive(true).create(path).at("create", path)?;
            File::open(path).at("open", path)
        };
        Ok((
            open(&self.images)?,
            self.work.as_deref().map(open).transpose()?,
        ))
    }

    /// Where the log of that name is.
    pub(crate) fn log(&self, name: &str) -> PathBuf {
        self.work.as_ref().unwrap_or(&self.images).join(name)
    }
}

/// CRIU at work for us.
#[derive(Debug)]
pub(crate) struct Criu {
    pid: Pid,
    process: ProcessFd,
    socket: OwnedFd,
    /// What it says before it has a log.
    said: File,
}

impl Criu {
    /// Starts it. It has those descriptors of ours that stay open on exec, under the same numbers.
    pub(crate) fn start(name: &str, stdin: Option<BorrowedFd<'_>>) -> Result<Self> {
        let environment: Vec<String> = std::env::vars()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        let path = program::find(name, &environment).map_err(|error| {
            Error::Argument(format!(
                "{error}: checkpoint and restore need CRIU (Debian package criu)"
            ))
        })?;
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )
        .context(|| "create a socket pair".to_owned())?;
        let said = memfd_create("criu", MFdFlags::MFD_CLOEXEC);
        let said = File::from(said.context(|| "create a file in memory".to_owned())?);
        let pid = match sys::fork().context(|| "fork".to_owned())? {
            Fork::Parent(pid) => pid,
            Fork::Child => {
                become_criu(&path, &environment, &theirs, stdin, &said).ok();
                sys::exit_now(1);
            }
        };
        Ok(Self {
            pid,
            process: ProcessFd::of_child(pid)?,
            socket: ours,
            said,
        })
    }

    /// Its process id: whom to move into a cgroup.
    pub(crate) fn pid(&self) -> Pid {
        self.pid
    }

    /// Makes one request, and waits for its answer. `notified` hears of every stage, with the descriptor that comes
    /// with it; its failure is the request's.
    pub(crate) fn ask(
        mut self,
        request: &rpc::Criu_req,
        log: &Path,
        mut notified: impl FnMut(&rpc::Criu_notify, Option<OwnedFd>) -> Result<()>,
    ) -> Result<rpc::Criu_resp> {
        let answer = self.converse(request, &mut notified);
        if request.type_() == rpc::Criu_req_type::PRE_DUMP {
            // It waits for the next of a series.
            self.process.signal(libc::SIGKILL).ok();
        }
        drop(self.socket);
        let status = wait_child(&self.process)?;
        let answer = answer?;
        let succeeded = answer.as_ref().is_some_and(rpc::Criu_resp::success);
        let ended_well = status.code == 0 || request.type_() == rpc::Criu_req_type::PRE_DUMP;
        match answer {
            Some(answer) if succeeded && ended_well => Ok(answer),
            answer => Err(failure(answer.as_ref(), &mut self.said, log, status.code)),
        }
    }

    /// Nothing when it has ended without an answer.
    fn converse(
        &self,
        request: &rpc::Criu_req,
        notified: &mut impl FnMut(&rpc::Criu_notify, Option<OwnedFd>) -> Result<()>,
    ) -> Result<Option<rpc::Criu_resp>> {
        self.send(request)?;
        let mut bytes = vec![0; MESSAGE_BYTES_MAX];
        loop {
            let (count, fd) = match terminal::receive(self.socket.as_fd(), &mut bytes) {
                Err(nix::errno::Errno::ECONNRESET) | Ok((0, _)) => return Ok(None),
                other => other.context(|| "hear from criu".to_owned())?,
            };
            let answer = rpc::Criu_resp::parse_from_bytes(&bytes[..count]).map_err(malformed)?;
            if answer.type_() != rpc::Criu_req_type::NOTIFY || !answer.success() {
                return Ok(Some(answer));
            }
            let result = notified(&answer.notify, fd);
            let mut reply = rpc::Criu_req::new();
            reply.set_type(rpc::Criu_req_type::NOTIFY);
            reply.set_notify_success(result.is_ok());
            self.send(&reply)?;
            result?;
        }
    }

    fn send(&self, request: &rpc::Criu_req) -> Result<()> {
        let bytes = request.write_to_bytes().map_err(malformed)?;
        match send_bytes(self.socket.as_raw_fd(), &bytes, MsgFlags::MSG_NOSIGNAL) {
            // It has ended; what it said comes next.
            Ok(_) | Err(nix::errno::Errno::EPIPE) => Ok(()),
            Err(error) => Err(error).context(|| "talk to criu".to_owned()),
        }
    }
}

fn malformed(error: protobuf::Error) -> Error {
    Error::Io {
        what: "talk to criu".to_owned(),
        source: io::Error::other(error),
    }
}

/// In the child: becomes `criu swrk`.
fn become_criu(
    path: &Path,
    environment: &[String],
    socket: &OwnedFd,
    stdin: Option<BorrowedFd<'_>>,
    mut said: &File,
) -> Result<()> {
    let prepare = || -> nix::Result<OwnedFd> {
        if let Some(stdin) = stdin {
            dup2_stdin(stdin)?;
        }
        dup2_stdout(said)?;
        dup2_stderr(said)?;
        // The duplicate stays open.
        dup(socket)
    };
    let socket = prepare().context(|| "hand over descriptors".to_owned())?;
    let words = ["criu", "swrk", &socket.as_raw_fd().to_string()].map(str::to_owned);
    match program::become_program(path, &words, environment) {
        Err(error) => writeln!(said, "Error {error}").context(|| "write".to_owned()),
        Ok(never) => match never {},
    }
}

/// Why a request failed: the first error in the log, or what was said before there was a log.
fn failure(answer: Option<&rpc::Criu_resp>, said: &mut File, log: &Path, code: i32) -> Error {
    let first = |text: &str| {
        let tells = |line: &&str| line.contains("Error") && !line.contains(HARMLESS);
        let line = text.lines().find(tells)?;
        let start = line.find("Error").unwrap_or_default();
        Some(line[start..].trim().to_owned())
    };
    let logged = fs::read(log).ok();
    let logged = logged.map(|text| String::from_utf8_lossy(&text).into_owned());
    if let Some(reason) = logged.as_deref().and_then(first) {
        return Error::Argument(format!("criu: {reason}; see {}", log.display()));
    }
    let mut text = Vec::new();
    said.seek(SeekFrom::Start(0)).ok();
    said.read_to_end(&mut text).ok();
    let reason = first(&String::from_utf8_lossy(&text));
    let reason = reason.or_else(|| {
        let answer = answer?;
        let words = answer.cr_errmsg().trim();
        let number = || io::Error::from_raw_os_error(answer.cr_errno()).to_string();
        let refused = !answer.success();
        refused.then(|| {
            Some(words.to_owned())
                .filter(|w| !w.is_empty())
                .unwrap_or_else(number)
        })
    });
    let reason = reason.unwrap_or_else(|| format!("it ended with exit code {code}"));
    Error::Argument(format!("criu: {reason}"))
}
