// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A SCSI host with a disk and a drive, on any bytes as its rings.

use std::collections::BTreeMap;
use std::sync::Arc;

use atoll_disk::{Geometry, MemoryBackend};

use super::{DISK_BYTES, machine};
use crate::scsi::{Target, TargetKind, TargetOptions};
use crate::virtio::scsi::{Scsi, ScsiOptions};
use crate::virtio::worker::QueueHandler as _;

/// Runs a whole request queue on the input, without a thread. Target 0 is a disk, target 1 a drive.
pub fn scsi_device(input: &[u8]) {
    let Some((_, mut queue)) = machine(input) else {
        return;
    };
    let geometry = Geometry {
        size_bytes: DISK_BYTES,
        read_only: input[0] & 0x40 != 0,
    };
    let target = |kind| {
        Arc::new(Target::new(TargetOptions {
            kind,
            serial: "fuzz".to_owned(),
            medium: Some(Arc::new(MemoryBackend::new(geometry))),
        }))
    };
    let targets = [
        (0, target(TargetKind::Disk)),
        (1, target(TargetKind::Cdrom)),
    ];
    let device = Scsi::new(ScsiOptions {
        name: "fuzz".to_owned(),
        queue_count: 1,
        targets: BTreeMap::from(targets),
    })
    .unwrap();
    let mut handler = device.requests(&queue).unwrap();
    for _ in 0..4 {
        if handler.process(&mut queue).is_err() {
            break;
        }
    }
    let _ = handler.drain(&mut queue);
}

/// Every opcode that is known, to the disk and to the drive, with room for data both ways.
pub fn scsi_corpus() -> Vec<Vec<u8>> {
    const OPCODES: [u8; 30] = [
        0x00, 0x03, 0x08, 0x0a, 0x12, 0x1a, 0x1b, 0x1e, 0x25, 0x28, 0x2a, 0x2f, 0x35, 0x41, 0x42,
        0x43, 0x46, 0x4a, 0x5a, 0x88, 0x8a, 0x8f, 0x91, 0x93, 0x9e, 0xa0, 0xa8, 0xaa, 0xa3, 0xff,
    ];
    let descriptor = |address: u64, size: u32, flags: u16, next: u16| {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(size.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes
    };
    let mut all = vec![Vec::new(), vec![0xff; 3]];
    for (opcode, target) in OPCODES.iter().flat_map(|opcode| [(opcode, 0), (opcode, 1)]) {
        // A queue of 4, one chain; entries 0 to 3 of the table fill 64 bytes, so the request is at 64.
        let mut bytes = vec![0x82, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend(descriptor(64, 51, 1, 1));
        bytes.extend(descriptor(0x1_0000, 2048, 1, 2));
        bytes.extend(descriptor(0x1_8000, 108, 3, 3));
        bytes.extend(descriptor(0x1_9000, 4096, 2, 0));
        bytes.extend([1, target, 0x40, 0, 0, 0, 0, 0]);
        bytes.extend([0; 11]);
        bytes.extend([*opcode, 1, 0, 0, 0, 1, 0, 0, 4, 0, 0, 0, 0, 4]);
        bytes.extend([0; 18 + 600]);
        all.push(bytes);
    }
    all
}
