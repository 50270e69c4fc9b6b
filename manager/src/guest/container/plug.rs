// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a change of its config does to a container that runs: limits, mount points, devices and network cards that come
//! and go, the resolver's file. Called by `update` before the config is written; what failed half way is taken back.

use serde_json::{Value, json};

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::container::bundle::{self, Link, Mount, Source};
use crate::guest::container::root::GuestRoot;
use crate::guest::container::{Container, dhcp, image, mount_point, setup, unmount_below};
use crate::guest::site::Seat;
use crate::guest::{Guest, keys};
use crate::network::link;

/// A key with its former and its new value, as `Applied` has them.
type Change = (String, Option<String>, Option<String>);

/// Keys of limits.
const LIMITS: &[&str] = &["cores", "cpulimit", "cpuunits", "memory", "swap"];
/// Keys of the resolver's file.
const RESOLVER: &[&str] = &["nameserver", "searchdomain"];

/// Brings changes to a running container. `config` has them already.
pub async fn apply(seat: &Seat, config: &GuestConfig, changes: &[Change]) -> Result<(), Error> {
    let any = |keys: &[&str]| {
        changes
            .iter()
            .any(|(key, _, _)| keys.contains(&key.as_str()))
    };
    if any(LIMITS) {
        Container::new(seat.clone()).limit(config).await?;
    }
    for (index, change) in changes.iter().enumerate() {
        let (key, former, new) = change;
        if let Err(error) = exchange(seat, key, former.as_deref(), new.as_deref()).await {
            for (key, former, new) in changes[..index].iter().rev() {
                // The first error is the one to tell.
                if let Err(error) = exchange(seat, key, new.as_deref(), former.as_deref()).await {
                    tracing::warn!(
                        guest = seat.title(),
                        key,
                        error = error.chain(),
                        "not taken back"
                    );
                }
            }
            return Err(error);
        }
    }
    if any(RESOLVER) {
        dhcp::write_resolver(seat, config).await?;
    }
    Ok(())
}

/// Takes what a key had out of the container, and puts in what it has now.
async fn exchange(
    seat: &Seat,
    key: &str,
    former: Option<&str>,
    new: Option<&str>,
) -> Result<(), Error> {
    if is_member(key, "net") {
        return exchange_card(seat, key, former, new).await;
    }
    if is_member(key, "dev") {
        return exchange_device(seat, key, former, new).await;
    }
    if !is_member(key, "mp") || former.is_some() == new.is_some() {
        return Ok(());
    }
    match (former, new) {
        (Some(former), _) => unplug(seat, &point(seat, key, former)?).await,
        (None, Some(new)) => plug(seat, &point(seat, key, new)?).await,
        (None, None) => Ok(()),
    }
}

fn is_member(key: &str, family: &str) -> bool {
    let digits = key.strip_prefix(family).unwrap_or_default();
    !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit())
}

fn point(seat: &Seat, key: &str, value: &str) -> Result<Mount, Error> {
    Ok(Mount::new(key, &keys::properties(seat.kind, key, value)?))
}

async fn plug(seat: &Seat, point: &Mount) -> Result<(), Error> {
    if point.quota {
        // It would lack the device by which its quotas are named.
        return Err(Error::refused(format!(
            "{}: one with quota=1 is not added to a container that runs: stop it first",
            point.key
        )));
    }
    mount_point(seat, point).await?;
    let maps = bundle::maps(seat.id, &seat.config()?)?;
    let entry = point.entry(&seat.run_folder(), maps.as_ref())?;
    let result = change(seat, ["mounts", "add"], &json!([entry])).await;
    if result.is_err() {
        leave(seat, point).await?;
    }
    result
}

async fn unplug(seat: &Seat, point: &Mount) -> Result<(), Error> {
    let entry = json!([{ "destination": point.destination }]);
    change(seat, ["mounts", "remove"], &entry).await?;
    leave(seat, point).await
}

/// Unmounts on the host what the container does not have any more.
async fn leave(seat: &Seat, point: &Mount) -> Result<(), Error> {
    if matches!(point.source, Source::Folder(_)) {
        return Ok(());
    }
    let folder = seat.run_folder().join(&point.key);
    unmount_below(&folder).await?;
    tokio::fs::remove_dir(&folder)
        .await
        .map_err(|e| Error::failed(format!("remove {}", folder.display()), e))
}

