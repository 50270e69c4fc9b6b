// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Where things are: the checkout and the binaries under test.

use std::path::{Path, PathBuf};

/// The root of the checkout.
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .expect("the crate is inside the checkout")
        .to_owned()
}

/// The directory with the programs under test: `ATOLL_BIN_DIR`, or the profile directory (`target/debug`) that
/// the calling test or tool was built into.
pub fn bin_dir() -> PathBuf {
    if let Some(directory) = std::env::var_os("ATOLL_BIN_DIR") {
        return directory.into();
    }
    let executable = std::env::current_exe().expect("/proc is mounted");
    let directory = executable
        .parent()
        .expect("an executable is in a directory");
    if directory.ends_with("deps") {
        directory
            .parent()
            .expect("deps is below the profile directory")
            .to_owned()
    } else {
        directory.to_owned()
    }
}

/// A program under test. Panics with the remedy when it has not been built.
pub fn binary(name: &str) -> PathBuf {
    let path = bin_dir().join(name);
    assert!(
        path.exists(),
        "{} is missing: run cargo build --workspace first",
        path.display()
    );
    path
}
