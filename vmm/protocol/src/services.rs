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

/// A virtio socket device, whose host's end are Unix sockets.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockSpec {
    /// The guest's address, 3 or more.
    pub cid: u32,
    /// A Unix stream socket that the VMM listens on: who connects writes `CONNECT PORT` and a newline, reads `OK`
    /// and a number, and is connected with that port of the guest. A guest that connects to port N of the host (cid
    /// 2) reaches who listens on `PATH_N`, where the VMM's user may write. Absolute.
    pub path: PathBuf,
}
