// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Disk images in one format become images in another one, or stay in theirs: imports, moves, clones. Whoever calls
//! sees to it that nobody writes to the source meanwhile.
//!
//! Formats are said, not guessed: by a volume's name. The one exception is an uploaded `.img` (`iso` content), which
//! no guest can have written to; what its first bytes say counts when it is imported ([`Image::uploaded`]).

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use atoll_disk::{Format, OpenOptions, Source, Transferred};
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::storage::copy::copy;
use crate::storage::pace::Pace;
use crate::task::{PROGRESS_EVERY, Progress, TaskContext};

/// How long a copy that waits does not see that its task was stopped.
const NAP_MAX: Duration = Duration::from_millis(200);
/// First bytes of a qcow2 image: its specification, section Header.
const QCOW2_MAGIC: &[u8] = b"QFI\xfb";
/// Raw images are this or a multiple of it.
const SECTOR_BYTES: u64 = 512;

/// A disk image: where it is, and its format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Its file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
}

impl Image {
    /// An image whose format its name does not tell, and that no guest has had: what it begins with decides.
    pub fn uploaded(path: PathBuf) -> Result<Self, Error> {
        let mut head = [0; QCOW2_MAGIC.len()];
        let read = File::open(&path).and_then(|mut file| file.read_exact(&mut head));
        let format = match read {
            Err(error) if error.kind() != ErrorKind::UnexpectedEof => {
                return Err(Error::failed(format!("read {}", path.display()), error));
            }
            _ if head == QCOW2_MAGIC => Format::Qcow2,
            _ => Format::Raw,
        };
        Ok(Self { path, format })
    }

    /// Size of the disk in it. May block on a file.
    pub fn size_bytes(&self) -> Result<u64, Error> {
        let subject = || format!("read {}", self.path.display());
        let file = File::open(&self.path).map_err(|e| Error::failed(subject(), e))?;
        match self.format {
            Format::Raw => {
                let metadata = file.metadata().map_err(|e| Error::failed(subject(), e))?;
                Ok(metadata.len().next_multiple_of(SECTOR_BYTES))
            }
            Format::Qcow2 => {
                atoll_disk::qcow2::inspect(&file).map_err(|e| Error::failed(subject(), e))
            }
        }
    }

    fn source(&self) -> Source {
        Source {
            path: self.path.clone(),
            format: self.format,
            backing: Vec::new(),
        }
    }
}

/// Fills `to`, which is there, empty and large enough, with what `from` holds. With a limit, so much is written in a second
/// at most, and no extents are cloned.
pub async fn convert(
    from: &Image,
    to: &Image,
    bytes_per_second: Option<u64>,
    task: &TaskContext,
) -> Result<(), Error> {
    if let Some(rate) = bytes_per_second {
        task.log(&format!("at most {} KiB/s", rate >> 10));
    }
    if from.format != to.format || bytes_per_second.is_some() {
        return transfer(from.clone(), to.clone(), bytes_per_second, task).await;
    }
    // Images that are differences to others, or broken, are refused by this.
    let size_bytes = from.size_bytes()?;
    copy(&from.path, &to.path, task).await?;
    if to.format == Format::Raw {
        let grow = async {
            let mut options = tokio::fs::File::options();
            let file = options.write(true).open(&to.path).await?;
            file.set_len(size_bytes).await
        };
        grow.await
            .map_err(|e| Error::failed(format!("write {}", to.path.display()), e))?;
    }
    Ok(())
}

/// Sector by sector, on a blocking thread.
async fn transfer(
    from: Image,
    to: Image,
    bytes_per_second: Option<u64>,
    task: &TaskContext,
) -> Result<(), Error> {
    let total = from.size_bytes()?;
    let done = Arc::new(AtomicU64::new(0));
    let (token, seen) = (task.token().clone(), done.clone());
    let work = tokio::task::spawn_blocking(move || {
        let read_only = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let failed = |error| Error::failed("open the image", error);
        let source = atoll_disk::open(&from.source(), read_only).map_err(failed)?;
        let target = atoll_disk::open(&to.source(), OpenOptions::default()).map_err(failed)?;
        let mut pace = Pace::new(bytes_per_second, Instant::now());
        let progress = |it: Transferred| {
            seen.store(it.done_bytes, Ordering::Relaxed);
            wait(pace.wait_after(it.written_bytes, Instant::now()), &token);
            match token.is_cancelled() {
                true => ControlFlow::Break(()),
                false => ControlFlow::Continue(()),
            }
        };
        match atoll_disk::transfer(&*source, &*target, progress) {
            Err(error) if error.kind() == ErrorKind::Interrupted => Err(Error::Interrupted),
            other => other.map_err(|e| Error::failed(format!("write {}", to.path.display()), e)),
        }
    });
    tokio::pin!(work);
    let progress = Progress::begin("copied");
    loop {
        tokio::select! {
            done = &mut work => return done.unwrap_or_else(|e| Err(Error::failed("convert the image", e))),
            () = tokio::time::sleep(PROGRESS_EVERY) => {
                task.log(&progress.line(done.load(Ordering::Relaxed), total));
            }
        }
    }
}

