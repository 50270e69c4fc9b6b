#!/bin/bash
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Starts one node with a Debian container and a VM, and says where to reach it. Run again, it changes nothing.
# Callers: `make run` here, and the lab on each of its hosts.
#
#   BIN     directory with atolld, atoll, atoll-vmm, atoll-relay and atoll-ct
#   STATE   the node's state (default /var/lib/atoll)
#   LISTEN, PORT   where the API and the page listen (default 127.0.0.1, 8006)
#   GUEST   directory with the stock Debian guest; built from Debian's packages when unset
#   SHOW_URL, SHOW_END   what to say instead of the node's own address and of "make stop"
set -euo pipefail

here=$(dirname "$(readlink -f "$0")")
BIN=$(readlink -f "${BIN:?the directory with atolld}")
STATE=${STATE:-/var/lib/atoll}
LISTEN=${LISTEN:-127.0.0.1}
PORT=${PORT:-8006}
container=100
vm=101
mkdir -p "$STATE"
STATE=$(readlink -f "$STATE")
export STATE

[ "$(id -u)" = 0 ] || { echo "atoll: make run needs root: it makes a bridge, mounts and cgroups" >&2; exit 1; }

say() { echo "atoll: $*"; }
atoll() { "$BIN/atoll" "$@"; }
field() { jq -r ".$1 // empty"; }
daemon_pid() { [ -e "$STATE/run/atolld.json" ] && field pid < "$STATE/run/atolld.json"; }
daemon_runs() {
    local pid
    pid=$(daemon_pid) && [ -n "$pid" ] && [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = atolld ]
}

start_daemon() {
    if daemon_runs; then
        return
    fi
    say "starting atolld, state in $STATE"
    rm -f "$STATE/run/atolld.json"
    setsid "$BIN/atolld" --state "$STATE" --listen "$LISTEN" --port "$PORT" \
        </dev/null >>"$STATE/atolld.log" 2>&1 &
    local started=$! tries
    for tries in $(seq 300); do
        if daemon_runs && atoll get /version >/dev/null 2>&1; then
            return
        fi
        kill -0 $started 2>/dev/null || break
        sleep 0.2
    done
    echo "atoll: atolld did not come up; the end of $STATE/atolld.log:" >&2
    tail -n 15 "$STATE/atolld.log" >&2
    exit 1
}

# Puts a file of the stock guest into the storage, without a copy where the file system can share blocks.
offer() { # FILE PLACE-IN-STORAGE
    local target=$STATE/storage/$2
    [ -e "$target" ] && return
    mkdir -p "$(dirname "$target")"
    cp --reflink=auto --sparse=always "$1" "$target.part"
    mv "$target.part" "$target"
}

exists() { atoll get "/nodes/$node/$1/$2/config" >/dev/null 2>&1; }
status() { atoll get "/nodes/$node/$1/$2/status/current" --output json | field status; }

ensure_running() { # qemu|lxc ID
    [ "$(status "$1" "$2")" = running ] || atoll create "/nodes/$node/$1/$2/status/start" --wait
}

ensure_container() {
    if ! exists lxc $container; then
        say "creating container $container (Debian, unprivileged)"
        offer "$GUEST/template.tar.zst" template/cache/debian-12-standard_amd64.tar.zst
        (umask 077 && head -c 12 /dev/urandom | base64 > "$STATE/container-password")
        atoll create "/nodes/$node/lxc" --vmid $container --hostname debian --password "@$STATE/container-password" \
            --ostemplate local:vztmpl/debian-12-standard_amd64.tar.zst --unprivileged 1 \
            --rootfs local:2 --memory 512 --cores 1 --net0 name=eth0,bridge=vmbr0,ip=dhcp --wait
    fi
    ensure_running lxc $container
}

create_debian_vm() {
    say "creating VM $vm (Debian's cloud kernel and a Debian disk)"
    offer "$GUEST/vmlinuz" snippets/debian-12-vmlinuz
    offer "$GUEST/initrd.img" snippets/debian-12-initrd.img
    offer "$GUEST/disk.raw" images/$vm/vm-$vm-disk-0.raw
    atoll create "/nodes/$node/qemu" --vmid $vm --name debian --cores 1 --memory 512 \
        --kernel local:snippets/debian-12-vmlinuz --initrd local:snippets/debian-12-initrd.img \
        --cmdline 'console=ttyS0 root=/dev/vda rw net.ifnames=0 quiet' --serial0 socket \
        --virtio0 local:$vm/vm-$vm-disk-0.raw --net0 virtio,bridge=vmbr0 --wait
}

create_probe_vm() {
    say "creating VM $vm (the probe guest)"
    if [ ! -e "$STATE/storage/snippets/atoll-probe" ]; then
        mkdir -p "$STATE/storage/snippets"
        "$BIN/atoll-vmm" probe --extract "$STATE/storage/snippets/atoll-probe"
    fi
    atoll create "/nodes/$node/qemu" --vmid $vm --name probe --cores 1 --memory 64 \
        --kernel local:snippets/atoll-probe --cmdline stay --serial0 socket \
        --virtio0 local:1 --net0 virtio,bridge=vmbr0 --wait
}

# What this host's KVM can do, before anything else keeps the host busy.
judge_host() {
    exists qemu $vm && return
    report=$("$BIN/atoll-vmm" probe --json 2>/dev/null) || true
    [ -n "$report" ] || report='{"kvm": false, "linux": false, "reason": "atoll-vmm probe does not answer"}'
}

ensure_vm() {
    local reason
    if ! exists qemu $vm; then
        reason=$(field reason <<<"$report")
        if [ "$(field kvm <<<"$report")" != true ]; then
            say "no VM here: $reason"
            return
        fi
        if [ "$(field linux <<<"$report")" = true ]; then
            create_debian_vm
        else
            say "the VM is the probe guest, since stock kernels do not run at speed here: $reason"
            say "for VMs with stock Debian: make lab"
            create_probe_vm
        fi
    fi
    ensure_running qemu $vm
}

# The container's address, once DHCP has answered.
container_address() {
    local tries address
    for tries in $(seq 120); do
        address=$(atoll get "/nodes/$node/lxc/$container/interfaces" --output json 2>/dev/null |
            jq -r '.[] | select(.name == "eth0") | .inet // empty | split("/")[0]') || address=
        [ -n "$address" ] && { echo "$address"; return; }
        sleep 0.5
    done
    return 1
}

start_daemon
node=$(field node < "$STATE/run/atolld.json")
if [ -z "${GUEST:-}" ] && ! exists lxc $container; then
    GUEST=$("$here/guest-image.sh")
fi
judge_host
ensure_container
ensure_vm

login=$STATE/initial-login.json
echo
echo "Atoll runs:   ${SHOW_URL:-$(field url < "$login")}"
echo "sign in:      $(field username < "$login")  $(field password < "$login")    (from $login)"
if address=$(container_address); then
    echo "container:    $container debian, running, address $address"
    echo "              $BIN/atoll ct console $container    root, password in $STATE/container-password"
else
    echo "container:    $container debian, $(status lxc $container), no address yet"
fi
if exists qemu $vm; then
    name=$(atoll get "/nodes/$node/qemu/$vm/config" --output json | field name)
    [ "$name" = probe ] && hint="type help" || hint="root, password atoll"
    echo "VM:           $vm $name, $(status qemu $vm)"
    echo "              $BIN/atoll vm console $vm    $hint"
else
    echo "VM:           none (see above)"
fi
echo "the end:      ${SHOW_END:-make stop}"
