// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Links: the bridge, taps for virtual machines, veth pairs for containers. Names as in PVE: `tap100i0`,
//! `veth101i0`.

use crate::error::Error;
use crate::exec::Program;
use crate::id::GuestId;
use crate::network::rate;
use crate::network::shown;
use crate::network::vlan::{Need, Vlans};
use crate::network::vlan_bridge;

/// Name of a VM's tap for its network card of that number.
pub fn tap_name(guest: GuestId, index: u16) -> String {
    format!("tap{guest}i{index}")
}

/// Name of the host's end of a container's veth pair.
pub fn veth_name(guest: GuestId, index: u16) -> String {
    format!("veth{guest}i{index}")
}

/// Name of the other end until it is moved into the container.
fn peer_name(guest: GuestId, index: u16) -> String {
    format!("{}p", veth_name(guest, index))
}

/// What a guest's card is connected to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attachment {
    /// Key of the card, `net0`, for messages.
    pub card: String,
    /// Name of the bridge; not connected when absent.
    pub bridge: Option<String>,
    /// The VLANs of it that the card is in.
    pub vlans: Vlans,
    /// MTU of the host's end; the bridge's when absent.
    pub mtu: Option<u16>,
    /// The cable is pulled.
    pub link_down: bool,
    /// The tap has several pairs of queues.
    pub multi_queue: bool,
    /// Most bytes a second that a container's card carries, each way.
    pub rate: Option<u64>,
}

/// The container's end of a pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inside {
    /// Name in the container, `eth0`.
    pub name: String,
    /// MAC address.
    pub mac: String,
    /// Addresses that are set from outside; what DHCP gives comes later.
    pub addresses: Vec<String>,
    /// Default routes, one an address family.
    pub gateways: Vec<String>,
}

/// The links of this network namespace with their counters. Not /sys: that shows the namespace of its mounter.
const DEVICES: &str = "/proc/thread-self/net/dev";

/// What a link has carried, seen from the host: a guest's card receives what its tap or veth end sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Traffic {
    /// Bytes that came in through the link.
    pub received_bytes: u64,
    /// Bytes that went out through it.
    pub sent_bytes: u64,
}

/// Every link with its traffic.
pub fn traffic() -> Vec<(String, Traffic)> {
    let text = std::fs::read_to_string(DEVICES).unwrap_or_default();
    text.lines().skip(2).filter_map(parse_device).collect()
}

/// One line of [`DEVICES`]: `name: received_bytes …7 more sent_bytes …`, proc(5).
fn parse_device(line: &str) -> Option<(String, Traffic)> {
    let (name, numbers) = line.split_once(':')?;
    let numbers: Vec<&str> = numbers.split_whitespace().collect();
    let traffic = Traffic {
        received_bytes: numbers.first()?.parse().ok()?,
        sent_bytes: numbers.get(8)?.parse().ok()?,
    };
    Some((name.trim().to_owned(), traffic))
}

/// Whether there is a link of that name in this network namespace.
pub fn exists(name: &str) -> bool {
    traffic().iter().any(|(link, _)| link == name)
}

/// Names of the links that exist and belong to guests: taps and veth ends named by us.
pub fn guest_links() -> Vec<(String, GuestId)> {
    let links = traffic().into_iter();
    links
        .filter_map(|(name, _)| owner(&name).map(|guest| (name, guest)))
        .collect()
}

/// What a guest's links have carried together.
pub fn guest_traffic(guest: GuestId) -> Traffic {
    let mut sum = Traffic::default();
    for (name, traffic) in traffic() {
        if owner(&name) == Some(guest) {
            sum.received_bytes += traffic.received_bytes;
            sum.sent_bytes += traffic.sent_bytes;
        }
    }
    sum
}

/// The guest that a link belongs to, by its name.
pub(super) fn owner(link: &str) -> Option<GuestId> {
    let rest = link
        .strip_prefix("tap")
        .or_else(|| link.strip_prefix("veth"))?;
    let (guest, index) = rest.split_once('i')?;
    index.trim_end_matches('p').parse::<u16>().ok()?;
    guest.parse().ok()
}

/// Makes the bridge unless it exists; says whether it did.
pub async fn ensure_bridge(name: &str) -> Result<bool, Error> {
    if shown::one(name)
        .await
        .is_some_and(|it| it.awareness().is_some())
    {
        return Ok(false);
    }
    if exists(name) {
        return Err(Error::Refused(format!(
            "interface '{name}' exists and is not a bridge"
        )));
    }
    ip(&[
        "link",
        "add",
        "name",
        name,
        "type",
        "bridge",
        "stp_state",
        "0",
        "forward_delay",
        "0",
    ])
    .await?;
    Ok(true)
}

/// Switches a link on.
pub async fn up(name: &str) -> Result<(), Error> {
    ip(&["link", "set", "dev", name, "up"]).await
}

/// Removes a guest's link, and what was there for its VLAN alone; removing what is not there is no error.
pub async fn delete(name: &str) -> Result<(), Error> {
    let removed = remove(name).await;
    vlan_bridge::sweep().await;
    removed
}

/// Removes all links of a guest, and what was there for their VLANs alone.
pub async fn delete_all(guest: GuestId) -> Result<(), Error> {
    for (name, owner) in guest_links() {
        if owner == guest {
            remove(&name).await?;
        }
    }
    vlan_bridge::sweep().await;
    Ok(())
}

/// Removes a link; removing what is not there is no error.
pub(super) async fn remove(name: &str) -> Result<(), Error> {
    match ip(&["link", "delete", "dev", name]).await {
        // The kernel removes a veth's host end together with its container's namespace: gone is gone.
        Err(_) if !exists(name) => Ok(()),
        other => other,
    }
}

/// Makes a persistent tap for one card of a VM and connects it. What was left of an earlier run is replaced.
pub async fn create_tap(name: &str, attachment: &Attachment) -> Result<(), Error> {
    delete_leftover(name).await?;
    // vnet_hdr: checksums and segments cross the tap unfinished, as the guest's virtio-net offers.
    let add = ["tuntap", "add", "dev", name, "mode", "tap", "vnet_hdr"];
    let queues: &[&str] = if attachment.multi_queue {
        &["multi_queue"]
    } else {
        &[]
    };
    ip(&[&add, queues].concat()).await?;
    let connected = connect(name, attachment).await;
    if connected.is_err() {
        delete(name).await?;
    }
    connected
}

/// Makes the pair for one card of a container, and connects the host's end.
pub async fn create_veth(guest: GuestId, index: u16, attachment: &Attachment) -> Result<(), Error> {
    let (name, peer) = (veth_name(guest, index), peer_name(guest, index));
    delete_leftover(&name).await?;
    ip(&[
        "link", "add", "name", &name, "type", "veth", "peer", "name", &peer,
    ])
    .await?;
    let connected = async {
        limit(&name, attachment).await?;
        connect(&name, attachment).await
    };
    let connected = connected.await;
    if connected.is_err() {
        delete(&name).await?;
    }
    connected
}

/// Moves the container's end into the network namespace of process `pid`, under its name there, and switches it on.
pub async fn move_veth(guest: GuestId, index: u16, pid: u32, inside: &Inside) -> Result<(), Error> {
    let peer = peer_name(guest, index);
    let namespace = pid.to_string();
    ip(&["link", "set", "dev", &peer, "address", &inside.mac]).await?;
    ip(&[
        "link",
        "set",
        "dev",
        &peer,
        "netns",
        &namespace,
        "name",
        &inside.name,
    ])
    .await?;
    ip_within(pid, &["link", "set", "dev", "lo", "up"]).await?;
    for address in &inside.addresses {
        add_address(pid, &inside.name, address).await?;
    }
    ip_within(pid, &["link", "set", "dev", &inside.name, "up"]).await?;
    for gateway in &inside.gateways {
        add_default_route(pid, &inside.name, gateway).await?;
    }
    Ok(())
}

/// Gives an interface in the network namespace of process `pid` an address, `10.0.0.2/24`.
pub async fn add_address(pid: u32, interface: &str, address: &str) -> Result<(), Error> {
    ip_within(pid, &["address", "replace", address, "dev", interface]).await
}

/// Takes an address from it; one that it does not have any more is no error.
pub async fn remove_address(pid: u32, interface: &str, address: &str) -> Result<(), Error> {
    match ip_within(pid, &["address", "delete", address, "dev", interface]).await {
        // Says the kernel of an address that is not there.
        Err(error) if error.chain().contains("Cannot assign requested address") => Ok(()),
        other => other,
    }
}

/// Makes the default route of the gateway's family lead through it.
pub async fn add_default_route(pid: u32, interface: &str, gateway: &str) -> Result<(), Error> {
    let family = if gateway.contains(':') { "-6" } else { "-4" };
    // onlink: the gateway of a /32 is not in the address's own network.
    let route = [
        family, "route", "replace", "default", "via", gateway, "dev", interface, "onlink",
    ];
    ip_within(pid, &route).await
}

/// Takes the default route through that gateway away; one that is not there any more is no error.
pub async fn remove_default_route(pid: u32, interface: &str, gateway: &str) -> Result<(), Error> {
    let family = if gateway.contains(':') { "-6" } else { "-4" };
    let route = [
        family, "route", "delete", "default", "via", gateway, "dev", interface,
    ];
    match ip_within(pid, &route).await {
        // Says the kernel of a route that is not there: it goes with the interface's last address.
        Err(error) if error.chain().contains("No such process") => Ok(()),
        other => other,
    }
}

/// Connects an end that exists in another way. What cannot be is refused before anything changes; what fails half way
/// is taken back.
pub async fn change(name: &str, former: &Attachment, new: &Attachment) -> Result<(), Error> {
    check(new).await?;
    let changed = exchange(name, former, new).await;
    // The first error is the one to tell.
    if changed.is_err()
        && let Err(error) = exchange(name, new, former).await
    {
        tracing::warn!(link = name, error = error.chain(), "not taken back");
    }
    changed
}

