// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What of a spec is served by other processes: they need shared memory, an absolute path to come back to, and queues
//! that can be.

use std::path::Path;

use atoll_devices::virtio::device_id;
use atoll_devices::virtio::vhost_user::{DeviceKind, TAG_BYTES_MAX};
use atoll_vmm_protocol::services::{MemoryBacking, VhostUserSocket, VhostUserSpec};
use atoll_vmm_protocol::spec::MachineSpec;

use super::{QUEUE_COUNT_MAX, SpecError, refuse};

/// Bytes of configuration space that a device may have, as the protocol has it (`VHOST_USER_MAX_CONFIG_SIZE`).
const CONFIG_BYTES_MAX: u16 = 256;
/// Largest number of a device: PCI device numbers begin 0x40 before 0x107f, VIRTIO 1.2 §4.1.2.1.
const DEVICE_ID_MAX: u16 = 0x3f;

pub(super) fn check(spec: &MachineSpec) -> Result<(), SpecError> {
    let nets = spec.nets.iter();
    let cards = nets.filter_map(|net| net.vhost_user.as_ref());
    let others = spec.services.vhost_user.iter().map(|one| &one.socket);
    for one in cards.chain(others) {
        socket(one)?;
    }
    spec.services.vhost_user.iter().try_for_each(device)?;
    file_systems(spec)?;
    needs_shared_memory(spec)
}

fn needs_shared_memory(spec: &MachineSpec) -> Result<(), SpecError> {
    if spec.services.memory_backing != MemoryBacking::Anonymous {
        return Ok(());
    }
    let what = if !spec.services.filesystems.is_empty() {
        "a virtio-fs file system"
    } else if spec.nets.iter().any(|net| net.vhost_user.is_some()) {
        "a vhost-user network card"
    } else if !spec.services.vhost_user.is_empty() {
        "a vhost-user device"
    } else {
        return Ok(());
    };
    refuse(format!(
        "{what} needs memory that its process can map: say --memory SIZE,shared"
    ))
}

fn socket(socket: &VhostUserSocket) -> Result<(), SpecError> {
    let path: &Path = &socket.path;
    if path.as_os_str().is_empty() {
        return refuse("vhost-user: the socket's path is missing");
    }
    if socket.reconnect && !path.is_absolute() {
        return refuse(format!(
            "vhost-user socket {}: must be an absolute path to be connected to again",
            path.display()
        ));
    }
    Ok(())
}

fn device(device: &VhostUserSpec) -> Result<(), SpecError> {
    let path = device.socket.path.display();
    match device.device_id {
        device_id::NET => refuse(format!(
            "vhost-user {path}: a network card is told by --net vhost-user="
        )),
        device_id::FS => refuse(format!(
            "vhost-user {path}: a file system is told by --fs tag="
        )),
        id if id == 0 || id > DEVICE_ID_MAX => refuse(format!(
            "vhost-user {path}: device {id}: virtio has 1 to {DEVICE_ID_MAX}"
        )),
        _ => Ok(()),
    }?;
    match (device.queue_count, device.config_bytes) {
        (Some(count), _) if !(1..=QUEUE_COUNT_MAX).contains(&count) => refuse(format!(
            "vhost-user {path}: {count} queues: 1 to {QUEUE_COUNT_MAX}"
        )),
        (_, Some(bytes)) if bytes > CONFIG_BYTES_MAX => refuse(format!(
            "vhost-user {path}: {bytes} bytes of configuration: at most {CONFIG_BYTES_MAX}"
        )),
        _ => Ok(()),
    }
}

fn file_systems(spec: &MachineSpec) -> Result<(), SpecError> {
    let filesystems = &spec.services.filesystems;
    for (index, one) in filesystems.iter().enumerate() {
        let tag = &one.tag;
        if tag.is_empty() || tag.len() > TAG_BYTES_MAX || tag.bytes().any(|byte| byte == 0) {
            return refuse(format!(
                "file system tag {tag:?}: 1 to {TAG_BYTES_MAX} bytes"
            ));
        }
        if filesystems[..index].iter().any(|other| other.tag == *tag) {
            return refuse(format!("file system {tag}: there are two of that tag"));
        }
    }
    Ok(())
}

/// The number of a device by the name or number that a user gives.
pub fn device_number(text: &str) -> Result<u16, String> {
    use atoll_devices::virtio::vhost_user::KINDS;
    let named = KINDS.iter().find(|kind: &&DeviceKind| kind.name == text);
    let number = named.map(|kind| kind.id).or_else(|| text.parse().ok());
    number.ok_or_else(|| {
        let names: Vec<_> = KINDS.iter().map(|kind| kind.name).collect();
        format!(
            "type={text}: there are {}, and virtio's device numbers",
            names.join(", ")
        )
    })
}
