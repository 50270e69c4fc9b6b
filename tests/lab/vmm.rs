// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll-vmm` alone, with the stock Debian cloud kernel and a Debian root disk.

use std::process::Command;
use std::time::Duration;

use atoll_tests::lab::Host;

use crate::{models, payload};

const SECOND: Duration = Duration::from_secs(1);
const CONTROL: &str = "/payload/bin/atoll-vmm ctl --api-socket /var/t/api.sock";

/// Prepares disks and a tap, and defines `vm`, which starts a guest: `vm CPUS VHOST`, with the arguments in the file
/// `more`, and the memory that the file `memory` says.
const PREPARE: &str = r#"set -e
mkdir -p /var/t; cd /var/t
qemu-img create -q -f qcow2 -F raw -b /payload/guest/disk.raw root.qcow2
truncate -s 1G scratch.raw
# With the same address of its own for every process that opens it.
ip tuntap add tap0 mode tap vnet_hdr
ip address add 10.77.0.1/24 dev tap0; ip link set tap0 up
cat > vm <<'X'
#!/bin/bash
machine=(--kernel /payload/guest/vmlinuz --initrd /payload/guest/initrd.img
  --cmdline 'console=ttyS0 root=/dev/vda rw net.ifnames=0 quiet systemd.default_timeout_start_sec=600'
  --cpus "$1" --memory $(cat /var/t/memory 2>/dev/null || echo 512) $(cat /var/t/more 2>/dev/null)
  --disk path=/var/t/root.qcow2,format=qcow2,backing=raw:/payload/guest/disk.raw --disk path=/var/t/scratch.raw,format=raw
  --net tap=tap0,mac=52:54:00:aa:00:01,vhost="$2" --console socket=/var/t/console.sock)
setsid /payload/bin/atoll-vmm run "${machine[@]}" --api-socket /var/t/api.sock </dev/null >/var/t/vmm.log 2>&1 &
echo $! > /var/t/pid
for i in $(seq 600); do [ -S /var/t/console.sock ] && break; sleep 0.1; done
[ -S /var/t/console.sock ] || { cat /var/t/vmm.log; exit 1; }
X
cat > in-guest <<'X'
#!/bin/bash
exec python3 /payload/lab/console.py /var/t/console.sock "$1" "$2"
X
cat > wait-end <<'X'
#!/bin/bash
for i in $(seq "$1"); do [ -d /proc/$(cat /var/t/pid) ] || exit 0; sleep 1; done
echo "the VMM still runs; its log:"; cat /var/t/vmm.log; exit 1
X
chmod +x vm in-guest wait-end"#;

/// Runs a command in the guest that must succeed; what the VMM said goes with a failure.
fn in_guest(host: &Host, command: &str, seconds: u32) -> String {
    let quoted = command.replace('\'', r"'\''");
    let output = host
        .run(
            &format!("/var/t/in-guest {seconds} '{quoted}'"),
            SECOND * (seconds + 30),
        )
        .unwrap();
    if output.code != 0 {
        let log = host.run(
            "ps -C atoll-vmm -o pid,etime,time,stat; cat /var/t/vmm.log",
            SECOND * 30,
        );
        panic!(
            "exit code {} of {command}:\n{}\nthe VMM:\n{log:?}",
            output.code, output.text
        );
    }
    output.text.trim().to_owned()
}

/// Waits until the machine was reset once.
fn await_reset(host: &Host) {
    let reset = format!(
        "for i in $(seq 120); do {CONTROL} info | grep -q '\"reset_count\": 1' && exit; sleep 1; done; cat /var/t/vmm.log; exit 1"
    );
    host.check(&reset, SECOND * 240).unwrap();
}

/// Boots the guest and signs in.
fn start(host: &Host, cpu_count: u8, vhost: &str) {
    host.check(&format!("/var/t/vm {cpu_count} {vhost}"), SECOND * 60)
        .unwrap();
    let signed_in = in_guest(host, "nproc; uname -r", 420);
    assert!(
        signed_in.starts_with(&format!("{cpu_count}\n")),
        "{signed_in}"
    );
    assert!(signed_in.ends_with("-cloud-amd64"), "{signed_in}");
}

/// MiB of the guest's second disk: the part of a GiB that every run has time for, and all of it in `make soak`.
fn data_mib() -> u32 {
    std::env::var("ATOLL_LAB_DATA_MIB").map_or(128, |text| text.parse().unwrap())
}

