// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Images that the lab boots from, and a program that it runs, built by shell recipes and cached by them.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

use crate::tree;

/// Size of every payload disk: the template's and the resumed host's must agree. Sparse.
pub(super) const PAYLOAD_BYTES: u64 = 6 << 30;

/// Directory with the QEMU that emulates hosts, in `usr/`; fetched first where it is missing (seconds).
pub fn qemu_image() -> Result<PathBuf> {
    recipe("tests/lab/qemu-image.sh")
}

/// Directory with `vmlinux`, `initrd.img` and `root.ext4`; built first where it is missing (minutes).
pub fn host_image() -> Result<PathBuf> {
    recipe("tests/lab/host-image.sh")
}

/// The same files with the kernel of Debian's backports suite, and `guest.img`, an initial RAM disk for a guest with it.
pub fn next_image() -> Result<PathBuf> {
    recipe("tests/lab/next-kernel.sh")
}

/// Directory with the stock Debian guest: `template.tar.zst`, `vmlinuz`, `initrd.img`, `disk.raw`.
pub fn guest_image() -> Result<PathBuf> {
    recipe("run/guest-image.sh")
}

/// Directory with what boots by UEFI: `disk.raw`, `unsigned.raw`, `boot.iso`, `net.efi`, and OVMF's files.
pub fn uefi_image() -> Result<PathBuf> {
    recipe("run/uefi-image.sh")
}

/// Directory with `bin/virtiofsd`.
pub fn virtiofsd() -> Result<PathBuf> {
    recipe("run/virtiofsd.sh")
}

fn recipe(script: &str) -> Result<PathBuf> {
    let output = Command::new(tree::root().join(script))
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| format!("run {script}"))?;
    ensure!(
        output.status.success(),
        "{script} failed: {}",
        output.status
    );
    Ok(PathBuf::from(String::from_utf8(output.stdout)?.trim()))
}

/// Makes `file` an ext4 image of `directory`'s content.
pub(super) fn pack(directory: &Path, file: &Path) -> Result<()> {
    let status = Command::new("mke2fs")
        .args([
            "-q",
            "-F",
            "-t",
            "ext4",
            "-O",
            "^has_journal",
            "-E",
            "lazy_itable_init=1",
            "-d",
        ])
        .args([directory, file])
        .arg(format!("{}M", PAYLOAD_BYTES >> 20))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("run mke2fs")?;
    ensure!(status.success(), "mke2fs failed: {status}");
    Ok(())
}
