// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! vhost-vsock: the kernel carries what the guest's programs say to AF_VSOCK sockets of the host, without this
//! process. Linux, `drivers/vhost/vsock.c`.
//!
//! It serves the two queues with packets; the third one, of events, stays with a thread of ours.

#![expect(
    unsafe_code,
    reason = "two ioctls that crate vhost has for its own open files only"
)]

use std::fs::{File, OpenOptions};
use std::io;
use std::sync::Arc;

use vhost::vhost_kern::vhost_binding::{VHOST_VSOCK_SET_GUEST_CID, VHOST_VSOCK_SET_RUNNING};
use virtio_queue::QueueState;
use vmm_sys_util::ioctl::ioctl_with_ref;

use crate::virtio::vhost_kernel::KernelRings;
use crate::virtio::{QueueStart, StartError, StartedQueue};

/// Sequenced packets, `VIRTIO_VSOCK_F_SEQPACKET`, §5.10.3.
const F_SEQPACKET: u64 = 1 << 1;

/// `/dev/vhost-vsock` for one guest, which has its address from the moment it was opened until it is closed.
pub struct VhostVsockFile(File);

impl VhostVsockFile {
    /// Opens it, and takes the address `cid` for the guest: in use by another one, it is an error.
    pub fn open(cid: u32) -> io::Result<Self> {
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).open("/dev/vhost-vsock")?;
        let cid = u64::from(cid);
        // SAFETY: an open descriptor; the kernel reads a 64-bit number from the reference.
        let result = unsafe { ioctl_with_ref(&file, VHOST_VSOCK_SET_GUEST_CID(), &cid) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self(file))
    }
}

/// The kernel's end.
pub(super) struct Kernel {
    rings: KernelRings,
    pub(super) features: u64,
}

impl Kernel {
    pub(super) fn new(file: VhostVsockFile) -> io::Result<Self> {
        let rings = KernelRings::new(file.0);
        let features = rings.known_features()? & F_SEQPACKET;
        Ok(Self { rings, features })
    }

    /// Serves ring `start.index` (0: receive, 1: transmit) from when both are known.
    pub(super) fn start(
        self: &Arc<Self>,
        start: &QueueStart,
    ) -> Result<Box<dyn StartedQueue>, StartError> {
        let ring = usize::from(start.index);
        let mut rings = self.rings.lock();
        let prepared = self.rings.prepare(ring, start, &mut rings);
        let failed = |source| StartError {
            index: start.index,
            source,
        };
        let state = prepared.map_err(failed)?;
        if rings.both_run() {
            self.set_running(true).map_err(failed)?;
        }
        drop(rings);
        Ok(Box::new(Running {
            kernel: self.clone(),
            ring,
            state,
        }))
    }

    fn set_running(&self, running: bool) -> io::Result<()> {
        let running = libc::c_int::from(running);
        // SAFETY: an open descriptor; the kernel reads an int from the reference.
        let result = unsafe { ioctl_with_ref(&self.rings, VHOST_VSOCK_SET_RUNNING(), &running) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(())
    }
}

/// A ring that the kernel serves, as soon as it has both.
struct Running {
    kernel: Arc<Kernel>,
    ring: usize,
    state: QueueState,
}

impl StartedQueue for Running {
    fn stop(self: Box<Self>) -> QueueState {
        let kernel = &self.kernel.rings;
        let mut rings = kernel.lock();
        // After this the kernel has finished its packet and touches neither ring any more.
        if rings.both_run()
            && let Err(error) = self.kernel.set_running(false)
        {
            tracing::error!(ring = self.ring, %error, "vhost-vsock: stop");
        }
        rings.end(self.ring);
        kernel.position(self.ring, self.state, &rings)
    }
}
