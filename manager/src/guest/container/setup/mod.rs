// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a container's files say about it: host name, hosts, resolver, network cards, root's password and keys.
//!
//! Written before every start, so that the config is the truth. The texts are made by pure functions; `apply`
//! writes them. A distribution that configures its network in a third way is left alone.

use std::io;

use crate::guest::container::root::GuestRoot;

/// First and last line of our part of a file that the container's owner may edit.
const BEGIN: &str = "# --- BEGIN ATOLL ---";
const END: &str = "# --- END ATOLL ---";

/// What the files are made from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// Host name, possibly with a domain.
    pub hostname: String,
    /// Network cards.
    pub cards: Vec<Card>,
    /// Name servers; the container's own choice when empty.
    pub nameservers: Vec<String>,
    /// Search domains.
    pub search_domains: Vec<String>,
}

/// One network card as the container's files describe it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Card {
    /// Name in the container.
    pub name: String,
    /// IPv4.
    pub ipv4: Addressing,
    /// IPv6.
    pub ipv6: Addressing,
}

/// Where a card's address comes from.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum Addressing {
    /// The container's own matter.
    #[default]
    Manual,
    /// DHCP.
    Dhcp,
    /// IPv6 router advertisements.
    Auto,
    /// A fixed address with its prefix, and the gateway of the default route.
    Static {
        /// `10.0.0.2/24`.
        address: String,
        /// Gateway, if there is a default route.
        gateway: Option<String>,
    },
}

/// How a distribution configures its network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flavor {
    /// `/etc/network/interfaces`, read by ifupdown or busybox.
    Interfaces,
    /// `/etc/systemd/network/*.network`.
    Networkd,
    /// Some other way.
    Unknown,
}

/// Looks at a root file system.
pub fn flavor(root: &GuestRoot) -> Flavor {
    let any = |paths: &[&str]| paths.iter().any(|path| root.exists(path));
    if any(&["sbin/ifup", "usr/sbin/ifup"]) {
        Flavor::Interfaces
    } else if any(&[
        "lib/systemd/systemd-networkd",
        "usr/lib/systemd/systemd-networkd",
    ]) {
        Flavor::Networkd
    } else {
        Flavor::Unknown
    }
}

