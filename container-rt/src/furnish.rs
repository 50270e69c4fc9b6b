// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What libcontainer leaves undone in a container's mount namespace. Some of it must be done after everything is
//! mounted and before the root changes, by a createRuntime hook of our own, `atoll-ct furnish ROOTFS STEP…`, which is
//! added only to containers that need a step:
//!
//! - `uncover-dev`: a `/dev` that is somebody else's (`own_dev`);
//! - `hide-host`: with `--no-pivot` the host's proc and sysfs, each of which may be mounted several times over. One
//!   left would let a user namespace in the container mount an unmasked proc of its own.
//!
//! The rest once there is an init that waits ([`seal`]): `ro` on the mount of `/dev`, which is dropped, since nodes
//! and the console are made in it; every option of the mount of the v1 cgroups, above all `ro`; propagation.

use std::fs::{self, File};
use std::io::Read;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};
use nix::sched::{CloneFlags, setns};
use oci_spec::runtime::{Hook, HookBuilder, Mount, Spec, State};

use crate::error::{Context, Error, Result};
use crate::process::{ProcessFd, wait_child};
use crate::sys::{self, Fork};
use crate::{bundle, cgroup, own_dev};

/// Name of the hidden command of `atoll-ct`.
pub const COMMAND: &str = "furnish";

type Step = fn(&Path) -> Result<()>;

const STEPS: &[(&str, Step)] = &[("uncover-dev", own_dev::uncover), ("hide-host", hide_host)];

/// Whether the last mount at a place is to be read-only.
fn is_readonly(spec: &Spec, destination: &str) -> bool {
    let here = |m: &&Mount| m.destination() == Path::new(destination);
    let mount = spec.mounts().iter().flatten().rfind(here);
    mount.is_some_and(|m| m.options().iter().flatten().any(|option| option == "ro"))
}

/// The mounts whose options say how they propagate. libcontainer gives that to mount(2) together with the rest, where
/// it is without effect.
fn propagations(spec: &Spec) -> Vec<(&Path, sys::MountChange)> {
    let mut found = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        for option in mount.options().iter().flatten() {
            let plain = option.strip_prefix('r').unwrap_or(option);
            let flag = match plain {
                "shared" => libc::MS_SHARED,
                "slave" => libc::MS_SLAVE,
                "private" => libc::MS_PRIVATE,
                "unbindable" => libc::MS_UNBINDABLE,
                _ => continue,
            };
            let mut change = sys::MountChange::propagation(flag);
            if plain != option {
                change = change | sys::MountChange::BELOW;
            }
            found.push((mount.destination().as_path(), change));
        }
    }
    found
}

/// Sets in the container of `init` what libcontainer leaves out.
pub(crate) fn seal(spec: &Spec, init: sys::Pid) -> Result<()> {
    let mut places = propagations(spec);
    if is_readonly(spec, "/dev") && !own_dev::is_bound(spec) {
        places.push((Path::new("/dev"), sys::MountChange::READONLY));
    }
    if is_readonly(spec, "/sys/fs/cgroup") && !cgroup::is_unified_host()? {
        let all = sys::MountChange::READONLY | sys::MountChange::BELOW | sys::MountChange::HARMLESS;
        places.push((Path::new("/sys/fs/cgroup"), all));
    }
    if places.is_empty() {
        return Ok(());
    }
    let process = ProcessFd::of_child(init)?;
    let restrict = || -> std::io::Result<()> {
        sys::setns(process.as_fd(), libc::CLONE_NEWNS)?;
        let mut places = places.iter();
        places.try_for_each(|(path, what)| sys::change_mount(path, *what))
    };
    // A namespace of mounts cannot be left again, so a child enters it. Its exit code is the error's number.
    let child = match sys::fork().context(|| "fork".to_owned())? {
        Fork::Parent(pid) => ProcessFd::of_child(pid)?,
        Fork::Child => {
            let number = restrict()
                .err()
                .map(|e| e.raw_os_error().unwrap_or(libc::EIO));
            sys::exit_now(number.unwrap_or(0));
        }
    };
    match wait_child(&child)?.code {
        0 => Ok(()),
        number => Err(std::io::Error::from_raw_os_error(number))
            .context(|| "set options of the container's mounts".to_owned()),
    }
}

