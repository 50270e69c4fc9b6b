// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Live migration: a running machine goes on in another process, on this host or another one.
//!
//! ```text
//! source (thread migrate)                         target (atoll-vmm receive, before it is a machine)
//!   Hello: spec, CPU, sizes        ──►            can this host have it?
//!                                  ◄──  Welcome
//!   disks, if they move along      ══►            see `disks`
//!   RAM, round after round         ══►  pages     N data connections, each with its own part of RAM
//!   hold; last pages; State        ──►            builds the machine, restores it, holds it
//!                                  ◄──  Ready
//!   Commit                         ──►            from here on only the target may run
//!                                  ◄──  Taken     sent before the first instruction
//! ```
//! **Exactly one runs.** Until it has written Commit the source may always go on; the target runs only after it has
//! read Commit. In between the source waits for Taken. If the connection ends without it, the target has ended
//! before it ran, since it sends Taken first: the source goes on. That holds where the end of a connection is the
//! end of the process at its other side, as on a Unix socket. Through a tunnel (`relayed`) it does not: then the
//! source stays paused, says "in doubt", and whoever knows what became of the target says `resume` or `shutdown`. Over
//! a network that is [`crate::relay`], which asks the other side.
//!
//! The connection for messages is watched while pages go: its end is the end of the move. So the others need no end of
//! their own, and may be a network's that nobody watches ([`socket`]).
//!
//! Messages are JSON behind a length, pages are binary ([`pages`]). Both sides know the version of the other before
//! anything else; unknown fields are ignored, so that the protocol only grows.
//!
//! A move may end with memory that is sent while the guest runs at the target: see [`postcopy`].
//! To another process of this host, with memory and all else as descriptors: [`local`].
//!
//! Not here: what the owner of the machine does meanwhile (`machine::handover`), networks and encryption (`relay`).

pub mod converge;
pub mod disks;
pub mod local;
pub mod pages;
pub mod postcopy;
pub mod socket;
pub mod source;
pub mod target;

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;

use atoll_vmm_protocol::spec::MachineSpec;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use self::disks::MovingDisk;
use self::postcopy::PostCopy;
use self::target::Handover;
use crate::kvm::cpu::GuestCpu;
use crate::saved::MachineState;

/// What the first field of a Hello says.
const FORMAT: &str = "atoll-migration";
/// Newest version of the protocol that this program speaks. Of version 2 or 3 is a machine whose disks move along: whoever did
/// not know of that would run it on other disks.
const VERSION: u32 = 3;
/// That of a machine that comes whole. Of version 3 is one that may run before all of its memory is there.
const VERSION_WITH_DISKS: u32 = 2;
/// That of all others.
const VERSION_WITHOUT_DISKS: u32 = 1;
/// Longest message: the state of 255 vCPUs takes less than 10 MiB.
const MESSAGE_BYTES_MAX: u32 = 64 << 20;

/// What the two sides say to each other on the control connection.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Message {
    /// Source: this comes.
    Hello(Box<Hello>),
    /// Target: let it come.
    Welcome,
    /// Source: the guest is to run before all of its memory is there. What is missing follows as a bitmap (see
    /// [`postcopy`]), then State.
    Remaining,
    /// Source: everything but RAM, which has been sent.
    State(Box<MachineState>),
    /// Target: everything is in place.
    Ready,
    /// Source: it is yours.
    Commit,
    /// Target: it is mine.
    Taken,
    /// Either: it does not go on, because of this.
    Failed {
        /// One line.
        reason: String,
    },
}