/// A guest fills that part of its disk and reads it back past its page cache. The disk's pieces of 16 MiB are the same lines of
/// ascending numbers, each piece shifted by another 8 bytes: no two sectors are alike, so a lost, stale or
/// misplaced one changes the checksum, which is computed here, too.
///
/// Large blocks and a CRC are what an emulated CPU does fast: of 1 GiB, in seconds of this machine's CPU, the writes
/// take 44, the reads with the CRC 57. (`head -c` into a pipe, by its small blocks, takes 150 alone.)
fn data_survives(host: &Host) {
    let last = data_mib() / 16 - 1;
    let lines = "seq 1000000000 9999999999 | dd bs=1M iflag=fullblock count=17 status=none";
    let piece = "iflag=skip_bytes,count_bytes bs=1M count=16M skip=$((i * 8)) status=none";
    let reference = tempfile::tempdir().unwrap();
    let script = format!("{lines} of=d; for i in {{0..{last}}}; do dd if=d {piece}; done | cksum");
    let expected = Command::new("bash")
        .args(["-c", &script])
        .current_dir(reference.path())
        .output()
        .unwrap();
    let write = format!(
        "{lines} of=/dev/shm/d; for i in {{0..{last}}}; do \
         dd if=/dev/shm/d of=/dev/vdb seek=$((i * 16)) oflag=direct conv=notrunc {piece} || break; done; sync /dev/vdb"
    );
    in_guest(host, &write, 900);
    let read = format!(
        "echo 3 > /proc/sys/vm/drop_caches; dd if=/dev/vdb bs=1M count={} status=none | cksum",
        data_mib()
    );
    assert_eq!(
        in_guest(host, &read, 900),
        String::from_utf8_lossy(&expected.stdout).trim()
    );
}

/// A CPU model of a user's own: `base` under another name and without popcnt. Of the machine sse4.2 is taken, too.
fn give_own_model(host: &Host, base: &str) {
    let model = format!(
        r#"{{"name": "office", "model_name": "Office CPU", "base": "{base}", "flags": ["-popcnt"]}}"#
    );
    let more = "--cpu-models /var/t/models --cpu office,-sse4.2 --generation-id 1";
    let write = format!(
        "mkdir /var/t/models && echo '{model}' > /var/t/models/office.json && echo {more} > /var/t/more"
    );
    host.check(&write, SECOND * 30).unwrap();
}

/// The guest's kernel sees the model that it was given, what its base has, and not what was taken from it.
fn sees_its_model(host: &Host, base: &str) {
    println!("the guest's CPU is {base}, changed");
    let seen = in_guest(host, "grep -m 2 -E '^(model name|flags)' /proc/cpuinfo", 60);
    assert!(seen.contains(": Office CPU\n"), "{seen}");
    let flags = format!("{} ", seen.lines().last().unwrap());
    assert!(
        flags.contains(" ssse3 ") && !flags.contains(" popcnt ") && !flags.contains(" sse4_2 "),
        "{seen}"
    );
    let levels = ["x86-64-v3", "x86-64-v4"];
    assert_eq!(flags.contains(" avx2 "), levels.contains(&base), "{seen}");
    // What the host's CPU has, and no model names.
    assert!(
        !flags.contains(" erms ") && !flags.contains(" smap "),
        "{seen}"
    );
}

fn ping_host(host: &Host) {
    in_guest(
        host,
        "ip address replace 10.77.0.2/24 dev eth0; ip link set eth0 up",
        60,
    );
    in_guest(host, "ping -c 3 -W 5 10.77.0.1", 60);
}

#[test]
fn probe_finds_that_this_host_runs_linux() {
    let (hosts, _guard) = payload::start(1);
    let probe = "/payload/bin/atoll-vmm probe --json 2>/dev/null";
    let said = hosts[0].check(probe, SECOND * 60).unwrap();
    let verdict: serde_json::Value = serde_json::from_str(said.trim()).unwrap();
    assert_eq!(verdict["kvm"], true, "{said}");
    assert_eq!(verdict["linux"], true, "{said}");
    assert_eq!(verdict["failures"], serde_json::json!([]), "{said}");
}

