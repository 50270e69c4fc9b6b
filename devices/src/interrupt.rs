// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What devices need to interrupt a guest. The VMM implements both traits over KVM; tests count calls.

use std::io;

use vmm_sys_util::eventfd::EventFd;

/// One wire to the interrupt controller (IOAPIC pin): the serial port's IRQ 4, the power button.
///
/// Called from vCPU threads and from console threads; must not block.
pub trait IrqLine: Send + Sync {
    /// Drives the wire. A level-triggered device keeps it asserted until its cause is gone.
    fn set_level(&self, asserted: bool);

    /// One edge, for ISA devices.
    fn pulse(&self) {
        self.set_level(true);
        self.set_level(false);
    }
}

/// Address and data of a message-signalled interrupt, as the guest wrote them into the MSI-X table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct MsiMessage {
    /// Guest-physical address of the write that the interrupt is.
    pub address: u64,
    /// What is written there: on x86 the vector and how it is delivered (Intel SDM vol. 3A, "Message Data Register
    /// Format").
    pub data: u32,
}

/// Change of one vector: `None` means masked, or MSI-X disabled.
pub type RouteChange = (u16, Option<MsiMessage>);

/// The MSI-X vectors of one PCI function, on the host's side.
///
/// The VMM gives each vector an eventfd, and connects it (irqfd) to a KVM route while the vector has a message.
/// An event that was written while the vector was disconnected must be delivered when it is connected again;
/// KVM does so by itself, since it looks at the eventfd's counter when an irqfd is assigned.
pub trait MsixSink: Send + Sync {
    /// Vectors of this function; fixed. At most 2048.
    fn vector_count(&self) -> u16;

    /// The eventfd whose signal is the interrupt. Writing to it never blocks for long and takes no lock.
    fn event(&self, vector: u16) -> &EventFd;

    /// Applies changes, several at once so that the route table is set once. Called on the control path
    /// (a vCPU thread writing the MSI-X table), never by a queue's thread.
    fn set_routes(&self, changes: &[RouteChange]) -> io::Result<()>;
}
