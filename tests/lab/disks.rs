// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the stock Debian cloud kernel and Debian's udev do with disks, in one machine: units of the SCSI host, among
//! them the root disk and a CD-ROM drive, and disks on slots of their own, in image files, on a block device, and in QEMU's
//! storage daemon. Some come while it runs.

use atoll_tests::lab::Host;

use crate::payload;
use crate::shell::{self, control, in_guest, on_host, refused, wait_for};

/// `data` and `plain` are written to; `frozen` and `still` cannot be; `behind` is a block device of the host's. The storage
/// daemon has a disk in `served.raw`.
const START: &str = r#"
qemu-img create -q -f qcow2 data.qcow2 256M
truncate -s 256M plain.raw; truncate -s 64M late.raw behind.raw; head -c 4M /dev/urandom > frozen.raw
behind=$(losetup -f --show behind.raw)
truncate -s 96M served.raw
setsid env LD_LIBRARY_PATH=/payload/storage /payload/storage/qemu-storage-daemon \
  --blockdev driver=file,node-name=f,filename=served.raw,discard=unmap \
  --export type=vhost-user-blk,id=e,node-name=f,writable=on,num-queues=2,addr.type=unix,addr.path=served.sock \
  </dev/null >served.log 2>&1 &
for i in $(seq 300); do [ -S served.sock ] && break; sleep 0.1; done
[ -S served.sock ] || { cat served.log; exit 1; }
start $kernel --cmdline "$cmdline" --cpus 2 --memory 512M,shared \
  --disk id=root,bus=scsi,target=4,serial=root-2342,$root \
  --disk id=data,bus=scsi,target=9,path=/var/t/data.qcow2,format=qcow2,discard,detect-zeroes,serial=data-4711 \
  --disk id=frozen,bus=scsi,path=/var/t/frozen.raw,format=raw,readonly \
  --disk id=drive,bus=cdrom,target=2,path=/payload/discs/1.iso \
  --disk id=plain,path=/var/t/plain.raw,format=raw,discard,detect-zeroes,cache=none,queues=2,serial=plain-0815 \
  --disk id=behind,path=$behind,format=raw,cache=none \
  --disk id=still,path=/var/t/frozen.raw,format=raw,readonly \
  --vhost-user socket=/var/t/served.sock,type=blk,queues=2
"#;

/// Functions of the guest's shell: a disk's name by its serial number; waits for a disk; its size when it is as wanted;
/// milliseconds that a command takes; data, no two sectors of which are alike.
const FUNCTIONS: &str = "disk() { basename $(readlink -f /dev/disk/by-id/*$1); }; \
    come() { for i in {1..60}; do ls /dev/disk/by-id/*$1 >/dev/null 2>&1 && return; sleep 1; done; return 1; }; \
    took() { local a=${EPOCHREALTIME/./}; \"$@\" || return 1; echo $(((${EPOCHREALTIME/./} - a) / 1000)); }; \
    size() { for i in {1..30}; do [ $(cat /sys/block/$(disk $1)/size) = $2 ] && return; sleep 1; done; return 1; }; \
    data() { seq 1000000 9999999 2>/dev/null | head -c $1; }";

/// MiB that a file of the host takes. Space is counted when it is on disk.
fn space(host: &Host, file: &str) -> u64 {
    let blocks = on_host(host, &format!("sync {file}; stat -c %b {file}"), 60);
    blocks.parse::<u64>().unwrap() >> 11
}

/// The checksum of that much data, computed on the host.
fn sum(host: &Host, size: &str) -> String {
    let data = format!("seq 1000000 9999999 2>/dev/null | head -c {size} | cksum");
    on_host(host, &data, 60)
}

/// By serial number and address; the root disk is the one with target 4.
fn have_names(host: &Host) {
    in_guest(host, shell::UDEV, 120);
    in_guest(host, FUNCTIONS, 60);
    let place = "for s in root-2342 data-4711 frozen drive; do \
         d=$(disk $s); echo $s $(basename $(readlink /sys/block/$d/device)) $(cat /sys/block/$d/ro); done";
    let expected = "root-2342 0:0:4:0 0\ndata-4711 0:0:9:0 0\nfrozen 0:0:0:0 1\ndrive 0:0:2:0 1";
    assert_eq!(in_guest(host, place, 60), expected);
    let mounted = "[ /dev/$(disk root-2342) = $(findmnt -no SOURCE /) ] && d=/sys/block/$(disk plain-0815) && echo $(cat $d/serial) $(ls $d/mq)";
    assert_eq!(in_guest(host, mounted, 60), "plain-0815 0 1");
}

