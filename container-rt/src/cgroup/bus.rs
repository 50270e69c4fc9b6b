// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A D-Bus connection to systemd: one call at a time, and the end of the job that a call starts. Blocking, with a
//! deadline for the whole connection; no thread, since its callers fork. The values' encoding is zbus's, whose
//! connections would bring an executor; the header and the handshake are here ("Message Protocol" and
//! "Authentication Protocol" of the D-Bus specification).
//!
//! ```text
//!  AUTH EXTERNAL ──► OK        (system bus: Hello, AddMatch)        call ──► reply, with a job's path
//!  BEGIN                                                                ──► signal JobRemoved: how it ended
//! ```
//!
//! systemd's own socket is not used: it is private to systemctl, and did not tell of every job's end when tried.

use std::fmt;
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::de::DeserializeOwned;
use serde::{Serialize, Serializer};
use zbus::wire::serialized::{Context as Position, Data};
use zbus::wire::{DynamicType, Endian, LE, to_bytes};
use zbus::{ObjectPath, OwnedVariant, Str, Type, Variant};

use crate::error::{Error, Result};

/// Made by systemd as the host's first process: sd_booted(3).
const BOOTED: &str = "/run/systemd/system";

/// Where the system bus listens unless the environment says otherwise. D-Bus specification, "System message bus".
const SYSTEM_BUS: &str = "/run/dbus/system_bus_socket";

/// How long one use of a connection may take, jobs included. systemd's own default for a method call is 25 s.
const LIMIT: Duration = Duration::from_secs(30);

/// Longest header and body of a message that we read, bytes. What we ask for is far shorter.
const HEADER_BYTES_MAX: u32 = 64 << 10;
const BODY_BYTES_MAX: u32 = 1 << 20;

/// Length of a header up to and with the length of its fields, bytes.
const FIXED_BYTES: usize = 16;

/// Message types: D-Bus specification, "Header Format".
const CALL: u8 = 1;
const RETURN: u8 = 2;
const ERROR: u8 = 3;
const SIGNAL: u8 = 4;

/// Codes of header fields: same place.
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SIGNATURE: u8 = 8;

/// Whom a call is for.
struct Peer {
    destination: &'static str,
    path: &'static str,
    interface: &'static str,
}

const BUS: Peer = Peer {
    destination: "org.freedesktop.DBus",
    path: "/org/freedesktop/DBus",
    interface: "org.freedesktop.DBus",
};

const SYSTEMD: Peer = Peer {
    destination: "org.freedesktop.systemd1",
    path: "/org/freedesktop/systemd1",
    interface: "org.freedesktop.systemd1.Manager",
};

/// Why a call has no result.
#[derive(Debug, thiserror::Error)]
pub(super) enum CallError {
    /// The one who was asked refused.
    #[error("{message}")]
    Refused {
        /// The error's name, such as `org.freedesktop.systemd1.NoSuchUnit`.
        name: String,
        /// In words.
        message: String,
    },
    /// The connection failed, or took too long.
    #[error("D-Bus connection")]
    Io(#[from] io::Error),
    /// What came is no message, or not the one that was expected.
    #[error("D-Bus message: {0}")]
    Malformed(String),
}

impl From<zbus::Error> for CallError {
    fn from(error: zbus::Error) -> Self {
        Self::Malformed(error.to_string())
    }
}

/// A connection.
pub(super) struct Bus {
    stream: UnixStream,
    deadline: Instant,
    serial: u32,
    /// The unit whose jobs are waited for.
    unit: String,
    /// Its jobs that have ended, by path, with the word for how. As few as this connection starts.
    ended: Vec<(String, String)>,
}

/// A message that came.
struct Message {
    kind: u8,
    fields: Vec<(u8, OwnedVariant)>,
    endian: Endian,
    body: Vec<u8>,
}

impl Bus {
    /// Connects to the host's systemd. `unit` is the one whose jobs are waited for.
    pub(super) fn systemd(unit: &str) -> Result<Self> {
        if !Path::new(BOOTED).is_dir() {
            return Err(Error::Argument(
                "the systemd cgroup driver: systemd does not run here; leave out --systemd-cgroup"
                    .to_owned(),
            ));
        }
        let socket = system_bus();
        Self::of_daemon(&socket, unit).map_err(|error| {
            let (socket, reason) = (socket.display(), crate::error::one_line(&error));
            Error::Argument(format!(
                "connect to the system bus at {socket} (Debian package dbus): {reason}"
            ))
        })
    }

