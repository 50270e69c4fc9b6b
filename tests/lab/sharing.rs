// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Two Linux guests that have the pages of their kernel's file together (`--share-kernel`): Debian's generic kernel, the
//! host's own. One has a shell, and goes through all that touches its memory as a whole; the other one works on beside it.
//! Their CPU models are the two greatest that the host can give.
//!
//! ```text
//! /var/t/1   shell: shares ─ balloon ─ snapshot, restored: its own ─ reset: shares ─┐ move
//! /var/t/3                                                      its own ◄───────────┘
//! /var/t/2   works: shares ───────────────────────────────────────────────────────────►
//! ```

use std::time::Duration;

use atoll_tests::lab::Host;

use crate::models::{self, Model};
use crate::payload;
use crate::shell::{BOOT_SECONDS, on_host};

/// Pages that are shared of that kernel: its text alone is more. In kB.
const SHARED_KIB_MIN: u32 = 4096;

/// Defines `vm PLACE ARGUMENT…`, which starts a process of a machine in a directory of its own; its log is `vmm.log`,
/// `exit` its exit code. `lesser` and `greater` are the CPU models of the second and of the first machine. The guests'
/// initial RAM disk is the host's, with two modules more and what runs first: what works if `beside` is in its environment,
/// else a shell, which has the modules in `/mnt`.
const PREPARE: &str = r#"set -e
mkdir -p /var/t/{1,2,3}; cd /var/t
tree=$(mktemp -d); mkdir $tree/more
cp $(modinfo -n virtio_balloon) $(modinfo -n dummy) $tree/more/
cat > $tree/start <<'X'
#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc p /proc; $B mount -t sysfs s /sys; $B mount -t devtmpfs d /dev
$B grep -m 2 -E '^(model name|flags)' /proc/cpuinfo
while read -r module; do $B insmod /modules/$module; done < /modules/order
$B insmod /more/virtio_balloon.ko
until [ -e /dev/vda ]; do $B sleep 0.1; done
n=0
while [ "$beside" ]; do
  n=$((n + 1)); $B insmod /more/dummy.ko; $B rmmod dummy; echo 3 > /proc/sys/vm/drop_caches
  sum=$($B dd if=/dev/vda bs=1M count=1 2>/dev/null | $B md5sum); echo "T-ROUND $n ${sum%% *} done"
  $B sleep 5
done
$B mount -t ext4 -o ro /dev/vda /new; $B mount -t tmpfs t /new/mnt; $B cp /more/dummy.ko /new/mnt/
for d in proc sys dev; do $B mount --move /$d /new/$d; done
exec $B switch_root /new /bin/bash -i </new/dev/ttyS0 >/new/dev/ttyS0 2>&1
X
chmod +x $tree/start
(cat /payload/full/initrd.img; cd $tree; find . | cpio -o -H newc --quiet | gzip -1) > initrd.img
cat > vm <<'X'
#!/bin/bash
cd /var/t/$1; shift; rm -f exit
(code=0; setsid /payload/bin/atoll-vmm "$@" --api-socket api.sock --pid-file pid >>vmm.log 2>&1 || code=$?; echo $code > exit) \
  </dev/null >/dev/null 2>&1 &
X
chmod +x vm
start() {
  ./vm $1 run --cpu $4 --kernel /payload/full/vmlinux --share-kernel --initrd /var/t/initrd.img --memory 256 --balloon \
    --cmdline "console=ttyS0 quiet rdinit=/start $2" --disk path=/payload/guest/disk.raw,format=raw,readonly \
    --console $3
}
start 2 beside=yes stdio $lesser
start 1 '' socket=console.sock $greater
"#;

/// Of each machine whose directory is given: kB of the kernel's file that another process has mapped, too.
const SHARED: &str = r#"
for place in $places; do
  awk '/^[0-9a-f]+-/ { ours = /vmlinux/ } ours && /^Shared_Clean:/ { kib += $2 } END { print kib + 0 }' \
    /proc/$(cat $place/pid)/smaps
done"#;

/// What a kernel says whose text or data is not what it was. (A guest that was held may well miss its watchdog.)
const CRASHES: &str = "Oops|general protection|invalid opcode|unable to handle|Bad page";

/// Runs a line of shell in a guest that must succeed; what the VMM said goes with a failure.
#[track_caller]
fn in_guest(host: &Host, place: u8, line: &str, seconds: u32) -> String {
    let quoted = line.replace('\'', r"'\''");
    let run = format!(
        "cd {place}; for i in $(seq 300); do [ -S console.sock ] && break; [ -e exit ] && break; sleep 0.1; done; \
         python3 /payload/lab/console.py console.sock {seconds} '{quoted}' || {{ code=$?; tail vmm.log; exit $code; }}"
    );
    on_host(host, &run, seconds + 30)
}

#[track_caller]
fn control(host: &Host, place: u8, request: &str) -> String {
    let ask = format!(
        "cd {place}; /payload/bin/atoll-vmm ctl --api-socket api.sock {request} || {{ tail vmm.log; exit 1; }}"
    );
    on_host(host, &ask, 180)
}

/// Waits until a condition of the host's shell is met in a machine's directory.
#[track_caller]
fn wait_for(host: &Host, place: u8, condition: &str, seconds: u32) {
    let script = format!(
        "cd {place}; for i in $(seq {seconds}); do {condition} && exit 0; sleep 1; done; tail -n 20 vmm.log; exit 1"
    );
    on_host(host, &script, seconds);
}

