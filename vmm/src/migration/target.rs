// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The target's side, up to the point where there is a machine: waits for a source, takes RAM and state.
//!
//! Runs before the process is confined and before anything of the host is opened, since disks and taps are the
//! source's until it has been held. Its threads have ended by then. From a network a machine comes through the
//! program that [`crate::relay`] starts.

use std::collections::BTreeSet;
use std::io::{self, BufReader};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use atoll_devices::memory::Ram;
use atoll_disk::chain;
use atoll_thread::Kind;
use atoll_vmm_protocol::spec::{DiskBus, MachineSpec, Profile};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::disks::Images;
use super::postcopy::{self, LINES_MAX, Late, PostCopy};
use super::socket::Socket;
use super::source::LOOK;
use super::{Hello, Message, MigrationError, has, pages, receive, send};
use crate::board::Board;
use crate::check;
use crate::kvm::cpu::compare;
use crate::kvm::{Kvm, cpuid};
use crate::machine::Base;
use crate::memory::{UserFault, allocate};
use crate::relay::Relay;
use crate::sandbox;
use crate::saved::{MachineState, entries};

/// How long a source that is there may be silent between two messages, in which it sends its disks and its RAM.
const PATIENCE: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long the data connections may take to come, once the first is there.
const CONNECT_PATIENCE: Duration = Duration::from_secs(60);
/// Most data connections.
const CONNECTIONS_MAX: usize = 64;

/// A machine that has come, and is still the source's.
pub struct Arrived {
    /// How to build the machine: the source's spec.
    pub spec: MachineSpec,
    /// Everything but RAM: vCPUs, interrupt controllers, devices, clocks.
    pub state: MachineState,
    /// The machine's RAM, its pages here but for those that come later, and what of KVM could be made before the rest was known.
    pub base: Base,
    /// The last step: until it is done the machine is the source's.
    pub handover: Handover,
}

/// The connection on which the machine becomes this process's.
pub struct Handover {
    pub(super) control: UnixStream,
    /// Only this process may run the machine.
    pub(super) taken: Arc<AtomicBool>,
}

impl Handover {
    /// The machine is built and held: asks for it. After `Ok` only this process may run it.
    pub fn take_over(&mut self) -> Result<(), MigrationError> {
        let broken = MigrationError::connection;
        send(&mut self.control, &Message::Ready)
            .map_err(broken("tell the source that all is ready"))?;
        match receive(&mut self.control).map_err(broken("wait for the source"))? {
            Message::Commit => {}
            Message::Failed { reason } => return Err(MigrationError::Other(reason)),
            _ => return Err(MigrationError::Unexpected("the hand-over")),
        }
        self.taken.store(true, Ordering::SeqCst);
        // A source that is gone needs not know.
        let _ = send(&mut self.control, &Message::Taken);
        // For every handle of it: whoever carries it is to know that this was all.
        let _ = self.control.shutdown(std::net::Shutdown::Both);
        Ok(())
    }

    /// Another handle of the same connection, to tell the source of a failure when the first is in use.
    pub fn try_clone(&self) -> std::io::Result<Self> {
        Ok(Self {
            control: self.control.try_clone()?,
            taken: self.taken.clone(),
        })
    }

    /// Becomes true when only this process may run the machine.
    pub(super) fn taken(&self) -> Arc<AtomicBool> {
        self.taken.clone()
    }

    /// Tells the source why this host cannot. Only before [`Handover::take_over`] has succeeded.
    pub fn fail(&mut self, reason: &str) {
        let reason = reason.to_owned();
        // A source that is gone needs not know.
        let _ = send(&mut self.control, &Message::Failed { reason });
    }
}

/// Where a source's connections come from, the one for messages first.
#[derive(Debug)]
pub enum Door {
    /// This host.
    Here(UnixListener),
    /// The network.
    Network(Relay),
}

impl Door {
    fn next(&self) -> io::Result<OwnedFd> {
        match self {
            Self::Here(listener) => listener.accept().map(|(stream, _)| stream.into()),
            Self::Network(relay) => relay.next(),
        }
    }
}