/// Waits, unless the task is stopped first.
fn wait(mut time: Duration, token: &CancellationToken) {
    while !time.is_zero() && !token.is_cancelled() {
        let nap = time.min(NAP_MAX);
        std::thread::sleep(nap);
        time -= nap;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::task::fault;

    #[tokio::test]
    async fn images_keep_their_sectors_in_every_format() {
        let folder = tempfile::tempdir().unwrap();
        let image = |name: &str, format| Image {
            path: folder.path().join(name),
            format,
        };
        let raw = image("a.raw", Format::Raw);
        let mut bytes = vec![0; (3 << 20) + 100];
        bytes[2 << 20..][..3].copy_from_slice(b"abc");
        std::fs::write(&raw.path, &bytes).unwrap();
        assert_eq!(raw.size_bytes().unwrap(), (3 << 20) + 512, "whole sectors");
        std::fs::write(&raw.path, &bytes[..3 << 20]).unwrap();
        let task = TaskContext::detached(fault::upid(), None);

        let qcow2 = image("b.qcow2", Format::Qcow2);
        let options = atoll_disk::qcow2::Qcow2Options::default();
        atoll_disk::qcow2::create(&qcow2.path, 4 << 20, &options).unwrap();
        convert(&raw, &qcow2, None, &task).await.unwrap();
        assert_eq!(qcow2.size_bytes().unwrap(), 4 << 20);
        assert_eq!(Image::uploaded(qcow2.path.clone()).unwrap(), qcow2);
        assert_eq!(Image::uploaded(raw.path.clone()).unwrap(), raw);

        let back = image("c.raw", Format::Raw);
        File::create(&back.path).unwrap().set_len(4 << 20).unwrap();
        convert(&qcow2, &back, Some(1 << 30), &task).await.unwrap();
        let read = std::fs::read(&back.path).unwrap();
        assert_eq!(read[..3 << 20], bytes[..3 << 20]);
        assert!(read[3 << 20..].iter().all(|byte| *byte == 0));

        let copied = image("d.qcow2", Format::Qcow2);
        atoll_disk::qcow2::create(&copied.path, 512, &options).unwrap();
        convert(&qcow2, &copied, None, &task).await.unwrap();
        assert_eq!(copied.size_bytes().unwrap(), 4 << 20);
    }

    /// At a byte a second a copy never gets to its second request, in whatever format, and can be stopped.
    #[tokio::test]
    async fn a_copy_keeps_its_limit_and_can_be_stopped() {
        let folder = tempfile::tempdir().unwrap();
        let image = |name: &str| Image {
            path: folder.path().join(name),
            format: Format::Raw,
        };
        let (from, to) = (image("from"), image("to"));
        std::fs::write(&from.path, vec![7; 3 << 20]).unwrap();
        File::create(&to.path).unwrap().set_len(3 << 20).unwrap();
        let task = TaskContext::detached(fault::upid(), None);
        let first_is_there = async {
            while std::fs::read(&to.path).unwrap()[0] != 7 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            for _ in 0..100 {
                assert_eq!(std::fs::read(&to.path).unwrap()[1 << 20], 0);
            }
            task.token().cancel();
        };
        let copy = convert(&from, &to, Some(1), &task);
        let (copied, ()) = tokio::join!(copy, first_is_there);
        assert!(matches!(copied, Err(Error::Interrupted)), "{copied:?}");
    }

    #[tokio::test]
    async fn differences_to_other_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.qcow2");
        let options = atoll_disk::qcow2::Qcow2Options {
            backing: Some(("/etc/shadow".to_owned(), Format::Raw)),
            ..Default::default()
        };
        atoll_disk::qcow2::create(&path, 1 << 20, &options).unwrap();
        let image = Image::uploaded(path).unwrap();
        let error = image.size_bytes().unwrap_err().chain();
        assert!(error.contains("backing file"), "{error}");
    }
}
