// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A read lease on a file (fcntl(2), "Leases"): who opens it for writing, or truncates it, waits until the lease is given
//! back, or for `/proc/sys/fs/lease-break-time` (45 seconds), and its holder is told by SIGIO. Renaming another file over
//! it breaks no lease: it is another file.
//!
//! A lease is given back by closing the file. To ask for it in so many words takes the rights with which it was taken,
//! which a machine in its sandbox does not have any more.
#![expect(unsafe_code, reason = "fcntl(2) and pthread_kill(3)")]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::thread::JoinHandleExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use atoll_thread::Kind;
use nix::sys::signal::{SigSet, Signal};

/// `include/uapi/asm-generic/fcntl.h`, which the C library's crate has not.
const F_SETOWN_EX: libc::c_int = 15;
const F_OWNER_TID: libc::c_int = 0;

/// Its `struct f_owner_ex`.
#[repr(C)]
struct Owner {
    kind: libc::c_int,
    pid: libc::pid_t,
}

/// Why there is no lease.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// It is not quiet.
    #[error("somebody has it open for writing")]
    Written,
    /// Another user's.
    #[error("only its owner or root is told before it is written to (fcntl F_SETLEASE)")]
    Owner,
    /// The file system has none.
    #[error("its file system does not tell before it is written to (fcntl F_SETLEASE)")]
    Unsupported,
    /// The path leads somewhere else by now.
    #[error("another file has taken its place just now")]
    Replaced,
    /// Something else.
    #[error("ask to be told before it is written to (fcntl F_SETLEASE)")]
    Other(#[source] io::Error),
}

/// The lease, until it is dropped.
#[derive(Debug)]
pub struct Lease {
    /// Nothing but this and the thread may have it: it is closed by being dropped.
    file: Arc<File>,
    watch: Option<Watch>,
}

/// The thread that waits for the signal.
#[derive(Debug)]
struct Watch {
    thread: JoinHandle<()>,
    over: Arc<AtomicBool>,
}

impl Lease {
    /// Takes one on `file`, which was opened by that path. Its signal is blocked from now on, for this thread and those
    /// that it makes; it is for this thread until there is one that waits for it.
    pub(super) fn take(path: &Path, file: &File) -> Result<Self, LeaseError> {
        let own = File::open(path).map_err(LeaseError::Other)?;
        let place = |file: &File| file.metadata().map(|found| (found.dev(), found.ino()));
        let places = [&own, file].map(|file| place(file).map_err(LeaseError::Other));
        let [Ok(one), Ok(other)] = places else {
            return Err(LeaseError::Replaced);
        };
        if one != other {
            return Err(LeaseError::Replaced);
        }
        tell_this_thread(&own).map_err(LeaseError::Other)?;
        // SAFETY: no memory is passed.
        let result = unsafe { libc::fcntl(own.as_raw_fd(), libc::F_SETLEASE, libc::F_RDLCK) };
        if result != 0 {
            let error = io::Error::last_os_error();
            return Err(match error.raw_os_error() {
                Some(libc::EAGAIN) => LeaseError::Written,
                Some(libc::EACCES) => LeaseError::Owner,
                Some(libc::EINVAL | libc::EOPNOTSUPP) => LeaseError::Unsupported,
                _ => LeaseError::Other(error),
            });
        }
        Ok(Self {
            file: Arc::new(own),
            watch: None,
        })
    }

    /// Calls `wanted`, on a thread of its own, once somebody waits for the lease to end. Not before this is called.
    pub(super) fn watch(&mut self, wanted: impl FnOnce() + Send + 'static) -> io::Result<()> {
        let (file, over) = (self.file.clone(), Arc::new(AtomicBool::new(false)));
        let asked = over.clone();
        let body = move || {
            let broken = wait(&file, &asked);
            drop(file);
            if broken {
                wanted();
            }
        };
        let thread = atoll_thread::spawn(Kind::Signals, "kernel-lease", body)?;
        self.watch = Some(Watch { thread, over });
        Ok(())
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.over.store(true, Ordering::SeqCst);
        if !self.thread.is_finished() {
            // SAFETY: the thread is joined by nobody else, so its number is its own. It waits for this signal.
            unsafe { libc::pthread_kill(self.thread.as_pthread_t(), libc::SIGIO) };
        }
    }
}

fn signals() -> SigSet {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGIO);
    signals
}

/// Has the signal come here, and wait. Whoever does not say so has it sent to the process, of which a thread that does not
/// block it ends.
fn tell_this_thread(file: &File) -> io::Result<()> {
    signals().thread_block()?;
    let owner = Owner {
        kind: F_OWNER_TID,
        pid: rustix::thread::gettid().as_raw_nonzero().get(),
    };
    // SAFETY: the structure is what the call reads.
    match unsafe { libc::fcntl(file.as_raw_fd(), F_SETOWN_EX, &raw const owner) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Waits until somebody waits for the lease's end, or until it is over: whether it was the former.
fn wait(file: &File, over: &AtomicBool) -> bool {
    if tell_this_thread(file).is_err() {
        return true;
    }
    let signals = signals();
    // What happened before the signal came here is seen here, too.
    while !over.load(Ordering::SeqCst) {
        // SAFETY: no memory is passed. It tells what the lease is about to become.
        let lease = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) };
        if lease != libc::F_RDLCK || signals.wait().is_err() {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{TryRecvError, channel};

    #[test]
    fn who_writes_waits_until_the_lease_is_given_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, b"old").unwrap();
        let file = File::open(&path).unwrap();
        let mut lease = match Lease::take(&path, &file) {
            Err(LeaseError::Unsupported) => {
                println!("ATOLL-SKIP: no leases on {}", path.display());
                return;
            }
            lease => lease.unwrap(),
        };
        let (wanted, told) = channel();
        lease.watch(move || wanted.send(()).unwrap()).unwrap();
        // Others read, and have leases; another file may take its place.
        let another = Lease::take(&path, &file).unwrap();
        drop(another);
        assert_eq!(told.try_recv(), Err(TryRecvError::Empty));
        let writes = path.clone();
        let write = move || std::fs::write(writes, b"new").unwrap();
        let writer = std::thread::Builder::new().name("writer".into());
        let writer = writer.spawn(write).unwrap();
        told.recv().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old");
        drop(lease);
        writer.join().unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");

        let writer = File::options().write(true).open(&path).unwrap();
        let refused = Lease::take(&path, &file).unwrap_err().to_string();
        assert_eq!(refused, "somebody has it open for writing");
        drop(writer);
        std::fs::write(folder.path().join("next"), b"next").unwrap();
        let lease = Lease::take(&path, &file).unwrap();
        std::fs::rename(folder.path().join("next"), &path).unwrap();
        let replaced = Lease::take(&path, &file).unwrap_err();
        assert!(matches!(replaced, LeaseError::Replaced), "{replaced}");
        drop(lease);
    }
}
