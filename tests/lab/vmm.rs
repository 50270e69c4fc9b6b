// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll-vmm` alone, with the stock Debian cloud kernel and a Debian root disk.

use std::time::Duration;

use atoll_tests::lab::Host;

use crate::payload;

const SECOND: Duration = Duration::from_secs(1);

/// Prepares disks and a tap, and defines `vm`, which starts a guest: `vm KERNEL CPUS`.
const PREPARE: &str = r#"set -e
mkdir -p /run/t; cd /run/t
cp --sparse=always /payload/guest/disk.raw root.raw
truncate -s 1200M scratch.raw
cat > vm <<'X'
#!/bin/bash
setsid /payload/bin/atoll-vmm run --kernel "$1" --initrd /payload/guest/initrd.img \
  --cmdline 'console=ttyS0 root=/dev/vda rw net.ifnames=0 quiet' --cpus "$2" --memory 512 \
  --disk path=/run/t/root.raw,format=raw --disk path=/run/t/scratch.raw,format=raw \
  --net tap=tap0,mac=52:54:00:aa:00:01 --console socket=/run/t/console.sock --api-socket /run/t/api.sock \
  </dev/null >/run/t/vmm.log 2>&1 &
echo $! > /run/t/pid
for i in $(seq 100); do [ -S /run/t/console.sock ] && break; sleep 0.1; done
[ -S /run/t/console.sock ] || { cat /run/t/vmm.log; exit 1; }
ip address replace 10.77.0.1/24 dev tap0; ip link set tap0 up
X
cat > in-guest <<'X'
#!/bin/bash
exec python3 /payload/lab/console.py /run/t/console.sock "$1" "$2"
X
cat > wait-end <<'X'
#!/bin/bash
for i in $(seq "$1"); do [ -d /proc/$(cat /run/t/pid) ] || exit 0; sleep 1; done
echo "the VMM still runs; its log:"; cat /run/t/vmm.log; exit 1
X
chmod +x vm in-guest wait-end"#;

fn in_guest(host: &Host, command: &str, seconds: u32) -> String {
    let quoted = command.replace('\'', r"'\''");
    host.check(
        &format!("/run/t/in-guest {seconds} '{quoted}'"),
        SECOND * (seconds + 30),
    )
    .unwrap()
}

fn start(host: &Host, kernel: &str, cpu_count: u8) {
    host.check(&format!("/run/t/vm {kernel} {cpu_count}"), SECOND * 60)
        .unwrap();
    let signed_in = in_guest(host, "nproc; uname -r", 240);
    assert!(
        signed_in.starts_with(&format!("{cpu_count}\n")),
        "{signed_in}"
    );
    assert!(signed_in.ends_with("-cloud-amd64"), "{signed_in}");
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
    // 1 GiB of data that no cache of the guest (512 MiB of RAM) holds, written, dropped, read back.
    let written = in_guest(
        host,
        "openssl rand -out /dev/null 1 2>/dev/null; head -c 1M /dev/urandom > /seed; \
         for i in $(seq 1024); do echo $i; cat /seed; done | head -c 1G | tee >(sha256sum > /sum) | \
         dd of=/dev/vdb bs=1M iflag=fullblock oflag=direct conv=fsync status=none; sleep 1; cat /sum",
        600,
    );
    let read = in_guest(
        host,
        "echo 3 > /proc/sys/vm/drop_caches; head -c 1G /dev/vdb | sha256sum",
        600,
    );
    assert_eq!(written, read);
    assert_eq!(read.len(), "0".repeat(64).len() + 3, "a digest: {read}");
    host.check(
        "/payload/bin/atoll-vmm ctl --api-socket /run/t/api.sock power-button",
        SECOND * 30,
    )
    .unwrap();
    host.check("/run/t/wait-end 120", SECOND * 150).unwrap();
}

#[test]
fn four_vcpus_boot_reboot_and_power_off() {
    let (hosts, _guard) = payload::start(1);
    let host = &hosts[0];
    host.check(PREPARE, SECOND * 120).unwrap();
    start(host, "/payload/guest/vmlinuz", 4);
    ping_host(host);
    in_guest(
        host,
        "touch /before-reboot; sync; systemctl --no-block reboot; echo going",
        120,
    );
    let uptime = in_guest(
        host,
        "test -e /before-reboot && cut -d. -f1 /proc/uptime",
        240,
    );
    assert!(!uptime.is_empty());
    in_guest(host, "systemctl --no-block poweroff; echo going", 60);
    host.check("/run/t/wait-end 120", SECOND * 150).unwrap();
}