    /// Connects to a bus daemon, and has it pass on the ends of the unit's jobs.
    fn of_daemon(socket: &Path, unit: &str) -> Result<Self, CallError> {
        let mut bus = Self::connect(socket, unit)?;
        bus.call::<_, String>(&BUS, "Hello", &())?;
        let rule = format!(
            "type='signal',sender='{}',interface='{}',member='JobRemoved',arg2='{unit}'",
            SYSTEMD.destination, SYSTEMD.interface
        );
        bus.call::<_, ()>(&BUS, "AddMatch", &rule)?;
        Ok(bus)
    }

    /// Connects, and says who we are: the kernel vouches for it.
    fn connect(socket: &Path, unit: &str) -> Result<Self, CallError> {
        let mut bus = Self {
            stream: UnixStream::connect(socket)?,
            deadline: Instant::now() + LIMIT,
            serial: 0,
            unit: unit.to_owned(),
            ended: Vec::new(),
        };
        let uid = nix::unistd::geteuid().to_string();
        let uid: String = uid.bytes().map(|digit| format!("{digit:02x}")).collect();
        bus.send(format!("\0AUTH EXTERNAL {uid}\r\n").as_bytes())?;
        let answer = bus.line()?;
        if !answer.starts_with("OK ") {
            return Err(CallError::Malformed(format!(
                "authentication answered {answer:?}"
            )));
        }
        bus.send(b"BEGIN\r\n")?;
        Ok(bus)
    }

    /// Asks systemd to start a job, and waits for its end.
    pub(super) fn run_job<B>(&mut self, method: &str, arguments: &B) -> Result<(), CallError>
    where
        B: Serialize + DynamicType,
    {
        let job: String = self.call(&SYSTEMD, method, arguments)?;
        loop {
            if let Some((_, result)) = self.ended.iter().find(|(path, _)| *path == job) {
                return match result.as_str() {
                    "done" => Ok(()),
                    result => Err(CallError::Refused {
                        name: String::new(),
                        message: format!("its job ended as {result}"),
                    }),
                };
            }
            let message = self.receive()?;
            self.note_end(&message);
        }
    }

    /// Asks systemd for what is done when it answers.
    pub(super) fn ask<B>(&mut self, method: &str, arguments: &B) -> Result<(), CallError>
    where
        B: Serialize + DynamicType,
    {
        self.call(&SYSTEMD, method, arguments)
    }

    /// One call and its answer. Ends of jobs that come between are kept.
    fn call<B, R>(&mut self, peer: &Peer, method: &str, arguments: &B) -> Result<R, CallError>
    where
        B: Serialize + DynamicType,
        R: DeserializeOwned + Type,
    {
        self.serial += 1;
        let serial = self.serial;
        self.send(&encode(peer, method, serial, arguments)?)?;
        loop {
            let message = self.receive()?;
            if message.number(REPLY_SERIAL) != Some(serial) {
                self.note_end(&message);
                continue;
            }
            return match message.kind {
                RETURN => Ok(message.body()?),
                ERROR => Err(CallError::Refused {
                    name: message.text(ERROR_NAME).unwrap_or_default(),
                    message: message.body().unwrap_or_default(),
                }),
                kind => Err(CallError::Malformed(format!("type {kind} as an answer"))),
            };
        }
    }

    /// Keeps the end of a job of our unit.
    fn note_end(&mut self, message: &Message) {
        if message.kind == SIGNAL
            && message.text(MEMBER).as_deref() == Some("JobRemoved")
            && let Ok((_, job, unit, result)) =
                message.body::<(u32, zbus::OwnedObjectPath, String, String)>()
            && unit == self.unit
        {
            self.ended.push((job.to_string(), result));
        }
    }

