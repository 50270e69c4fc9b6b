// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The control queue, VIRTIO 1.2 §5.6.6.2: what a driver does when a request takes too long.
//!
//! A request that the host has cannot be taken back, so that "abort" is refused while any of the unit's are in
//! flight: a driver that was told "aborted" would use the memory again.

use super::request::Address;
use super::{Targets, locked};
use crate::virtio::worker::{Progress, QueueHandler};
use crate::virtio::{Chain, DeviceQueue, QueueError};

/// Task management; the other two ask for asynchronous notifications.
const TYPE_TASK_MANAGEMENT: u32 = 0;
const TYPE_QUERY: u32 = 1;
const TYPE_SUBSCRIBE: u32 = 2;
const RESET_NEXUS: u32 = 4;
const RESET_UNIT: u32 = 5;
/// Bytes of the longer request, `struct virtio_scsi_ctrl_tmf`.
const TASK_BYTES: usize = 24;
/// Bytes of `struct virtio_scsi_ctrl_an`.
const NOTIFICATION_BYTES: usize = 16;
/// Answers.
const COMPLETE: u8 = 0;
const BAD_TARGET: u8 = 3;
const REJECTED: u8 = 11;

/// Serves it.
pub(super) struct Control {
    targets: Targets,
    chain: Chain,
}

impl Control {
    pub(super) fn new(targets: Targets) -> Self {
        let chain = Chain::new();
        Self { targets, chain }
    }

    /// Carries out one task management function; the answer.
    fn manage(&self, bytes: &[u8; TASK_BYTES]) -> u8 {
        let function = u32::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7]]);
        let lun = bytes[8..16].try_into().expect("8 bytes");
        let target = match Address::parse(lun) {
            Address::Unit(number) => locked(&self.targets).get(&number).cloned(),
            Address::Other(_) | Address::Nowhere => None,
        };
        let Some(target) = target else {
            return BAD_TARGET;
        };
        if target.in_flight() > 0 {
            return REJECTED;
        }
        if matches!(function, RESET_NEXUS | RESET_UNIT) {
            target.reset();
        }
        match function {
            0..=7 => COMPLETE,
            _ => REJECTED,
        }
    }
}

impl QueueHandler for Control {
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        while queue.pop(&mut self.chain)? {
            let mut bytes = [0; TASK_BYTES];
            let count = self.chain.readable().read(&mut bytes);
            let kind = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
            let answer: &[u8] = match kind {
                TYPE_TASK_MANAGEMENT if count == TASK_BYTES => &[self.manage(&bytes)],
                // No event is told this way; the request is fine.
                TYPE_QUERY | TYPE_SUBSCRIBE if count >= NOTIFICATION_BYTES => {
                    &[0, 0, 0, 0, COMPLETE]
                }
                _ => return Err(self.chain.malformed("no SCSI control request")),
            };
            if self.chain.writable().write(answer) < answer.len() {
                return Err(self.chain.malformed("no room for a SCSI control response"));
            }
            let written = u32::try_from(answer.len()).expect("at most 5");
            queue.push(self.chain.head(), written)?;
        }
        queue.signal()?;
        Ok(Progress::again_if(queue.enable_doorbell()?))
    }
}
