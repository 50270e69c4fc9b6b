// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The program of `examples/boot.rs`, which whoever embeds the crate begins with, boots a guest.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use std::path::Path;
use std::process::Command;

use guest::{BINARY, kvm};

#[test]
fn a_program_of_a_few_lines_boots_a_guest() {
    if !kvm() {
        return;
    }
    // Beside the command's own program; `cargo test` and `cargo nextest` build it unless they are told one file.
    let program = Path::new(BINARY).with_file_name("examples/boot");
    assert!(program.exists(), "cargo build -p atoll-vmm --example boot");
    let output = Command::new(program).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    let told = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{told}");
    assert!(said.contains("probe"), "{said}");
    assert_eq!(told.lines().last(), Some("the guest ended: PoweredOff"));
}
