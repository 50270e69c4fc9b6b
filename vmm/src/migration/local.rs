// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A machine that goes on in another process of the same host, which may be another version of this program: nothing is
//! copied and nothing opened again. Memory goes along as its memfd, what the host gives as descriptors.
//!
//! ```text
//! old process (thread migrate)                    new process (receive --upgrade, started by ctl)
//!   Greeting: version, spec, CPUs   ──►
//!   Item: name; its descriptors     ──►   …       maps memory, enters the sandbox, builds the machine
//!   disks are flushed               ◄──  Welcome
//!   hold; State                     ──►            takes disks and taps, restores the state, holds it
//!                                   ◄──  Ready
//!   Commit                          ──►
//!                                   ◄──  Taken
//! ```
//! Exactly one runs, for the reason that `migration` tells: the end of the connection is the end of the process.
//!
//! **Who trusts whom.** The old process may be its guest's by now, and the new one is started by root. So nothing that
//! the old one says names a path that is opened: what the new process has are the descriptors that came, which the old
//! one had, too; and how it is confined, whoever started it says.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_disk::chain;
use atoll_vmm_protocol::api::MigrationStage;
use atoll_vmm_protocol::files::{FILES_MAX, Receiving, Sending};
use atoll_vmm_protocol::spec::MachineSpec;
use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use super::source::{self, Owner, Progress};
use super::target::{Handover, kvm_for};
use super::{Hello, Message, MigrationError, receive, receive_frame, send, send_frame};
use crate::board::Board;
use crate::check;
use crate::machine::{Base, Belongings, belongings};
use crate::memory::map_passed;
use crate::saved::{MachineState, entries, leaves};

/// What the first field of a greeting says.
const FORMAT: &str = "atoll-upgrade";
/// Version of this protocol. Since 2 the greeting has a [`Frame`], and the new process builds the machine while its guest runs.
const VERSION: u32 = 2;
/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most names: more than a machine has devices.
const ITEMS_MAX: usize = 4096;

#[derive(Serialize, Deserialize)]
struct Greeting {
    format: String,
    version: u32,
    hello: Hello,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    frame: Option<Frame>,
    items: usize,
}

/// What of the machine's state stays as it is while it moves.
#[derive(Serialize, Deserialize)]
pub struct Frame {
    /// The slot of each PCI function, by its name.
    pub slots: BTreeMap<String, usize>,
    /// What each vCPU answers to CPUID, as in [`Hello::cpuid`].
    cpuid: Vec<Vec<[u32; 7]>>,
    /// Number and value of their MSRs that tell features.
    pub feature_msrs: Vec<(u32, u64)>,
}

impl Frame {
    /// Of a machine that is about to move.
    #[must_use]
    pub fn new(
        slots: BTreeMap<String, usize>,
        cpuid: &[Vec<kvm_cpuid_entry2>],
        feature_msrs: Vec<(u32, u64)>,
    ) -> Self {
        let cpuid = cpuid.iter().map(|one| leaves(one)).collect();
        Self {
            slots,
            cpuid,
            feature_msrs,
        }
    }

    /// What each vCPU answers to CPUID.
    #[must_use]
    pub fn cpuid(&self) -> Vec<Vec<kvm_cpuid_entry2>> {
        self.cpuid.iter().map(|one| entries(one)).collect()
    }
}

/// One of the belongings. Its descriptors come with the bytes of this.
#[derive(Serialize, Deserialize)]
struct Item {
    name: String,
    count: usize,
}

/// The machine's side. Blocks until it is the other process's, or until that has failed.
pub fn run(
    mut control: UnixStream,
    machine: (Hello, Frame),
    belongings: &Belongings,
    progress: &Progress,
    owner: &impl Owner,
) -> Result<(), MigrationError> {
    let done = attempt(&mut control, machine, belongings, progress, owner);
    if done.is_err() {
        // The new process is to know: progress has another handle of the connection.
        progress.cut();
    }
    match done {
        Err(_) if progress.is_cancelled() => Err(MigrationError::Cancelled),
        done => done,
    }
}

