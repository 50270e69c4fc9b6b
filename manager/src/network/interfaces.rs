// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The node's interfaces as they are now, for listings. Links of guests are left out, and so are the devices that are
//! there for their VLANs: as in PVE, the list is what an administrator configures.

use serde::Deserialize;

use crate::error::Error;
use crate::exec::Program;
use crate::network::shown::{self, Awareness, Link};

/// One interface of the node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// PVE's word for its kind: `bridge`, `eth`, `bond`, `vlan`.
    pub kind: String,
    /// Switched on.
    pub active: bool,
    /// MAC address.
    pub mac: String,
    /// Largest packet, in bytes.
    pub mtu: u32,
    /// Addresses with their prefixes, IPv4 first; link-local ones are left out.
    pub addresses: Vec<String>,
    /// Gateway of the default route through it (IPv4).
    pub gateway: Option<String>,
    /// Members, when it is a bridge, guests' links left out.
    pub ports: Vec<String>,
    /// Whether it is a bridge that keeps VLANs apart, so that cards of guests may have tags.
    pub vlan_aware: bool,
}

/// One interface of a container, as it is inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inner {
    /// Its name there.
    pub name: String,
    /// MAC address.
    pub mac: String,
    /// IPv4 addresses with their prefixes.
    pub ipv4: Vec<String>,
    /// IPv6 addresses with their prefixes, link-local ones too.
    pub ipv6: Vec<String>,
}

#[derive(Debug, Deserialize)]
struct Route {
    gateway: Option<String>,
    dev: Option<String>,
}

/// Reads them from the kernel.
pub async fn list() -> Result<Vec<Interface>, Error> {
    let links = shown::all().await?;
    let routes = Program::new("ip")
        .args(["-json", "-4", "route", "show", "default"])
        .run()
        .await?;
    let interfaces = interfaces(&links, &routes);
    interfaces.map_err(|error| Error::failed("read what ip printed", error))
}

/// Reads those in the network namespace of a process.
pub async fn of_process(pid: u32) -> Result<Vec<Inner>, Error> {
    let text = Program::new("nsenter")
        .arg(format!("--net=/proc/{pid}/ns/net"))
        .args(["--", "ip", "-json", "address", "show"])
        .run()
        .await?;
    parse_inner(&text).map_err(|error| Error::failed("read what ip printed", error))
}

fn parse_inner(text: &str) -> Result<Vec<Inner>, serde_json::Error> {
    let links = shown::parse(text)?;
    let inner = links.iter().map(|link| {
        let of = |family: &str| -> Vec<String> {
            let addresses = link.addr_info.iter().filter(|a| a.family == family);
            addresses
                .map(|a| format!("{}/{}", a.local, a.prefixlen))
                .collect()
        };
        Inner {
            name: link.name.clone(),
            mac: link.address.clone(),
            ipv4: of("inet"),
            ipv6: of("inet6"),
        }
    });
    Ok(inner.collect())
}

fn interfaces(links: &[Link], routes: &str) -> Result<Vec<Interface>, serde_json::Error> {
    let routes: Vec<Route> = serde_json::from_str(if routes.trim().is_empty() {
        "[]"
    } else {
        routes
    })?;
    let own: Vec<(&Link, String)> = links
        .iter()
        .filter_map(|link| Some((link, kind(link)?)))
        .collect();
    let interfaces = own.iter().map(|(link, kind)| {
        let global = |family: &'static str| {
            link.addr_info
                .iter()
                .filter(move |address| address.family == family && address.scope == "global")
                .map(|address| format!("{}/{}", address.local, address.prefixlen))
        };
        Interface {
            name: link.name.clone(),
            kind: kind.clone(),
            active: link.flags.iter().any(|flag| flag == "UP"),
            mac: link.address.clone(),
            mtu: link.mtu,
            addresses: global("inet").chain(global("inet6")).collect(),
            gateway: routes
                .iter()
                .find(|route| route.dev.as_ref() == Some(&link.name))
                .and_then(|route| route.gateway.clone()),
            ports: own
                .iter()
                .filter(|(port, _)| port.master.as_ref() == Some(&link.name))
                .map(|(port, _)| port.name.clone())
                .collect(),
            vlan_aware: link.awareness() == Some(Awareness::Aware),
        }
    });
    Ok(interfaces.collect())
}

/// PVE's word for a link's kind; none for what is not the node's own.
fn kind(link: &Link) -> Option<String> {
    match link.kind() {
        _ if link.is_ours() => None,
        None if link.link_type == "ether" => Some("eth".to_owned()),
        None | Some("veth" | "tun" | "ifb") => None,
        Some(kind) => Some(kind.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_ip_prints_is_understood() {
        let links = r#"[{"ifname":"lo","link_type":"loopback","flags":["UP"],"mtu":65536},
          {"ifname":"eth0","link_type":"ether","flags":["UP"],"mtu":1400,"address":"02:fc:00:00:00:01","master":"vmbr1",
           "addr_info":[{"family":"inet","local":"172.16.0.2","prefixlen":24,"scope":"global"},
                        {"family":"inet6","local":"fe80::1","prefixlen":64,"scope":"link"}]},
          {"ifname":"tap100i0","link_type":"ether","master":"vmbr1","linkinfo":{"info_kind":"tun"}},
          {"ifname":"vmbr1","link_type":"ether","flags":[],"mtu":1500,"linkinfo":{"info_kind":"bridge",
           "info_data":{"forward_delay":1500,"vlan_filtering":1,"bridge_id":"8000.2:fc:0:0:0:1"}}},
          {"ifname":"vmbr2","link_type":"ether","flags":[],"mtu":1500,"linkinfo":{"info_kind":"bridge",
           "info_data":{"vlan_filtering":0}}},
          {"ifname":"vmbr2v5","link_type":"ether","group":"8021","linkinfo":{"info_kind":"bridge"}}]"#;
        let routes = r#"[{"dst":"default","gateway":"172.16.0.1","dev":"eth0"}]"#;
        let found = interfaces(&shown::parse(links).unwrap(), routes).unwrap();
        let aware = found.iter().map(|found| found.vlan_aware);
        assert_eq!(aware.collect::<Vec<_>>(), [false, true, false]);
        assert_eq!((found[0].kind.as_str(), found[0].active), ("eth", true));
        assert_eq!(found[0].addresses, ["172.16.0.2/24"]);
        assert_eq!(found[0].gateway.as_deref(), Some("172.16.0.1"));
        assert_eq!((found[1].kind.as_str(), found[1].active), ("bridge", false));
        assert_eq!(found[1].ports, ["eth0"]);
        assert_eq!(interfaces(&[], "").unwrap(), []);
        let inner = parse_inner(links).unwrap();
        assert_eq!(
            (inner[1].ipv4.len(), inner[1].ipv6[0].as_str()),
            (1, "fe80::1/64")
        );
    }
}