impl AsFd for Door {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Here(listener) => listener.as_fd(),
            Self::Network(relay) => relay.as_fd(),
        }
    }
}

/// Waits for a source and takes its machine. `own_spec` replaces the source's, which names the source's files.
pub fn accept(door: &Door, own_spec: Option<MachineSpec>) -> Result<Arrived, MigrationError> {
    let broken = MigrationError::connection;
    // The threads that receive memory are the process's first.
    sandbox::keep_one_heap();
    let control = door.next().map_err(broken("wait for a source"))?;
    let mut control = Handover {
        control: control.into(),
        taken: Arc::default(),
    };
    let arrived = take(door, &mut control, own_spec);
    if let Err(error) = &arrived {
        control.fail(&chain(error));
    }
    let (spec, state, base) = arrived?;
    Ok(Arrived {
        spec,
        state,
        base,
        handover: control,
    })
}

fn take(
    door: &Door,
    control: &mut Handover,
    own_spec: Option<MachineSpec>,
) -> Result<(MachineSpec, MachineState, Base), MigrationError> {
    let broken = MigrationError::connection;
    let handover = control.try_clone().map_err(broken("keep the connection"))?;
    let control = &mut control.control;
    let limited = control.set_read_timeout(Some(PATIENCE));
    limited.map_err(broken("limit the wait for the source"))?;
    let hello = match receive(control).map_err(broken("be greeted by the source"))? {
        Message::Hello(hello) => hello,
        _ => return Err(MigrationError::Unexpected("a greeting")),
    };
    hello.check()?;
    let spec = own_spec.unwrap_or_else(|| hello.spec.clone());
    let mut base = prepare(&hello, &spec)?;
    let faults = hello.post_copy.map(|asked| open_faults(asked, &spec));
    let faults = faults.transpose()?;
    let images = Images::open(&hello.disks, &spec)?;
    send(control, &Message::Welcome).map_err(broken("welcome the source"))?;
    let receivers = Receivers::start(door, hello.data_connections, &base.memory)?;
    let line_count = hello.post_copy.map_or(0, |asked| asked.fault_connections);
    let lines = (0..line_count).map(|_| next(door).map(UnixStream::from));
    let lines: Vec<_> = lines.collect::<Result<_, _>>()?;
    let images = images.serve(|| next(door).map(UnixStream::from))?;
    let mut message = receive(control).map_err(broken("receive the machine"))?;
    let mut missing = None;
    if matches!(message, Message::Remaining) && faults.is_some() {
        let bitmap = postcopy::receive_bitmap(control, &base.memory);
        missing = Some(bitmap.map_err(broken("receive what is missing of memory"))?);
        message = receive(control).map_err(broken("receive the machine"))?;
    }
    let state = match message {
        Message::State(state) => *state,
        Message::Failed { reason } => return Err(MigrationError::Other(reason)),
        _ => return Err(MigrationError::Unexpected("the machine's state")),
    };
    let data = receivers.wait(control)?;
    images.close()?;
    if let (Some(missing), Some(faults)) = (missing, faults) {
        let late = Late::new(faults, &base.memory, missing, data, lines, &handover);
        base.late = Some(late.map_err(broken("empty the memory that comes later"))?);
    }
    Ok((spec, state, base))
}

/// One thread a data connection, until it has brought what it brings before the machine runs.
struct Receivers {
    count: usize,
    /// Of each, in any order.
    came: Receiver<io::Result<BufReader<Socket>>>,
}

impl Receivers {
    fn start(door: &Door, count: usize, memory: &Arc<Ram>) -> Result<Self, MigrationError> {
        let (tell, came) = channel();
        for index in 0..count {
            let stream = Socket::from(next(door)?);
            let (memory, tell) = (memory.clone(), tell.clone());
            let body = move || {
                let mut stream = BufReader::with_capacity(pages::BUFFER_BYTES, stream);
                let received = pages::receive(&memory, &mut stream);
                // Nobody listens when the move has failed.
                let _ = tell.send(received.map(|()| stream));
            };
            let thread = atoll_thread::spawn(Kind::Migration, &format!("receive-{index}"), body);
            let started = thread.map_err(MigrationError::connection("start a receiver's thread"));
            drop(started?);
        }
        Ok(Self { count, came })
    }

