// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Devices beside disk and serial port, with the stock Debian cloud kernel, in three machines one after the other: queue
//! pairs in vhost-net, a balloon, a console with two channels, Unix sockets; then a directory of the host and the kernel's
//! sockets; then a card that DPDK's testpmd serves. A script is the guest's first process, so that nothing else takes the host's time.

use std::time::Duration;

use atoll_tests::lab::{self, Host};

use crate::payload;

const SECOND: Duration = Duration::from_secs(1);

/// What all guests do; each step prints one line that the test waits for.
const IN_GUEST: &str = r#"#!/bin/bash
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys
exec >/dev/ttyS0 2>&1 </dev/null
for module in virtio_net virtio_balloon virtio_console virtiofs vmw_vsock_virtio_transport; do modprobe $module; done
cat > /tmp/sockets.pl <<'P'
use Socket; $| = 1;
sub address { pack("S S L L x4", 40, 0, $_[1], $_[0]) }
socket(my $out, 40, SOCK_STREAM, 0) or die $!;
connect($out, address(2, 5000)) or print "T-CONNECT $!\n";
syswrite($out, "hello from the guest\n"); close $out;
socket(my $in, 40, SOCK_STREAM, 0); bind($in, address(0xffffffff, 80)); listen($in, 5); print "T-LISTEN\n";
while (accept(my $one, $in)) { my $b; syswrite($one, $b) while sysread($one, $b, 65536); close $one }
P
"#;

/// What the first guest does besides: it lets people sign in on hvc0. By the agent's channel it is told to fill memory,
/// and to let it go; what comes by the other is said again.
const IN_FIRST: &str = r#"
port() { for p in /sys/class/virtio-ports/*; do [ "$(cat $p/name)" = "$1" ] && echo /dev/${p##*/}; done 2>/dev/null; }
for i in $(seq 100); do
  [ -e /sys/class/net/eth0 ] && [ -c /dev/hvc0 ] && [ "$(port org.qemu.guest_agent.0)" ] && [ "$(port org.atoll.second)" ] && break
  sleep 0.1
done
setsid agetty hvc0 linux &
echo "T-QUEUES" $(ls /sys/class/net/eth0/queues)
ip address add 10.77.0.2/24 dev eth0; ip link set eth0 up
ping -c 3 -W 10 10.77.0.1 >/dev/null && echo "T-PING"
echo "T-PORTS" $(port org.qemu.guest_agent.0) $(port org.atoll.second)
(exec 4<>$(port org.atoll.second); while :; do read -r line <&4 && echo "second $line" >&4 || sleep 1; done) &
mount -t tmpfs -o size=400m none /mnt
cat > /tmp/agent.pl <<'P'
open(my $channel, "+<", $ARGV[0]) or die $!;
my $mib = "\0" x (1 << 20);
syscall(151, 3); # mlockall(MCL_CURRENT | MCL_FUTURE): it goes on when the guest's memory is short.
while (1) {
  sysread($channel, my $line, 256) or do { sleep 1; next };
  my ($order, $size) = split(" ", $line);
  my $said = $order;
  if ($order eq "fill") {
    open(my $file, ">", "/mnt/filled");
    for (1..$size) { syswrite($file, $mib) == 1 << 20 or $said = "failed $!" }
  }
  unlink("/mnt/filled") if $order eq "drop";
  if ($order eq "room") {
    open(my $file, "<", "/proc/meminfo");
    /MemAvailable: *(\d+)/ and $said = int($1 / 1024) for <$file>;
  }
  syswrite($channel, "pong $said\n");
}
P
perl /tmp/agent.pl $(port org.qemu.guest_agent.0) &
perl /tmp/sockets.pl &
while sleep 2; do echo "T-FREE" $(awk '/MemFree/{print int($2/1024)}' /proc/meminfo); done
"#;

const IN_SECOND: &str = r#"
mount -t virtiofs share /mnt && echo "T-SHARED $(cat /mnt/hello)"
head -c 3000000 /dev/urandom > /mnt/written; mkdir /mnt/a; mv /mnt/written /mnt/a/moved
echo "T-SUM" $(md5sum < /mnt/a/moved | cut -d' ' -f1)
perl /tmp/sockets.pl &
while sleep 60; do :; done
"#;

