// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A machine that runs, in a volume: what snapshots with memory and machines that are suspended to disk keep beside the
//! disks. The volume is `vm-100-state-NAME.raw`, the config's or the snapshot's key `vmstate` names it.
//!
//! ```text
//! 0             RAM, as atoll-vmm writes it; pages of zeroes are holes
//! end of RAM    the machine's state, as atoll-vmm writes it (JSON)
//! 16 at the end MAGIC, size of the state (little-endian)
//! ```
//! The spec is not in it: the machine is made from its config, which is of the same moment, and atoll-vmm refuses a state
//! that is not that machine's.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use atoll_vmm_protocol::api::{MachineState, Request, SavingStage};
use rustix::fs::{MemfdFlags, memfd_create};

use super::Vm;
use crate::error::Error;
use crate::guest::Guest as _;
use crate::guest::disks;
use crate::guest::site::{self, Seat};
use crate::storage::STAT_BLOCK_BYTES;
use crate::storage::name::{Format, StorageName, VolumeId, VolumeName};
use crate::task::{PROGRESS_EVERY, Progress, TaskContext};

/// Key of the config, and of a snapshot, that names the volume.
pub const KEY: &str = "vmstate";
/// Value of the config's `lock` from the moment on at which a suspended machine's volume is complete.
pub const SUSPENDED: &str = "suspended";
/// Key of the config for the storage of such volumes.
const STORAGE_KEY: &str = "vmstatestorage";
/// Where such a volume goes when nothing says so.
const STORAGE_DEFAULT: &str = "local";
/// What the last 16 bytes begin with.
const MAGIC: [u8; 8] = *b"ATOLLVM1";
/// Size of what is behind the state.
const TAIL_BYTES: u64 = 16;
/// Longest state that is read; one of 64 vCPUs has about 2 MiB.
const STATE_BYTES_MAX: u64 = 64 << 20;
/// What a machine needs so that its guest may run while its memory is written, and whose process cannot open it.
const USERFAULTFD: &str = "/dev/userfaultfd";
/// How often a machine is asked how much of its memory it has written.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a machine may take to stop writing it.
const CANCEL_MAX: Duration = Duration::from_secs(30);

/// The volume that a machine's memory goes to: on the storage that is asked for, or configured, or of the first disk.
pub fn volume(
    seat: &Seat,
    values: &BTreeMap<String, String>,
    storage: Option<StorageName>,
    name: &str,
) -> Result<VolumeId, Error> {
    let configured = || values.get(STORAGE_KEY)?.parse().ok();
    let first_disks = || {
        Some(
            disks::own_volumes(seat, values)
                .into_iter()
                .next()?
                .1
                .storage,
        )
    };
    let storage = storage.or_else(configured).or_else(first_disks);
    Ok(VolumeId {
        storage: match storage {
            Some(storage) => storage,
            None => STORAGE_DEFAULT.parse().expect("a storage's name"),
        },
        name: VolumeName::image(seat.id, &format!("state-{name}"), Format::Raw)
            .map_err(|error| Error::refused(error.to_string()))?,
    })
}

/// The volume that these keys name, if there is one.
pub fn of(values: &BTreeMap<String, String>) -> Option<VolumeId> {
    values.get(KEY)?.parse().ok()
}

/// Removes the volume, if there is one.
pub async fn free(seat: &Seat, volume: Option<&VolumeId>) -> Result<(), Error> {
    match volume {
        Some(volume) => disks::free_own(seat, volume).await,
        None => Ok(()),
    }
}

/// What the guest may do while its memory is written.
#[derive(Debug, PartialEq, Eq)]
enum How {
    Held,
    Live,
}

/// A machine on its way into a volume.
#[derive(Debug)]
pub struct Writing {
    /// The volume's name, which the machine is told, too.
    to: String,
    memory: File,
    state: File,
    how: How,
}

impl Writing {
    /// Makes the volume, with nothing in it.
    async fn new(vm: &Vm, volume: &VolumeId, task: &TaskContext) -> Result<Self, Error> {
        let images = disks::content_of(vm.seat().kind);
        let storages = &vm.seat().site.storage;
        let storage = storages.open_for(&volume.storage, images)?;
        storage.allocate_as(&volume.name, 0).await?;
        let path = storage.path(&volume.name).await?;
        task.log(&format!("writing memory to {volume}"));
        let to = volume.to_string();
        let memory = File::options().read(true).write(true).open(&path);
        Ok(Self {
            memory: memory.map_err(failed(&to))?,
            state: nameless("state").map_err(failed(&to))?,
            to,
            how: How::Held,
        })
    }

