// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! This program, run from a read-only mount of its file. In a container whose root is the host's root somebody who
//! executes `/proc/self/exe`, or looks at a process that is still on its way into the container, holds the file of the
//! runtime, and could write to it once nobody runs it any more: CVE-2019-5736.
//!
//! runc and crun of that time run from a copy in memory. The mount costs one execve(2) instead of a copy, and its pages
//! are those of the file, which counts for monitors. It is detached, and in no mount namespace from the execve on: nobody
//! can make it writable again, bind it or clone it, whatever his capabilities.

use std::convert::Infallible;
use std::ffi::CString;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sched::{CloneFlags, unshare};
use nix::sys::statvfs::{FsFlags, statvfs};

use crate::error::{Context, Error, Result};
use crate::sys;

const OWN: &str = "/proc/self/exe";
/// How ps(1) shows us: execve gives a process the name of the path, which is a number here. Terminated as a name of 15
/// bytes at most, prctl(2) PR_SET_NAME.
const NAME: &std::ffi::CStr = c"atoll-ct";

/// Executes this program again, with the same arguments, environment and descriptors, from where nobody can write to
/// it; returns when that is so already, as on a read-only file system. For the `main` of a program that creates
/// containers or executes in them, before it does anything else.
pub fn run_read_only() -> Result<()> {
    let mount = statvfs(OWN)
        .map_err(std::io::Error::from)
        .at("look at", Path::new(OWN))?;
    if !mount.flags().contains(FsFlags::ST_RDONLY) {
        return execute_read_only().map(|never| match never {});
    }
    // Only for whoever lists processes.
    nix::sys::prctl::set_name(NAME).ok();
    Ok(())
}

/// The mount in a namespace of our own: root of a user namespace has nothing to say in one that was there before. The
/// link leads to the mount that we have left, its text to the new one.
fn elsewhere(own: &Path) -> Result<OwnedFd> {
    unshare(CloneFlags::CLONE_NEWNS)
        .map_err(std::io::Error::from)
        .context(|| "make a mount namespace".to_owned())?;
    let path = fs::read_link(own).at("read", own)?;
    let [ours, found] = [own, &path].map(|path| fs::metadata(path).at("look at", path));
    let (ours, found) = (ours?, found?);
    if (ours.dev(), ours.ino()) != (found.dev(), found.ino()) {
        let path = path.display();
        return Err(Error::Argument(format!(
            "{path} is not this program any more"
        )));
    }
    sys::open_tree(&path, false).at("open the mount of", &path)
}

fn execute_read_only() -> Result<Infallible> {
    let own = Path::new(OWN);
    let mount = match sys::open_tree(own, false) {
        Err(e) if e.raw_os_error() == Some(libc::EPERM) => elsewhere(own)?,
        other => other.at("open the mount of", own)?,
    };
    sys::change_tree(mount.as_fd(), sys::MountChange::READONLY).at("make read-only", own)?;
    let words = |texts: Vec<std::ffi::OsString>| -> Vec<CString> {
        let convert = |text: std::ffi::OsString| {
            CString::new(text.into_vec()).expect("the kernel ends arguments and variables by NUL")
        };
        texts.into_iter().map(convert).collect()
    };
    let arguments = words(std::env::args_os().collect());
    let variables = std::env::vars_os().map(|(mut name, value)| {
        name.push("=");
        name.push(value);
        name
    });
    let environment = words(variables.collect());
    let path = format!("/proc/self/fd/{}", mount.as_raw_fd());
    let path = CString::new(path).expect("a number has no NUL");
    nix::unistd::execve(&path, &arguments, &environment)
        .map_err(std::io::Error::from)
        .at("execute again", own)
}
