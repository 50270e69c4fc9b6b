// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Copies of disk images: cloned extents where the file system can (btrfs, XFS), holes kept everywhere, with progress in
//! the task's log. Whoever calls sees to it that nobody writes to the source meanwhile.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use crate::error::Error;
use crate::exec::Program;
use crate::storage::STAT_BLOCK_BYTES;
use crate::task::{PROGRESS_EVERY, Progress, TaskContext};

/// Longest copy of one image.
const COPY_MAX: Duration = Duration::from_secs(24 * 3600);

/// Makes `to` what `from` is. `to` appears complete or not at all, and is on disk when this returns; what was there
/// before is replaced.
pub async fn copy(from: &Path, to: &Path, task: &TaskContext) -> Result<(), Error> {
    let mut part = to.as_os_str().to_owned();
    part.push(".part");
    let part = Path::new(&part);
    let result = async {
        write(from, part, task).await?;
        tokio::fs::rename(part, to)
            .await
            .map_err(|e| Error::failed(format!("write {}", to.display()), e))
    };
    let result = result.await;
    if result.is_err() {
        // Gone already, or of no use to anybody.
        drop(tokio::fs::remove_file(part).await);
    }
    result
}

async fn write(from: &Path, part: &Path, task: &TaskContext) -> Result<(), Error> {
    let used = |path: &Path| {
        let metadata = std::fs::metadata(path).ok();
        metadata.map_or(0, |metadata| metadata.blocks() * STAT_BLOCK_BYTES)
    };
    let total = used(from);
    let cp = Program::new("cp")
        .args(["--reflink=auto", "--sparse=always", "--"])
        .arg(from)
        .arg(part)
        .deadline(COPY_MAX);
    let work = task.until_cancelled(async { Ok(cp.run().await.map(drop)?) });
    tokio::pin!(work);
    let progress = Progress::begin("copied");
    loop {
        tokio::select! {
            done = &mut work => break done?,
            () = tokio::time::sleep(PROGRESS_EVERY) => {
                task.log(&progress.line(used(part), total));
            }
        };
    }
    let synced = async { tokio::fs::File::open(part).await?.sync_all().await };
    synced
        .await
        .map_err(|e| Error::failed(format!("write {}", part.display()), e))
}