    /// What the machine writes to.
    fn files(&self) -> Result<[File; 3], Error> {
        let spec = nameless("spec").map_err(failed(&self.to))?;
        let copy = |file: &File| file.try_clone().map_err(failed(&self.to));
        Ok([spec, copy(&self.state)?, copy(&self.memory)?])
    }

    /// Has a held machine write all of it.
    async fn write_held(&self, vm: &Vm, task: &TaskContext) -> Result<(), Error> {
        let writing = vm.write_state(self.files()?, self.to.clone());
        tokio::pin!(writing);
        let taken = loop {
            tokio::select! {
                taken = &mut writing => break taken?,
                () = tokio::time::sleep(PROGRESS_EVERY) => {
                    let written = self.memory.metadata().map_or(0, |m| m.blocks() * STAT_BLOCK_BYTES);
                    task.log(&format!("wrote {} MiB of memory", written >> 20));
                }
            }
        };
        let (mib, ms) = (taken.memory_bytes >> 20, taken.held_us / 1000);
        task.log(&format!("memory is written: {mib} MiB in {ms} ms"));
        Ok(())
    }

    /// Has it write what it is now while its guest runs, from when the caller lets it; or why that cannot be.
    async fn begin_live(&mut self, vm: &Vm) -> Result<Result<(), String>, Error> {
        let device = match File::options().read(true).write(true).open(USERFAULTFD) {
            Ok(device) => device,
            Err(error) => return Ok(Err(format!("{USERFAULTFD}: {error}"))),
        };
        let [spec, state, memory] = self.files()?;
        let files = [spec, state, memory, device];
        let begun = vm.begin_state(files, self.to.clone()).await?;
        Ok(begun.map(|_| self.how = How::Live))
    }

