// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Interrupts into the guest: pins of the I/O APIC, and message-signalled interrupts by irqfd.
//!
//! Every MSI-X vector has an eventfd for life. It is connected to an interrupt number of KVM's routing table
//! while the guest has given it a message and not masked it; interrupt numbers are taken when a vector is
//! first connected, so that a device with many vectors costs nothing until the guest uses them.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};

use atoll_devices::interrupt::{IrqLine, MsixSink, RouteChange};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry,
};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{KvmError, VirtualMachine};
use crate::layout;

/// Interrupt numbers that KVM's routing table holds (`KVM_MAX_IRQ_ROUTES`).
const GSI_COUNT: u32 = 4096;

/// KVM's routing table, the whole of it, since it can only be set as a whole.
pub struct Routes {
    machine: VirtualMachine,
    /// Protects the entries and the order in which tables reach KVM: two vCPUs that change their devices'
    /// vectors at once must not overwrite each other's. It is the one lock here that is held over an ioctl,
    /// which KVM finishes without any vCPU's help. Innermost: nothing else is locked while it is held.
    table: Mutex<Table>,
}

struct Table {
    entries: Vec<kvm_irq_routing_entry>,
    next_gsi: u32,
    /// Of functions that are gone.
    free_gsis: Vec<u32>,
}

impl Routes {
    /// The table of a new machine: the pins of the I/O APIC and of the two PICs.
    pub fn new(machine: VirtualMachine) -> Result<Arc<Self>, KvmError> {
        let mut entries = Vec::new();
        for pin in 0..layout::MSI_GSI {
            if pin < 8 {
                entries.push(pin_entry(pin, KVM_IRQCHIP_PIC_MASTER, pin));
            } else if pin < 16 {
                entries.push(pin_entry(pin, KVM_IRQCHIP_PIC_SLAVE, pin - 8));
            }
            entries.push(pin_entry(pin, KVM_IRQCHIP_IOAPIC, pin));
        }
        let table = Table {
            entries,
            next_gsi: layout::MSI_GSI,
            free_gsis: Vec::new(),
        };
        apply(&machine, &table).map_err(|source| KvmError::Failed {
            what: "set interrupt routes",
            source,
        })?;
        Ok(Arc::new(Self {
            machine,
            table: Mutex::new(table),
        }))
    }

    /// An eventfd that interrupts the guest by a pin of the I/O APIC, edge-triggered.
    pub fn pin(&self, gsi: u32) -> Result<Pin, KvmError> {
        let event = EventFd::new(EFD_NONBLOCK).map_err(|source| KvmError::Failed {
            what: "create an eventfd",
            source,
        })?;
        self.machine
            .fd()
            .register_irqfd(&event, gsi)
            .map_err(KvmError::failed("connect an interrupt"))?;
        Ok(Pin { event })
    }

    /// A pin of the I/O APIC that is driven by its level.
    pub fn level(&self, gsi: u32) -> LevelPin {
        LevelPin {
            machine: self.machine.clone(),
            gsi,
        }
    }

    /// The vectors of one PCI function, none of them connected.
    pub fn vectors(self: &Arc<Self>, count: u16) -> io::Result<Arc<Vectors>> {
        let events = (0..count)
            .map(|_| EventFd::new(EFD_NONBLOCK))
            .collect::<io::Result<_>>()?;
        Ok(Arc::new(Vectors {
            routes: self.clone(),
            events,
            gsis: Mutex::new(vec![Connection::default(); usize::from(count)]),
        }))
    }
}

fn pin_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry {
        gsi,
        type_: KVM_IRQ_ROUTING_IRQCHIP,
        ..Default::default()
    };
    entry.u.irqchip.irqchip = irqchip;
    entry.u.irqchip.pin = pin;
    entry
}

fn apply(machine: &VirtualMachine, table: &Table) -> io::Result<()> {
    let routing = KvmIrqRouting::from_entries(&table.entries)
        .map_err(|error| io::Error::other(format!("{error:?}")))?;
    Ok(machine.fd().set_gsi_routing(&routing)?)
}

/// One edge-triggered wire of the I/O APIC, by an eventfd that KVM turns into an interrupt (irqfd). Raising it never blocks.
pub struct Pin {
    event: EventFd,
}

