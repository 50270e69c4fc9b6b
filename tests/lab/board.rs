// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a full Linux finds beside disks, on the `pc` board: Debian's generic kernel, the host's own, since its cloud
//! kernel has no driver for a watchdog or a generation id. One machine, which is saved, goes on in another process, is
//! reset by its watchdog, and ends in a panic; its copy is ended by its watchdog. It runs without io_uring, and its memory
//! is huge pages.

use atoll_tests::lab::Host;

use crate::payload;
use crate::shell::{self, control, in_guest, on_host, wait_for};

/// Adds to the host's initial RAM disk what starts a shell: the kernel's modules in `more`, with their arguments, then
/// the guest's disk.
const INITRD: &str = r#"
tree=$(mktemp -d); mkdir $tree/more
for module in virtio_net virtio_rng i6300esb pvpanic-pci vmgenid rtc-cmos button; do
  modprobe --show-depends $module
done | awk '$1 == "insmod" && !seen[$2]++ {print $2}' | while read file; do
  cp $file $tree/more/; name=$(basename $file)
  case $name in i6300esb.ko) echo $name heartbeat=3;; *) echo $name;; esac >> $tree/more/order
done
cat > $tree/start <<'X'
#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc p /proc; $B mount -t sysfs s /sys; $B mount -t devtmpfs d /dev
for place in modules more; do
  while read -r module arguments; do $B insmod /$place/$module $arguments; done < /$place/order
done
until [ -e /dev/vda ]; do $B sleep 0.1; done
$B mount -t ext4 /dev/vda /new
for d in proc sys dev; do $B mount --move /$d /new/$d; done
exec $B switch_root /new /bin/bash -i </new/dev/ttyS0 >/new/dev/ttyS0 2>&1
X
chmod +x $tree/start
(cat /payload/full/initrd.img; cd $tree; find . | cpio -o -H newc --quiet | gzip -1) > initrd.img
"#;

const START: &str = r#"
echo 210 > /proc/sys/vm/nr_hugepages
vmm="systemd-run --quiet --pipe --wait -p SystemCallFilter=~io_uring_setup -p SystemCallErrorNumber=EPERM $vmm"
truncate -s 64M data.raw
start --profile pc --kernel /payload/full/vmlinux --initrd /var/t/initrd.img \
  --cmdline 'console=ttyS0 net.ifnames=0 quiet rdinit=/start' --cpus 2 --memory 384M,hugepages=2M --generation-id 1 \
  --disk $root --disk path=/var/t/data.raw,format=raw --net tap=tap0,mtu=1400,queues=2,vhost=off,rate=RATE \
  --watchdog action=pause --panic action=poweroff
ip address replace 10.77.0.1/24 dev tap0; ip link set tap0 mtu 1400 up
"#;

/// Bytes a second that the card carries at first, each way.
const RATE: u64 = 100_000;

/// Goes on from the snapshot, in another process, which does something else about a watchdog.
const RESTORE: &str = r#"
jq '.services.watchdog.action = "ACTION"' saved/spec.json > spec.json
run --restore /var/t/saved --spec /var/t/spec.json
ip address replace 10.77.0.1/24 dev tap0; ip link set tap0 mtu 1400 up
"#;

/// Listens for streams and gives some, and looks at all packets that are larger than the wire has.
const STREAMS: &str = r#"
for p in 9000 9001; do
  (socat -u TCP-LISTEN:$p,reuseaddr OPEN:got-$p,creat,trunc >/dev/null 2>&1 &)
  ((seq 400000 | socat -u - TCP-LISTEN:1$p,reuseaddr) >/dev/null 2>&1 &)
done
(tcpdump -l -n -i tap0 'tcp and greater 3000' >big 2>tcpdump.log &)
for i in $(seq 50); do [ $(ss -ltn | grep -c ':1*900[01] ') = 4 ] && grep -q listening tcpdump.log && exit 0; sleep 0.2; done
exit 1"#;

/// What hwclock does: RTC_UIE_ON (rtc(4)), an interrupt each second.
const THREE_SECONDS: &str = r#"perl -e '$SIG{ALRM} = sub { die "no tick" }; alarm 30; open(F, "<", "/dev/rtc0") or die $!; ioctl(F, 0x7003, 0) or die $!; for (1..3) { sysread(F, $b, 8) == 8 or die $! } ioctl(F, 0x7004, 0) or die $!; print "three\n"'"#;

#[track_caller]
fn number(text: &str) -> i64 {
    let number = text.trim().parse();
    number.unwrap_or_else(|_| panic!("no number: {text:?}"))
}

