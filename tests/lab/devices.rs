// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Devices beside disk and terminal, with the stock Debian cloud kernel: queue pairs in vhost-net, a balloon, an
//! agent's channel, sockets. A script is the guest's first process, so that nothing else takes the host's time.

use std::time::Duration;

use atoll_tests::lab::Host;

use crate::payload;

const SECOND: Duration = Duration::from_secs(1);

/// What runs in the guest: each step prints one line that the test waits for.
const IN_GUEST: &str = r#"#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys
exec >/dev/ttyS0 2>&1 </dev/null
for module in virtio_net virtio_balloon virtio_console vmw_vsock_virtio_transport; do modprobe $module; done
for i in $(seq 100); do [ -e /sys/class/net/eth0 ] && [ -e /sys/class/virtio-ports/vport*/name ] && break; sleep 0.1; done
echo "T-QUEUES" $(ls /sys/class/net/eth0/queues)
ip address add 10.77.0.2/24 dev eth0; ip link set eth0 up
ping -c 3 -W 10 10.77.0.1 >/dev/null && echo "T-PING"
echo "T-PORT" $(cat /sys/class/virtio-ports/vport*/name)
( exec 3<>$(ls /dev/vport*); while read -r line <&3; do echo "pong $line" >&3; done ) &
cat > /tmp/sockets.pl <<'P'
use Socket; $| = 1;
sub address { pack("S S L L x4", 40, 0, $_[1], $_[0]) }
socket(my $out, 40, SOCK_STREAM, 0) or die $!;
connect($out, address(2, 5000)) or print "T-CONNECT $!\n";
syswrite($out, "hello from the guest\n"); close $out;
socket(my $in, 40, SOCK_STREAM, 0); bind($in, address(0xffffffff, 80)); listen($in, 5); print "T-LISTEN\n";
while (accept(my $one, $in)) { my $b; syswrite($one, $b) while sysread($one, $b, 65536); close $one }
P
perl /tmp/sockets.pl &
while sleep 2; do echo "T-FREE" $(awk '/MemFree/{print int($2/1024)}' /proc/meminfo); done
"#;

/// Starts the guest; its serial output goes to `console.log`.
const START: &str = r#"set -e
mkdir -p /var/t/sockets /mnt/root; cd /var/t
cp --sparse=always /payload/guest/disk.raw root.raw
mount -o loop root.raw /mnt/root; install -m 755 in-guest /mnt/root/in-guest; umount /mnt/root
socat -u UNIX-LISTEN:sockets/s_5000,mode=666,fork OPEN:from-guest,creat,append >/dev/null 2>&1 &
setsid /payload/bin/atoll-vmm run --kernel /payload/guest/vmlinuz --initrd /payload/guest/initrd.img \
  --cmdline 'console=ttyS0 root=/dev/vda rw net.ifnames=0 quiet init=/in-guest' --cpus 2 --memory 512 \
  --disk path=/var/t/root.raw,format=raw --net tap=tap0,queues=2,vhost=on --balloon \
  --port name=org.qemu.guest_agent.0,socket=/var/t/agent.sock --vsock cid=7,socket=/var/t/sockets/s \
  --console socket=/var/t/console.sock --api-socket /var/t/api.sock </dev/null >vmm.log 2>&1 &
for i in $(seq 300); do [ -S console.sock ] && [ -e /sys/class/net/tap0 ] && break; sleep 0.1; done
ip address replace 10.77.0.1/24 dev tap0 || { cat vmm.log; exit 1; }
ip link set tap0 up
socat -u UNIX-CONNECT:console.sock OPEN:console.log,creat,append >/dev/null 2>&1 &
"#;

/// Echoes 1 MiB through the guest's port 80.
const ECHO: &str = r#"python3 - <<'P'
import os, socket, threading
s = socket.socket(socket.AF_UNIX); s.settimeout(60); s.connect("/var/t/sockets/s"); s.sendall(b"CONNECT 80\n")
answer = s.recv(32); assert answer.startswith(b"OK "), answer
data = os.urandom(1 << 20); got = b""
threading.Thread(target=lambda: (s.sendall(data), s.shutdown(socket.SHUT_WR))).start()
while part := s.recv(65536): got += part
assert got == data, len(got)
P"#;

/// Waits for a line of the guest's that begins so, and gives what follows.
pub fn hear(host: &Host, mark: &str, seconds: u32) -> String {
    let script = format!(
        "for i in $(seq {seconds}); do grep -a '^{mark}' /var/t/console.log | tail -1 | grep . && exit 0; sleep 1; done; \
         tail -n 20 /var/t/console.log; cat /var/t/vmm.log; exit 1"
    );
    let line = host.check(&script, SECOND * (seconds + 30)).unwrap();
    line.trim().trim_start_matches(mark).trim().to_owned()
}

pub fn control(host: &Host, request: &str) -> String {
    let command = format!("/payload/bin/atoll-vmm ctl --api-socket /var/t/api.sock {request}");
    host.check(&command, SECOND * 60).unwrap()
}

/// Sets the balloon, and waits until the guest has followed.
fn balloon(host: &Host, target_mib: u64) {
    control(host, &format!("set-balloon --target-mib {target_mib}"));
    let script = format!(
        "for i in $(seq 90); do /payload/bin/atoll-vmm ctl --api-socket /var/t/api.sock info | \
         grep -q '\"actual_mib\": {target_mib}' && exit 0; sleep 1; done; exit 1"
    );
    host.check(&script, SECOND * 120).unwrap();
}

#[test]
fn linux_drives_queue_pairs_balloon_channel_and_sockets() {
    let (hosts, _guard) = payload::start(1);
    let host = &hosts[0];
    let script = format!(
        "mkdir -p /var/t; cat > /var/t/in-guest <<'END-OF-SCRIPT'\n{IN_GUEST}END-OF-SCRIPT\n{START}"
    );
    host.check(&script, SECOND * 120).unwrap();
    assert_eq!(hear(host, "T-QUEUES", 150), "rx-0 rx-1 tx-0 tx-1");
    hear(host, "T-PING", 60);
    // The kernel's own threads move the packets.
    host.check("ps -e | grep vhost-", SECOND * 30).unwrap();
    assert_eq!(hear(host, "T-PORT", 30), "org.qemu.guest_agent.0");
    let said = host.check(
        "(echo ping; sleep 5) | timeout 30 socat - UNIX-CONNECT:/var/t/agent.sock",
        SECOND * 60,
    );
    assert_eq!(said.unwrap().trim(), "pong ping");
    hear(host, "T-LISTEN", 60);
    let heard = host.check("cat /var/t/from-guest", SECOND * 30).unwrap();
    assert_eq!(heard.trim(), "hello from the guest");
    host.check(ECHO, SECOND * 90).unwrap();
    let free = |host: &Host| hear(host, "T-FREE", 30).parse::<u64>().unwrap();
    let before = free(host);
    balloon(host, 256);
    let during = free(host);
    assert!(during + 200 < before, "{during} MiB free of {before}");
    balloon(host, 512);
    host.check("sleep 3", SECOND * 30).unwrap();
    assert!(free(host) > during + 200);
    control(host, "shutdown");
}
