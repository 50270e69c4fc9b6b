// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll-vmm` alone, with the stock Debian cloud kernel and a Debian root disk.

use std::time::Duration;

use atoll_tests::lab::Host;

use crate::payload;

const SECOND: Duration = Duration::from_secs(1);

/// Prepares disks and a tap, and defines `vm`, which starts a guest: `vm KERNEL CPUS`.
const PREPARE: &str = r#"set -e
mkdir -p /var/t; cd /var/t
cp --sparse=always /payload/guest/disk.raw root.raw
truncate -s 1200M scratch.raw
cat > vm <<'X'
#!/bin/bash
setsid /payload/bin/atoll-vmm run --kernel "$1" --initrd /payload/guest/initrd.img \
  --cmdline 'console=ttyS0 root=/dev/vda rw net.ifnames=0 quiet' --cpus "$2" --memory 512 \
  --disk path=/var/t/root.raw,format=raw --disk path=/var/t/scratch.raw,format=raw \
  --net tap=tap0,mac=52:54:00:aa:00:01 --console socket=/var/t/console.sock --api-socket /var/t/api.sock \
  </dev/null >/var/t/vmm.log 2>&1 &
echo $! > /var/t/pid
for i in $(seq 100); do [ -S /var/t/console.sock ] && break; sleep 0.1; done
[ -S /var/t/console.sock ] || { cat /var/t/vmm.log; exit 1; }
ip address replace 10.77.0.1/24 dev tap0; ip link set tap0 up
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

/// Runs a command in the guest; what the VMM said goes with a failure.
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

fn start(host: &Host, kernel: &str, cpu_count: u8) {
    host.check(&format!("/var/t/vm {kernel} {cpu_count}"), SECOND * 60)
        .unwrap();
    let signed_in = in_guest(host, "nproc; uname -r", 240);
    assert!(
        signed_in.starts_with(&format!("{cpu_count}\n")),
        "{signed_in}"
    );
    assert!(signed_in.ends_with("-cloud-amd64"), "{signed_in}");
}

/// How much data a guest writes and reads back: a little in every run, 1024 in `make soak`, since a guest in an
/// emulated host hashes some 5 MiB a second.
fn data_mib() -> u32 {
    std::env::var("ATOLL_LAB_DATA_MIB").map_or(64, |text| text.parse().unwrap())
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
    start(host, "/payload/guest/vmlinuz", 1);
    ping_host(host);
    let mib = data_mib();
    let written = in_guest(
        host,
        &format!(
            "head -c 1M /dev/urandom > /seed; for i in $(seq {mib}); do cat /seed; done | tee >(sha256sum > /sum) | \
             dd of=/dev/vdb bs=1M iflag=fullblock oflag=direct conv=fsync status=none; sleep 1; cat /sum"
        ),
        600,
    );
    let read = in_guest(
        host,
        &format!("echo 3 > /proc/sys/vm/drop_caches; head -c {mib}M /dev/vdb | sha256sum"),
        600,
    );
    assert_eq!(written, read);
    assert_eq!(read.len(), "0".repeat(64).len() + 3, "a digest: {read}");
    host.check(
        "/payload/bin/atoll-vmm ctl --api-socket /var/t/api.sock power-button",
        SECOND * 30,
    )
    .unwrap();
    host.check("/var/t/wait-end 120", SECOND * 150).unwrap();
}

#[test]
fn four_vcpus_boot_and_power_off() {
    let (hosts, _guard) = payload::start(1);
    let host = &hosts[0];
    host.check(PREPARE, SECOND * 120).unwrap();
    start(host, "/payload/guest/vmlinuz", 4);
    ping_host(host);
    in_guest(host, "systemctl --no-block poweroff; echo going", 60);
    host.check("/var/t/wait-end 120", SECOND * 150).unwrap();
}

#[test]
fn a_guest_restarts_itself_and_keeps_its_disk() {
    let (hosts, _guard) = payload::start(1);
    let host = &hosts[0];
    host.check(PREPARE, SECOND * 120).unwrap();
    start(host, "/payload/guest/vmlinuz", 1);
    in_guest(
        host,
        "touch /before-reboot; sync; systemctl --no-block reboot; echo going",
        120,
    );
    in_guest(host, "test -e /before-reboot", 240);
    let info = host.check(
        "/payload/bin/atoll-vmm ctl --api-socket /var/t/api.sock info",
        SECOND * 30,
    );
    assert!(info.unwrap().contains("\"reset_count\": 1"));
}
