// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Migration over a network: carries the local connections of `atoll_vmm::migration` through TCP, with TLS.
//!
//! ```text
//!   ctl migrate                                                     receive
//!        ║ (`Caller`)                                                  ║
//!   atoll-relay connect ══════════════ TCP, TLS ══════════════ atoll-relay serve (sandbox)
//!        ║ socket pairs                                                ║ socket pairs
//!   machine (sandbox)                                          machine-to-be (atoll-vmm receive)
//! ```
//! Neither machine's process sees the network, a key or TLS's code, which is why this is a program of its own; it has
//! no guest. The target's side outlives the moment at which `receive` enters its sandbox, and talks to strangers
//! until they have shown a certificate: it runs in a sandbox too. The source's side lives as long as `ctl migrate`,
//! and may have to connect until the end: it is confined as little as that. Keys are read from files, which their
//! callers name; no argument has one.
//!
//! **On the network** (inside TLS) a connection begins with a preface, which is answered by a verdict; then
//! frames go both ways (`wire`): what the local connection carries, and a beat when there is nothing, so that a side
//! that hears nothing for its silence limit knows that the other one, or the network, is gone.
//! **Without TLS** there is nothing to be done to pages. Their connections are given to the machines after the greeting:
//! no byte passes a relay. Nobody watches these; the one for messages tells both machines of the network's end.
//!
//! **Exactly one runs**, also when the network is cut. A target that waits for Commit ends when its connection does.
//! A source whose connection ends between Commit and Taken is in doubt and stays paused; `ctl migrate` then has the
//! target's relay asked, over a new connection, what became of the machine. The relay knows: it has read Taken from the
//! target's process, or that process's end without it, which is the end of any hope that it takes the machine later.
//! Only while nobody answers the doubt remains, and is said.

mod connect;
mod serve;
mod session;
#[cfg(feature = "testing")]
pub mod testing;
mod tls;
mod wire;

use std::io;
use std::net::{SocketAddr, ToSocketAddrs};
use std::path::PathBuf;
use std::time::Duration;

use atoll_vmm::relay::SCHEME;
use atoll_vmm::sandbox::SandboxError;

pub use connect::Relay;
pub use serve::serve;
pub use tls::{Protection, TlsFiles};

/// How long the other side may be silent, unless it is said otherwise.
pub const SILENCE_LIMIT: Duration = Duration::from_secs(20);
/// The shortest that makes sense: four beats on a busy host.
pub const SILENCE_LIMIT_MIN: Duration = Duration::from_millis(500);
/// The longest that the network's format tells.
const SILENCE_LIMIT_MAX: Duration = Duration::from_secs(24 * 3600);
/// How long it may take to connect, to agree on TLS, and to be answered.
const GREETING_PATIENCE: Duration = Duration::from_secs(10);

/// What every connection begins with: who speaks, and in which version.
const MAGIC: [u8; 8] = *b"ATOLLMG1";

/// Which connections belong together: random, chosen by the source.
type Journey = [u8; 16];

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Role {
    /// Messages. The first one of a journey.
    Control,
    /// Pages, pages that somebody waits for, or a disk.
    Data,
    /// The question what became of the machine.
    Inquiry,
    /// Pages, without TLS: after the greeting the connection is the machines' own, without frames.
    Pages,
}

/// What the source says first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Preface {
    role: Role,
    journey: Journey,
    /// After which silence it gives up, in milliseconds.
    silence_ms: u32,
}

/// What the target says to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    /// Go on; the target gives up after this silence, in milliseconds.
    Welcome(u32),
    /// Another machine is on its way to this target.
    Busy,
    /// The target took the machine.
    Taken,
    /// It did not, and will not.
    NotTaken,
    /// It may still.
    Undecided,
}

const PREFACE_BYTES: usize = 29;
const VERDICT_BYTES: usize = 5;

impl Preface {
    fn to_bytes(self) -> [u8; PREFACE_BYTES] {
        let mut bytes = [0; PREFACE_BYTES];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8] = match self.role {
            Role::Control => 0,
            Role::Data => 1,
            Role::Inquiry => 2,
            Role::Pages => 3,
        };
        bytes[9..25].copy_from_slice(&self.journey);
        bytes[25..].copy_from_slice(&self.silence_ms.to_le_bytes());
        bytes
    }

    /// `None`: this is not a source that can be understood.
    fn of_bytes(bytes: [u8; PREFACE_BYTES]) -> Option<Self> {
        let role = match bytes[8] {
            0 => Role::Control,
            1 => Role::Data,
            2 => Role::Inquiry,
            3 => Role::Pages,
            _ => return None,
        };
        let journey = bytes[9..25].try_into().expect("16 bytes");
        let silence_ms = u32::from_le_bytes(bytes[25..].try_into().expect("4 bytes"));
        (bytes[..8] == MAGIC).then_some(Self {
            role,
            journey,
            silence_ms,
        })
    }
}

impl Verdict {
    fn to_bytes(self) -> [u8; VERDICT_BYTES] {
        let (kind, value) = match self {
            Self::Welcome(silence_ms) => (0, silence_ms),
            Self::Busy => (1, 0),
            Self::Taken => (2, 0),
            Self::NotTaken => (3, 0),
            Self::Undecided => (4, 0),
        };
        let [a, b, c, d] = u32::to_le_bytes(value);
        [kind, a, b, c, d]
    }

