// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The process's own view of the system: namespaces, an empty root, a user without rights; then landlock.
//!
//! The order matters: mounts need root's rights, landlock forbids mounts, and both must be over when capabilities go.
//! Each step holds for the calling thread and for those that it makes, hence it must be alone.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use landlock::{
    ABI, Access, AccessFs, AccessNet, PathBeneath, PathFd, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};
use nix::sched::CloneFlags;
use rustix::fs::{CWD, Mode, mkdirat};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountPropagationFlags, MoveMountFlags,
    OpenTreeFlags, UnmountFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
    mount_change, mount_remount, move_mount, open_tree, unmount,
};
use rustix::process::{Resource, Rlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};

use super::{Identity, SandboxError};

/// Descriptors that a machine may have: 255 vCPUs, and disks with 16 queues of five descriptors each.
const FILES_MAX: u64 = 16 << 10;

/// For `map_err`: names the step.
fn step<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> SandboxError {
    move |error| SandboxError::Jail {
        what,
        source: error.into(),
    }
}

/// Goes in. Root leaves the system behind; anybody else only what landlock can take away.
pub(super) fn enter(identity: Identity, directories: &[PathBuf]) -> Result<(), SandboxError> {
    limit_resources()?;
    let is_root = rustix::process::geteuid().is_root();
    if is_root {
        leave_namespaces()?;
        change_root(directories)?;
        become_nobody(identity)?;
    }
    rustix::thread::set_no_new_privs(true).map_err(step("give up new privileges"))?;
    landlock(directories)?;
    // Its memory is not for other processes of the same user, nor for a core file.
    let not_dumpable = rustix::process::DumpableBehavior::NotDumpable;
    rustix::process::set_dumpable_behavior(not_dumpable).map_err(step("become undumpable"))?;
    tracing::debug!(?identity, is_root, "in the sandbox");
    Ok(())
}

fn limit_resources() -> Result<(), SandboxError> {
    let set = |resource, most: Option<u64>| {
        let limit = Rlimit {
            current: most,
            maximum: most,
        };
        setrlimit(resource, limit).map_err(step("limit resources"))
    };
    set(Resource::Core, Some(0))?;
    let files = rustix::process::getrlimit(Resource::Nofile).maximum;
    set(
        Resource::Nofile,
        Some(files.unwrap_or(FILES_MAX).min(FILES_MAX)),
    )?;
    if rustix::process::geteuid().is_root() {
        // Kernels before 5.12 count the rings of io_uring here, a user at a time. Where even root may not raise it, a
        // disk whose ring does not fit says so.
        let _ = set(Resource::Memlock, None);
    }
    Ok(())
}

/// Mounts, network, System V IPC and host name of its own. Taps keep working: they are open.
fn leave_namespaces() -> Result<(), SandboxError> {
    let flags = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    nix::sched::unshare(flags).map_err(step("leave the host's namespaces"))
}

/// An empty file system, read-only, with nothing in it but `directories`.
fn change_root(directories: &[PathBuf]) -> Result<(), SandboxError> {
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(step("make mounts private"))?;
    let kept = directories
        .iter()
        .map(|path| clone_mount(path).map(|mount| (path, mount)))
        .collect::<Result<Vec<_>, _>>()?;
    let root = empty_file_system().map_err(step("mount an empty root"))?;
    // Above the old root, which stays the process's root for one more step.
    let attach = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&root, "", CWD, "/", attach).map_err(step("attach the empty root"))?;
    rustix::process::fchdir(&root).map_err(step("enter the empty root"))?;
    for (path, mount) in kept {
        bind(&root, path, &mount).map_err(|source| SandboxError::Directory {
            path: path.clone(),
            source,
        })?;
    }
    // The old root on top of the new one, then away with it. A root that is the kernel's initial RAM disk cannot be
    // exchanged: there the process's root is moved, which is as good without the right to do it again.
    match rustix::process::pivot_root(".", ".") {
        Ok(()) => unmount(".", UnmountFlags::DETACH).map_err(step("drop the old root"))?,
        Err(_) => rustix::process::chroot(".").map_err(step("change the root"))?,
    }
    rustix::process::chdir("/").map_err(step("enter the new root"))?;
    let flags = rustix::mount::MountFlags::RDONLY
        | rustix::mount::MountFlags::BIND
        | rustix::mount::MountFlags::NOSUID
        | rustix::mount::MountFlags::NODEV
        | rustix::mount::MountFlags::NOEXEC;
    mount_remount("/", flags, "").map_err(step("make the root read-only"))
}

fn empty_file_system() -> io::Result<OwnedFd> {
    let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    for (key, value) in [("mode", "0555"), ("size", "64k"), ("nr_inodes", "256")] {
        fsconfig_set_string(context.as_fd(), key, value)?;
    }
    fsconfig_create(context.as_fd())?;
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    Ok(fsmount(
        context.as_fd(),
        FsMountFlags::FSMOUNT_CLOEXEC,
        attributes,
    )?)
}

fn clone_mount(path: &Path) -> Result<OwnedFd, SandboxError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, path, flags).map_err(|error| SandboxError::Directory {
        path: path.to_owned(),
        source: error.into(),
    })
}

