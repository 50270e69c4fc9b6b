// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A whole node: what `make lab` starts, its page, and that guests outlive `atolld`; a VM from a disk image that boots by
//! UEFI.

use std::process::Command;
use std::time::Duration;

use atoll_tests::daemon::Login;
use atoll_tests::lab::{self, Host};
use atoll_tests::page;

use crate::payload;

const SECOND: Duration = Duration::from_secs(1);
const UP: &str =
    "STATE=/var/lib/atoll LISTEN=0.0.0.0 BIN=/payload/bin GUEST=/payload/guest /payload/run/up.sh";
/// The VM's and the container's address and that both answer.
const BOTH_ANSWER: &str = r#"set -e
export STATE=/var/lib/atoll PATH=/payload/bin:$PATH
python3 /payload/lab/console.py /var/lib/atoll/run/vm-101/serial.sock 240 'ping -c 1 -W 5 10.64.0.1 && ip -br address show eth0'
atoll-ct --root /var/lib/atoll/run/ct exec ct-100 ping -c 1 -W 5 10.64.0.1"#;

#[test]
fn guests_start_by_one_command_and_outlive_the_daemon() {
    let (hosts, _guard) = payload::start_with(1, payload::add_page);
    let host = &hosts[0];
    let summary = host.check(UP, SECOND * 600).unwrap();
    assert!(
        summary.contains("container:    100 debian, running, address 10.64.0."),
        "{summary}"
    );
    assert!(
        summary.contains("VM:           101 debian, running"),
        "{summary}"
    );
    host.check(BOTH_ANSWER, SECOND * 300).unwrap();
    a_container_is_made_by_the_page(host);

    // Again: quick, and changes nothing.
    let pids = "cat /var/lib/atoll/run/vm-101/pid; STATE=/var/lib/atoll /payload/bin/atoll-ct \
                --root /var/lib/atoll/run/ct state ct-100 | grep '\"pid\"'";
    let before = host.check(pids, SECOND * 30).unwrap();
    host.check(UP, SECOND * 120).unwrap();
    assert_eq!(before, host.check(pids, SECOND * 30).unwrap());

    // The daemon is killed; its guests go on, and the next daemon takes them over.
    host.check(
        "kill -9 $(jq .pid /var/lib/atoll/run/atolld.json)",
        SECOND * 10,
    )
    .unwrap();
    host.check(BOTH_ANSWER, SECOND * 120).unwrap();
    host.check(UP, SECOND * 120).unwrap();
    assert_eq!(before, host.check(pids, SECOND * 30).unwrap());
    host.check(BOTH_ANSWER, SECOND * 120).unwrap();
    cards_have_vlans_and_rates(host);
    let down = "BIN=/payload/bin STATE=/var/lib/atoll /payload/run/down.sh";
    host.check(down, SECOND * 240).unwrap();
    let left = "pgrep -a 'atoll|dnsmasq'; ip -o link show type bridge; grep /var/lib/atoll/ /proc/self/mounts; true";
    assert_eq!(host.check(left, SECOND * 30).unwrap(), "");
}

/// A container of Debian with systemd, by a browser on this machine: from the wizard to its console and its deletion.
fn a_container_is_made_by_the_page(host: &Host) {
    if let Err(reason) = page::browser() {
        println!("ATOLL-SKIP: {reason}");
        return;
    }
    let login = host.check("cat /var/lib/atoll/initial-login.json", SECOND * 30);
    let login: Login = serde_json::from_str(&login.unwrap()).unwrap();
    let place = page::built();
    let place = place.display();
    let lay = format!("mkdir -p {place} && mount --bind /payload/page {place}");
    host.check(&lay, SECOND * 30).unwrap();
    let url = format!("https://{}:{}", host.api().address, host.api().port);
    let login = Login { url, ..login };
    page::browse(Command::new("node"), &login, "run.mjs", "lab");
}

/// What the two scripts below have in common: only what is written to descriptor 3 is printed, or, on failure, the rest.
const CARDS: &str = r#"
exec 3>&1 >/run/cards.log 2>&1
trap '[ $? = 0 ] || tail -n 40 /run/cards.log >&3' EXIT
set -x
card() { atoll set $node/lxc/100/config --net1 "name=lan,bridge=vmbr5,hwaddr=BC:24:11:00:05:00,ip=10.5.0.9/24$1"; }
inside() { atoll-ct --root $STATE/run/ct exec ct-100 "$@"; }
"#;