/// Entropy, time, and the pages that hold the guest.
fn basics_are_there(host: &Host) {
    let kernel = in_guest(host, "uname -r", 60);
    assert!(!kernel.contains("cloud"), "{kernel}");
    let random = "cat /sys/class/misc/hw_random/rng_current; for i in 1 2; do head -c 4096 /dev/hwrng | cksum; done";
    let said = in_guest(host, random, 60);
    let lines: Vec<_> = said.lines().collect();
    assert!(
        lines[0].starts_with("virtio_rng") && lines[1] != lines[2],
        "{said}"
    );
    let guest = in_guest(host, "cat /sys/class/rtc/rtc0/since_epoch", 60);
    let difference = number(&on_host(host, "date +%s", 60)) - number(&guest);
    assert!((0..60).contains(&difference), "{difference} s");
    assert_eq!(in_guest(host, THREE_SECONDS, 60), "three");
    let free = on_host(host, "awk '/HugePages_Free/ {print $2}' /proc/meminfo", 60);
    assert_eq!(number(&free), 210 - 384 / 2, "of all memory huge pages");
}

/// Where a process may not use io_uring, threads do its work.
fn data_survives_without_io_uring(host: &Host) {
    let rings = "ls -l /proc/$(cat pid)/fd | grep -c io_uring; true";
    assert_eq!(on_host(host, rings, 60), "0");
    let data = "seq 1000000 9999999 2>/dev/null | head -c 4M";
    let copy = format!(
        "{data} | dd of=/dev/vdb bs=1M iflag=fullblock oflag=direct status=none; head -c 4M /dev/vdb | cksum"
    );
    let sum = on_host(host, &format!("{data} | cksum"), 60);
    assert_eq!(in_guest(host, &copy, 120), sum);
    let written = on_host(host, "head -c 4M data.raw | cksum", 60);
    assert_eq!(written, sum);
}

/// MTU, queues, buffers that are merged (VIRTIO 1.2 §5.1.3: bit 15), and plug.
fn a_card_tells_what_it_is(host: &Host) {
    let up = "ip address add 10.77.0.2/24 dev eth0; ip link set eth0 up; ping -c 3 -W 10 10.77.0.1 >/dev/null; \
        cat /sys/class/net/eth0/mtu; echo $(ls /sys/class/net/eth0/queues); cut -c 16 /sys/class/net/eth0/device/features";
    assert_eq!(in_guest(host, up, 60), "1400\nrx-0 rx-1 tx-0 tx-1\n1");
    for (plug, carrier) in [("false", "0"), ("true", "1")] {
        control(host, &format!("set-link --id net0 --up {plug}"));
        let seen = format!(
            "for i in {{1..30}}; do [ $(cat /sys/class/net/eth0/carrier) = {carrier} ] && break; sleep 1; done; \
             cat /sys/class/net/eth0/carrier"
        );
        assert_eq!(in_guest(host, &seen, 60), carrier);
    }
    in_guest(host, "ping -c 3 -W 10 10.77.0.1 >/dev/null", 60);
}

/// Counts what a card carries while five seconds pass; prints the bytes, and the hundredths of a second around them.
const FIVE_SECONDS: &str = "now() { read -r up _ < /proc/uptime; echo ${up/./}; }; \
    count=/sys/class/net/eth0/statistics/WAY_bytes; t=$(now) n=$(<$count); sleep 5; echo $(($(<$count) - n)) $(($(now) - t))";

/// A stream that is under way is neither faster than its limit nor stopped by it. Bounds are wide: the limit itself has
/// its test.
fn limit_is_kept(host: &Host, way: &str) {
    let said = in_guest(host, &FIVE_SECONDS.replace("WAY", way), 60);
    println!("{way} at {RATE} bytes/s: {said} bytes and hundredths of a second");
    let (bytes, time) = said.split_once(' ').unwrap();
    let (bytes, time) = (number(bytes), number(time));
    let most = i64::try_from(3 * RATE).unwrap() * time / 100;
    assert!(0 < bytes && bytes <= most, "{said}");
}

