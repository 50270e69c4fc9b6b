#!/bin/bash
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Builds what a lab host with a newer kernel boots from, and prints the directory that holds it:
#
#   vmlinux          the cloud kernel of Debian's backports suite as plain ELF
#   initrd.img       that of the hosts with this kernel: brings its modules along
#   guest.img        that of guests with this kernel: has the modules for a disk and a card; `start=PATH` on the
#                    command line names the first process of the root disk
#   root.ext4        the other hosts' root disk
#
# image-cache.sh says where that is.
set -euo pipefail

suite=bookworm
here=$(dirname "$(readlink -f "$0")")
host=$("$here/host-image.sh")
. "$here/../../run/image-cache.sh" lab-next root.ext4 "$(basename "$host")" "$(cat "$here"/{kernel,backports}.sh)"
. "$here/kernel.sh"
. "$here/backports.sh"

find_backports
package=$(apt-cache "${backports[@]}" depends linux-image-cloud-amd64 | awk '$1 == "Depends:" {print $2; exit}')
echo "lab kernel: $package from backports" >&2
unpack_backports "$root" "$package"
forget_backports
extract_vmlinux "$root"/boot/vmlinuz-* > "$work/vmlinux"

# In the order in which they need each other. PCI and ext4 are in the kernel.
modules=()
for name in virtio_blk failover net_failover virtio_net; do
    modules+=("$(find "$root/lib/modules" -name "$name.ko.xz" | grep .)")
done
make_initrd "$work/guest.img" "${modules[@]}"
more=$work/more
mkdir -p "$more/more"
mv "$root/lib/modules" "$more/more/"
(cat "$work/guest.img"; pack_initrd "$more") > "$work/initrd.img"
rm -rf "$more"
ln "$host/root.ext4" "$work/root.ext4"

publish
