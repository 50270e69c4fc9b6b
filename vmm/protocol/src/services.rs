// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What connects a guest with its host beside disks, network cards and terminals; a part of the machine's spec.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// All of it; nothing by default.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuestServices {
    /// Named channels: how a guest agent talks to the host.
    pub ports: Vec<PortSpec>,
    /// Memory that the guest gives back.
    pub balloon: Option<BalloonSpec>,
    /// Sockets between programs of the guest and of the host.
    pub vsock: Option<VsockSpec>,
    /// A timer that the guest has to feed.
    pub watchdog: Option<WatchdogSpec>,
    /// A device by which the guest's kernel tells that it crashed.
    pub panic: Option<PanicSpec>,
    /// What holds the guest's memory on the host.
    pub memory_backing: MemoryBacking,
    /// Directories of the host.
    pub filesystems: Vec<FilesystemSpec>,
    /// Other devices that other processes serve.
    pub vhost_user: Vec<VhostUserSpec>,
}

/// One port of the virtio console that is no terminal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PortSpec {
    /// The guest finds `/dev/virtio-ports/NAME`. QEMU's agent wants `org.qemu.guest_agent.0`.
    pub name: String,
    /// A Unix stream socket that the VMM listens on: raw bytes both ways; what the guest writes while nobody is
    /// connected is lost.
    pub path: PathBuf,
}

/// A virtio balloon.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BalloonSpec {
    /// Memory that the guest is to keep, in MiB; all of it when absent. `set-balloon` changes it.
    pub target_mib: Option<u64>,
    /// The guest may take memory back when it runs out of it.
    pub deflate_on_oom: bool,
    /// The guest tells of free pages, and the host takes them until they are used again.
    pub free_page_reporting: bool,
}

impl Default for BalloonSpec {
    fn default() -> Self {
        Self {
            target_mib: None,
            deflate_on_oom: true,
            free_page_reporting: true,
        }
    }
}

/// A virtio socket device. The host's end are Unix sockets at `path`, or, with `vhost`, AF_VSOCK sockets by the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The guest's address, 3 or more.
    pub cid: u32,
    /// A Unix stream socket that the VMM listens on: who connects writes `CONNECT PORT` and a newline, reads `OK`
    /// and a number, and is connected with that port of the guest. A guest that connects to port N of the host (cid
    /// 2) reaches who listens on `PATH_N`, where the VMM's user may write. Absolute.
    #[serde(default)]
    pub path: PathBuf,
    /// The kernel (`/dev/vhost-vsock`) carries the packets: programs of the host use AF_VSOCK, as the guest's do, and the
    /// address must be no other guest's of this host.
    #[serde(default)]
    pub vhost: bool,
}

/// A watchdog, Intel's 6300ESB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WatchdogSpec {
    /// What happens when the guest has not fed it in time.
    pub action: FaultAction,
}

/// A pvpanic device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PanicSpec {
    /// What happens when the guest's kernel says that it crashed.
    pub action: FaultAction,
}

/// What the VMM does about a guest that is in trouble. Each is a line in the log as well.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FaultAction {
    /// Nothing but the line.
    None,
    /// Start the machine again.
    Reset,
    /// Press the power button.
    Shutdown,
    /// End the machine; its process ends with exit code 3, as after any crash.
    Poweroff,
    /// Hold the machine, for somebody to look at it.
    Pause,
}

/// What holds a guest's memory on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MemoryBacking {
    /// Private pages, taken when they are first touched.
    #[default]
    Anonymous,
    /// Pages that another process may map as well. Their first touch costs about twice as much.
    Shared,
    /// Huge pages of 2 MiB (`vm.nr_hugepages`), all taken at the start.
    #[serde(rename = "hugepages-2m")]
    Hugepages2M,
    /// Huge pages of 1 GiB, all taken at the start.
    #[serde(rename = "hugepages-1g")]
    Hugepages1G,
}

impl MemoryBacking {
    /// The size that guest memory must be a multiple of, in MiB.
    #[must_use]
    pub fn page_mib(self) -> u64 {
        match self {
            Self::Anonymous | Self::Shared => 1,
            Self::Hugepages2M => 2,
            Self::Hugepages1G => 1024,
        }
    }
}

/// A directory of the host, by virtio-fs and another process (`virtiofsd`). Guest memory must be shared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilesystemSpec {
    /// What the guest mounts: `mount -t virtiofs TAG /mnt`. At most 36 bytes.
    pub tag: String,
    /// The vhost-user socket on which the other process listens.
    pub path: PathBuf,
}

/// A vhost-user socket on which another process listens, and serves a device to whoever connects.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostUserSocket {
    /// The socket.
    pub path: PathBuf,
    /// When the other process ends, the next one at the same path is connected to. The directory then stays reachable
    /// for the VMM, whose user must be allowed to write to the socket.
    #[serde(default)]
    pub reconnect: bool,
}

/// A device that another process serves. Guest memory must be shared.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VhostUserSpec {
    /// Its socket.
    pub socket: VhostUserSocket,
    /// What the guest finds, by virtio's numbers (VIRTIO 1.2 §5): 2 is a disk, 4 a source of entropy. Network cards and
    /// file systems have places of their own in the spec.
    pub device_id: u16,
    /// Virtqueues; as many as such a device has, when absent.
    #[serde(default)]
    pub queue_count: Option<u16>,
    /// Bytes of configuration space that the other process keeps; as many as such a device has, when absent.
    #[serde(default)]
    pub config_bytes: Option<u16>,
}
