// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The only way by which a virtual machine's process makes a thread: [`spawn`], with a [`Kind`].
//!
//! The VMM has one system-call filter a kind (`atoll-vmm`, `sandbox/filters.rs`). A filter is inherited by the
//! threads that a thread makes, so a confined process has one thread, `starter`, that makes all others, and that
//! also opens what they need ([`in_starter`]): a vCPU whose guest writes DRIVER_OK makes neither rings nor
//! threads itself.
//!
//! ```text
//! vCPU ── in_starter(start_queue) ──► starter ── spawn(Kind::Disk, "blk0-q0") ──► enter(Kind::Disk), then the body
//! ```
//!
//! Not here: what a filter allows, and system calls at all. Without [`confine`], as in tests and in programs that
//! embed a device, threads are made where they are asked for, and run unconfined.

use std::io;
use std::sync::OnceLock;
use std::sync::mpsc::{Sender, channel, sync_channel};
use std::thread::{Builder, JoinHandle};

/// What a thread is for, by the system calls that it makes. One filter each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Kind {
    /// Owns the machine: builds, pauses, resets and ends it; the process's first thread.
    Owner,
    /// Makes all other threads, and opens what they need.
    Starter,
    /// Waits for SIGTERM and SIGINT.
    Signals,
    /// Serves the control API.
    Api,
    /// Runs the guest's code and answers its exits.
    Vcpu,
    /// Serves a queue whose requests read and write files or block devices.
    Disk,
    /// Serves the queues of a network card: reads and writes a tap.
    Net,
    /// Serves a queue that needs the host for memory and wake-ups only: entropy, balloon, console.
    Queue,
    /// Carries bytes between a console and its clients.
    Console,
    /// Serves the socket device's queues: connects to and accepts from Unix sockets.
    Vsock,
    /// Moves the machine to another process.
    Migration,
    /// Serves frozen disks to clients of a Unix socket.
    Export,
    /// Copies a running disk to another one.
    Mirror,
    /// Talks to another process that serves a device: by its connection, and by a new one when it has ended.
    Backend,
    /// Carries a migration between a network and another process. Not in the process of a machine.
    Relay,
    /// Fills guest memory while the guest runs.
    Memory,
    /// The same with pages that come from another process.
    Fetch,
    /// Writes guest memory down while the guest runs.
    Saver,
    /// Owns a disk that is served to others, until a signal ends it; the first thread of a process without a machine.
    Server,
}

impl Kind {
    /// Every kind, in the order of declaration: a kind's number is its index here.
    pub const ALL: &[Self] = &[
        Self::Owner,
        Self::Starter,
        Self::Signals,
        Self::Api,
        Self::Vcpu,
        Self::Disk,
        Self::Net,
        Self::Queue,
        Self::Console,
        Self::Vsock,
        Self::Migration,
        Self::Export,
        Self::Mirror,
        Self::Backend,
        Self::Relay,
        Self::Memory,
        Self::Fetch,
        Self::Saver,
        Self::Server,
    ];
}

type Job = Box<dyn FnOnce() + Send>;

/// How a confined process makes threads. Set once; there is no way back, as there is none from a filter.
struct Confinement {
    /// What a new thread does first.
    enter: fn(Kind),
    /// The thread `starter` takes jobs from here, one at a time.
    jobs: Sender<Job>,
    starter: std::thread::ThreadId,
}

static CONFINEMENT: OnceLock<Confinement> = OnceLock::new();

/// From now on every thread that [`spawn`] makes calls `enter` with its kind before its body, and is made by a
/// thread of its own, `starter`. That one is unconfined until [`seal_starter`], when the threads that must not inherit
/// its filter exist.
///
/// Once a process; a second call changes nothing.
pub fn confine(enter: fn(Kind)) -> io::Result<()> {
    if CONFINEMENT.get().is_some() {
        return Ok(());
    }
    let (jobs, received) = channel::<Job>();
    let thread = Builder::new()
        .name("starter".to_owned())
        .spawn(move || received.into_iter().for_each(|job| job()))?;
    let starter = thread.thread().id();
    let confinement = Confinement {
        enter,
        jobs,
        starter,
    };
    // A second caller that came at the same time: its starter ends, as nobody can send it jobs.
    let _ = CONFINEMENT.set(confinement);
    Ok(())
}

/// Makes a thread `name` (at most 15 bytes are shown by the kernel) that runs `body` under the filter of `kind`.
pub fn spawn<T: Send + 'static>(
    kind: Kind,
    name: &str,
    body: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    let builder = Builder::new().name(name.to_owned());
    in_starter(move || {
        builder.spawn(move || {
            if let Some(confinement) = CONFINEMENT.get() {
                (confinement.enter)(kind);
            }
            body()
        })
    })
}

/// The starter enters its own kind, before any later job. Does not wait for that.
pub fn seal_starter() {
    if let Some(confinement) = CONFINEMENT.get() {
        let enter = confinement.enter;
        let sent = confinement
            .jobs
            .send(Box::new(move || enter(Kind::Starter)));
        assert!(sent.is_ok(), "the starter lives as long as the process");
    }
}

/// Runs `job` on the starter and waits for its result: for whatever opens or makes something that the caller's
/// own filter does not allow. The job may make threads; it must not wait for the caller in any other way.
pub fn in_starter<T: Send + 'static>(job: impl FnOnce() -> T + Send + 'static) -> T {
    let Some(confinement) = CONFINEMENT.get() else {
        return job();
    };
    if std::thread::current().id() == confinement.starter {
        return job();
    }
    let (answer, answered) = sync_channel(1);
    let sent = confinement.jobs.send(Box::new(move || {
        // The asker waits below for as long as this takes.
        let _ = answer.send(job());
    }));
    assert!(sent.is_ok(), "the starter lives as long as the process");
    answered
        .recv()
        .expect("a job of the starter does not panic: its failures are results")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    static ENTERED: Mutex<Vec<Kind>> = Mutex::new(Vec::new());

    fn enter(kind: Kind) {
        ENTERED.lock().unwrap().push(kind);
    }

    #[test]
    fn the_starter_makes_every_thread_and_each_enters_its_kind_first() {
        let here = std::thread::current().id();
        assert_eq!(in_starter(|| std::thread::current().id()), here);

        confine(enter).unwrap();
        confine(enter).unwrap();
        let starter = in_starter(|| std::thread::current().name().map(str::to_owned));
        assert_eq!(starter.as_deref(), Some("starter"));
        // A job may spawn, and ask the starter again, without waiting for itself.
        let thread = in_starter(|| spawn(Kind::Disk, "a", || in_starter(|| 7)));
        assert_eq!(thread.unwrap().join().unwrap(), 7);
        seal_starter();
        in_starter(|| ());
        assert_eq!(*ENTERED.lock().unwrap(), [Kind::Disk, Kind::Starter]);
    }

    #[test]
    fn every_kind_is_listed_once() {
        for (index, kind) in Kind::ALL.iter().enumerate() {
            assert_eq!(*kind as usize, index);
        }
    }
}
