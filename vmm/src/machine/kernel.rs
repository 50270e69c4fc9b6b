// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A machine whose kernel's file is in its memory (`crate::loader`): what it does when somebody wants to write to that
//! file, who waits for it.

use std::io;

use super::RunError;
use super::owner::{Event, Machine};

impl Machine {
    /// Has the owner told from now on.
    pub(super) fn watch_kernel(&mut self) -> io::Result<()> {
        let Some(boot_files) = &mut self.parts.boot_files else {
            return Ok(());
        };
        let events = self.events.clone();
        // Without an owner there is no machine any more.
        boot_files.watch(move || drop(events.send(Event::KernelWanted)))
    }

    /// Copies what is shared, while nothing of the guest runs, and lets the other one write. Where that fails the other one
    /// waits for as long as the host's kernel makes it wait.
    pub(super) fn part_from_kernel(&mut self) -> Result<(), RunError> {
        let (parted, held_us) = self.while_held(|machine| machine.parts.part_from_kernel())?;
        let name = &self.spec.name;
        match parted {
            Ok(bytes) => tracing::warn!(
                name,
                bytes,
                held_us,
                "somebody writes to the kernel's file: it is shared no more"
            ),
            Err(error) => tracing::error!(
                name,
                %error,
                "somebody is about to write to the kernel's file, which the guest shares"
            ),
        }
        Ok(())
    }
}
