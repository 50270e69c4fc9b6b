// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The listener of a seccomp filter that asks (SCMP_ACT_NOTIFY), for processes of `exec`; libcontainer does the same
//! for the init. The filter may ask about nearly every call, so the new process only tells the number of its
//! descriptor and waits; the parent takes the descriptor out of it and hands it to the agent:
//!
//! ```text
//!  child: filter loaded -> number ->   parent: pidfd_getfd -> listenerPath: state + descriptor
//!         goes on       <- one byte <-
//! ```

use std::io::{IoSlice, Read, Write};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{ControlMessage, MsgFlags, UnixAddr, sendmsg};
use oci_spec::runtime::LinuxSeccomp;
use serde_json::json;

use crate::error::{Context, Error, Result};
use crate::process::ProcessFd;
use crate::state::{Saved, Status};
use crate::{hooks, sys, terminal};

/// In the child: tells the descriptor's number and waits until the agent has it.
pub(crate) fn offer(mut parent: &UnixStream, listener: RawFd) -> Result<()> {
    let mut done = [0_u8; 1];
    parent
        .write_all(&listener.to_ne_bytes())
        .and_then(|()| parent.read_exact(&mut done))
        .context(|| "hand the seccomp listener over".to_owned())
}

/// In the parent: waits for the child's offer, and gives the listener to the agent. A child that fails before has
/// nothing to offer.
pub(crate) fn pass_on(
    mut child: UnixStream,
    process: &ProcessFd,
    pid: sys::Pid,
    filter: &LinuxSeccomp,
    saved: &Saved,
) -> Result<()> {
    let mut number = [0_u8; 4];
    if child.read_exact(&mut number).is_err() {
        return Ok(());
    }
    let listener = sys::pidfd_getfd(process.as_fd(), RawFd::from_ne_bytes(number))
        .context(|| "take the seccomp listener".to_owned())?;
    let path = filter.listener_path().as_ref().ok_or_else(|| {
        Error::Argument("linux.seccomp: SCMP_ACT_NOTIFY needs a listenerPath".to_owned())
    })?;
    let agent = terminal::connect(path).at("failed to connect with seccomp agent at", path)?;
    // runtime-spec, "The Container Process State".
    let state = json!({
        "ociVersion": saved.oci_version,
        "fds": ["seccompFd"],
        "pid": pid,
        "metadata": filter.listener_metadata().clone().unwrap_or_default(),
        "state": hooks::state(saved, Status::Running, saved.init.map(|init| init.pid)),
    });
    let text = state.to_string();
    let descriptors = [listener.as_raw_fd()];
    sendmsg::<UnixAddr>(
        agent.as_raw_fd(),
        &[IoSlice::new(text.as_bytes())],
        &[ControlMessage::ScmRights(&descriptors)],
        MsgFlags::empty(),
        None,
    )
    .map_err(std::io::Error::from)
    .at("write to", path)?;
    child
        .write_all(b"1")
        .context(|| "let the new process go on".to_owned())
}
