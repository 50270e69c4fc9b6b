// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the stock Debian cloud kernel and Debian's udev do with disks, in one machine: units of the SCSI host, among
//! them the root disk and a CD-ROM drive, and disks on slots of their own, in image files and on a block device.

use atoll_tests::lab::Host;

use crate::payload;
use crate::shell::{self, control, in_guest, on_host, refused, wait_for};

/// `data` and `plain` are written to; `frozen` and `still` cannot be; `behind` is a block device of the host's.
const START: &str = r#"
qemu-img create -q -f qcow2 data.qcow2 256M
truncate -s 256M plain.raw; truncate -s 64M late.raw behind.raw; head -c 4M /dev/urandom > frozen.raw
behind=$(losetup -f --show behind.raw)
start $kernel --cmdline "$cmdline" --cpus 2 --memory 512 \
  --disk id=root,bus=scsi,target=4,serial=root-2342,$root \
  --disk id=data,bus=scsi,target=9,path=/var/t/data.qcow2,format=qcow2,discard,detect-zeroes,serial=data-4711 \
  --disk id=frozen,bus=scsi,path=/var/t/frozen.raw,format=raw,readonly \
  --disk id=drive,bus=cdrom,target=2,path=/payload/discs/1.iso \
  --disk id=plain,path=/var/t/plain.raw,format=raw,discard,detect-zeroes,cache=none,serial=plain-0815 \
  --disk id=behind,path=$behind,format=raw,cache=none \
  --disk id=still,path=/var/t/frozen.raw,format=raw,readonly
"#;

/// Functions of the guest's shell: a disk's name by its serial number; its size when it is as wanted; data, no two
/// sectors of which are alike.
const FUNCTIONS: &str = "disk() { basename $(readlink -f /dev/disk/by-id/*$1); }; \
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
    let mounted = "[ /dev/$(disk root-2342) = $(findmnt -no SOURCE /) ] && echo $(cat /sys/block/$(disk plain-0815)/serial)";
    assert_eq!(in_guest(host, mounted, 60), "plain-0815");
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
    let read = "a=${EPOCHREALTIME/./}; dd if=/dev/$(disk plain-0815) of=/dev/null bs=1M count=16 iflag=direct status=none; \
        echo $(((${EPOCHREALTIME/./} - a) / 1000))";
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
    let (hosts, _guard) = payload::start_with(1, payload::add_discs);
    let host = &hosts[0];
    on_host(host, &format!("{}{START}", shell::PREPARE), 120);
    in_guest(host, "true", shell::BOOT_SECONDS);
    have_names(host);
    a_file_system_is_filled_and_trimmed(host);
    ranges_are_freed_and_zeroed(host, "data-4711", "data.qcow2");
    ranges_are_freed_and_zeroed(host, "plain-0815", "plain.raw");
    what_is_read_only_stays(host);
    growth_is_seen(host);
    a_unit_comes_and_goes(host);
    discs_change(host);
    a_limit_comes_and_goes(host);
    files_are_open_as_asked(host);
    shell::end(host);
    on_host(
        host,
        "qemu-img check data.qcow2 && qemu-img check root.qcow2",
        60,
    );
}
