#!/bin/bash
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Builds what a lab host boots from, and prints the directory that holds it:
#
#   vmlinux      Debian's generic kernel as plain ELF: entered by PVH, no decompression under emulation
#   initrd.img   busybox and the modules for virtio-blk and ext4
#   root.ext4    Debian with systemd, KVM's user-space needs and the command agent
#
# image-cache.sh says where that is.
set -euo pipefail

suite=bookworm
say() { echo "lab image: $*" >&2; }

here=$(dirname "$(readlink -f "$0")")
. "$here/../../run/image-cache.sh" lab-host root.ext4 "$(cat "$here/kernel.sh")"
. "$here/kernel.sh"

# Files of kernel modules and of all they need, in load order.
module_files() {
    local version=$1 name
    shift
    for name; do
        chroot "$root" modprobe --set-version "$version" --show-depends "$name"
    done | awk '$1 == "insmod" && !seen[$2]++ {print $2}'
}

configure_root() {
    cat > "$root/usr/local/sbin/lab-command" <<'X'
#!/bin/bash
# One connection, one command: "LENGTH\n" and the script on the way in; its output, then "\0RC n\n" on the way out.
read -r length
script=$(head -c "$length")
bash -c "$script" 2>&1 </dev/null
printf '\0RC %d\n' $?
X
    cat > "$root/usr/local/sbin/lab-network" <<'X'
#!/bin/sh
# eth0 is QEMU's user network, through which the commands come; eth1 joins the lab's hosts.
modprobe virtio_net
for i in 1 2 3 4 5 6 7 8 9 10; do [ -e /sys/class/net/eth0 ] && break; sleep 0.2; done
ip link set lo up
ip address replace 10.0.2.15/24 dev eth0
ip link set eth0 up
ip route replace default via 10.0.2.2
X
    chmod +x "$root"/usr/local/sbin/lab-*
    cat > "$root/etc/systemd/system/lab-agent.service" <<'X'
[Unit]
DefaultDependencies=no
After=sysinit.target
[Service]
ExecStartPre=/usr/local/sbin/lab-network
ExecStart=/usr/bin/socat TCP-LISTEN:7000,fork,reuseaddr EXEC:/usr/local/sbin/lab-command
Environment=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
KillMode=process
Delegate=yes
TasksMax=infinity
[Install]
WantedBy=multi-user.target
X
    mkdir -p "$root/payload"
    echo lab > "$root/etc/hostname"
    printf '127.0.0.1\tlocalhost lab node1 node2 node3\n' > "$root/etc/hosts"
    echo root:lab | chroot "$root" chpasswd
    chroot "$root" systemctl --quiet enable lab-agent
    local unit
    for unit in apt-daily.timer apt-daily-upgrade.timer e2scrub_all.timer fstrim.timer dpkg-db-backup.timer \
        systemd-timesyncd.service e2scrub_reap.service systemd-pstore.service dnsmasq.service getty@tty1.service; do
        chroot "$root" systemctl --quiet disable "$unit" 2>/dev/null || true
    done
    rm -rf "$root"/var/cache/apt/archives/*.deb "$root"/var/lib/apt/lists/*_*
}

say "installing $suite from Debian's packages (about four minutes, once)"
packages=systemd,systemd-sysv,dbus,udev,kmod,iproute2,iputils-ping,nftables,procps,util-linux,bash,linux-image-amd64
packages+=,ethtool,tcpdump,curl,ca-certificates,socat,busybox-static,zstd,xz-utils,e2fsprogs,psmisc,strace,dnsmasq-base
packages+=,libseccomp2,libpam-modules,fdisk,openssl,python3-minimal,jq,qemu-utils
mmdebstrap --variant=minbase --mode=root --format=directory --quiet \
    --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --dpkgopt='path-exclude=/usr/share/doc/*' \
    --essential-hook='mkdir -p "$1/etc/initramfs-tools/conf.d"; echo MODULES=list > "$1/etc/initramfs-tools/conf.d/lab"' \
    --include="$packages" "$suite" "$root" /etc/apt/sources.list.d/debian.sources >&2
configure_root
version=$(basename "$root"/lib/modules/*-amd64)
say "kernel $version"
extract_vmlinux "$root/boot/vmlinuz-$version" > "$work/vmlinux"
mapfile -t modules < <(module_files "$version" virtio_pci virtio_blk crc32c_generic ext4)
make_initrd "$work/initrd.img" "${modules[@]/#/$root}"
rm -rf "$root"/boot/*
mke2fs -q -F -t ext4 -O ^has_journal -d "$root" "$work/root.ext4" 8G

publish