/// A VLAN-aware bridge, on which the host has an address in VLAN 1, 10.6.0.1, and one in VLAN 5, 10.5.0.1; and a card of
/// the container with an address for each, whose name the image's systemd does not look after. Prints the VLANs of the
/// container's and of the VM's card, `u`: untagged; before, the bridges and whether the node says they are aware.
const VLANS: &str = r#"
reaches() { for i in $(seq 30); do inside ping -I lan -c 1 -W 2 $1 && return; done; inside ip route; return 1; }
misses() { inside ip neigh flush dev lan; if inside ping -I lan -c 2 -W 2 $1; then return 1; fi; }
vlans() { bridge -json vlan show dev $1 | jq -r '[.[0].vlans[] | "\(.vlan)\(if .flags then "u" else "" end)"] | join(" ")'; }
card_of_vm() { atoll set $node/qemu/101/config --net1 "virtio=BC:24:11:00:05:01,bridge=vmbr5$1"; }
echo 1 > /proc/sys/net/ipv4/conf/all/arp_ignore
ip link add vmbr5 type bridge vlan_filtering 1
ip address add 10.6.0.1/24 dev vmbr5
bridge vlan add dev vmbr5 vid 5 self
ip link add link vmbr5 name lan5 type vlan id 5
ip address add 10.5.0.1/24 dev lan5
ip link set vmbr5 up
ip link set lan5 up
atoll get $node/network --type bridge --output json | jq -r '[.[] | "\(.iface) \(.bridge_vlan_aware // 0)"] | sort | join(" ")' >&3
card ,tag=5
inside ip address add 10.6.0.9/24 dev lan
reaches 10.5.0.1
misses 10.6.0.1
vlans veth100i1 >&3
card ''
reaches 10.6.0.1
misses 10.5.0.1
vlans veth100i1 | awk '{print $1, $2, $NF, NF}' >&3
card_of_vm ,tag=5
vlans tap101i1 >&3
card_of_vm ',tag=7,trunks=8-9;5'
vlans tap101i1 >&3"#;

/// The container's card has a low rate, and more is sent each way than passes at once, until some has to wait on its
/// way to it (a sender here waits, too, and loses nothing) and some of what it sends is dropped.
const RATE: &str = r#"
flood='ping -q -c 400 -i 0.002 -s 1400 -w 2'
sent() { tc -s qdisc show dev veth100i1 | grep -A 1 'qdisc tbf' | grep -oP 'overlimits \K[0-9]+'; }
received() { tc -s filter show dev veth100i1 ingress | grep -oP 'dropped \K[0-9]+'; }
until_counted() { for i in $(seq 20); do "${@:2}" || true; [ "$($1)" -gt 0 ] && return; done; return 1; }
card ,rate=0.01
until_counted sent $flood 10.6.0.9
until_counted received inside $flood -I lan 10.6.0.1
card ''
tc qdisc show dev veth100i1 | awk '/tbf|ingress/ {exit 1}'
atoll set $node/lxc/100/config --delete net1
ip link delete vmbr5"#;

/// A bridge that is not VLAN-aware, and a switch behind its one port, on which the host has an address in VLAN 5, 10.7.0.1.
/// Both guests get a card there; the daemon is killed meanwhile. Prints what there is for the VLAN, with its bridge: when
/// both are connected, for the next daemon, and when the container's card is gone. The VM has its own until it ends.
const PLAIN: &str = r#"
devices() { ip -json link show group 8021 | jq -r '[.[] | select(.ifname) | "\(.ifname) \(.master // "-")"] | sort | join(" ")'; }
ip link add vmbr6 type bridge
ip link add eth7 type veth peer name switch
ip link set eth7 master vmbr6
ip link add link switch name switch.5 type vlan id 5
ip address add 10.7.0.1/24 dev switch.5
for link in vmbr6 eth7 switch switch.5; do ip link set $link up; done
atoll set $node/lxc/100/config --net1 "name=lan,bridge=vmbr6,hwaddr=BC:24:11:00:06:00,ip=10.7.0.9/24,tag=5,rate=1"
atoll set $node/qemu/101/config --net2 "virtio=BC:24:11:00:06:01,bridge=vmbr6,tag=5"
for i in $(seq 30); do inside ping -I lan -c 1 -W 2 10.7.0.1 && break; done
inside ping -I lan -c 1 -W 10 10.7.0.1
tc qdisc show dev veth100i1 | grep tbf
card='basename $(dirname $(grep -il bc:24:11:00:06:01 /sys/class/net/*/address))'
card="for i in \$(seq 50); do card=\$($card) && break; sleep 0.2; done; ip address add 10.7.0.8/24 dev \$card"
python3 /payload/lab/console.py $STATE/run/vm-101/serial.sock 120 \
    "$card; ip link set \$card up; ping -c 5 -W 10 10.7.0.1"
devices >&3
atoll get $node/network --output json | jq -e '[.[].iface] | (index("vmbr6") and (index("vmbr6v5") or index("eth7.5") | not))'
kill -9 $(jq .pid $STATE/run/atolld.json)
LISTEN=0.0.0.0 BIN=/payload/bin GUEST=/payload/guest /payload/run/up.sh 3>&-
devices >&3
inside ping -I lan -c 1 -W 10 10.7.0.1
atoll set $node/lxc/100/config --delete net1
devices >&3
ip link delete vmbr6"#;

