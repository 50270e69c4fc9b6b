// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Holding a guest still while its disks are copied: its CPUs stop, and what is under way reaches the disks.
//!
//! A file in the guest's run folder says so meanwhile. A daemon that is killed while it holds a guest leaves the file,
//! and the next one lets the guest go on (`reconcile`); a guest that its user has paused has no such file.

use std::path::PathBuf;

use crate::error::Error;
use crate::guest::guest;
use crate::guest::site::Seat;
use crate::task::TaskContext;

/// Name of the file that says that a task holds the guest; the task's name is in it.
const NOTE: &str = "held";

/// Whether a guest was held, and so has to go on afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hold {
    held: bool,
}

impl Hold {
    /// What a task that is gone has left of its hold on a guest.
    pub fn left(seat: &Seat) -> Self {
        Self {
            held: note(seat).exists(),
        }
    }

    /// Whether it holds the guest.
    pub fn is_taken(self) -> bool {
        self.held
    }

    /// Holds a guest that runs; one that stands already is left as it is.
    pub async fn take(&mut self, seat: &Seat, task: &TaskContext) -> Result<(), Error> {
        let guest = guest(seat);
        if guest.process().is_none() {
            return Ok(());
        }
        if !guest.is_paused().await {
            let note = note(seat);
            tokio::fs::write(&note, task.upid().to_string())
                .await
                .map_err(|e| Error::failed(format!("write {}", note.display()), e))?;
            // Before, not after: a pause that fails half way is undone, too.
            self.held = true;
            guest.pause().await?;
            task.log("the guest is held");
        }
        guest.settle().await
    }

    /// Lets it go on. One that has ended meanwhile is no error.
    pub async fn release(&mut self, seat: &Seat) -> Result<(), Error> {
        let guest = guest(seat);
        if !std::mem::take(&mut self.held) || guest.process().is_none() {
            return Ok(());
        }
        guest.resume().await?;
        let note = note(seat);
        match tokio::fs::remove_file(&note).await {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(Error::failed(format!("remove {}", note.display()), e))
            }
            _ => Ok(()),
        }
    }
}

fn note(seat: &Seat) -> PathBuf {
    seat.run_folder().join(NOTE)
}