/// Adds the hook with the steps that this container needs.
pub(crate) fn prepare(spec: &mut Spec, rootfs: &Path, no_pivot: bool) -> Result<()> {
    let needed = [own_dev::is_bound(spec), no_pivot];
    let steps = STEPS.iter().zip(needed).filter(|(_, needed)| *needed);
    let steps: Vec<&str> = steps.map(|((name, _), _)| *name).collect();
    if steps.is_empty() {
        return Ok(());
    }
    let mut hooks = spec.hooks().clone().unwrap_or_default();
    let mut list = hooks.create_runtime().clone().unwrap_or_default();
    list.insert(0, hook(rootfs, &steps)?);
    hooks.set_create_runtime(Some(list));
    spec.set_hooks(Some(hooks));
    Ok(())
}

fn hook(rootfs: &Path, steps: &[&str]) -> Result<Hook> {
    let text = rootfs
        .to_str()
        .ok_or_else(|| Error::Argument(format!("{}: the path is not UTF-8", rootfs.display())))?;
    let mut words = vec!["atoll-ct", COMMAND, text];
    words.extend(steps);
    let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
    let hook = HookBuilder::default()
        .path("/proc/self/exe")
        .args(words)
        .env(Vec::new());
    Ok(hook.build().expect("every field is given"))
}

/// The hook: takes the steps in the mount namespace of the container whose state is on standard input.
pub fn furnish(rootfs: &Path, steps: &[String]) -> Result<()> {
    let mut text = Vec::new();
    std::io::stdin()
        .read_to_end(&mut text)
        .context(|| "read the container's state".to_owned())?;
    let state: State = serde_json::from_slice(&text).map_err(|source| Error::Json {
        what: "standard input".to_owned(),
        source,
    })?;
    let pid = state
        .pid()
        .ok_or_else(|| Error::Argument(format!("{COMMAND}: the state names no process")))?;
    let namespace = PathBuf::from(format!("/proc/{pid}/ns/mnt"));
    let file = File::open(&namespace).at("open", &namespace)?;
    setns(file, CloneFlags::CLONE_NEWNS)
        .map_err(std::io::Error::from)
        .at("enter", &namespace)?;
    for step in steps {
        let known = STEPS.iter().find(|(name, _)| name == step);
        let (_, take) = known.ok_or_else(|| Error::Argument(format!("unknown step {step}")))?;
        take(rootfs)?;
    }
    Ok(())
}

fn hide_host(rootfs: &Path) -> Result<()> {
    let path = Path::new("/proc/self/mountinfo");
    let text = fs::read_to_string(path).at("read", path)?;
    // The last mounted lies uppermost.
    for line in text.lines().rev() {
        let Some((before, after)) = line.split_once(" - ") else {
            continue;
        };
        let Some(target) = before.split(' ').nth(4).map(Path::new) else {
            continue;
        };
        if matches!(after.split(' ').next(), Some("proc" | "sysfs")) && !target.starts_with(rootfs)
        {
            // Locked ones of a parent namespace stay, and libcontainer covers them.
            umount2(target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW).ok();
        }
    }
    Ok(())
}

/// Gives createContainer hooks the root file system as their working directory, as runc does: each becomes a call of
/// [`in_directory`]. Those of the host keep the bundle's.
pub(crate) fn place_hooks(spec: &mut Spec, rootfs: &Path) -> Result<()> {
    let Some(mut hooks) = spec.hooks().clone() else {
        return Ok(());
    };
    for hook in hooks.create_container_mut().iter_mut().flatten() {
        let path = hook.path().display().to_string();
        let arguments = hook.args().clone().unwrap_or_else(|| vec![path.clone()]);
        let root = rootfs.to_str();
        let root = root.ok_or_else(|| bundle::wrong("root.path", "is not UTF-8"))?;
        let mut words = vec![
            "atoll-ct".to_owned(),
            IN_DIRECTORY.to_owned(),
            root.to_owned(),
            path,
        ];
        words.extend(arguments);
        hook.set_path("/proc/self/exe".into());
        hook.set_args(Some(words));
    }
    spec.set_hooks(Some(hooks));
    Ok(())
}

/// Name of the other hidden command: `in-directory DIRECTORY PROGRAM ARGUMENT0 …`.
pub const IN_DIRECTORY: &str = "in-directory";

/// Becomes a program in a directory. Returns only with the reason why not.
pub fn in_directory(directory: &Path, program: &Path, arguments: &[String]) -> Error {
    let become_it = || -> Result<std::convert::Infallible> {
        std::env::set_current_dir(directory).at("enter", directory)?;
        let own: Vec<String> = std::env::vars()
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        crate::program::become_program(program, arguments, &own)
    };
    match become_it() {
        Err(error) => error,
        Ok(never) => match never {},
    }
}
