// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Cards with a tag on a bridge that is not VLAN-aware: what their ends carry, seen from a switch behind the bridge's
//! uplink.
//!
//! ```text
//! guest (namespace) ── veth100i0 / tap100i1 ── vmbr0v100 ── eth7.100 ─ eth7 ══ switch ─ switch.100, switch.200
//! ```
//! Kernels without VLAN devices, such as the test machines', are told by trying; the lab shows the same with guests.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod world;

use std::process::{Child, Command};

use atoll_manager::id::GuestId;
use atoll_manager::network::interfaces;
use atoll_manager::network::link::{self, Attachment, Inside};
use atoll_manager::network::vlan::Vlans;
use atoll_manager::{Node, Settings};

const UPLINK: &str = "set -e
echo 1 >/proc/sys/net/ipv4/conf/all/arp_ignore
ip link set lo up
ip link add vmbr0 type bridge ageing_time 12300 mcast_snooping 0
ip link add eth7 type veth peer name switch
ip link set eth7 master vmbr0 mtu 4000
ip link set vmbr0 mtu 3000
for link in vmbr0 eth7 switch; do ip link set $link up; done";

/// Devices of the switch: those of VLANs 100 and 200, and of VLAN 100 in VLAN 5.
const SWITCH: &str = "set -e
vlan() { ip link add link $1 name $1.$2 type vlan id $2; ip address add $3/24 dev $1.$2; ip link set $1.$2 up; }
vlan switch 100 10.1.0.1
vlan switch 200 10.2.0.1
vlan switch 5 10.3.0.1
vlan switch.5 100 10.4.0.1";

#[track_caller]
fn sh(script: &str) -> String {
    world::run("sh", &["-c", script])
}

/// Whether this kernel has VLAN devices.
fn has_vlans() -> bool {
    let tried = "ip link add link eth7 name tried type vlan id 9 && ip link delete tried";
    let made = Command::new("sh").args(["-c", tried]).output().unwrap();
    if !made.status.success() {
        println!("ATOLL-SKIP: this kernel has no VLAN devices (8021q)");
    }
    made.status.success()
}

fn guest() -> GuestId {
    world::guest_number().try_into().unwrap()
}

fn attachment(bridge: &str, tag: Option<&str>) -> Attachment {
    Attachment {
        card: "net0".to_owned(),
        bridge: Some(bridge.to_owned()),
        vlans: Vlans::new("net0", tag, None).unwrap(),
        mtu: None,
        link_down: false,
        multi_queue: false,
        rate: None,
    }
}

/// Links that are there for a VLAN, with their MTU and bridge.
fn devices() -> String {
    let shown = sh("ip -o link show group 8021");
    let field = |line: &str, name: &str| {
        let mut words = line.split_whitespace().skip_while(|word| *word != name);
        words.nth(1).unwrap_or("-").to_owned()
    };
    let mut lines: Vec<String> = shown
        .lines()
        .map(|line| {
            let name = line.split([':', '@']).nth(1).unwrap().trim();
            format!("{name} {} {}", field(line, "mtu"), field(line, "master"))
        })
        .collect();
    lines.sort();
    lines.join(", ")
}

/// A guest's place: a process with a network namespace of its own.
struct Place(Child);

impl Place {
    fn new() -> Self {
        let place = Self(
            Command::new("unshare")
                .args(["--net", "sleep", "600"])
                .spawn()
                .unwrap(),
        );
        let own = std::fs::read_link("/proc/self/ns/net").unwrap();
        world::until("a namespace", || {
            std::fs::read_link(format!("/proc/{}/ns/net", place.0.id())).is_ok_and(|it| it != own)
        });
        place
    }

    fn sh(&self, script: &str) -> std::process::Output {
        Command::new("nsenter")
            .arg(format!("--net=/proc/{}/ns/net", self.0.id()))
            .args(["--", "sh", "-c", script])
            .output()
            .unwrap()
    }

