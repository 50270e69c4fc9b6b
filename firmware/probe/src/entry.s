# Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
#
# Everything that runs in ring 0: from the PVH entry to ring 3, the interrupt handlers, and the few services
# that ring 3 asks for. A KVM without hardware virtualization emulates ring 0 at about half a
# million instructions a second and knows no SSE there, so it is short and uses general registers only.
# The body of the probe runs in ring 3 with I/O privilege, where such a KVM runs at full speed.

.section .note.pvh, "a", @note
    .long 4, 8, 18                      # name size, descriptor size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad _start

# ---------------------------------------------------------------------------------------------------------------
# Entry: 32-bit protected mode without paging, EBX = start_info (Xen docs/misc/pvh.pandoc).

.section .boot, "ax"
.code32
.globl _start
_start:
    mov esi, [ebx + 24]                 # hvm_start_info.cmdline_paddr
    test esi, esi
    jz 1f
    cmp dword ptr [esi], 0x74697865     # "exit": tell the world that the first instructions have run
    jne 1f
    mov dx, 0x3f8
    mov al, 0x21
    out dx, al
1:  cld
    mov eax, offset task_state          # the one descriptor that holds an address in pieces
    mov [descriptor_task + 2], ax
    shr eax, 16
    mov [descriptor_task + 4], al
    mov [descriptor_task + 7], ah
    lgdt [descriptors_pointer]
    lidt [gates_pointer]
    mov eax, offset page_map
    mov cr3, eax
    mov eax, 0x620                      # PAE, OSFXSR, OSXMMEXCPT: ring 3 uses SSE
    mov cr4, eax
    mov ecx, 0xc0000080                 # EFER.LME
    xor edx, edx
    mov eax, 0x100
    wrmsr
    mov eax, 0x80000033                 # PG, NE, ET, MP, PE; EM and TS clear
    mov cr0, eax
    .byte 0xea                          # far jump to 64-bit code
    .long long_mode
    .word 0x08

.code64
long_mode:
    mov eax, 0x10
    mov ss, eax
    mov ds, eax
    mov es, eax
    mov eax, 0x28
    ltr ax
    mov edi, ebx                        # first argument of main: start_info
    mov esp, offset ring0_stack_end
    push 0x1b                           # SS of ring 3
    push offset ring3_stack_end - 8     # as if called: RSP + 8 is a multiple of 16
    push 0x3002                         # RFLAGS: IOPL 3, interrupts off
    push 0x23                           # CS of ring 3
    push offset ring3_main
    iretq

# ---------------------------------------------------------------------------------------------------------------
# Services: ring 3 executes ud2 with r8 = SERVICE + number. The invalid opcode exception it is, and neither `int n`
# nor `syscall`, since kvm_pvm delivers exceptions of ring 3 but not those two. Other ud2 are mistakes.

.set SERVICE, 0x50524f00

.globl ring0_service
ring0_service:
    cmp r8d, SERVICE
    jb exception_stubs + 6 * 16
    cmp r8d, SERVICE + 5
    ja exception_stubs + 6 * 16
    add qword ptr [rsp], 2              # behind the ud2
    cmp r8d, SERVICE + 1
    je service_processor_id
    cmp r8d, SERVICE + 2
    je service_write_register
    cmp r8d, SERVICE + 3
    je service_spin
    cmp r8d, SERVICE + 4
    je service_port_reads
    cmp r8d, SERVICE + 5
    je service_port_string
    sti                                 # 0: wait for an interrupt; nothing can come between these two
    hlt
    cli
    iretq
service_processor_id:                   # eax, ecx -> eax, ebx, ecx, edx
    cpuid
    iretq
service_write_register:                 # model specific register ecx = edx:eax
    wrmsr
    iretq
service_spin:                           # 2 * rcx instructions
    dec rcx
    jnz service_spin
    iretq
