// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Task `vzstart`: from the config to a running init.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::guest::container::bundle::Facts;
use crate::guest::container::root::GuestRoot;
use crate::guest::container::setup;
use crate::guest::container::{Container, bundle, dhcp, image, mount_point, quota, unmount_below};
use crate::guest::{Guest, hook, start};
use crate::network::cidr::Cidr;
use crate::network::link;
use crate::step;
use crate::task::{TaskContext, TaskStep};

/// How long a start waits for an answer to DHCP: dnsmasq looks for 3 s whether somebody has a new address already.
const ADDRESS_WAIT: Duration = Duration::from_secs(5);
const ADDRESS_POLL: Duration = Duration::from_millis(100);

/// What the steps hand on; what they make is init's process.
pub type Start = start::Start<u32>;

/// The table.
pub const STEPS: &[TaskStep<Start>] = &[
    step!("read the configuration", start::read_config),
    step!("run the hook script before", before),
    step!("make the run folder", make_folder, undo remove_folder),
    step!("mount volumes", mount_volumes, undo unmount_volumes),
    step!("write the container's own files", set_up),
    step!("write the bundle", write_bundle),
    step!("create network links", create_links, undo delete_links),
    step!("create the container", create, undo delete),
    step!("move links into the container", move_links),
    step!("ask for addresses", ask_addresses, undo forget_addresses),
    step!("start init", start_init),
    step!("run the hook script after", after),
];

fn container(start: &Start) -> Container {
    Container::new(start.seat.clone())
}

async fn before(start: &mut Start, task: &TaskContext) -> Result<(), Error> {
    hook::demand(&start.seat, start.config()?, hook::PRE_START, task).await
}

async fn after(start: &mut Start, task: &TaskContext) -> Result<(), Error> {
    hook::run(&start.seat, start.config()?, hook::POST_START, task).await;
    Ok(())
}

async fn make_folder(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    start.seat.make_run_folder().await
}

async fn remove_folder(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    start.seat.remove_run_folder().await
}

async fn mount_volumes(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    let points = bundle::volumes(start.config()?)?;
    quota::demand(start.config()?, &points).await?;
    for point in points {
        mount_point(&start.seat, &point).await?;
    }
    Ok(())
}

async fn unmount_volumes(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    unmount_below(&start.seat.run_folder()).await
}

async fn set_up(start: &mut Start, task: &TaskContext) -> Result<(), Error> {
    let container = container(start);
    let is_image = start.config()?.get(image::KEY).is_some();
    // The bridge's own name server, when the bridge is ours.
    let address = &start.seat.site.settings.bridge_address;
    let resolver: Option<Ipv4Addr> = address.parse().ok().map(Cidr::address);
    let resolver = resolver.map(|address| address.to_string());
    let identity = bundle::identity(start.seat.id, start.config()?, resolver.as_deref())?;
    let (rootfs, halt_file) = (container.rootfs(), container.halt_file());
    let ostype = start.config()?.get("ostype").map(str::to_owned);
    let asks_dhcp = bundle::cards(start.config()?)?
        .iter()
        .any(|card| card.asks_dhcp);
    let work = tokio::task::spawn_blocking(move || {
        if is_image {
            std::fs::write(halt_file, image::HALT_SIGNAL)?;
            let upper = GuestRoot::open(&rootfs.join(image::UPPER))?;
            setup::apply_to_image(&upper, &identity)?;
            // Also for a card that comes later.
            setup::ensure_resolver(&upper)?;
            return Ok(None);
        }
        let root = GuestRoot::open(&rootfs)?;
        std::fs::write(halt_file, halt_signal(&root))?;
        if asks_dhcp {
            setup::ensure_resolver(&root)?;
        }
        setup::apply(&root, &identity, ostype.as_deref()).map(Some)
    });
    let found = work
        .await
        .map_err(|e| Error::failed("write the container's own files", e))?
        .map_err(|e| Error::failed("write the container's own files", e))?;
    let Some(found) = found else { return Ok(()) };
    match found.network {
        Some(network) => task.log(&format!(
            "{}: files for {network} written",
            found.distribution
        )),
        None => task.log(&format!(
            "{}: no files for the network are written; fixed addresses are set from outside",
            found.distribution
        )),
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

async fn write_bundle(start: &mut Start, task: &TaskContext) -> Result<(), Error> {
    let (config, folder) = (start.config()?, start.seat.run_folder());
    let site = &start.seat.site;
    let mut facts = Facts::gather(config, &site.images, &site.settings.lxcfs_dir).await?;
    facts.quotas = quota::devices(&folder, &bundle::volumes(config)?);
    if facts.views.is_empty() {
        task.log(
            "lxcfs is not running, or hangs: /proc tells the host's memory, CPUs and load (install lxcfs)",
        );
    }
    let bundle = bundle::bundle(start.seat.id, config, &folder, &facts)?;
    bundle.notes.iter().for_each(|note| task.log(note));
    let text = serde_json::to_vec_pretty(&bundle.config);
    let text = text.map_err(|e| Error::failed("write the bundle", e))?;
    let mut files = vec![(folder.join("config.json"), text)];
    if let Some(signal) = bundle.halt_signal {
        files.push((container(start).halt_file(), signal.into_bytes()));
    }
    for (path, text) in files {
        tokio::fs::write(&path, text)
            .await
            .map_err(|e| Error::failed(format!("write {}", path.display()), e))?;
    }
    Ok(())
}

async fn create_links(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    for card in bundle::cards(start.config()?)? {
        card.demand()?;
        link::create_veth(start.seat.id, card.index, &card.attachment).await?;
    }
    Ok(())
}

async fn delete_links(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    for card in bundle::cards(start.config()?)? {
        link::delete(&link::veth_name(start.seat.id, card.index)).await?;
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
    for card in bundle::cards(start.config()?)? {
        link::move_veth(start.seat.id, card.index, pid, &card.inside).await?;
    }
    Ok(())
}

/// Starts the DHCP clients of the host. Most servers answer at once, and the container's program finds its address
/// then; nobody waits for long for one that does not.
async fn ask_addresses(start: &mut Start, task: &TaskContext) -> Result<(), Error> {
    let pid = start
        .made
        .ok_or_else(|| Error::refused("the container has no process"))?;
    let (seat, config) = (start.seat.clone(), start.config()?);
    dhcp::start_all(&seat, config, pid).await?;
    let deadline = Instant::now() + ADDRESS_WAIT;
    let arrival = async {
        loop {
            match dhcp::apply(&seat, config, pid).await {
                Ok(true) => return Ok(()),
                Ok(false) => {}
                // The network has said it: no reason to keep the container from starting.
                Err(error) => {
                    task.log(&format!("the answer to DHCP: {}", error.chain()));
                    return Ok(());
                }
            }
            if Instant::now() >= deadline {
                task.log("no answer to DHCP yet; the host goes on asking while the container runs");
                return Ok(());
            }
            tokio::time::sleep(ADDRESS_POLL).await;
        }
    };
    task.until_cancelled(arrival).await
}

async fn forget_addresses(start: &mut Start, _: &TaskContext) -> Result<(), Error> {
    dhcp::stop_all(&start.seat).await
}

async fn start_init(start: &mut Start, task: &TaskContext) -> Result<(), Error> {
    container(start).command(&["start"], &[]).await?;
    task.log(&format!(
        "init is process {}",
        start.made.unwrap_or_default()
    ));
    Ok(())
}
