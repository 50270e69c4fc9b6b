// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Hosts that have the programs under test, the stock Debian guest and the scripts.

use std::path::Path;

use atoll_tests::lab;
use tempfile::TempDir;

/// Hosts with the payload, in temporary directories that go with the returned guards.
pub fn start(host_count: u8) -> (Vec<lab::Host>, [TempDir; 2]) {
    start_with(host_count, |_| Ok(()))
}

/// The same, with what `add` puts into the payload's directory.
pub fn start_with(
    host_count: u8,
    add: impl FnOnce(&Path) -> anyhow::Result<()>,
) -> (Vec<lab::Host>, [TempDir; 2]) {
    // On the images' file system, so that the guest's disk is linked and not copied.
    let images = lab::guest_image().unwrap();
    let payload = tempfile::tempdir_in(images.parent().unwrap()).unwrap();
    lab::fill_payload(payload.path()).unwrap();
    add(payload.path()).unwrap();
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
