// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One row a kind of device: from its part of the spec to the device on its bus. Called by `assembly`.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use atoll_devices::console::{Console, ConsoleBackend};
use atoll_devices::platform::Serial;
use atoll_devices::virtio::blk::{Blk, BlkOptions};
use atoll_devices::virtio::console::VirtioConsole;
use atoll_devices::virtio::net::{Net, NetOptions, Tap};
use atoll_devices::virtio::rng::Rng;
use atoll_disk::{OpenOptions, RawBackend};
use atoll_vmm_protocol::spec::{ConsoleSpec, DiskFormat};

use super::assembly::{Assembly, BuildError};
use super::parts::Card;
use crate::{check, layout, socket};

/// Adds one kind of device to the machine.
pub(super) type Step = fn(&mut Assembly<'_>) -> Result<(), BuildError>;

/// Every kind of device. The order is that of the PCI slots, which a guest sees: disks and cards first, so that
/// their slots depend on nothing but the spec's own order.
pub(super) const STEPS: &[Step] = &[disks, nets, console, rng, serial];

fn disks(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    for (index, disk) in assembly.spec.disks.iter().enumerate() {
        let DiskFormat::Raw = disk.format;
        let options = OpenOptions {
            read_only: disk.readonly,
            ..OpenOptions::default()
        };
        let backend = Arc::new(RawBackend::open(&disk.path, options)?);
        let queues = u16::from(assembly.spec.cpu_count).min(check::QUEUE_COUNT_MAX);
        let name = format!("blk{index}");
        let device = Arc::new(Blk::new(BlkOptions {
            name: name.clone(),
            backend,
            serial: disk
                .serial
                .clone()
                .unwrap_or_else(|| format!("disk{index}")),
            queue_count: disk.queue_count.unwrap_or(queues),
        }));
        let function = assembly.add(name, device)?;
        assembly.disks.push(function);
    }
    Ok(())
}

fn nets(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    for (index, net) in assembly.spec.nets.iter().enumerate() {
        let mac = match &net.mac {
            Some(text) => check::mac(text).map_err(BuildError::device("network card"))?,
            None => random_mac().map_err(BuildError::device("network card"))?,
        };
        let name = format!("net{index}");
        let device = Arc::new(Net::new(NetOptions {
            name: name.clone(),
            tap: Tap::open(&net.tap)?,
            mac,
            mtu: net.mtu,
        }));
        let function = assembly.add(name, device.clone())?;
        assembly.nets.push(Card { function, device });
    }
    Ok(())
}

/// A locally administered address of one card: bit 1 of the first octet set, bit 0 clear.
fn random_mac() -> io::Result<[u8; 6]> {
    let mut mac = [0; 6];
    rustix::rand::getrandom(&mut mac, rustix::rand::GetRandomFlags::empty())?;
    mac[0] = (mac[0] | 2) & !1;
    Ok(mac)
}

fn console(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    let Some(spec) = &assembly.spec.console else {
        return Ok(());
    };
    let console = open_console("virtio console", spec)?;
    let device =
        VirtioConsole::new(console.port()).map_err(BuildError::device("virtio console"))?;
    assembly.add("console0".to_owned(), Arc::new(device))?;
    assembly.console_path = path_of(spec, &console);
    assembly.consoles.push(console);
    Ok(())
}

fn rng(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    if assembly.spec.rng {
        assembly.add("rng0".to_owned(), Arc::new(Rng::new()))?;
    }
    Ok(())
}

fn serial(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    let console = open_console("serial console", &assembly.spec.serial)?;
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

fn open_console(what: &str, spec: &ConsoleSpec) -> Result<Console, BuildError> {
    let backend = match spec {
        ConsoleSpec::Null => ConsoleBackend::Null,
        ConsoleSpec::Stdio => ConsoleBackend::Stdio,
        ConsoleSpec::Pty => ConsoleBackend::Pty,
        ConsoleSpec::Socket(path) => {
            let device = format!("{what} {}", path.display());
            socket::remove_stale(path).map_err(BuildError::device(device))?;
            ConsoleBackend::Socket(path.clone())
        }
    };
    Console::open(&backend).map_err(BuildError::device(what))
}

/// What `info` tells about a console: the path that a user opens.
fn path_of(spec: &ConsoleSpec, console: &Console) -> Option<PathBuf> {
    match spec {
        ConsoleSpec::Socket(path) => Some(path.clone()),
        _ => console.pty_path().map(Path::to_owned),
    }
}