    /// The connections, once all that they bring first is here. The end of `control` is the end of the source, which the
    /// others may not tell.
    fn wait(self, control: &UnixStream) -> Result<Vec<BufReader<Socket>>, MigrationError> {
        let broken = MigrationError::connection("receive memory");
        let mut data = Vec::new();
        while data.len() < self.count {
            match self.came.recv_timeout(LOOK) {
                Ok(Ok(stream)) => data.push(stream),
                Ok(Err(error)) => return Err(broken(error)),
                Err(_) if has(control, PollFlags::RDHUP) => {
                    return Err(broken(io::ErrorKind::UnexpectedEof.into()));
                }
                Err(_) => {}
            }
        }
        Ok(data)
    }
}

/// What a machine needs that runs before all of its memory is here, or why it cannot.
fn open_faults(asked: PostCopy, spec: &MachineSpec) -> Result<UserFault, MigrationError> {
    if let Some(obstacle) = postcopy::obstacle(spec) {
        return Err(MigrationError::Refused(obstacle.to_owned()));
    }
    let lines = asked.fault_connections;
    if !(1..=LINES_MAX).contains(&lines) {
        return Err(MigrationError::Refused(format!(
            "{lines} connections for pages that are waited for, from 1 to {LINES_MAX} are possible"
        )));
    }
    UserFault::open().map_err(|error| {
        MigrationError::Refused(format!("post-copy is not possible here: {}", chain(&error)))
    })
}

/// The next data connection.
fn next(door: &Door) -> Result<OwnedFd, MigrationError> {
    let broken = MigrationError::connection;
    let patience = Timespec::try_from(CONNECT_PATIENCE).expect("a minute");
    let mut event = [PollFd::new(door, PollFlags::IN)];
    match poll(&mut event, Some(&patience)) {
        Ok(1..) => {}
        _ => return Err(MigrationError::Unexpected("the data connections")),
    }
    door.next().map_err(broken("take a data connection"))
}

/// What can be told before anything is sent: whether this host can have the machine. What needs nothing of it that only
/// one of two processes can have is made now, not while its guest stands still.
fn prepare(hello: &Hello, spec: &MachineSpec) -> Result<Base, MigrationError> {
    let refused = |error: &dyn std::error::Error| MigrationError::Refused(chain(error));
    let of_disks = hello.disks.iter().map(|disk| disk.connections);
    let connections = of_disks.fold(hello.data_connections, usize::saturating_add);
    if hello.data_connections == 0 || connections > CONNECTIONS_MAX {
        return Err(MigrationError::Refused(format!(
            "{connections} data connections, from 1 to {CONNECTIONS_MAX} are possible"
        )));
    }
    let same = |what: &str, source: u64, own: u64| match source == own {
        true => Ok(()),
        false => Err(MigrationError::Refused(format!(
            "the machine has {source} {what}, this side's spec {own}"
        ))),
    };
    same("vCPUs", hello.spec.cpu_count.into(), spec.cpu_count.into())?;
    same("MiB of memory", hello.spec.memory_mib, spec.memory_mib)?;
    same_devices(&hello.spec, spec)?;
    check::spec(spec).map_err(|error| refused(&error))?;
    let (kvm, bits) = kvm_for(hello)?;
    let board = Board::of(spec.profile);
    let backing = spec.services.memory_backing.into();
    let memory = allocate(board, spec.memory_mib, bits, backing);
    let memory = Arc::new(memory.map_err(|error| refused(&error))?);
    let machine = kvm.create_with(board, spec.cpu_count, &memory);
    Ok(Base {
        machine: machine.map_err(|error| refused(&error))?,
        kvm: Arc::new(kvm),
        memory,
        late: None,
    })
}

