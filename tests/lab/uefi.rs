// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The `pc` board: Debian's OVMF, shim and GRUB as they are, from disks as installers make them, an ISO and a network.
//! `run/uefi-image.sh` says what the images hold.

use std::time::Duration;

use atoll_tests::lab::{self, Host, Scratch};

use crate::payload;

const SECOND: Duration = Duration::from_secs(1);
/// Firmware, boot loader, kernel, login: on a busy machine.
const BOOT_SECONDS: u32 = 600;
/// Whose variables: the firmware's global ones (UEFI 2.10 §3.3), which have fixed names, and the test's own.
const GLOBAL: &str = "8be4df61-93ca-11d2-aa0d-00e098032b8c";
const OWN: &str = "4b5f3a52-0c6b-4f0e-9d63-6d8a1f4c2e11";

/// Defines what the tests run on the host. Of each guest NAME there are: NAME.sock (its console), NAME.api, NAME.log,
/// NAME.vars, and NAME.exit once it has ended.
const PREPARE: &str = r#"set -e
mkdir -p /var/t; cd /var/t
# vm NAME TEMPLATE ARGUMENT...: starts a guest, with variables from TEMPLATE where it has none yet, and $memory.
cat > vm <<'X'
#!/bin/bash
cd /var/t; name=$1 template=$2; shift 2
[ -e $name.vars ] || cp /payload/uefi/$template $name.vars
rm -f $name.exit $name.sock
(setsid /payload/bin/atoll-vmm run --firmware vars=/var/t/$name.vars,code=/payload/uefi/OVMF_CODE_4M.fd --memory ${memory:-512} \
  --console socket=/var/t/$name.sock --api-socket /var/t/$name.api "$@" >$name.log 2>&1; echo $? >$name.exit) </dev/null >/dev/null 2>&1 &
for i in $(seq 300); do [ -S $name.sock ] && exit 0; [ -e $name.exit ] && break; sleep 0.1; done
cat $name.log; exit 1
X
# listen NAME: its console goes to NAME.console.
cat > listen <<'X'
#!/bin/bash
socat -u UNIX-CONNECT:/var/t/$1.sock OPEN:/var/t/$1.console,creat,append </dev/null >/dev/null 2>&1 &
X
# hear NAME SECONDS TEXT: waits until its console has said so.
cat > hear <<'X'
#!/bin/bash
for i in $(seq $2); do grep -aq "$3" /var/t/$1.console && exit 0; [ -e /var/t/$1.exit ] && break; sleep 1; done
grep -aq "$3" /var/t/$1.console && exit 0
echo "not heard: $3; the console:"; tail -c 3000 /var/t/$1.console; echo "the VMM:"; cat /var/t/$1.log; exit 1
X
# ended NAME SECONDS: waits until it has, as it should.
cat > ended <<'X'
#!/bin/bash
for i in $(seq $2); do [ -e /var/t/$1.exit ] && break; sleep 1; done
[ "$(cat /var/t/$1.exit)" = 0 ] || { cat /var/t/$1.log; exit 1; }
X
# gone NAME SECONDS: waits until the process is that the guest went on in.
cat > gone <<'X'
#!/bin/bash
for i in $(seq $2); do [ -d /proc/$(cat /var/t/$1.pid) ] || exit 0; sleep 1; done
ps ax; exit 1
X
chmod +x vm listen hear ended gone"#;

/// A tap with a server that gives addresses and a boot loader, by TFTP. (Under Secure Boot it would be shim, which fetches
/// GRUB with packets of 512 bytes: that alone takes half a minute here.)
const SERVE: &str = r#"
mkdir -p tftp/grub; cp /payload/uefi/net.efi tftp/
printf 'echo NET-BOOTED\nsleep 1\nhalt\n' > tftp/grub/grub.cfg
ip tuntap add tap0 mode tap vnet_hdr; ip address add 10.77.0.1/24 dev tap0; ip link set tap0 up
dnsmasq --conf-file=/dev/null --user=root --port=0 --interface=tap0 --bind-interfaces --log-dhcp \
  --log-facility=/var/t/dnsmasq.log --pid-file=/var/t/dnsmasq.pid --dhcp-leasefile=/var/t/leases \
  --dhcp-range=10.77.0.10,10.77.0.20,1h --enable-tftp --tftp-root=/var/t/tftp --dhcp-boot=net.efi
