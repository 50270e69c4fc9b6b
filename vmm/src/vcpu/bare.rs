// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! For tests: a machine of two vCPUs with no device, the first of which a test runs by itself, on a few bytes of
//! real-mode code.

use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use atoll_devices::memory::Ram;
use atoll_thread::Kind;
use kvm_ioctls::VcpuFd;
use vm_memory::{Bytes, GuestAddress};

use super::setup;
use super::state::Scope;
use crate::board::MICRO;
use crate::kvm::cpuid::{Place, for_vcpu};
use crate::kvm::{Kvm, VirtualMachine};

/// Where the code is.
pub const CODE: u64 = 0x1000;
/// Where the handlers of all vectors are, and how many bytes each has.
const HANDLERS: u16 = 0x2000;
const HANDLER_BYTES: u16 = 8;
const STACK: u64 = 0x8000;
/// The port that handlers write their vector to.
pub const PORT: u8 = 0x80;
/// Nothing that these tests wait for takes longer.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// Does `act`, which may run a guest, in a thread of its own; a test fails that would wait for ever.
#[track_caller]
pub fn in_time<T: Send + 'static>(act: impl FnOnce() -> T + Send + 'static) -> T {
    let (done, wait) = channel();
    let act = move || done.send(act());
    atoll_thread::spawn(Kind::Vcpu, "guest", act).unwrap();
    wait.recv_timeout(PATIENCE).expect("it ends, and well")
}

pub struct Bare {
    pub fd: VcpuFd,
    pub second: VcpuFd,
    pub scope: Scope,
    /// Last, since vCPUs must be gone before their memory.
    pub machine: VirtualMachine,
}

/// The first vCPU is about to run `code`. `None`, and says so, without KVM.
pub fn bare(code: &[u8]) -> Option<Bare> {
    let kvm = match Kvm::open() {
        Ok(kvm) => kvm,
        Err(error) => {
            println!("ATOLL-SKIP: {error}");
            return None;
        }
    };
    let ram = Ram::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap();
    ram.write_slice(code, GuestAddress(CODE)).unwrap();
    for vector in 0..=255_u8 {
        let handler = HANDLERS + HANDLER_BYTES * u16::from(vector);
        // mov al, vector; out PORT, al; iret
        let code = [0xb0, vector, 0xe6, PORT, 0xcf];
        ram.write_slice(&code, GuestAddress(handler.into()))
            .unwrap();
        let [low, high] = handler.to_le_bytes();
        let entry = GuestAddress(4 * u64::from(vector));
        ram.write_slice(&[low, high, 0, 0], entry).unwrap();
    }
    let machine = kvm.create_with(&MICRO, 2, &Arc::new(ram)).unwrap();
    let vcpu = |id: u8| {
        let fd = machine.fd().create_vcpu(id.into()).unwrap();
        let place = Place { id, count: 2 };
        let cpuid = for_vcpu(kvm.cpu().unwrap().entries(), place);
        setup::common(&fd, &cpuid, &[]).unwrap();
        setup::as_firmware_leaves_it(&fd).unwrap();
        fd
    };
    let (fd, second) = (vcpu(0), vcpu(1));
    let mut sregs = fd.get_sregs().unwrap();
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    fd.set_sregs(&sregs).unwrap();
    let mut regs = fd.get_regs().unwrap();
    (regs.rip, regs.rsp, regs.rflags) = (CODE, STACK, 2);
    fd.set_regs(&regs).unwrap();
    let scope = Scope {
        msr_indices: kvm.msr_indices().unwrap(),
        nested: kvm.cpu().unwrap().runs_guests(),
    };
    Some(Bare {
        fd,
        second,
        scope,
        machine,
    })
}
