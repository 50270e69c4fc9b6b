// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A spec before anything is opened: what cannot be a machine is refused here, with a sentence that names the
//! value. Both doors use it, `--spec` and the command line.
//!
//! [`shape`] is pure. [`spec`] also looks at files (there, and of the right kind), so that a missing disk is told before a
//! tap has been made.

mod limits;
mod vhost_user;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use atoll_devices::virtio::scsi::TARGET_MAX;
use atoll_vmm_protocol::services::MemoryBacking;
use atoll_vmm_protocol::spec::{
    BootSpec, CacheMode, ConsoleSpec, DiskBus, DiskFormat, DiskLimits, DiskSpec, FirmwareSpec,
    KernelSpec, MachineSpec, NetLimits, NetSpec, Profile, VhostNet,
};

use crate::kvm::cpu::{Vendor, model};
use crate::{flash, layout};

pub use self::limits::disk_limits;
pub use self::vhost_user::device_number;

/// Slots of the PCI bus beside the host bridge, less those for one device each of the other kinds.
const DEVICE_COUNT_MAX: usize = 24;
/// Addresses below are the hypervisor's and the host's (vsock(7)).
const VSOCK_CID_MIN: u32 = 3;
/// Named ports: enough for every agent that a guest may have.
const PORT_COUNT_MAX: usize = 16;
/// Bytes of a port's name. Our choice.
const PORT_NAME_BYTES_MAX: usize = 64;
/// Most virtqueues of a disk. Our choice.
pub const QUEUE_COUNT_MAX: u16 = 16;
/// Most pairs of queues of a network card, as PVE has it.
const NET_QUEUE_PAIRS_MAX: u16 = 64;
/// Highest SCSI target that OVMF looks at (`PcdVirtioScsiMaxTargetLimit`).
const BOOT_TARGET_MAX: u8 = 31;
/// Bytes of a disk's serial number. VIRTIO 1.2 §5.2.6.
const SERIAL_BYTES_MAX: usize = 20;
/// Bytes of an interface's name (`IFNAMSIZ`, less its zero).
const TAP_BYTES_MAX: usize = 15;
/// Most memory: what addresses of 52 bits reach, the widest that there are (SDM vol. 3A §4.1.4). No host has that much;
/// it keeps sums of sizes and addresses within 64 bits.
const MEMORY_MIB_MAX: u64 = 1 << (52 - 20);
/// Smallest and largest MTU of an Ethernet card that virtio-net allows. VIRTIO 1.2 §5.1.4.1.
const MTU_MIN: u16 = 68;

/// What is wrong with a spec, in one sentence.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct SpecError(pub String);

fn refuse<T>(text: impl Into<String>) -> Result<T, SpecError> {
    Err(SpecError(text.into()))
}

/// Names that a disk or card cannot have, since other functions have them.
const FUNCTIONS: &[&str] = &[
    "scsi",
    "console0",
    "rng0",
    "balloon0",
    "vsock0",
    "watchdog0",
    "panic0",
];
/// Bytes of a device's name. Our choice; a thread's name shows the first 15.
const ID_BYTES_MAX: usize = 31;

/// The same machine with all that it leaves open: names of disks and cards, numbers on the SCSI host.
pub fn settle(spec: &MachineSpec) -> Result<MachineSpec, SpecError> {
    let mut settled = spec.clone();
    name("disk", settled.disks.iter_mut().map(|disk| &mut disk.id));
    name("net", settled.nets.iter_mut().map(|net| &mut net.id));
    for (disk, number) in settled.disks.iter_mut().zip(targets(spec)?) {
        disk.target = number.or(disk.target);
    }
    Ok(settled)
}

/// Gives those that have no name the lowest free ones.
fn name<'a>(kind: &str, ids: impl Iterator<Item = &'a mut Option<String>>) {
    let ids: Vec<_> = ids.collect();
    let taken: BTreeSet<String> = ids.iter().filter_map(|id| (**id).clone()).collect();
    let mut free = (0..)
        .map(|number: usize| format!("{kind}{number}"))
        .filter(|id| !taken.contains(id));
    for id in ids {
        if id.is_none() {
            *id = free.next();
        }
    }
}

/// Name of a device of a spec that is settled.
pub fn id_of(id: &Option<String>) -> &str {
    id.as_deref().expect("the spec is settled")
}