/// What the third one does: counts the pings that are answered.
const IN_THIRD: &str = r#"
for i in $(seq 100); do [ -e /sys/class/net/eth0 ] && break; sleep 0.1; done
echo "T-QUEUES" $(ls /sys/class/net/eth0/queues)
ip address add 10.88.0.2/24 dev eth0; ip link set eth0 up
count=0
while sleep 1; do ping -c 1 -W 5 10.88.0.1 >/dev/null && echo "T-PING $((count += 1))"; done
"#;

/// A guest's root disk, and its script `in-guest` as a second one, which its first process runs: arguments after `--` are
/// that process's. `boot` has what the machine needs for it; its kernel speaks on a virtio console, too, where it has one.
pub const DISKS: &str = r#"
rm -f root.qcow2; qemu-img create -q -f qcow2 -F raw -b /payload/guest/disk.raw root.qcow2
{ cat in-guest; yes ''; } | head -c 64K > script.raw
boot=(--kernel /payload/guest/vmlinuz --initrd /payload/guest/initrd.img
  --cmdline 'console=hvc0 console=ttyS0 root=/dev/vda rw net.ifnames=0 quiet init=/bin/bash -- /dev/vdb'
  --disk path=/var/t/root.qcow2,format=qcow2,backing=raw:/payload/guest/disk.raw
  --disk path=/var/t/script.raw,format=raw,readonly)
"#;

/// Defines what starts a guest with further arguments.
const PREPARE: &str = r#"
mkdir -p sockets; rm -f console.log console.sock api.sock
start() {
  setsid /payload/bin/atoll-vmm run "${boot[@]}" --cpus 2 \
    --console socket=/var/t/console.sock --api-socket /var/t/api.sock "$@" </dev/null >vmm.log 2>&1 &
  for i in $(seq 300); do [ -S console.sock ] && break; sleep 0.1; done
  socat -u UNIX-CONNECT:console.sock OPEN:console.log,creat,append >/dev/null 2>&1 &
}
"#;

/// Starts the first; its serial output goes to `console.log`.
const START_FIRST: &str = r#"
socat -u UNIX-LISTEN:sockets/s_5000,mode=666,fork OPEN:from-guest,creat,append >/dev/null 2>&1 &
start --memory 512 --net tap=tap0,queues=2,vhost=on --balloon --virtio-console socket=/var/t/hvc0.sock \
  --port name=org.qemu.guest_agent.0,socket=/var/t/agent.sock --port name=org.atoll.second,socket=/var/t/second.sock \
  --vsock cid=7,socket=/var/t/sockets/s
socat -u UNIX-CONNECT:hvc0.sock OPEN:hvc0.log,creat,append >/dev/null 2>&1 &
for i in $(seq 300); do [ -e /sys/class/net/tap0 ] && break; sleep 0.1; done
ip address replace 10.77.0.1/24 dev tap0 || { cat vmm.log; exit 1; }
ip link set tap0 up
"#;

const START_SECOND: &str = r#"
modprobe vhost_vsock
setsid python3 -c 'import socket
s = socket.socket(socket.AF_VSOCK); s.bind((socket.VMADDR_CID_ANY, 5000)); s.listen()
print(s.accept()[0].makefile().read(), end="", flush=True)' </dev/null >from-guest-kernel 2>&1 &
mkdir -p share; echo hello from the host > share/hello
setsid /payload/bin/virtiofsd --socket-path=/var/t/fs.sock --shared-dir=/var/t/share --sandbox=chroot \
  </dev/null >virtiofsd.log 2>&1 &
for i in $(seq 300); do [ -S fs.sock ] && break; sleep 0.1; done
start --memory 384M,shared --fs tag=share,socket=/var/t/fs.sock --vsock cid=8,vhost
"#;

/// Answers pings to any address, on two pairs of queues; one of its threads polls.
const TESTPMD: &str = r#"
rm -f card.sock
drivers=$(printf -- '-d /payload/testpmd/%s ' librte_bus_vdev.so.23 librte_net_vhost.so.23 librte_mempool_ring.so.23)
setsid env RUNTIME_DIRECTORY=/var/t LD_LIBRARY_PATH=/payload/testpmd /payload/testpmd/dpdk-testpmd \
  '--lcores=0@(0-1),1@(0-1)' -m64 --no-huge --no-pci --no-shconf --no-telemetry $drivers \
  --vdev=net_vhost0,iface=/var/t/card.sock,queues=2 -- --forward-mode=icmpecho --total-num-mbufs=2048 --rxq=2 --txq=2 \
  --auto-start < <(exec sleep infinity) >testpmd.log 2>&1 & echo $! >testpmd.pid
