// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Console, VIRTIO 1.2 §5.3. One port is two queues: one brings what was typed, one takes output.
//!
//! With more than a plain console, the device has the feature MULTIPORT: queues 0 and 1 are port 0, 2 and 3 the
//! control queues (`control`), 4 and 5 port 1, and so on. A named port is how a guest agent talks to the host.

mod control;

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use atoll_thread::Kind;
use serde::{Deserialize, Serialize};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::control::{Control, Description, FromDriver, ToDriver};
use super::worker::{self, Progress, QueueHandler};
use super::{
    Chain, DeviceQueue, QueueError, QueueStart, StartError, StartedQueue, VirtioDevice, device_id,
};
use crate::console::ConsolePort;
use crate::counters::{Counter, CounterList};
use crate::state::{DeviceState, Saved, SavedState, StateError, same};

/// Entries of both queues.
const QUEUE_SIZE: u16 = 64;
/// Feature bit `VIRTIO_CONSOLE_F_MULTIPORT`, §5.3.3.
const MULTIPORT: u32 = 1;
/// Bytes that are copied at once.
const CHUNK_BYTES: usize = 4096;
/// Output that one chain may bring; more is a mistake of the driver, not a long line.
const OUTPUT_BYTES_MAX: u64 = 1 << 20;

#[derive(Default)]
struct Counters {
    read: Counter,
    written: Counter,
}

/// One port of the device, VIRTIO 1.2 §5.3: a pair of queues, with a console's host end behind it.
pub struct PortOptions {
    /// The host's end, which no other device may use.
    pub port: Arc<ConsolePort>,
    /// The guest finds a named port as `/dev/virtio-ports/NAME`; without a name it is a terminal, hvc0 and so on.
    pub name: Option<String>,
}

/// What is typed at one port.
struct Port {
    port: Arc<ConsolePort>,
    typed: Arc<EventFd>,
}

/// The virtio console, VIRTIO 1.2 §5.3: port 0 is a console, others are named channels (`org.qemu.guest_agent.0`).
pub struct VirtioConsole {
    ports: Vec<Port>,
    /// For a device that is more than one plain console.
    control: Option<Arc<Control>>,
    counters: Arc<Counters>,
}

impl VirtioConsole {
    /// One terminal: connects the guest with `port`, which no other device may use.
    pub fn new(port: Arc<ConsolePort>) -> io::Result<Self> {
        Self::with_ports(vec![PortOptions { port, name: None }])
    }

    /// Several ports, at least one; a terminal among them best comes first, where a simple driver looks.
    pub fn with_ports(options: Vec<PortOptions>) -> io::Result<Self> {
        let multiple = options.len() > 1 || options.iter().any(|port| port.name.is_some());
        let describe = |port: &PortOptions| Description {
            name: port.name.clone(),
            is_console: port.name.is_none(),
        };
        let descriptions = options.iter().map(describe).collect();
        let control = match multiple {
            true => Some(Arc::new(Control::new(
                descriptions,
                EventFd::new(EFD_NONBLOCK)?,
            ))),
            false => None,
        };
        let listen = |options: PortOptions| {
            let typed = Arc::new(EventFd::new(EFD_NONBLOCK)?);
            let event = typed.clone();
            options.port.on_input(Box::new(move || {
                // Fails only when its counter is full: then the thread is awake anyway.
                let _ = event.write(1);
            }));
            Ok(Port {
                port: options.port,
                typed,
            })
        };
        Ok(Self {
            ports: options.into_iter().map(listen).collect::<io::Result<_>>()?,
            control,
            counters: Arc::default(),
        })
    }
}

impl VirtioDevice for VirtioConsole {
    fn device_id(&self) -> u16 {
        device_id::CONSOLE
    }

    fn features(&self) -> u64 {
        u64::from(self.control.is_some()) << MULTIPORT
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let control = usize::from(self.control.is_some());
        vec![QUEUE_SIZE; 2 * (self.ports.len() + control)]
    }

    fn config_read(&self, offset: u64, data: &mut [u8]) {
        // Columns and rows, which we do not know, and the number of ports, §5.3.4.
        let count = u32::try_from(self.ports.len()).expect("a handful of ports");
        let mut config = [0; 8];
        config[4..].copy_from_slice(&count.to_le_bytes());
        super::read_config(&config, offset, data);
    }

