// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the tests bring into a lab host: programs, the stock Debian guest, scripts.

use std::fs;
use std::path::Path;

use atoll_tests::{lab, tree};
use tempfile::TempDir;

/// A directory with `bin/` (the programs under test), `guest/` (the stock guest), `run/` and `lab/` (scripts).
pub fn assemble() -> TempDir {
    let payload = tempfile::tempdir_in(cache()).unwrap();
    let bin = payload.path().join("bin");
    fs::create_dir(&bin).unwrap();
    for name in ["atolld", "atoll", "atoll-vmm", "atoll-ct"] {
        fs::copy(tree::binary(name), bin.join(name)).unwrap();
    }
    lab::link_tree(&lab::guest_image().unwrap(), &payload.path().join("guest")).unwrap();
    lab::link_tree(&tree::root().join("run"), &payload.path().join("run")).unwrap();
    let scripts = payload.path().join("lab");
    fs::create_dir(&scripts).unwrap();
    fs::copy(
        tree::root().join("tests/lab/console.py"),
        scripts.join("console.py"),
    )
    .unwrap();
    payload
}

/// Hosts with the payload, in a temporary directory that goes with the returned guard.
pub fn start(host_count: u8) -> (Vec<lab::Host>, [TempDir; 2]) {
    let payload = assemble();
    let work = tempfile::tempdir().unwrap();
    let hosts = lab::start(&lab::Settings {
        host_count,
        payload: Some(payload.path()),
        directory: work.path().to_owned(),
        api: None,
    })
    .unwrap();
    (hosts, [payload, work])
}

/// The images' file system, so that the guest's disk is linked and not copied.
fn cache() -> impl AsRef<Path> {
    lab::guest_image().unwrap().parent().unwrap().to_owned()
}
