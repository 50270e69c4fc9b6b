// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Rows of the table of device kinds (`devices`) for what connects a guest with its host: channels, sockets, balloon.

use std::fs::Permissions;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;

use atoll_devices::console::{Console, ConsoleBackend};
use atoll_devices::platform::{PanicDevice, Watchdog};
use atoll_devices::virtio::balloon::{Balloon, BalloonOptions};
use atoll_devices::virtio::console::{PortOptions, VirtioConsole};
use atoll_devices::virtio::vhost_user::{BackendOptions, DeviceKind, Layout, VhostUser};
use atoll_devices::virtio::vsock::{VhostVsockFile, Vsock};
use atoll_vmm_protocol::services::VhostUserSocket;
use atoll_vmm_protocol::spec::MachineSpec;

use super::assembly::{Assembly, BuildError};
use super::belongings;
use super::devices::{open_console, open_end, path_of};
use super::opened::{Opened, VsockEnd, WAS_OPENED};
use super::owner::GuestEvent;
use crate::{resources, socket};

/// The terminal, if there is one, and the named ports.
pub(super) fn open_virtio_console(
    spec: &MachineSpec,
    opened: &mut Opened,
) -> Result<(), BuildError> {
    if let Some(console) = &spec.console {
        opened.console = Some(open_console(opened, "virtio console", console)?);
    }
    for port in &spec.services.ports {
        let backend = ConsoleBackend::Channel(port.path.clone());
        let end = open_end(opened, &belongings::port(&port.name), &backend)?;
        opened.ports.push_back(end);
    }
    Ok(())
}

/// One device for all of them, none when there is nothing.
pub(super) fn console(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    let mut ports = Vec::new();
    if let Some(spec) = &assembly.spec.console {
        let end = assembly.opened.console.take().expect(WAS_OPENED);
        let console = Console::start(end).map_err(BuildError::device("virtio console"))?;
        let port = console.port();
        ports.push(PortOptions { port, name: None });
        assembly.console_path = path_of(spec, &console);
        assembly.consoles.push(console);
    }
    for spec in &assembly.spec.services.ports {
        let end = assembly.opened.ports.pop_front().expect(WAS_OPENED);
        let device = format!("port {}", spec.name);
        let channel = Console::start(end).map_err(BuildError::device(device))?;
        ports.push(PortOptions {
            port: channel.port(),
            name: Some(spec.name.clone()),
        });
        assembly.consoles.push(channel);
    }
    if !ports.is_empty() {
        let device = VirtioConsole::with_ports(ports);
        let device = device.map_err(BuildError::device("virtio console"))?;
        assembly.backplane.add("console0", Arc::new(device))?;
    }
    Ok(())
}

pub(super) fn open_vsock(spec: &MachineSpec, opened: &mut Opened) -> Result<(), BuildError> {
    let Some(spec) = &spec.services.vsock else {
        return Ok(());
    };
    refuse_inherited(opened, "vsock")?;
    if spec.vhost {
        let device = format!("vsock {}: /dev/vhost-vsock", spec.cid);
        let file = VhostVsockFile::open(spec.cid).map_err(BuildError::device(device))?;
        opened.vsock = Some(VsockEnd::Kernel(file));
        return Ok(());
    }
    let device = format!("vsock {}", spec.path.display());
    let listen = || {
        socket::remove_stale(&spec.path)?;
        let listener = UnixListener::bind(&spec.path)?;
        std::fs::set_permissions(&spec.path, Permissions::from_mode(0o600))?;
        Ok::<_, std::io::Error>(listener)
    };
    let listener = listen().map_err(BuildError::device(device))?;
    opened.vsock = Some(VsockEnd::Socket(listener));
    // The sockets that the guest may connect to are beside it, and appear when they like.
    let directory = spec.path.parent().unwrap_or(Path::new("/"));
    opened.keep(directory);
    Ok(())
}

pub(super) fn vsock(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    let Some(spec) = &assembly.spec.services.vsock else {
        return Ok(());
    };
    let device = match assembly.opened.vsock.take().expect(WAS_OPENED) {
        VsockEnd::Socket(listener) => Vsock::new(spec.cid, spec.path.clone(), listener),
        VsockEnd::Kernel(file) => Vsock::in_kernel(spec.cid, file),
    };
    let device = device.map_err(BuildError::device("vsock"))?;
    assembly.backplane.add("vsock0", Arc::new(device))?;
    Ok(())
}

