// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Link arguments that make a static ELF at 1 MiB of an ordinary x86_64-unknown-linux-gnu program.

const ARGUMENTS: &[&str] = &[
    "-nostartfiles",
    "-nostdlib",
    "-static",
    "-no-pie",
    "-Wl,--build-id=none",
    "-Wl,-z,noexecstack",
    "-Wl,-z,max-page-size=4096",
    "-Wl,--no-dynamic-linker",
    "-Wl,-n",
];

fn main() {
    let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo sets it");
    for argument in ARGUMENTS {
        println!("cargo:rustc-link-arg-bins={argument}");
    }
    println!("cargo:rustc-link-arg-bins=-Wl,-T,{directory}/link.ld");
    println!("cargo:rerun-if-changed=link.ld");
    println!("cargo:rerun-if-changed=build.rs");
}