fn attempt(
    control: &mut UnixStream,
    machine: (Hello, Frame),
    belongings: &Belongings,
    progress: &Progress,
    owner: &impl Owner,
) -> Result<(), MigrationError> {
    let broken = MigrationError::connection;
    let limited = control.set_read_timeout(Some(PATIENCE));
    limited.map_err(broken("limit the wait for the new process"))?;
    greet(control, machine, belongings).map_err(broken("greet the new process"))?;
    // What is durable now is not waited for when the guest is held and an image is closed.
    owner.flush();
    match source::ask(control)? {
        Message::Welcome => {}
        _ => return Err(MigrationError::Unexpected("a welcome")),
    }
    progress.set_stage(MigrationStage::Switching, None);
    let held = Instant::now();
    let state = owner.hold()?;
    let saved = held.elapsed();
    send(control, &Message::State(Box::new(state))).map_err(broken("send the machine's state"))?;
    match source::ask(control)? {
        Message::Ready => {}
        _ => return Err(MigrationError::Unexpected("that the new process is ready")),
    }
    let built = held.elapsed();
    if !progress.commit() {
        return Err(MigrationError::Cancelled);
    }
    // What was not written whole cannot be read as a Commit: the other process has not taken it.
    send(control, &Message::Commit).map_err(broken("hand the machine over"))?;
    let taken = receive(control);
    progress.note_downtime(held.elapsed());
    tracing::info!(
        hold_us = saved.as_micros(),
        build_us = (built - saved).as_micros(),
        "the machine is handed over"
    );
    match taken {
        Ok(Message::Taken) => Ok(()),
        Ok(Message::Failed { reason }) => Err(MigrationError::Other(reason)),
        Err(source) if source::has_ended(&source) => Err(MigrationError::Connection {
            what: "the new process ended before it took the machine",
            source,
        }),
        Ok(_) | Err(_) => Err(MigrationError::Doubt),
    }
}

fn greet(
    control: &mut UnixStream,
    (hello, frame): (Hello, Frame),
    belongings: &Belongings,
) -> io::Result<()> {
    let items = belongings.iter();
    let greeting = Greeting {
        format: FORMAT.to_owned(),
        version: VERSION,
        hello,
        frame: Some(frame),
        items: items.len(),
    };
    send_frame(control, &greeting)?;
    for (name, files) in items {
        let files: Vec<_> = files.iter().map(OwnedFd::as_fd).collect();
        let item = Item {
            name: name.to_owned(),
            count: files.len(),
        };
        send_frame(&mut Sending::new(control, &files), &item)?;
    }
    Ok(())
}

/// A machine that is about to come, and what is not the machine's own.
pub struct Expected {
    /// How to build it.
    pub spec: MachineSpec,
    /// The other process's standard streams, which are this one's from now on.
    pub streams: [OwnedFd; 3],
    /// To tell the other process when this one fails.
    pub source: Handover,
    /// For [`crate::machine::Start::Coming`].
    pub coming: Coming,
}

/// A machine that runs in another process until [`welcome`] has it held, with everything but its state.
pub struct Coming {
    /// RAM, and what of KVM there is.
    pub(crate) base: Base,
    /// What is known of its state.
    pub(crate) frame: Frame,
    /// What the host gives it; then nothing is opened by the spec's paths.
    pub(crate) belongings: Option<Belongings>,
    /// The connection with the process that has it.
    pub(crate) handover: Option<Handover>,
}

/// The new process's side, up to the point where the machine can be built. Blocks for the other one.
pub fn expect(control: UnixStream) -> Result<Expected, MigrationError> {
    let mut handover = Handover {
        control,
        taken: Arc::default(),
    };
    let source = handover.try_clone();
    let source = source.map_err(MigrationError::connection("keep the connection"))?;
    let prepared = prepare(&mut handover.control);
    if let Err(error) = &prepared {
        handover.fail(&chain(error));
    }
    let (spec, streams, coming) = prepared?;
    Ok(Expected {
        spec,
        streams,
        source,
        coming: Coming {
            handover: Some(handover),
            ..coming
        },
    })
}

