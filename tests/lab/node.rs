// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A whole node: what `make lab` starts, and that guests outlive `atolld`; a VM from a disk image that boots by UEFI.

use std::time::Duration;

use atoll_tests::lab::{self, Host};

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
    let (hosts, _guard) = payload::start(1);
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
    let down = "BIN=/payload/bin STATE=/var/lib/atoll /payload/run/down.sh";
    host.check(down, SECOND * 240).unwrap();
    let left = "pgrep -a 'atoll|dnsmasq'; ip -o link show type bridge; grep /var/lib/atoll/ /proc/self/mounts; true";
    assert_eq!(host.check(left, SECOND * 30).unwrap(), "");
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
