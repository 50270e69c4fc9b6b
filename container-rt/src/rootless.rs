// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Rootless containers: the runtime is root of a user namespace that belongs to an ordinary user, as rootless podman
//! and `unshare --user --map-root-user --mount` call it. There is no privilege here that the user has not got: no
//! device node is made but bound, no BPF program is loaded, and where the user may make no cgroup the container has
//! none (`cgroup::absent`).
//!
//! A user outside of such a namespace is refused: mapping his ids is newuidmap's work, which his engine has done.

use std::fs;
use std::io;
use std::path::PathBuf;

use crate::error::{Error, Result};

/// The host's own user namespace: Linux, `PROC_USER_INIT_INO`.
const HOST: &str = "user:[4026531837]";

/// Refuses a caller who is root of nothing.
pub(crate) fn require_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    Err(Error::Argument(
        "run as root, or as root of a user namespace: rootless podman makes one, and so does \
         unshare --user --map-root-user --mount"
            .to_owned(),
    ))
}

/// Whether we are in a user namespace that is not the host's.
pub(crate) fn in_user_namespace() -> bool {
    // A kernel without user namespaces has no such file.
    fs::read_link("/proc/self/ns/user").is_ok_and(|name| name.as_os_str() != HOST)
}

/// Whether the host has refused, as it refuses an ordinary user.
pub(crate) fn is_refusal(error: &Error) -> bool {
    matches!(error, Error::Io { source, .. } if is_denied(source))
}

fn is_denied(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EACCES | libc::EPERM | libc::EROFS)
    )
}

/// The result of what an ordinary user is not allowed, and his container does without.
pub(crate) fn forgive(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if is_denied(&error) && in_user_namespace() => Ok(()),
        other => other,
    }
}

/// The directory of an ordinary user's session. Who is root by name, too, has the places of root: he is that of a
/// system container, as runc tells it.
pub(crate) fn runtime_directory() -> Option<PathBuf> {
    let of_root = std::env::var_os("USER").is_some_and(|name| name == "root");
    let directory = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from);
    let rootless = !nix::unistd::geteuid().is_root() || (in_user_namespace() && !of_root);
    directory.filter(|d| d.is_absolute() && rootless)
}
