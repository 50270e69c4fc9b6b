// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a container's files say about it: host name, hosts, resolver, time zone, network cards, a login on the
//! console; and root's password and keys.
//!
//! Written before every start, so that the config is the truth. Which files those are is a matter of the distribution
//! (table [`distribution::DISTRIBUTIONS`]) and of how it configures its network (table [`network::WAYS`]); the texts
//! are made by pure functions. A way that no table knows is left alone. A file `.pve-ignore.NAME` beside a file keeps it
//! from being written, as PVE's users know it.

pub mod account;
pub mod distribution;
mod network;
#[cfg(test)]
mod tests;

use std::io;

use crate::guest::container::root::GuestRoot;
use distribution::{Distribution, Terminals};

pub use account::{add_root_keys, set_root_password};

/// First and last line of our part of a file that the container's owner may edit.
const BEGIN: &str = "# --- BEGIN ATOLL ---";
const END: &str = "# --- END ATOLL ---";
/// The same of PVE, whose part in an imported container becomes ours.
const PVE_BEGIN: &str = "# --- BEGIN PVE ---";
const PVE_END: &str = "# --- END PVE ---";

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
    /// Time zone: a name of its data base, or `host`; the container's own choice when absent.
    pub timezone: Option<String>,
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

/// What was found in a root file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Found {
    /// The distribution, in PVE's word.
    pub distribution: &'static str,
    /// How it configures its network; `None` when that is not known, and nothing was written for it.
    pub network: Option<&'static str>,
}

/// Writes everything. `ostype` is the config's key, for a distribution that does not say what it is.
pub fn apply(root: &GuestRoot, identity: &Identity, ostype: Option<&str>) -> io::Result<Found> {
    let distribution = distribution::of(root, ostype);
    if !distribution.is_managed {
        return Ok(Found {
            distribution: distribution.word,
            network: None,
        });
    }
    write_names(root, identity)?;
    write_resolver(root, identity)?;
    set_timezone(root, identity)?;
    write_terminals(root, distribution)?;
    let way = network::way(root, distribution);
    if let Some(way) = way {
        (way.write)(root, identity)?;
    }
    Ok(Found {
        distribution: distribution.word,
        network: way.map(|way| way.name),
    })
}

/// Writes what an OCI image gets into the container's own layer: names and resolver, which every engine puts there.
pub fn apply_to_image(upper: &GuestRoot, identity: &Identity) -> io::Result<()> {
    write_names(upper, identity)?;
    write_resolver(upper, identity)
}

/// Writes a file, unless its owner has said by a file beside it that he does that himself.
fn write(root: &GuestRoot, path: &str, text: &str, mode: u32) -> io::Result<()> {
    let (folder, name) = path.rsplit_once('/').unwrap_or((".", path));
    match root.exists(&format!("{folder}/.pve-ignore.{name}")) {
        true => Ok(()),
        false => root.write(path, text, mode),
    }
}

fn write_names(root: &GuestRoot, identity: &Identity) -> io::Result<()> {
    let short = identity.hostname.split('.').next().unwrap_or_default();
    write(root, "etc/hostname", &format!("{short}\n"), 0o644)?;
    // Older openSUSE.
    if root.exists("etc/HOSTNAME") {
        write(
            root,
            "etc/HOSTNAME",
            &format!("{}\n", identity.hostname),
            0o644,
        )?;
    }
    let hosts = root.read("etc/hosts")?.unwrap_or_default();
    let hosts = with_section(&hosts, &hosts_section(identity));
    write(root, "etc/hosts", &hosts, 0o644)
}

/// Puts a login on the console where an inittab says who is asked. systemd does so by itself.
fn write_terminals(root: &GuestRoot, distribution: &Distribution) -> io::Result<()> {
    let Terminals::Inittab(entry) = distribution.terminals else {
        return Ok(());
    };
    let Some(inittab) = root.read("etc/inittab")? else {
        return Ok(());
    };
    let text = inittab_with(&inittab, entry);
    match text == inittab {
        true => Ok(()),
        false => write(root, "etc/inittab", &text, 0o644),
    }
}

