// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Guests: virtual machines and containers behind one small trait, and the map of what belongs to them.
//!
//! ```text
//! config ── keys (table) ── vm::resolve ──► MachineSpec ──► atoll-vmm
//!                      └─── container::bundle ─► config.json ─► atoll-ct
//! Guests ── task tables: create start stop destroy resize ── Site (folders, store, storage, locks)
//! ```
//!
//! The API calls [`Guests`]; nothing outside of this module knows how a guest is run.

pub mod agent;
pub mod bulk;
pub mod cgroup;
pub mod clone;
pub mod config;
pub mod console;
pub mod container;
pub mod create;
pub mod crypt;
pub mod destroy;
pub mod disks;
pub mod guests;
pub mod hardware;
pub mod hold;
pub mod hook;
pub mod keys;
pub mod lock;
pub mod move_disk;
pub mod resize;
pub mod site;
pub mod snapshot;
pub mod start;
pub mod status;
pub mod stop;
pub mod stored;
pub mod strays;
pub mod tables;
pub mod template;
pub mod update;
pub mod view;
pub mod vm;

use std::time::Duration;

use async_trait::async_trait;

use crate::error::Error;
use crate::guest::site::Seat;
use crate::id::GuestKind;
use crate::process::Process;
use crate::storage::name::VolumeId;
use crate::task::{TaskContext, run_steps};

pub use config::{Applied, ConfigUpdate, GuestConfig, PendingRow};
pub use console::Console;
pub use guests::{Action, Guests};
use start::Start;
use stop::Stop;

pub use status::Status;
pub use stored::Stored;

/// Where a guest is in its life on this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Nothing of it is here but its config.
    Stopped,
    /// It runs.
    Running {
        /// Process of the machine, or of the container's init.
        pid: u32,
    },
    /// Its process is gone, and what it used is still here: it has to be cleaned up.
    Ended,
}

/// What a running guest uses. Everything but memory and disk counts up from its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Load {
    /// CPU time in nanoseconds.
    pub cpu_ns: u64,
    /// Memory of the host.
    pub memory_bytes: u64,
    /// Space taken in the root file system, where the host can see that.
    pub disk_bytes: u64,
    /// Read from disks.
    pub read_bytes: u64,
    /// Written to disks.
    pub written_bytes: u64,
    /// Received by its network cards.
    pub received_bytes: u64,
    /// Sent by its network cards.
    pub sent_bytes: u64,
}

/// How a guest is asked to shut down.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    /// How long it has.
    pub timeout: Duration,
    /// End it when it does not obey.
    pub force: bool,
}

impl Default for Ask {
    /// PVE's three minutes, without force.
    fn default() -> Self {
        Self {
            timeout: Duration::from_secs(180),
            force: false,
        }
    }
}

/// A guest of this node, as it is now. What changes it is in task tables.
#[async_trait]
pub trait Guest: Send + Sync {
    /// Where it is in its life. Reads /proc and the run folder; does not wait for the guest.
    fn phase(&self) -> Phase {
        match self.process() {
            Some(process) => Phase::Running { pid: process.pid() },
            None if self.left_traces() => Phase::Ended,
            None => Phase::Stopped,
        }
    }

    /// The machine's process, or the container's init, if it runs.
    fn process(&self) -> Option<Process>;

    /// Whether something of a run, present or past, is on this host.
    fn left_traces(&self) -> bool;

    /// Holds its CPUs.
    async fn pause(&self) -> Result<(), Error>;

    /// Lets a guest whose CPUs are held go on.
    async fn resume(&self) -> Result<(), Error>;

    /// Writes what the host keeps of its disks in memory, once its CPUs are held: copies of them are whole then.
    async fn settle(&self) -> Result<(), Error> {
        Ok(())
    }

    /// Asks it to power off, and does not wait for that.
    async fn power_off(&self, task: &TaskContext) -> Result<(), Error>;

    /// Ends it, by force. It has ended when this returns; what it used may still be here.
    async fn end(&self, task: &TaskContext) -> Result<(), Error>;

    /// Whether its CPUs are held.
    async fn is_paused(&self) -> bool;

    /// What it uses.
    async fn load(&self) -> Load;

    /// Where its console is. Only for a guest that runs.
    fn console(&self) -> Result<Console, Error>;

    /// Tells a line of [`Self::console`] the size of the terminal; a serial line has none.
    async fn resize_console(
        &self,
        _tty: Option<u8>,
        _columns: u16,
        _rows: u16,
    ) -> Result<(), Error> {
        Ok(())
    }

    /// Removes what its last run left behind. Only for a guest that does not run.
    async fn clean_up(&self) -> Result<(), Error>;
}

/// The guest on a seat.
pub fn guest(seat: &Seat) -> Box<dyn Guest> {
    match seat.kind {
        GuestKind::Vm => Box::new(vm::Vm::new(seat.clone())),
        GuestKind::Container => Box::new(container::Container::new(seat.clone())),
    }
}

/// Starts a guest within a task; one that is suspended to disk goes on.
pub async fn start(seat: &Seat, task: &TaskContext) -> Result<(), Error> {
    start_from(seat, None, task).await
}

/// Starts a guest within a task from a snapshot's state, if there is one.
pub async fn start_from(
    seat: &Seat,
    saved: Option<VolumeId>,
    task: &TaskContext,
) -> Result<(), Error> {
    let seat = seat.clone();
    match seat.kind {
        GuestKind::Vm => {
            let mut start = Start::from_saved(seat, saved);
            run_steps(vm::start::STEPS, &mut start, task).await?;
            // Not a step: a machine that runs is never taken back to what is forgotten here.
            match start.saved {
                Some(_) => vm::saved::forget(&start.seat).await,
                None => Ok(()),
            }
        }
        GuestKind::Container => {
            run_steps(container::start::STEPS, &mut Start::new(seat), task).await
        }
    }
}

/// Ends a guest at once within a task.
pub async fn stop(seat: &Seat, ask: Ask, task: &TaskContext) -> Result<(), Error> {
    run_steps(stop::STOP, &mut Stop::new(seat.clone(), ask), task).await
}

/// Asks a guest to shut down within a task, and waits.
pub async fn shutdown(seat: &Seat, ask: Ask, task: &TaskContext) -> Result<(), Error> {
    run_steps(stop::SHUTDOWN, &mut Stop::new(seat.clone(), ask), task).await
}
