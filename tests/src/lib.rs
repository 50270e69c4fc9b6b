// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Whole-system tests, the lab and the checks on the tree itself.
//!
//! [`daemon`] is a node on this machine, [`lab`] is the rig of emulated Debian hosts, [`registry`] one of OCI images,
//! [`page`] the web page in a browser;
//! `tests/it` and `tests/lab` hold the tests; the binaries are `atoll-lab` (`make lab`) and `atoll-test-summary` (the end
//! of `make test`).

pub mod daemon;
pub mod lab;
pub mod page;
pub mod registry;
pub mod strain;
pub mod tree;

/// Ends the calling test as skipped, with the reason in its output, where the summary counts it.
#[macro_export]
macro_rules! skip {
    ($($reason:tt)*) => {{
        println!("ATOLL-SKIP: {}", format_args!($($reason)*));
        return;
    }};
}