/// What each CPU asks of the disk with two queues goes by a queue of its own.
fn both_queues_serve(host: &Host) {
    let read = "d=$(disk plain-0815); v=$(basename $(readlink /sys/block/$d/device)); \
        count() { awk -v q=$v-req.$1 '$NF == q {print $2 + $3}' /proc/interrupts; }; \
        for c in 0 1; do n=$(count $c); taskset -c $c dd if=/dev/$d of=/dev/null bs=64k count=64 iflag=direct status=none; \
        echo $(($(count $c) - n)); done";
    let interrupts = in_guest(host, read, 60);
    println!("interrupts of the queues: {interrupts:?}");
    let many = |count: &str| count.parse::<u32>().unwrap() > 30;
    assert_eq!(interrupts.lines().filter(|count| many(count)).count(), 2);
}

/// What is written is read back past the page cache, and trimmed: the image has its space back.
fn a_file_system_is_filled_and_trimmed(host: &Host) {
    let write = "mkdir /tmp/m; mkfs.ext4 -q /dev/$(disk data-4711) && mount /dev/$(disk data-4711) /tmp/m && \
        data 64M > /tmp/m/f && sync && echo 3 > /proc/sys/vm/drop_caches; cksum < /tmp/m/f";
    let empty = space(host, "data.qcow2");
    assert_eq!(in_guest(host, write, 300), sum(host, "64M"));
    let filled = space(host, "data.qcow2");
    assert!(filled >= empty + 64, "{filled} MiB of {empty}");
    in_guest(
        host,
        "rm /tmp/m/f; sync; fstrim /tmp/m && umount /tmp/m",
        60,
    );
    let trimmed = space(host, "data.qcow2");
    assert!(trimmed + 60 < filled, "{trimmed} MiB of {filled}");
}

/// Discarded and zeroed by range, with a value for zeroes that are written one by one: nothing.
fn ranges_are_freed_and_zeroed(host: &Host, serial: &str, file: &str) {
    let write = format!(
        "d=/dev/$(disk {serial}); blkdiscard $d; data 8M | dd of=$d bs=1M iflag=fullblock oflag=direct status=none"
    );
    in_guest(host, &write, 120);
    let filled = space(host, file);
    in_guest(host, "blkdiscard -l 4M $d", 60);
    let discarded = space(host, file);
    assert!(
        discarded + 3 <= filled,
        "{file}: {discarded} MiB of {filled}"
    );
    let zero = "blkdiscard -z -o 4M -l 2M $d && cmp -i 4M:0 -n 2M $d /dev/zero && \
        cmp <(dd if=$d bs=1M skip=6 count=2 status=none) <(data 8M | tail -c 2M) && \
        dd if=/dev/zero of=$d bs=1M seek=64 count=32 oflag=direct status=none";
    in_guest(host, zero, 120);
    let zeroed = space(host, file);
    assert!(
        zeroed <= discarded + 1,
        "{file}: {zeroed} MiB of {discarded}"
    );
}

fn what_is_read_only_stays(host: &Host) {
    let before = on_host(host, "cksum < frozen.raw", 60);
    for name in ["frozen", "still"] {
        let write = format!(
            "[ $(cat /sys/block/$(disk {name})/ro) = 1 ] && ! dd if=/dev/zero of=/dev/$(disk {name}) bs=4k count=1 \
             oflag=direct 2>/dev/null && cksum < /dev/$(disk {name})"
        );
        assert_eq!(in_guest(host, &write, 60), before, "{name}");
    }
    assert_eq!(on_host(host, "cksum < frozen.raw", 60), before);
}

fn growth_is_seen(host: &Host) {
    for (id, serial) in [("data", "data-4711"), ("plain", "plain-0815")] {
        let grow = format!("resize-disk --id {id} --size-bytes {}", 320 << 20);
        control(host, &grow);
        in_guest(host, &format!("size {serial} {}", 320 << 11), 60);
    }
}