/// The disk that the machine boots from, of those that it is started with: the first of firmware's order; without one,
/// the first. Never a drive, whose disc may be what an installation begins with.
pub fn boot_disk(spec: &MachineSpec) -> Option<String> {
    let disks = || spec.disks.iter().filter(|disk| disk.bus != DiskBus::Cdrom);
    let by_index = disks().filter(|disk| disk.boot_index.is_some());
    let by_index = by_index.min_by_key(|disk| disk.boot_index);
    by_index.or_else(|| disks().next())?.id.clone()
}

/// Whether a machine can be built from this, as far as this process can see.
pub fn spec(spec: &MachineSpec) -> Result<(), SpecError> {
    shape(spec)?;
    twice(spec)?;
    match &spec.boot {
        BootSpec::Kernel(boot) => {
            is_file("kernel", &boot.image)?;
            let initrd = boot.initrd.as_deref();
            initrd.map_or(Ok(()), |initrd| is_file("initrd", initrd))?;
        }
        BootSpec::Firmware(boot) => firmware(boot)?,
    }
    spec.disks.iter().try_for_each(disk_files)
}

/// The same without a look at any file.
pub fn shape(spec: &MachineSpec) -> Result<(), SpecError> {
    if spec.cpu_count == 0 {
        return refuse("0 vCPUs: a machine has 1 to 255");
    }
    if let Err(error) = model::wanted(&spec.cpu, Vendor::Intel) {
        return refuse(error.to_string());
    }
    if spec.cpu.hidden && spec.profile == Profile::Micro {
        return refuse("a hidden KVM needs the board pc: the board micro has no clock but KVM's");
    }
    if spec.memory_mib == 0 {
        return refuse("0 MiB of memory: a machine needs at least 1");
    }
    let page_mib = spec.services.memory_backing.page_mib();
    if !spec.memory_mib.is_multiple_of(page_mib) {
        return refuse(format!(
            "{} MiB of memory are not whole huge pages of {page_mib} MiB",
            spec.memory_mib
        ));
    }
    if spec.memory_mib > MEMORY_MIB_MAX {
        return refuse(format!("{} MiB of memory are too much", spec.memory_mib));
    }
    let on_scsi = spec.disks.iter().filter(|disk| disk.bus != DiskBus::Blk);
    let on_scsi = on_scsi.count();
    if on_scsi > usize::from(TARGET_MAX) + 1 {
        return refuse(format!(
            "{on_scsi} disks on the SCSI host: it has {} targets",
            usize::from(TARGET_MAX) + 1
        ));
    }
    let disks = spec.disks.len() - on_scsi;
    let served = spec.services.filesystems.len() + spec.services.vhost_user.len();
    let count = disks + usize::from(on_scsi > 0) + spec.nets.len() + served;
    if count > DEVICE_COUNT_MAX {
        return refuse(format!(
            "{count} disks, SCSI hosts, network cards, file systems and vhost-user devices: a machine has {DEVICE_COUNT_MAX} slots for them"
        ));
    }
    if spec.serial == ConsoleSpec::Stdio && spec.console == Some(ConsoleSpec::Stdio) {
        return refuse("the serial port and the virtio console cannot both be on stdio");
    }
    services(spec)?;
    vhost_user::check(spec)?;
    match &spec.boot {
        BootSpec::Kernel(boot) => kernel(boot, spec.services.memory_backing)?,
        BootSpec::Firmware(_) if spec.profile != Profile::Pc => {
            return refuse("firmware needs the board pc: leave out --profile, or say pc");
        }
        BootSpec::Firmware(_) => {}
    }
    spec.identity
        .uuid
        .as_deref()
        .map_or(Ok(()), |text| uuid(text).map(drop))?;
    generation_id(spec)?;
    ids(spec)?;
    spec.disks.iter().try_for_each(disk)?;
    targets(spec).map(drop)?;
    spec.nets.iter().try_for_each(net)
}