service_port_reads:                     # rcx reads of port dx
    in al, dx
    dec rcx
    jnz service_port_reads
    iretq
service_port_string:                    # rcx bytes at rsi to port dx
    lodsb
    out dx, al
    dec rcx
    jnz service_port_string
    iretq

# ---------------------------------------------------------------------------------------------------------------
# Interrupts: count, end of interrupt, return. Vector 0x40 + n, 16 bytes a stub.

.balign 16
.globl interrupt_stubs
interrupt_stubs:
.set n, 0
.rept 32
    .balign 16
    inc dword ptr [interrupt_counts + 4 * n]
    jmp interrupt_end
    .set n, n + 1
.endr
.balign 16
interrupt_end:
    push rax
    mov eax, 0xfee000b0                 # local APIC, end of interrupt
    mov dword ptr [rax], 0
    pop rax
.globl spurious_stub
spurious_stub:
    iretq

# Exceptions 0 to 31, 16 bytes a stub: to ring3_fault(vector, error code, rip, cr2) on a fresh stack.

.balign 16
.globl exception_stubs
exception_stubs:
.set n, 0
.rept 32
    .balign 16
    .if (n == 8) | ((n >= 10) & (n <= 14)) | (n == 17) | (n == 21) | (n == 29) | (n == 30)
    .else
    push 0
    .endif
    push n
    jmp exception_end
    .set n, n + 1
.endr
.balign 16
exception_end:
    pop rdi
    pop rsi
    mov rdx, [rsp]
    mov rcx, cr2
    mov qword ptr [rsp], offset ring3_fault
    mov qword ptr [rsp + 8], 0x23
    mov qword ptr [rsp + 16], 0x3002
    mov qword ptr [rsp + 24], offset ring3_stack_end - 8
    mov qword ptr [rsp + 32], 0x1b
    iretq

# ---------------------------------------------------------------------------------------------------------------
# Tables. Guest-physical = virtual, 0 to 4 GiB in 2 MiB pages, all open to ring 3.

.section .tables, "aw"
.balign 4096
.globl page_map
page_map:                               # level 4
    .quad page_directories + 0x7
    .fill 511, 8, 0
.globl page_directories
page_directories:                       # level 3
    .set n, 0
    .rept 4
    .quad page_directory + 4096 * n + 0x7
    .set n, n + 1
    .endr
    .fill 508, 8, 0
page_directory:                         # level 2: present, writable, user, large
    .set n, 0
    .rept 2048
    .quad (n << 21) + 0x87
    .set n, n + 1
    .endr

.globl gates
gates:                                  # interrupt descriptor table, filled by ring 3
    .fill 512, 8, 0

.balign 16
descriptors:
    .quad 0
    .quad 0x00af9b000000ffff            # 0x08 code, ring 0, 64-bit
    .quad 0x00cf93000000ffff            # 0x10 data, ring 0
    .quad 0x00cff3000000ffff            # 0x18 data, ring 3
    .quad 0x00affb000000ffff            # 0x20 code, ring 3, 64-bit
descriptor_task:                        # 0x28 task state, 64-bit, base filled at the entry
    .quad 0x0000890000002068, 0
descriptors_end:

task_state:                             # AMD APM vol. 2 §12.2.5: RSP0, and an I/O bitmap that allows every port:
    .long 0                             # kvm_pvm loses the I/O privilege level of RFLAGS on the way to ring 3
    .quad ring0_stack_end
    .fill 90, 1, 0
    .word 104
    .fill 8192, 1, 0
    .byte 0xff

descriptors_pointer:
    .word descriptors_end - descriptors - 1
    .quad descriptors
gates_pointer:
    .word 4095
    .quad gates

.globl interrupt_counts
.balign 4
interrupt_counts:
    .fill 32, 4, 0

.section .stack, "aw", @nobits
.balign 16
    .skip 2048
ring0_stack_end:
    .skip 65536
.globl ring3_stack_end
ring3_stack_end:
