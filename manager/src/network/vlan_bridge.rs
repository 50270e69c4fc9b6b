// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A card with a `tag` on a bridge that is not VLAN-aware: as in PVE, it is a port of another bridge, that of its VLAN.
//!
//! ```text
//! tap100i0 ──── vmbr0 ───────── eno1 ── switch      frames as they are
//! tap101i0 ── vmbr0v100 ── eno1.100 ──┘             tag 100 outside, none inside
//! ```
//!
//! Each port of `vmbr0` that is no guest's has a VLAN device in it: a card of the host, a bond, a VLAN device (QinQ).
//!
//! PVE keeps these devices until the host's next start. Here they go with their last guest: as long as `eno1.100` is
//! there it takes its frames away from `vmbr0`, so a machine on `vmbr0` that handles tags itself would miss them, and so
//! would every card with that tag once `vmbr0` is made VLAN-aware. What is removed is told by looking, so a daemon that
//! was killed in between has forgotten nothing: devices of ours are in a group of links of their own ([`GROUP`]), and
//! go when no port of another group is left with them. What an administrator has made is used, and stays.
//!
//! Called by `link`, which connects cards; and by the reconciler, for what nobody has removed.

use std::path::PathBuf;

use tokio::sync::Mutex;

use crate::error::Error;
use crate::exec::Program;
use crate::network::link;
use crate::network::shown::{self, Link};

/// Group of the links that are made here, as ip(8) shows it. Our choice, after IEEE 802.1Q.
pub(super) const GROUP: &str = "8021";

/// Longest name of a link, in bytes. IFNAMSIZ of the kernel, less the terminator.
const NAME_MAX: usize = 15;

/// Held from the look at what there is until a guest's end is a port, and while idle devices go.
static DEVICES: Mutex<()> = Mutex::const_new(());

/// What a bridge's VLAN needs, and which of it is missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Plan {
    /// Name of the VLAN's bridge.
    pub(super) bridge: String,
    /// Arguments of ip(8) that make it, when it is missing.
    make: Option<Vec<String>>,
    mtu: u32,
    devices: Vec<Device>,
}

/// The VLAN's device on one port of the bridge.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Device {
    name: String,
    parent: String,
    tag: u16,
    mtu: u32,
    exists: bool,
    /// The kernel switches it on together with its parent, and not before.
    parent_is_up: bool,
}

/// What VLAN `tag` of a bridge needs; or why it cannot be, as the end of a sentence about the card.
pub(super) fn plan(links: &[Link], bridge: &Link, tag: u16) -> Result<Plan, String> {
    if bridge.is_ours() {
        let name = &bridge.name;
        return Err(format!("'{name}' is the bridge of a VLAN already"));
    }
    let name = format!("{}v{tag}", bridge.name);
    fits(&name)?;
    let found = find(links, &name);
    if found.is_some_and(|found| found.awareness().is_none()) {
        return Err(format!("needs a bridge '{name}', and that is no bridge"));
    }
    let ports = links
        .iter()
        .filter(|port| port.master.as_ref() == Some(&bridge.name) && !port.is_of_guest());
    let devices = ports.map(|port| device(links, port, tag, &name));
    let devices = devices.collect::<Result<Vec<_>, _>>()?;
    if devices.is_empty() {
        return Err(format!(
            "there is no physical interface on bridge '{}'",
            bridge.name
        ));
    }
    Ok(Plan {
        make: found.is_none().then(|| arguments(&name, bridge)),
        bridge: name,
        mtu: bridge.mtu,
        devices,
    })
}

/// The device of VLAN `tag` on a port. One that belongs to something else is not taken from it.
fn device(links: &[Link], port: &Link, tag: u16, bridge: &str) -> Result<Device, String> {
    let is_wanted = |link: &Link| link.vlan() == Some((port.name.as_str(), tag));
    let name = format!("{}.{tag}", port.name);
    let found = links.iter().find(|link| is_wanted(link));
    let found = found.or_else(|| find(links, &name));
    if let Some(link) = found {
        let name = &link.name;
        if !is_wanted(link) {
            return Err(format!("'{name}' exists and is another device"));
        }
        match link.master.as_deref() {
            Some(master) if master != bridge => {
                return Err(format!("'{name}' is a port of '{master}': use that bridge"));
            }
            None if link.addr_info.iter().any(|it| it.scope != "link") => {
                return Err(format!("'{name}' has an address of the host's"));
            }
            _ => {}
        }
    } else {
        fits(&name)?;
    }
    Ok(Device {
        name: found.map_or(name, |link| link.name.clone()),
        parent: port.name.clone(),
        tag,
        mtu: port.mtu,
        exists: found.is_some(),
        parent_is_up: port.flags.iter().any(|flag| flag == "UP"),
    })
}

fn find<'a>(links: &'a [Link], name: &str) -> Option<&'a Link> {
    links.iter().find(|link| link.name == name)
}

fn fits(name: &str) -> Result<(), String> {
    match name.len() <= NAME_MAX {
        true => Ok(()),
        false => Err(format!(
            "needs a device '{name}', whose name is longer than {NAME_MAX} bytes"
        )),
    }
}

/// Arguments of ip(8) that make a VLAN's bridge, with what PVE copies of the other's settings.
fn arguments(name: &str, like: &Link) -> Vec<String> {
    let settings = [
        "ageing_time",
        "stp_state",
        "priority",
        "forward_delay",
        "hello_time",
        "max_age",
        "mcast_snooping",
        "mcast_querier",
    ];
    let words = [
        "link", "add", "name", name, "group", GROUP, "type", "bridge",
    ];
    let mut words = words.map(str::to_owned).to_vec();
    for setting in settings {
        if let Some(value) = like.setting(setting) {
            words.extend([setting.to_owned(), value.to_string()]);
        }
    }
    words
}

/// Makes a guest's end a port of the bridge of VLAN `tag`, and before that what is missing of it. `card` (`net0`) is for
/// messages.
pub(super) async fn plug(end: &str, card: &str, bridge: &str, tag: u16) -> Result<(), Error> {
    let _guard = DEVICES.lock().await;
    let links = shown::all().await?;
    let plan = find(&links, bridge).map(|bridge| plan(&links, bridge, tag));
    let plan = plan.unwrap_or_else(|| Err(format!("bridge '{bridge}' does not exist")));
    let plan = plan.map_err(|reason| Error::refused(format!("{card}: tag={tag}: {reason}")))?;
    let plugged = async {
        make(&plan, card).await?;
        ip(&["link", "set", "dev", end, "master", &plan.bridge]).await
    };
    let plugged = plugged.await;
    if plugged.is_err() {
        remove_idle().await;
    }
    plugged
}

async fn make(plan: &Plan, card: &str) -> Result<(), Error> {
    if let Some(arguments) = &plan.make {
        Program::new("ip").args(arguments).run().await?;
        disable_ipv6(&plan.bridge).await?;
    }
    // The kernel forgets an MTU that is set where it has just chosen the same, and follows the next port's: once before
    // there are ports, once after.
    let mtu = plan.mtu.to_string();
    let set_mtu = ["link", "set", "dev", &plan.bridge, "mtu", &mtu];
    ip(&set_mtu).await?;
    for device in &plan.devices {
        let (name, tag) = (device.name.as_str(), device.tag.to_string());
        if !device.exists {
            let parent = device.parent.as_str();
            let made = ip(&[
                "link", "add", "link", parent, "name", name, "group", GROUP, "type", "vlan", "id",
                &tag,
            ])
            .await;
            made.map_err(|error| {
                let text = format!(
                    "{card}: tag={tag}: '{name}' cannot be made: does this host's kernel have VLAN devices (8021q)?"
                );
                Error::failed(text, error)
            })?;
            disable_ipv6(name).await?;
        }
        let mtu = device.mtu.to_string();
        let set = ["link", "set", "dev", name, "mtu", &mtu];
        ip(&[&set[..], &["master", &plan.bridge]].concat()).await?;
        if device.parent_is_up {
            link::up(name).await?;
        }
    }
    ip(&[&set_mtu[..], &["up"]].concat()).await
}

/// The host is no member of its guests' VLANs: it takes no address there that somebody announces.
async fn disable_ipv6(link: &str) -> Result<(), Error> {
    let path = PathBuf::from("/proc/sys/net/ipv6/conf").join(link);
    let path = path.join("disable_ipv6");
    match tokio::fs::write(&path, "1\n").await {
        // A kernel without IPv6.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(()),
        written => written.map_err(|e| Error::failed(format!("write {}", path.display()), e)),
    }
}

/// Removes the devices that no guest uses any more. What cannot be is logged, and tried again by the reconciler.
pub(super) async fn sweep() {
    let names = link::traffic();
    // Nearly always there is none, and no program is run.
    if names.iter().any(|(name, _)| has_our_form(name)) {
        let _guard = DEVICES.lock().await;
        remove_idle().await;
    }
}

async fn remove_idle() {
    let removed = async {
        for name in idle(&shown::all().await?) {
            link::remove(&name).await?;
        }
        Ok::<(), Error>(())
    };
    if let Err(error) = removed.await {
        tracing::warn!(error = error.chain(), "a VLAN's devices stay");
    }
}

/// Whether it may be the name of a device of ours: `vmbr0v100`, `eno1.100`.
fn has_our_form(name: &str) -> bool {
    let tag = name.rsplit_once(['v', '.']).map(|(_, tag)| tag);
    tag.is_some_and(|tag| tag.parse::<u16>().is_ok())
}

/// Devices of ours that only devices of ours are connected to.
fn idle(links: &[Link]) -> Vec<String> {
    let is_used = |bridge: &str| {
        let mut ports = links
            .iter()
            .filter(|it| it.master.as_deref() == Some(bridge));
        ports.any(|port| !port.is_ours())
    };
    let ours = links.iter().filter(|link| link.is_ours());
    let idle = ours.filter(|link| match (link.vlan(), &link.master) {
        (None, _) => !is_used(&link.name),
        (Some(_), Some(bridge)) => !is_used(bridge),
        (Some(_), None) => true,
    });
    idle.map(|link| link.name.clone()).collect()
}

async fn ip(args: &[&str]) -> Result<(), Error> {
    Program::new("ip").args(args).run().await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Links as ip(8) shows them: name, kind, master, and what else there is.
    fn links(all: &[(&str, &str, &str, &str)]) -> Vec<Link> {
        let shown = all.iter().map(|(name, kind, master, more)| {
            let kind = match *kind {
                "" => String::new(),
                "vlan" => {
                    let (parent, id) = name.rsplit_once('.').unwrap();
                    format!(
                        r#","link":"{parent}","linkinfo":{{"info_kind":"vlan","info_data":{{"id":{id}}}}}"#
                    )
                }
                kind => format!(
                    r#","linkinfo":{{"info_kind":"{kind}","info_data":{{"ageing_time":30000,"stp_state":0}}}}"#
                ),
            };
            let master = match *master {
                "" => String::new(),
                master => format!(r#","master":"{master}""#),
            };
            format!(r#"{{"ifname":"{name}","link_type":"ether","mtu":1500{kind}{master}{more}}}"#)
        });
        shown::parse(&format!("[{}]", shown.collect::<Vec<_>>().join(","))).unwrap()
    }

    const OURS: &str = r#","group":"8021""#;

    fn planned(all: &[(&str, &str, &str, &str)], bridge: &str) -> Result<Plan, String> {
        let links = links(all);
        plan(&links, find(&links, bridge).unwrap(), 100)
    }

    #[track_caller]
    fn devices(all: &[(&str, &str, &str, &str)], expected: &[(&str, bool)]) {
        let plan = planned(all, "vmbr0").unwrap();
        let devices = plan.devices.iter();
        let devices: Vec<_> = devices.map(|it| (it.name.as_str(), it.exists)).collect();
        assert_eq!(
            (plan.bridge.as_str(), devices),
            ("vmbr0v100", expected.to_vec())
        );
    }

    #[test]
    fn each_port_that_is_no_guests_has_a_device() {
        let all = [
            ("vmbr0", "bridge", "", ""),
            ("eno1", "", "vmbr0", ""),
            ("bond0", "bond", "vmbr0", ""),
            ("eno2.5", "vlan", "vmbr0", ""),
            ("sw0", "veth", "vmbr0", ""),
            ("eno3", "", "vmbr1", ""),
            ("tap100i0", "tun", "vmbr0", ""),
            ("vnet7", "tun", "vmbr0", ""),
            ("veth101i0", "veth", "vmbr0", ""),
        ];
        let made = ["eno1.100", "bond0.100", "eno2.5.100", "sw0.100"];
        devices(&all, &made.map(|name| (name, false)));
        let make = planned(&all, "vmbr0").unwrap().make.unwrap().join(" ");
        assert_eq!(
            make,
            "link add name vmbr0v100 group 8021 type bridge ageing_time 30000 stp_state 0"
        );
    }

    #[test]
    fn what_is_there_is_not_made_again() {
        let mut all = vec![
            ("vmbr0", "bridge", "", ""),
            ("eno1", "", "vmbr0", ""),
            ("eno2", "", "vmbr0", ""),
            ("eno1.100", "vlan", "vmbr0v100", OURS),
        ];
        devices(&all, &[("eno1.100", true), ("eno2.100", false)]);
        assert!(planned(&all, "vmbr0").unwrap().make.is_some());
        all.push(("vmbr0v100", "bridge", "", ""));
        assert_eq!(planned(&all, "vmbr0").unwrap().make, None);
    }

    #[track_caller]
    fn refused(all: &[(&str, &str, &str, &str)], bridge: &str, expected: &str) {
        assert_eq!(planned(all, bridge).unwrap_err(), expected);
    }

    #[test]
    fn what_belongs_to_something_else_is_left_alone() {
        let plain = ("vmbr0", "bridge", "", "");
        refused(
            &[plain, ("tap100i0", "tun", "vmbr0", "")],
            "vmbr0",
            "there is no physical interface on bridge 'vmbr0'",
        );
        let port = ("eno1", "", "vmbr0", "");
        refused(
            &[plain, port, ("eno1.100", "vlan", "vmbr7", "")],
            "vmbr0",
            "'eno1.100' is a port of 'vmbr7': use that bridge",
        );
        let address = r#","addr_info":[{"family":"inet","local":"10.0.0.1","prefixlen":24,"scope":"global"}]"#;
        refused(
            &[plain, port, ("eno1.100", "vlan", "", address)],
            "vmbr0",
            "'eno1.100' has an address of the host's",
        );
        refused(
            &[plain, port, ("eno1.100", "dummy", "", "")],
            "vmbr0",
            "'eno1.100' exists and is another device",
        );
        refused(
            &[plain, port, ("vmbr0v100", "dummy", "", "")],
            "vmbr0",
            "needs a bridge 'vmbr0v100', and that is no bridge",
        );
        refused(
            &[
                ("vmbr0v7", "bridge", "", OURS),
                ("eno1.7", "vlan", "vmbr0v7", OURS),
            ],
            "vmbr0v7",
            "'vmbr0v7' is the bridge of a VLAN already",
        );
    }

    #[test]
    fn names_are_short() {
        let long = ("a-long-bridge", "bridge", "", "");
        refused(
            &[long, ("eno1", "", "a-long-bridge", "")],
            "a-long-bridge",
            "needs a device 'a-long-bridgev100', whose name is longer than 15 bytes",
        );
        refused(
            &[
                ("vmbr0", "bridge", "", ""),
                ("enx0200000000ff", "", "vmbr0", ""),
            ],
            "vmbr0",
            "needs a device 'enx0200000000ff.100', whose name is longer than 15 bytes",
        );
    }

    #[test]
    fn what_no_guest_uses_goes() {
        let all = [
            ("vmbr0", "bridge", "", ""),
            ("eno1", "", "vmbr0", ""),
            // Used, by a guest and by something else.
            ("vmbr0v5", "bridge", "", OURS),
            ("eno1.5", "vlan", "vmbr0v5", OURS),
            ("tap100i0", "tun", "vmbr0v5", ""),
            ("vmbr0v6", "bridge", "", ""),
            ("eno1.6", "vlan", "vmbr0v6", OURS),
            ("other", "dummy", "vmbr0v6", ""),
            // Not ours.
            ("vmbr0v7", "bridge", "", ""),
            ("eno1.7", "vlan", "vmbr0v7", ""),
            // Idle, whole and half made.
            ("vmbr0v8", "bridge", "", OURS),
            ("eno1.8", "vlan", "vmbr0v8", OURS),
            ("eno1.9", "vlan", "", OURS),
            ("vmbr0v10", "bridge", "", OURS),
            ("vmbr0v11", "bridge", "", ""),
            ("eno1.11", "vlan", "vmbr0v11", OURS),
        ];
        let gone = ["vmbr0v8", "eno1.8", "eno1.9", "vmbr0v10", "eno1.11"];
        assert_eq!(idle(&links(&all)), gone);
        let named = all
            .iter()
            .map(|(name, ..)| *name)
            .filter(|it| has_our_form(it));
        assert_eq!(named.count(), 12);
    }
}