"#;

fn start_host() -> (Host, [Scratch; 2]) {
    let (mut hosts, guard) = payload::start_with(1, lab::add_uefi);
    let host = hosts.remove(0);
    host.check(PREPARE, SECOND * 60).unwrap();
    (host, guard)
}

#[track_caller]
fn on_host(host: &Host, command: &str, seconds: u32) -> String {
    let text = host.check(
        &format!("set -e; cd /var/t; export PATH=/var/t:$PATH; {command}"),
        SECOND * (seconds + 30),
    );
    text.unwrap().trim().to_owned()
}

#[track_caller]
fn control(host: &Host, name: &str, request: &str) -> String {
    let command = format!(
        "/payload/bin/atoll-vmm ctl --api-socket {name}.api {request} || {{ code=$?; cat {name}.log; exit $code; }}"
    );
    on_host(host, &command, 60)
}

/// Runs a command in a guest that must succeed, after signing in where its console asks for it; what the VMM said goes
/// with a failure.
#[track_caller]
fn in_guest(host: &Host, name: &str, command: &str, seconds: u32) -> String {
    let quoted = command.replace('\'', r"'\''");
    let run = format!(
        "python3 /payload/lab/console.py {name}.sock {seconds} '{quoted}' || {{ code=$?; cat {name}.log; exit $code; }}"
    );
    on_host(host, &run, seconds)
}

/// A variable of the firmware's, in hexadecimal, without the four bytes of attributes before it.
#[track_caller]
fn variable(host: &Host, guest: &str, name: &str, vendor: &str) -> String {
    let read =
        format!("od -An -v -tx1 /sys/firmware/efi/efivars/{name}-{vendor} | tr -d ' \\n'; echo");
    in_guest(host, guest, &read, 60).split_off(8)
}

/// What is in the SMBIOS tables of a guest: type, fixed part and strings of each structure.
fn smbios(host: &Host, guest: &str) -> Vec<(u8, Vec<u8>, Vec<String>)> {
    let read = "od -An -v -tx1 /sys/firmware/dmi/tables/DMI | tr -d ' \\n'; echo";
    let hex = in_guest(host, guest, read, 60);
    let byte = |pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    let bytes: Vec<u8> = hex.as_bytes().chunks(2).map(byte).collect();
    let mut rest = &bytes[..];
    let mut found = Vec::new();
    while rest.len() > 4 {
        let (fixed, strings) = rest.split_at(rest[1].into());
        let end = strings.windows(2).position(|pair| pair == [0, 0]).unwrap();
        let texts = strings[..end].split(|byte| *byte == 0);
        let texts = texts.map(|text| String::from_utf8(text.to_vec()).unwrap());
        found.push((fixed[0], fixed.to_vec(), texts.collect()));
        rest = &strings[end + 2..];
    }
    found
}

/// The board as Linux finds it: 64-bit firmware, Q35's identity, clocks, no error in ACPI, SMBIOS.
fn board_is_a_pc(host: &Host, guest: &str) {
    let said = in_guest(
        host,
        guest,
        "cat /sys/firmware/efi/fw_platform_size; \
         cat /sys/bus/pci/devices/0000:00:00.0/device /sys/bus/pci/devices/0000:00:1f.0/device; \
         cat /sys/devices/system/clocksource/clocksource0/available_clocksource; \
         echo $(($(cat /sys/class/rtc/rtc0/since_epoch) - $(date +%s))); \
         dmesg | grep -i 'acpi.*error\\|firmware bug'; true",
        60,
    );
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines[..3], ["64", "0x29c0", "0x2918"], "{said}");
    assert!(lines[3].contains("acpi_pm"), "{said}");
    assert!(lines[4].parse::<i64>().unwrap().abs() < 60, "{said}");
    assert_eq!(lines.len(), 5, "{said}");

    let tables = smbios(host, guest);
    let kinds: Vec<u8> = tables.iter().map(|(kind, ..)| *kind).collect();
    for kind in [0, 1, 3, 4, 16, 17, 19, 32] {
        assert!(kinds.contains(&kind), "no type {kind} in {kinds:?}");
    }
    let structure = |wanted| tables.iter().find(|(kind, ..)| *kind == wanted).unwrap();
    assert_eq!(structure(0).2[0], "Atoll");
    assert_eq!(structure(1).2[1], "Atoll Virtual Machine");
    let device = &structure(17).1;
    assert_eq!(u16::from_le_bytes([device[12], device[13]]), 512);
}