async fn exchange(name: &str, former: &Attachment, new: &Attachment) -> Result<(), Error> {
    if former.rate != new.rate {
        rate::clear(name).await?;
        limit(name, new).await?;
    }
    let place = check(new).await?;
    let is_there = shown::one(name).await.and_then(|link| link.master)
        == place.as_ref().map(|place| place.bridge.clone());
    if is_there && (former.mtu, former.link_down) == (new.mtu, new.link_down) {
        // Where it stays, its guest does not notice that it is in other VLANs.
        return match (former.vlans == new.vlans, place.map(|place| place.need)) {
            (false, Some(Need::Filter)) => new.vlans.set(name).await,
            _ => Ok(()),
        };
    }
    ip(&["link", "set", "dev", name, "nomaster"]).await?;
    let is_filtered = place.is_some_and(|place| place.need == Need::Filter);
    if new.link_down || is_filtered {
        ip(&["link", "set", "dev", name, "down"]).await?;
    }
    let connected = connect(name, new).await;
    vlan_bridge::sweep().await;
    connected
}

/// Where a card's end goes.
struct Place {
    /// The bridge that it becomes a port of.
    bridge: String,
    need: Need,
}

/// Whether a card can be connected like that, and where.
async fn check(attachment: &Attachment) -> Result<Option<Place>, Error> {
    let Some(bridge) = &attachment.bridge else {
        return Ok(None);
    };
    let card = &attachment.card;
    let link = shown::one(bridge).await;
    let (link, awareness) = link
        .and_then(|link| link.awareness().map(|awareness| (link, awareness)))
        .ok_or_else(|| Error::refused(format!("bridge '{bridge}' does not exist")))?;
    let need = attachment.vlans.need(card, bridge, awareness)?;
    let bridge = match &need {
        Need::Bridge { tag, remedy } => {
            let plan = vlan_bridge::plan(&shown::all().await?, &link, *tag);
            let refuse = |reason| format!("{card}: tag={tag}: {reason}; {remedy}");
            plan.map_err(|reason| Error::refused(refuse(reason)))?
                .bridge
        }
        Need::Nothing | Need::Filter => bridge.clone(),
    };
    Ok(Some(Place { bridge, need }))
}

/// Connects an end that is connected to nothing. On a VLAN-aware bridge it is off until it has its own VLANs, so that
/// nothing crosses in that which the bridge gives to every new port.
async fn connect(name: &str, attachment: &Attachment) -> Result<(), Error> {
    if let (Some(place), Some(bridge)) = (check(attachment).await?, &attachment.bridge) {
        if let Some(mtu) = attachment.mtu {
            ip(&["link", "set", "dev", name, "mtu", &mtu.to_string()]).await?;
        }
        match place.need {
            Need::Bridge { tag, .. } => {
                vlan_bridge::plug(name, &attachment.card, bridge, tag).await?;
            }
            Need::Nothing | Need::Filter => {
                ip(&["link", "set", "dev", name, "master", &place.bridge]).await?;
            }
        }
        if place.need == Need::Filter {
            attachment.vlans.set(name).await?;
        }
    }
    if attachment.link_down {
        return Ok(());
    }
    up(name).await
}

async fn limit(name: &str, attachment: &Attachment) -> Result<(), Error> {
    match attachment.rate {
        Some(rate) => rate::set(name, &attachment.card, rate).await,
        None => Ok(()),
    }
}

async fn delete_leftover(name: &str) -> Result<(), Error> {
    if exists(name) {
        remove(name).await?;
    }
    Ok(())
}

async fn ip(args: &[&str]) -> Result<(), Error> {
    Program::new("ip").args(args).run().await?;
    Ok(())
}

async fn ip_within(pid: u32, args: &[&str]) -> Result<(), Error> {
    Program::new("nsenter")
        .arg(format!("--net=/proc/{pid}/ns/net"))
        .args(["--", "ip"])
        .args(args)
        .run()
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_are_read() {
        let line = " veth101i0: 10 1 0 0 0 0 0 0 20 2 0 0 0 0 0 0";
        let (name, traffic) = parse_device(line).unwrap();
        assert_eq!(name, "veth101i0");
        assert_eq!((traffic.received_bytes, traffic.sent_bytes), (10, 20));
        assert!(exists("lo"));
    }

    #[test]
    fn links_tell_their_guest() {
        let guest: GuestId = "100".parse().unwrap();
        for name in [tap_name(guest, 0), veth_name(guest, 3), peer_name(guest, 3)] {
            assert_eq!(owner(&name), Some(guest), "{name}");
        }
        for name in ["eth0", "tap", "tap1i0", "tap100", "veth1234abc", "vethi0"] {
            assert_eq!(owner(name), None, "{name}");
        }
    }
}