/// This host's KVM, if it can give the guest the CPU that it has, and the width of that one's addresses.
pub(super) fn kvm_for(hello: &Hello) -> Result<(Kvm, u8), MigrationError> {
    let refused = |error: &dyn std::error::Error| MigrationError::Refused(chain(error));
    let kvm = Kvm::open().map_err(|error| refused(&error))?;
    let host = kvm.cpu().map_err(|error| refused(&error))?;
    let wanted = entries(&hello.cpuid);
    compare::check(&wanted, &hello.feature_msrs, host).map_err(|unlike| {
        MigrationError::Refused(format!("this host's CPU is not the guest's: {unlike}"))
    })?;
    Ok((kvm, cpuid::address_bits(&wanted)))
}

/// A guest would not find the devices that it has, or find others.
fn same_devices(source: &MachineSpec, own: &MachineSpec) -> Result<(), MigrationError> {
    let [there, here] = [source, own].map(devices);
    let names = |devices: Vec<&String>| match devices.is_empty() {
        true => "none".to_owned(),
        false => devices
            .into_iter()
            .map(String::as_str)
            .collect::<Vec<_>>()
            .join(", "),
    };
    let (lacks, more) = (there.difference(&here), here.difference(&there));
    let (lacks, more): (Vec<_>, Vec<_>) = (lacks.collect(), more.collect());
    match lacks.is_empty() && more.is_empty() {
        true => Ok(()),
        false => Err(MigrationError::Refused(format!(
            "this side's spec has other devices than the machine: it lacks {}, and has more {}",
            names(lacks),
            names(more)
        ))),
    }
}

/// What a guest finds, in words for the refusal. Not here: what only the host sees.
fn devices(spec: &MachineSpec) -> BTreeSet<String> {
    let spec = check::settle(spec).unwrap_or_else(|_| spec.clone());
    let id = |id: &Option<String>| id.clone().unwrap_or_default();
    let disks = spec.disks.iter().map(|disk| match disk.bus {
        DiskBus::Blk => format!("disk {}", id(&disk.id)),
        DiskBus::Scsi => format!("SCSI disk {}", id(&disk.id)),
        DiskBus::Cdrom => format!("CD-ROM drive {}", id(&disk.id)),
    });
    let nets = spec
        .nets
        .iter()
        .map(|net| format!("network card {}", id(&net.id)));
    let services = &spec.services;
    let ports = services
        .ports
        .iter()
        .map(|port| format!("port {}", port.name));
    let filesystems = services
        .filesystems
        .iter()
        .map(|one| format!("file system {}", one.tag));
    let others = [
        ("the firmware's board", spec.profile == Profile::Pc),
        ("a virtio console", spec.console.is_some()),
        ("an entropy source", spec.rng),
        ("a generation id", spec.generation_id.is_some()),
        ("a balloon", services.balloon.is_some()),
        ("a socket device", services.vsock.is_some()),
        ("a watchdog", services.watchdog.is_some()),
        ("a panic device", services.panic.is_some()),
    ];
    let others = others.into_iter().filter(|(_, is_there)| *is_there);
    let others = others.map(|(name, _)| name.to_owned());
    disks
        .chain(nets)
        .chain(ports)
        .chain(filesystems)
        .chain(others)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::MICRO;
    use crate::memory::Backing;

    /// Its pages may come through a connection that outlives it.
    #[test]
    fn the_end_of_the_source_is_the_end_of_its_pages() {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("in");
        let door = Door::Here(UnixListener::bind(&path).unwrap());
        let _outlives = UnixStream::connect(&path).unwrap();
        let ram = Arc::new(allocate(&MICRO, 1, 40, Backing::Anonymous).unwrap());
        let receivers = Receivers::start(&door, 1, &ram).unwrap();
        let (control, source) = UnixStream::pair().unwrap();
        drop(source);
        let error = receivers.wait(&control).unwrap_err();
        assert_eq!(error.to_string(), "receive memory");
    }
}
