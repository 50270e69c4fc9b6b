#!/bin/bash
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Builds what boots by UEFI from Debian's packages, and prints the directory that holds it:
#
#   disk.raw           GPT: EFI system partition (shim and GRUB, as Debian signs them), then the guest image's root
#                      with its kernel inside; login root, password "atoll"
#   boot.iso           El Torito, the same loaders and kernel; its initial RAM disk is busybox, which says
#                      "ISO-READY" on the serial console
#   unsigned.raw       like the disk's first partition, but shim has lost its signature; its GRUB says "UNSIGNED-RAN"
#   net.efi            the same GRUB as one that reads grub/grub.cfg where it came from, by TFTP
#   OVMF_CODE_4M.fd    the package ovmf's firmware and variables, as they are
#   OVMF_VARS_4M.fd, OVMF_VARS_4M.ms.fd
#
# No mounts, no loop devices: mtools and debugfs write into the file systems. Cached (image-cache.sh), keyed by this
# file and the guest image (run/guest-image.sh).
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
say() { echo "UEFI image: $*" >&2; }
guest=$("$here/guest-image.sh")

. "$here/image-cache.sh" uefi disk.raw "$(basename "$guest")"

# Unpacked beside the system: the boot loaders' own scripts would look for an EFI to install to.
fetch() {
    mkdir -p "$work/debs" "$root"
    (cd "$work/debs" && apt-get -qq -o APT::Sandbox::User=root download "$@" >&2)
    for deb in "$work/debs"/*.deb; do
        dpkg -x "$deb" "$root"
    done
    rm -rf "$work/debs"
}

# Shim starts the GRUB beside it; Debian's signed GRUB reads /EFI/debian/grub.cfg on its own device.
make_esp() {
    local image=$1 size=$2 config=$3
    truncate -s "$size" "$image"
    mkfs.vfat -n EFI "$image" >/dev/null
    mmd -i "$image" ::/EFI ::/EFI/BOOT ::/EFI/debian
    mcopy -i "$image" "$root/usr/lib/shim/shimx64.efi.signed" ::/EFI/BOOT/BOOTX64.EFI
    mcopy -i "$image" "$root/usr/lib/grub/x86_64-efi-signed/grubx64.efi.signed" ::/EFI/BOOT/grubx64.efi
    mcopy -i "$image" "$root/usr/lib/shim/mmx64.efi.signed" ::/EFI/BOOT/mmx64.efi
    mcopy -i "$image" "$config" ::/EFI/debian/grub.cfg
}

make_disk() {
    cat > "$work/esp.cfg" <<'X'
search --no-floppy --label --set=root atoll-root
set prefix=($root)/boot/grub
configfile $prefix/grub.cfg
X
    cat > "$work/grub.cfg" <<'X'
set timeout=0
menuentry "Debian" {
    linux /boot/vmlinuz root=LABEL=atoll-root rw console=ttyS0 net.ifnames=0 quiet
    initrd /boot/initrd.img
}
X
    printf 'LABEL=atoll-root / ext4 errors=remount-ro 0 1\n' > "$work/fstab"
    cp --sparse=always "$guest/disk.raw" "$work/root.ext4"
    debugfs -w -f - "$work/root.ext4" >/dev/null 2>&1 <<X
mkdir /boot/grub
write $work/grub.cfg /boot/grub/grub.cfg
write $guest/vmlinuz /boot/vmlinuz
write $guest/initrd.img /boot/initrd.img
rm /etc/fstab
write $work/fstab /etc/fstab
X
    debugfs -R 'ls -p /boot' "$work/root.ext4" 2>/dev/null | grep -q /vmlinuz/
    make_esp "$work/esp.vfat" 64M "$work/esp.cfg"
    # Partitions begin at 1 MiB and behind the first; the end holds the second table.
    local root_mib=$(($(stat -c %s "$work/root.ext4") >> 20))
    truncate -s $((1 + 64 + root_mib + 1))M "$work/disk.raw"
    sfdisk --quiet "$work/disk.raw" <<X
label: gpt
start=1MiB, size=64MiB, type=uefi
start=65MiB, size=${root_mib}MiB, type=linux
X
    dd if="$work/esp.vfat" of="$work/disk.raw" bs=1M seek=1 conv=notrunc,sparse status=none
    dd if="$work/root.ext4" of="$work/disk.raw" bs=1M seek=65 conv=notrunc,sparse status=none
    rm "$work"/{esp.vfat,root.ext4,esp.cfg,grub.cfg,fstab}
}

# The certificate table is the fifth data directory of a PE32+ image (Microsoft, "PE Format"): emptied, the image is as
# good as it was, and unsigned.
unsign() {
    local header
    header=$(od -An -tu4 -j $((0x3c)) -N4 "$1")
    [ "$(od -An -tx2 -j $((header + 24)) -N2 "$1")" = " 020b" ]
    head -c 8 /dev/zero | dd of="$1" bs=1 seek=$((header + 24 + 112 + 4 * 8)) conv=notrunc status=none
}

make_unsigned() {
    cat > "$work/unsigned.cfg" <<'X'
echo UNSIGNED-RAN
sleep 1
halt
X
    make_esp "$work/esp.vfat" 16M "$work/unsigned.cfg"
    cp "$root/usr/lib/shim/shimx64.efi.signed" "$work/shim"
    unsign "$work/shim"
    mcopy -o -i "$work/esp.vfat" "$work/shim" ::/EFI/BOOT/BOOTX64.EFI
    truncate -s 18M "$work/unsigned.raw"
    sfdisk --quiet "$work/unsigned.raw" <<X
label: gpt
start=1MiB, size=16MiB, type=uefi
X
    dd if="$work/esp.vfat" of="$work/unsigned.raw" bs=1M seek=1 conv=notrunc,sparse status=none
    rm "$work"/{esp.vfat,shim,unsigned.cfg}
}

make_iso() {
    local initrd=$work/initrd iso=$work/iso
    mkdir -p "$initrd/bin" "$iso"
    cp /bin/busybox "$initrd/bin/"
    cat > "$initrd/init" <<'X'
#!/bin/busybox sh
/bin/busybox mkdir -p /dev /proc
/bin/busybox mount -t devtmpfs d /dev
echo ISO-READY > /dev/ttyS0
/bin/busybox poweroff -f
X
    chmod +x "$initrd/init"
    (cd "$initrd" && find . | cpio -o -H newc --quiet | gzip -1) > "$iso/initrd.img"
    cp "$guest/vmlinuz" "$iso/vmlinuz"
    cat > "$work/iso.cfg" <<'X'
search --no-floppy --label --set=root ATOLL_ISO
set timeout=0
menuentry "ISO" {
    linux /vmlinuz console=ttyS0 quiet
    initrd /initrd.img
}
X
    make_esp "$iso/efi.img" 8M "$work/iso.cfg"
    # For GRUB, a disc that it was loaded from is the ISO, not the EFI image in it.
    mkdir -p "$iso/EFI/debian"
    cp "$work/iso.cfg" "$iso/EFI/debian/grub.cfg"
    xorriso -as mkisofs -quiet -V ATOLL_ISO -r -o "$work/boot.iso" \
        -e efi.img -no-emul-boot "$iso" 2>/dev/null
    rm -rf "$initrd" "$iso" "$work/iso.cfg"
}

say "boot loaders and firmware from Debian's packages"
fetch ovmf shim-signed shim-helpers-amd64-signed grub-efi-amd64-signed
say "making disks and ISO"
make_disk
make_unsigned
make_iso
cp "$root/usr/lib/grub/x86_64-efi-signed/grubnetx64.efi.signed" "$work/net.efi"
cp "$root"/usr/share/OVMF/OVMF_{CODE_4M,VARS_4M,VARS_4M.ms}.fd "$work/"
publish
