// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Which system calls each kind of thread may make. This file is the whole policy; `program` compiles it.
//!
//! A thread gets [`COMMON`] and the tables of its kind in [`tables`]. What is not listed ends the process, with one
//! line that names the thread and the call. To add a device whose thread needs more: a new
//! [`Kind`](atoll_thread::Kind), its row in [`tables`], and a table here.
//!
//! Nowhere: execve, ptrace, mount, bpf, open and openat of any path, sockets, executable memory.

use atoll_thread::Kind;
use libc::{c_int, c_long};

/// A system call that is allowed.
#[derive(Debug)]
pub(super) struct Call {
    pub(super) number: c_long,
    pub(super) when: When,
}

/// Under which condition.
#[derive(Debug)]
pub(super) enum When {
    Always,
    /// The low 32 bits of argument `index`, under `mask`, are one of these.
    Argument {
        index: u8,
        mask: u32,
        one_of: &'static [u32],
    },
}

const fn call(number: c_long) -> Call {
    let when = When::Always;
    Call { number, when }
}

const fn only(number: c_long, index: u8, mask: u32, one_of: &'static [u32]) -> Call {
    let when = When::Argument {
        index,
        mask,
        one_of,
    };
    Call { number, when }
}

/// An ioctl whose type and number (`_IOC`, bits 0 to 15) are one of these, whatever its size.
const fn ioctl(one_of: &'static [u32]) -> Call {
    only(libc::SYS_ioctl, 1, 0xffff, one_of)
}

/// Every ioctl of these types (`_IOC`, bits 8 to 15).
const fn ioctl_types(one_of: &'static [u32]) -> Call {
    only(libc::SYS_ioctl, 1, 0xff00, one_of)
}

/// A constant of the C library as the kernel takes it.
#[expect(
    clippy::cast_sign_loss,
    reason = "flags and signal numbers are positive"
)]
const fn word(value: c_int) -> u32 {
    value as u32
}

/// The tables of one kind.
pub(super) fn tables(kind: Kind) -> &'static [&'static [Call]] {
    match kind {
        Kind::Owner => &[COMMON, FILES, CHANNELS, OWNER],
        Kind::Starter => &[STARTER],
        Kind::Signals => &[COMMON, SIGNALS],
        Kind::Api => &[COMMON, WAIT, CHANNELS],
        Kind::Vcpu => &[COMMON, VCPU],
        Kind::Disk => &[COMMON, WAIT, FILES, DISK],
        Kind::Net => &[COMMON, WAIT, NET],
        Kind::Queue => &[COMMON, WAIT],
        Kind::Console => &[COMMON, WAIT, CHANNELS],
        Kind::Vsock => &[COMMON, WAIT, CHANNELS, VSOCK],
        Kind::Migration => &[COMMON, WAIT, FILES, CHANNELS, MIGRATION],
        Kind::Export => &[COMMON, WAIT, FILES, CHANNELS, DISK],
        Kind::Mirror => &[COMMON, WAIT, FILES, DISK],
        Kind::Backend => &[COMMON, WAIT, CHANNELS, VSOCK, BACKEND],
        Kind::Relay => &[COMMON, WAIT, CHANNELS, RELAY],
        Kind::Memory => &[COMMON, FILES, MEMORY],
        Kind::Fetch => &[COMMON, WAIT, CHANNELS, FETCH],
        Kind::Saver => &[COMMON, WAIT, FILES, SAVER],
        Kind::Server => &[COMMON, FILES, CHANNELS, SIGNALS, SERVER],
    }
}

/// The signal that interrupts a vCPU: SIGRTMIN of the C library, which keeps the kernel's first two.
const KICK: u32 = 34;

