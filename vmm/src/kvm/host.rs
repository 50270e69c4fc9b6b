// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the host's KVM offers, and one virtual machine of it.

#![expect(unsafe_code, reason = "KVM is told raw host addresses of guest memory")]

use std::any::Any;
use std::collections::BTreeMap;
use std::io;
use std::ops::RangeInclusive;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use atoll_devices::memory::Ram;
use kvm_bindings::{
    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_INITIALLY_SET,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_MEM_READONLY,
    KVM_PIT_SPEAKER_DUMMY, KVMIO, Msrs, kvm_clear_dirty_log, kvm_enable_cap, kvm_irqchip,
    kvm_msr_entry, kvm_pit_config, kvm_pit_state2, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VmFd};
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iowr_nr;

use super::cpu::features::MSR_ARCH_CAPABILITIES;
use super::cpu::{HostCpu, HostExtras};
use crate::board::Board;

/// Path of KVM's device, opened before the sandbox.
pub const DEVICE: &str = "/dev/kvm";
// Not among the calls of crate kvm-ioctls (`linux/kvm.h`).
ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);

/// The only version of the API there is.
const API_VERSION: i32 = 12;

/// Capabilities without which no machine of ours runs, and what each is for.
const NEEDED: &[(Cap, &str)] = &[
    (Cap::Irqchip, "interrupt controllers in the kernel"),
    (Cap::UserMemory, "guest memory from this process"),
    (Cap::SetTssAddr, "the task state segment's place"),
    (Cap::ExtCpuid, "the list of CPU features"),
    (Cap::MpState, "held vCPUs"),
    (Cap::Irqfd, "interrupts by eventfd"),
    (Cap::Ioeventfd, "doorbells by eventfd"),
    (Cap::ImmediateExit, "stopping a vCPU"),
    (Cap::Xsave, "floating-point state"),
    (Cap::Xcrs, "extended control registers"),
    (Cap::Debugregs, "debug registers"),
    (Cap::VcpuEvents, "pending exceptions"),
];

/// MTRRs, which KVM keeps for a guest but does not list (Linux `arch/x86/kvm/x86.c`, `msrs_to_save`): eight ranges, what
/// has a fixed place, and the default, whose write turns them on (SDM vol. 3A §12.11.2).
const MSRS_MEMORY_TYPES: [RangeInclusive<u32>; 5] = [
    0x200..=0x20f,
    0x250..=0x250,
    0x258..=0x259,
    0x268..=0x26f,
    0x2ff..=0x2ff,
];

