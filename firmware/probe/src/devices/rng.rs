// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! virtio-rng: two draws that differ and are not zeros.

use alloc::boxed::Box;

use virtio_drivers::device::rng::VirtIORng;

use super::Device;
use crate::clock::Clock;
use crate::memory::Dma;
use crate::options::Options;
use crate::report::Report;
use crate::transport::MsixTransport;

const DRAW_BYTES: usize = 64;

struct Rng(VirtIORng<Dma, MsixTransport>);

pub fn open(transport: MsixTransport) -> virtio_drivers::Result<Box<dyn Device>> {
    Ok(Box::new(Rng(VirtIORng::new(transport)?)))
}

impl Device for Rng {
    fn name(&self) -> &'static str {
        "rng"
    }

    fn check(&mut self, report: &mut Report, _: &Clock, _: &Options) {
        let mut draws = [[0; DRAW_BYTES]; 2];
        for draw in &mut draws {
            let mut filled = 0;
            // A device may give less than was asked for, but at least one byte (VIRTIO 1.2 §5.4.6).
            while filled < DRAW_BYTES {
                match self.0.request_entropy(&mut draw[filled..]) {
                    Ok(count @ 1..) => filled += count,
                    Ok(_) => return report.fail("no bytes"),
                    Err(error) => return report.fail(error),
                }
            }
        }
        let nonzero = draws[0].iter().filter(|byte| **byte != 0).count();
        report.number("bytes", (2 * DRAW_BYTES) as u64);
        report.number("nonzero", nonzero as u64);
        if nonzero < DRAW_BYTES / 2 || draws[0] == draws[1] {
            report.fail("bytes are not random");
        }
    }
}
