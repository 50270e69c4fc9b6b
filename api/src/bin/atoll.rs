// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The command's `main`; see `atoll_api::cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    atoll_api::cli::main()
}