/// Why this host gives no virtual machine, by what the user can do about it.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// No such device: virtualization is off, or this is a container without it.
    #[error(
        "{DEVICE} does not exist: enable virtualization in the firmware and load the module kvm_intel or kvm_amd"
    )]
    Absent,
    /// The device is there, but not for this user.
    #[error("open {DEVICE}: run as root or as a member of the group kvm")]
    Denied(#[source] io::Error),
    /// The device answers, but is too old or cut down.
    #[error("{DEVICE} lacks {0}")]
    Lacks(&'static str),
    /// More vCPUs than this KVM allows.
    #[error("{asked} vCPUs asked for, this host's KVM allows {allowed}")]
    TooManyCpus {
        /// From the spec.
        asked: u8,
        /// The host's limit.
        allowed: usize,
    },
    /// A request of ours failed.
    #[error("KVM: {what}")]
    Failed {
        /// What was asked of it.
        what: &'static str,
        /// What it said.
        source: io::Error,
    },
}

impl KvmError {
    /// For `map_err`: names what was asked.
    pub fn failed(what: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Failed {
            what,
            source: error.into(),
        }
    }
}

/// The host's KVM, open and known to have all that a machine needs. Machines that were made of it do not need it any more.
pub struct Kvm {
    fd: kvm_ioctls::Kvm,
    /// Asked for once: KVM reads every leaf from the CPU, and in a host that is itself a guest each is an exit.
    cpu: OnceLock<HostCpu>,
}

impl Kvm {
    /// Opens the device and checks that it has all that a machine needs.
    pub fn open() -> Result<Self, KvmError> {
        let fd = kvm_ioctls::Kvm::new().map_err(|error| match error.errno() {
            libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Absent,
            _ => KvmError::Denied(error.into()),
        })?;
        if fd.get_api_version() != API_VERSION {
            return Err(KvmError::Lacks("the stable API, version 12"));
        }
        match NEEDED.iter().find(|(cap, _)| !fd.check_extension(*cap)) {
            Some((_, what)) => Err(KvmError::Lacks(what)),
            None => Ok(Self {
                fd,
                cpu: OnceLock::new(),
            }),
        }
    }

    /// The CPU that this KVM can give a guest.
    pub fn cpu(&self) -> Result<&HostCpu, KvmError> {
        if let Some(known) = self.cpu.get() {
            return Ok(known);
        }
        let listed = self.fd.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES);
        let listed = listed.map_err(KvmError::failed("list the CPU's features"))?;
        let extras = HostExtras {
            arch_capabilities: self.feature_msr(MSR_ARCH_CAPABILITIES),
            tsc_deadline: self.fd.check_extension(Cap::TscDeadlineTimer),
            nested_state: self.fd.check_extension(Cap::NestedState),
        };
        let cpu = HostCpu::new(listed.as_slice(), extras);
        Ok(self.cpu.get_or_init(|| cpu))
    }

    /// An MSR that tells features, as far as this KVM can give them; 0 when it has no such MSR.
    fn feature_msr(&self, index: u32) -> u64 {
        let entry = kvm_msr_entry {
            index,
            ..Default::default()
        };
        let mut msrs = Msrs::from_entries(&[entry]).expect("one entry");
        match self.fd.get_msrs(&mut msrs) {
            Ok(1) => msrs.as_slice()[0].data,
            _ => 0,
        }
    }

    /// MSRs that belong to a vCPU's state; a vCPU may lack some of them.
    pub fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        let list = self
            .fd
            .get_msr_index_list()
            .map_err(KvmError::failed("list the MSRs"))?;
        let mut indices = list.as_slice().to_vec();
        for index in MSRS_MEMORY_TYPES.iter().cloned().flatten() {
            if !indices.contains(&index) {
                indices.push(index);
            }
        }
        Ok(indices)
    }

    /// Makes a virtual machine with memory and a PC's interrupt controllers, but no vCPU.
    pub fn create_with(
        &self,
        board: &Board,
        cpu_count: u8,
        memory: &Arc<Ram>,
    ) -> Result<VirtualMachine, KvmError> {
        let machine = self.create(board, cpu_count)?;
        machine.set_memory(memory)?;
        machine.create_interrupt_controllers()?;
        Ok(machine)
    }

    /// Makes a virtual machine with neither memory nor interrupt controllers nor vCPU. They come in this order:
    /// interrupt controllers are devices on buses of KVM's, and a memory slot that is set after they were put there
    /// waits milliseconds until the kernel is sure that nobody reads the old buses.
    pub fn create(&self, board: &Board, cpu_count: u8) -> Result<VirtualMachine, KvmError> {
        let allowed = self.fd.get_max_vcpus();
        if usize::from(cpu_count) > allowed {
            return Err(KvmError::TooManyCpus {
                asked: cpu_count,
                allowed,
            });
        }
        let fd = uninterrupted(|| self.fd.create_vm())
            .map_err(KvmError::failed("create a virtual machine"))?;
        fd.set_identity_map_address(board.kvm_pages)
            .map_err(KvmError::failed("place the identity map"))?;
        // The three pages after that of the identity map.
        let task_state = usize::try_from(board.kvm_pages + 0x1000).expect("below 4 GiB");
        fd.set_tss_address(task_state)
            .map_err(KvmError::failed("place the task state segment"))?;
        let slots = Mutex::default();
        let machine = Arc::new(Machine { fd, slots });
        Ok(VirtualMachine { machine })
    }
}

/// Tries at a virtual machine.
const CREATE_TRIES_MAX: u32 = 100;

