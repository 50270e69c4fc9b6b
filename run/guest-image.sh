#!/bin/bash
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Builds the stock Debian guest from Debian's packages, once for all uses, and prints the directory that holds it:
#
#   template.tar.zst   root file system for containers (systemd, network, no kernel)
#   vmlinuz            Debian's cloud kernel, unmodified
#   initrd.img         its initramfs, made by Debian's initramfs-tools with the virtio and SCSI disk modules
#   disk.raw           ext4 root disk for VMs, 2 GiB sparse; login root, password "atoll"
#
# image-cache.sh says where that is.
set -euo pipefail

suite=bookworm
say() { echo "guest image: $*" >&2; }

. "$(dirname "$(readlink -f "$0")")/image-cache.sh" debian-guest disk.raw

packages=systemd,systemd-sysv,systemd-resolved,dbus,udev,kmod,iproute2,iputils-ping,procps,util-linux,login,passwd,bash,ca-certificates,netbase
kernel=linux-image-cloud-amd64,initramfs-tools,e2fsprogs

say "installing $suite from Debian's packages (about three minutes, once)"
mkdir -p "$root/etc/initramfs-tools/conf.d"
mmdebstrap --variant=minbase --mode=root --format=directory --quiet --skip=check/empty \
    --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"; echo MODULES=list > "$1/etc/initramfs-tools/conf.d/atoll"; printf "%s\n" virtio_pci virtio_blk virtio_scsi sd_mod virtio_net virtio_console virtio_rng ext4 crc32c_generic > "$1/etc/initramfs-tools/modules"' \
    --include="$packages,$kernel" "$suite" "$root" /etc/apt/sources.list.d/debian.sources >&2

say "configuring"
cat > "$root/etc/systemd/network/80-dhcp.network" <<'X'
[Match]
Name=e*

[Network]
DHCP=yes
LinkLocalAddressing=ipv6
X
chroot "$root" systemctl --quiet enable systemd-networkd systemd-resolved
chroot "$root" systemctl --quiet disable apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer \
    e2scrub_all.timer fstrim.timer systemd-networkd-wait-online.service 2>/dev/null || true
echo debian > "$root/etc/hostname"
printf '127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost\n' > "$root/etc/hosts"
ln -sf /run/systemd/resolve/stub-resolv.conf "$root/etc/resolv.conf"
: > "$root/etc/machine-id"
rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*_*

say "packing the container template"
tar -C "$root" --numeric-owner --exclude=./boot/* --exclude=./usr/lib/modules/* --exclude=./dev/* \
    --xattrs -cf - . | zstd -q -T0 -3 -o "$work/template.tar.zst"

say "making the VM's root disk"
cp --dereference "$root"/boot/vmlinuz-*-cloud-amd64 "$work/vmlinuz"
cp --dereference "$root"/boot/initrd.img-*-cloud-amd64 "$work/initrd.img"
echo root:atoll | chroot "$root" chpasswd
echo '/dev/vda / ext4 errors=remount-ro 0 1' > "$root/etc/fstab"
rm -f "$root"/boot/initrd.img-* "$root"/boot/vmlinuz-*
mke2fs -q -F -t ext4 -L atoll-root -d "$root" "$work/disk.raw" 2G

publish
