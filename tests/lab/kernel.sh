# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Sourced by the scripts that make a lab host's kernel from a Debian one:
#
#   extract_vmlinux BZIMAGE            prints plain ELF: entered by PVH, no decompression under emulation
#   make_initrd FILE MODULE...         busybox, which loads these modules (in this order) and starts the root disk's init

# The compressed payload of a bzImage (Linux boot protocol: setup_sects at 0x1f1, payload_offset at 0x248).
extract_vmlinux() {
    local image=$1 sectors offset length
    sectors=$(od -An -tu1 -j $((0x1f1)) -N1 "$image")
    offset=$(od -An -tu4 -j $((0x248)) -N4 "$image")
    length=$(od -An -tu4 -j $((0x24c)) -N4 "$image")
    # Its last four bytes are its size uncompressed, which is no part of a zstd frame.
    payload() {
        dd if="$image" bs=1M iflag=skip_bytes,count_bytes skip=$(((sectors + 1) * 512 + offset)) \
            count=$((length - $1)) status=none
    }
    case $(payload 0 | od -An -tx1 -N4) in
    ' fd 37 7a 58') payload 0 | xz -dc --single-stream ;;
    ' 28 b5 2f fd') payload 4 | zstd -dcq ;;
    *) echo "$image: compressed by neither xz nor zstd" >&2; return 1 ;;
    esac
}

# A further archive may have modules of the running kernel in /more/modules, for the root disk.
make_initrd() {
    local image=$1 tree=$work/initrd file
    shift
    mkdir -p "$tree"/{bin,modules,proc,sys,dev,new}
    cp /bin/busybox "$tree/bin/"
    : > "$tree/modules/order"
    for file; do
        case $file in
        *.xz) xz -dc "$file" > "$tree/modules/$(basename "$file" .xz)" ;;
        *) cp "$file" "$tree/modules/" ;;
        esac
        basename "$file" .xz >> "$tree/modules/order"
    done
    cat > "$tree/init" <<'X'
#!/bin/busybox sh
B=/bin/busybox
$B mount -t proc p /proc
$B mount -t sysfs s /sys
$B mount -t devtmpfs d /dev
while read -r module; do $B insmod "/modules/$module"; done < /modules/order
tries=0
while [ ! -e /dev/vda ] && [ $tries -lt 200 ]; do $B sleep 0.05; tries=$((tries + 1)); done
$B mount -t ext4 -o noatime /dev/vda /new || exec $B sh
[ ! -d /more ] || { $B cp -a /more/modules /new/usr/lib/; $B chroot /new /sbin/depmod; }
for d in proc sys dev; do $B mount --move /$d /new/$d; done
exec $B switch_root /new "${start:-/sbin/init}"
X
    chmod +x "$tree/init"
    pack_initrd "$tree" > "$image"
    rm -rf "$tree"
}

pack_initrd() {
    (cd "$1" && find . | cpio -o -H newc --quiet | gzip -1)
}
