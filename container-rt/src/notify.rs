// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The listener of a seccomp filter that asks (SCMP_ACT_NOTIFY), on its way to the agent. The filter may ask about nearly
//! every call, so the process that has loaded it only tells the number of its descriptor and waits. Somebody outside
//! takes the descriptor out of it and hands it to the agent: for a process of `exec` its parent, for a container's init
//! a helper, since libcontainer keeps the creating process busy until the init is ready.
//!
//! ```text
//!  process: filter loaded -> number ->   helper: pidfd_getfd -> listenerPath: state + descriptor
//!           goes on       <- one byte <-
//! ```

use std::io::{IoSlice, IoSliceMut, PipeReader, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, UnixCredentials, recvmsg, sendmsg,
    setsockopt, sockopt,
};
use oci_spec::runtime::LinuxSeccomp;
use serde_json::json;

use crate::error::{Context, Error, Result, one_line};
use crate::process::{ProcessFd, wait_child};
use crate::state::{Saved, Status};
use crate::sys::{Fork, Pid};
use crate::{hooks, sys, terminal};

/// The end on which a listener is waited for, which tells who writes to it, and the end on which it is offered.
pub(crate) fn pair() -> Result<(UnixStream, UnixStream)> {
    let what = || "create a socket pair".to_owned();
    let (offered, offer) = UnixStream::pair().context(what)?;
    setsockopt(&offered, sockopt::PassCred, &true).context(what)?;
    Ok((offered, offer))
}

/// In the process that has loaded the filter: tells the descriptor's number and waits until the agent has it.
pub(crate) fn offer(mut parent: &UnixStream, listener: &OwnedFd) -> Result<()> {
    let number = listener.as_raw_fd().to_ne_bytes();
    let mut done = [0_u8; 1];
    // The one call that no filter may ask about.
    nix::unistd::write(parent, &number)
        .map_err(std::io::Error::from)
        .and_then(|_| parent.read_exact(&mut done))
        .context(|| "hand the seccomp listener over".to_owned())
}

/// Outside: waits for the offer, and gives the listener to the agent. A process that fails before has nothing to offer.
/// The container's state is told as its status and the process id of its init; while there is no other process, the
/// sender is the init.
pub(crate) fn pass_on(
    mut offered: UnixStream,
    filter: &LinuxSeccomp,
    saved: &Saved,
    (status, init): (Status, Option<Pid>),
) -> Result<()> {
    let what = || "take the seccomp listener".to_owned();
    let Some((pid, number)) = receive(&offered).context(what)? else {
        return Ok(());
    };
    let process = sys::pidfd_open(pid).context(what)?;
    let listener = sys::pidfd_getfd(process.as_fd(), number).context(what)?;
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
        "state": hooks::state(saved, status, init.or(Some(pid))),
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
    offered
        .write_all(b"1")
        .context(|| "let the new process go on".to_owned())
}

/// The number of the listener, and the sender's process id in our namespace, by the kernel's word.
fn receive(offered: &UnixStream) -> nix::Result<Option<(Pid, RawFd)>> {
    let mut number = [0_u8; 4];
    let mut control = nix::cmsg_space!(UnixCredentials);
    let mut data = [IoSliceMut::new(&mut number)];
    let message = recvmsg::<UnixAddr>(
        offered.as_raw_fd(),
        &mut data,
        Some(&mut control),
        MsgFlags::empty(),
    )?;
    let sender = message.cmsgs()?.find_map(|control| match control {
        ControlMessageOwned::ScmCredentials(credentials) => Some(credentials.pid()),
        _ => None,
    });
    let complete = message.bytes == number.len();
    Ok(sender
        .filter(|_| complete)
        .map(|pid| (pid, RawFd::from_ne_bytes(number))))
}

/// A child that waits for the offer of an init.
pub(crate) struct Helper {
    child: ProcessFd,
    errors: PipeReader,
}

impl Helper {
    /// Starts it. The other answer is for the init, and must be gone everywhere else before [`Self::end`].
    pub(crate) fn start(filter: &LinuxSeccomp, saved: &Saved) -> Result<(Self, UnixStream)> {
        let (offered, offer) = pair()?;
        let (errors, mut report) = std::io::pipe().context(|| "create a pipe".to_owned())?;
        match sys::fork().context(|| "fork".to_owned())? {
            Fork::Parent(pid) => {
                let child = ProcessFd::of_child(pid)?;
                Ok((Self { child, errors }, offer))
            }
            Fork::Child => {
                drop((offer, errors));
                if let Err(error) = pass_on(offered, filter, saved, (Status::Creating, None)) {
                    // The init's failure tells less.
                    report.write_all(one_line(&error).as_bytes()).ok();
                }
                sys::exit_now(0)
            }
        }
    }

    /// Waits for its end. Answers what went wrong.
    pub(crate) fn end(mut self) -> Result<()> {
        let mut error = String::new();
        self.errors
            .read_to_string(&mut error)
            .context(|| "read from the seccomp listener's helper".to_owned())?;
        wait_child(&self.child)?;
        match error.is_empty() {
            true => Ok(()),
            false => Err(Error::Argument(error)),
        }
    }
}