/// The container has no virtual terminals: their lines become comments, and the console gets one.
fn inittab_with(inittab: &str, entry: &str) -> String {
    let is_terminal = |line: &str| {
        let id = line.split(':').next().unwrap_or_default();
        let number = id.strip_prefix("tty").unwrap_or(id);
        line.contains("getty") && number.len() == 1 && number.bytes().all(|b| b.is_ascii_digit())
    };
    let lines = inittab.lines().map(|line| match is_terminal(line) {
        true => format!("#{line}\n"),
        false => format!("{line}\n"),
    });
    let text: String = lines.collect();
    let has_console = text
        .lines()
        .any(|line| !line.starts_with('#') && line.contains("getty") && line.contains("console"));
    match has_console {
        true => text,
        false => with_section(&text, &format!("{entry}\n")),
    }
}

/// Writes the resolver's file, if there is something to write.
fn write_resolver(root: &GuestRoot, identity: &Identity) -> io::Result<()> {
    if identity.nameservers.is_empty() {
        return Ok(());
    }
    match write(root, "etc/resolv.conf", &resolv_conf(identity), 0o644) {
        // A link into /run belongs to the container's own resolver.
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Writes the resolver's file of a container that runs, if there is something to write. A link, or no file: the
/// container has its own way, and is left to it.
pub fn overwrite_resolver(root: &GuestRoot, identity: &Identity) -> io::Result<()> {
    if !identity.nameservers.is_empty() && !root.exists("etc/.pve-ignore.resolv.conf") {
        root.overwrite("etc/resolv.conf", &resolv_conf(identity))?;
    }
    Ok(())
}

/// Makes a resolver's file, if there is none, for [`overwrite_resolver`]. In an image's upper layer before it runs: what
/// comes into it while overlayfs shows it has to be in a file that overlayfs knows.
pub fn ensure_resolver(root: &GuestRoot) -> io::Result<()> {
    if !root.exists("etc/.pve-ignore.resolv.conf") {
        root.create("etc/resolv.conf", 0o644)?;
    }
    Ok(())
}

/// Where distributions keep the data base of time zones.
const ZONES: &str = "/usr/share/zoneinfo/";

/// Sets the time zone. A container without the data base keeps its own.
fn set_timezone(root: &GuestRoot, identity: &Identity) -> io::Result<()> {
    let zone = match identity.timezone.as_deref() {
        None => return Ok(()),
        Some("host") => {
            let target = std::fs::read_link("/etc/localtime").unwrap_or_default();
            let target = target.to_string_lossy().into_owned();
            target
                .rsplit_once("zoneinfo/")
                .map(|(_, zone)| zone.to_owned())
        }
        Some(zone) => Some(zone.to_owned()),
    };
    let Some(zone) = zone else { return Ok(()) };
    if !root.exists(&format!("{ZONES}{zone}")) {
        return Ok(());
    }
    root.replace_link(&format!("{ZONES}{zone}"), "etc/localtime")?;
    if root.exists("etc/timezone") {
        root.write("etc/timezone", &format!("{zone}\n"), 0o644)?;
    }
    Ok(())
}

/// Replaces our section, or adds it at the end.
fn with_section(text: &str, section: &str) -> String {
    let ours = format!("{BEGIN}\n{section}{END}\n");
    let marked = |first: &str, last: &str| {
        let (begin, end) = (text.find(first)?, text.find(last)?);
        let after = text.get(end + last.len()..)?;
        let after = after.strip_prefix('\n').unwrap_or(after);
        (begin < end).then(|| (&text[..begin], after))
    };
    let present = marked(BEGIN, END).or_else(|| marked(PVE_BEGIN, PVE_END));
    let (before, after) = present.unwrap_or((text, ""));
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