    #[track_caller]
    fn reaches(&self, address: &str) {
        world::until(address, || {
            let script = format!("ping -q -c 1 -W 2 {address}");
            self.sh(&script).status.success()
        });
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn inside(address: &str) -> Inside {
    Inside {
        name: "eth0".to_owned(),
        mac: "02:00:00:00:00:07".to_owned(),
        addresses: vec![address.to_owned()],
        gateways: Vec::new(),
    }
}

/// Bytes that a link has received.
fn received(name: &str) -> u64 {
    let all = link::traffic().into_iter();
    all.filter(|(link, _)| link == name)
        .map(|(_, traffic)| traffic.received_bytes)
        .sum()
}

#[test]
fn a_containers_end_is_in_its_vlan_alone() {
    world::isolated("a_containers_end_is_in_its_vlan_alone", async || {
        sh(UPLINK);
        if !has_vlans() {
            return;
        }
        sh(SWITCH);
        let (guest, place) = (guest(), Place::new());
        let name = link::veth_name(guest, 0);
        let tagged = attachment("vmbr0", Some("100"));
        link::create_veth(guest, 0, &tagged).await.unwrap();
        let there = "eth7.100 4000 vmbr0v100, vmbr0v100 3000 -";
        assert_eq!(devices(), there);
        assert_eq!(
            sh("cat /proc/sys/net/ipv6/conf/vmbr0v100/disable_ipv6 2>/dev/null || echo 1"),
            "1\n"
        );
        let settings = sh("ip -d link show vmbr0v100");
        assert!(
            settings.contains("ageing_time 12300") && settings.contains("mcast_snooping 0"),
            "{settings}"
        );
        let pid = place.0.id();
        link::move_veth(guest, 0, pid, &inside("10.1.0.9/24"))
            .await
            .unwrap();
        // What it asks all of its VLAN for is heard there, and nowhere else.
        place.sh("ip address add 10.2.0.9/24 dev eth0; ping -c 1 -W 1 10.2.0.1");
        place.reaches("10.1.0.1");
        assert_eq!((received("switch.200"), received("switch.5")), (0, 0));

        // Another daemon finds what there is, and makes nothing anew.
        let numbers =
            || sh("for it in vmbr0v100 eth7.100; do ip -o link show dev $it | cut -d: -f1; done");
        let before = numbers();
        link::create_veth(guest, 1, &tagged).await.unwrap();
        network_of_another_daemon().await;
        assert_eq!(numbers(), before);
        link::delete(&link::veth_name(guest, 1)).await.unwrap();
        place.reaches("10.1.0.1");

        // It moves, from VLAN to VLAN and to none.
        let other = attachment("vmbr0", Some("200"));
        link::change(&name, &tagged, &other).await.unwrap();
        assert_eq!(devices(), "eth7.200 4000 vmbr0v200, vmbr0v200 3000 -");
        place.reaches("10.2.0.1");
        let plain = attachment("vmbr0", None);
        link::change(&name, &other, &plain).await.unwrap();
        assert_eq!(devices(), "");
        assert!(sh("ip -o link show master vmbr0").contains(&name));
        link::change(&name, &plain, &tagged).await.unwrap();
        assert_eq!(devices(), there);
        place.reaches("10.1.0.1");

        // The kernel removes the pair with its namespace; the devices go when somebody looks.
        drop(place);
        world::until("the pair's end", || !link::exists(&name));
        network_of_another_daemon().await;
        assert_eq!(devices(), "");
    });
}

/// What a daemon does with the network at its start, and now and then.
async fn network_of_another_daemon() {
    let state = tempfile::tempdir().unwrap();
    let mut settings = Settings::new("n1", state.path());
    settings.bridge = "vmbr9".to_owned();
    let node = Node::open(settings).await.unwrap();
    node.network().ensure().await.unwrap();
    node.network().teardown().await.unwrap();
}

#[test]
fn a_machines_end_is_in_its_vlan_also_in_another_vlan() {
    world::isolated(
        "a_machines_end_is_in_its_vlan_also_in_another_vlan",
        async || {
            sh(UPLINK);
            if !has_vlans() {
                return;
            }
            sh(SWITCH);
            sh(
                "ip link add link eth7 name eth7.5 type vlan id 5; ip link set eth7.5 up; ip link add vmbr5 type bridge; \
                ip link set eth7.5 master vmbr5; ip link set vmbr5 up",
            );
            let (guest, place) = (guest(), Place::new());
            let tap = link::tap_name(guest, 0);
            let tagged = attachment("vmbr5", Some("100"));
            link::create_tap(&tap, &tagged).await.unwrap();
            assert_eq!(devices(), "eth7.5.100 4000 vmbr5v100, vmbr5v100 4000 -");

            // The machine: what comes from its tap goes to another one, in the guest's place, and back.
            let folder = tempfile::tempdir().unwrap();
            let wire = folder.path().join("wire").display().to_string();
            // Packets, not a stream. None of them comes to a tap before that is up.
            let listen = format!("UNIX-LISTEN:{wire},socktype=5");
            let inner = "TUN:10.4.0.9/24,tun-type=tap,tun-name=eth0,iff-no-pi,up";
            let connect = format!("UNIX-CONNECT:{wire},socktype=5");
            let outer = format!("TUN,tun-type=tap,tun-name={tap},iff-no-pi");
            let namespace = format!("--net=/proc/{}/ns/net", place.0.id());
            let mut card = Command::new("nsenter")
                .args([&namespace, "--", "socat", &listen, inner])
                .spawn()
                .unwrap();
            world::until("the wire", || std::path::Path::new(&wire).exists());
            let mut machine = Command::new("socat")
                .args([&connect, &outer])
                .spawn()
                .unwrap();
            place.reaches("10.4.0.1");
            assert_eq!(received("switch.100"), 0);

            for process in [&mut machine, &mut card] {
                process.kill().unwrap();
                process.wait().unwrap();
            }
            link::delete_all(guest).await.unwrap();
            assert_eq!(devices(), "");
            assert!(link::exists("eth7.5"), "it is not ours");
        },
    );
}

#[test]
fn guests_that_come_and_go_at_once_leave_nothing() {
    world::isolated(
        "guests_that_come_and_go_at_once_leave_nothing",
        async || {
            sh(UPLINK);
            if !has_vlans() {
                return;
            }
            let guest = guest();
            for _ in 0..3 {
                let works = (0..8).map(|index| {
                    tokio::spawn(async move {
                        let tag = ["100", "200"][usize::from(index % 2)];
                        let tagged = attachment("vmbr0", Some(tag));
                        link::create_veth(guest, index, &tagged).await.unwrap();
                        let name = link::veth_name(guest, index);
                        let shown = sh(&format!("ip -o link show dev {name}"));
                        assert!(shown.contains(&format!("master vmbr0v{tag}")), "{shown}");
                        link::delete(&name).await.unwrap();
                    })
                });
                for work in works.collect::<Vec<_>>() {
                    work.await.unwrap();
                }
                assert_eq!(devices(), "");
            }
        },
    );
}

#[test]
fn what_cannot_be_is_refused_and_leaves_nothing() {
    world::isolated("what_cannot_be_is_refused_and_leaves_nothing", async || {
        sh(UPLINK);
        let (guest, tagged) = (guest(), attachment("vmbr0", Some("100")));
        let refused = async |attachment: &Attachment| {
            let tap = link::create_tap(&link::tap_name(guest, 0), attachment).await;
            let veth = link::create_veth(guest, 0, attachment).await;
            let told = [tap, veth].map(|made| made.unwrap_err().to_string());
            assert_eq!(told[0], told[1]);
            assert_eq!(link::guest_links(), []);
            assert_eq!(devices(), "");
            told[0].clone()
        };
        let trunks = Vlans::new("net0", None, Some("5;7")).unwrap();
        let trunks = Attachment {
            vlans: trunks,
            ..tagged.clone()
        };
        let told = refused(&trunks).await;
        assert!(
            told.starts_with("net0: trunks needs a VLAN-aware bridge"),
            "{told}"
        );
        if !has_vlans() {
            let told = refused(&tagged).await;
            assert!(
                told.starts_with("net0: tag=100: 'eth7.100' cannot be made: does this host's"),
                "{told}"
            );
        }
        // Guests' own ends lead nowhere.
        sh(
            "ip link set eth7 nomaster; ip tuntap add tap99i0 mode tap; ip link set tap99i0 master vmbr0",
        );
        let told = refused(&tagged).await;
        assert!(
            told.starts_with("net0: tag=100: there is no physical interface on bridge 'vmbr0'; "),
            "{told}"
        );

        // What a daemon has left that was killed between two steps.
        sh("ip link add vmbr0v7 group 8021 type bridge; ip link add vmbr0v8 type bridge");
        network_of_another_daemon().await;
        assert_eq!(devices(), "");
        assert!(link::exists("vmbr0v8"), "it is not ours");
        let listed = interfaces::list().await.unwrap();
        assert!(listed.iter().any(|it| it.name == "vmbr0v8"));
    });
}
