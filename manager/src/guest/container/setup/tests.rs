// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Golden tests on fake roots: what each distribution's files become. `UPDATE_EXPECT=1` writes them anew.

use std::fmt::Write as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;

use super::*;

fn identity() -> Identity {
    let fixed = |address: &str, gateway: &str| Addressing::Static {
        address: address.to_owned(),
        gateway: Some(gateway.to_owned()),
    };
    Identity {
        hostname: "web.example.org".to_owned(),
        cards: vec![
            Card {
                name: "eth0".to_owned(),
                ipv4: fixed("10.0.0.2/24", "10.0.0.1"),
                ipv6: fixed("fd00::2/64", "fd00::1"),
            },
            Card {
                name: "eth1".to_owned(),
                ipv4: Addressing::Dhcp,
                ipv6: Addressing::Auto,
            },
            Card {
                name: "eth2".to_owned(),
                ipv4: Addressing::Manual,
                ipv6: Addressing::Dhcp,
            },
        ],
        nameservers: vec!["10.0.0.1".to_owned(), "fd00::1".to_owned()],
        search_domains: vec!["example.org".to_owned()],
        timezone: Some("Europe/Vienna".to_owned()),
    }
}

/// What a fake root has: paths and texts; a path that ends in a slash is a folder.
type Tree = &'static [(&'static str, &'static str)];

fn plant(folder: &Path, tree: Tree) {
    for (path, text) in tree {
        let path = folder.join(path);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        if path.as_os_str().as_encoded_bytes().ends_with(b"/") {
            std::fs::create_dir_all(&path).unwrap();
        } else {
            std::fs::write(&path, text).unwrap();
        }
    }
}

/// Every file below `etc` with its mode and text, every link with its target.
fn dump(folder: &Path) -> String {
    let (mut text, mut pending) = (String::new(), vec![folder.join("etc")]);
    let mut files = Vec::new();
    while let Some(folder) = pending.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() && !path.is_symlink() {
                true => pending.push(path),
                false => files.push(path),
            }
        }
    }
    files.sort();
    for path in files {
        let name = path.strip_prefix(folder).unwrap().display().to_string();
        if let Ok(target) = path.read_link() {
            writeln!(text, "== {name} -> {}", target.display()).unwrap();
            continue;
        }
        let mode = path.metadata().unwrap().permissions().mode() & 0o777;
        writeln!(text, "== {name} {mode:o}").unwrap();
        text.push_str(&std::fs::read_to_string(&path).unwrap());
    }
    text
}

/// Sets a fake root up, twice alike, and compares it with the golden file of that name.
#[track_caller]
fn check(name: &str, tree: Tree, found: (&str, Option<&str>)) {
    let folder = tempfile::tempdir().unwrap();
    plant(folder.path(), tree);
    let root = GuestRoot::open(folder.path()).unwrap();
    for _ in 0..2 {
        let result = apply(&root, &identity(), None).unwrap();
        assert_eq!((result.distribution, result.network), found, "{name}");
    }
    let golden = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("src/guest/container/setup/golden")
        .join(format!("{name}.txt"));
    expect_test::expect_file![golden].assert_eq(&dump(folder.path()));
}

const ZONE: (&str, &str) = ("usr/share/zoneinfo/Europe/Vienna", "");
const NETWORKD: (&str, &str) = ("usr/lib/systemd/systemd-networkd", "");
const MANAGER: (&str, &str) = ("usr/sbin/NetworkManager", "");

#[test]
fn debian_and_its_like() {
    check(
        "debian",
        &[
            (
                "etc/os-release",
                "PRETTY_NAME=\"Debian GNU/Linux 12\"\nID=debian\n",
            ),
            ("usr/sbin/ifup", ""),
            (
                "etc/hosts",
                "127.0.0.1 localhost\n# --- BEGIN PVE ---\n10.9.9.9 old\n# --- END PVE ---\nmine\n",
            ),
            ("etc/timezone", "Etc/UTC\n"),
            ZONE,
        ],
        ("debian", Some("ifupdown")),
    );
    check(
        "ubuntu",
        &[
            ("etc/os-release", "ID=ubuntu\nID_LIKE=debian\n"),
            NETWORKD,
            ZONE,
        ],
        ("ubuntu", Some("systemd-networkd")),
    );
    let inittab = "id:2:initdefault:\nca:12345:ctrlaltdel:/sbin/shutdown -t1 -a -r now\n\
                   1:2345:respawn:/sbin/getty --noclear 38400 tty1\n2:23:respawn:/sbin/getty 38400 tty2\n";
    let devuan: Tree = Box::leak(Box::new([
        ("etc/os-release", "ID=devuan\n"),
        ("sbin/ifup", ""),
        ("etc/inittab", inittab),
    ]));
    check("devuan", devuan, ("devuan", Some("ifupdown")));
    let mint: Tree = &[(
        "usr/lib/os-release",
        "ID=linuxmint\nID_LIKE=\"ubuntu debian\"\n",
    )];
    check("mint", mint, ("ubuntu", None));
}

