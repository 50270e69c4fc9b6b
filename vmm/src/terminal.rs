// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The user's terminal: while it is the guest's console, keys go to the guest one by one, Ctrl-C included. And what a
//! command prints.
//!
//! Used by `main`, raw when a console is on stdio. To leave a guest that does not power off:
//! `atoll-vmm ctl --api-socket S shutdown`, or SIGTERM.

use std::io::{self, Write};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// Standard input in raw mode, until this is dropped.
pub struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    /// Switches standard input, if it is a terminal.
    pub fn enter() -> io::Result<Option<Self>> {
        let stdin = io::stdin();
        if !isatty(&stdin) {
            return Ok(None);
        }
        let before = tcgetattr(&stdin)?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw)?;
        Ok(Some(Self { before }))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        // The terminal may be gone: nobody is left to see it.
        let _ = tcsetattr(io::stdin(), OptionalActions::Now, &self.before);
    }
}

/// Writes `text` to standard output. A reader that has seen enough (`| head`) is not an error.
pub fn print(text: &str) -> io::Result<()> {
    match io::stdout().lock().write_all(text.as_bytes()) {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(error),
        _ => Ok(()),
    }
}

/// A text as one line that does nothing to a terminal: control characters, which a name or a damaged file may bring
/// into a message, are written as escapes.
#[must_use]
pub fn one_line(text: &str) -> String {
    let escaped = |letter: char| match letter.is_control() {
        true => letter.escape_default().to_string(),
        false => letter.to_string(),
    };
    text.chars().map(escaped).collect()
}
