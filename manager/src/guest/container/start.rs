// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Task `vzstart`: from the config to a running init.

use std::net::Ipv4Addr;

use crate::error::Error;
use crate::guest::container::root::GuestRoot;
use crate::guest::container::setup::{self, Flavor};
use crate::guest::container::{Container, bundle, mount, unmount_below};
use crate::guest::{Guest, start};
use crate::network::cidr::Cidr;
use crate::network::link;
use crate::step;
use crate::storage::name::VolumeId;
use crate::task::{TaskContext, TaskStep};

/// What the steps hand on; what they make is init's process.
pub type Start = start::Start<u32>;

/// The table.
pub const STEPS: &[TaskStep<Start>] = &[
    step!("read the configuration", start::read_config),
    step!("make the run folder", make_folder, undo remove_folder),
    step!("mount volumes", mount_volumes, undo unmount_volumes),
    step!("write the container's own files", set_up),
    step!("write the bundle", write_bundle),
    step!("create network links", create_links, undo delete_links),
    step!("create the container", create, undo delete),
    step!("move links into the container", move_links),
    step!("start init", start_init),
];

fn container(start: &Start) -> Container {
    Container::new(start.seat.clone())
}

async fn make_folder(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    start.seat.make_run_folder().await
}

async fn remove_folder(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    start.seat.remove_run_folder().await
}

async fn mount_volumes(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    for point in bundle::volumes(start.config()?)? {
        let wrong = |e| Error::refused(format!("{}: {e}", point.key));
        let volume: VolumeId = point.volume.parse().map_err(wrong)?;
        let image = start.seat.site.storage.path(&volume).await?;
        mount(&image, &start.seat.run_folder().join(&point.key)).await?;
    }
    Ok(())
}

async fn unmount_volumes(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    unmount_below(&start.seat.run_folder()).await
}

async fn set_up(start: &mut Start, task: &TaskContext) -> Result<(), Error> {
    let container = container(start);
    // The bridge's own name server, when the bridge is ours.
    let address = &start.seat.site.settings.bridge_address;
    let resolver: Option<Ipv4Addr> = address.parse().ok().map(Cidr::address);
    let resolver = resolver.map(|address| address.to_string());
    let identity = bundle::identity(start.seat.id, start.config()?, resolver.as_deref())?;
    let (rootfs, halt_file) = (container.rootfs(), container.halt_file());
    let work = tokio::task::spawn_blocking(move || {
        let root = GuestRoot::open(&rootfs)?;
        std::fs::write(halt_file, halt_signal(&root))?;
        setup::apply(&root, &identity)
    });
    let flavor = work
        .await
        .map_err(|e| Error::failed("write the container's own files", e))?
        .map_err(|e| Error::failed("write the container's own files", e))?;
    if flavor == Flavor::Unknown {
        task.log("this distribution's way of configuring the network is not known; fixed addresses are set from outside");
    }
    Ok(())
}

/// The signal that makes this init power off in good order.
fn halt_signal(root: &GuestRoot) -> &'static str {
    match root.resolved_name("sbin/init").as_deref() {
        // systemd(1): start halt.target.
        Some("systemd") => "SIGRTMIN+3",
        // busybox init: power off.
        Some("busybox" | "init-busybox") => "SIGUSR2",
        // sysvinit and OpenRC: the power is about to fail.
        _ => "SIGPWR",
    }
}

async fn write_bundle(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    let bundle = bundle::bundle(start.seat.id, start.config()?, &start.seat.run_folder())?;
    let path = start.seat.run_folder().join("config.json");
    let text =
        serde_json::to_vec_pretty(&bundle).map_err(|e| Error::failed("write the bundle", e))?;
    tokio::fs::write(&path, text)
        .await
        .map_err(|e| Error::failed(format!("write {}", path.display()), e))
}

async fn create_links(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    for (index, attachment, _) in bundle::cards(start.config()?)? {
        link::create_veth(start.seat.id, index, &attachment).await?;
    }
    Ok(())
}

async fn delete_links(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    for (index, _, _) in bundle::cards(start.config()?)? {
        link::delete(&link::veth_name(start.seat.id, index)).await?;
    }
    Ok(())
}

async fn create(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    let container = container(start);
    let folder = start.seat.site.containers_folder();
    tokio::fs::create_dir_all(&folder)
        .await
        .map_err(|e| Error::failed(format!("make {}", folder.display()), e))?;
    let (run_folder, pid_file) = (start.seat.run_folder(), container.pid_file());
    let (run_folder, pid_file) = (run_folder.to_string_lossy(), pid_file.to_string_lossy());
    let args = [
        "create",
        "--monitor",
        "--bundle",
        &run_folder,
        "--pid-file",
        &pid_file,
    ];
    container.command(&args, &[]).await?;
    let pid = container.process().map(|process| process.pid());
    start.made = pid;
    pid.map(drop)
        .ok_or_else(|| Error::refused("the container ended while it was being created"))
}

async fn delete(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    let container = container(start);
    if container.state_folder().exists() {
        container.command(&["delete", "--force"], &[]).await?;
    }
    container.group().remove().await;
    Ok(())
}

async fn move_links(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    let pid = start
        .made
        .ok_or_else(|| Error::refused("the container has no process"))?;
    for (index, _, inside) in bundle::cards(start.config()?)? {
        link::move_veth(start.seat.id, index, pid, &inside).await?;
    }
    Ok(())
}

async fn start_init(start: &mut Start, task: &TaskContext) -> Result<(), Error> {
    container(start).command(&["start"], &[]).await?;
    task.log(&format!(
        "init is process {}",
        start.made.unwrap_or_default()
    ));
    Ok(())
}
