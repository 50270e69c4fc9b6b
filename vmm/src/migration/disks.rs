// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Disks whose content moves with the machine: a mirror of each at the source (`atoll_disk::Mirror`), which writes
//! through connections of the migration to a server of the target's image (`atoll_disk::nbd`).
//!
//! ```text
//! source (thread migrate)                          target (atoll-vmm receive)
//!   Hello: disks and their sizes     ──►           opens and locks its images, compares
//!                                    ◄──  Welcome
//!   hold; all blocks are marked; release
//!   blocks, pass after pass          ══►  NBD      writes them
//!   little is left: memory is sent   ══►
//!   hold; the rest, flushed; the mirrors end
//!   State                            ──►           ends the server, flushes, closes; the machine opens them anew
//! ```
//! **What the target has is the disk from State on, and nothing before.** Until then the guest's writes go to the source's
//! image only, which is complete and locked at every moment, whatever fails: a failed mirror is a failed move. From State
//! on nobody writes before Commit has decided who runs.
//!
//! The images may have other formats than the source's, and have to be as large: a guest's saved state tells the size.
//! What a target's image held is lost, also when the move fails. A record of changed blocks does not move along: the
//! target begins a new one, and the next backup reads the whole disk.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{JoinHandle, sleep};
use std::time::{Duration, Instant};

use atoll_disk::nbd::{self, Content, Export};
use atoll_disk::{BlockBackend, Mirror, chain};
use atoll_thread::Kind;
use atoll_vmm_protocol::api::DiskMigration;
use atoll_vmm_protocol::spec::MachineSpec;
use serde::{Deserialize, Serialize};

use super::MigrationError;
use super::source::{Owner, Progress};
use crate::{check, resources};

/// How often mirrors are asked how far they are.
const POLL: Duration = Duration::from_millis(20);
/// How long the guest stands still for the rest of its disks at most. A move that has copied all of them and is late has
/// to begin anew, which is worse for everybody than this; usually it is one flush.
const SETTLE_PATIENCE: Duration = Duration::from_secs(10);
/// Most connections of one disk.
const CONNECTIONS_MAX: usize = 16;

/// A disk that moves along, as the target is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MovingDisk {
    /// Its name in the specs of both sides.
    pub id: String,
    /// Its size.
    pub size_bytes: u64,
    /// Connections that will bring it, behind those for pages.
    pub connections: usize,
}

/// The same with its connections, at the source.
pub struct Moving {
    /// The disk.
    pub disk: MovingDisk,
    /// As many as it says.
    pub connections: Vec<UnixStream>,
}

/// The target's image of a disk, as the source reaches it.
pub struct Target {
    /// The disk.
    pub id: String,
    /// Where its content goes.
    pub backend: Arc<dyn BlockBackend>,
}

/// A disk that is being copied.
pub struct Following {
    /// The disk.
    pub id: String,
    /// What copies it.
    pub mirror: Mirror,
}

/// How far the disks of one move are, for who moves them and for who asks.
pub(super) struct Course {
    sockets: Vec<UnixStream>,
    // Held to look and to exchange; the mirrors' own locks come behind it.
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    following: Vec<Arc<Following>>,
    /// As they were when they ended.
    last: Vec<DiskMigration>,
}

impl Course {
    /// Of a move that has not begun.
    pub(super) fn new(moving: &[Moving]) -> io::Result<Self> {
        let sockets = moving.iter().flat_map(|one| &one.connections);
        Ok(Self {
            sockets: sockets
                .map(UnixStream::try_clone)
                .collect::<Result<_, _>>()?,
            state: Mutex::default(),
        })
    }

    /// For the control API.
    pub(super) fn told(&self) -> Vec<DiskMigration> {
        let state = self.lock();
        match state.following.is_empty() {
            true => state.last.clone(),
            false => state.following.iter().map(|one| one.told()).collect(),
        }
    }

