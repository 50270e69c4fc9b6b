#!/bin/bash
# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Unpacks the QEMU that emulates lab hosts and prints the directory that holds it in usr/: version 10 from Debian's
# backports suite (bookworm's own 7.2 locks up with KVM inside TCG), with two instructions changed, see below.
#
# image-cache.sh says where that is.
set -euo pipefail

suite=bookworm
program=usr/bin/qemu-system-x86_64
say() { echo "lab QEMU: $*" >&2; }

here=$(dirname "$(readlink -f "$0")")
. "$here/../../run/image-cache.sh" lab-qemu "$program" "$(cat "$here/backports.sh")"
. "$here/backports.sh"

# What is changed are two instructions, one byte each, where the emulation has defects; a build from source for them would
# cost every fresh machine minutes. Where the package's code does not look as it is expected to, nothing is changed and the
# image fails.

# A guest's write to CR8 while its hypervisor has a virtual interrupt pending (V_IRQ) aborts QEMU: helper_write_crN
# ends in cpu_interrupt(), which asserts the big lock that the helper does not hold. OVMF writes CR8 at the end of
# every interrupt, so sooner or later it kills the host. Found in 10.0.2; 10.0.13, 10.2.2 and 11.1.3 have the same
# code, so no other suite's package helps.
#
# The call is not needed under KVM: its virtual interrupts have priority 15, above every task priority, so VMRUN has
# already set the flag that cpu_interrupt() sets, and only the interrupt itself or #VMEXIT clears flag and V_IRQ, both.
# So the tail call (jmp rel32, E9) becomes a return (C3); the stack is as a return needs it.
mend_cr8() {
    local jump
    jump=$(objdump --no-show-raw-insn --disassemble=helper_write_crN "$file" |
        awk '/\tjmp .*<cpu_interrupt(@@Base)?>/ {sub(":", "", $1); print $1}')
    return_at "$jump" " e9" "helper_write_crN does not end in one jump to cpu_interrupt, but in"
}

# Whenever a processor loads the state of its FPU, cpu_clear_ignne() clears a flag of the first processor: it reads, changes
# and writes that one's hflags2 from another thread, without a lock. What the first processor changes in that word meanwhile
# is undone. #VMEXIT clears "nested paging" there: set again, the hypervisor's next instruction is looked up through the
# tables of its guest. Guests ended by triple faults and hosts by panics, the more often the more a guest exits while the
# other processor works: 11 of 48 guests of 1 vCPU, two at a time, whose Linux looks for an AGP bridge at 65,536 places, and
# two hosts of five; none of 16 guests since. Found in 10.0.2.
#
# The flag, IGNNE#, is of use to a system that is told of FPU errors by IRQ 13 and writes port F0h: none that the lab runs.
# So the function's first instruction (sub $8, %rsp: 48 ...) becomes a return.
mend_ignne() {
    local entry
    entry=$(objdump --disassemble=cpu_clear_ignne "$file" | awk '/<cpu_clear_ignne(@@Base)?>:$/ {print $1}')
    return_at "$entry" " 48" "there is not one function cpu_clear_ignne, but at"
}

# The byte at an address of the program's text becomes a return; it must be the expected one.
return_at() {
    local address=$1 expected=$2 otherwise=$3 text_address text_offset offset
    read -r text_address text_offset < <(objdump --section-headers "$file" | awk '$2 == ".text" {print $4, $6}')
    if ! [[ $address =~ ^[0-9a-f]+$ ]]; then
        say "$otherwise: ${address:-none}"
        exit 1
    fi
    offset=$((16#$address - 16#$text_address + 16#$text_offset))
    [ "$(od -An -tx1 -j $offset -N1 "$file")" = "$expected" ] || { say "at $offset is not$expected"; exit 1; }
    printf '\xc3' | dd of="$file" bs=1 seek=$offset conv=notrunc status=none
}

say "QEMU 10 from backports"
find_backports
unpack_backports "$work" qemu-system-x86 qemu-system-common qemu-system-data seabios
forget_backports
file=$work/$program
mend_cr8
mend_ignne
publish