    fn start_queue(&self, start: QueueStart) -> Result<Box<dyn StartedQueue>, StartError> {
        let chain = Chain::new();
        let index = usize::from(start.index);
        let (number, name) = match (&self.control, index / 2) {
            (_, 0) => (0, "console".to_owned()),
            (Some(control), 1) => {
                let control = control.clone();
                let handler: Box<dyn QueueHandler> = if index == 2 {
                    Box::new(ToDriver { chain, control })
                } else {
                    Box::new(FromDriver { chain, control })
                };
                return worker::spawn(Kind::Queue, "console-ctl", start, handler);
            }
            (_, pair) => (pair - 1, format!("port{}", pair - 1)),
        };
        let Port { port, typed } = &self.ports[number];
        let (port, counters) = (port.clone(), self.counters.clone());
        if index.is_multiple_of(2) {
            let handler = Receive {
                chain,
                port,
                counters,
                typed: typed.clone(),
            };
            worker::spawn(Kind::Queue, &format!("{name}-rx"), start, Box::new(handler))
        } else {
            let handler = Transmit {
                chain,
                port,
                counters,
            };
            worker::spawn(Kind::Queue, &format!("{name}-tx"), start, Box::new(handler))
        }
    }

    fn reset(&self) {
        if let Some(control) = &self.control {
            control.set_waiting(Vec::new());
        }
    }

    fn counters(&self) -> CounterList {
        vec![
            ("bytes_read", self.counters.read.value()),
            ("bytes_written", self.counters.written.value()),
        ]
    }
}

/// What was typed and not read stays on the host.
#[derive(Serialize, Deserialize)]
struct ConsoleState {
    /// Ports; 0 in a state that knows only of one.
    #[serde(default)]
    port_count: usize,
    /// Control messages that the driver had no buffers for.
    #[serde(default)]
    waiting: Vec<Vec<u8>>,
}

impl SavedState for ConsoleState {
    const KIND: &'static str = "virtio-console";
    const VERSION: u32 = 1;
}

impl DeviceState for VirtioConsole {
    fn save(&self) -> Saved {
        let waiting = self.control.as_ref().map(|control| control.waiting());
        Saved::of(&ConsoleState {
            port_count: self.ports.len(),
            waiting: waiting.unwrap_or_default(),
        })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: ConsoleState = saved.open()?;
        let count = state.port_count.max(1);
        same::<ConsoleState, _>("the number of ports", count, self.ports.len())?;
        if let Some(control) = &self.control {
            control.set_waiting(state.waiting);
        }
        Ok(())
    }
}

/// Host to guest.
struct Receive {
    chain: Chain,
    port: Arc<ConsolePort>,
    typed: Arc<EventFd>,
    counters: Arc<Counters>,
}

impl QueueHandler for Receive {
    fn sources(&self) -> Vec<(RawFd, EventSet)> {
        vec![(self.typed.as_raw_fd(), EventSet::IN)]
    }

    /// Fills buffers while there are both input and buffers. The doorbell stays on: it is rare.
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        let mut data = [0; CHUNK_BYTES];
        while self.port.input_size() > 0 && queue.pop(&mut self.chain)? {
            let buffers = self.chain.writable();
            let room = usize::try_from(buffers.size()).map_or(CHUNK_BYTES, |n| n.min(CHUNK_BYTES));
            if room == 0 {
                return Err(self.chain.malformed("nothing to write to"));
            }
            let count = self.port.read(&mut data[..room]);
            buffers.write(&data[..count]);
            self.counters.read.add(count as u64);
            queue.push(self.chain.head(), u32::try_from(count).expect("4096"))?;
        }
        queue.signal()?;
        let more = queue.enable_doorbell()? && self.port.input_size() > 0;
        Ok(Progress::again_if(more))
    }
}

/// Guest to host.
struct Transmit {
    chain: Chain,
    port: Arc<ConsolePort>,
    counters: Arc<Counters>,
}

impl QueueHandler for Transmit {
    fn process(&mut self, queue: &mut DeviceQueue) -> Result<Progress, QueueError> {
        queue.disable_doorbell()?;
        for _ in 0..queue.size() {
            if !queue.pop(&mut self.chain)? {
                break;
            }
            let mut rest = self.chain.readable();
            if rest.size() > OUTPUT_BYTES_MAX {
                return Err(self.chain.malformed("more than 1 MiB of output"));
            }
            self.counters.written.add(rest.size());
            let mut data = [0; CHUNK_BYTES];
            while rest.size() > 0 {
                let count = rest.read(&mut data);
                self.port.write(&data[..count]);
                match rest.skip(count as u64) {
                    Some(left) if count > 0 => rest = left,
                    _ => return Err(self.chain.malformed("unreadable output")),
                }
            }
            queue.push(self.chain.head(), 0)?;
        }
        queue.signal()?;
        let more = queue.enable_doorbell()?;
        Ok(Progress::again_if(more))
    }
}