/// The runtime's commands for mounts and devices, which take a list of them in a file.
pub(super) async fn change(seat: &Seat, command: [&str; 2], list: &Value) -> Result<(), Error> {
    let path = seat.run_folder().join("change.json");
    tokio::fs::write(&path, list.to_string())
        .await
        .map_err(|e| Error::failed(format!("write {}", path.display()), e))?;
    let container = Container::new(seat.clone());
    let result = container
        .command(&command, &[&path.to_string_lossy()])
        .await;
    tokio::fs::remove_file(&path)
        .await
        .map_err(|e| Error::failed(format!("remove {}", path.display()), e))?;
    result?;
    Ok(())
}

/// A device goes, and another one comes; when that cannot, the former comes back.
async fn exchange_device(
    seat: &Seat,
    key: &str,
    former: Option<&str>,
    new: Option<&str>,
) -> Result<(), Error> {
    if let Some(former) = former {
        let former = keys::properties(seat.kind, key, former)?;
        let place = json!([{ "path": former.get("path") }]);
        change(seat, ["devices", "remove"], &place).await?;
    }
    let Some(new) = new else { return Ok(()) };
    let added = add_device(seat, key, new).await;
    if let (Err(_), Some(former)) = (&added, former) {
        add_device(seat, key, former).await?;
    }
    added
}

async fn add_device(seat: &Seat, key: &str, value: &str) -> Result<(), Error> {
    let device = bundle::device(key, &keys::properties(seat.kind, key, value)?)?;
    change(seat, ["devices", "add"], &json!([device])).await
}

/// A card whose change concerns the host alone is connected anew; any other goes, and another one comes.
async fn exchange_card(
    seat: &Seat,
    key: &str,
    former: Option<&str>,
    new: Option<&str>,
) -> Result<(), Error> {
    let card = |value: &str| Link::new(key, &keys::properties(seat.kind, key, value)?);
    let former = former.map(card).transpose()?;
    let new = new.map(card).transpose()?;
    new.iter().try_for_each(Link::demand)?;
    if let (Some(former), Some(new)) = (&former, &new)
        && former.inside == new.inside
        && former.asks_dhcp == new.asks_dhcp
    {
        let name = link::veth_name(seat.id, new.index);
        link::change(&name, &former.attachment, &new.attachment).await?;
        // A lease belongs to the network that it is from.
        let network = |card: &Link| (card.attachment.bridge.clone(), card.attachment.vlans.tag);
        return match new.asks_dhcp && network(former) != network(new) {
            true => dhcp::start(seat, new, pid(seat)?).await,
            false => Ok(()),
        };
    }
    if let Some(former) = former {
        dhcp::stop(seat, former.index).await?;
        link::delete(&link::veth_name(seat.id, former.index)).await?;
    }
    let Some(new) = new else { return Ok(()) };
    let pid = pid(seat)?;
    link::create_veth(seat.id, new.index, &new.attachment).await?;
    let moved = async {
        link::move_veth(seat.id, new.index, pid, &new.inside).await?;
        if !new.asks_dhcp {
            return Ok(());
        }
        ensure_resolver(seat).await?;
        // Its answer is waited for by `dhcp::keep`.
        dhcp::start(seat, &new, pid).await
    };
    let moved = moved.await;
    if moved.is_err() {
        dhcp::stop(seat, new.index).await?;
        link::delete(&link::veth_name(seat.id, new.index)).await?;
    }
    moved
}

/// Makes the file for the name servers that an answer to DHCP brings. One from an image has had it since its start.
async fn ensure_resolver(seat: &Seat) -> Result<(), Error> {
    if seat.config()?.get(image::KEY).is_some() {
        return Ok(());
    }
    let rootfs = Container::new(seat.clone()).rootfs();
    let work = move || setup::ensure_resolver(&GuestRoot::open(&rootfs)?);
    let made = tokio::task::spawn_blocking(work).await;
    made.map_err(|e| Error::failed("make the resolver's file", e))?
        .map_err(|e| Error::failed("make the resolver's file", e))
}

fn pid(seat: &Seat) -> Result<u32, Error> {
    let process = Container::new(seat.clone()).process();
    let process = process.ok_or_else(|| Error::refused(format!("{} not running", seat.title())))?;
    Ok(process.pid())
}