/// What any thread of this program does: memory that is not executable, locks, descriptors that it has, the log,
/// and its own end.
const COMMON: &[Call] = &[
    call(libc::SYS_read),
    call(libc::SYS_write),
    call(libc::SYS_readv),
    call(libc::SYS_writev),
    call(libc::SYS_close),
    call(libc::SYS_fcntl),
    call(libc::SYS_futex),
    only(libc::SYS_mmap, 2, word(libc::PROT_EXEC), &[0]),
    only(libc::SYS_mprotect, 2, word(libc::PROT_EXEC), &[0]),
    call(libc::SYS_munmap),
    call(libc::SYS_mremap),
    call(libc::SYS_madvise),
    call(libc::SYS_brk),
    call(libc::SYS_sched_yield),
    call(libc::SYS_clock_gettime),
    call(libc::SYS_clock_nanosleep),
    call(libc::SYS_nanosleep),
    call(libc::SYS_restart_syscall),
    call(libc::SYS_getrandom),
    call(libc::SYS_getpid),
    call(libc::SYS_gettid),
    call(libc::SYS_rt_sigprocmask),
    call(libc::SYS_rt_sigreturn),
    call(libc::SYS_sigaltstack),
    only(
        libc::SYS_tgkill,
        2,
        !0,
        &[
            word(libc::SIGABRT),
            KICK,
            word(libc::SIGIO), // Ends the thread that waits for one.
        ],
    ),
    only(
        libc::SYS_prctl,
        0,
        !0,
        &[
            word(libc::PR_GET_NAME),
            word(libc::PR_SET_NAME),
            word(libc::PR_SET_VMA), // Newer C libraries name their heaps.
        ],
    ),
    call(libc::SYS_exit),
    call(libc::SYS_exit_group),
];

/// Sleeping on several descriptors.
const WAIT: &[Call] = &[
    call(libc::SYS_epoll_wait),
    call(libc::SYS_epoll_pwait),
    call(libc::SYS_epoll_ctl),
    call(libc::SYS_poll),
    call(libc::SYS_ppoll),
    call(libc::SYS_timerfd_settime),
];

/// Reading and writing files that are open. None opens a path; two may look at what one leads to.
const FILES: &[Call] = &[
    call(libc::SYS_pread64),
    call(libc::SYS_pwrite64),
    call(libc::SYS_preadv),
    call(libc::SYS_pwritev),
    call(libc::SYS_preadv2),
    call(libc::SYS_pwritev2),
    call(libc::SYS_lseek),
    call(libc::SYS_fstat),
    call(libc::SYS_newfstatat), // Of a descriptor, by newer C libraries.
    call(libc::SYS_statx),
    call(libc::SYS_fsync),
    call(libc::SYS_fdatasync),
    call(libc::SYS_fallocate),
    call(libc::SYS_ftruncate),
    call(libc::SYS_flock),
];

/// Accepting and using connections of sockets that listen already.
const CHANNELS: &[Call] = &[
    call(libc::SYS_accept4),
    call(libc::SYS_recvfrom),
    call(libc::SYS_recvmsg),
    call(libc::SYS_sendto),
    call(libc::SYS_sendmsg),
    call(libc::SYS_setsockopt),
    call(libc::SYS_getsockopt),
    call(libc::SYS_shutdown),
    ioctl(&[FIONBIO]),
];

const SIGNALS: &[Call] = &[call(libc::SYS_rt_sigtimedwait)];

/// `linux/kvm.h`: KVMIO. `linux/userfaultfd.h`: UFFDIO. `linux/vhost.h`: VHOST_VIRTIO. `linux/if_tun.h`: 'T'. `linux/fs.h`: block devices.
const KVM: u32 = 0xae;
const UFFD: u32 = 0xaa;
const VHOST: u32 = 0xaf;
const TUN: u32 = 0x54;
const BLOCK: u32 = 0x12;
/// `asm-generic/ioctls.h`.
const FIONBIO: u32 = 0x5421;

const fn nr(kind: u32, number: u32) -> u32 {
    kind << 8 | number
}

