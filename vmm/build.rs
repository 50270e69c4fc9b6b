// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Builds the probe guest (`firmware/probe`, a workspace of its own for bare metal) and tells the crate where its
//! ELF file is: environment variable ATOLL_PROBE_ELF at compile time, read by `src/probe.rs`.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

/// What of the probe's directory decides about the result; not its target directory.
const SOURCES: &[&str] = &[
    "src",
    "Cargo.toml",
    "Cargo.lock",
    "build.rs",
    "link.ld",
    ".cargo",
];

/// The probe's own target, whatever the VMM is built for (see its `.cargo/config.toml`).
const TARGET: &str = "x86_64-unknown-linux-gnu";

fn main() {
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets it"));
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets it"));
    let directory = manifest.join("../firmware/probe");
    for source in SOURCES {
        println!(
            "cargo:rerun-if-changed={}",
            directory.join(source).display()
        );
    }
    // target/PROFILE/build/NAME/out: beside the profiles, so that all of them share one build.
    let target = out.ancestors().nth(4).unwrap_or(&out).join("probe");
    build(&directory, &target);
    let elf = target.join(TARGET).join("release/atoll-probe");
    assert!(elf.is_file(), "{}: not built", elf.display());
    println!("cargo:rustc-env=ATOLL_PROBE_ELF={}", elf.display());
    if env::var("CARGO_CFG_TARGET_ENV").as_deref() == Ok("gnu") {
        // Where the program's 10,000 pointers are, in bits instead of 24 bytes each; the GNU C library reads it since
        // 2.36. A process has 240 KiB less that it looks at once.
        println!("cargo:rustc-link-arg-bins=-Wl,-z,pack-relative-relocs");
    }
}

fn build(directory: &Path, target: &Path) {
    let mut command = Command::new(env::var_os("CARGO").expect("cargo sets it"));
    command
        .args(["build", "--release", "--locked", "--quiet", "--target-dir"])
        .arg(target)
        .current_dir(directory);
    // Flags, wrappers and profiles that the VMM is built with are not for the probe.
    for (name, _) in env::vars_os() {
        let text = name.to_string_lossy();
        let foreign = text.starts_with("CARGO_PROFILE_")
            || text.starts_with("CARGO_BUILD_")
            || text.starts_with("CARGO_ENCODED_")
            || text.starts_with("RUSTC_")
            || matches!(&*text, "RUSTFLAGS" | "CARGO_TARGET_DIR");
        if foreign {
            command.env_remove(&name);
        }
    }
    let status = command.status().expect("cargo runs");
    assert!(status.success(), "building {} failed", directory.display());
}