/// A disk and a card that come while a guest runs, on a bus that its firmware has given its addresses to, and go again.
fn functions_come_and_go(host: &Host, guest: &str) {
    on_host(host, "truncate -s 64M more.raw", 30);
    let disk = "add-disk --disk id=late,path=/var/t/more.raw,format=raw,serial=late";
    control(host, guest, disk);
    let write = "for i in {1..120}; do [ -b /dev/vdb ] && break; sleep 0.5; done; cat /sys/block/vdb/serial; echo; \
        dd if=/dev/urandom of=/dev/vdb bs=1M count=2 oflag=direct status=none && \
        dd if=/dev/vdb bs=1M count=2 iflag=direct status=none | cksum";
    let said = in_guest(host, guest, write, 120);
    let sum = on_host(host, "head -c 2M more.raw | cksum", 30);
    assert_eq!(said, format!("late\n{sum}"));

    control(
        host,
        guest,
        "add-net --net id=card,tap=tap1,mac=52:54:00:aa:00:09",
    );
    let address = "ip address replace 10.78.0.1/24 dev tap1; ip link set tap1 up";
    on_host(host, address, 30);
    let ping = "modprobe virtio_net; for i in {1..120}; do [ -e /sys/class/net/eth0 ] && break; sleep 0.5; done; \
        cat /sys/class/net/eth0/address; ip address add 10.78.0.2/24 dev eth0; ip link set eth0 up; \
        ping -c 3 -W 10 10.78.0.1 >/dev/null";
    assert_eq!(in_guest(host, guest, ping, 120), "52:54:00:aa:00:09");

    for id in ["late", "card"] {
        let remove = format!("remove-device --id {id} --timeout-ms 60000");
        control(host, guest, &remove);
    }
    let gone = "for i in {1..60}; do [ -e /dev/vdb ] || [ -e /sys/class/net/eth0 ] || break; sleep 0.5; done; \
        [ ! -e /dev/vdb ] && [ ! -e /sys/class/net/eth0 ]";
    in_guest(host, guest, gone, 60);
}

/// Has the guest keep a variable of its own.
fn keep_variable(host: &Host, guest: &str, value: &str) {
    let file = format!("/sys/firmware/efi/efivars/AtollTest-{OWN}");
    let write = format!("chattr -i {file} 2>/dev/null; printf '\\007\\0\\0\\0{value}' > {file}");
    in_guest(host, guest, &write, 60);
}

/// The machine goes on in a new process of the same program, with what firmware has written before, and writes there. The
/// first process ends; NAME.pid is of the other one.
fn goes_on_in_another_process(host: &Host, guest: &str) {
    keep_variable(host, guest, "old");
    let to = format!("upgrade --to /payload/bin/atoll-vmm --pid-file /var/t/{guest}.pid");
    println!("{}", control(host, guest, &to));
    assert_eq!(variable(host, guest, "AtollTest", OWN), "6f6c64");
    keep_variable(host, guest, "new");
    assert_eq!(variable(host, guest, "AtollTest", OWN), "6e6577");
}