/// A card is in its VLAN and in no other, and keeps to its rate; both change while the guest runs.
#[track_caller]
fn cards_have_vlans_and_rates(host: &Host) {
    let told = on_node(host, &format!("{CARDS}{VLANS}"), 120);
    let aware = "vmbr0 0 vmbr5 1";
    assert_eq!(told, format!("{aware}\n5u\n1u 2 4094 4094\n5u\n5 7u 8 9"));
    on_node(host, &format!("{CARDS}{RATE}"), 120);
    let told = on_node(host, &format!("{CARDS}{PLAIN}"), 400);
    let there = "eth7.5 vmbr6v5 vmbr6v5 -";
    assert_eq!(told, format!("{there}\n{there}\n{there}"));
}

/// A daemon with firmware, a disk image to import, and two discs. The image is not copied here: it is read-only.
const SERVE: &str = r#"set -e
mkdir -p /usr/share/OVMF $STATE/storage/import $STATE/storage/template/iso
cp /payload/uefi/OVMF_*.fd /usr/share/OVMF/; cp /payload/discs/*.iso $STATE/storage/template/iso/
touch $STATE/storage/import/debian.raw; mount --bind /payload/uefi/disk.raw $STATE/storage/import/debian.raw
setsid atolld --state $STATE --listen 127.0.0.1 </dev/null >$STATE/atolld.log 2>&1 &
for i in $(seq 300); do atoll get /version >/dev/null 2>&1 && exit 0; sleep 0.2; done
tail $STATE/atolld.log; exit 1"#;

const CREATE: &str = "atoll create $node/qemu --vmid 121 --memory 512 --cores 2 --bios ovmf \
    --efidisk0 local:1,efitype=4m --scsi0 local:0,import-from=local:import/debian.raw,serial=imported \
    --ide2 local:iso/1.iso,media=cdrom --boot order=scsi0 --serial0 socket --net0 virtio,bridge=vmbr0 --wait; \
    atoll create $node/qemu/121/status/start --wait";

/// On a host with a node of the name `$node` in the API.
#[track_caller]
fn on_node(host: &Host, script: &str, seconds: u32) -> String {
    let place = "export STATE=/var/lib/atoll PATH=/payload/bin:$PATH; node=/nodes/$(hostname)";
    let said = host.check(
        &format!("{place}; set -e; {script}"),
        SECOND * (seconds + 30),
    );
    said.unwrap().trim().to_owned()
}

#[track_caller]
fn in_imported(host: &Host, command: &str, seconds: u32) -> String {
    let run = format!(
        "python3 /payload/lab/console.py $STATE/run/vm-121/serial.sock {seconds} '{command}'"
    );
    on_node(host, &run, seconds)
}

#[test]
fn an_imported_image_boots_by_uefi_and_leaves_nothing() {
    let (hosts, _guard) = payload::start_with(1, |payload| {
        lab::add_uefi(payload)?;
        payload::add_discs(payload)
    });
    let host = &hosts[0];
    on_node(host, SERVE, 120);
    on_node(host, CREATE, 300);
    let booted = "cat /sys/firmware/efi/fw_platform_size; lsblk -no SERIAL -d $(findmnt -no SOURCE / | tr -d 0-9)";
    assert_eq!(in_imported(host, booted, 600), "64\nimported");
    let read = "mount -r /dev/sr0 /mnt && cat /mnt/words; umount /mnt";
    assert_eq!(in_imported(host, read, 60), "disc 1");
    let change = "atoll set $node/qemu/121/config --ide2 local:iso/2.iso,media=cdrom";
    on_node(host, change, 60);
    assert_eq!(in_imported(host, read, 60), "disc 2");

    // Suspended to disk it goes on where it was, with the new disc; a snapshot with memory brings that moment back.
    in_imported(host, "echo kept > /run/mark", 60);
    on_node(host, "atoll vm suspend 121 --to-disk", 300);
    on_node(host, "atoll vm start 121", 120);
    assert_eq!(in_imported(host, "cat /run/mark", 120), "kept");
    on_node(
        host,
        "atoll create $node/qemu/121/snapshot --snapname warm --vmstate 1 --wait",
        300,
    );
    in_imported(host, "rm /run/mark; echo lost > /var/lost; sync", 60);
    on_node(
        host,
        "atoll create $node/qemu/121/snapshot/warm/rollback --wait",
        300,
    );
    assert_eq!(
        in_imported(
            host,
            "cat /run/mark; ls /var/lost 2>&1 | grep -c cannot",
            120
        ),
        "kept\n1"
    );
    assert_eq!(in_imported(host, read, 60), "disc 2");
    on_node(
        host,
        "atoll delete $node/qemu/121/snapshot/warm --wait",
        120,
    );

    let end = "atoll create $node/qemu/121/status/shutdown --timeout 180 --wait; \
        atoll get $node/qemu/121/status/current --output json | jq -r .status; atoll delete $node/qemu/121 --wait";
    assert!(on_node(host, end, 300).contains("stopped"));
    let left = "find $STATE/storage/images $STATE/run -name '*121*'; pgrep -a atoll-vmm || true; \
        atoll get $node/qemu --output json | jq length";
    assert_eq!(on_node(host, left, 60), "0");
    on_node(host, "BIN=/payload/bin /payload/run/down.sh", 120);
}