pub(super) fn watchdog(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    if assembly.spec.services.watchdog.is_some() {
        let voice = assembly.voice.clone();
        let bite = Box::new(move || voice.say(GuestEvent::WatchdogExpired));
        let watchdog = Watchdog::new(bite).map_err(BuildError::device("watchdog"))?;
        let watchdog = Arc::new(watchdog);
        assembly
            .backplane
            .add_function("watchdog0", watchdog.clone())?;
        assembly.watchdog = Some(watchdog);
    }
    Ok(())
}

pub(super) fn panic(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    if assembly.spec.services.panic.is_some() {
        let voice = assembly.voice.clone();
        let report = Box::new(move |_| voice.say(GuestEvent::Panicked));
        let device = Arc::new(PanicDevice::new(report));
        assembly.backplane.add_function("panic0", device)?;
    }
    Ok(())
}

/// For what is reached by paths only: those of a spec that came along are not opened.
fn refuse_inherited(opened: &Opened, device: &str) -> Result<(), BuildError> {
    match opened.is_inherited() {
        true => Err(BuildError::device(device)("it cannot come along")),
        false => Ok(()),
    }
}

/// Connects with the process that serves the device `name`.
fn connect(
    name: String,
    socket: &VhostUserSocket,
    opened: &mut Opened,
) -> Result<BackendOptions, BuildError> {
    refuse_inherited(opened, &name)?;
    let device = format!("{name}: vhost-user {}", socket.path.display());
    let stream = UnixStream::connect(&socket.path).map_err(BuildError::device(device))?;
    opened.keep_for(socket);
    Ok(resources::backend(name, stream, socket))
}

pub(super) fn open_filesystems(spec: &MachineSpec, opened: &mut Opened) -> Result<(), BuildError> {
    for (index, spec) in spec.services.filesystems.iter().enumerate() {
        let socket = VhostUserSocket {
            path: spec.path.clone(),
            // Another process would not know the files that the guest has open.
            reconnect: false,
        };
        let options = connect(format!("fs{index}"), &socket, opened)?;
        opened.filesystems.push_back(options);
    }
    Ok(())
}

pub(super) fn filesystems(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    for spec in &assembly.spec.services.filesystems {
        let options = assembly.opened.filesystems.pop_front().expect(WAS_OPENED);
        let name = options.name.clone();
        let device = VhostUser::file_system(&spec.tag, options);
        let device = device.map_err(BuildError::device(format!("file system {}", spec.tag)))?;
        assembly.backplane.add(&name, Arc::new(device))?;
    }
    Ok(())
}

pub(super) fn open_vhost_user(spec: &MachineSpec, opened: &mut Opened) -> Result<(), BuildError> {
    for (index, spec) in spec.services.vhost_user.iter().enumerate() {
        let kind = DeviceKind::of(spec.device_id).name;
        let options = connect(format!("user-{kind}{index}"), &spec.socket, opened)?;
        opened.vhost_user.push_back(options);
    }
    Ok(())
}

pub(super) fn vhost_user(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    for spec in &assembly.spec.services.vhost_user {
        let options = assembly.opened.vhost_user.pop_front().expect(WAS_OPENED);
        let name = options.name.clone();
        let layout = Layout {
            queue_count: spec.queue_count,
            config_bytes: spec.config_bytes,
        };
        let device = VhostUser::new(DeviceKind::of(spec.device_id), layout, options);
        let what = format!("{name}: vhost-user {}", spec.socket.path.display());
        let device = device.map_err(BuildError::device(what))?;
        assembly.backplane.add(&name, Arc::new(device))?;
    }
    Ok(())
}

pub(super) fn balloon(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    let Some(spec) = &assembly.spec.services.balloon else {
        return Ok(());
    };
    let balloon = Arc::new(Balloon::new(BalloonOptions {
        deflate_on_oom: spec.deflate_on_oom,
        reporting: spec.free_page_reporting,
    }));
    if let Some(target_mib) = spec.target_mib {
        balloon.set_target(assembly.spec.memory_mib.saturating_sub(target_mib) << 20);
    }
    assembly.backplane.add("balloon0", balloon.clone())?;
    assembly.balloon = Some(balloon);
    Ok(())
}
