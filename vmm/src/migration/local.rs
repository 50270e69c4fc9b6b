// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A machine that goes on in another process of the same host, which may be another version of this program: nothing is
//! copied and nothing opened again. Memory goes along as its memfd, what the host gives as descriptors.
//!
//! ```text
//! old process (thread migrate)                    new process (receive --upgrade, started by ctl)
//!   Greeting: version, spec, CPU    ──►
//!   Item: name; its descriptors     ──►   …       maps memory, makes the virtual machine
//!                                   ◄──  Welcome
//!   hold; State                     ──►            builds the machine, restores it, holds it
//!                                   ◄──  Ready
//!   Commit                          ──►
//!                                   ◄──  Taken
//! ```
//! Exactly one runs, for the reason that `migration` tells: the end of the connection is the end of the process.
//!
//! **Who trusts whom.** The old process may be its guest's by now, and the new one is started by root. So nothing that
//! the old one says names a path that is opened: what the new process has are the descriptors that came, which the old
//! one had, too; and how it is confined, whoever started it says.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_disk::chain;
use atoll_vmm_protocol::api::MigrationStage;
use atoll_vmm_protocol::files::{FILES_MAX, Receiving, Sending};
use serde::{Deserialize, Serialize};

use super::source::{self, Owner, Progress};
use super::target::{Handover, kvm_for};
use super::{Hello, Message, MigrationError, receive, receive_frame, send, send_frame};
use crate::board::Board;
use crate::check;
use crate::machine::{Base, Belongings, belongings};
use crate::memory::map_passed;
use crate::saved::MachineState;

/// What the first field of a greeting says.
const FORMAT: &str = "atoll-upgrade";
/// Version of this protocol.
const VERSION: u32 = 1;
/// How long either side waits for the other.
const PATIENCE: Duration = Duration::from_secs(60);
/// Most names: more than a machine has devices.
const ITEMS_MAX: usize = 4096;

#[derive(Serialize, Deserialize)]
struct Greeting {
    format: String,
    version: u32,
    hello: Hello,
    items: usize,
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
    hello: Hello,
    belongings: &Belongings,
    progress: &Progress,
    owner: &impl Owner,
) -> Result<(), MigrationError> {
    let done = attempt(&mut control, hello, belongings, progress, owner);
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
    hello: Hello,
    belongings: &Belongings,
    progress: &Progress,
    owner: &impl Owner,
) -> Result<(), MigrationError> {
    let broken = MigrationError::connection;
    let limited = control.set_read_timeout(Some(PATIENCE));
    limited.map_err(broken("limit the wait for the new process"))?;
    greet(control, hello, belongings).map_err(broken("greet the new process"))?;
    match source::ask(control)? {
        Message::Welcome => {}
        _ => return Err(MigrationError::Unexpected("a welcome")),
    }
    owner.flush();
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

fn greet(control: &mut UnixStream, hello: Hello, belongings: &Belongings) -> io::Result<()> {
    let items = belongings.iter();
    let greeting = Greeting {
        format: FORMAT.to_owned(),
        version: VERSION,
        hello,
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

/// A machine that is about to come, with everything but its state; it runs in the process that has it meanwhile.
pub struct Expected {
    control: Handover,
    hello: Hello,
    base: Base,
    belongings: Belongings,
}

/// The new process's side, up to the moment in which the guest is held.
pub fn expect(control: UnixStream) -> Result<Expected, MigrationError> {
    let mut control = Handover {
        control,
        taken: Arc::default(),
    };
    let prepared = prepare(&mut control.control);
    if let Err(error) = &prepared {
        control.fail(&chain(error));
    }
    let (hello, base, belongings) = prepared?;
    Ok(Expected {
        control,
        hello,
        base,
        belongings,
    })
}

fn prepare(control: &mut UnixStream) -> Result<(Hello, Base, Belongings), MigrationError> {
    let broken = MigrationError::connection;
    let limited = control.set_read_timeout(Some(PATIENCE));
    limited.map_err(broken("limit the wait for the old process"))?;
    let greeting: Greeting =
        receive_frame(control).map_err(broken("be greeted by the old process"))?;
    if greeting.format != FORMAT || greeting.version > VERSION {
        return Err(MigrationError::Refused(format!(
            "upgrade protocol {} of atoll-vmm {}, this program ({}) knows up to {VERSION}",
            greeting.version,
            greeting.hello.program,
            env!("CARGO_PKG_VERSION")
        )));
    }
    greeting.hello.check()?;
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
    Ok((greeting.hello, base, all))
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

/// A machine that has come, and is still the other process's.
pub struct Arrived {
    /// How to build the machine.
    pub spec: atoll_vmm_protocol::spec::MachineSpec,
    /// Everything but RAM.
    pub state: MachineState,
    /// RAM, and what of KVM there is.
    pub base: Base,
    /// What the host gives it.
    pub belongings: Belongings,
    /// The last step.
    pub handover: Handover,
}

impl Expected {
    /// The old process's standard streams, which are this one's from now on.
    pub fn take_streams(&mut self) -> Result<[OwnedFd; 3], MigrationError> {
        let streams = self.belongings.take(belongings::STREAMS);
        let streams = streams.and_then(|streams| streams.try_into().ok());
        streams.ok_or(MigrationError::Unexpected("three standard streams"))
    }

    /// Has the guest held, and its state come.
    pub fn welcome(mut self) -> Result<Arrived, MigrationError> {
        let state = receive_state(&mut self.control.control);
        if let Err(error) = &state {
            self.control.fail(&chain(error));
        }
        Ok(Arrived {
            spec: self.hello.spec,
            state: state?,
            base: self.base,
            belongings: self.belongings,
            handover: self.control,
        })
    }
}

fn receive_state(control: &mut UnixStream) -> Result<MachineState, MigrationError> {
    let broken = MigrationError::connection;
    send(control, &Message::Welcome).map_err(broken("welcome the machine"))?;
    match receive(control).map_err(broken("receive the machine"))? {
        Message::State(state) => Ok(*state),
        Message::Failed { reason } => Err(MigrationError::Other(reason)),
        _ => Err(MigrationError::Unexpected("the machine's state")),
    }
}
