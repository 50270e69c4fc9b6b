// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Doorbells: guest writes that signal an eventfd inside the kernel, and never reach a vCPU's exit.

use std::io;

use atoll_devices::pci::DoorbellSink;
use kvm_ioctls::{IoEventAddress, NoDatamatch};
use vmm_sys_util::eventfd::EventFd;

use super::VirtualMachine;

/// The machine's doorbells (ioeventfd). A write of any size and value rings one.
pub struct Doorbells(pub VirtualMachine);

impl DoorbellSink for Doorbells {
    fn connect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self.0.fd().register_ioevent(event, &address, NoDatamatch)?)
    }

    fn disconnect(&self, address: u64, event: &EventFd) -> io::Result<()> {
        let address = IoEventAddress::Mmio(address);
        Ok(self
            .0
            .fd()
            .unregister_ioevent(event, &address, NoDatamatch)?)
    }
}