/// The machine is built but for its state: has the guest held, and that come. Blocks for the other process.
pub fn welcome(handover: &mut Handover) -> Result<MachineState, MigrationError> {
    let control = &mut handover.control;
    let broken = MigrationError::connection;
    send(control, &Message::Welcome).map_err(broken("welcome the machine"))?;
    match receive(control).map_err(broken("receive the machine"))? {
        Message::State(state) => Ok(*state),
        Message::Failed { reason } => Err(MigrationError::Other(reason)),
        _ => Err(MigrationError::Unexpected("the machine's state")),
    }
}

fn prepare(
    control: &mut UnixStream,
) -> Result<(MachineSpec, [OwnedFd; 3], Coming), MigrationError> {
    let broken = MigrationError::connection;
    let limited = control.set_read_timeout(Some(PATIENCE));
    limited.map_err(broken("limit the wait for the old process"))?;
    let greeting: Greeting =
        receive_frame(control).map_err(broken("be greeted by the old process"))?;
    let frame = greeting.frame.filter(|_| greeting.version == VERSION);
    let frame = frame.filter(|_| greeting.format == FORMAT);
    let frame = frame.ok_or_else(|| {
        MigrationError::Refused(format!(
            "upgrade protocol {} of atoll-vmm {}, this program ({}) knows {VERSION}",
            greeting.version,
            greeting.hello.program,
            env!("CARGO_PKG_VERSION")
        ))
    })?;
    greeting.hello.check()?;
    if frame.cpuid.len() != usize::from(greeting.hello.spec.cpu_count) {
        return Err(MigrationError::Unexpected("as many CPUs as the spec has"));
    }
    let mut all = Belongings::default();
    if greeting.items > ITEMS_MAX {
        return Err(MigrationError::Unexpected("fewer descriptors"));
    }
    for _ in 0..greeting.items {
        let (item, files) = receive_item(control).map_err(broken("receive descriptors"))?;
        if item.count != files.len() || files.len() > FILES_MAX {
            return Err(MigrationError::Unexpected(
                "as many descriptors as were told",
            ));
        }
        all.insert(item.name, files);
    }
    let base = base(&greeting.hello, all.take_one(belongings::MEMORY))?;
    let streams = all.take(belongings::STREAMS);
    let streams = streams.and_then(|streams| streams.try_into().ok());
    let streams = streams.ok_or(MigrationError::Unexpected("three standard streams"))?;
    let coming = Coming {
        base,
        frame,
        belongings: Some(all),
        handover: None,
    };
    Ok((greeting.hello.spec, streams, coming))
}

fn receive_item(control: &UnixStream) -> io::Result<(Item, Vec<OwnedFd>)> {
    let mut receiving = Receiving::new(control);
    let item = receive_frame(&mut receiving)?;
    Ok((item, receiving.into_files()))
}

/// What of the machine can be there while its guest runs.
fn base(hello: &Hello, memory: Option<File>) -> Result<Base, MigrationError> {
    let refused = |error: &dyn std::error::Error| MigrationError::Refused(chain(error));
    let spec = &hello.spec;
    check::spec(spec).map_err(|error| refused(&error))?;
    let (kvm, bits) = kvm_for(hello)?;
    let board = Board::of(spec.profile);
    let file = memory.ok_or(MigrationError::Unexpected("the machine's memory"))?;
    let memory = map_passed(board, spec.memory_mib, bits, file);
    let memory = Arc::new(memory.map_err(|error| refused(&error))?);
    let machine = kvm.create_with(board, spec.cpu_count, &memory);
    Ok(Base {
        machine: machine.map_err(|error| refused(&error))?,
        kvm: Arc::new(kvm),
        memory,
        late: None,
    })
}