/// What the target must know before it takes anything.
#[derive(Debug, Serialize, Deserialize)]
pub struct Hello {
    format: String,
    version: u32,
    /// Version of the source's `atoll-vmm`, for messages.
    pub program: String,
    /// The machine's spec, as the source runs it.
    pub spec: MachineSpec,
    /// Version of its address map and devices.
    pub machine_version: u32,
    /// Function, index, flags and registers of each leaf of CPUID, of the first vCPU.
    pub cpuid: Vec<[u32; 7]>,
    /// Number and value of its MSRs that tell features.
    #[serde(default)]
    pub feature_msrs: Vec<(u32, u64)>,
    /// Connections that will bring pages, beside the one for messages.
    pub data_connections: usize,
    /// Disks whose content moves along. Their connections come behind those for pages.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<MovingDisk>,
    /// Whether the guest may run before all of its memory is there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post_copy: Option<PostCopy>,
}

impl Hello {
    /// The first message of a migration by this program, in its version.
    #[must_use]
    pub fn new(
        spec: MachineSpec,
        cpu: &GuestCpu,
        data_connections: usize,
        disks: Vec<MovingDisk>,
        post_copy: Option<PostCopy>,
    ) -> Self {
        let version = match (&post_copy, disks.is_empty()) {
            (Some(_), _) => VERSION,
            (None, false) => VERSION_WITH_DISKS,
            (None, true) => VERSION_WITHOUT_DISKS,
        };
        Self {
            format: FORMAT.to_owned(),
            version,
            program: env!("CARGO_PKG_VERSION").to_owned(),
            spec,
            machine_version: crate::layout::MACHINE_VERSION,
            cpuid: crate::saved::leaves(&cpu.cpuid),
            feature_msrs: cpu.msrs.clone(),
            data_connections,
            disks,
            post_copy,
        }
    }

    /// Why this program cannot take it, if it cannot.
    pub fn check(&self) -> Result<(), MigrationError> {
        if self.format != FORMAT || self.version > VERSION {
            return Err(MigrationError::Version {
                found: self.version,
                program: self.program.clone(),
            });
        }
        let known = crate::layout::MACHINE_VERSION;
        if self.machine_version != known {
            return Err(MigrationError::Refused(format!(
                "the machine is of version {}, atoll-vmm {} builds version {known}",
                self.machine_version,
                env!("CARGO_PKG_VERSION")
            )));
        }
        Ok(())
    }
}

/// Why a migration did not happen: the machine is the source's, but for [`MigrationError::Doubt`],
/// [`MigrationError::Lost`] and [`MigrationError::Unheard`].
#[derive(Debug, thiserror::Error)]
pub enum MigrationError {
    /// The connection broke.
    #[error("{what}")]
    Connection {
        /// What was being done.
        what: &'static str,
        /// How.
        source: io::Error,
    },
    /// The other side will not, or could not.
    #[error("the other side: {0}")]
    Other(String),
    /// This side will not.
    #[error("{0}")]
    Refused(String),
    /// The other side speaks a newer protocol.
    #[error(
        "migration protocol {found} of atoll-vmm {program}, this program knows up to {VERSION}"
    )]
    Version {
        /// The version.
        found: u32,
        /// Whose it is.
        program: String,
    },
    /// A disk that moves along cannot be copied.
    #[error("{id}: {reason}")]
    Disk {
        /// Which.
        id: String,
        /// One sentence.
        reason: String,
    },
    /// A message that makes no sense here.
    #[error("expected {0}, something else came")]
    Unexpected(&'static str),
    /// The guest writes faster than the connections carry.
    #[error(
        "the guest writes {dirty} KiB/s, {sent} KiB/s are sent: allow more than {limit_ms} ms of downtime"
    )]
    Diverges {
        /// KiB a second that the guest writes.
        dirty: u64,
        /// KiB a second that are sent.
        sent: u64,
        /// What was allowed.
        limit_ms: u64,
    },
    /// By request.
    #[error("cancelled")]
    Cancelled,
    /// The guest ended meanwhile.
    #[error("the machine has ended")]
    Ended,
    /// It ran at the target, without all of its memory.
    #[error(
        "the guest is lost: the target ended before it had all of the guest's memory, {missing_kib} KiB were still to be sent"
    )]
    Lost {
        /// What nobody had begun to send.
        missing_kib: u64,
        /// How the connection broke.
        source: io::Error,
    },
    /// The same, but all of it was sent, and through a tunnel the end of the connections does not tell of the target.
    #[error(
        "the target has the machine and was sent all of its memory, but the two sides lost each other before it said that \
         all had come: the guest runs there, or is lost if that process has ended"
    )]
    Unheard(#[source] io::Error),
    /// Nobody knows which side has the machine.
    #[error("in doubt: the connection broke after the machine was handed over")]
    Doubt,
}

