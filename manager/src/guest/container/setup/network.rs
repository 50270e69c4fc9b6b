// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! How distributions configure their network: a table of ways, each with the signs by which it is known, and what it
//! writes. The texts are pure functions of the identity.

use std::io;

use super::distribution::Distribution;
use super::{Addressing, Card, Identity, write};
use crate::guest::container::root::GuestRoot;

/// First line of files that are ours altogether.
const OURS: &str = "# written at every start\n";

/// One way.
#[derive(Debug)]
pub(super) struct Way {
    /// What it is called.
    pub(super) name: &'static str,
    /// Files of which at least one is there.
    signs: &'static [&'static str],
    /// Writes its files.
    pub(super) write: fn(&GuestRoot, &Identity) -> io::Result<()>,
}

/// Debian's ifupdown.
pub(super) const INTERFACES: Way = Way {
    name: "ifupdown",
    signs: &["sbin/ifup", "usr/sbin/ifup"],
    write: |root, identity| {
        let text = interfaces(identity, |name| format!("iface {name} inet6 auto\n"));
        write(root, "etc/network/interfaces", &text, 0o644)
    },
};

/// The same file for busybox, which has no method `auto`.
pub(super) const BUSYBOX: Way = Way {
    name: "ifupdown of busybox",
    signs: &["sbin/ifup", "usr/sbin/ifup"],
    write: |root, identity| {
        let accept = |name: &str| {
            format!(
                "iface {name} inet6 manual\n\tpre-up echo 1 > /proc/sys/net/ipv6/conf/{name}/accept_ra\n"
            )
        };
        write(
            root,
            "etc/network/interfaces",
            &interfaces(identity, accept),
            0o644,
        )
    },
};

/// systemd-networkd.
pub(super) const NETWORKD: Way = Way {
    name: "systemd-networkd",
    signs: &[
        "lib/systemd/systemd-networkd",
        "usr/lib/systemd/systemd-networkd",
    ],
    write: |root, identity| {
        for (index, card) in identity.cards.iter().enumerate() {
            // The first file that matches counts, by name; distributions bring some for every card.
            let path = format!("etc/systemd/network/05-{}.network", card.name);
            write(root, &path, &networkd(card, identity, index == 0), 0o644)?;
        }
        root.link(
            "/lib/systemd/system/systemd-networkd.service",
            "etc/systemd/system/multi-user.target.wants/systemd-networkd.service",
        )
    },
};

/// NetworkManager's key files.
pub(super) const KEYFILE: Way = Way {
    name: "NetworkManager",
    signs: &["usr/sbin/NetworkManager"],
    write: |root, identity| {
        for (index, card) in identity.cards.iter().enumerate() {
            let path = format!(
                "etc/NetworkManager/system-connections/{}.nmconnection",
                card.name
            );
            // It does not read a file that others may.
            write(root, &path, &keyfile(card, identity, index == 0), 0o600)?;
        }
        Ok(())
    },
};

/// The scripts of Red Hat's older systems.
pub(super) const IFCFG: Way = Way {
    name: "network-scripts",
    signs: &["etc/sysconfig/network-scripts"],
    write: |root, identity| {
        if !root.exists("etc/sysconfig/network") {
            write(root, "etc/sysconfig/network", "NETWORKING=yes\n", 0o644)?;
        }
        for card in &identity.cards {
            let path = format!("etc/sysconfig/network-scripts/ifcfg-{}", card.name);
            write(root, &path, &ifcfg(card), 0o644)?;
        }
        Ok(())
    },
};

/// openSUSE's wicked.
pub(super) const WICKED: Way = Way {
    name: "wicked",
    signs: &["usr/sbin/wicked"],
    write: |root, identity| {
        for card in &identity.cards {
            let name = &card.name;
            let folder = "etc/sysconfig/network";
            write(
                root,
                &format!("{folder}/ifcfg-{name}"),
                &wicked(card),
                0o644,
            )?;
            write(
                root,
                &format!("{folder}/ifroute-{name}"),
                &wicked_routes(card),
                0o644,
            )?;
        }
        Ok(())
    },
};

/// The way of a root file system, if one is known.
pub(super) fn way(root: &GuestRoot, distribution: &Distribution) -> Option<&'static Way> {
    let is_there = |way: &&&Way| way.signs.iter().any(|sign| root.exists(sign));
    distribution.ways.iter().find(is_there).copied()
}

fn interfaces(identity: &Identity, auto: impl Fn(&str) -> String) -> String {
    let mut text = format!("{OURS}auto lo\niface lo inet loopback\n");
    for card in &identity.cards {
        let name = &card.name;
        text.push_str(&format!("\nauto {name}\n"));
        for (family, addressing) in [("inet", &card.ipv4), ("inet6", &card.ipv6)] {
            let stanza = match addressing {
                Addressing::Manual if family == "inet" => format!("iface {name} inet manual\n"),
                Addressing::Manual => String::new(),
                Addressing::Dhcp => format!("iface {name} {family} dhcp\n"),
                Addressing::Auto => auto(name),
                Addressing::Static { address, gateway } => {
                    let gateway = gateway
                        .as_ref()
                        .map_or(String::new(), |g| format!("\tgateway {g}\n"));
                    format!("iface {name} {family} static\n\taddress {address}\n{gateway}")
                }
            };
            text.push_str(&stanza);
        }
    }
    text
}