fn services(spec: &MachineSpec) -> Result<(), SpecError> {
    let ports = &spec.services.ports;
    if ports.len() > PORT_COUNT_MAX {
        let count = ports.len();
        return refuse(format!("{count} ports: at most {PORT_COUNT_MAX}"));
    }
    for (index, port) in ports.iter().enumerate() {
        let name = &port.name;
        let odd = |byte: u8| byte == b'/' || !byte.is_ascii_graphic();
        if name.is_empty() || name.len() > PORT_NAME_BYTES_MAX || name.bytes().any(odd) {
            return refuse(format!(
                "port {name:?}: a name has 1 to {PORT_NAME_BYTES_MAX} characters, no space or slash"
            ));
        }
        if ports[..index].iter().any(|other| other.name == *name) {
            return refuse(format!("port {name}: there are two of that name"));
        }
    }
    if let Some(vsock) = &spec.services.vsock {
        let path = vsock.path.display();
        if vsock.cid < VSOCK_CID_MIN || vsock.cid == u32::MAX {
            return refuse(format!("vsock cid {}: at least {VSOCK_CID_MIN}", vsock.cid));
        }
        if vsock.vhost && !vsock.path.as_os_str().is_empty() {
            return refuse(format!(
                "vsock socket {path}: the kernel has none: leave out either it or vhost"
            ));
        }
        if !vsock.vhost && !vsock.path.is_absolute() {
            return refuse(format!("vsock socket {path}: must be an absolute path"));
        }
    }
    let balloon = spec.services.balloon.as_ref();
    match balloon.and_then(|balloon| balloon.target_mib) {
        Some(target) if target == 0 || target > spec.memory_mib => refuse(format!(
            "balloon target of {target} MiB: the guest keeps 1 to {} MiB",
            spec.memory_mib
        )),
        _ => Ok(()),
    }
}

fn kernel(kernel: &KernelSpec, memory: MemoryBacking) -> Result<(), SpecError> {
    if kernel.cmdline.len() as u64 >= layout::CMDLINE_BYTES_MAX {
        return refuse("kernel command line longer than 65535 bytes");
    }
    if kernel.shared && memory != MemoryBacking::Anonymous {
        return refuse(
            "a kernel is shared in memory of the machine's own: leave out --share-kernel (kernel.shared), or shared and \
             hugepages= of --memory",
        );
    }
    Ok(())
}

fn firmware(firmware: &FirmwareSpec) -> Result<(), SpecError> {
    for (what, key, path) in [
        ("firmware code", "code", &firmware.code),
        ("firmware variables", "vars", &firmware.vars),
    ] {
        if path.starts_with(flash::PACKAGED) && !path.exists() {
            return refuse(format!(
                "{what} {}: does not exist: install the package ovmf, or name another file with --firmware {key}=",
                path.display()
            ));
        }
        is_file(what, path)?;
        // Opening a FIFO would wait for its other end.
        if fs::metadata(path).is_ok_and(|found| found.file_type().is_fifo()) {
            return refuse(format!("{what} {}: is not a file", path.display()));
        }
    }
    if needs_management_mode(&firmware.code) {
        return refuse(format!(
            "firmware code {}: needs system management mode, which there is not: OVMF_CODE_4M.fd does Secure Boot \
             without it, with the keys in a copy of OVMF_VARS_4M.ms.fd",
            firmware.code.display()
        ));
    }
    if firmware.vars.starts_with(flash::PACKAGED) {
        return refuse(format!(
            "firmware variables {}: is the package's template, which all guests start from: copy it, and give the copy",
            firmware.vars.display()
        ));
    }
    Ok(())
}

/// Whether that is one of the package's images that stop at once without SMM. Only the names tell: the code is
/// compressed. `.ms` and `.snakeoil` are links to `.secboot` (`/usr/share/doc/ovmf/README.Debian`).
fn needs_management_mode(code: &Path) -> bool {
    let name = code.file_name().and_then(|name| name.to_str());
    name.and_then(|name| name.strip_prefix("OVMF_CODE"))
        .is_some_and(|rest| {
            let mut parts = rest.split('.');
            parts.any(|part| matches!(part, "secboot" | "ms" | "snakeoil"))
        })
}

fn is_file(what: &str, path: &Path) -> Result<(), SpecError> {
    match fs::metadata(path) {
        Ok(found) if found.is_dir() => refuse(format!("{what} {}: is a directory", path.display())),
        Ok(_) => Ok(()),
        Err(error) => refuse(format!("{what} {}: {error}", path.display())),
    }
}