/// A unit comes and goes, at one target and at another, and leaves its image to others.
fn a_unit_comes_and_goes(host: &Host) {
    for target in [100, 200] {
        let add = "add-disk --disk id=late,bus=scsi,path=/var/t/late.raw,format=raw,serial=late-1";
        control(host, &format!("{add},target={target}"));
        let write = format!(
            "for i in {{1..30}}; do [ -e /dev/disk/by-id/*late-1 ] && break; sleep 1; done; d=$(disk late-1); \
             basename $(readlink /sys/block/$d/device); \
             data {target}k | dd of=/dev/$d bs=1M iflag=fullblock status=none conv=fsync"
        );
        let place = in_guest(host, &write, 90);
        assert_eq!(place, format!("0:0:{target}:0"));
        control(host, "remove-device --id late");
        let gone = "for i in {1..30}; do [ -e /sys/block/$d ] || break; sleep 1; done; [ ! -e /sys/block/$d ]";
        in_guest(host, gone, 60);
        let closed = "[ $(ls -l /proc/$(cat pid)/fd | grep -c late.raw) = 0 ]";
        wait_for(host, closed, 30);
        let size = format!("{target}k");
        let written = on_host(host, &format!("head -c {size} late.raw | cksum"), 60);
        assert_eq!(written, sum(host, &size));
    }
}

/// udev locks a drive with a disc in it: it is asked, opens the tray, and takes the next disc; a guest ejects, too.
fn discs_change(host: &Host) {
    let read = "mkdir -p /tmp/cd; mount -r /dev/sr0 /tmp/cd && cat /tmp/cd/words && umount /tmp/cd";
    assert_eq!(in_guest(host, read, 60), "disc 1");
    let said = refused(host, "eject-disk --id drive");
    assert!(said.contains("is asked to open it"), "{said}");
    let opened = "/payload/bin/atoll-vmm ctl --api-socket api.sock eject-disk --id drive";
    wait_for(host, opened, 60);
    assert!(!in_guest(host, &format!("{read}; true"), 60).contains("disc"));
    control(host, "insert-disk --id drive --path /payload/discs/2.iso");
    assert_eq!(in_guest(host, read, 60), "disc 2");
    // CDROM_LOCKDOOR, CDROMEJECT of linux/cdrom.h, on a descriptor that needs no disc.
    let eject = r#"perl -e 'sysopen(D, "/dev/sr0", 04000) or die; ioctl(D, 0x5329, 0); ioctl(D, 0x5309, 0) or die $!'"#;
    in_guest(host, eject, 60);
    control(host, "insert-disk --id drive --path /payload/discs/1.iso");
    assert_eq!(in_guest(host, read, 60), "disc 1");
}

/// 16 MiB at 4 MiB a second take seconds, and do not any more once the limit is gone.
fn a_limit_comes_and_goes(host: &Host) {
    let read =
        "took dd if=/dev/$(disk plain-0815) of=/dev/null bs=1M count=16 iflag=direct status=none";
    let milliseconds = || in_guest(host, read, 120).parse::<u64>().unwrap();
    milliseconds();
    control(
        host,
        &format!(
            "set-disk-limits --id plain --read-bytes-per-second {}",
            4 << 20
        ),
    );
    let limited = milliseconds();
    control(host, "set-disk-limits --id plain");
    let free = milliseconds();
    println!("16 MiB: {limited} ms at 4 MiB a second, then {free} ms");
    assert!(limited >= 3000 && free < limited, "{limited} ms, {free} ms");
}

/// Requests are limited as bytes are, on both buses, and what is held back goes on with the next limit. A burst is had at
/// once, and no more than it: that of its rate, the time tells from below; that it is had, from above, with seconds to spare.
fn operations_are_limited_and_have_bursts(host: &Host) {
    let limit = |what: &str| control(host, &format!("set-disk-limits --id {what}"));
    let milliseconds = |line: &str| {
        let took = in_guest(host, &format!("took dd {line} status=none"), 120);
        took.parse::<u64>().unwrap()
    };
    let read = "if=/dev/$(disk data-4711) of=/dev/null bs=4k iflag=direct";
    limit("data --read-operations-per-second 5");
    let steady = milliseconds(&format!("{read} count=20"));
    limit("data --read-operations-per-second 5 --read-operations-burst 40");
    let burst = milliseconds(&format!("{read} count=60"));
    println!("5 reads a second: 20 took {steady} ms; with a burst of 40, 60 took {burst} ms");
    assert!(steady >= 3000, "{steady} ms");
    assert!((3000..12_000).contains(&burst), "{burst} ms");
    limit("data");

    limit("plain --operations-per-second 1");
    let begin = "rm -f /tmp/through; ( (dd if=/dev/$(disk plain-0815) of=/dev/null bs=4k count=600 iflag=direct \
        status=none && echo yes > /tmp/through) & ); sleep 2; [ ! -e /tmp/through ]";
    in_guest(host, begin, 60);
    limit("plain --write-bytes-per-second 2097152 --write-bytes-burst 16777216");
    let end = "for i in {1..60}; do [ -e /tmp/through ] && break; sleep 1; done; cat /tmp/through";
    assert_eq!(in_guest(host, end, 90), "yes");
    let write = "if=/dev/urandom of=/dev/$(disk plain-0815) bs=1M count=24 oflag=direct";
    let burst = milliseconds(write);
    println!("2 MiB a second with a burst of 16 MiB: 24 MiB took {burst} ms");
    assert!((3000..12_000).contains(&burst), "{burst} ms");
    limit("plain");
}

