// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The control queue of a network card, VIRTIO 1.2 §5.1.6.5: one command a chain, answered with one byte.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::Shared;
use super::filter::Filter;
use crate::virtio::worker::{Progress, QueueHandler};
use crate::virtio::{Chain, DeviceQueue, QueueError};

/// Answers, §5.1.6.5.
const OK: u8 = 0;
const ERROR: u8 = 1;
/// Command classes.
const RX: u8 = 0;
const MAC: u8 = 1;
const ANNOUNCE: u8 = 3;
const QUEUE_PAIRS: u8 = 4;
const GUEST_OFFLOADS: u8 = 5;
/// The longest command that makes sense is two full tables of addresses; a longer one is refused unread.
const COMMAND_BYTES_MAX: usize = 4096;

/// Serves the control queue.
pub(super) struct Control {
    pub(super) shared: Arc<Shared>,
    pub(super) chain: Chain,
}

impl QueueHandler for Control {
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            if self.chain.writable().size() == 0 {
                return Err(self.chain.malformed("no room for the answer"));
            }
            let mut command = [0; COMMAND_BYTES_MAX];
            let fits = self.chain.readable().size() <= command.len() as u64;
            let size = self.chain.readable().read(&mut command);
            let done = fits.then(|| self.obey(&command[..size])).flatten();
            let answer = if done.is_some() { OK } else { ERROR };
            self.chain.writable().write(&[answer]);
            queue.push(self.chain.head(), 1)?;
        }
        queue.signal()?;
        let more = queue.enable_doorbell()?;
        Ok(Progress::again_if(more))
    }
}

impl Control {
    /// `None`: not a command that the card has, or not with these values.
    fn obey(&self, command: &[u8]) -> Option<()> {
        let (&[class, number], data) = command.split_first_chunk::<2>()?;
        match (class, number, data) {
            (RX, 0..=5, &[on @ (0 | 1)]) => self.change(|filter| {
                let modes = [
                    &mut filter.promiscuous,
                    &mut filter.all_multicast,
                    &mut filter.all_unicast,
                    &mut filter.no_multicast,
                    &mut filter.no_unicast,
                    &mut filter.no_broadcast,
                ];
                modes
                    .into_iter()
                    .nth(number.into())
                    .map(|mode| *mode = on == 1)
            }),
            (MAC, 0, tables) => self.change(|filter| filter.set_tables(tables)),
            (MAC, 1, &[a, b, c, d, e, f]) if a & 1 == 0 => self.change(|filter| {
                filter.mac = [a, b, c, d, e, f];
                Some(())
            }),
            (ANNOUNCE, 0, []) => {
                self.shared.announce.store(false, Ordering::Release);
                Some(())
            }
            (QUEUE_PAIRS, 0, &[a, b]) => self
                .shared
                .set_active_pairs(u16::from_le_bytes([a, b]))
                .ok(),
            (GUEST_OFFLOADS, 0, &[a, b, c, d, e, f, g, h]) => self
                .shared
                .set_guest_offloads(u64::from_le_bytes([a, b, c, d, e, f, g, h]))
                .ok(),
            _ => None,
        }
    }

    fn change(&self, change: impl FnOnce(&mut Filter) -> Option<()>) -> Option<()> {
        let mut filter = Filter::clone(&self.shared.filter.load());
        change(&mut filter)?;
        self.shared.filter.store(Arc::new(filter));
        Some(())
    }
}
