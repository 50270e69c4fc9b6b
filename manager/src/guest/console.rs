// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Where a guest's console is: what `Guest::console` answers, and the API joins to a browser.

use std::path::PathBuf;

use crate::exec::Program;

/// How a guest's console is reached.
#[derive(Debug, Clone)]
pub enum Console {
    /// A terminal that is there as long as the guest runs, with as many clients as come.
    Line {
        /// Unix socket: raw bytes both ways, the backlog first.
        socket: PathBuf,
        /// The number of a container's `/dev/tty1` and so on; its console, or a VM's serial line, has none.
        tty: Option<u8>,
    },
    /// A program that is run on a terminal for whoever comes, and ends with him.
    Program(Program),
}

impl Console {
    /// The console itself, or a VM's serial line.
    pub fn main(socket: PathBuf) -> Self {
        Self::Line { socket, tty: None }
    }
}