/// Makes an image of each kind of compression, and what becomes of their content; tells its checksum.
const PACK: &str = r#"data() { seq 1000000 9999999 2>/dev/null | head -c $1; }
data 16M > packed.raw
for kind in zlib zstd; do
  qemu-img convert -c -f raw -O qcow2 -o compression_type=$kind packed.raw $kind.qcow2 || exit 1
  [ $(qemu-img check --output=json $kind.qcow2 | jq '."compressed-clusters"') = 256 ] || exit 1
done
data 9M | tail -c 3M | dd of=packed.raw bs=12k seek=7 iflag=fullblock conv=notrunc status=none
cksum < packed.raw"#;

/// Clusters that QEMU has compressed are read, and overwritten, the first and the last of them in part. Gives the
/// checksum of what they hold then.
fn compressed_clusters_are_read_and_rewritten(host: &Host) -> String {
    let expected = on_host(host, PACK, 120);
    for (kind, bus) in [("zlib", "scsi"), ("zstd", "blk")] {
        let add = format!(
            "add-disk --disk id={kind},bus={bus},path=/var/t/{kind}.qcow2,format=qcow2,serial={kind}-1"
        );
        control(host, &add);
        let rewrite = format!(
            "come {kind}-1 && d=/dev/$(disk {kind}-1) && data 16M | cmp - $d && data 9M | tail -c 3M | dd of=$d bs=12k \
             seek=7 iflag=fullblock oflag=direct conv=fsync status=none && echo 3 > /proc/sys/vm/drop_caches && cksum < $d"
        );
        assert_eq!(in_guest(host, &rewrite, 180), expected, "{kind}");
    }
    expected
}

/// Cache modes with what open(2) is told for them; 010000 is O_DSYNC of fcntl.h on x86, 040000 O_DIRECT.
const CACHES: [(&str, &str, u32); 3] = [
    ("unsafe", "blk", 0),
    ("writethrough", "scsi", 0o10_000),
    ("directsync", "blk", 0o50_000),
];

/// Files are open as their caches say, and so the guest is told; it writes, and its flushes succeed.
fn caches_are_as_asked(host: &Host) {
    for (cache, bus, flags) in CACHES {
        on_host(host, &format!("truncate -s 16M {cache}.raw"), 30);
        let add = format!(
            "add-disk --disk id={cache},bus={bus},path=/var/t/{cache}.raw,format=raw,cache={cache},serial={cache}"
        );
        control(host, &add);
        let open = format!(
            "p=/proc/$(cat pid); for f in $(ls $p/fd); do [ \"$(readlink $p/fd/$f)\" = /var/t/{cache}.raw ] || continue; \
             echo $(($(awk '/^flags/ {{print $2}}' $p/fdinfo/$f) & 050000)); done | sort -u"
        );
        assert_eq!(on_host(host, &open, 60), flags.to_string(), "{cache}");
        let write = format!(
            "come {cache} && data 4M | dd of=/dev/$(disk {cache}) bs=64k iflag=fullblock oflag=direct conv=fsync status=none && \
             cat /sys/block/$(disk {cache})/queue/write_cache"
        );
        let told = match flags & 0o10_000 {
            0 => "write back",
            _ => "write through",
        };
        assert_eq!(in_guest(host, &write, 180), told, "{cache}");
        let answer = control(host, "counters");
        let counters: serde_json::Value = serde_json::from_str(&answer).unwrap();
        let disks = counters["disks"].as_array().unwrap();
        let disk = disks.iter().find(|disk| disk["id"] == cache).unwrap();
        println!("{cache}: {disk}");
        assert!(disk["written_bytes"].as_u64().unwrap() >= 4 << 20, "{disk}");
        assert_eq!(disk["failed_requests"], 0, "{disk}");
    }
}