    fn of_bytes([kind, a, b, c, d]: [u8; VERDICT_BYTES]) -> Option<Self> {
        match kind {
            0 => Some(Self::Welcome(u32::from_le_bytes([a, b, c, d]))),
            1 => Some(Self::Busy),
            2 => Some(Self::Taken),
            3 => Some(Self::NotTaken),
            4 => Some(Self::Undecided),
            _ => None,
        }
    }
}

/// Why the network cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RelayError {
    /// Not an address.
    #[error("{0}: an address on the network is tcp:HOST:PORT")]
    Address(String),
    /// No such host, or none that can be reached.
    #[error("{what} {address}")]
    Network {
        /// What was tried.
        what: &'static str,
        /// Where.
        address: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// Neither TLS nor the word that does without.
    #[error(
        "{0}: a machine's memory goes over a network with TLS: name --tls-ca, --tls-cert and --tls-key (or say \
         --insecure, where nobody else can reach that network)"
    )]
    Unprotected(String),
    /// Both.
    #[error("--insecure does without TLS: leave out --tls-ca, --tls-cert and --tls-key")]
    Contradiction,
    /// What a certificate cannot be for.
    #[error("{0}: a certificate is for a host's name or its address (--tls-name)")]
    Name(String),
    /// A certificate or a key that is none.
    #[error("{what} {path}: {reason}")]
    File {
        /// What it should be.
        what: &'static str,
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// TLS refuses what the files say.
    #[error("TLS")]
    Tls(#[source] rustls::Error),
    /// The other side refuses.
    #[error("{address}: {reason}")]
    Refused {
        /// Where.
        address: String,
        /// Why.
        reason: &'static str,
    },
    /// A limit that cannot be kept.
    #[error(
        "a silence limit of {0} ms: from {min} to {max} are possible",
        min = SILENCE_LIMIT_MIN.as_millis(),
        max = SILENCE_LIMIT_MAX.as_millis()
    )]
    Silence(u64),
    /// The host lacks something.
    #[error("{what}")]
    Host {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The process cannot be confined.
    #[error(transparent)]
    Sandbox(#[from] SandboxError),
}

/// A place on the network, as `tcp:HOST:PORT` names it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    /// Without the brackets of an IPv6 address.
    host: String,
    port: u16,
}

impl Address {
    /// What `text` names.
    pub fn parse(text: &str) -> Result<Self, RelayError> {
        let parsed = || {
            let (host, port) = text.strip_prefix(SCHEME)?.rsplit_once(':')?;
            let bare = host.strip_prefix('[').and_then(|it| it.strip_suffix(']'));
            let ambiguous = bare.is_none() && host.contains(':');
            let host = bare.unwrap_or(host);
            let port = port.parse().ok()?;
            (!host.is_empty() && !ambiguous).then(|| Self {
                host: host.to_owned(),
                port,
            })
        };
        parsed().ok_or_else(|| RelayError::Address(text.to_owned()))
    }

    fn resolve(&self, what: &'static str) -> Result<Vec<SocketAddr>, RelayError> {
        let found = (self.host.as_str(), self.port).to_socket_addrs();
        let found = found.map_err(|source| RelayError::Network {
            what,
            address: self.to_string(),
            source,
        })?;
        Ok(found.collect())
    }
}

impl std::fmt::Display for Address {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.host.contains(':') {
            true => write!(out, "{SCHEME}[{}]:{}", self.host, self.port),
            false => write!(out, "{SCHEME}{}:{}", self.host, self.port),
        }
    }
}

/// The limit that was asked for, or the usual one.
pub fn silence_limit(asked_ms: Option<u64>) -> Result<Duration, RelayError> {
    let limit = asked_ms.map_or(SILENCE_LIMIT, Duration::from_millis);
    match (SILENCE_LIMIT_MIN..=SILENCE_LIMIT_MAX).contains(&limit) {
        true => Ok(limit),
        false => Err(RelayError::Silence(asked_ms.unwrap_or_default())),
    }
}

fn milliseconds(limit: Duration) -> u32 {
    u32::try_from(limit.as_millis()).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_name_a_host_and_a_port() {
        for good in ["tcp:node2:6000", "tcp:10.0.0.1:0", "tcp:[fe80::1]:6000"] {
            assert_eq!(Address::parse(good).unwrap().to_string(), good);
        }
        for bad in [
            "move.sock",
            "tcp:",
            "tcp:node2",
            "tcp::6000",
            "tcp:fe80::1:6000",
            "tcp:a:b",
        ] {
            Address::parse(bad).unwrap_err();
        }
    }

    #[test]
    fn greetings_are_read_as_they_were_written() {
        for role in [Role::Control, Role::Data, Role::Inquiry, Role::Pages] {
            let preface = Preface {
                role,
                journey: [7; 16],
                silence_ms: 500,
            };
            assert_eq!(Preface::of_bytes(preface.to_bytes()), Some(preface));
        }
        for verdict in [
            Verdict::Welcome(1 << 20),
            Verdict::Busy,
            Verdict::Taken,
            Verdict::NotTaken,
            Verdict::Undecided,
        ] {
            assert_eq!(Verdict::of_bytes(verdict.to_bytes()), Some(verdict));
        }
        assert_eq!(Preface::of_bytes([0; PREFACE_BYTES]), None);
        assert_eq!(Verdict::of_bytes([9; VERDICT_BYTES]), None);
    }
}
