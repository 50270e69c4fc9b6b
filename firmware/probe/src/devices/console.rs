// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! virtio-console: a line out, and back when the host echoes; afterwards it echoes what the host types.

use alloc::boxed::Box;

use virtio_drivers::device::console::VirtIOConsole;

use super::Device;
use crate::clock::Clock;
use crate::interrupts;
use crate::memory::Dma;
use crate::options::Options;
use crate::report::Report;
use crate::transport::MsixTransport;

const LINE: &[u8] = b"atoll probe console check\n";

struct Console(VirtIOConsole<Dma, MsixTransport>);

pub fn open(transport: MsixTransport) -> virtio_drivers::Result<Box<dyn Device>> {
    Ok(Box::new(Console(VirtIOConsole::new(transport)?)))
}

impl Device for Console {
    fn name(&self) -> &'static str {
        "console"
    }

    fn check(&mut self, report: &mut Report, _: &Clock, options: &Options) {
        if let Err(error) = self.0.send_bytes(LINE) {
            return report.fail(error);
        }
        report.number("sent_bytes", LINE.len() as u64);
        if !options.echo {
            return;
        }
        let mut matched = 0;
        let mut wrong = false;
        interrupts::wait(|| {
            while let Ok(Some(byte)) = self.0.recv(true) {
                wrong |= LINE.get(matched) != Some(&byte);
                matched += 1;
            }
            matched >= LINE.len()
        });
        report.number("echoed_bytes", matched as u64);
        if wrong || matched != LINE.len() {
            report.fail("the host's echo is not the line sent");
        }
    }

    fn serve(&mut self) {
        while let Ok(Some(byte)) = self.0.recv(true) {
            let _ = self.0.send_bytes(&[byte]);
        }
    }
}