/// Makes a virtual machine although signals come: while KVM registers with the process's memory, a pending one, even
/// one without effect, ends the call with EINTR (Linux `mm/mmap.c`, `mm_take_all_locks`). QEMU tries again, too.
fn uninterrupted<T>(
    mut create: impl FnMut() -> Result<T, kvm_ioctls::Error>,
) -> Result<T, kvm_ioctls::Error> {
    for _ in 1..CREATE_TRIES_MAX {
        match create() {
            Err(error) if error.errno() == libc::EINTR => {}
            done => return done,
        }
    }
    create()
}

/// One virtual machine. Clones are the same machine.
#[derive(Clone)]
pub struct VirtualMachine {
    machine: Arc<Machine>,
}

struct Machine {
    fd: VmFd,
    /// What memory slots point to, by their number: mapped for as long as the guest can reach it. Whoever has vCPUs drops
    /// them before the machine. A leaf lock, held for no call of KVM's.
    slots: Mutex<BTreeMap<u32, Arc<dyn Any + Send + Sync>>>,
}

impl Machine {
    fn keep(&self, slot: u32, memory: Arc<dyn Any + Send + Sync>) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.insert(slot, memory);
    }

    fn let_go(&self, slot: u32) {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.remove(&slot);
    }
}

impl VirtualMachine {
    /// The kernel's interface to the machine, for ioctls that have no method here.
    #[must_use]
    pub fn fd(&self) -> &VmFd {
        &self.machine.fd
    }

    /// Gives the machine a PC's interrupt controllers: two PICs, an I/O APIC, and a local APIC for every vCPU.
    pub fn create_interrupt_controllers(&self) -> Result<(), KvmError> {
        self.machine
            .fd
            .create_irq_chip()
            .map_err(KvmError::failed("create the interrupt controllers"))
    }

    /// Makes every region of `memory` the guest's RAM, one slot each. When KVM refuses one, the guest has those before it,
    /// and the machine keeps `memory`.
    pub fn set_memory(&self, memory: &Arc<Ram>) -> Result<(), KvmError> {
        self.set_slots(memory, 0)
    }

    /// Has reading the log of written pages not empty it, and every page in it at first; false where KVM cannot. Before
    /// any log is on.
    pub(super) fn log_is_manual(&self) -> bool {
        let wanted = KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | KVM_DIRTY_LOG_INITIALLY_SET;
        let capability = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2;
        let known = self.fd().check_extension_raw(capability.into());
        let mut asked = kvm_enable_cap {
            cap: capability,
            ..Default::default()
        };
        asked.args[0] = wanted.into();
        u32::try_from(known).is_ok_and(|known| known & wanted == wanted)
            && self.fd().enable_cap(&asked).is_ok()
    }

    /// Takes `count` pages of a slot, from `first_page` on, out of the log, of those that `words` names: a multiple of 64
    /// of them, but at the slot's end.
    pub(super) fn forget_writes(
        &self,
        slot: u32,
        first_page: usize,
        count: usize,
        words: &[u64],
    ) -> Result<(), KvmError> {
        assert!(count <= words.len() * 64, "a bit for each page");
        let mut asked = kvm_clear_dirty_log {
            slot,
            num_pages: u32::try_from(count).expect("16 TiB at most"),
            first_page: first_page as u64,
            ..Default::default()
        };
        asked.__bindgen_anon_1.dirty_bitmap = words.as_ptr().cast_mut().cast();
        // SAFETY: the descriptor is a machine's. The kernel reads the struct, and a bit for each of its pages, which
        // `words` has, as was asserted; it writes neither.
        let result = unsafe { ioctl_with_ref(self.fd(), KVM_CLEAR_DIRTY_LOG(), &asked) };
        match result {
            0 => Ok(()),
            _ => Err(KvmError::Failed {
                what: "empty the log of written pages",
                source: io::Error::last_os_error(),
            }),
        }
    }

    /// Lets KVM log, or no longer log, which pages of `memory` vCPUs write. The RAM is that of `set_memory`.
    pub(super) fn log_writes(&self, memory: &Arc<Ram>, on: bool) -> Result<(), KvmError> {
        self.set_slots(memory, if on { KVM_MEM_LOG_DIRTY_PAGES } else { 0 })
    }

