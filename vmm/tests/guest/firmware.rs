// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Firmware of a test's own, for hosts whose KVM does not bear OVMF: real mode, from the reset vector on.
//!
//! In each round it writes a byte of its variables, by the flash's commands, and the same to RAM; then it compares all that
//! it has written so far in both, and says the next letter. `!` is the last that it says when they differ.

use std::fs::File;
use std::os::unix::fs::FileExt;

use super::Place;

/// What it says in 16 rounds, in order.
pub const ROUNDS: &str = "abcdefghijklmnop";

/// Bytes of its code, which end at 4 GiB, and of the variables before them: both within a segment that ends there.
const CODE_BYTES: u64 = 0x1000;
const VARS_BYTES: u64 = 0x2000;
/// Where the code says that it is firmware: UEFI PI 1.8, volume 3, section 3.2.1.
const SIGNATURE: (u64, &[u8]) = (40, b"_FVH");
/// `jmp 0xf100`, at the reset vector.
const RESET: (u64, &[u8]) = (0xff0, &[0xe9, 0x0d, 0xf1]);
/// At 0xf100. The segment in `cs` is where the chip is; that in `ds` begins at 0x90000, and there is something in RAM before
/// it, too, so that it is not what is saved first.
const PROGRAM: (u64, &[u8]) = (
    0x100,
    &[
        0xba, 0xf8, 0x03, //             mov dx, 0x3f8
        0xc6, 0x06, 0x00, 0x05, 0x01, // mov byte [0x500], 1
        0xb8, 0x00, 0x90, //             mov ax, 0x9000
        0x8e, 0xd8, //                   mov ds, ax
        0x31, 0xc9, //                   xor cx, cx
        0xbe, 0x00, 0xe0, //             mov si, 0xe000
        0x2e, 0x8a, 0x04, //       copy: mov al, cs:[si]
        0x88, 0x04, //                   mov [si], al
        0x46, //                         inc si
        0x81, 0xfe, 0x00, 0xe1, //       cmp si, 0xe100
        0x75, 0xf4, //                   jne copy
        0xbb, 0x00, 0xe0, //             mov bx, 0xe000
        0x2e, 0xc6, 0x07, 0x40, // round: mov byte cs:[bx], 0x40 (program)
        0x2e, 0x88, 0x0f, //             mov cs:[bx], cl
        0x2e, 0xc6, 0x07, 0xff, //       mov byte cs:[bx], 0xff (read the array)
        0x88, 0x0f, //                   mov [bx], cl
        0xbe, 0x00, 0xe0, //             mov si, 0xe000
        0x8a, 0x04, //            check: mov al, [si]
        0x2e, 0x3a, 0x04, //             cmp al, cs:[si]
        0x75, 0x14, //                   jne differ
        0x46, //                         inc si
        0x81, 0xfe, 0x00, 0xe1, //       cmp si, 0xe100
        0x75, 0xf2, //                   jne check
        0x88, 0xc8, //                   mov al, cl
        0x24, 0x0f, //                   and al, 15
        0x04, b'a', //                   add al, 'a'
        0xee, //                         out dx, al
        0xfe, 0xc1, //                   inc cl
        0xfe, 0xc3, //                   inc bl
        0xeb, 0xd5, //                   jmp round
        0xb0, b'!', //           differ: mov al, '!'
        0xee, //                         out dx, al
        0xf4, //                    end: hlt
        0xeb, 0xfd, //                   jmp end
    ],
);

/// Puts it into the folder, with variables that are all zeroes, as RAM is: `code` and `vars`.
pub fn put(place: &Place) {
    let code = File::create(place.path("code")).unwrap();
    code.set_len(CODE_BYTES).unwrap();
    for (offset, bytes) in [SIGNATURE, PROGRAM, RESET] {
        code.write_all_at(bytes, offset).unwrap();
    }
    let vars = File::create(place.path("vars")).unwrap();
    vars.set_len(VARS_BYTES).unwrap();
}

/// Arguments that start it.
pub fn run(memory: &str) -> Vec<&str> {
    let mut arguments = vec!["run", "--firmware", "vars=vars,code=code"];
    arguments.extend(["--memory", memory, "--console", "socket=serial"]);
    arguments
}
