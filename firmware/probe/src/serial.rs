// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! COM1: a 16550 with its 16 byte queue.

use core::fmt;

use crate::cpu;
use crate::interrupts::Vector;

const PORT: u16 = 0x3f8;
/// Scratch register: reading it has no effect, so it serves to measure what a port access costs.
pub const SCRATCH: u16 = PORT + 7;
const LINE_STATUS: u16 = PORT + 5;
const QUEUE_BYTES: usize = 16;
/// Input of the I/O APIC that COM1 raises.
const IRQ: u32 = 4;

/// The port.
pub struct Serial;

impl Serial {
    /// 8N1, queues on, no interrupts.
    pub fn start(&self) {
        for (register, value) in [(1, 0), (3, 3), (2, 7), (4, 0xb)] {
            cpu::outb(PORT + register, value);
        }
    }

    /// Interrupts on input, by a vector of its own.
    pub fn listen(&self) {
        if let Some(vector) = Vector::allocate() {
            vector.listen_to(IRQ);
            cpu::outb(PORT + 1, 1);
        }
    }

    /// The next typed byte.
    pub fn read(&self) -> Option<u8> {
        (cpu::inb(LINE_STATUS) & 1 != 0).then(|| cpu::inb(PORT))
    }

    /// Sends bytes as they are.
    pub fn write(&self, bytes: &[u8]) {
        for piece in bytes.chunks(QUEUE_BYTES) {
            // Bounded: a port that is never ready is a port that is not there.
            for _ in 0..100_000 {
                if cpu::inb(LINE_STATUS) & 0x20 != 0 {
                    break;
                }
            }
            cpu::write_port(PORT, piece);
        }
    }
}

impl fmt::Write for Serial {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for line in text.split_inclusive('\n') {
            match line.strip_suffix('\n') {
                Some(start) => {
                    self.write(start.as_bytes());
                    self.write(b"\r\n");
                }
                None => self.write(line.as_bytes()),
            }
        }
        Ok(())
    }
}
