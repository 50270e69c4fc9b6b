// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Idmapped mounts, which libcontainer refuses: the root file system (by the annotation [`ROOTFS_ANNOTATION`])
//! and bind mounts that name mappings or the options `idmap`/`ridmap`. Each becomes a mount below
//! [`MOUNT_ROOT`], made before libcontainer runs and handed to it as an ordinary directory or file to bind;
//! the container keeps its own reference, so ours goes away as soon as the container is created. They are not
//! below the runtime's root, which the container's user, who binds them, need not be able to reach.
//!
//! With it a root file system with ids 0..65535 on disk serves every unprivileged container, each in its own
//! range, without a chown.

use std::fs::{self, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::unistd::{Gid, Uid, setfsgid, setfsuid};
use oci_spec::runtime::{LinuxIdMapping, Mount, Spec};

use crate::bundle;
use crate::cgroup::Owner;
use crate::error::{Context, Error, Result};
use crate::overlay;
use crate::rootless;
use crate::sys::{self, Fork};

/// Set to `container`, it maps the root file system by the container's own id mappings.
pub const ROOTFS_ANNOTATION: &str = "dev.atoll.rootfs.idmap";

/// Where the mounts are while a container is created: one directory each, which only the container's root may
/// enter. Those of rootless containers are in their user's own `$XDG_RUNTIME_DIR`.
pub const MOUNT_ROOT: &str = "/run/atoll-ct-mounts";

/// The mounts that exist while a container is being created; dropping detaches them.
#[derive(Debug, Default)]
pub struct Transient {
    directory: Option<PathBuf>,
    mounted: Vec<PathBuf>,
}

impl Transient {
    /// Their mount points, for whoever cleans up after a creator that was killed.
    pub fn paths(&self) -> &[PathBuf] {
        &self.mounted
    }
}

impl Drop for Transient {
    fn drop(&mut self) {
        for target in self.mounted.iter().rev() {
            detach(target);
        }
        if let Some(directory) = &self.directory {
            fs::remove_dir(directory).ok();
        }
    }
}

impl Transient {
    /// Takes charge of a mount in the directory.
    pub(crate) fn keep(&mut self, mounted: &Path) {
        self.mounted.push(mounted.to_owned());
    }

    /// The directory of this container's mounts, made when the first is needed.
    pub(crate) fn directory(&mut self, owner: Option<Owner>) -> Result<PathBuf> {
        if let Some(directory) = &self.directory {
            return Ok(directory.clone());
        }
        let root = match rootless::runtime_directory() {
            Some(own) => own.join("atoll-ct-mounts"),
            None => MOUNT_ROOT.into(),
        };
        fs::create_dir_all(&root).at("create", &root)?;
        fs::set_permissions(&root, Permissions::from_mode(0o711)).at("chmod", &root)?;
        // One creator makes the mounts of one container: its process id is unique meanwhile.
        let directory = root.join(std::process::id().to_string());
        fs::create_dir_all(&directory).at("create", &directory)?;
        fs::set_permissions(&directory, Permissions::from_mode(0o700)).at("chmod", &directory)?;
        if let Some(owner) = owner {
            chown(&directory, Some(owner.uid), Some(owner.gid)).at("chown", &directory)?;
        }
        self.directory = Some(directory.clone());
        Ok(directory)
    }
}

/// Takes away a transient mount and its mount point. Quiet: it may be gone already.
pub fn detach(target: &Path) {
    if sys::unmount(target).is_ok() {
        fs::remove_dir(target)
            .or_else(|_| fs::remove_file(target))
            .ok();
    }
}

/// The user and group mappings of one user namespace.
struct Mappings<'a> {
    uids: &'a [LinuxIdMapping],
    gids: &'a [LinuxIdMapping],
}

/// Whether config.json wants its root file system mapped.
pub fn wants_rootfs(spec: &Spec) -> Result<bool> {
    let annotations = spec.annotations().as_ref();
    match annotations
        .and_then(|a| a.get(ROOTFS_ANNOTATION))
        .map(String::as_str)
    {
        None => Ok(false),
        Some("container") => Ok(true),
        Some(other) => Err(Error::Config {
            field: format!("annotations[{ROOTFS_ANNOTATION}]"),
            reason: format!("{other:?} is unknown: the value is \"container\", or leave it out"),
        }),
    }
}