#[test]
fn alpine() {
    let inittab = "::sysinit:/sbin/openrc sysinit\ntty1::respawn:/sbin/getty 38400 tty1\n\
                   tty2::respawn:/sbin/getty 38400 tty2\n::shutdown:/sbin/openrc shutdown\n";
    let tree: Tree = Box::leak(Box::new([
        ("etc/os-release", "NAME=\"Alpine Linux\"\nID=alpine\n"),
        ("sbin/ifup", ""),
        ("etc/inittab", inittab),
    ]));
    check("alpine", tree, ("alpine", Some("ifupdown of busybox")));
}

#[test]
fn red_hat_and_its_like() {
    check(
        "fedora",
        &[("etc/os-release", "ID=fedora\n"), MANAGER, NETWORKD, ZONE],
        ("fedora", Some("NetworkManager")),
    );
    check(
        "rocky",
        &[
            (
                "etc/os-release",
                "ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n",
            ),
            MANAGER,
            ("etc/sysconfig/network-scripts/readme", "x\n"),
        ],
        ("centos", Some("NetworkManager")),
    );
    check(
        "centos7",
        &[
            ("etc/os-release", "ID=\"centos\"\n"),
            ("etc/sysconfig/network-scripts/ifup", "x\n"),
        ],
        ("centos", Some("network-scripts")),
    );
}

#[test]
fn opensuse() {
    check(
        "leap",
        &[
            (
                "etc/os-release",
                "ID=\"opensuse-leap\"\nID_LIKE=\"suse opensuse\"\n",
            ),
            ("usr/sbin/wicked", ""),
            ("etc/HOSTNAME", "old\n"),
        ],
        ("opensuse", Some("wicked")),
    );
    check(
        "tumbleweed",
        &[
            ("usr/lib/os-release", "ID=\"opensuse-tumbleweed\"\n"),
            ("etc/hosts", ""),
            MANAGER,
        ],
        ("opensuse", Some("NetworkManager")),
    );
}

#[test]
fn arch_and_those_that_nobody_knows() {
    check(
        "arch",
        &[
            ("usr/lib/os-release", "ID=arch\n"),
            ("etc/hosts", ""),
            NETWORKD,
        ],
        ("archlinux", Some("systemd-networkd")),
    );
    check(
        "unknown",
        &[("etc/os-release", "ID=mine\n"), ("usr/sbin/ifup", "")],
        ("unmanaged", Some("ifupdown")),
    );
    check(
        "nixos",
        &[("etc/os-release", "ID=nixos\n")],
        ("nixos", None),
    );
}

#[test]
fn the_config_and_the_owner_have_the_last_word() {
    let folder = tempfile::tempdir().unwrap();
    plant(
        folder.path(),
        &[("etc/os-release", "ID=debian\n"), ("sbin/ifup", "")],
    );
    let root = GuestRoot::open(folder.path()).unwrap();
    let before = dump(folder.path());
    let found = apply(&root, &identity(), Some("unmanaged")).unwrap();
    assert_eq!((found.distribution, found.network), ("unmanaged", None));
    assert_eq!(dump(folder.path()), before, "nothing is written");

    std::fs::write(folder.path().join("etc/.pve-ignore.hosts"), "").unwrap();
    std::fs::write(folder.path().join("etc/hosts"), "mine\n").unwrap();
    apply(&root, &identity(), Some("debian")).unwrap();
    assert_eq!(root.read("etc/hosts").unwrap().as_deref(), Some("mine\n"));
    assert!(root.exists("etc/network/interfaces"));
}

#[test]
fn a_hostile_root_leads_nowhere() {
    let folder = tempfile::tempdir().unwrap();
    let outside = folder.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("kept"), "kept").unwrap();
    let path = folder.path().join("root");
    plant(
        &path,
        &[
            ("usr/lib/os-release", "ID=debian\n"),
            ("usr/sbin/ifup", ""),
            ZONE,
            ("etc/x", ""),
        ],
    );
    let up = "../../../../../../../../../../..";
    let host = format!("{up}{}", outside.display());
    symlink(format!("{host}/kept"), path.join("etc/hosts")).unwrap();
    symlink(outside.join("kept"), path.join("etc/hostname")).unwrap();
    symlink(format!("{host}/new"), path.join("etc/resolv.conf")).unwrap();
    symlink(&outside, path.join("etc/network")).unwrap();
    symlink(outside.join("kept"), path.join("etc/localtime")).unwrap();
    let root = GuestRoot::open(&path).unwrap();
    // A link to what is not there may fail; nothing of the host is touched either way.
    let _ = apply(&root, &identity(), None);
    for (write, ostype) in [
        ("etc/systemd", "archlinux"),
        ("etc/NetworkManager", "fedora"),
    ] {
        symlink(&outside, path.join(write)).unwrap();
        plant(&path, &[NETWORKD, MANAGER]);
        let _ = apply(&root, &identity(), Some(ostype));
    }
    let names: Vec<_> = std::fs::read_dir(&outside).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    assert_eq!(
        std::fs::read_to_string(outside.join("kept")).unwrap(),
        "kept"
    );
}

#[test]
fn what_the_owner_wrote_stays() {
    let once = with_section("10.9.9.9 mine", &hosts_section(&identity()));
    assert!(once.starts_with("10.9.9.9 mine\n# --- BEGIN ATOLL ---\n127.0.0.1 localhost\n"));
    assert!(once.contains("\n10.0.0.2 web.example.org web\n"));
    let edited = format!("{once}10.8.8.8 also mine\n");
    assert_eq!(with_section(&edited, &hosts_section(&identity())), edited);
}