    /// Ends the connections, so that nobody goes on waiting for them.
    pub(super) fn cut(&self) {
        for socket in &self.sockets {
            // Fails when the other side has ended it.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }

    /// Ends the mirrors, if there are any: the disks are where they were, and nothing slows them down.
    pub(super) fn end(&self) {
        let last = self.told();
        let ended = std::mem::take(&mut self.lock().following);
        self.lock().last = last;
        drop(ended);
        self.cut();
    }

    /// Whether little is left of each; an error when one cannot be copied any more.
    pub(super) fn is_ready(&self) -> Result<bool, MigrationError> {
        let state = self.lock();
        let mut ready = true;
        for one in &state.following {
            let progress = one.mirror.progress();
            if let Some(reason) = progress.failed {
                return Err(MigrationError::disk(&one.id, reason));
            }
            ready &= progress.ready;
        }
        Ok(ready)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Following {
    fn told(&self) -> DiskMigration {
        let progress = self.mirror.progress();
        DiskMigration {
            id: self.id.clone(),
            size_bytes: progress.size_bytes,
            copied_bytes: progress.copied_bytes,
            left_bytes: progress.left_bytes,
            bytes_per_second: progress.bytes_per_second,
        }
    }
}

/// Begins to copy the disks to a target that has welcomed them, and waits until little is left of each.
pub(super) fn follow(
    moving: Vec<Moving>,
    progress: &Progress,
    owner: &impl Owner,
) -> Result<(), MigrationError> {
    if moving.is_empty() {
        return Ok(());
    }
    let targets = moving.into_iter().map(reach);
    let following = owner.follow(targets.collect::<Result<_, _>>()?)?;
    progress.disks().lock().following = following.into_iter().map(Arc::new).collect();
    wait_until_ready(progress)
}

/// Waits until little is left of each.
pub(super) fn wait_until_ready(progress: &Progress) -> Result<(), MigrationError> {
    while !progress.disks().is_ready()? {
        if progress.is_cancelled() {
            return Err(MigrationError::Cancelled);
        }
        sleep(POLL);
    }
    Ok(())
}

/// The machine is held: waits until the target has all of each disk, durably, and ends the mirrors.
pub(super) fn settle(progress: &Progress) -> Result<(), MigrationError> {
    let following = progress.disks().lock().following.clone();
    let deadline = Instant::now() + SETTLE_PATIENCE;
    for one in &following {
        let left = deadline.saturating_duration_since(Instant::now());
        let settled = one.mirror.settle(left);
        settled.map_err(|error| MigrationError::disk(&one.id, error.to_string()))?;
    }
    drop(following);
    progress.disks().end();
    Ok(())
}

/// The target's image at the other ends of the connections.
fn reach(moving: Moving) -> Result<Target, MigrationError> {
    let id = moving.disk.id;
    let streams = moving.connections.into_iter().map(OwnedFd::from);
    let backend = nbd::NbdBackend::open(streams.collect(), "", false);
    let backend = backend.map_err(|error| MigrationError::disk(&id, chain(&error)))?;
    let size_bytes = backend.geometry().size_bytes;
    // It has said that it would be so.
    if size_bytes != moving.disk.size_bytes {
        return Err(MigrationError::disk(
            &id,
            format!("the other side serves {size_bytes} bytes"),
        ));
    }
    let backend = Arc::new(backend);
    Ok(Target { id, backend })
}

/// The target's images, open and locked.
pub(super) struct Images(Vec<Image>);

struct Image {
    id: String,
    connections: usize,
    backend: Arc<dyn BlockBackend>,
}

impl Images {
    /// Opens the images that are to take the disks, or says why they cannot.
    pub(super) fn open(moving: &[MovingDisk], spec: &MachineSpec) -> Result<Self, MigrationError> {
        let images = moving.iter().map(|disk| Image::open(disk, spec));
        images.collect::<Result<_, _>>().map(Self)
    }

    /// Serves them on the connections that `next` gives, in their order.
    pub(super) fn serve(
        self,
        mut next: impl FnMut() -> Result<UnixStream, MigrationError>,
    ) -> Result<Served, MigrationError> {
        let mut served = Served {
            images: self,
            connections: Vec::new(),
        };
        for image in &served.images.0 {
            for _ in 0..image.connections {
                served.connections.push(image.serve(next()?)?);
            }
        }
        Ok(served)
    }
}

impl Image {
    fn open(moving: &MovingDisk, spec: &MachineSpec) -> Result<Self, MigrationError> {
        let id = &moving.id;
        let refused = |text: String| MigrationError::Refused(format!("{id}: {text}"));
        if !(1..=CONNECTIONS_MAX).contains(&moving.connections) {
            let text = format!("{} connections", moving.connections);
            return Err(refused(text));
        }
        let spec = check::settle(spec).map_err(|error| refused(chain(&error)))?;
        let mut disks = spec.disks.iter();
        let disk = disks.find(|disk| check::id_of(&disk.id) == id);
        let disk = disk.ok_or_else(|| refused("this side's spec has no such disk".to_owned()))?;
        let backend = resources::bare_disk(disk).map_err(|error| refused(chain(&error)))?;
        let (geometry, path) = (backend.geometry(), disk.path.display());
        if geometry.read_only {
            return Err(refused(format!("{path} is read-only here")));
        }
        if geometry.size_bytes != moving.size_bytes {
            let (here, there) = (geometry.size_bytes, moving.size_bytes);
            let text = format!("{path} has {here} bytes, and has to have the disk's {there}");
            return Err(refused(text));
        }
        Ok(Self {
            id: id.clone(),
            connections: moving.connections,
            backend,
        })
    }

    fn serve(&self, stream: UnixStream) -> Result<Connection, MigrationError> {
        let broken = MigrationError::connection;
        let socket = stream
            .try_clone()
            .map_err(broken("keep a disk's connection"))?;
        let export = Export {
            name: self.id.clone(),
            content: Content::Disk(self.backend.clone()),
            changed: None,
        };
        let body = move || {
            let mut stream = stream;
            // The source knows which of its writes were answered, and fails the move if one was not.
            let _ = nbd::converse(&mut stream, &[export], |export| export.content.open());
        };
        let thread = atoll_thread::spawn(Kind::Export, "disk", body);
        let thread = thread.map_err(broken("start a thread for a disk"))?;
        Ok(Connection { socket, thread })
    }
}

/// Images that a source writes to.
pub(super) struct Served {
    images: Images,
    connections: Vec<Connection>,
}

struct Connection {
    socket: UnixStream,
    thread: JoinHandle<()>,
}

impl Served {
    /// The source has sent State, after which it writes no more: makes all durable, and closes the images for the
    /// machine, which opens them as its own.
    pub(super) fn close(self) -> Result<(), MigrationError> {
        for connection in &self.connections {
            let _ = connection.socket.shutdown(Shutdown::Both);
        }
        for connection in self.connections {
            connection.thread.join().expect("a server does not panic");
        }
        for image in self.images.0 {
            let flushed = atoll_disk::flush(&*image.backend);
            flushed.map_err(|error| MigrationError::disk(&image.id, format!("flush: {error}")))?;
        }
        Ok(())
    }
}