/// A disk in another process, which QEMU's people wrote: both of its queues, its cache mode, which the guest may change,
/// and its space.
fn another_process_has_a_disk(host: &Host) {
    let write = "for b in /sys/block/vd*; do [ $(cat $b/size) = 196608 ] && d=/dev/${b##*/}; done; b=/sys/block/${d##*/}; \
        echo $(ls $b/mq); data 8M > /tmp/w; for c in 0 1; do taskset -c $c dd if=/tmp/w of=$d bs=1M skip=$((4 * c)) \
        seek=$((4 * c)) count=4 oflag=direct conv=fsync status=none || echo failed; done; \
        for cache in 'write through' 'write back'; do echo $cache > $b/cache_type; cat $b/queue/write_cache; done; \
        echo 3 > /proc/sys/vm/drop_caches; cmp -n 8388608 /tmp/w $d && rm /tmp/w";
    assert_eq!(in_guest(host, write, 180), "0 1\nwrite through\nwrite back");
    let filled = space(host, "served.raw");
    in_guest(host, "blkdiscard -o 4M -l 4M $d", 60);
    let discarded = space(host, "served.raw");
    assert!(
        discarded + 3 <= filled,
        "{discarded} MiB of {filled} are left"
    );
    let written = on_host(host, "head -c 4M served.raw | cksum", 60);
    assert_eq!(written, sum(host, "4M"));
}

/// The kernel moves what raw disks transfer, past its page cache where that is asked for, also to a block device.
fn files_are_open_as_asked(host: &Host) {
    let write =
        "data 4M | dd of=/dev/$(disk behind) bs=1M iflag=fullblock oflag=direct status=none; sync";
    in_guest(host, write, 120);
    let written = on_host(host, "head -c 4M behind.raw | cksum", 60);
    assert_eq!(written, sum(host, "4M"));
    // O_DIRECT is 040000 of fcntl.h on x86.
    let direct = "p=/proc/$(cat pid); for f in $(ls $p/fd); do \
        flags=$(awk '/^flags/ {print $2}' $p/fdinfo/$f 2>/dev/null) || continue; \
        [ $((flags & 040000)) != 0 ] && readlink $p/fd/$f; done | sort -u; true";
    let direct = on_host(host, direct, 60);
    assert!(
        direct.starts_with("/dev/loop") && direct.ends_with("/var/t/plain.raw"),
        "{direct}"
    );
    on_host(host, "ls -l /proc/$(cat pid)/fd | grep -q io_uring", 60);
}

#[test]
fn linux_uses_every_ability_of_disks() {
    let (hosts, _guard) = payload::start_with(1, |payload| {
        payload::add_discs(payload)?;
        payload::add_storage_daemon(payload)
    });
    let host = &hosts[0];
    on_host(host, &format!("{}{START}", shell::PREPARE), 120);
    in_guest(host, "true", shell::BOOT_SECONDS);
    have_names(host);
    both_queues_serve(host);
    a_file_system_is_filled_and_trimmed(host);
    ranges_are_freed_and_zeroed(host, "data-4711", "data.qcow2");
    ranges_are_freed_and_zeroed(host, "plain-0815", "plain.raw");
    what_is_read_only_stays(host);
    growth_is_seen(host);
    a_unit_comes_and_goes(host);
    discs_change(host);
    a_limit_comes_and_goes(host);
    files_are_open_as_asked(host);
    operations_are_limited_and_have_bursts(host);
    let rewritten = compressed_clusters_are_read_and_rewritten(host);
    caches_are_as_asked(host);
    another_process_has_a_disk(host);
    shell::end(host);
    on_host(
        host,
        "qemu-img check data.qcow2 && qemu-img check root.qcow2",
        60,
    );
    for kind in ["zlib", "zstd"] {
        let check = format!(
            "qemu-img check --output=json {kind}.qcow2 > check && [ $(jq '.\"compressed-clusters\"' check) -lt 256 ] || \
             {{ cat check; exit 1; }}; qemu-img convert -O raw {kind}.qcow2 {kind}.raw; cksum < {kind}.raw"
        );
        assert_eq!(on_host(host, &check, 120), rewritten, "{kind}");
    }
    for (cache, ..) in CACHES {
        let written = on_host(host, &format!("head -c 4M {cache}.raw | cksum"), 60);
        assert_eq!(written, sum(host, "4M"), "{cache}");
    }
}