    fn set_slots(&self, memory: &Arc<Ram>, flags: u32) -> Result<(), KvmError> {
        for (slot, region) in (0_u32..).zip(memory.iter()) {
            let slot = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.start_addr().raw_value(),
                memory_size: region.len(),
                userspace_addr: region.as_ptr() as u64,
            };
            self.machine.keep(slot.slot, memory.clone());
            // SAFETY: the range is one mapping of this process, `region` says its length, and the mapping
            // outlives the machine, which keeps it beside its descriptor.
            unsafe { self.machine.fd.set_user_memory_region(slot) }
                .map_err(KvmError::failed("give the guest its memory"))?;
        }
        Ok(())
    }

    /// Makes a region readable for the guest, which sees its own address; writes to it exit as memory accesses.
    /// The machine keeps the region for as long as the slot.
    pub fn set_rom(&self, slot: u32, region: &Arc<GuestRegionMmap>) -> Result<(), KvmError> {
        self.machine.keep(slot, region.clone());
        let slot = kvm_userspace_memory_region {
            slot,
            flags: KVM_MEM_READONLY,
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is one mapping of this process, `region` says its length, and the machine keeps it until
        // the slot is taken away.
        unsafe { self.machine.fd.set_user_memory_region(slot) }
            .map_err(KvmError::failed("give the guest its firmware"))
    }

    /// Takes a slot's memory away from the guest.
    pub fn remove_slot(&self, slot: u32) -> Result<(), KvmError> {
        let slot = kvm_userspace_memory_region {
            slot,
            ..Default::default()
        };
        // SAFETY: a slot of no bytes maps nothing.
        unsafe { self.machine.fd.set_user_memory_region(slot) }
            .map_err(KvmError::failed("take a memory slot away"))?;
        self.machine.let_go(slot.slot);
        Ok(())
    }

    /// Gives the machine a PC's interval timer (i8254), with its speaker port.
    pub fn create_timer(&self) -> Result<(), KvmError> {
        let config = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        self.machine
            .fd
            .create_pit2(config)
            .map_err(KvmError::failed("create the interval timer"))
    }

    /// State of the interval timer, if the machine has one.
    pub fn timer(&self) -> Result<kvm_pit_state2, KvmError> {
        self.machine
            .fd
            .get_pit2()
            .map_err(KvmError::failed("read the interval timer"))
    }

    /// Puts the interval timer's state back. The vCPUs are held.
    pub fn set_timer(&self, state: &kvm_pit_state2) -> Result<(), KvmError> {
        self.machine
            .fd
            .set_pit2(state)
            .map_err(KvmError::failed("set the interval timer"))
    }

    /// State of the interrupt controllers that vCPUs share: both PICs and the I/O APIC.
    pub fn irqchips(&self) -> Result<Vec<kvm_irqchip>, KvmError> {
        [
            KVM_IRQCHIP_PIC_MASTER,
            KVM_IRQCHIP_PIC_SLAVE,
            KVM_IRQCHIP_IOAPIC,
        ]
        .into_iter()
        .map(|chip_id| {
            let mut chip = kvm_irqchip {
                chip_id,
                ..Default::default()
            };
            self.machine
                .fd
                .get_irqchip(&mut chip)
                .map_err(KvmError::failed("read an interrupt controller"))?;
            Ok(chip)
        })
        .collect()
    }

    /// Puts their state back. The vCPUs are held.
    pub fn set_irqchips(&self, chips: &[kvm_irqchip]) -> Result<(), KvmError> {
        chips.iter().try_for_each(|chip| {
            self.machine
                .fd
                .set_irqchip(chip)
                .map_err(KvmError::failed("set an interrupt controller"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_does_not_keep_a_machine_from_being_made() {
        let answer = |errors: u32, errno: i32| {
            let mut tries = 0;
            let done = uninterrupted(|| {
                tries += 1;
                let failed = Err(kvm_ioctls::Error::new(errno));
                if tries > errors { Ok(()) } else { failed }
            });
            (done.is_ok(), tries)
        };
        assert_eq!(answer(3, libc::EINTR), (true, 4));
        assert_eq!(answer(1, libc::ENOMEM), (false, 1));
        assert_eq!(answer(u32::MAX, libc::EINTR), (false, CREATE_TRIES_MAX));
    }
}