/// The guest's exits, and what its writes to the PCI bus move: doorbells, interrupt routes, tap offloads.
const VCPU: &[Call] = &[
    // Firmware's variables: a byte of flash is in its file before the guest is told so.
    call(libc::SYS_pwrite64),
    ioctl(&[
        nr(KVM, 0x80),          // KVM_RUN
        nr(KVM, 0x79),          // KVM_IOEVENTFD
        nr(KVM, 0x76),          // KVM_IRQFD
        nr(KVM, 0x6a),          // KVM_SET_GSI_ROUTING
        nr(KVM, 0x61),          // KVM_IRQ_LINE
        nr(KVM, 0x46),          // KVM_SET_USER_MEMORY_REGION: flash memory changes its mode
        nr(KVM, 0x81),          // KVM_GET_REGS
        nr(KVM, 0x82),          // KVM_SET_REGS
        nr(KVM, 0x83),          // KVM_GET_SREGS
        nr(KVM, 0x84),          // KVM_SET_SREGS
        nr(KVM, 0x88),          // KVM_GET_MSRS
        nr(KVM, 0x89),          // KVM_SET_MSRS
        nr(KVM, 0x8c),          // KVM_GET_FPU
        nr(KVM, 0x8d),          // KVM_SET_FPU
        nr(KVM, 0x8e),          // KVM_GET_LAPIC
        nr(KVM, 0x8f),          // KVM_SET_LAPIC
        nr(KVM, 0x90),          // KVM_SET_CPUID2
        nr(KVM, 0x91),          // KVM_GET_CPUID2
        nr(KVM, 0x98),          // KVM_GET_MP_STATE
        nr(KVM, 0x99),          // KVM_SET_MP_STATE
        nr(KVM, 0x9a),          // KVM_NMI
        nr(KVM, 0x9f),          // KVM_GET_VCPU_EVENTS
        nr(KVM, 0xa0),          // KVM_SET_VCPU_EVENTS
        nr(KVM, 0xa1),          // KVM_GET_DEBUGREGS
        nr(KVM, 0xa2),          // KVM_SET_DEBUGREGS, KVM_SET_TSC_KHZ
        nr(KVM, 0xa3),          // KVM_GET_TSC_KHZ
        nr(KVM, 0xa4),          // KVM_GET_XSAVE
        nr(KVM, 0xa5),          // KVM_SET_XSAVE, KVM_SIGNAL_MSI
        nr(KVM, 0xa6),          // KVM_GET_XCRS
        nr(KVM, 0xa7),          // KVM_SET_XCRS
        nr(KVM, 0xad),          // KVM_KVMCLOCK_CTRL
        nr(KVM, 0xbe),          // KVM_GET_NESTED_STATE
        nr(KVM, 0xbf),          // KVM_SET_NESTED_STATE
        nr(KVM, 0xcf),          // KVM_GET_XSAVE2
        nr(KVM, 0xe1),          // KVM_SET_DEVICE_ATTR: the TSC's offset
        nr(KVM, 0xe2),          // KVM_GET_DEVICE_ATTR
        nr(TUN, TUNSETOFFLOAD), // A reset of a network card
        nr(TUN, TUNSETQUEUE),
        nr(VHOST, 0x12), // VHOST_GET_VRING_BASE: the same of one that the kernel serves
        nr(VHOST, 0x30), // VHOST_NET_SET_BACKEND
    ]),
    // The queues of vhost-net stop with a reset of the card.
    ioctl_types(&[nr(VHOST, 0)]),
    call(libc::SYS_timerfd_settime), // A watchdog that is fed.
];

/// Number of `TUNSETOFFLOAD`.
const TUNSETOFFLOAD: u32 = 208;
/// Number of `TUNSETQUEUE`.
const TUNSETQUEUE: u32 = 217;

const NET: &[Call] = &[ioctl_types(&[nr(TUN, 0), nr(VHOST, 0)])];

const DISK: &[Call] = &[call(libc::SYS_io_uring_enter), ioctl_types(&[nr(BLOCK, 0)])];

/// New connections, on this host, in the one directory that its sockets are in.
const VSOCK: &[Call] = &[
    only(libc::SYS_socket, 0, !0, &[word(libc::AF_UNIX)]),
    call(libc::SYS_connect),
];

/// The backend's own way to speak first, and the file in which it notes what it writes.
const BACKEND: &[Call] = &[
    call(libc::SYS_socketpair),
    call(libc::SYS_memfd_create),
    call(libc::SYS_ftruncate),
];

/// A local connection for each one of the network.
const RELAY: &[Call] = &[call(libc::SYS_socketpair)];

/// Its socket is removed where it can be reached.
const SERVER: &[Call] = &[call(libc::SYS_unlink)];

/// Pages of guest memory, where there are none.
const MEMORY: &[Call] = &[ioctl(&[
    nr(UFFD, 0x02), // UFFDIO_WAKE
    nr(UFFD, 0x03), // UFFDIO_COPY
    nr(UFFD, 0x04), // UFFDIO_ZEROPAGE
])];

/// The same. (Nothing but a name: `MEMORY`, beside connections instead of files; `CHANNELS` has another ioctl.)
const FETCH: &[Call] = MEMORY;

/// Pages that may be written again.
const SAVER: &[Call] = &[ioctl(&[nr(UFFD, 0x06)])]; // UFFDIO_WRITEPROTECT

