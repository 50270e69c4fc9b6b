// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A stock guest whose first process is a shell on the serial port (`init=/bin/bash`): its disk needs no change, and
//! nothing else takes the host's time. It is one machine of the host, in `/var/t`.

use std::time::Duration;

use atoll_tests::lab::Host;

const SECOND: Duration = Duration::from_secs(1);
/// Longest time from the start to the shell, on a busy machine.
pub const BOOT_SECONDS: u32 = 300;

/// Defines `start ARGUMENT…`, which starts the machine with them, and makes its root disk: what the guest writes there
/// goes to `root.qcow2`. `vmm` is what runs it; `exit` has its exit code once it has ended.
pub const PREPARE: &str = r#"set -e
mkdir -p /var/t; cd /var/t; rm -f console.sock api.sock exit
[ -e root.qcow2 ] || qemu-img create -q -f qcow2 -F raw -b /payload/guest/disk.raw root.qcow2
root=path=/var/t/root.qcow2,format=qcow2,backing=raw:/payload/guest/disk.raw
vmm=/payload/bin/atoll-vmm
kernel="--kernel /payload/guest/vmlinuz --initrd /payload/guest/initrd.img"
cmdline='console=ttyS0 root=LABEL=atoll-root rw net.ifnames=0 quiet init=/bin/bash'
run() {
  (code=0; setsid $vmm run --api-socket /var/t/api.sock --pid-file /var/t/pid "$@" >>vmm.log 2>&1 || code=$?
   echo $code > exit) </dev/null >/dev/null 2>&1 &
  for i in $(seq 300); do [ -S console.sock ] && return; [ -e exit ] && break; sleep 0.1; done
  cat vmm.log; exit 1
}
start() { run --console socket=/var/t/console.sock "$@"; }
"#;

/// Runs what is started at each stock boot, as far as devices are concerned.
pub const UDEV: &str = "mount -t tmpfs none /tmp; /lib/systemd/systemd-udevd --daemon; \
    udevadm trigger --type=subsystems --action=add; udevadm trigger --type=devices --action=add; udevadm settle";

/// Runs a script on the host that must succeed; gives what it says.
#[track_caller]
pub fn on_host(host: &Host, script: &str, seconds: u32) -> String {
    let script = format!("cd /var/t; {script}");
    let said = host.check(&script, SECOND * (seconds + 30)).unwrap();
    said.trim().to_owned()
}

/// Runs a line of shell in the guest that must succeed; what the VMM said goes with a failure.
#[track_caller]
pub fn in_guest(host: &Host, line: &str, seconds: u32) -> String {
    let quoted = line.replace('\'', r"'\''");
    let run = format!(
        "python3 /payload/lab/console.py console.sock {seconds} '{quoted}' || {{ code=$?; cat vmm.log; exit $code; }}"
    );
    on_host(host, &run, seconds)
}

/// Tells the machine something by its control API.
#[track_caller]
pub fn control(host: &Host, request: &str) -> String {
    on_host(host, &ctl(request), 60)
}

/// The same, which must be refused; gives why.
#[track_caller]
pub fn refused(host: &Host, request: &str) -> String {
    on_host(host, &format!("! {} 2>&1", ctl(request)), 60)
}

fn ctl(request: &str) -> String {
    format!("/payload/bin/atoll-vmm ctl --api-socket /var/t/api.sock {request}")
}

/// Waits until a condition of the host's shell is met.
#[track_caller]
pub fn wait_for(host: &Host, condition: &str, seconds: u32) {
    let script = format!(
        "for i in $(seq {seconds}); do {condition} && exit 0; sleep 1; done; \
         echo 'not met: {}'; cat vmm.log; exit 1",
        condition.replace('\'', "\"")
    );
    on_host(host, &script, seconds);
}

/// Ends the machine and waits for its process.
#[track_caller]
pub fn end(host: &Host) {
    control(host, "shutdown");
    wait_for(host, "[ -e exit ]", 60);
    assert_eq!(on_host(host, "cat exit", 30), "0");
}