    fn send(&mut self, bytes: &[u8]) -> Result<(), CallError> {
        self.stream.set_write_timeout(Some(self.left()?))?;
        Ok(self.stream.write_all(bytes)?)
    }

    /// Time that is left; a socket's timeout of zero would mean none.
    fn left(&self) -> Result<Duration, CallError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let text = format!("no answer within {} s", LIMIT.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, text).into());
        }
        Ok(left)
    }

    fn fill(&mut self, mut buffer: &mut [u8]) -> Result<(), CallError> {
        while !buffer.is_empty() {
            self.stream.set_read_timeout(Some(self.left()?))?;
            match self.stream.read(buffer) {
                Ok(0) => return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
                Ok(count) => buffer = &mut buffer[count..],
                // Of the timeout, too: the next turn says so.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// A line of the handshake. After it the peer says nothing by itself, but byte by byte nothing is lost anyway.
    fn line(&mut self) -> Result<String, CallError> {
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") && line.len() < 512 {
            let mut byte = [0];
            self.fill(&mut byte)?;
            line.extend(byte);
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }

    fn receive(&mut self) -> Result<Message, CallError> {
        let mut header = vec![0; FIXED_BYTES];
        self.fill(&mut header)?;
        let endian = match header[0] {
            b'l' => Endian::Little,
            b'B' => Endian::Big,
            other => return Err(CallError::Malformed(format!("byte order {other:#x}"))),
        };
        let lengths = Data::new(&header[..], Position::new(endian, 0));
        let ((_, kind, _, _, body, _), _): ((u8, u8, u8, u8, u32, u32), _) =
            lengths.deserialize()?;
        let (fields, _): (u32, _) = lengths.slice(12..).deserialize()?;
        if fields > HEADER_BYTES_MAX || body > BODY_BYTES_MAX {
            return Err(CallError::Malformed(format!(
                "{fields} bytes of header and {body} of body: too long"
            )));
        }
        let size = |bytes: u32| usize::try_from(bytes).expect("it was compared with a limit");
        // The body begins at a multiple of eight.
        header.resize((FIXED_BYTES + size(fields)).next_multiple_of(8), 0);
        self.fill(&mut header[FIXED_BYTES..])?;
        let data = Data::new(&header[12..], Position::new(endian, 12));
        let (fields, _) = data.deserialize()?;
        let mut body = vec![0; size(body)];
        self.fill(&mut body)?;
        Ok(Message {
            kind,
            fields,
            endian,
            body,
        })
    }
}

impl Message {
    fn field(&self, code: u8) -> Option<&Variant<'_>> {
        let (_, value) = self.fields.iter().find(|(known, _)| *known == code)?;
        Some(value)
    }

    fn text(&self, code: u8) -> Option<String> {
        match self.field(code)? {
            Variant::Str(text) => Some(text.to_string()),
            Variant::ObjectPath(path) => Some(path.to_string()),
            _ => None,
        }
    }

    fn number(&self, code: u8) -> Option<u32> {
        match self.field(code)? {
            Variant::U32(number) => Some(*number),
            _ => None,
        }
    }

    fn body<R: DeserializeOwned + Type>(&self) -> Result<R, CallError> {
        let data = Data::new(&self.body[..], Position::new(self.endian, 0));
        Ok(data.deserialize()?.0)
    }
}

impl fmt::Debug for Bus {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Bus").finish_non_exhaustive()
    }
}

/// The system bus's socket. Of the environment's addresses, the kind that names a path is understood.
fn system_bus() -> PathBuf {
    let address = std::env::var("DBUS_SYSTEM_BUS_ADDRESS").ok();
    let path = address.and_then(|address| {
        let mut one = address.split(';');
        one.find_map(|one| one.strip_prefix("unix:path=").map(PathBuf::from))
    });
    path.unwrap_or_else(|| SYSTEM_BUS.into())
}

