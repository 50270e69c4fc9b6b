// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Further terminals of a system container: `/dev/tty1` and so on, where its init runs logins. Each is a pty of the
//! container's own devpts, bound to that name as the console is to `/dev/console`, and the monitor has the
//! controlling side. The runtime-spec knows one terminal only, so they are asked for by the annotation [`ANNOTATION`].
//!
//! They are opened once the init waits for its start, in their order: with a console, whose pty is `/dev/pts/0`,
//! `/dev/tty1` is `/dev/pts/1`.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use oci_spec::runtime::Spec;

use crate::bundle::{self, wrong};
use crate::cgroup::Owner;
use crate::error::{Context, Result};
use crate::mounts::{act_as, open_target, within};
use crate::process::ProcessFd;
use crate::{sys, terminal};

/// How many terminals the container has besides its console. Without it, and without a monitor to serve them, none.
pub const ANNOTATION: &str = "dev.atoll.terminals";

/// Most of them: as many as Linux has on a console by habit of every distribution's init.
pub const COUNT_MAX: u8 = 6;

/// Where the container's devpts is. A link in its root file system leads to another place in the container.
const MULTIPLEXER: &str = "/dev/pts/ptmx";

/// How many terminals config.json asks for.
pub fn wanted(spec: &Spec) -> Result<u8> {
    let annotations = spec.annotations().as_ref();
    let Some(text) = annotations.and_then(|a| a.get(ANNOTATION)) else {
        return Ok(0);
    };
    let count = text.parse().ok().filter(|count| *count <= COUNT_MAX);
    count.ok_or_else(|| {
        let field = format!("annotations[{ANNOTATION}]");
        wrong(
            &field,
            format!("{text:?} is no number from 0 to {COUNT_MAX}"),
        )
    })
}

/// Opens `count` terminals in the container of `init`, which waits for its start. Answers the controlling sides.
pub(crate) fn open(spec: &Spec, init: &ProcessFd, count: u8) -> Result<Vec<OwnedFd>> {
    let owner = bundle::owner(spec);
    let open_one = |number: u8| {
        let (ours, theirs) = UnixStream::pair().context(|| "create a socket pair".to_owned())?;
        let path = PathBuf::from(format!("/dev/tty{number}"));
        within(init, || {
            let controlling = open_in_container(&path, owner)?;
            terminal::send_fd(theirs.as_fd(), controlling.as_fd())
        })
        .context(|| format!("open {} in the container", path.display()))?;
        terminal::receive_fd(&ours)
    };
    (1..=count).map(open_one).collect()
}

/// In the container's mount namespace: opens a pty and binds its other side to `path`.
fn open_in_container(path: &Path, owner: Option<Owner>) -> std::io::Result<OwnedFd> {
    // The other side belongs to whoever opens this one.
    act_as(owner);
    let mut options = File::options();
    std::os::unix::fs::OpenOptionsExt::custom_flags(&mut options, libc::O_NOCTTY);
    let controlling = OwnedFd::from(options.read(true).write(true).open(MULTIPLEXER)?);
    let number = sys::unlock_pty(controlling.as_fd())?;
    let tree = sys::open_tree(Path::new(&format!("/dev/pts/{number}")), false)?;
    let target = open_target(path, false, owner)?;
    sys::move_mount_onto(tree.as_fd(), target.as_fd())?;
    Ok(controlling)
}
