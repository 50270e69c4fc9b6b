#!/bin/bash
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Unpacks the QEMU that emulates lab hosts and prints the directory that holds it in usr/: version 10 from Debian's
# backports suite (bookworm's own 7.2 locks up with KVM inside TCG), with one instruction changed, see below.
#
# image-cache.sh says where that is.
set -euo pipefail

suite=bookworm
program=usr/bin/qemu-system-x86_64
say() { echo "lab QEMU: $*" >&2; }

here=$(dirname "$(readlink -f "$0")")
. "$here/../../run/image-cache.sh" lab-qemu "$program" "$(cat "$here/backports.sh")"
. "$here/backports.sh"

# A guest's write to CR8 while its hypervisor has a virtual interrupt pending (V_IRQ) aborts QEMU: helper_write_crN
# ends in cpu_interrupt(), which asserts the big lock that the helper does not hold. OVMF writes CR8 at the end of
# every interrupt, so sooner or later it kills the host. Found in 10.0.2; 10.0.13, 10.2.2 and 11.1.3 have the same
# code, so no other suite's package helps; and a build from source for one byte would cost every fresh machine minutes.
#
# The call is not needed under KVM: its virtual interrupts have priority 15, above every task priority, so VMRUN has
# already set the flag that cpu_interrupt() sets, and only the interrupt itself or #VMEXIT clears flag and V_IRQ, both.
# So the tail call (jmp rel32, E9) becomes a return (C3); the stack is as a return needs it. Where the package's code
# does not look like that, nothing is changed and the image fails.
patch() {
    local file=$work/$program jump text_address text_offset offset
    jump=$(objdump --no-show-raw-insn --disassemble=helper_write_crN "$file" |
        awk '/\tjmp .*<cpu_interrupt(@@Base)?>/ {sub(":", "", $1); print $1}')
    read -r text_address text_offset < <(objdump --section-headers "$file" | awk '$2 == ".text" {print $4, $6}')
    if ! [[ $jump =~ ^[0-9a-f]+$ ]]; then
        say "helper_write_crN does not end in one jump to cpu_interrupt, but in: ${jump:-none}"
        exit 1
    fi
    offset=$((16#$jump - 16#$text_address + 16#$text_offset))
    [ "$(od -An -tx1 -j $offset -N1 "$file")" = " e9" ] || { say "no jmp rel32 at $offset"; exit 1; }
    printf '\xc3' | dd of="$file" bs=1 seek=$offset conv=notrunc status=none
}

say "QEMU 10 from backports"
find_backports
unpack_backports "$work" qemu-system-x86 qemu-system-common qemu-system-data seabios
forget_backports
patch
publish
