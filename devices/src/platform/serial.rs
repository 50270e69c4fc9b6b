// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The 16550 serial port (crate `vm-superio`) between a console port and eight I/O ports.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use serde::{Deserialize, Serialize};
use vm_superio::Trigger;
use vm_superio::serial::{NoEvents, SerialState};

use crate::bus::BusDevice;
use crate::console::ConsolePort;
use crate::counters::{Counter, CounterList};
use crate::interrupt::IrqLine;
use crate::state::{DeviceState, Saved, SavedState, StateError};

struct Wire(Arc<dyn IrqLine>);

impl Trigger for Wire {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.pulse();
        Ok(())
    }
}

#[derive(Clone)]
struct Output {
    port: Arc<ConsolePort>,
    bytes: Arc<Counter>,
}

impl io::Write for Output {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.port.write(data);
        self.bytes.add(data.len() as u64);
        Ok(data.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

type Uart = vm_superio::Serial<Wire, NoEvents, Output>;

/// One serial port, COM1 as a rule.
pub struct Serial {
    /// Taken by vCPU threads and by the console's thread when input comes. Before the console port's own lock.
    uart: Mutex<Uart>,
    port: Arc<ConsolePort>,
    written: Arc<Counter>,
    read: Counter,
}

impl Serial {
    /// First port of COM1; its interrupt is IRQ 4.
    pub const COM1: u64 = 0x3f8;
    /// Ports: the eight registers of a 16550.
    pub const SIZE: u64 = 8;

    /// Connects the guest's side (`irq`, edge-triggered) with the host's (`port`).
    pub fn new(port: Arc<ConsolePort>, irq: Arc<dyn IrqLine>) -> Arc<Self> {
        let written = Arc::new(Counter::default());
        let output = Output {
            port: port.clone(),
            bytes: written.clone(),
        };
        let serial = Arc::new(Self {
            uart: Mutex::new(Uart::new(Wire(irq), output)),
            port: port.clone(),
            written,
            read: Counter::default(),
        });
        let weak = Arc::downgrade(&serial);
        port.on_input(Box::new(move || {
            if let Some(serial) = weak.upgrade() {
                serial.take_input(&mut serial.lock());
            }
        }));
        // Typed before anybody listened.
        serial.take_input(&mut serial.lock());
        serial
    }

    /// As at power-on. What was typed before stays for the next guest.
    pub fn reset(&self) {
        let mut uart = self.lock();
        let (irq, output) = (uart.interrupt_evt().0.clone(), uart.writer().clone());
        *uart = Uart::new(Wire(irq), output);
    }

    /// Bytes out and in since the machine was built; a reset of the machine does not clear them.
    pub fn counters(&self) -> CounterList {
        vec![
            ("bytes_written", self.written.value()),
            ("bytes_read", self.read.value()),
        ]
    }

    /// Moves what has been typed into the FIFO, as far as there is room.
    fn take_input(&self, uart: &mut Uart) {
        let mut data = [0; 64];
        let room = uart.fifo_capacity().min(data.len());
        let count = self.port.read(&mut data[..room]);
        if count > 0 {
            self.read.add(count as u64);
            // In loop-back mode the port takes nothing: the typed bytes are lost, as on a wire.
            let _ = uart.enqueue_raw_bytes(&data[..count]);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Uart> {
        self.uart.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The port's registers, by their names in the 16550's data sheet.
#[derive(Serialize, Deserialize)]
struct UartState {
    divisor: u16,
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    /// Bytes in the receive FIFO.
    received: Vec<u8>,
}

impl SavedState for UartState {
    const KIND: &'static str = "serial-16550";
    const VERSION: u32 = 1;
}

impl DeviceState for Serial {
    fn save(&self) -> Saved {
        let uart = self.lock().state();
        Saved::of(&UartState {
            divisor: u16::from_le_bytes([uart.baud_divisor_low, uart.baud_divisor_high]),
            interrupt_enable: uart.interrupt_enable,
            interrupt_identification: uart.interrupt_identification,
            line_control: uart.line_control,
            line_status: uart.line_status,
            modem_control: uart.modem_control,
            modem_status: uart.modem_status,
            scratch: uart.scratch,
            received: uart.in_buffer,
        })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: UartState = saved.open()?;
        let [low, high] = state.divisor.to_le_bytes();
        let registers = SerialState {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received,
        };
        let mut uart = self.lock();
        let (irq, output) = (uart.interrupt_evt().0.clone(), uart.writer().clone());
        // Typed since this port was built, and not for its predecessor.
        let typed = uart.state().in_buffer;
        // An interrupt that was pending is raised again; one too many is harmless on an edge-triggered wire.
        let restored = Uart::from_state(&registers, Wire(irq), NoEvents, output);
        *uart = restored.map_err(|error| StateError::Differs {
            kind: UartState::KIND,
            what: error.to_string(),
        })?;
        // What finds no room is lost, as on a wire.
        let room = uart.fifo_capacity().min(typed.len());
        let _ = uart.enqueue_raw_bytes(&typed[..room]);
        Ok(())
    }
}

impl BusDevice for Serial {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (Ok(register @ 0..8), [value]) = (u8::try_from(offset), data) {
            let mut uart = self.lock();
            *value = uart.read(register);
            if register == 0 {
                self.take_input(&mut uart);
            }
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (Ok(register @ 0..8), &[value]) = (u8::try_from(offset), data) {
            // Output never fails and the wire never does: there is no error to report.
            let _ = self.lock().write(register, value);
        }
    }
}