/// The machine's info has this line.
#[track_caller]
fn wait_for_info(host: &Host, place: u8, line: &str) {
    let info = "/payload/bin/atoll-vmm ctl --api-socket api.sock info";
    wait_for(
        host,
        place,
        &format!("{info} | grep -q '{line}'"),
        BOOT_SECONDS,
    );
}

/// Its process has ended as it should.
#[track_caller]
fn wait_for_end(host: &Host, place: u8) {
    wait_for(host, place, "[ -e exit ]", 60);
    assert_eq!(on_host(host, &format!("cat {place}/exit"), 30), "0");
}

/// The guest with the shell loads a module, which its kernel links with itself, and reads a file anew from its disk: its
/// checksum. The one beside it has gone on, and read the same each time.
#[track_caller]
fn both_work(host: &Host, place: u8, seconds: u32) -> String {
    let work = format!(
        "insmod /mnt/dummy.ko && rmmod dummy && echo 3 > /proc/sys/vm/drop_caches && \
         md5sum /bin/bash && ! dmesg | grep -E '{CRASHES}'"
    );
    let sums = in_guest(host, place, &work, seconds);
    let rounds = "count() { grep -ac '^T-ROUND .* done' vmm.log; }; n=$(count)";
    let script = format!(
        "cd 2; {rounds}; for i in $(seq 120); do [ $(count) -gt $n ] && break; sleep 1; done; \
         [ $(count) -gt $n ] && ! grep -aE '{CRASHES}' vmm.log && \
         grep -a '^T-ROUND .* done' vmm.log | cut -d ' ' -f 3 | sort -u || {{ tail -n 30 vmm.log; exit 1; }}"
    );
    let read = on_host(host, &script, 150);
    assert_eq!(
        read,
        on_host(
            host,
            "head -c 1M /payload/guest/disk.raw | md5sum | cut -d ' ' -f 1",
            30
        )
    );
    sums
}

/// What each guest sees of its CPU is its machine's model: the greater one has what the lesser has not.
fn see_their_models(host: &Host, [lesser, greater]: [&Model; 2], place: u8) {
    let more = greater.beyond(lesser);
    println!("{} has beside {}: {more:?}", greater.name, lesser.name);
    assert!(!more.is_empty());
    let rows = "grep -m 2 -E '^(model name|flags)'";
    let cpu = in_guest(host, place, &format!("{rows} /proc/cpuinfo"), 60);
    greater.is_seen(&cpu, &more, &[]);
    let cpu = on_host(host, &format!("tr -d '\\r' < 2/vmm.log | {rows}"), 30);
    lesser.is_seen(&cpu, &["ssse3".to_owned()], &more);
}

/// Pages of the kernel that a machine has with the one beside it, in kB.
fn shared(host: &Host, place: u8) -> [u32; 2] {
    let said = on_host(host, &format!("places='{place} 2'; {SHARED}"), 60);
    println!("machine {place} and the one beside it share {said:?} kB");
    let kib: Vec<u32> = said.lines().map(|kib| kib.parse().unwrap()).collect();
    kib.try_into().unwrap()
}

fn saved_and_restored(host: &Host) {
    control(host, 1, "snapshot --to saved");
    control(host, 1, "shutdown");
    wait_for_end(host, 1);
    on_host(host, "rm -f 1/console.sock; ./vm 1 run --restore saved", 60);
}

fn resets_itself(host: &Host) {
    let reset = "(sleep 2; echo b > /proc/sysrq-trigger) & echo going";
    in_guest(host, 1, reset, 60);
    wait_for_info(host, 1, "\"reset_count\": 1");
}

/// To another process of this host.
fn moves(host: &Host) {
    on_host(host, "./vm 3 receive --socket move.sock", 60);
    wait_for(host, 3, "[ -S move.sock ]", 60);
    println!("{}", control(host, 1, "migrate --to /var/t/3/move.sock"));
    wait_for_end(host, 1);
}

#[test]
fn a_shared_kernel_goes_through_balloon_snapshot_reset_and_move() {
    let (hosts, _guard) = payload::start_with(1, payload::add_full_kernel);
    let host = &hosts[0];
    let together = |place| shared(host, place).iter().all(|kib| *kib > SHARED_KIB_MIN);
    let (fitting, beyond) = models::levels(host);
    let [.., lesser, greater] = &fitting[..] else {
        panic!("fewer than two models fit");
    };
    models::is_refused(host, &beyond[0], greater);
    let prepare = format!("lesser={} greater={}\n{PREPARE}", lesser.name, greater.name);
    host.check(&prepare, Duration::from_secs(120)).unwrap();
    let sums = both_work(host, 1, BOOT_SECONDS);
    see_their_models(host, [lesser, greater], 1);
    assert!(together(1));
    for target_mib in [160, 256] {
        control(host, 1, &format!("set-balloon --target-mib {target_mib}"));
        wait_for_info(host, 1, &format!("\"actual_mib\": {target_mib}"));
    }
    assert!(together(1));
    saved_and_restored(host);
    assert_eq!(both_work(host, 1, 120), sums);
    assert_eq!(shared(host, 1), [0, 0]);
    resets_itself(host);
    assert_eq!(both_work(host, 1, BOOT_SECONDS), sums);
    assert!(together(1));
    moves(host);
    assert_eq!(both_work(host, 3, 120), sums);
    see_their_models(host, [lesser, greater], 3);
    for place in [2, 3] {
        control(host, place, "shutdown");
        wait_for_end(host, place);
    }
}