/// Writes everything.
pub fn apply(root: &GuestRoot, identity: &Identity) -> io::Result<Flavor> {
    let short = identity.hostname.split('.').next().unwrap_or_default();
    root.write("etc/hostname", &format!("{short}\n"), 0o644)?;
    let hosts = root.read("etc/hosts")?.unwrap_or_default();
    root.write(
        "etc/hosts",
        &with_section(&hosts, &hosts_section(identity)),
        0o644,
    )?;
    if !identity.nameservers.is_empty() {
        match root.write("etc/resolv.conf", &resolv_conf(identity), 0o644) {
            // A link into /run belongs to the container's own resolver.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
    }
    let flavor = flavor(root);
    match flavor {
        Flavor::Interfaces => {
            root.write("etc/network/interfaces", &interfaces(identity), 0o644)?;
        }
        Flavor::Networkd => {
            for card in &identity.cards {
                let path = format!("etc/systemd/network/{}.network", card.name);
                root.write(&path, &networkd(card), 0o644)?;
            }
            root.link(
                "/lib/systemd/system/systemd-networkd.service",
                "etc/systemd/system/multi-user.target.wants/systemd-networkd.service",
            )?;
        }
        Flavor::Unknown => {}
    }
    Ok(flavor)
}

/// Sets root's password, given as a crypt(3) hash.
pub fn set_root_password(root: &GuestRoot, hash: &str) -> io::Result<()> {
    let shadow = root.read("etc/shadow")?.unwrap_or_default();
    let text = shadow_with(&shadow, hash);
    root.write("etc/shadow", &text, 0o640)
}

/// Adds SSH public keys for root.
pub fn add_root_keys(root: &GuestRoot, keys: &str) -> io::Result<()> {
    let path = "root/.ssh/authorized_keys";
    let mut text = root.read(path)?.unwrap_or_default();
    for key in keys.lines().map(str::trim).filter(|key| !key.is_empty()) {
        if !text.lines().any(|line| line == key) {
            text.push_str(key);
            text.push('\n');
        }
    }
    // sshd ignores keys in a folder that others may write to; 0755 is fine, 0600 for the file.
    root.write(path, &text, 0o600)
}

fn shadow_with(shadow: &str, hash: &str) -> String {
    let mut found = false;
    let mut lines: Vec<String> = shadow
        .lines()
        .map(|line| match line.strip_prefix("root:") {
            Some(rest) => {
                found = true;
                let after = rest.split_once(':').map_or("::::::", |(_, after)| after);
                format!("root:{hash}:{after}")
            }
            None => line.to_owned(),
        })
        .collect();
    if !found {
        lines.insert(0, format!("root:{hash}:19000:0:99999:7:::"));
    }
    lines.join("\n") + "\n"
}

/// Replaces our section, or adds it at the end.
fn with_section(text: &str, section: &str) -> String {
    let ours = format!("{BEGIN}\n{section}{END}\n");
    let (before, after) = match (text.find(BEGIN), text.find(END)) {
        (Some(begin), Some(end)) if begin < end => {
            let after = &text[end + END.len()..];
            (&text[..begin], after.strip_prefix('\n').unwrap_or(after))
        }
        _ => (text, ""),
    };
    let gap = if before.is_empty() || before.ends_with('\n') {
        ""
    } else {
        "\n"
    };
    format!("{before}{gap}{ours}{after}")
}

fn hosts_section(identity: &Identity) -> String {
    let short = identity.hostname.split('.').next().unwrap_or_default();
    let names = if short == identity.hostname {
        short.to_owned()
    } else {
        format!("{} {short}", identity.hostname)
    };
    let own = identity.cards.iter().find_map(|card| match &card.ipv4 {
        Addressing::Static { address, .. } => address.split('/').next(),
        _ => None,
    });
    format!(
        "127.0.0.1 localhost\n::1 localhost ip6-localhost ip6-loopback\n{} {names}\n",
        own.unwrap_or("127.0.1.1")
    )
}

fn resolv_conf(identity: &Identity) -> String {
    let mut text = String::new();
    if !identity.search_domains.is_empty() {
        text.push_str(&format!("search {}\n", identity.search_domains.join(" ")));
    }
    for server in &identity.nameservers {
        text.push_str(&format!("nameserver {server}\n"));
    }
    text
}

fn interfaces(identity: &Identity) -> String {
    let mut text = "# written at every start\nauto lo\niface lo inet loopback\n".to_owned();
    for card in &identity.cards {
        let name = &card.name;
        text.push_str(&format!("\nauto {name}\n"));
        for (family, addressing) in [("inet", &card.ipv4), ("inet6", &card.ipv6)] {
            let stanza = match addressing {
                Addressing::Manual if family == "inet" => format!("iface {name} inet manual\n"),
                Addressing::Manual => String::new(),
                Addressing::Dhcp => format!("iface {name} {family} dhcp\n"),
                Addressing::Auto => format!("iface {name} {family} auto\n"),
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

fn networkd(card: &Card) -> String {
    let dhcp = match (&card.ipv4, &card.ipv6) {
        (Addressing::Dhcp, Addressing::Dhcp) => "yes",
        (Addressing::Dhcp, _) => "ipv4",
        (_, Addressing::Dhcp) => "ipv6",
        _ => "no",
    };
    let advertisements = matches!(card.ipv6, Addressing::Auto | Addressing::Dhcp);
    let mut text = format!(
        "# written at every start\n[Match]\nName={}\n\n[Network]\nDHCP={dhcp}\nIPv6AcceptRA={}\n",
        card.name,
        if advertisements { "yes" } else { "no" },
    );
    for addressing in [&card.ipv4, &card.ipv6] {
        if let Addressing::Static { address, gateway } = addressing {
            text.push_str(&format!("Address={address}\n"));
            if let Some(gateway) = gateway {
                text.push_str(&format!("Gateway={gateway}\n"));
            }
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            hostname: "web.example.org".to_owned(),
            cards: vec![
                Card {
                    name: "eth0".to_owned(),
                    ipv4: Addressing::Static {
                        address: "10.0.0.2/24".to_owned(),
                        gateway: Some("10.0.0.1".to_owned()),
                    },
                    ipv6: Addressing::Manual,
                },
                Card {
                    name: "eth1".to_owned(),
                    ipv4: Addressing::Dhcp,
                    ipv6: Addressing::Auto,
                },
            ],
            nameservers: vec!["10.0.0.1".to_owned()],
            search_domains: vec!["example.org".to_owned()],
        }
    }

    #[test]
    fn interfaces_file() {
        assert_eq!(
            interfaces(&identity()),
            "# written at every start\nauto lo\niface lo inet loopback\n\n\
             auto eth0\niface eth0 inet static\n\taddress 10.0.0.2/24\n\tgateway 10.0.0.1\n\n\
             auto eth1\niface eth1 inet dhcp\niface eth1 inet6 auto\n"
        );
    }

    #[test]
    fn networkd_files() {
        let identity = identity();
        assert_eq!(
            networkd(&identity.cards[0]),
            "# written at every start\n[Match]\nName=eth0\n\n[Network]\nDHCP=no\nIPv6AcceptRA=no\n\
             Address=10.0.0.2/24\nGateway=10.0.0.1\n"
        );
        assert!(networkd(&identity.cards[1]).contains("DHCP=ipv4\nIPv6AcceptRA=yes\n"));
    }

    #[test]
    fn what_the_owner_wrote_stays() {
        let once = with_section("10.9.9.9 mine", &hosts_section(&identity()));
        assert!(once.starts_with("10.9.9.9 mine\n# --- BEGIN ATOLL ---\n127.0.0.1 localhost\n"));
        assert!(once.contains("\n10.0.0.2 web.example.org web\n"));
        let edited = format!("{once}10.8.8.8 also mine\n");
        assert_eq!(with_section(&edited, &hosts_section(&identity())), edited);
    }

    #[test]
    fn the_password_of_root_alone_changes() {
        let shadow = "daemon:*:1:0:::::\nroot:*:2:0:99999:7:::\n";
        assert_eq!(
            shadow_with(shadow, "$6$x"),
            "daemon:*:1:0:::::\nroot:$6$x:2:0:99999:7:::\n"
        );
        assert_eq!(shadow_with("", "$6$x"), "root:$6$x:19000:0:99999:7:::\n");
    }

    #[test]
    fn a_root_is_set_up_twice_alike() {
        let folder = tempfile::tempdir().unwrap();
        let root = GuestRoot::open(folder.path()).unwrap();
        root.write("lib/systemd/systemd-networkd", "", 0o755)
            .unwrap();
        for _ in 0..2 {
            assert_eq!(apply(&root, &identity()).unwrap(), Flavor::Networkd);
            add_root_keys(&root, "ssh-ed25519 AAAA me\n\n").unwrap();
        }
        assert_eq!(root.read("etc/hostname").unwrap().as_deref(), Some("web\n"));
        assert_eq!(
            root.read("etc/resolv.conf").unwrap().as_deref(),
            Some("search example.org\nnameserver 10.0.0.1\n")
        );
        assert_eq!(
            root.read("root/.ssh/authorized_keys").unwrap().as_deref(),
            Some("ssh-ed25519 AAAA me\n")
        );
        assert!(root.exists("etc/systemd/network/eth1.network"));
    }
}
