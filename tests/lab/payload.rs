// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Hosts that have the programs under test, the stock Debian guest and the scripts.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, ensure};
use atoll_tests::lab::{self, HostKernel, Scratch};
use atoll_tests::page;

/// Hosts with the payload, in temporary directories that go with the returned guards.
pub fn start(host_count: u8) -> (Vec<lab::Host>, [Scratch; 2]) {
    start_with(host_count, |_| Ok(()))
}

/// The same, with what `add` puts into the payload's directory.
pub fn start_with(
    host_count: u8,
    add: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> (Vec<lab::Host>, [Scratch; 2]) {
    start_on(HostKernel::Suite, host_count, add)
}

/// The same, with that kernel.
pub fn start_on(
    kernel: HostKernel,
    host_count: u8,
    add: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> (Vec<lab::Host>, [Scratch; 2]) {
    // On the images' file system, so that the guest's disk is linked and not copied.
    let images = lab::guest_image().unwrap();
    let around = Scratch::new_in(images.parent().unwrap()).unwrap();
    let payload = around.path().join("payload");
    std::fs::create_dir(&payload).unwrap();
    lab::fill_payload(&payload).unwrap();
    add(&payload).unwrap();
    let work = Scratch::new_in(&std::env::temp_dir()).unwrap();
    let hosts = lab::start(&lab::Settings {
        host_count,
        memory_mib: lab::MEMORY_MIB,
        kernel,
        payload: Some(&payload),
        directory: work.path().to_owned(),
        api: None,
    })
    .unwrap();
    (hosts, [around, work])
}

/// `full/`: Debian's generic kernel, that of the hosts, uncompressed, and the initial RAM disk that they boot with.
pub fn add_full_kernel(payload: &Path) -> anyhow::Result<()> {
    let files = ["vmlinux", "initrd.img"];
    copy_files(&lab::host_image()?, &files, &payload.join("full"))
}

/// `next/`: the kernel of Debian's backports, uncompressed, and the initial RAM disk of guests with it.
pub fn add_next_kernel(payload: &Path) -> anyhow::Result<()> {
    let files = ["vmlinux", "guest.img"];
    copy_files(&lab::next_image()?, &files, &payload.join("next"))
}

/// `page/`: the web page, where it is built.
pub fn add_page(payload: &Path) -> anyhow::Result<()> {
    let built = page::built();
    if built.exists() {
        let copied = Command::new("cp")
            .arg("-r")
            .arg(built)
            .arg(payload.join("page"))
            .status()?;
        anyhow::ensure!(copied.success(), "cp: {copied}");
    }
    Ok(())
}

fn copy_files(from: &Path, files: &[&str], to: &Path) -> anyhow::Result<()> {
    std::fs::create_dir(to)?;
    for file in files {
        std::fs::copy(from.join(file), to.join(file))?;
    }
    Ok(())
}

/// `testpmd/`: the program, the drivers that it loads by itself, and the libraries of all.
pub fn add_testpmd(payload: &Path) -> anyhow::Result<()> {
    let drivers = "/usr/lib/x86_64-linux-gnu/dpdk/pmds-23.0";
    let drivers = ["bus_vdev", "net_vhost", "mempool_ring"]
        .map(|name| format!("{drivers}/librte_{name}.so.23"));
    let mut files = vec!["/usr/bin/dpdk-testpmd".to_owned()];
    files.extend(drivers);
    add_with_libraries(files, &payload.join("testpmd"))
}

/// `storage/`: QEMU's storage daemon and its libraries.
pub fn add_storage_daemon(payload: &Path) -> anyhow::Result<()> {
    let files = vec!["/usr/bin/qemu-storage-daemon".to_owned()];
    add_with_libraries(files, &payload.join("storage"))
}

/// Programs of this machine, for a host of the same suite that has not their packages.
fn add_with_libraries(mut files: Vec<String>, place: &Path) -> anyhow::Result<()> {
    std::fs::create_dir(place)?;
    let told = Command::new("ldd").args(&files).output()?;
    ensure!(told.status.success(), "ldd {files:?}: {told:?}");
    let told = String::from_utf8(told.stdout)?;
    let libraries = told.lines().filter_map(|line| line.split_once(" => /"));
    let libraries = libraries.filter_map(|(_, path)| path.split_whitespace().next());
    files.extend(libraries.map(|path| format!("/{path}")));
    for file in files {
        let name = Path::new(&file).file_name().context("a file's name")?;
        std::fs::copy(&file, place.join(name)).with_context(|| format!("copy {file}"))?;
    }
    Ok(())
}

/// A disk with programs of this machine and their libraries.
pub fn add_disk_with(programs: Vec<String>, disk: &Path) -> anyhow::Result<()> {
    let content = tempfile::tempdir()?;
    add_with_libraries(programs, &content.path().join("disk"))?;
    let made = Command::new("mke2fs")
        .args(["-q", "-t", "ext4", "-O", "^has_journal", "-d"])
        .args([&content.path().join("disk"), disk])
        .arg("160M")
        .output()
        .context("run mke2fs")?;
    ensure!(made.status.success(), "mke2fs: {made:?}");
    Ok(())
}

/// Two discs, `discs/1.iso` and `discs/2.iso`, each with a file `words` that names it.
pub fn add_discs(payload: &Path) -> anyhow::Result<()> {
    let discs = payload.join("discs");
    std::fs::create_dir(&discs)?;
    for number in ["1", "2"] {
        let content = tempfile::tempdir()?;
        std::fs::write(content.path().join("words"), format!("disc {number}\n"))?;
        let made = Command::new("xorriso")
            .args(["-as", "mkisofs", "-quiet", "-r", "-V"])
            .arg(format!("DISC{number}"))
            .arg("-o")
            .args([&discs.join(format!("{number}.iso")), content.path()])
            .output()
            .context("run xorriso")?;
        ensure!(made.status.success(), "xorriso: {made:?}");
    }
    Ok(())
}