/// Makes the idmapped mounts that `spec` asks for, and rewrites its bind mounts to use them. Answers the root
/// file system to use, and the mounts to keep until the container is created.
pub fn prepare(spec: &mut Spec, rootfs: &Path) -> Result<(PathBuf, Transient)> {
    let owner = bundle::owner(spec);
    let mut transient = Transient::default();
    let mut container_namespace = None;
    let mut used = rootfs.to_owned();
    if wants_rootfs(spec)? {
        container_namespace = Some(container_mappings(spec)?);
    }
    if let Some(layers) = overlay::prepare(spec, container_namespace.as_ref(), &mut transient)? {
        used = layers;
    } else if let Some(namespace) = &container_namespace {
        used = transient.directory(owner)?.join("rootfs");
        let source = Source {
            path: rootfs,
            recursive: false,
        };
        attach(&source, Some(namespace), &used, &mut transient)?;
    }
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for (index, mount) in mounts.iter_mut().enumerate() {
        let Some(recursive) = wants_mapping(mount) else {
            if let Some(owner) = owner {
                make_reachable(mount, owner, index, &mut transient)?;
            }
            continue;
        };
        let own;
        let namespace = match mount_mappings(mount)? {
            Some(mappings) => {
                own = user_namespace(&mappings)?;
                &own
            }
            None => {
                if container_namespace.is_none() {
                    container_namespace = Some(container_mappings(spec)?);
                }
                container_namespace.as_ref().expect("it was just set")
            }
        };
        let field = || format!("mounts[{}]", mount.destination().display());
        let source = mount.source().clone().ok_or_else(|| Error::Config {
            field: field(),
            reason: "an idmapped bind mount needs a source".to_owned(),
        })?;
        let target = transient.directory(owner)?.join(index.to_string());
        let source = Source {
            path: &source,
            recursive,
        };
        attach(&source, Some(namespace), &target, &mut transient)?;
        use_instead(mount, target);
    }
    spec.set_mounts(Some(mounts));
    Ok((used, transient))
}

/// A detached mount of a bind mount's source, mapped if the mount wants that: for a container that exists.
pub(crate) fn detached(mount: &Mount, source: &Path, spec: &Spec) -> Result<OwnedFd> {
    let mapped = wants_mapping(mount);
    let binds_below = mount.options().iter().flatten().any(|o| o == "rbind");
    let recursive = mapped.unwrap_or(binds_below);
    let tree = sys::open_tree(source, recursive).at("open the mount of", source)?;
    if mapped.is_some() {
        let namespace = match mount_mappings(mount)? {
            Some(mappings) => user_namespace(&mappings)?,
            None => container_mappings(spec)?,
        };
        map(&tree, &namespace, source, recursive)?;
    }
    Ok(tree)
}

/// A bind mount from below a directory that the container's root may not enter, who does the binding: it gets a way
/// there that is open to that user, as a second mount of the same.
fn make_reachable(
    mount: &mut Mount,
    owner: Owner,
    index: usize,
    transient: &mut Transient,
) -> Result<()> {
    let binds = |o: &String| o == "bind" || o == "rbind";
    let is_bind =
        mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(binds);
    let Some(source) = mount.source().clone().filter(|_| is_bind) else {
        return Ok(());
    };
    let before = (
        setfsgid(Gid::from_raw(owner.gid)),
        setfsuid(Uid::from_raw(owner.uid)),
    );
    let refused = fs::metadata(&source).is_err_and(|e| e.kind() == io::ErrorKind::PermissionDenied);
    setfsuid(before.1);
    setfsgid(before.0);
    if !refused {
        return Ok(());
    }
    let recursive = mount.options().iter().flatten().any(|o| o == "rbind");
    let target = transient.directory(Some(owner))?.join(index.to_string());
    let tree = sys::open_tree(&source, recursive).at("open the mount of", &source)?;
    place(&tree, &source, &target, transient)?;
    mount.set_source(Some(target));
    Ok(())
}

/// Whether a mount is to be mapped, and with everything below it. The runtime-spec has `idmap` and `ridmap`.
fn wants_mapping(mount: &Mount) -> Option<bool> {
    let has = |name: &str| {
        mount
            .options()
            .as_deref()
            .unwrap_or_default()
            .iter()
            .any(|o| o == name)
    };
    if has("ridmap") {
        Some(true)
    } else {
        (has("idmap") || mount.uid_mappings().is_some() || mount.gid_mappings().is_some())
            .then_some(false)
    }
}

fn mount_mappings(mount: &Mount) -> Result<Option<Mappings<'_>>> {
    match (
        mount.uid_mappings().as_deref(),
        mount.gid_mappings().as_deref(),
    ) {
        (None | Some([]), None | Some([])) => Ok(None),
        (Some(uids @ [_, ..]), Some(gids @ [_, ..])) => Ok(Some(Mappings { uids, gids })),
        _ => Err(Error::Config {
            field: format!("mounts[{}]", mount.destination().display()),
            reason: "uidMappings and gidMappings belong together".to_owned(),
        }),
    }
}

/// Points a mount at the mapped copy; what libcontainer refuses goes.
fn use_instead(mount: &mut Mount, target: PathBuf) {
    let options = mount.options().as_deref().unwrap_or_default().iter();
    let kept = options
        .filter(|o| !matches!(o.as_str(), "idmap" | "ridmap"))
        .cloned()
        .collect();
    mount.set_options(Some(kept));
    mount.set_uid_mappings(None);
    mount.set_gid_mappings(None);
    mount.set_source(Some(target));
}

/// A user namespace with the container's own mappings.
pub fn container_mappings(spec: &Spec) -> Result<OwnedFd> {
    let linux = spec.linux().as_ref();
    let uids = linux
        .and_then(|l| l.uid_mappings().as_deref())
        .unwrap_or_default();
    let gids = linux
        .and_then(|l| l.gid_mappings().as_deref())
        .unwrap_or_default();
    if uids.is_empty() || gids.is_empty() {
        return Err(Error::Config {
            field: "linux.uidMappings, linux.gidMappings".to_owned(),
            reason: "an idmapped mount needs the container's mappings, and there are none"
                .to_owned(),
        });
    }
    user_namespace(&Mappings { uids, gids })
}

/// What is mounted a second time.
pub(crate) struct Source<'a> {
    /// A directory or file.
    pub(crate) path: &'a Path,
    /// With everything that is mounted below.
    pub(crate) recursive: bool,
}

/// Clones the mount at `source`, maps it if there is something to map it by, and attaches it at the new `target`.
pub(crate) fn attach(
    source: &Source<'_>,
    namespace: Option<&OwnedFd>,
    target: &Path,
    transient: &mut Transient,
) -> Result<()> {
    let tree =
        sys::open_tree(source.path, source.recursive).at("open the mount of", source.path)?;
    if let Some(namespace) = namespace {
        map(&tree, namespace, source.path, source.recursive)?;
    }
    place(&tree, source.path, target, transient)
}

fn map(tree: &OwnedFd, namespace: &OwnedFd, source: &Path, recursive: bool) -> Result<()> {
    sys::mount_idmapped(tree.as_fd(), namespace.as_fd(), recursive).context(|| {
        format!(
            "idmap {} (the file system may not support it)",
            source.display()
        )
    })
}

/// Attaches a detached mount of `source` at the new `target`.
fn place(tree: &OwnedFd, source: &Path, target: &Path, transient: &mut Transient) -> Result<()> {
    if fs::metadata(source).at("read", source)?.is_dir() {
        fs::create_dir(target).at("create", target)?;
    } else {
        fs::File::create_new(target).at("create", target)?;
    }
    sys::move_mount(tree.as_fd(), target).at("mount at", target)?;
    transient.mounted.push(target.to_owned());
    Ok(())
}

/// Makes a user namespace with these mappings: a child enters a new one, we write its maps and keep it by its
/// descriptor, and the child ends.
fn user_namespace(mappings: &Mappings<'_>) -> Result<OwnedFd> {
    let (mut wait, hold) = io::pipe().context(|| "create a pipe".to_owned())?;
    let child =
        match sys::fork_into_user_namespace().context(|| "create a user namespace".to_owned())? {
            Fork::Child => {
                drop(hold);
                // Ends when the parent drops its side, or dies.
                wait.read_to_end(&mut Vec::new()).ok();
                sys::exit_now(0);
            }
            Fork::Parent(pid) => pid,
        };
    let result = write_maps(child, mappings).and_then(|()| {
        let path = PathBuf::from(format!("/proc/{child}/ns/user"));
        fs::File::open(&path).at("open", &path)
    });
    drop(hold);
    let ended = crate::process::ProcessFd::of_child(child)?;
    crate::process::wait_child(&ended)?;
    Ok(result?.into())
}

fn write_maps(child: sys::Pid, mappings: &Mappings<'_>) -> Result<()> {
    for (file, entries) in [("uid_map", mappings.uids), ("gid_map", mappings.gids)] {
        let path = PathBuf::from(format!("/proc/{child}/{file}"));
        let lines: String = entries
            .iter()
            .map(|m| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size()))
            .collect();
        // The kernel takes the whole map in one write, once.
        let mut file = fs::OpenOptions::new()
            .write(true)
            .open(&path)
            .at("open", &path)?;
        file.write_all(lines.as_bytes())
            .context(|| format!("write id mappings {:?}", lines.trim()))?;
    }
    Ok(())
}
