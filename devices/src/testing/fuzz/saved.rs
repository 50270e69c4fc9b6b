// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Any bytes as a device's saved state: it goes in, or there is one line that says why not. Whatever went in comes
//! out again as it is, and the device can be used.
//!
//! Byte 0 chooses the device: a virtio function with everything that its transport knows, or a part of the board.

use std::sync::Arc;

use vm_memory::GuestAddress;

use super::{any, platform};
use crate::memory::{Memory, Ram};
use crate::pci::PciDevice as _;
use crate::state::{DeviceState, Saved};
use crate::testing::CountingSink;
use crate::virtio::worker::inline;
use crate::virtio::{VirtioPci, VirtioPciOptions};

const KINDS: u8 = any::KINDS + platform::KINDS;

/// An error is one line for a user: its causes on it, no line break, not too long to read.
pub(super) fn assert_one_line(error: &dyn std::error::Error) {
    let causes = std::iter::successors(error.source(), |error| error.source());
    let text = causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"));
    assert!(!text.contains('\n') && text.len() < 1000, "{text}");
}

fn function(kind: u8) -> (VirtioPci, any::Host) {
    let (device, host) = any::any_device(kind);
    let ram = Ram::from_ranges(&[(GuestAddress(0), 0x2_0000)]).unwrap();
    let vectors = u16::try_from(device.queue_sizes().len()).unwrap() + 1;
    let options = VirtioPciOptions {
        name: "fuzz".to_owned(),
        memory: Memory::new(ram),
        msix: Arc::new(CountingSink::new(vectors)),
    };
    (VirtioPci::new(device, options).unwrap(), host)
}

/// Restores the input.
pub fn saved(input: &[u8]) {
    let Some((&kind, text)) = input.split_first() else {
        return;
    };
    let saved: Saved = match serde_json::from_slice(text) {
        Ok(saved) => saved,
        Err(_) => return,
    };
    inline::queues(|| match (kind % KINDS).checked_sub(any::KINDS) {
        None => {
            let (device, _host) = function(kind % KINDS);
            if !goes_in(&device, &saved) {
                return;
            }
            for offset in (0..0x40).chain(0x2000..0x2040) {
                device.bar_read(0, offset, &mut [0; 4]);
            }
            // What its rings point to may be anywhere.
            if device.resume().is_ok() {
                device.pause();
            }
            device.reset();
        }
        Some(kind) => {
            let part = platform::part(kind);
            if goes_in(&*part, &saved) {
                part.read(0, &mut [0; 4]);
                part.write(0, &[0xff]);
                part.read(1, &mut [0; 1]);
                part.check();
            }
        }
    });
}

fn goes_in<D: DeviceState + ?Sized>(device: &D, saved: &Saved) -> bool {
    if let Err(error) = device.restore(saved) {
        // A parser repeats what it read: the line is made where it is shown.
        assert!(!error.to_string().contains('\n'), "{error}");
        return false;
    }
    let out = device.save();
    device.restore(&out).expect("its own state");
    true
}

/// States of all devices as they are made.
pub fn saved_corpus() -> Vec<Vec<u8>> {
    let with = |kind: u8, saved: &Saved| {
        let mut bytes = vec![kind];
        bytes.extend(serde_json::to_vec(saved).unwrap());
        bytes
    };
    let functions = (0..any::KINDS).map(|kind| with(kind, &function(kind).0.save()));
    let parts =
        (0..platform::KINDS).map(|kind| with(any::KINDS + kind, &platform::part(kind).save()));
    functions.chain(parts).collect()
}