impl IrqLine for Pin {
    fn set_level(&self, asserted: bool) {
        if asserted {
            // The counter cannot overflow: KVM empties it at every write.
            let _ = self.event.write(1);
        }
    }
}

/// One level-triggered wire of the I/O APIC (KVM_IRQ_LINE), which stays asserted until it is lowered.
pub struct LevelPin {
    machine: VirtualMachine,
    gsi: u32,
}

impl IrqLine for LevelPin {
    fn set_level(&self, asserted: bool) {
        // The pin exists: the machine has its interrupt controllers.
        let _ = self.machine.fd().set_irq_line(self.gsi, asserted);
    }
}

#[derive(Clone, Copy, Default)]
struct Connection {
    gsi: Option<u32>,
    connected: bool,
}

/// The MSI-X vectors of one PCI function.
pub struct Vectors {
    routes: Arc<Routes>,
    events: Vec<EventFd>,
    /// Protects which vector has which interrupt number. Taken before `Routes::table`.
    gsis: Mutex<Vec<Connection>>,
}

impl MsixSink for Vectors {
    fn vector_count(&self) -> u16 {
        u16::try_from(self.events.len()).expect("made from a u16")
    }

    fn event(&self, vector: u16) -> &EventFd {
        &self.events[usize::from(vector)]
    }

    fn set_routes(&self, changes: &[RouteChange]) -> io::Result<()> {
        let mut connections = self.gsis.lock().unwrap_or_else(PoisonError::into_inner);
        let machine = &self.routes.machine;
        let mut table = self
            .routes
            .table
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (vector, message) in changes {
            let connection = &mut connections[usize::from(*vector)];
            let event = &self.events[usize::from(*vector)];
            match message {
                Some(message) => {
                    let gsi = match connection.gsi {
                        Some(gsi) => gsi,
                        None => table.take_gsi()?,
                    };
                    connection.gsi = Some(gsi);
                    table.set_message(gsi, message.address, message.data);
                }
                None if connection.connected => {
                    let gsi = connection.gsi.expect("a connected vector has a number");
                    machine.fd().unregister_irqfd(event, gsi)?;
                    connection.connected = false;
                }
                None => {}
            }
        }
        // Routes first, then the eventfds: an event that is pending finds its route.
        if changes.iter().any(|(_, message)| message.is_some()) {
            apply(machine, &table)?;
        }
        for (vector, message) in changes {
            let connection = &mut connections[usize::from(*vector)];
            if message.is_some() && !connection.connected {
                let gsi = connection.gsi.expect("given above");
                let event = &self.events[usize::from(*vector)];
                machine.fd().register_irqfd(event, gsi)?;
                connection.connected = true;
            }
        }
        Ok(())
    }
}

/// A function that is gone gives its interrupt numbers back. Their routes stay until somebody else has them: nothing
/// signals them.
impl Drop for Vectors {
    fn drop(&mut self) {
        let connections = self.gsis.get_mut().unwrap_or_else(PoisonError::into_inner);
        let mut table = self
            .routes
            .table
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        for (connection, event) in connections.iter().zip(&self.events) {
            let Some(gsi) = connection.gsi else {
                continue;
            };
            if connection.connected {
                // Fails only if KVM does not know it, and then it need not be told.
                let _ = self.routes.machine.fd().unregister_irqfd(event, gsi);
            }
            table.free_gsis.push(gsi);
        }
    }
}

impl Table {
    fn take_gsi(&mut self) -> io::Result<u32> {
        if let Some(gsi) = self.free_gsis.pop() {
            return Ok(gsi);
        }
        if self.next_gsi == GSI_COUNT {
            return Err(io::Error::other("all 4096 interrupt numbers are taken"));
        }
        self.next_gsi += 1;
        Ok(self.next_gsi - 1)
    }

    fn set_message(&mut self, gsi: u32, address: u64, data: u32) {
        let mut entry = kvm_irq_routing_entry {
            gsi,
            type_: KVM_IRQ_ROUTING_MSI,
            ..Default::default()
        };
        let [low, high] = [address, address >> 32]
            .map(|word| u32::try_from(word & 0xffff_ffff).expect("masked to 32 bits"));
        entry.u.msi.address_lo = low;
        entry.u.msi.address_hi = high;
        entry.u.msi.data = data;
        match self.entries.iter_mut().find(|old| old.gsi == gsi) {
            Some(old) => *old = entry,
            None => self.entries.push(entry),
        }
    }
}