for i in $(seq 300); do [ -S card.sock ] && break; sleep 0.1; done
# The machine that connects again is not root any more.
chmod 666 card.sock || { cat testpmd.log; exit 1; }
"#;

const START_THIRD: &str =
    "start --memory 384M,shared --net vhost-user=/var/t/card.sock,reconnect,queues=2";

/// Echoes 1 MiB through the guest's port 80, on the connected socket `s`.
const ECHO: &str = r#"
data = os.urandom(1 << 20); got = b""
threading.Thread(target=lambda: (s.sendall(data), s.shutdown(socket.SHUT_WR))).start()
while part := s.recv(65536): got += part
assert got == data, len(got)
P"#;

const BY_KERNEL: &str = r#"python3 - <<'P'
import os, socket, threading
s = socket.socket(socket.AF_VSOCK); s.settimeout(60); s.connect((8, 80))"#;

const BY_UNIX_SOCKET: &str = r#"python3 - <<'P'
import os, socket, threading
s = socket.socket(socket.AF_UNIX); s.settimeout(60); s.connect("/var/t/sockets/s"); s.sendall(b"CONNECT 80\n")
answer = s.recv(32); assert answer.startswith(b"OK "), answer"#;

/// Waits for a whole line of the guest's that begins so, and gives what follows: a terminal's lines end in a carriage
/// return, without which the rest of the line is still to come.
pub fn hear(host: &Host, mark: &str, seconds: u32) -> String {
    let script = format!(
        "for i in $(seq {seconds}); do grep -aE $'^{mark}( .*)?\\r' /var/t/console.log | tail -1 | grep . && exit 0; \
         sleep 1; done; \
         tail -n 20 /var/t/console.log; cat /var/t/vmm.log; {WHERE_THREADS_ARE}; exit 1"
    );
    let line = host.check(&script, SECOND * (seconds + 30)).unwrap();
    line.trim().trim_start_matches(mark).trim().to_owned()
}

/// Waits for the first whole line of a file in `/var/t`.
fn first_line(host: &Host, file: &str) -> String {
    let script = format!(
        "for i in $(seq 60); do {{ read -r line < /var/t/{file}; }} 2>/dev/null && echo \"$line\" && exit 0; \
         sleep 1; done; \
         cat /var/t/{file}; {WHAT_HAPPENED}; exit 1"
    );
    let line = host.check(&script, SECOND * 90).unwrap();
    line.trim().to_owned()
}

/// Tells of each thread of a machine that is silent, twice: its name, the system call and its first arguments (or
/// `running`), its user and system time in hundredths of a second.
const WHERE_THREADS_ARE: &str = "for turn in 1 2; do for thread in /proc/$(pidof -s atoll-vmm)/task/*; do \
     echo $(cat $thread/comm): $(cut -d ' ' -f 1-3 $thread/syscall), \
     $(sed 's/.*) //' $thread/stat | cut -d ' ' -f 12,13); done; sleep 1; done; \
     /payload/bin/atoll-vmm ctl --api-socket /var/t/api.sock counters";

/// Tells how a machine ended that was not to.
pub const WHAT_HAPPENED: &str =
    "tail -n 20 /var/t/console.log; cat /var/t/vmm.log; dmesg | tail -n 5";

pub fn control(host: &Host, request: &str) -> String {
    let command = format!(
        "/payload/bin/atoll-vmm ctl --api-socket /var/t/api.sock {request} || {{ {WHAT_HAPPENED}; exit 1; }}"
    );
    host.check(&command, SECOND * 60).unwrap()
}

fn start(host: &Host, in_guest: &str, start: &str) {
    let script = format!(
        "set -e; mkdir -p /var/t; cd /var/t; cat > in-guest <<'END-OF-SCRIPT'\n\
         {IN_GUEST}{in_guest}END-OF-SCRIPT\n{DISKS}{PREPARE}{start}"
    );
    host.check(&script, SECOND * 120).unwrap();
}