#[test]
fn one_vcpu_boots_to_a_login_with_net_and_data_survives_the_power_button() {
    let (hosts, _guard) = payload::start(1);
    let host = &hosts[0];
    host.check(PREPARE, SECOND * 120).unwrap();
    let (fitting, _) = models::levels(host);
    let base = &fitting.last().unwrap().name;
    give_own_model(host, base);
    start(host, 1, "off");
    sees_its_model(host, base);
    ping_host(host);
    data_survives(host);
    host.check(&format!("{CONTROL} power-button"), SECOND * 30)
        .unwrap();
    host.check("/var/t/wait-end 120", SECOND * 150).unwrap();
}

/// Boots of the guest with four vCPUs: `make soak` asks for more than one.
fn boots() -> u32 {
    std::env::var("ATOLL_LAB_BOOTS").map_or(1, |text| text.parse().unwrap())
}

#[test]
fn four_vcpus_boot_and_power_off() {
    let (hosts, _guard) = payload::start(1);
    let host = &hosts[0];
    host.check(PREPARE, SECOND * 120).unwrap();
    for _ in 0..boots() {
        start(host, 4, "off");
        ping_host(host);
        in_guest(host, "(sleep 2; systemctl poweroff) & echo going", 60);
        host.check("/var/t/wait-end 120", SECOND * 150).unwrap();
    }
}

/// 16 MB of numbered lines by TCP to the host and back, each side with its checksum.
fn streams_both_ways(host: &Host) {
    let lines = "seq 1000000 3000000";
    let expected = host
        .check(&format!("{lines} | cksum"), SECOND * 60)
        .unwrap();
    let listen = "socat -u TCP-LISTEN:9000,reuseaddr - | cksum > /var/t/received";
    host.check(
        &format!("({listen}) </dev/null >/dev/null 2>&1 &"),
        SECOND * 30,
    )
    .unwrap();
    // The listener is there when it is: tries end at the first connection.
    let send = format!(
        "for i in $(seq 60); do {lines} 2>/dev/null > /dev/tcp/10.77.0.1/9000 && break; sleep 0.5; done"
    );
    in_guest(host, &send, 240);
    let received = "while [ ! -s /var/t/received ]; do sleep 0.2; done; cat /var/t/received";
    assert_eq!(expected, host.check(received, SECOND * 60).unwrap());

    let serve = format!("{lines} | socat -u - TCP-LISTEN:9001,reuseaddr");
    host.check(
        &format!("({serve}) </dev/null >/dev/null 2>&1 &"),
        SECOND * 30,
    )
    .unwrap();
    let take = "for i in $(seq 60); do cksum 2>/dev/null < /dev/tcp/10.77.0.1/9001 && break; sleep 0.5; done";
    let taken = in_guest(host, take, 240);
    assert_eq!(expected.trim(), taken.lines().last().unwrap_or_default());
}

/// Goes on from the snapshot `saved`, with the disk that is there.
const RESTORE: &str = r#"cd /var/t; setsid /payload/bin/atoll-vmm run --restore saved --api-socket api.sock \
  </dev/null >vmm.log 2>&1 & echo $! > /var/t/pid
for i in $(seq 600); do [ -S /var/t/console.sock ] && break; sleep 0.1; done
[ -S /var/t/console.sock ] || { cat /var/t/vmm.log; exit 1; }"#;

/// The machine in a new process, whose kernel's thread is a new one, too.
fn goes_on_in_another_process(host: &Host) {
    let before = host.check("pgrep vhost-", SECOND * 30).unwrap();
    let to = "upgrade --to /payload/bin/atoll-vmm --pid-file /var/t/pid";
    let told = host.check(&format!("{CONTROL} {to}"), SECOND * 120);
    println!("{}", told.unwrap());
    let one = "for i in $(seq 120); do [ $(pgrep -c vhost-) = 1 ] && pgrep vhost- && exit; sleep 0.5; done; ps ax; exit 1";
    assert_ne!(host.check(one, SECOND * 90).unwrap(), before);
}

/// Begins to save the machine as it is now, its disk included, so slowly that what comes next comes meanwhile.
const SAVE: &str = r#"cd /var/t; CONTROL pause >/dev/null
(CONTROL snapshot --live true --to saved --max-bytes-per-second 8000000 >saved.log 2>&1; echo $? >saved.exit) \
  </dev/null >/dev/null 2>&1 &
