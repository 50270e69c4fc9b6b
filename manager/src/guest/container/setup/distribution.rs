// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Which distribution a root file system is, by its os-release(5), and what its files are like.

use super::network::Way;
use super::network::{BUSYBOX, IFCFG, INTERFACES, KEYFILE, NETWORKD, WICKED};
use crate::guest::container::root::GuestRoot;

/// Files that say what a system is, the first that is there: os-release(5).
const FILES: &[&str] = &["etc/os-release", "usr/lib/os-release"];

/// One row.
#[derive(Debug)]
pub struct Distribution {
    /// PVE's word, key `ostype`.
    pub word: &'static str,
    /// Its files are written.
    pub is_managed: bool,
    /// Names in os-release: ID, or one of ID_LIKE.
    ids: &'static [&'static str],
    /// How its network may be configured; the first of which there is a sign is taken.
    pub(super) ways: &'static [&'static Way],
    /// Who asks for a login on the console.
    pub(super) terminals: Terminals,
}

/// Who asks for a login on the console.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Terminals {
    /// Init knows by itself.
    Known,
    /// `/etc/inittab`, by this line.
    Inittab(&'static str),
}

use Terminals::{Inittab, Known};

const SYSVINIT: Terminals = Inittab("co:2345:respawn:/sbin/getty --noclear 38400 console");
const BUSYBOX_INIT: Terminals = Inittab("console::respawn:/sbin/getty 38400 console");

const fn managed(
    word: &'static str,
    ids: &'static [&'static str],
    ways: &'static [&'static Way],
    terminals: Terminals,
) -> Distribution {
    Distribution {
        word,
        is_managed: true,
        ids,
        ways,
        terminals,
    }
}

/// The rows. What derives from one of them names it in ID_LIKE.
pub const DISTRIBUTIONS: &[Distribution] = &[
    managed("debian", &["debian"], &[&INTERFACES, &NETWORKD], Known),
    managed("devuan", &["devuan"], &[&INTERFACES], SYSVINIT),
    managed("ubuntu", &["ubuntu"], &[&INTERFACES, &NETWORKD], Known),
    managed("alpine", &["alpine"], &[&BUSYBOX], BUSYBOX_INIT),
    managed("fedora", &["fedora"], &[&KEYFILE, &NETWORKD, &IFCFG], Known),
    managed(
        "centos",
        &["centos", "rhel", "rocky", "almalinux", "ol"],
        &[&KEYFILE, &IFCFG, &NETWORKD],
        Known,
    ),
    managed("openeuler", &["openEuler"], &[&KEYFILE, &IFCFG], Known),
    managed(
        "opensuse",
        &[
            "opensuse",
            "suse",
            "sles",
            "opensuse-leap",
            "opensuse-tumbleweed",
        ],
        &[&WICKED, &KEYFILE, &NETWORKD],
        Known,
    ),
    managed("archlinux", &["arch", "archarm"], &[&NETWORKD], Known),
    managed("gentoo", &["gentoo"], &[&NETWORKD], Known),
    // Its files are made from one of its own.
    Distribution {
        word: "nixos",
        is_managed: false,
        ids: &["nixos"],
        ways: &[],
        terminals: Known,
    },
    Distribution {
        word: "unmanaged",
        is_managed: false,
        ids: &[],
        ways: &[],
        terminals: Known,
    },
];

/// A system that does not say what it is, or that nobody knows: what it has is looked at.
static UNKNOWN: Distribution = managed("unmanaged", &[], &[&INTERFACES, &NETWORKD], Known);

/// The row of a root file system: what the config says, or what the system itself does.
pub fn of(root: &GuestRoot, ostype: Option<&str>) -> &'static Distribution {
    let by_word = |word: &str| DISTRIBUTIONS.iter().find(|row| row.word == word);
    ostype
        .and_then(by_word)
        .or_else(|| detect(root))
        .unwrap_or(&UNKNOWN)
}

/// What a system says that it is.
pub fn detect(root: &GuestRoot) -> Option<&'static Distribution> {
    let text = FILES
        .iter()
        .find_map(|path| root.read(path).ok().flatten())?;
    let by_id = |id: &str| DISTRIBUTIONS.iter().find(|row| row.ids.contains(&id));
    let own = field(&text, "ID").and_then(by_id);
    own.or_else(|| field(&text, "ID_LIKE")?.split(' ').find_map(by_id))
}

/// A field of os-release, without its quotation marks.
fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix('='))?;
    Some(value.trim().trim_matches(['"', '\'']))
}
