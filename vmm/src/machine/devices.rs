// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One row a kind of device: from its part of the spec to what the host has for it, and to the device on its bus.
//! Called by `opened`, then by `assembly`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use atoll_devices::console::{Console, ConsoleBackend, ConsoleEnd};
use atoll_devices::platform::Serial;
use atoll_devices::virtio::net::{Net, NetOptions, Rate};
use atoll_devices::virtio::rng::Rng;
use atoll_vmm_protocol::spec::{ConsoleSpec, MachineSpec, NetLimits, NetSpec};

use super::assembly::{Assembly, BuildError};
use super::backplane::Backplane;
use super::belongings;
use super::disks;
use super::generation;
use super::opened::{Opened, WAS_OPENED};
use super::parts::Card;
use super::services;
use crate::fw_cfg::{BootEntry, BootKind};
use crate::resources::CardEnd;
use crate::{check, layout, socket};

/// One kind of device, in two acts (see `opened`).
pub(super) struct DeviceKind {
    /// Before the sandbox: opens what the host has for all devices of the kind. Makes no thread.
    pub(super) open: fn(&MachineSpec, &mut Opened) -> Result<(), BuildError>,
    /// In the sandbox: puts the devices on their bus, with what was opened. Opens no path.
    pub(super) add: fn(&mut Assembly<'_>) -> Result<(), BuildError>,
}

/// Every kind of device. The order is that of the PCI slots, which a guest sees: disks and cards first, so that
/// their slots depend on nothing but the spec's own order.
pub(super) const KINDS: &[DeviceKind] = &[
    DeviceKind {
        open: disks::open,
        add: disks::add,
    },
    DeviceKind {
        open: open_nets,
        add: nets,
    },
    DeviceKind {
        open: services::open_virtio_console,
        add: services::console,
    },
    DeviceKind {
        open: |_, _| Ok(()),
        add: rng,
    },
    DeviceKind {
        open: |_, _| Ok(()),
        add: services::balloon,
    },
    DeviceKind {
        open: services::open_vsock,
        add: services::vsock,
    },
    DeviceKind {
        open: services::open_filesystems,
        add: services::filesystems,
    },
    DeviceKind {
        open: services::open_vhost_user,
        add: services::vhost_user,
    },
    DeviceKind {
        open: |_, _| Ok(()),
        add: services::watchdog,
    },
    DeviceKind {
        open: |_, _| Ok(()),
        add: services::panic,
    },
    DeviceKind {
        open: open_serial,
        add: serial,
    },
    DeviceKind {
        open: |_, _| Ok(()),
        add: generation::add,
    },
];

fn open_nets(spec: &MachineSpec, opened: &mut Opened) -> Result<(), BuildError> {
    for net in &spec.nets {
        if let Some(socket) = &net.vhost_user {
            opened.keep_for(socket);
        }
        let name = belongings::card(check::id_of(&net.id));
        if opened.is_inherited() {
            let taps = opened.obtain(&name, || Ok::<_, BuildError>(Vec::new()))?;
            // No part of what comes along: the other's is bound to its memory.
            let kernel = CardEnd::kernel(net)?;
            opened.awaited(|awaited| awaited.cards.push((taps, kernel)));
            continue;
        }
        let mut own = None;
        opened.obtain(&name, || {
            let end = CardEnd::open(net)?;
            let taps = end.taps().map_err(BuildError::device(name.clone()))?;
            own = Some(end);
            Ok::<_, BuildError>(taps)
        })?;
        opened.nets.extend(own);
    }
    Ok(())
}

fn nets(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    if assembly.opened.is_inherited() {
        return Ok(());
    }
    for net in &assembly.spec.nets {
        let end = assembly.opened.nets.pop_front().expect(WAS_OPENED);
        let card = card(&mut assembly.backplane, net, end)?;
        assembly.nets.push(card);
    }
    Ok(())
}

/// A card on a slot of its own.
pub(super) fn card(
    backplane: &mut Backplane,
    net: &NetSpec,
    end: CardEnd,
) -> Result<Card, BuildError> {
    let mac = match &net.mac {
        Some(text) => check::mac(text).map_err(BuildError::device("network card"))?,
        None => random_mac().map_err(BuildError::device("network card"))?,
    };
    let id = check::id_of(&net.id);
    let device = Net::new(NetOptions {
        name: id.to_owned(),
        host: end.into_host(id, net),
        mac,
        mtu: net.mtu,
    });
    let end = match &net.vhost_user {
        Some(socket) => format!("{id}: vhost-user {}", socket.path.display()),
        None => format!("tap {}", net.tap),
    };
    let device = Arc::new(device.map_err(BuildError::device(end))?);
    limit(&device, &net.limits);
    device.set_link(!net.link_down);
    let function = backplane.add(id, device.clone())?;
    Ok(Card { function, device })
}

/// What the spec wants to be booted from, with its place on the bus.
pub(super) fn boot_order(
    spec: &MachineSpec,
    backplane: &Backplane,
) -> Result<Vec<BootEntry>, BuildError> {
    let targets = check::targets(spec).map_err(BuildError::device(disks::HOST))?;
    let disks = spec.disks.iter().zip(targets);
    let disks = disks.map(|(disk, target)| match target {
        Some(number) => (disks::HOST, disk.boot_index, BootKind::Scsi(number)),
        None => (check::id_of(&disk.id), disk.boot_index, BootKind::Disk),
    });
    let nets = spec.nets.iter();
    let nets = nets.map(|net| (check::id_of(&net.id), net.boot_index, BootKind::Net));
    let entry = |(name, index, kind): (&str, Option<u16>, BootKind)| {
        let (index, slot) = index.zip(backplane.place_of(name))?;
        Some(BootEntry { index, slot, kind })
    };
    Ok(disks.chain(nets).filter_map(entry).collect())
}

/// Holds a card to its spec's rates, from now on.
pub(super) fn limit(card: &Net, limits: &NetLimits) {
    // In a spec 0 is none.
    let rate = |bytes_per_second, burst_bytes| {
        (bytes_per_second > 0).then_some(Rate {
            bytes_per_second,
            burst_bytes,
        })
    };
    card.set_limits(
        rate(limits.receive_bytes_per_second, limits.receive_burst_bytes),
        rate(limits.send_bytes_per_second, limits.send_burst_bytes),
    );
}

/// A locally administered address of one card: bit 1 of the first octet set, bit 0 clear.
fn random_mac() -> io::Result<[u8; 6]> {
    let mut mac = [0; 6];
    rustix::rand::getrandom(&mut mac, rustix::rand::GetRandomFlags::empty())?;
    mac[0] = (mac[0] | 2) & !1;
    Ok(mac)
}

fn rng(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    if assembly.spec.rng {
        assembly.backplane.add("rng0", Arc::new(Rng::new()))?;
    }
    Ok(())
}

fn open_serial(spec: &MachineSpec, opened: &mut Opened) -> Result<(), BuildError> {
    opened.serial = Some(open_console(opened, "serial console", &spec.serial)?);
    Ok(())
}

fn serial(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    let end = assembly.opened.serial.take().expect(WAS_OPENED);
    let console = Console::start(end).map_err(BuildError::device("serial console"))?;
    let irq = Arc::new(assembly.routes.pin(layout::SERIAL_GSI)?);
    let device = Serial::new(console.port(), irq);
    assembly.serial_path = path_of(&assembly.spec.serial, &console);
    assembly.port(
        "serial port",
        layout::SERIAL_PORT,
        layout::SERIAL_PORT_COUNT,
        device.clone(),
    );
    assembly.serial = Some(device);
    assembly.consoles.push(console);
    Ok(())
}

/// The end of a console, which is called `what`.
pub(super) fn open_console(
    opened: &mut Opened,
    what: &str,
    spec: &ConsoleSpec,
) -> Result<ConsoleEnd, BuildError> {
    let backend = match spec {
        ConsoleSpec::Null => ConsoleBackend::Null,
        ConsoleSpec::Stdio => ConsoleBackend::Stdio,
        ConsoleSpec::Pty => ConsoleBackend::Pty,
        ConsoleSpec::Socket(path) => ConsoleBackend::Socket(path.clone()),
    };
    open_end(opened, what, &backend)
}

/// The same for any backend.
pub(super) fn open_end(
    opened: &mut Opened,
    what: &str,
    backend: &ConsoleBackend,
) -> Result<ConsoleEnd, BuildError> {
    if *backend == ConsoleBackend::Null {
        return ConsoleEnd::open(backend).map_err(BuildError::device(what));
    }
    let open = || {
        if let ConsoleBackend::Socket(path) | ConsoleBackend::Channel(path) = backend {
            let device = format!("{what} {}", path.display());
            socket::remove_stale(path).map_err(BuildError::device(device))?;
        }
        let end = ConsoleEnd::open(backend).map_err(BuildError::device(what))?;
        Ok::<_, BuildError>(end.into_files())
    };
    let files = opened.obtain(what, open)?;
    let end = ConsoleEnd::take(files.into(), backend).map_err(BuildError::device(what))?;
    Ok(match opened.is_inherited() {
        true => end.deaf(),
        false => end,
    })
}

/// What `info` tells about a console: the path that a user opens.
pub(super) fn path_of(spec: &ConsoleSpec, console: &Console) -> Option<PathBuf> {
    match spec {
        ConsoleSpec::Socket(path) => Some(path.clone()),
        _ => console.pty_path().map(Path::to_owned),
    }
}