/// Streams that a limit would hold for four minutes: one begins under the limit that the card has from its start, the
/// other under one that was set since; each ends soon once its own is lifted.
fn a_rate_is_kept_until_it_is_lifted(host: &Host) {
    let listen = "(head -c 24M /dev/zero | socat -u - TCP-LISTEN:9200,reuseaddr >/dev/null 2>&1 &); \
        (socat -u TCP-LISTEN:9201,reuseaddr - 2>/dev/null | wc -c >sent &); \
        for i in $(seq 50); do [ $(ss -ltn | grep -c ':920[01] ') = 2 ] && exit 0; sleep 0.2; done; exit 1";
    on_host(host, listen, 60);
    // Else the kernels remember how slow the other side is, and cut what comes later into small packets.
    let forget = "echo 1 > /proc/sys/net/ipv4/tcp_no_metrics_save";
    on_host(host, forget, 60);
    in_guest(host, forget, 60);
    in_guest(host, "(wc -c < /dev/tcp/10.77.0.1/9200 > /tmp/got &)", 60);
    limit_is_kept(host, "rx");
    let other_way = format!("set-net-limits --id net0 --send-bytes-per-second {RATE}");
    control(host, &other_way);
    let got = "until [ -s /tmp/got ]; do sleep 1; done; cat /tmp/got";
    let bytes = (24 << 20).to_string();
    assert_eq!(in_guest(host, got, 150), bytes);
    in_guest(
        host,
        "(head -c 24M /dev/zero > /dev/tcp/10.77.0.1/9201 &)",
        60,
    );
    limit_is_kept(host, "tx");
    control(host, "set-net-limits --id net0");
    wait_for(host, "[ -s sent ]", 150);
    assert_eq!(on_host(host, "cat sent", 30), bytes);
}

/// Streams both ways, each pair by a processor of its own, since the tap answers on the queue that a flow came from; in
/// packets that only a wire would cut.
fn both_pairs_carry_large_packets(host: &Host) {
    on_host(host, STREAMS, 60);
    let sum = on_host(host, "seq 400000 | cksum", 60);
    for cpu in [0, 1] {
        let send = format!("taskset -c {cpu} bash -c 'seq 400000 > /dev/tcp/10.77.0.1/900{cpu}'");
        in_guest(host, &send, 120);
        let got = format!("[ \"$(cksum < got-900{cpu})\" = \"{sum}\" ]");
        wait_for(host, &got, 60);
        let take = format!("taskset -c {cpu} bash -c 'cksum < /dev/tcp/10.77.0.1/1900{cpu}'");
        assert_eq!(in_guest(host, &take, 120), sum);
    }
    let count =
        "for q in input.0 input.1; do awk -v q=$q '$NF ~ q {print $2 + $3}' /proc/interrupts; done";
    let interrupts = in_guest(host, count, 60);
    println!("interrupts of the pairs: {interrupts:?}");
    assert!(
        interrupts.lines().all(|count| number(count) > 20),
        "{interrupts}"
    );
    for (from, to) in [("2", "1"), ("1", "2")] {
        let seen = format!("grep -q '10.77.0.{from}\\.[0-9]* > 10.77.0.{to}' big");
        wait_for(host, &seen, 30);
    }
    on_host(host, "kill $(pgrep -x tcpdump)", 30);
}

/// The machine speaks for its guest, and the guest itself when it is told.
fn a_guest_is_announced(host: &Host) {
    let listen = "(tcpdump -l -n -i tap0 'rarp or arp' >told 2>tcpdump.log &); \
        for i in $(seq 50); do grep -q listening tcpdump.log && exit 0; sleep 0.2; done; exit 1";
    on_host(host, listen, 60);
    control(host, "announce");
    wait_for(
        host,
        "grep -q Reverse told && grep -Eq 'who-has 10.77.0.2.* tell 10.77.0.2|nnouncement 10.77.0.2' told",
        60,
    );
    on_host(host, "kill $(pgrep -x tcpdump)", 30);
}

/// The guest opens its watchdog, once this has been answered, and does not feed it before it is told to close it. `before`:
/// what the driver has found about the time before its start, WDIOF_CARDRESET being 32.
fn starve_the_watchdog(host: &Host, before: &str) {
    let open = "sleep 3; exec 5>/dev/watchdog; until [ -e /tmp/close ]; do sleep 0.1; done; printf V >&5; exec 5>&-; \
        touch /tmp/closed";
    let line = format!("cat /sys/class/watchdog/watchdog0/bootstatus; ( ({open}) & )");
    assert_eq!(in_guest(host, &line, 60), before);
}

/// A guest that does not feed its watchdog is held, and goes on when it is let.
fn a_watchdog_bites(host: &Host) {
    starve_the_watchdog(host, "0");
    let paused =
        "/payload/bin/atoll-vmm ctl --api-socket api.sock info | grep -q '\"state\": \"paused\"'";
    wait_for(host, paused, 60);
    on_host(host, "grep 'did not feed its watchdog' vmm.log", 30);
    control(host, "resume");
    let close =
        "touch /tmp/close; until [ -e /tmp/closed ]; do sleep 0.1; done; rm /tmp/close /tmp/closed";
    in_guest(host, close, 60);
}

