// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Unix sockets that a killed machine left behind. Used for the control API and for consoles.

use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// Removes the socket at `path` if nobody listens on it any more. Fails with [`io::ErrorKind::AddrInUse`] if
/// somebody does. Leaves alone what is not a socket: binding will say so.
pub fn remove_stale(path: &Path) -> io::Result<()> {
    let is_socket =
        std::fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket());
    if !is_socket {
        return Ok(());
    }
    match UnixStream::connect(path) {
        Ok(_) => Err(io::ErrorKind::AddrInUse.into()),
        Err(_) => std::fs::remove_file(path),
    }
}

/// Listens on `path`, for this user only; a socket that a killed process left behind is replaced.
pub fn listen(path: &Path) -> io::Result<UnixListener> {
    remove_stale(path)?;
    // Under its name only once it listens: who sees it can connect.
    let mut early = path.as_os_str().to_owned();
    early.push(".new");
    let early = Path::new(&early);
    remove_stale(early)?;
    let listener = UnixListener::bind(early)?;
    std::fs::set_permissions(early, std::fs::Permissions::from_mode(0o600))?;
    std::fs::rename(early, path)?;
    Ok(listener)
}
