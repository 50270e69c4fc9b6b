// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as the rings of any kind of device, started as its transport does. Two queues of the device serve the
//! same rings one after the other, so that what the first one makes the second has to say can be reached.
//!
//! Byte 0 chooses the device, bytes 1 and 2 the queues; the rest is a machine as for the others.

use std::collections::BTreeMap;
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::sync::Arc;

use atoll_disk::{Geometry, MemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{DISK_BYTES, corpus, machine};
use crate::console::{Console, ConsoleBackend};
use crate::scsi::{Target, TargetKind, TargetOptions};
use crate::virtio::balloon::{Balloon, BalloonOptions};
use crate::virtio::blk::{Blk, BlkOptions};
use crate::virtio::console::{PortOptions, VirtioConsole};
use crate::virtio::net::{HostEnd, Net, NetOptions, Tap};
use crate::virtio::rng::Rng;
use crate::virtio::scsi::{Scsi, ScsiOptions};
use crate::virtio::vsock::Vsock;
use crate::virtio::worker::inline;
use crate::virtio::{QueueStart, VirtioDevice};

/// Kinds of device.
pub(super) const KINDS: u8 = 8;
/// Address of the guest on its sockets.
const CID: u32 = 7;
/// A port where somebody of the host listens.
const PORT: u32 = 1;

/// Serves the input.
pub fn device(input: &[u8]) {
    let Some((&[kind, first, second], rest)) = input.split_first_chunk() else {
        return;
    };
    let Some((_, queue)) = machine(rest) else {
        return;
    };
    let (device, host) = any_device(kind % KINDS);
    host.speak(rest);
    let count = device.queue_sizes().len();
    inline::queues(|| {
        let mut queue = Some(queue);
        for choice in [first, second] {
            let Some(queue_now) = queue.take() else { break };
            let (memory, interrupt) = (queue_now.memory().clone(), queue_now.interrupt().clone());
            let start = QueueStart {
                index: u16::try_from(usize::from(choice) % count).expect("a handful of queues"),
                queue: queue_now,
                features: device.features(),
                doorbell: EventFd::new(EFD_NONBLOCK).unwrap(),
                counters: Arc::default(),
            };
            // A queue that a device does not have without a feature is refused.
            if let Ok(started) = device.start_queue(start) {
                let state = started.stop();
                let again =
                    crate::virtio::DeviceQueue::new(state, memory, interrupt, Arc::default());
                queue = again.ok();
            }
            host.listen();
        }
    });
    let _ = device.counters();
    device.reset();
}

/// The host's side of what a device is connected with.
#[derive(Default)]
pub(super) struct Host {
    wire: Option<UnixDatagram>,
    /// Listens at [`PORT`], in a directory of this input's own.
    ear: Option<(UnixListener, tempfile::TempDir)>,
}

impl Host {
    /// Sends the guest the input's end as a packet.
    fn speak(&self, input: &[u8]) {
        if let Some(wire) = &self.wire {
            let _ = wire.send(&input[input.len().saturating_sub(300)..]);
        }
    }

    /// Takes what the guest sent or asked for.
    fn listen(&self) {
        if let Some(wire) = &self.wire {
            while wire.recv(&mut [0; 16]).is_ok() {}
        }
        if let Some((ear, _)) = &self.ear {
            // Closed at once: the guest's connection ends.
            while ear.accept().is_ok() {}
        }
    }
}

pub(super) fn any_device(kind: u8) -> (Arc<dyn VirtioDevice>, Host) {
    let port = || Console::open(&ConsoleBackend::Null).unwrap().port();
    let disk = || {
        Arc::new(MemoryBackend::new(Geometry {
            size_bytes: DISK_BYTES,
            read_only: false,
        }))
    };
    let mut host = Host::default();
    let device: Arc<dyn VirtioDevice> = match kind {
        0 => Arc::new(Rng::new()),
        1 => Arc::new(Balloon::new(BalloonOptions {
            deflate_on_oom: true,
            reporting: true,
        })),
        2 => Arc::new(VirtioConsole::new(port()).unwrap()),
        3 => {
            let ports = [None, Some("agent")].map(|name| PortOptions {
                port: port(),
                name: name.map(str::to_owned),
            });
            Arc::new(VirtioConsole::with_ports(ports.into()).unwrap())
        }
        4 => {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("v");
            let ear = UnixListener::bind(directory.path().join(format!("v_{PORT}"))).unwrap();
            ear.set_nonblocking(true).unwrap();
            host.ear = Some((ear, directory));
            let listener = UnixListener::bind(&path).unwrap();
            Arc::new(Vsock::new(CID, path, listener).unwrap())
        }
        5 => {
            let (end, wire) = UnixDatagram::pair().unwrap();
            for socket in [&end, &wire] {
                socket.set_nonblocking(true).unwrap();
            }
            host.wire = Some(wire);
            let net = Net::new(NetOptions {
                name: "fuzz".to_owned(),
                host: HostEnd::Tap {
                    taps: vec![Tap::stand_in(end)],
                    kernel: None,
                },
                mac: [2, 0, 0, 0, 0, 1],
                mtu: Some(1500),
            });
            Arc::new(net.unwrap())
        }
        6 => Arc::new(Blk::new(BlkOptions {
            name: "fuzz".to_owned(),
            backend: disk(),
            serial: "fuzz".to_owned(),
            queue_count: 2,
        })),
        _ => {
            let target = Target::new(TargetOptions {
                kind: TargetKind::Disk,
                serial: "fuzz".to_owned(),
                medium: Some(disk()),
            });
            let options = ScsiOptions {
                name: "fuzz".to_owned(),
                queue_count: 1,
                targets: BTreeMap::from([(0, Arc::new(target))]),
            };
            Arc::new(Scsi::new(options).unwrap())
        }
    };
    (device, host)
}

/// The common inputs for every queue of every kind, and a packet's header each for sockets and cards.
pub fn device_corpus() -> Vec<Vec<u8>> {
    let mut all = Vec::new();
    for kind in 0..KINDS {
        let count = u8::try_from(any_device(kind).0.queue_sizes().len()).expect("a handful");
        for first in 0..count {
            let with = |input: Vec<u8>| [vec![kind, first, first + 1], input].concat();
            all.extend(corpus().into_iter().map(with));
        }
    }
    let descriptor = |address: u64, size: u32, flags: u16, next: u16| {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(size.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        bytes
    };
    // A queue of 4 with two chains: one that is read (at 64), one that is written (behind it).
    let two_chains = |data: &[u8]| {
        let mut bytes = vec![0x82, 2, 0, 0, 0, 1, 0, 0, 0, 0, 0];
        bytes.extend(descriptor(64, u32::try_from(data.len()).unwrap(), 0, 0));
        bytes.extend(descriptor(0x1_0000, 4096, 2, 0));
        bytes.extend([0; 32]);
        bytes.extend(data);
        bytes
    };
    // Every operation of a stream socket, to a port where somebody listens.
    for operation in 0..9_u16 {
        let mut packet = Vec::new();
        packet.extend(u64::from(CID).to_le_bytes());
        packet.extend(2_u64.to_le_bytes());
        packet.extend(1024_u32.to_le_bytes());
        packet.extend(PORT.to_le_bytes());
        packet.extend(4_u32.to_le_bytes());
        packet.extend(1_u16.to_le_bytes());
        packet.extend(operation.to_le_bytes());
        packet.extend([0; 4]);
        packet.extend(4096_u32.to_le_bytes());
        packet.extend([0; 4]);
        packet.extend(b"data");
        all.push([vec![4, 1, 0], two_chains(&packet)].concat());
    }
    // Commands of a card: with an answer's room behind them in one chain.
    for command in [
        &[0, 0, 1][..],
        &[1, 0, 1, 0, 0, 0, 2, 0, 0, 0, 0, 9, 0, 0, 0, 0],
        &[1, 1, 2, 0, 0, 0, 0, 5],
        &[3, 0],
        &[4, 0, 1, 0],
        &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ] {
        let mut bytes = vec![0x82, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend(descriptor(64, u32::try_from(command.len()).unwrap(), 1, 1));
        bytes.extend(descriptor(0x1_0000, 1, 2, 0));
        bytes.extend([0; 32]);
        bytes.extend(command);
        all.push([vec![5, 2, 0], bytes].concat());
    }
    all.push([vec![5, 1, 0], two_chains(&[0; 90])].concat());
    all
}