/// The log of written pages, on and off: KVM's, and what the kernel writes for network cards.
const MIGRATION: &[Call] = &[ioctl(&[
    nr(KVM, 0x03),   // KVM_CHECK_EXTENSION
    nr(KVM, 0x42),   // KVM_GET_DIRTY_LOG
    nr(KVM, 0x46),   // KVM_SET_USER_MEMORY_REGION
    nr(KVM, 0xa3),   // KVM_ENABLE_CAP
    nr(KVM, 0xc0),   // KVM_CLEAR_DIRTY_LOG
    nr(VHOST, 0x00), // VHOST_SET_FEATURES, VHOST_GET_FEATURES
    nr(VHOST, 0x04), // VHOST_SET_LOG_BASE
    nr(VHOST, 0x11), // VHOST_SET_VRING_ADDR
])];

/// The machine's life: everything of KVM, memory, terminal modes at the end. (It also grows images: `FILES`.)
const OWNER: &[Call] = &[
    // UFFD: a live snapshot's, of a descriptor that comes with the request.
    ioctl_types(&[nr(KVM, 0), nr(VHOST, 0), nr(TUN, 0), nr(UFFD, 0)]),
    call(libc::SYS_eventfd2),
    call(libc::SYS_memfd_create),
    call(libc::SYS_timerfd_settime),
    call(libc::SYS_poll),
    call(libc::SYS_ppoll),
    // Sockets are removed where they can be reached; in a root of its own the process is told that they cannot.
    call(libc::SYS_unlink),
    call(libc::SYS_unlinkat),
];

/// What the starter does beside everything that the threads do which it makes, since they inherit its filter:
/// threads, and what queues sleep on.
const STARTER: &[Call] = &[
    call(libc::SYS_clone),
    call(libc::SYS_clone3),
    call(libc::SYS_set_robust_list),
    call(libc::SYS_rseq),
    call(libc::SYS_sched_getaffinity),
    call(libc::SYS_seccomp),
    only(libc::SYS_prctl, 0, !0, &[word(libc::PR_SET_NO_NEW_PRIVS)]),
    call(libc::SYS_epoll_create1),
    call(libc::SYS_eventfd2),
    call(libc::SYS_timerfd_create),
    call(libc::SYS_dup),
    call(libc::SYS_fstatfs), // Of a qcow2 image that is plugged in: imago asks for the block size.
    call(libc::SYS_io_uring_setup),
    call(libc::SYS_io_uring_register),
    ioctl_types(&[nr(VHOST, 0)]),
];

/// Kinds whose threads may be made after the starter has its filter.
pub(super) const LATE: &[Kind] = &[
    Kind::Vcpu,
    Kind::Disk,
    Kind::Net,
    Kind::Queue,
    Kind::Console,
    Kind::Vsock,
    Kind::Migration,
    Kind::Export,
    Kind::Mirror,
    Kind::Backend,
    Kind::Relay,
    Kind::Saver,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kick_is_the_c_librarys_first_signal() {
        assert_eq!(word(libc::SIGRTMIN()), KICK);
    }

    /// The point of it all, spelled out: nobody may open, connect, execute, trace.
    #[test]
    fn no_kind_may_reach_out() {
        let never = [
            libc::SYS_open,
            libc::SYS_openat,
            libc::SYS_openat2,
            libc::SYS_socket,
            libc::SYS_connect,
            libc::SYS_bind,
            libc::SYS_execve,
            libc::SYS_execveat,
            libc::SYS_ptrace,
            libc::SYS_process_vm_writev,
            libc::SYS_mount,
            libc::SYS_unshare,
            libc::SYS_setns,
            libc::SYS_bpf,
            libc::SYS_userfaultfd,
            libc::SYS_kill,
            libc::SYS_pidfd_open,
        ];
        // But for the socket device, whose guest may reach the sockets of one directory, and for a device whose
        // process may come again at its own.
        let connects = [libc::SYS_socket, libc::SYS_connect];
        for kind in Kind::ALL {
            for call in tables(*kind).iter().copied().flatten() {
                let may = matches!(kind, Kind::Vsock | Kind::Backend);
                let exempt = may && connects.contains(&call.number);
                assert!(
                    exempt || !never.contains(&call.number),
                    "{kind:?}: {call:?}"
                );
            }
        }
    }

    #[test]
    fn no_table_lists_a_call_twice() {
        for kind in Kind::ALL {
            let calls: Vec<_> = tables(*kind).iter().copied().flatten().collect();
            for (index, call) in calls.iter().enumerate() {
                let again = calls[index + 1..]
                    .iter()
                    .any(|other| other.number == call.number && matches!(call.when, When::Always));
                assert!(!again, "{kind:?} lists {call:?} twice");
            }
        }
    }
}
