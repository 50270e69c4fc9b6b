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
    dd if="$image" bs=1M iflag=skip_bytes,count_bytes skip=$(((sectors + 1) * 512 + offset)) count="$length" \
        status=none | xz -dc --single-stream
}

make_initrd() {
    local image=$1 tree=$work/initrd file
    shift
    mkdir -p "$tree"/{bin,modules,proc,sys,dev,new}
    cp /bin/busybox "$tree/bin/"
    : > "$tree/modules/order"
    for file; do
        cp "$file" "$tree/modules/"
        basename "$file" >> "$tree/modules/order"
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
for d in proc sys dev; do $B mount --move /$d /new/$d; done
exec $B switch_root /new /sbin/init
X
    chmod +x "$tree/init"
    (cd "$tree" && find . | cpio -o -H newc --quiet | gzip -1) > "$image"
    rm -rf "$tree"
}