/// Fixed addresses of a card with their gateways.
fn fixed(card: &Card) -> impl Iterator<Item = (&str, Option<&str>)> {
    [&card.ipv4, &card.ipv6]
        .into_iter()
        .filter_map(|addressing| match addressing {
            Addressing::Static { address, gateway } => Some((address.as_str(), gateway.as_deref())),
            _ => None,
        })
}

fn networkd(card: &Card, identity: &Identity, is_first: bool) -> String {
    let dhcp = match (&card.ipv4, &card.ipv6) {
        (Addressing::Dhcp, Addressing::Dhcp) => "yes",
        (Addressing::Dhcp, _) => "ipv4",
        (_, Addressing::Dhcp) => "ipv6",
        _ => "no",
    };
    let advertisements = matches!(card.ipv6, Addressing::Auto | Addressing::Dhcp);
    let mut text = format!(
        "{OURS}[Match]\nName={}\n\n[Network]\nDHCP={dhcp}\nIPv6AcceptRA={}\n",
        card.name,
        if advertisements { "yes" } else { "no" },
    );
    for (address, gateway) in fixed(card) {
        text.push_str(&format!("Address={address}\n"));
        if let Some(gateway) = gateway {
            text.push_str(&format!("Gateway={gateway}\n"));
        }
    }
    if is_first {
        let servers = identity.nameservers.iter();
        text.extend(servers.map(|server| format!("DNS={server}\n")));
        if !identity.search_domains.is_empty() {
            text.push_str(&format!("Domains={}\n", identity.search_domains.join(" ")));
        }
    }
    text
}

fn keyfile(card: &Card, identity: &Identity, is_first: bool) -> String {
    let mut text = format!(
        "{OURS}[connection]\nid={0}\ntype=ethernet\ninterface-name={0}\n",
        card.name
    );
    let families = [
        ("ipv4", &card.ipv4, "disabled"),
        ("ipv6", &card.ipv6, "ignore"),
    ];
    for (family, addressing, none) in families {
        text.push_str(&format!("\n[{family}]\n"));
        let method = match addressing {
            Addressing::Manual => none,
            Addressing::Dhcp if family == "ipv6" => "dhcp",
            Addressing::Dhcp | Addressing::Auto => "auto",
            Addressing::Static { .. } => "manual",
        };
        text.push_str(&format!("method={method}\n"));
        if let Addressing::Static { address, gateway } = addressing {
            let gateway = gateway.as_ref().map_or(String::new(), |g| format!(",{g}"));
            text.push_str(&format!("address1={address}{gateway}\n"));
        }
        let is_own = |server: &&String| server.contains(':') == (family == "ipv6");
        let servers: Vec<&String> = identity.nameservers.iter().filter(is_own).collect();
        if is_first && method != none {
            text.extend((!servers.is_empty()).then(|| format!("dns={}\n", list(&servers))));
            let domains: Vec<&String> = identity.search_domains.iter().collect();
            text.extend((!domains.is_empty()).then(|| format!("dns-search={}\n", list(&domains))));
        }
    }
    text
}

/// A list as key files have it: each item ends in a semicolon.
fn list(items: &[&String]) -> String {
    items.iter().map(|item| format!("{item};")).collect()
}

fn ifcfg(card: &Card) -> String {
    let protocol = match card.ipv4 {
        Addressing::Dhcp => "dhcp",
        Addressing::Static { .. } => "static",
        _ => "none",
    };
    let mut text = format!(
        "{OURS}DEVICE={}\nONBOOT=yes\nBOOTPROTO={protocol}\n",
        card.name
    );
    if let Addressing::Static { address, gateway } = &card.ipv4 {
        let (address, prefix) = address.split_once('/').unwrap_or((address, "32"));
        text.push_str(&format!("IPADDR={address}\nPREFIX={prefix}\n"));
        text.extend(
            gateway
                .as_ref()
                .map(|gateway| format!("GATEWAY={gateway}\n")),
        );
    }
    match &card.ipv6 {
        Addressing::Manual => {}
        Addressing::Auto => text.push_str("IPV6INIT=yes\nIPV6_AUTOCONF=yes\n"),
        Addressing::Dhcp => text.push_str("IPV6INIT=yes\nIPV6_AUTOCONF=no\nDHCPV6C=yes\n"),
        Addressing::Static { address, gateway } => {
            text.push_str(&format!(
                "IPV6INIT=yes\nIPV6_AUTOCONF=no\nIPV6ADDR={address}\n"
            ));
            text.extend(
                gateway
                    .as_ref()
                    .map(|gateway| format!("IPV6_DEFAULTGW={gateway}\n")),
            );
        }
    }
    text
}

fn wicked(card: &Card) -> String {
    let protocol = match (&card.ipv4, &card.ipv6) {
        (Addressing::Dhcp, Addressing::Dhcp) => "dhcp",
        (Addressing::Dhcp, _) => "dhcp4",
        (_, Addressing::Dhcp) => "dhcp6",
        _ if fixed(card).next().is_some() => "static",
        _ => "none",
    };
    let mut text = format!("{OURS}STARTMODE=auto\nBOOTPROTO={protocol}\n");
    for (index, (address, _)) in fixed(card).enumerate() {
        text.push_str(&format!("IPADDR_{index}={address}\n"));
    }
    text
}

fn wicked_routes(card: &Card) -> String {
    let gateways = fixed(card).filter_map(|(_, gateway)| gateway);
    let routes = gateways.map(|gateway| format!("default {gateway} - {}\n", card.name));
    std::iter::once(OURS.to_owned()).chain(routes).collect()
}