/// Goes on from the snapshot, with what is done about the watchdog, and with the disk of that moment.
fn restore(host: &Host, action: &str) {
    let go_on = RESTORE.replace("ACTION", action);
    let copy = "cp saved.qcow2 root.qcow2";
    on_host(host, &format!("{}{copy}{go_on}", shell::PREPARE), 120);
}

/// The kernel finds the device, and makes its random numbers anew when it wakes up as a copy.
fn a_copy_knows_that_it_is_one(host: &Host) {
    let found =
        "ls /sys/bus/acpi/drivers/vmgenid | grep : && ! dmesg | grep 'virtual machine fork'";
    in_guest(host, found, 60);
    control(host, "snapshot --to /var/t/saved");
    shell::end(host);
    on_host(host, "cp root.qcow2 saved.qcow2", 60);
    restore(host, "reset");
    let said = "for i in {1..30}; do dmesg | grep 'virtual machine fork' && break; sleep 1; done";
    assert!(in_guest(host, said, 120).contains("reseeded"));
    in_guest(host, "ping -c 3 -W 10 10.77.0.1 >/dev/null", 60);
}

/// The machine starts again, and its guest learns why.
fn a_watchdog_resets(host: &Host) {
    starve_the_watchdog(host, "0");
    let reset =
        "/payload/bin/atoll-vmm ctl --api-socket api.sock info | grep -q '\"reset_count\": 1,'";
    wait_for(host, reset, 60);
    on_host(host, "grep 'did not feed its watchdog.*Reset' vmm.log", 30);
    let status = "! mountpoint -q /tmp && cat /sys/class/watchdog/watchdog0/bootstatus";
    assert_eq!(in_guest(host, status, shell::BOOT_SECONDS), "32");
}

/// The guest is asked to shut down, as by its power button; nothing in it listens, so it goes on.
fn a_watchdog_asks_for_a_shutdown(host: &Host) {
    restore(host, "shutdown");
    let events = "awk '{print $1}' /sys/firmware/acpi/interrupts/sci";
    let before = number(&in_guest(host, events, 60));
    starve_the_watchdog(host, "0");
    wait_for(
        host,
        "grep -q 'did not feed its watchdog.*Shutdown' vmm.log",
        60,
    );
    let asked = format!(
        "for i in {{1..60}}; do [ $({events}) -gt {before} ] && echo asked && break; sleep 0.5; done"
    );
    assert_eq!(in_guest(host, &asked, 60), "asked");
    shell::end(host);
}

/// The machine ends as one that crashed, and says why.
fn a_watchdog_ends_a_machine(host: &Host) {
    restore(host, "poweroff");
    starve_the_watchdog(host, "0");
    wait_for(host, "[ -e exit ]", 60);
    assert_eq!(on_host(host, "cat exit", 30), "3");
    let ended = "grep 'machine ended.*Crashed.*did not feed its watchdog' vmm.log";
    on_host(host, ended, 30);
}

/// Its last words are heard: the machine ends as one that crashed.
fn a_panic_is_heard(host: &Host) {
    let crash = "printf 'echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger\\r' | \
        socat -t 2 - UNIX-CONNECT:console.sock";
    on_host(host, crash, 60);
    wait_for(host, "[ -e exit ]", 60);
    assert_eq!(on_host(host, "cat exit", 30), "3");
    on_host(host, "grep \"the guest's kernel panicked\" vmm.log", 30);
}

#[test]
fn linux_finds_everything_on_the_pc_board() {
    let (hosts, _guard) = payload::start_with(1, payload::add_full_kernel);
    let host = &hosts[0];
    let start = START.replace("RATE", &RATE.to_string());
    on_host(host, &format!("{}{INITRD}{start}", shell::PREPARE), 120);
    in_guest(host, "mount -t tmpfs none /tmp", shell::BOOT_SECONDS);
    basics_are_there(host);
    data_survives_without_io_uring(host);
    a_card_tells_what_it_is(host);
    a_rate_is_kept_until_it_is_lifted(host);
    both_pairs_carry_large_packets(host);
    a_guest_is_announced(host);
    a_watchdog_bites(host);
    a_copy_knows_that_it_is_one(host);
    a_watchdog_resets(host);
    a_panic_is_heard(host);
    a_watchdog_asks_for_a_shutdown(host);
    a_watchdog_ends_a_machine(host);
}
