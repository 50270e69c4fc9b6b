// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The other process of a vhost-user device, which may say anything.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use crate::virtio::vhost_user::{BackendOptions, DeviceKind, Layout, VhostUser};
use crate::virtio::{VirtioDevice, device_id};

/// All answers of a backend, from its first to its last, whatever it was asked. Byte 0 chooses the kind of device.
pub fn vhost_user(input: &[u8]) {
    let Some((&which, answers)) = input.split_first() else {
        return;
    };
    let (here, mut there) = UnixStream::pair().unwrap();
    // More than a socket's buffer has room for is never read.
    let answers = &answers[..answers.len().min(4096)];
    there.write_all(answers).unwrap();
    there.shutdown(Shutdown::Write).unwrap();
    let options = BackendOptions {
        name: "fuzz".to_owned(),
        stream: here,
        reconnect: None,
        patience: Duration::from_secs(5),
    };
    let kinds = [device_id::BLOCK, device_id::RNG, device_id::SCSI, 41];
    let kind = DeviceKind::of(kinds[usize::from(which) % kinds.len()]);
    if let Ok(device) = VhostUser::new(kind, Layout::default(), options) {
        let mut config = [0; 64];
        device.config_read(0, &mut config);
        device.config_write(32, &[1]);
        device.reset();
    }
}

/// Good conversations, and one wrong word in each.
pub fn vhost_user_corpus() -> Vec<Vec<u8>> {
    let answer = |request: u32, value: &[u8]| {
        let size = u32::try_from(value.len()).unwrap();
        let mut bytes = [request, 5, size].map(u32::to_ne_bytes).concat();
        bytes.extend(value);
        bytes
    };
    let features = 1_u64 << 32 | 1 << 30 | 1 << 29 | 1 << 28;
    // MQ and CONFIG; then with acknowledgements.
    let good = |kind: u8, protocol: u64| {
        let mut bytes = vec![kind];
        bytes.extend(answer(1, &features.to_ne_bytes()));
        bytes.extend(answer(15, &protocol.to_ne_bytes()));
        if protocol & 8 != 0 {
            bytes.extend(answer(16, &[0; 8]));
        }
        bytes.extend(answer(17, &4_u64.to_ne_bytes()));
        let mut config = [0, 60, 0].map(u32::to_ne_bytes).concat();
        config.extend([7; 60]);
        bytes.extend(answer(24, &config));
        bytes
    };
    let mut all = vec![Vec::new(), vec![0], vec![0xff; 64]];
    for kind in 0..4 {
        for protocol in [0, 1, 0x201, 0x209] {
            let bytes = good(kind, protocol);
            for at in (1..bytes.len()).step_by(4) {
                let mut wrong = bytes.clone();
                wrong[at] ^= 0x41;
                all.push(wrong);
            }
            all.push(bytes);
        }
    }
    all
}