    /// Waits until the machine has written it.
    async fn follow(&self, vm: &Vm, task: &TaskContext) -> Result<(), Error> {
        let progress = Progress::begin("wrote memory:");
        let mut told = Instant::now();
        loop {
            if task.is_cancelled() {
                return Err(Error::Interrupted);
            }
            let info = match vm.last_saving().await {
                Ok(Some(info)) if info.to == self.to => info,
                // The state is written last: the machine may have ended since.
                _ if self.has_state() => return Ok(()),
                Ok(_) => return Err(Error::refused("another snapshot was begun")),
                Err(error) => return Err(error),
            };
            let total = info.memory_bytes + info.remaining_bytes;
            match info.stage {
                SavingStage::Saving => {}
                SavingStage::Completed => {
                    task.log(&progress.line(info.memory_bytes, total));
                    return Ok(());
                }
                SavingStage::Failed | SavingStage::Cancelled => {
                    return Err(Error::refused(info.error.unwrap_or_default()));
                }
            }
            if told.elapsed() >= PROGRESS_EVERY {
                task.log(&progress.line(info.memory_bytes, total));
                told = Instant::now();
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    }

    fn has_state(&self) -> bool {
        self.state.metadata().is_ok_and(|state| state.len() > 0)
    }

    /// Makes the volume what [`bring`] takes; it is on the disk when this returns.
    async fn seal(self) -> Result<(), Error> {
        let Self {
            to, memory, state, ..
        } = self;
        let sealed = tokio::task::spawn_blocking(move || append(&memory, &state));
        let sealed = sealed.await.map_err(io::Error::other);
        sealed.and_then(|written| written).map_err(failed(&to))
    }
}

fn failed(volume: &str) -> impl Fn(io::Error) -> Error {
    move |error| Error::failed(format!("write {volume}"), error)
}

/// Begins to write a held machine into a new volume: what it is now, so that its guest may go on when this returns.
pub async fn begin(vm: &Vm, volume: &VolumeId, task: &TaskContext) -> Result<Writing, Error> {
    let mut writing = Writing::new(vm, volume, task).await?;
    if let Err(why) = writing.begin_live(vm).await? {
        task.log(&why);
        writing.write_held(vm, task).await?;
    }
    Ok(writing)
}

/// Waits until what was begun is in the volume, on the disk.
pub async fn finish(vm: &Vm, writing: Writing, task: &TaskContext) -> Result<(), Error> {
    if writing.how == How::Live {
        writing.follow(vm, task).await?;
    }
    writing.seal().await
}

/// Ends what was begun, for this task or by one that is gone, and removes the volume.
pub async fn give_up(seat: &Seat, volume: Option<&VolumeId>) -> Result<(), Error> {
    let Some(volume) = volume else { return Ok(()) };
    let vm = Vm::new(seat.clone());
    let cancelled = cancel(&vm, volume).await;
    disks::free_own(seat, volume).await?;
    match vm.process() {
        Some(_) => cancelled,
        // Nobody writes any more.
        None => Ok(()),
    }
}

async fn cancel(vm: &Vm, volume: &VolumeId) -> Result<(), Error> {
    let to = volume.to_string();
    let writes = async || {
        let info = vm.last_saving().await?;
        let saving = info.filter(|info| info.to == to && info.stage == SavingStage::Saving);
        Ok::<_, Error>(saving.is_some())
    };
    if writes().await? {
        vm.cancel_saving().await?;
    }
    let deadline = Instant::now() + CANCEL_MAX;
    while writes().await? {
        if Instant::now() > deadline {
            return Err(Error::refused("the machine goes on writing its memory"));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    Ok(())
}

fn nameless(name: &str) -> io::Result<File> {
    Ok(File::from(memfd_create(name, MemfdFlags::CLOEXEC)?))
}

/// Puts the state and the tail behind the RAM.
fn append(memory: &File, state: &File) -> io::Result<()> {
    let size = state.metadata()?.len();
    let mut bytes = vec![0; usize::try_from(size).map_err(io::Error::other)?];
    state.read_exact_at(&mut bytes, 0)?;
    bytes.extend(MAGIC);
    bytes.extend(size.to_le_bytes());
    memory.write_all_at(&bytes, memory.metadata()?.len())?;
    memory.sync_all()
}

/// The state in a volume.
fn state_in(file: &File) -> io::Result<Vec<u8>> {
    let damaged = || io::Error::other("this is no saved machine, or it is cut off");
    let end = file.metadata()?.len();
    let at = end.checked_sub(TAIL_BYTES).ok_or_else(damaged)?;
    let mut tail = [[0; 8]; 2];
    file.read_exact_at(tail.as_flattened_mut(), at)?;
    let size = u64::from_le_bytes(tail[1]);
    let fits = tail[0] == MAGIC && size <= STATE_BYTES_MAX;
    let start = at.checked_sub(size).filter(|_| fits).ok_or_else(damaged)?;
    let mut state = vec![0; usize::try_from(size).map_err(io::Error::other)?];
    file.read_exact_at(&mut state, start)?;
    Ok(state)
}

/// The folder in a run's that `atoll-vmm run --restore` takes.
pub fn folder(seat: &Seat) -> PathBuf {
    seat.run_folder().join("saved")
}

/// Makes that folder from a volume.
pub async fn bring(seat: &Seat, volume: &VolumeId) -> Result<(), Error> {
    let path = seat.site.storage.path(volume).await?;
    let folder = folder(seat);
    let made = tokio::task::spawn_blocking(move || unpack(&path, &folder)).await;
    let made = made.map_err(io::Error::other).and_then(|made| made);
    made.map_err(|error| Error::failed(format!("read {volume}"), error))
}

fn unpack(volume: &Path, folder: &Path) -> io::Result<()> {
    let state = state_in(&File::open(volume)?)?;
    std::fs::create_dir(folder)?;
    std::fs::write(folder.join("state.json"), state)?;
    std::os::unix::fs::symlink(volume, folder.join("memory"))
}

/// Removes that folder; removing what is not there is no error.
pub async fn remove_folder(seat: &Seat) -> Result<(), Error> {
    site::remove_folder(&folder(seat)).await
}

/// A machine goes on from its state: nothing of that is needed any more, unless it is a snapshot's.
pub async fn forget(seat: &Seat) -> Result<(), Error> {
    let mut stored = seat.stored()?;
    if stored.config.get("lock") == Some(SUSPENDED) {
        let volume = of(&stored.config.current.values);
        stored.config.unset("lock");
        stored.config.unset(KEY);
        stored.save(&seat.site.store).await?;
        free(seat, volume.as_ref()).await?;
    }
    remove_folder(seat).await
}

/// Brings to its end what a killed daemon has left of a suspension that was complete, or of the start after one: the
/// machine ends, unless it goes on from its state already.
pub async fn settle(vm: &Vm) -> Result<(), Error> {
    if !folder(vm.seat()).exists() {
        return vm.act(Request::Shutdown).await;
    }
    match vm.info().await?.state {
        MachineState::Running | MachineState::Paused => forget(vm.seat()).await,
        MachineState::Stopped | MachineState::Migrated => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_comes_back_and_what_is_damaged_is_said() {
        let (memory, state) = (nameless("m").unwrap(), nameless("s").unwrap());
        memory.set_len(8192).unwrap();
        assert!(state_in(&memory).is_err());
        state.write_all_at(b"{}", 0).unwrap();
        append(&memory, &state).unwrap();
        assert_eq!(state_in(&memory).unwrap(), b"{}");
        let length = memory.metadata().unwrap().len();
        memory.write_all_at(&[255; 8], length - 8).unwrap();
        assert!(state_in(&memory).is_err(), "longer than there is room");
        memory.set_len(7).unwrap();
        assert!(state_in(&memory).is_err());
    }
}