/// The target number of each disk on the SCSI host, in the spec's order; `None` for those that are not there.
pub fn targets(spec: &MachineSpec) -> Result<Vec<Option<u8>>, SpecError> {
    let mut taken: BTreeSet<u8> = BTreeSet::new();
    for number in spec.disks.iter().filter_map(|disk| disk.target) {
        if number > TARGET_MAX || !taken.insert(number) {
            return refuse(format!(
                "SCSI target {number}: each number from 0 to {TARGET_MAX} at most once"
            ));
        }
    }
    let number = |disk: &DiskSpec| match (disk.bus, disk.target) {
        (DiskBus::Blk, _) => None,
        (_, Some(number)) => Some(number),
        (_, None) => {
            let free = (0..=TARGET_MAX).find(|number| !taken.contains(number));
            let free = free.expect("a machine has fewer disks than a host has targets");
            taken.insert(free);
            Some(free)
        }
    };
    let numbers: Vec<Option<u8>> = spec.disks.iter().map(number).collect();
    for (disk, number) in spec.disks.iter().zip(&numbers) {
        if disk.boot_index.is_some()
            && let Some(number) = number.filter(|number| *number > BOOT_TARGET_MAX)
        {
            return refuse(format!(
                "disk {}: firmware looks at SCSI targets 0 to {BOOT_TARGET_MAX} only, and this is {number}: leave out \
                 its place in the boot order, or give it a lower target",
                disk.path.display()
            ));
        }
    }
    Ok(numbers)
}

/// One image behind two disks, of which one is written: the image's lock would tell of another process.
fn twice(spec: &MachineSpec) -> Result<(), SpecError> {
    let files = spec
        .disks
        .iter()
        .filter(|disk| disk.format != DiskFormat::Nbd && !disk.path.as_os_str().is_empty());
    let mut readonly_by_path = BTreeMap::new();
    for disk in files {
        let readonly = disk.readonly || disk.bus == DiskBus::Cdrom;
        let other = readonly_by_path.insert(&disk.path, readonly);
        if other.is_some_and(|other| !(other && readonly)) {
            return refuse(format!(
                "disk {}: it is there twice: only what is read-only can be behind two disks",
                disk.path.display()
            ));
        }
    }
    Ok(())
}

