// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What `start` is told by the init that it starts. libcontainer's own signal goes one way: a startContainer hook
//! that fails, or a program that cannot be executed, would be seen by nobody. So the init holds a second socket,
//! and runs those hooks itself (`program`):
//!
//! ```text
//!  start                                   init
//!  connects to report.sock
//!  start.sock: go on ------------------->  startContainer hooks
//!  reads until the end                     execve closes the socket: the end, without a word
//!         <------------------------------  or writes why not
//! ```

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use crate::error::{Context, Error, Result, one_line};
use crate::terminal;

/// Opens the init's side, before the init exists.
pub(crate) fn listen(path: &Path) -> Result<UnixListener> {
    let directory = path.parent().unwrap_or(Path::new("/"));
    let open = std::fs::File::open(directory).at("open", directory)?;
    // A socket's address is short; the runtime's root may not be.
    let short = Path::new("/proc/self/fd").join(open.as_raw_fd().to_string());
    UnixListener::bind(short.join(path.file_name().unwrap_or_default())).at("listen at", path)
}

/// In the init: says why the program does not run.
pub(crate) fn tell(listener: &UnixListener, error: &Error) {
    let code = match error {
        Error::Executable { exit_code, .. } => *exit_code,
        _ => 1,
    };
    let answer = || -> io::Result<()> {
        // Nobody may be there: then nobody wants to know.
        listener.set_nonblocking(true)?;
        let (mut caller, _) = listener.accept()?;
        caller.write_all(&[code])?;
        caller.write_all(one_line(error).as_bytes())
    };
    answer().ok();
}

/// In `start`: connects before the init goes on. Nothing when the container's creator knew no such socket.
pub(crate) fn connect(path: &Path) -> Option<UnixStream> {
    terminal::connect(path).ok()
}

/// In `start`: waits until the program runs, or says why it does not.
pub(crate) fn wait(mut report: UnixStream) -> Result<()> {
    let mut answer = Vec::new();
    match report.read_to_end(&mut answer) {
        // That is how a socket ends whose listener was closed before it accepted.
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {}
        other => {
            other.context(|| "read from the starting init".to_owned())?;
        }
    }
    let Some((&exit_code, message)) = answer.split_first() else {
        return Ok(());
    };
    let message = String::from_utf8_lossy(message).into_owned();
    Err(match exit_code {
        126 | 127 => Error::Executable { message, exit_code },
        _ => Error::Argument(message),
    })
}
