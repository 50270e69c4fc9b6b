#!/bin/bash
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Installs the Debian packages that a purpose needs and are missing: deps.sh build|run|test|bench …
# Does nothing, and asks no mirror, when all are there.
set -euo pipefail

declare -A packages=(
    [build]="build-essential pkg-config libseccomp-dev libpam0g-dev clang libclang-dev libelf-dev zlib1g-dev"
    [run]="busybox-static jq mmdebstrap zstd xz-utils dnsmasq-base nftables iproute2 e2fsprogs procps iputils-ping ca-certificates libseccomp2 ovmf gpgv"
    [test]="qemu-system-x86 qemu-utils podman crun runc chromium python3-venv busybox-static docker-registry skopeo cpio strace socat bats gawk libnbd-bin lxcfs containerd dosfstools mtools xorriso fdisk acpica-tools libcap-ng-dev dpdk-dev lz4 gpg gpg-agent fio"
    [bench]="iperf3"
)

# The packages of these purposes that are not installed, one a line.
missing() {
    local purpose package
    for purpose in "$@"; do
        for package in ${packages[$purpose]}; do
            [ "$(dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null)" = installed ] ||
                echo "$package"
        done
    done
}

for purpose in "$@"; do
    : "${packages[$purpose]:?"deps.sh: no such purpose: $purpose"}"
done
mapfile -t missing < <(missing "$@")
[ ${#missing[@]} -gt 0 ] || exit 0

if [ "$(id -u)" != 0 ]; then
    echo "atoll: these Debian packages are missing, install them as root: ${missing[*]}" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# Twice at most: apt-get removes a package that was there in a version that does not go with a new one.
for command in "apt-get -q update" true; do
    echo "atoll: installing Debian packages: ${missing[*]}" >&2
    if ! { $command && apt-get -q install -y --no-install-recommends "${missing[@]}"; } >"$log" 2>&1 </dev/null; then
        tail -n 20 "$log" >&2
        echo "atoll: apt-get could not install the packages" >&2
        exit 1
    fi
    mapfile -t missing < <(missing "$@")
    [ ${#missing[@]} -gt 0 ] || exit 0
done
echo "atoll: apt-get says it installed these packages, but they are missing: ${missing[*]}" >&2
exit 1