for i in $(seq 120); do CONTROL saving >/dev/null 2>&1 && break; [ -e saved.exit ] && break; sleep 0.5; done
cp root.qcow2 saved.qcow2
CONTROL resume >/dev/null
[ ! -e saved.exit ] || { cat saved.log; exit 1; }"#;

/// What was begun is whole, and somebody's writes to memory have waited.
fn is_saved(host: &Host) {
    let wait = "for i in $(seq 240); do [ -e /var/t/saved.exit ] && break; sleep 0.5; done; cat /var/t/saved.log";
    let told = host.check(wait, SECOND * 150).unwrap();
    let saving = host.check(&format!("{CONTROL} saving"), SECOND * 30);
    let saving = saving.unwrap();
    println!("{told} {saving}");
    let saving: serde_json::Value = serde_json::from_str(&saving).unwrap();
    assert_eq!(saving["stage"], "completed", "{told}");
    assert!(saving["fault_count"].as_u64().unwrap() > 0);
}

/// In one process, in the next, while its memory is saved, and in the machine that goes on from there.
#[test]
fn vhost_net_carries_streams_both_ways() {
    let (hosts, _guard) = payload::start(1);
    let host = &hosts[0];
    host.check(PREPARE, SECOND * 120).unwrap();
    host.check("echo 512M,shared > /var/t/memory", SECOND * 30)
        .unwrap();
    start(host, 2, "on");
    ping_host(host);
    host.check("pgrep vhost-", SECOND * 30).unwrap();
    goes_on_in_another_process(host);
    in_guest(host, "touch /dev/shm/before", 60);
    let save = SAVE.replace("CONTROL", CONTROL);
    host.check(&save, SECOND * 180).unwrap();
    streams_both_ways(host);
    is_saved(host);

    in_guest(host, "rm /dev/shm/before", 60);
    host.check(&format!("{CONTROL} shutdown"), SECOND * 60)
        .unwrap();
    let again = format!("/var/t/wait-end 60; cd /var/t; cp saved.qcow2 root.qcow2; {RESTORE}");
    host.check(&again, SECOND * 180).unwrap();
    in_guest(host, "test -e /dev/shm/before", 120);
    ping_host(host);
    host.check("pgrep vhost-", SECOND * 30).unwrap();
    in_guest(host, "(sleep 2; systemctl poweroff) & echo going", 60);
    host.check("/var/t/wait-end 120", SECOND * 150).unwrap();
    // The kernel's thread goes with the guest.
    assert_ne!(host.run("pgrep vhost-", SECOND * 30).unwrap().code, 0);
}

#[test]
fn a_guest_restarts_itself_and_keeps_its_disk() {
    let (hosts, _guard) = payload::start(1);
    let host = &hosts[0];
    host.check(PREPARE, SECOND * 120).unwrap();
    start(host, 1, "off");
    in_guest(
        host,
        "touch /before-reboot; sync; (sleep 2; systemctl reboot) & echo going",
        120,
    );
    await_reset(host);
    in_guest(host, "test -e /before-reboot", 240);
}

/// SVM is emulated by the lab, and the guest sees it by the CPU model `host`: what KVM has for its guests goes through a
/// snapshot and a reset with it.
#[test]
fn a_guest_that_can_run_guests_goes_on_from_a_snapshot() {
    let (hosts, _guard) = payload::start(1);
    let host = &hosts[0];
    host.check(PREPARE, SECOND * 120).unwrap();
    start(host, 1, "off");
    in_guest(
        host,
        "grep -qw svm /proc/cpuinfo && touch /dev/shm/before",
        60,
    );
    let save = format!("{CONTROL} snapshot --to /var/t/saved && {CONTROL} shutdown");
    host.check(&save, SECOND * 120).unwrap();
    host.check("/var/t/wait-end 60", SECOND * 90).unwrap();
    // No flag but "interrupts are taken", and the form of AMD.
    let nested = r#"grep -o '"nested":"[0-9a-f]\{8\}' /var/t/saved/state.json"#;
    let nested = host.check(nested, SECOND * 30).unwrap();
    assert_eq!(nested.trim(), r#""nested":"00010100"#);
    host.check(RESTORE, SECOND * 60).unwrap();
    in_guest(host, "test -e /dev/shm/before", 120);
    in_guest(host, "(sleep 2; systemctl reboot) & echo going", 120);
    await_reset(host);
    in_guest(host, "! test -e /dev/shm/before", 240);
}