/// Makes `path` in the new root and puts the mount there.
fn bind(root: &OwnedFd, path: &Path, mount: &OwnedFd) -> io::Result<()> {
    let relative = path.strip_prefix("/").map_err(io::Error::other)?;
    let mut made = PathBuf::new();
    for part in relative {
        made.push(part);
        match mkdirat(root, &made, Mode::from_raw_mode(0o755)) {
            Ok(()) | Err(rustix::io::Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    let attach = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mount, "", root, relative, attach)?;
    Ok(())
}

/// Gives up every group, the user, and every capability.
fn become_nobody(identity: Identity) -> Result<(), SandboxError> {
    let gid = rustix::process::Gid::from_raw(identity.gid);
    let uid = rustix::process::Uid::from_raw(identity.uid);
    rustix::thread::set_thread_groups(&[]).map_err(step("leave all groups"))?;
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(step("change the group"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(step("change the user"))?;
    // Gone with the user, unless that is root again.
    let none = CapabilitySets {
        effective: CapabilitySet::empty(),
        permitted: CapabilitySet::empty(),
        inheritable: CapabilitySet::empty(),
    };
    rustix::thread::set_capabilities(None, none).map_err(step("drop capabilities"))
}

/// No path, no TCP, no abstract socket, no signal to others; as much of it as this kernel knows, which it tells.
fn landlock(directories: &[PathBuf]) -> Result<RulesetStatus, SandboxError> {
    let restricted = || -> Result<RestrictionStatus, Box<dyn std::error::Error + Send + Sync>> {
        let abi = ABI::V6;
        let mut ruleset = Ruleset::default()
            .handle_access(AccessFs::from_all(abi))?
            .handle_access(AccessNet::from_all(abi))?
            .scope(Scope::from_all(abi))?
            .create()?;
        for path in directories {
            let beneath = PathBeneath::new(PathFd::new(path)?, AccessFs::from_all(abi));
            ruleset = ruleset.add_rule(beneath)?;
        }
        Ok(ruleset.restrict_self()?)
    };
    let status = restricted().map_err(SandboxError::Landlock)?;
    if status.ruleset == RulesetStatus::NotEnforced {
        tracing::info!("this kernel has no landlock: the sandbox does without");
    }
    Ok(status.ruleset)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::ErrorKind::PermissionDenied;
    use std::net::TcpListener;
    use std::os::linux::net::SocketAddrExt as _;
    use std::os::unix::fs::PermissionsExt as _;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
    use std::thread::scope;

    use super::*;

    const NOBODY: Identity = Identity {
        uid: 65534,
        gid: 65534,
    };

    /// Whether this kernel has all that is asked of landlock: asked in a thread, since what it takes away is gone.
    fn is_to_be_had() -> bool {
        let asked = || {
            rustix::thread::set_no_new_privs(true).unwrap();
            landlock(&[]).unwrap()
        };
        let status = scope(|threads| threads.spawn(asked).join().unwrap());
        if status != RulesetStatus::FullyEnforced {
            println!("ATOLL-SKIP: this kernel's landlock: {status:?}");
        }
        status == RulesetStatus::FullyEnforced
    }

    fn is_refused<T>(result: io::Result<T>) -> bool {
        match result {
            Ok(_) => false,
            Err(error) if error.kind() == PermissionDenied => true,
            Err(error) => panic!("neither allowed nor refused: {error}"),
        }
    }

    fn bind_tcp() -> io::Result<TcpListener> {
        TcpListener::bind(("0.0.0.0", 0))
    }

    /// A machine of no root: nothing but landlock stands between it and its user's files.
    #[test]
    fn a_user_reaches_its_directories_and_nothing_else() {
        if !is_to_be_had() {
            return;
        }
        let [mine, other] = [(), ()].map(|()| tempfile::tempdir().unwrap());
        for folder in [&mine, &other] {
            let everybody = std::fs::Permissions::from_mode(0o755);
            std::fs::set_permissions(folder.path(), everybody).unwrap();
            std::fs::write(folder.path().join("file"), "").unwrap();
        }
        let name = format!("atoll-jail-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(name).unwrap();
        let _listener = UnixListener::bind_addr(&address).unwrap();
        let reach = || {
            [
                is_refused(File::open(mine.path().join("file"))),
                is_refused(File::open(other.path().join("file"))),
                is_refused(bind_tcp()),
                is_refused(UnixStream::connect_addr(&address)),
            ]
        };
        let confined = || {
            let uid = rustix::process::Uid::from_raw(NOBODY.uid);
            if rustix::process::geteuid().is_root() {
                rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
            }
            let before = reach();
            enter(NOBODY, &[mine.path().to_owned()]).unwrap();
            [before, reach()]
        };
        let [before, after] = scope(|threads| threads.spawn(confined).join().unwrap());
        assert_eq!(before, [false; 4]);
        assert_eq!(after, [false, true, true, true]);
    }

    /// Root's machine has namespaces, and landlock besides: there is no TCP in a network of its own either.
    #[test]
    fn roots_machine_has_landlock_too() {
        if !rustix::process::geteuid().is_root() {
            println!("ATOLL-SKIP: this test is not root");
            return;
        }
        if !is_to_be_had() {
            return;
        }
        let confined = || {
            let before = is_refused(bind_tcp());
            enter(NOBODY, &[]).unwrap();
            [before, is_refused(bind_tcp())]
        };
        let refused = scope(|threads| threads.spawn(confined).join().unwrap());
        assert_eq!(refused, [false, true]);
    }
}