/// A number that the control API tells, by its path in jq's words.
fn number(host: &Host, request: &str, path: &str) -> u64 {
    let command =
        format!("/payload/bin/atoll-vmm ctl --api-socket /var/t/api.sock {request} | jq '{path}'");
    let text = host.check(&command, SECOND * 60).unwrap();
    text.trim().parse().unwrap()
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

/// Says a line on one of the guest's channels, and what comes back.
fn ask(host: &Host, channel: &str, line: &str) -> String {
    let script = format!(
        "python3 - <<'P'\nimport socket\ns = socket.socket(socket.AF_UNIX); s.settimeout(300)\n\
         s.connect('/var/t/{channel}.sock'); s.sendall(b'{line}\\n'); print(s.makefile().readline())\nP\n\
         [ $? = 0 ] || {{ {WHAT_HAPPENED}; exit 1; }}"
    );
    let said = host.check(&script, SECOND * 330).unwrap();
    said.trim().to_owned()
}

/// The same with the agent.
fn tell(host: &Host, line: &str) -> String {
    ask(host, "agent", line)
}

/// Runs a command in the guest by its virtio console, after signing in where a getty asks for it.
fn on_hvc0(host: &Host, command: &str) -> String {
    let run = format!(
        "python3 /payload/lab/console.py /var/t/hvc0.sock 120 '{command}' || {{ code=$?; {WHAT_HAPPENED}; exit $code; }}"
    );
    let said = host.check(&run, SECOND * 150).unwrap();
    said.trim().to_owned()
}

/// The virtio console is a terminal, to sign in at and for the kernel; the channels beside it are others.
fn console_and_channels_are_apart(host: &Host) {
    let lines: Vec<_> = (1..=1000).map(|number: u32| number.to_string()).collect();
    let expected = format!("/dev/hvc0\n{}", lines.join("\n"));
    assert_eq!(on_hvc0(host, "tty; seq 1000"), expected);
    on_hvc0(host, "echo \"<2>T-KERNEL speaks\" > /dev/kmsg");
    let heard = "for i in $(seq 60); do grep -aq $'T-KERNEL speaks\\r' /var/t/hvc0.log && exit 0; sleep 1; done; \
        tail -n 20 /var/t/hvc0.log; exit 1";
    host.check(heard, SECOND * 90).unwrap();
    assert_eq!(ask(host, "second", "one two"), "second one two");
    assert_eq!(tell(host, "ping"), "pong ping");
    assert_eq!(ask(host, "second", "three"), "second three");
}

/// MiB that the guest has free now: the next line may have been on its way, the one after it is of now.
fn free(host: &Host) -> u64 {
    let fresh = "count() { grep -ac $'^T-FREE .*\\r' /var/t/console.log; }; n=$(count); \
        for i in $(seq 120); do [ $(count) -ge $((n + 2)) ] && exit 0; sleep 0.5; done; exit 1";
    host.check(fresh, SECOND * 90).unwrap();
    hear(host, "T-FREE", 30).parse().unwrap()
}

/// What the balloon's statistics say comes to what the guest says itself: each few seconds it is asked anew.
fn statistics_tell_of(host: &Host, free_mib: u64) {
    let mut told = serde_json::Value::Null;
    for _ in 0..60 {
        let info: serde_json::Value = serde_json::from_str(&control(host, "info")).unwrap();
        told = info["balloon"].clone();
        let number = |name: &str| told[name].as_u64();
        if let Some(free) = number("free_bytes")
            && (free >> 20).abs_diff(free_mib) < 40
        {
            // The guest takes memory back in need: then Linux leaves its total as it is without a balloon.
            let total = number("total_bytes").unwrap();
            assert!((400..=512).contains(&(total >> 20)), "{told}");
            assert!(number("available_bytes").unwrap() <= total, "{told}");
            let cache = number("cache_bytes").unwrap();
            assert!(cache > 1 << 20 && cache + free <= total, "{told}");
            assert!(number("major_faults").unwrap() > 0, "{told}");
            assert!(number("minor_faults").unwrap() > 1000, "{told}");
            for name in ["swapped_in_bytes", "swapped_out_bytes"] {
                assert_eq!(number(name), Some(0), "{told}");
            }
            return;
        }
        host.check("sleep 1", SECOND * 30).unwrap();
    }
    panic!("the guest has {free_mib} MiB free, and its balloon tells {told}");
}

fn memory_follows_the_balloon(host: &Host) {
    let before = free(host);
    statistics_tell_of(host, before);
    balloon(host, 256);
    let during = free(host);
    assert!(during + 200 < before, "{during} MiB free of {before}");
    statistics_tell_of(host, during);
    balloon(host, 512);
    assert!(free(host) > during + 200);
}

/// A guest that needs more than its balloon leaves it takes pages back instead of killing a program.
fn memory_is_taken_back_in_need(host: &Host) {
    balloon(host, 160);
    let room = tell(host, "room");
    let room: u64 = room.trim_start_matches("pong ").parse().unwrap();
    // The kernel takes back 1 MiB each time that it finds nothing else: not more of them than are needed here.
    assert_eq!(tell(host, &format!("fill {}", room + 48)), "pong fill");
    let actual = number(host, "info", ".balloon.actual_mib");
    assert!(
        actual >= 168,
        "the guest has {actual} MiB, and had room for {room}"
    );
    assert_eq!(tell(host, "drop"), "pong drop");
    balloon(host, 512);
}

/// What a guest frees, the host has back (free-page reporting), without being asked.
fn freed_memory_comes_back(host: &Host) {
    let resident = |host: &Host| number(host, "counters", ".resident_bytes") >> 20;
    assert_eq!(tell(host, "fill 300"), "pong fill");
    let filled = resident(host);
    assert_eq!(tell(host, "drop"), "pong drop");
    let mut left = filled;
    for _ in 0..60 {
        left = resident(host);
        if left + 200 < filled {
            break;
        }
        host.check("sleep 1", SECOND * 30).unwrap();
    }
    println!("resident with 300 MiB in use: {filled} MiB; freed: {left} MiB");
    assert!(left + 200 < filled, "{left} MiB resident of {filled}");
}

fn first_machine(host: &Host) {
    start(host, IN_FIRST, START_FIRST);
    assert_eq!(hear(host, "T-QUEUES", 150), "rx-0 rx-1 tx-0 tx-1");
    hear(host, "T-PING", 60);
    // The kernel's own threads move the packets.
    host.check("ps -e | grep vhost-", SECOND * 30).unwrap();
    let ports = hear(host, "T-PORTS", 30);
    let ports: Vec<_> = ports.split(' ').collect();
    assert!(
        ports.len() == 2 && ports[0].ends_with("p1") && ports[1].ends_with("p2"),
        "{ports:?}"
    );
    hear(host, "T-LISTEN", 60);
    assert_eq!(first_line(host, "from-guest"), "hello from the guest");
    let echo = format!("{BY_UNIX_SOCKET}{ECHO}");
    host.check(&echo, SECOND * 90).unwrap();
    console_and_channels_are_apart(host);
    memory_follows_the_balloon(host);
    freed_memory_comes_back(host);
    memory_is_taken_back_in_need(host);
    control(host, "shutdown");
}

fn second_machine(host: &Host) {
    start(host, IN_SECOND, START_SECOND);
    assert_eq!(hear(host, "T-SHARED", 150), "hello from the host");
    let sum = hear(host, "T-SUM", 60);
    let sum_here = "md5sum < /var/t/share/a/moved | cut -d' ' -f1";
    let here = host.check(sum_here, SECOND * 30);
    assert_eq!(here.unwrap().trim(), sum);
    hear(host, "T-LISTEN", 60);
    assert_eq!(
        first_line(host, "from-guest-kernel"),
        "hello from the guest"
    );
    host.check(&format!("{BY_KERNEL}{ECHO}"), SECOND * 90)
        .unwrap();
    control(host, "shutdown");
}

fn third_machine(host: &Host) {
    start(host, IN_THIRD, &format!("{TESTPMD}{START_THIRD}"));
    assert_eq!(hear(host, "T-QUEUES", 150), "rx-0 rx-1 tx-0 tx-1");
    let answered = |host: &Host| hear(host, "T-PING", 90).parse::<u32>().unwrap();
    let before = answered(host);
    // The next one at the same place goes on where the first was killed.
    host.check("kill -9 $(cat /var/t/testpmd.pid)", SECOND * 30)
        .unwrap();
    host.check(&format!("cd /var/t; {TESTPMD}"), SECOND * 90)
        .unwrap();
    let more = format!(
        "for i in $(seq 120); do n=$(grep -ac $'^T-PING .*\\r' /var/t/console.log); [ $n -gt {} ] && exit 0; sleep 1; done; \
         {WHAT_HAPPENED}; tail /var/t/testpmd.log; exit 1",
        before + 8
    );
    host.check(&more, SECOND * 180).unwrap();
    control(host, "shutdown");
}

#[test]
fn linux_drives_queue_pairs_balloon_console_channels_sockets_and_a_directory() {
    let (hosts, _guard) = payload::start_with(1, |payload| {
        let from = lab::virtiofsd()?.join("bin/virtiofsd");
        std::fs::copy(from, payload.join("bin/virtiofsd"))?;
        payload::add_testpmd(payload)
    });
    first_machine(&hosts[0]);
    second_machine(&hosts[0]);
    third_machine(&hosts[0]);
}
