// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Where the log of a machine's processes goes. Called by their `main`, once.

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::sync::Mutex;

/// One line an event, on standard error or at the end of a file, whose descriptor is the answer.
pub fn to(path: Option<&Path>) -> io::Result<Option<RawFd>> {
    let lines = tracing_subscriber::fmt()
        .with_target(false)
        .with_ansi(false);
    let Some(path) = path else {
        lines.with_writer(io::stderr).init();
        return Ok(None);
    };
    let file = OpenOptions::new().append(true).create(true).open(path)?;
    let fd = file.as_raw_fd();
    lines.with_writer(Mutex::new(file)).init();
    Ok(Some(fd))
}