#[test]
fn a_raw_disk_boots_to_a_login_and_the_firmware_keeps_its_variables() {
    let (host, _guard) = start_host();
    on_host(&host, "cp --sparse=always /payload/uefi/disk.raw a.raw", 60);
    let start = "vm a OVMF_VARS_4M.fd --disk path=/var/t/a.raw,format=raw,bootindex=0 --cpus 2";
    on_host(&host, start, 60);
    let release = in_guest(&host, "a", "uname -r; nproc", BOOT_SECONDS);
    assert!(release.ends_with("-cloud-amd64\n2"), "{release}");
    board_is_a_pc(&host, "a");
    let order = variable(&host, "a", "BootOrder", GLOBAL);
    assert_eq!(variable(&host, "a", "SecureBoot", GLOBAL), "00");
    keep_variable(&host, "a", "kept");
    control(&host, "a", "power-button");
    on_host(&host, "ended a 180", 180);

    on_host(&host, start, 60);
    in_guest(&host, "a", "true", BOOT_SECONDS);
    assert_eq!(variable(&host, "a", "AtollTest", OWN), "6b657074");
    assert_eq!(variable(&host, "a", "BootOrder", GLOBAL), order);
    in_guest(&host, "a", "(sleep 2; systemctl poweroff) & echo going", 60);
    on_host(&host, "ended a 180", 180);
}

#[test]
fn boot_order_and_secure_boot_decide_what_starts() {
    let (host, _guard) = start_host();
    let make = "qemu-img create -q -f qcow2 -F raw -b /payload/uefi/disk.raw a.qcow2";
    on_host(&host, make, 60);
    let disk =
        "--disk path=/var/t/a.qcow2,format=qcow2,backing=raw:/payload/uefi/disk.raw,bootindex=1";
    let disc = "--disk path=/payload/uefi/boot.iso,format=raw,bus=cdrom,bootindex=0";
    let unsigned = "--disk path=/payload/uefi/unsigned.raw,format=raw,readonly,bootindex=0";

    // The disc comes first, although the disk could boot, too.
    let start = format!("vm iso OVMF_VARS_4M.fd {disk} {disc}; listen iso");
    on_host(&host, &start, 60);
    on_host(&host, "hear iso 300 ISO-READY; ended iso 60", 360);

    // So does a network.
    let net = "--net tap=tap0,bootindex=0";
    let start = format!("{SERVE} vm net OVMF_VARS_4M.fd {disk} {net}; listen net");
    on_host(&host, &start, 60);
    let boots = "{ hear net 300 NET-BOOTED && ended net 60; } || { cat dnsmasq.log; exit 1; }";
    on_host(&host, boots, 360);

    // An unsigned loader runs where no keys are, and nowhere else.
    let start = format!("vm free OVMF_VARS_4M.fd {unsigned}; listen free");
    on_host(&host, &start, 60);
    on_host(&host, "hear free 300 UNSIGNED-RAN; ended free 60", 360);
    let start = format!("vm shut OVMF_VARS_4M.ms.fd {unsigned}; listen shut");
    on_host(&host, &start, 60);
    on_host(&host, "hear shut 300 'Access Denied'", 300);
    on_host(&host, "! grep -a UNSIGNED-RAN shut.console", 30);
    control(&host, "shut", "shutdown");
    on_host(&host, "ended shut 60", 60);

    // Debian's own is signed, by way of shim, down to the kernel.
    let start = format!("memory=512M,shared vm a OVMF_VARS_4M.ms.fd {disk}");
    on_host(&host, &start, 60);
    in_guest(&host, "a", "true", BOOT_SECONDS);
    assert_eq!(variable(&host, "a", "SecureBoot", GLOBAL), "01");
    let said = in_guest(&host, "a", "dmesg | grep -i 'secure boot'", 60);
    assert!(said.contains("Secure boot enabled"), "{said}");
    board_is_a_pc(&host, "a");
    functions_come_and_go(&host, "a");
    goes_on_in_another_process(&host, "a");
    in_guest(&host, "a", "(sleep 2; systemctl poweroff) & echo going", 60);
    on_host(&host, "ended a 60; gone a 180", 240);
    // The names of variables are UCS-2.
    let kept = "tr -d '\\0' < a.vars | grep -aq AtollTestnew";
    on_host(&host, kept, 30);
}