fn ids(spec: &MachineSpec) -> Result<(), SpecError> {
    let disks = spec.disks.iter().filter_map(|disk| disk.id.as_deref());
    let ids = disks.chain(spec.nets.iter().filter_map(|net| net.id.as_deref()));
    let mut taken = BTreeSet::new();
    for id in ids {
        let odd = |byte: u8| !(byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        let starts = id.starts_with(|first: char| first.is_ascii_lowercase());
        if !starts || id.len() > ID_BYTES_MAX || id.bytes().any(odd) {
            return refuse(format!(
                "device {id:?}: a name has 1 to {ID_BYTES_MAX} lower-case letters, digits and dashes, a letter first"
            ));
        }
        let filesystem = id.strip_prefix("fs");
        let filesystem = filesystem.is_some_and(|rest| rest.parse::<usize>().is_ok());
        if FUNCTIONS.contains(&id) || filesystem || id.starts_with("user-") {
            return refuse(format!(
                "device {id}: the machine's own device has that name"
            ));
        }
        if !taken.insert(id) {
            return refuse(format!("device {id}: there are two of that name"));
        }
    }
    Ok(())
}

fn disk(disk: &DiskSpec) -> Result<(), SpecError> {
    let path = disk.path.display();
    let drive = disk.bus == DiskBus::Cdrom;
    if !drive && disk.path.as_os_str().is_empty() {
        return refuse("a disk without a path: only a cdrom may have no disc");
    }
    if drive && (disk.format != DiskFormat::Raw || !disk.backing.is_empty()) {
        return refuse(format!("cdrom {path}: a disc is a raw image"));
    }
    if disk.format == DiskFormat::Nbd
        && (!disk.backing.is_empty()
            || disk.changes.is_some()
            || disk.cache != CacheMode::Writeback)
    {
        return refuse(format!(
            "disk {path}: backing images, recorded changes and the cache of an NBD disk are its server's"
        ));
    }
    if disk
        .backing
        .iter()
        .any(|image| image.format == DiskFormat::Nbd)
    {
        return refuse(format!("disk {path}: the images behind it are files"));
    }
    if drive && disk.limits != DiskLimits::default() {
        return refuse(format!("cdrom {path}: only disks have limits"));
    }
    if let Err(SpecError(what)) = disk_limits(&disk.limits) {
        return refuse(format!("disk {path}: {what}"));
    }
    if disk.changes.is_some() && (drive || disk.readonly) {
        return refuse(format!(
            "disk {path}: changes are recorded of disks that the guest can write to"
        ));
    }
    if disk.changes.as_ref() == Some(&disk.path) {
        return refuse(format!("disk {path}: its changes need a file of their own"));
    }
    if disk.bus == DiskBus::Blk && disk.target.is_some() {
        return refuse(format!(
            "disk {path}: a target number is for bus scsi or cdrom"
        ));
    }
    if disk.bus != DiskBus::Blk && disk.queue_count.is_some() {
        return refuse(format!(
            "disk {path}: queues are the SCSI host's, one a vCPU"
        ));
    }
    if let Some(serial) = &disk.serial
        && (serial.len() > SERIAL_BYTES_MAX || !serial.bytes().all(|byte| byte.is_ascii_graphic()))
    {
        return refuse(format!(
            "disk {path}: serial number {serial:?}: at most {SERIAL_BYTES_MAX} printable ASCII characters"
        ));
    }
    match disk.queue_count {
        Some(count) if !(1..=QUEUE_COUNT_MAX).contains(&count) => refuse(format!(
            "disk {path}: {count} queues: 1 to {QUEUE_COUNT_MAX}"
        )),
        _ => Ok(()),
    }
}

fn disk_files(disk: &DiskSpec) -> Result<(), SpecError> {
    let images = disk.backing.iter().map(|image| &image.path);
    let is_empty_drive = disk.bus == DiskBus::Cdrom && disk.path.as_os_str().is_empty();
    let has_image = !is_empty_drive && disk.format != DiskFormat::Nbd;
    let own = has_image.then_some(&disk.path);
    for image in images.chain(own) {
        is_file("disk", image)?;
        let kind = fs::metadata(image).map(|found| found.file_type());
        if kind.is_ok_and(|kind| !kind.is_file() && !kind.is_block_device()) {
            let image = image.display();
            return refuse(format!("disk {image}: neither a file nor a block device"));
        }
    }
    Ok(())
}

fn net(net: &NetSpec) -> Result<(), SpecError> {
    let end = match &net.vhost_user {
        None => tap(net)?,
        Some(socket) => backend(net, &socket.path)?,
    };
    if let Some(mtu) = net.mtu
        && mtu < MTU_MIN
    {
        return refuse(format!("{end}: MTU {mtu}: at least {MTU_MIN}"));
    }
    if let Some(count) = net.queue_pairs
        && !(1..=NET_QUEUE_PAIRS_MAX).contains(&count)
    {
        return refuse(format!(
            "{end}: {count} pairs of queues: 1 to {NET_QUEUE_PAIRS_MAX}"
        ));
    }
    net.mac
        .as_deref()
        .map_or(Ok(()), |text| mac(text).map(drop))
}

/// How a card's host end is called in what is refused of it.
fn backend(net: &NetSpec, path: &Path) -> Result<String, SpecError> {
    let end = format!("vhost-user {}", path.display());
    if !net.tap.is_empty() {
        return refuse(format!("{end}: a card has it or a tap"));
    }
    if net.limits != NetLimits::default() || net.vhost == VhostNet::On {
        return refuse(format!(
            "{end}: another process moves the packets: leave out rates and vhost=on"
        ));
    }
    Ok(end)
}

fn tap(net: &NetSpec) -> Result<String, SpecError> {
    let tap = &net.tap;
    let odd = |byte: u8| byte == b'/' || byte == b'%' || !byte.is_ascii_graphic();
    if tap.is_empty() || tap.len() > TAP_BYTES_MAX || tap.bytes().any(odd) {
        return refuse(format!(
            "tap {tap:?}: an interface's name has 1 to {TAP_BYTES_MAX} characters, no space, slash or percent"
        ));
    }
    if net.vhost == VhostNet::On && net.limits != NetLimits::default() {
        return refuse(format!(
            "tap {tap}: vhost-net limits no rate: leave out either the limit or vhost=on"
        ));
    }
    Ok(format!("tap {tap}"))
}

/// The generation id as it is in memory, where a UUID's first three fields are little-endian; `None` for a random one.
pub fn generation_id(spec: &MachineSpec) -> Result<Option<[u8; 16]>, SpecError> {
    let text = spec.generation_id.as_deref();
    let text = text.filter(|text| *text != "1");
    let bytes = text.map(uuid).transpose()?;
    Ok(bytes.map(|[a, b, c, d, e, f, g, h, rest @ ..]| {
        let [i, j, k, l, m, n, o, p] = rest;
        [d, c, b, a, f, e, h, g, i, j, k, l, m, n, o, p]
    }))
}

/// Parses a UUID as text: 32 hexadecimal digits, with or without hyphens between its five groups.
pub fn uuid(text: &str) -> Result<[u8; 16], SpecError> {
    let digits: Vec<u8> = text.bytes().filter(|byte| *byte != b'-').collect();
    let parsed: Option<Vec<u8>> = digits
        .chunks(2)
        .map(|pair| {
            let hexadecimal = pair.len() == 2 && pair.iter().all(u8::is_ascii_hexdigit);
            let text = std::str::from_utf8(pair).ok().filter(|_| hexadecimal)?;
            u8::from_str_radix(text, 16).ok()
        })
        .collect();
    let bytes = parsed.and_then(|bytes| <[u8; 16]>::try_from(bytes).ok());
    bytes.ok_or_else(|| SpecError(format!("UUID {text:?}: expected 32 hexadecimal digits")))
}

/// Parses `aa:bb:cc:dd:ee:ff`, the address of one card.
pub fn mac(text: &str) -> Result<[u8; 6], SpecError> {
    let octets: Vec<Option<u8>> = text
        .split(':')
        .map(|part| match part.as_bytes() {
            [high, low] if high.is_ascii_hexdigit() && low.is_ascii_hexdigit() => {
                u8::from_str_radix(part, 16).ok()
            }
            _ => None,
        })
        .collect();
    let [Some(a), Some(b), Some(c), Some(d), Some(e), Some(f)] = octets[..] else {
        return refuse(format!(
            "MAC address {text:?}: expected six hexadecimal octets, as in 52:54:00:12:34:56"
        ));
    };
    if a & 1 == 1 {
        return refuse(format!(
            "MAC address {text}: is a group address, the first octet must be even"
        ));
    }
    Ok([a, b, c, d, e, f])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(change: impl FnOnce(&mut serde_json::Value), expected: &str) {
        let mut value = serde_json::json!({
            "name": "m", "cpu_count": 1, "memory_mib": 64, "boot": {"kernel": {"image": "/dev/null"}},
        });
        change(&mut value);
        let machine = serde_json::from_value(value).unwrap();
        let answer = spec(&machine).map_or_else(|error| error.0, |()| "ok".to_owned());
        assert_eq!(answer, expected);
    }

    /// Their bytes, or where they would end behind the hole, are no number of 64 bits.
    #[test]
    fn sizes_that_wrap_are_refused() {
        for mib in [MEMORY_MIB_MAX + 1, u64::MAX >> 20, 1 << 44, u64::MAX] {
            let expected = format!("{mib} MiB of memory are too much");
            check(|m| m["memory_mib"] = mib.into(), &expected);
        }
        check(|m| m["memory_mib"] = MEMORY_MIB_MAX.into(), "ok");
    }

    #[test]
    fn impossible_machines_are_refused_in_words() {
        check(|_| {}, "ok");
        check(
            |m| m["cpu_count"] = 0.into(),
            "0 vCPUs: a machine has 1 to 255",
        );
        check(
            |m| m["memory_mib"] = 0.into(),
            "0 MiB of memory: a machine needs at least 1",
        );
        check(
            |m| m["boot"]["kernel"]["image"] = "/nonexistent".into(),
            "kernel /nonexistent: No such file or directory (os error 2)",
        );
        check(
            |m| m["boot"]["kernel"]["initrd"] = "/tmp".into(),
            "initrd /tmp: is a directory",
        );
        check(
            |m| m["disks"] = serde_json::json!([{"path": "/", "format": "raw"}]),
            "disk /: is a directory",
        );
        check(
            |m| m["disks"] = serde_json::json!([{"path": "/dev/null", "format": "raw"}]),
            "disk /dev/null: neither a file nor a block device",
        );
        check(
            |m| {
                m["serial"] = "stdio".into();
                m["console"] = "stdio".into();
            },
            "the serial port and the virtio console cannot both be on stdio",
        );
        check(
            |m| m["nets"] = serde_json::json!([{"tap": "a name too long!"}]),
            "tap \"a name too long!\": an interface's name has 1 to 15 characters, no space, slash or percent",
        );
    }

    #[test]
    fn impossible_services_are_refused_in_words() {
        let port = serde_json::json!({"name": "a", "path": "/a"});
        check(
            |m| m["services"] = serde_json::json!({"ports": [port, port]}),
            "port a: there are two of that name",
        );
        check(
            |m| m["services"] = serde_json::json!({"ports": [{"name": "a/b", "path": "/a"}]}),
            "port \"a/b\": a name has 1 to 64 characters, no space or slash",
        );
        check(
            |m| m["services"] = serde_json::json!({"balloon": {"target_mib": 65}}),
            "balloon target of 65 MiB: the guest keeps 1 to 64 MiB",
        );
        check(
            |m| {
                m["memory_mib"] = 63.into();
                m["services"] = serde_json::json!({"memory_backing": "hugepages-2m"});
            },
            "63 MiB of memory are not whole huge pages of 2 MiB",
        );
        check(
            |m| {
                m["boot"]["kernel"]["shared"] = true.into();
                m["services"] = serde_json::json!({"memory_backing": "shared"});
            },
            "a kernel is shared in memory of the machine's own: leave out --share-kernel (kernel.shared), or shared and \
             hugepages= of --memory",
        );
    }

    #[test]
    fn a_disk_is_behind_one_device() {
        let disks = |first: bool, second: bool| {
            move |m: &mut serde_json::Value| {
                let one = |readonly| serde_json::json!({"path": "/a", "format": "raw", "readonly": readonly});
                m["disks"] = serde_json::json!([one(first), one(second)]);
            }
        };
        let said = "disk /a: it is there twice: only what is read-only can be behind two disks";
        check(disks(false, false), said);
        check(disks(true, false), said);
        // It is not there, but it is not refused for being there twice.
        check(
            disks(true, true),
            "disk /a: No such file or directory (os error 2)",
        );
    }

    #[test]
    fn impossible_cards_are_refused_in_words() {
        check(
            |m| m["nets"] = serde_json::json!([{"tap": "t", "queue_pairs": 65}]),
            "tap t: 65 pairs of queues: 1 to 64",
        );
        check(
            |m| {
                let limits = serde_json::json!({"send_bytes_per_second": 1});
                m["nets"] = serde_json::json!([{"tap": "t", "vhost": "on", "limits": limits}]);
            },
            "tap t: vhost-net limits no rate: leave out either the limit or vhost=on",
        );
        check(
            |m| m["nets"] = serde_json::json!([{"tap": "t", "mac": "01:00:00:00:00:00"}]),
            "MAC address 01:00:00:00:00:00: is a group address, the first octet must be even",
        );
    }

    #[test]
    fn firmware_that_is_not_there_is_named_with_its_package() {
        let firmware = |code: &str, vars: &str| {
            let boot = serde_json::json!({"firmware": {"code": code, "vars": vars}});
            move |m: &mut serde_json::Value| {
                m["boot"] = boot;
                m["profile"] = "pc".into();
            }
        };
        check(
            firmware("/usr/share/OVMF/none.fd", "/dev/null"),
            "firmware code /usr/share/OVMF/none.fd: does not exist: install the package ovmf, or name another file \
             with --firmware code=",
        );
        check(
            firmware("/dev/null", "/nonexistent"),
            "firmware variables /nonexistent: No such file or directory (os error 2)",
        );
        check(
            |m| {
                firmware("/dev/null", "/dev/null")(m);
                m["profile"] = "micro".into();
            },
            "firmware needs the board pc: leave out --profile, or say pc",
        );
        let directory = tempfile::tempdir().unwrap();
        for (name, refused) in [
            ("OVMF_CODE_4M.secboot.fd", true),
            ("OVMF_CODE.ms.fd", true),
            ("OVMF_CODE_4M.fd", false),
        ] {
            let code = directory.path().join(name);
            fs::write(&code, "").unwrap();
            let said = code.display();
            let expected = format!(
                "firmware code {said}: needs system management mode, which there is not: OVMF_CODE_4M.fd does Secure \
                 Boot without it, with the keys in a copy of OVMF_VARS_4M.ms.fd"
            );
            let expected = if refused { expected.as_str() } else { "ok" };
            check(firmware(&code.display().to_string(), "/dev/null"), expected);
        }
    }

    #[test]
    fn a_generation_id_is_a_uuid_as_windows_has_it_in_memory() {
        let mut spec = MachineSpec::new(BootSpec::Kernel(KernelSpec {
            image: "/dev/null".into(),
            initrd: None,
            cmdline: String::new(),
            shared: false,
        }));
        assert_eq!(generation_id(&spec), Ok(None));
        spec.generation_id = Some("1".to_owned());
        assert_eq!(generation_id(&spec), Ok(None));
        spec.generation_id = Some("00112233-4455-6677-8899-aabbccddeeff".to_owned());
        let bytes = generation_id(&spec).unwrap().unwrap();
        assert_eq!(
            bytes[..9],
            [0x33, 0x22, 0x11, 0, 0x55, 0x44, 0x77, 0x66, 0x88]
        );
        spec.generation_id = Some("2".to_owned());
        assert!(super::spec(&spec).unwrap_err().0.starts_with("UUID \"2\""));
    }

    #[test]
    fn uuids_are_sixteen_bytes() {
        let bytes = uuid("00112233-4455-6677-8899-aabbccddeeff").unwrap();
        assert_eq!((bytes[1], bytes[15]), (0x11, 0xff));
        for text in [
            "",
            "0011",
            "00112233-4455-6677-8899-aabbccddeefg",
            "é0112233445566778899aabbccddeef",
        ] {
            assert!(uuid(text).is_err(), "{text}");
        }
    }

    #[test]
    fn disks_of_the_scsi_host_have_numbers() {
        let with = |disks: serde_json::Value| {
            move |m: &mut serde_json::Value| {
                m["disks"] = disks;
            }
        };
        let drive = serde_json::json!({"path": "", "format": "raw", "bus": "cdrom"});
        check(with(serde_json::json!([drive, drive])), "ok");
        let numbered = |number: u8| serde_json::json!({"path": "", "format": "raw", "bus": "cdrom", "target": number});
        check(
            with(serde_json::json!([numbered(3), numbered(3)])),
            "SCSI target 3: each number from 0 to 254 at most once",
        );
        check(
            with(serde_json::json!([numbered(255)])),
            "SCSI target 255: each number from 0 to 254 at most once",
        );
        check(
            with(serde_json::json!([{"path": "/dev/null", "format": "raw", "target": 1}])),
            "disk /dev/null: a target number is for bus scsi or cdrom",
        );
        let first = |target: u8| {
            let mut drive = numbered(target);
            drive["boot_index"] = 0.into();
            with(serde_json::json!([drive]))
        };
        check(first(31), "ok");
        check(
            first(32),
            "disk : firmware looks at SCSI targets 0 to 31 only, and this is 32: leave out its place in the boot \
             order, or give it a lower target",
        );
        check(
            with(serde_json::json!([{"path": "", "format": "raw"}])),
            "a disk without a path: only a cdrom may have no disc",
        );
        let spec: MachineSpec = serde_json::from_value(serde_json::json!({
            "name": "m", "cpu_count": 1, "memory_mib": 64, "boot": {"kernel": {"image": "/dev/null"}},
            "disks": [drive, {"path": "/x", "format": "raw"}, numbered(0), drive],
        }))
        .unwrap();
        let numbers = targets(&spec).unwrap();
        assert_eq!(numbers, [Some(1), None, Some(0), Some(2)]);
    }

    #[test]
    fn mac_addresses_are_six_octets() {
        assert_eq!(mac("52:54:00:12:34:56").unwrap()[5], 0x56);
        for text in [
            "",
            "52:54:00:12:34",
            "52:54:00:12:34:56:78",
            "52:54:0:12:34:5g",
            "+2:54:00:12:34:56",
        ] {
            assert!(mac(text).is_err(), "{text}");
        }
    }
}
