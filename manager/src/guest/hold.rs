// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Holding a guest still while its disks are copied: its CPUs stop, and what is under way reaches the disks.

use crate::error::Error;
use crate::guest::guest;
use crate::guest::site::Seat;
use crate::task::TaskContext;

/// Whether a guest was held, and so has to go on afterwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Hold {
    held: bool,
}

impl Hold {
    /// Holds a guest that runs; one that stands already is left as it is.
    pub async fn take(&mut self, seat: &Seat, task: &TaskContext) -> Result<(), Error> {
        let guest = guest(seat);
        if guest.process().is_none() {
            return Ok(());
        }
        if !guest.is_paused().await {
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
        guest.resume().await
    }
}
