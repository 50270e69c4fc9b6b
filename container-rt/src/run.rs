// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `run`: create, start, and in the foreground wait and delete; `restore` likewise, without the start. Signals are blocked before the container exists
//! and its end is seen through a pidfd, so a program that ends at once is not missed.

use std::os::unix::net::UnixStream;
use std::path::Path;

use crate::create::{self, Console, Request};
use crate::error::{Context, Result};
use crate::lifecycle::{Container, Force};
use crate::process::{ExitStatus, ProcessFd};
use crate::terminal::{self, Signals};
use crate::{bundle, mknod, sys};

/// What becomes of the container after its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum After {
    /// Delete it.
    Delete,
    /// Leave it stopped.
    Keep,
}

/// Runs a container in the foreground. Answers how its program ended.
pub fn foreground(root: &Path, request: &Request, after: After) -> Result<ExitStatus> {
    let signals = Signals::block()?;
    let mut console = Console::default();
    let mut ours = None;
    let bundle = bundle::load(request)?;
    mknod::needs_monitor(&bundle.spec)?;
    if request.console_socket.is_none() && bundle::has_terminal(&bundle.spec) {
        let (here, there) = UnixStream::pair().context(|| "create a socket pair".to_owned())?;
        console.terminal = Some(there.into());
        ours = Some(here);
    }
    let saved = create::create(root, request, bundle, &console)?;
    drop(console);
    let container = Container::load(root, &request.id)?;
    let init = saved.init.map_or(0, |init| init.pid);
    let result = serve(&container, request, init, ours, signals);
    if after == After::Delete || result.is_err() {
        container.delete(Force::Yes)?;
    }
    result
}

fn serve(
    container: &Container,
    request: &Request,
    init: sys::Pid,
    socket: Option<UnixStream>,
    signals: Signals,
) -> Result<ExitStatus> {
    let child = ProcessFd::of_child(init)?;
    let pty = socket
        .map(|socket| terminal::receive_fd(&socket))
        .transpose()?;
    start(container, request)?;
    terminal::foreground(&child, pty, signals)
}

/// Creates and starts, and leaves.
pub fn detached(root: &Path, request: &Request) -> Result<()> {
    let bundle = bundle::load(request)?;
    mknod::needs_monitor(&bundle.spec)?;
    create::create(root, request, bundle, &Console::default())?;
    start_or_delete(root, request)
}

/// Starts a container that was just created; one that does not start is not left behind.
pub fn start_or_delete(root: &Path, request: &Request) -> Result<()> {
    let container = Container::load(root, &request.id)?;
    start(&container, request).inspect_err(|_| {
        container.delete(Force::Yes).ok();
    })
}

/// A restored container runs already, or has run.
fn start(container: &Container, request: &Request) -> Result<()> {
    match request.restore {
        Some(_) => Ok(()),
        None => container.start(),
    }
}