/// The value of a header field. That of the signature is not a signature's usual encoding: a body of several values
/// has no parentheses around them.
enum Field<'a> {
    Value(Variant<'a>),
    BodySignature(String),
}

impl Type for Field<'_> {
    const SIGNATURE: &'static zbus::Signature = &zbus::Signature::Variant;
}

impl Serialize for Field<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        use serde::ser::SerializeStruct;
        match self {
            Self::Value(value) => value.serialize(serializer),
            Self::BodySignature(text) => {
                let mut variant = serializer.serialize_struct("Variant", 2)?;
                variant.serialize_field("signature", &zbus::Signature::Signature)?;
                variant.serialize_field("value", text)?;
                variant.end()
            }
        }
    }
}

/// A method call as it goes over the wire.
fn encode<B>(peer: &Peer, method: &str, serial: u32, arguments: &B) -> Result<Vec<u8>, CallError>
where
    B: Serialize + DynamicType,
{
    let body = to_bytes(Position::new(LE, 0), arguments)?;
    let text = |text: &str| Field::Value(Variant::Str(Str::from(text.to_owned())));
    let mut fields = vec![
        (PATH, Field::Value(ObjectPath::try_from(peer.path)?.into())),
        (INTERFACE, text(peer.interface)),
        (MEMBER, text(method)),
        (DESTINATION, text(peer.destination)),
    ];
    let signature = arguments.signature().to_string_no_parens();
    if !signature.is_empty() {
        fields.push((SIGNATURE, Field::BodySignature(signature)));
    }
    let length = u32::try_from(body.len()).map_err(|e| CallError::Malformed(e.to_string()))?;
    let header = (b'l', CALL, 0_u8, 1_u8, length, serial, fields);
    let mut bytes = to_bytes(Position::new(LE, 0), &header)?.to_vec();
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes.extend_from_slice(&body);
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A bus daemon of this test's own. Everybody may do anything on it.
    struct Daemon {
        process: Child,
        directory: tempfile::TempDir,
    }

    impl Daemon {
        fn start() -> Option<Self> {
            let directory = tempfile::tempdir().unwrap();
            let socket = directory.path().join("bus");
            let settings = directory.path().join("settings.conf");
            let text = format!(
                "<busconfig><listen>unix:path={}</listen><auth>EXTERNAL</auth><policy context=\"default\">\
                 <allow send_destination=\"*\"/><allow eavesdrop=\"true\"/><allow own=\"*\"/></policy></busconfig>",
                socket.display()
            );
            std::fs::write(&settings, text).unwrap();
            let mut command = Command::new("dbus-daemon");
            command.arg("--nofork").arg("--config-file").arg(&settings);
            let process = match command.stdin(Stdio::null()).spawn() {
                Ok(process) => process,
                Err(error) => {
                    println!("ATOLL-SKIP: dbus-daemon (Debian package dbus-daemon): {error}");
                    return None;
                }
            };
            let daemon = Self { process, directory };
            let deadline = Instant::now() + Duration::from_secs(60);
            while UnixStream::connect(daemon.socket()).is_err() {
                assert!(Instant::now() < deadline, "dbus-daemon does not listen");
                std::thread::sleep(Duration::from_millis(20));
            }
            Some(daemon)
        }

        fn socket(&self) -> PathBuf {
            self.directory.path().join("bus")
        }
    }

    impl Drop for Daemon {
        fn drop(&mut self) {
            self.process.kill().ok();
            self.process.wait().ok();
        }
    }

    #[test]
    fn a_real_daemon_understands_and_is_understood() {
        let Some(daemon) = Daemon::start() else {
            return;
        };
        let mut bus = Bus::of_daemon(&daemon.socket(), "a.scope").unwrap();
        let names: Vec<String> = bus.call(&BUS, "ListNames", &()).unwrap();
        assert!(
            names.iter().any(|name| name == BUS.destination),
            "{names:?}"
        );
        let answer: u32 = bus.call(&BUS, "RequestName", &("a.b", 0_u32)).unwrap();
        assert_eq!(answer, 1, "the new owner of the name");
        let properties: Vec<(&str, Variant<'_>)> = vec![
            ("MemoryMax", 1_u64.into()),
            ("PIDs", vec![7_u32].into()),
            ("Delegate", true.into()),
        ];
        // The bus reads all of a message before it says that nobody has such a name.
        let error = bus.run_job("StartTransientUnit", &("a.scope", "fail", properties));
        match error.unwrap_err() {
            CallError::Refused { name, message } => {
                assert_eq!(name, "org.freedesktop.DBus.Error.ServiceUnknown");
                assert!(message.contains(SYSTEMD.destination), "{message}");
            }
            other => panic!("{other}"),
        }
    }

    /// A signal of systemd's, from another connection.
    fn job_removed(job: &str, unit: &str, result: &str) -> Vec<u8> {
        let path = ObjectPath::try_from(job.to_owned()).unwrap();
        let body = (7_u32, path, unit, result);
        let mut bytes = encode(&SYSTEMD, "JobRemoved", 9, &body).unwrap();
        bytes[1] = SIGNAL;
        bytes
    }

    /// The other end of a connection, which has said what it says.
    fn scripted(said: &[Vec<u8>]) -> (Bus, UnixStream) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        for bytes in said {
            theirs.write_all(bytes).unwrap();
        }
        let bus = Bus {
            stream: ours,
            deadline: Instant::now() + LIMIT,
            serial: 0,
            unit: "a.scope".to_owned(),
            ended: Vec::new(),
        };
        (bus, theirs)
    }

    /// An answer to the first call.
    fn answer(kind: u8, body: &str) -> Vec<u8> {
        let body = to_bytes(Position::new(LE, 0), body).unwrap();
        let serial = Field::Value(Variant::U32(1));
        let name = Field::Value(Variant::Str("some.Error".into()));
        let fields = vec![(REPLY_SERIAL, serial), (ERROR_NAME, name)];
        let length = u32::try_from(body.len()).unwrap();
        let header = (b'l', kind, 0_u8, 1_u8, length, 5_u32, fields);
        let mut bytes = to_bytes(Position::new(LE, 0), &header).unwrap().to_vec();
        bytes.resize(bytes.len().next_multiple_of(8), 0);
        bytes.extend_from_slice(&body);
        bytes
    }

    #[test]
    fn a_job_is_over_when_its_own_signal_says_so() {
        let run = |said: &[Vec<u8>]| {
            let (mut bus, _theirs) = scripted(said);
            bus.run_job("StopUnit", &("a.scope", "replace"))
        };
        let others = [
            job_removed("/job/1", "a.scope", "failed"),
            job_removed("/job/2", "b.scope", "failed"),
            answer(RETURN, "/job/2"),
            job_removed("/job/3", "a.scope", "failed"),
        ];
        let with = |last: Vec<u8>| [&others[..], &[last]].concat();
        run(&with(job_removed("/job/2", "a.scope", "done"))).unwrap();
        // The end may be told before the answer.
        run(&[
            job_removed("/job/2", "a.scope", "done"),
            answer(RETURN, "/job/2"),
        ])
        .unwrap();
        let error = run(&with(job_removed("/job/2", "a.scope", "timeout"))).unwrap_err();
        assert_eq!(error.to_string(), "its job ended as timeout");
        let error = run(&[answer(ERROR, "no such unit")]).unwrap_err();
        assert!(matches!(&error, CallError::Refused { name, .. } if name == "some.Error"));
        assert_eq!(error.to_string(), "no such unit");
    }

    #[test]
    fn nonsense_is_refused_before_it_is_stored() {
        let mut long = answer(RETURN, "/job/1");
        long[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        let mut wide = answer(RETURN, "/job/1");
        wide[12..16].copy_from_slice(&u32::MAX.to_le_bytes());
        for (said, why) in [
            (b"x".repeat(16), "byte order"),
            (long, "too long"),
            (wide, "too long"),
        ] {
            let (mut bus, _theirs) = scripted(&[said]);
            let error = bus.ask("Reload", &()).unwrap_err().to_string();
            assert!(error.contains(why), "{error}");
        }
    }
}
