#!/bin/bash
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Ends the node that up.sh started: its guests in order, then atolld. With --remove-state also removes what it
# stored. BIN and STATE as for up.sh.
set -euo pipefail

STATE=${STATE:-/var/lib/atoll}
STATE=$(readlink -m "$STATE")
export STATE

pid=
if [ -e "$STATE/run/atolld.json" ]; then
    pid=$(jq .pid < "$STATE/run/atolld.json")
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = atolld ] || pid=
fi

if [ -n "$pid" ]; then
    echo "atoll: ending the guests and the node"
    "${BIN:?the directory with atoll}/atoll" node stop-all --timeout 60 --wait
    kill -TERM "$pid"
    for tries in $(seq 150); do
        [ -d "/proc/$pid" ] || break
        sleep 0.2
    done
    [ ! -d "/proc/$pid" ] || { echo "atoll: atolld (pid $pid) does not end" >&2; exit 1; }
fi

if [ "${1:-}" = --remove-state ] && [ -d "$STATE" ]; then
    if grep -qs " $STATE/" /proc/self/mounts; then
        echo "atoll: something is still mounted below $STATE" >&2
        exit 1
    fi
    [ -e "$STATE/store.redb" ] || { echo "atoll: $STATE is not a node's state" >&2; exit 1; }
    echo "atoll: removing $STATE"
    rm -rf --one-file-system "$STATE"
    # The parent of the guests' cgroups; another node's guests keep it.
    for parent in /sys/fs/cgroup/atoll /sys/fs/cgroup/*/atoll; do
        if [ -d "$parent" ]; then
            rmdir "$parent" 2>/dev/null || true
        fi
    done
fi