impl MigrationError {
    /// For `map_err`.
    pub fn connection(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Connection { what, source }
    }

    /// Of a disk that moves along.
    pub fn disk(id: &str, reason: String) -> Self {
        let id = id.to_owned();
        Self::Disk { id, reason }
    }
}

/// Sends one message: its length in four bytes, then JSON. Blocks until the other side has room for it.
pub fn send(stream: &mut impl Write, message: &Message) -> io::Result<()> {
    send_frame(stream, message)
}

/// The same with any message, of which the other side knows what it is.
fn send_frame(stream: &mut impl Write, message: &impl Serialize) -> io::Result<()> {
    let body = serde_json::to_vec(message).expect("messages have string keys only");
    let size = u32::try_from(body.len()).map_err(io::Error::other)?;
    let mut bytes = size.to_le_bytes().to_vec();
    bytes.extend(body);
    stream.write_all(&bytes)
}

/// Receives one message, of bounded length. Blocks until it is there; an error after that leaves the connection of no use.
pub fn receive(stream: &mut impl Read) -> io::Result<Message> {
    receive_frame(stream)
}

/// The same with any message.
fn receive_frame<T: DeserializeOwned>(stream: &mut impl Read) -> io::Result<T> {
    let mut size = [0; 4];
    stream.read_exact(&mut size)?;
    let size = u32::from_le_bytes(size);
    if size > MESSAGE_BYTES_MAX {
        return Err(io::Error::other("a message of impossible size"));
    }
    let mut body = Vec::new();
    stream.take(size.into()).read_to_end(&mut body)?;
    if body.len() as u64 != u64::from(size) {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    serde_json::from_slice(&body).map_err(io::Error::other)
}

/// Whether one of these has happened to a connection. Never blocks.
fn has(stream: &UnixStream, happened: PollFlags) -> bool {
    let mut event = [PollFd::new(stream, happened)];
    // Errors and hang-ups are told whatever is asked for.
    poll(&mut event, Some(&Timespec::default())).is_ok_and(|count| count > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_read_as_they_were_written_and_nothing_else_is() {
        let mut bytes = Vec::new();
        send(&mut bytes, &Message::Ready).unwrap();
        assert!(matches!(receive(&mut &bytes[..]).unwrap(), Message::Ready));
        let cut = receive(&mut &bytes[..bytes.len() - 1]).unwrap_err();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof);
        receive(&mut &[0xff; 8][..]).unwrap_err();
        receive(&mut &b"\x04\0\0\0null"[..]).unwrap_err();
    }

    #[test]
    fn a_newer_source_is_told_apart() {
        let spec = serde_json::json!({
            "name": "m", "cpu_count": 1, "memory_mib": 1, "boot": {"kernel": {"image": "/k"}},
        });
        let cpu = GuestCpu {
            cpuid: Vec::new(),
            msrs: Vec::new(),
        };
        let mut hello = Hello::new(
            serde_json::from_value(spec).unwrap(),
            &cpu,
            1,
            Vec::new(),
            None,
        );
        assert_eq!(hello.version, 1, "older programs take it");
        hello.check().unwrap();
        hello.machine_version += 1;
        assert!(
            hello
                .check()
                .unwrap_err()
                .to_string()
                .contains("is of version")
        );
        hello.version = VERSION + 1;
        let error = hello.check().unwrap_err().to_string();
        assert!(
            error.starts_with("migration protocol 4 of atoll-vmm"),
            "{error}"
        );
    }
}
