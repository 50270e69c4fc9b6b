// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `restore`: a container whose processes come from the images of a `checkpoint`. It is created like any other
//! (`create`), but CRIU takes libcontainer's place: it makes the namespaces, the mounts and the processes. Its own
//! process is moved into the container's cgroup first, and so is everything that it makes; the init becomes our child.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};

use nix::unistd::dup;
use oci_spec::runtime::{LinuxNamespaceType, Mount, Spec};
use rust_criu::rust_criu_protobuf::rpc;

use crate::bundle::{self, wrong};
use crate::cgroup::{self, Owner, Prepared};
use crate::checkpoint::{
    DESCRIPTORS, has_cgroup_namespace, namespace_key, outside_namespaces, pair, text,
};
use crate::criu::{Criu, Options};
use crate::error::{Context, Error, Result};
use crate::idmap::{Source, Transient, attach};
use crate::mounts::act_as;
use crate::state::Saved;
use crate::sys::Pid;
use crate::tree::Tree;
use crate::{hooks, terminal};

/// CRIU's log, in the directory of the images or of the work.
const LOG: &str = "restore.log";

/// What a restore is told beyond what a checkpoint is.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// The images, and how they were made.
    pub options: Options,
    /// Another profile than the one in the images, as in `apparmor:NAME`.
    pub lsm_profile: Option<String>,
}

/// The container to restore, as `create` has prepared it.
pub(crate) struct Scene<'a> {
    pub(crate) request: &'a Request,
    pub(crate) spec: &'a Spec,
    pub(crate) saved: &'a Saved,
    pub(crate) cgroup: &'a Prepared,
    /// What [`prepare`] answered.
    pub(crate) root: &'a Path,
    /// Who takes the terminal.
    pub(crate) terminal: Option<&'a OwnedFd>,
    /// Standard input, output and error, if not ours.
    pub(crate) stdio: Option<&'a [OwnedFd; 3]>,
}

/// Makes the mount points that the container has and a new copy of its image may lack. Answers the root file system as a
/// mount of its own, which CRIU wants it to be.
pub(crate) fn prepare(
    request: &Request,
    spec: &Spec,
    rootfs: &Path,
    transient: &mut Transient,
) -> Result<PathBuf> {
    let images = &request.options.images;
    if !images.is_dir() {
        let images = images.display();
        return Err(Error::Argument(format!(
            "--image-path {images}: there is no such directory"
        )));
    }
    let owner = bundle::owner(spec);
    if let Some(owner) = owner {
        share(images, owner.gid)?;
    }
    act_as(owner);
    let made = make_mount_points(spec, rootfs);
    act_as(owner.and(Some(Owner { uid: 0, gid: 0 })));
    made?;
    let root = transient.directory(owner)?.join("restored");
    let source = Source {
        path: rootfs,
        recursive: true,
    };
    attach(&source, None, &root, transient)?;
    Ok(root)
}

/// Lets the container's root, whose group is `gid`, read the images: processes do so when they are in their user
/// namespace already, but before they are anybody there also as the host's root.
fn share(images: &Path, gid: u32) -> Result<()> {
    let open = |path: &Path, bits: u32| {
        let metadata = fs::symlink_metadata(path)?;
        if metadata.is_symlink() {
            return Ok(());
        }
        chown(path, None, Some(gid))?;
        let mode = metadata.mode() & 0o7777 | bits;
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
    };
    open(images, 0o010).at("give the container's root", images)?;
    for entry in fs::read_dir(images).at("read", images)? {
        let path = entry.at("read", images)?.path();
        open(&path, 0o040).at("give the container's root", &path)?;
    }
    Ok(())
}

fn make_mount_points(spec: &Spec, rootfs: &Path) -> Result<()> {
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    for (index, mount) in mounts.iter().enumerate() {
        let covers = |earlier: &&Mount| {
            let place = earlier.destination();
            mount.destination().starts_with(place) && mount.destination() != place
        };
        let (base, path) = match mounts[..index].iter().rfind(covers) {
            // What is in other file systems comes from the images, or from the kernel.
            Some(earlier) if !bundle::binds(earlier) => continue,
            Some(earlier) => {
                let rest = mount.destination().strip_prefix(earlier.destination());
                (source(earlier), rest.unwrap_or(mount.destination()))
            }
            None => (rootfs, mount.destination().as_path()),
        };
        let is_folder = !bundle::binds(mount) || source(mount).is_dir();
        let tree = Tree::below(base).at("open", base)?;
        tree.make(path, is_folder).at("make mount point", path)?;
    }
    Ok(())
}

fn source(mount: &Mount) -> &Path {
    mount.source().as_deref().unwrap_or(Path::new(""))
}

/// Has CRIU restore the container. Answers the process id of its init, which is our child.
pub(crate) fn restore(scene: &Scene<'_>) -> Result<Pid> {
    let options = &scene.request.options;
    let spec = scene.spec;
    let (images, work) = options.open_directories()?;
    let mut told = options.request(spec, LOG);
    told.set_images_dir_fd(images.as_raw_fd());
    if let Some(work) = &work {
        told.set_work_dir_fd(work.as_raw_fd());
    }
    told.set_root(text(scene.root)?);
    told.set_rst_sibling(true);
    told.set_evasive_devices(true);
    if let Some(profile) = &scene.request.lsm_profile {
        told.set_lsm_profile(profile.clone());
    }
    told.ext_mnt = outside_mounts(scene)?;
    // Under these numbers CRIU has them, too.
    let mut passed = Vec::new();
    join_namespaces(spec, &mut told, &mut passed)?;
    pass_stdio(scene, &mut told, &mut passed)?;
    let stdin = scene.stdio.map(|[stdin, ..]| stdin.as_fd());
    let criu = Criu::start(&options.program, stdin)?;
    drop(passed);
    let linux = spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().clone());
    let resources = resources.unwrap_or_default();
    scene.cgroup.take(&scene.saved.id, criu.pid(), &resources)?;
    told.cg_root = cgroup::paths_of(criu.pid())?
        .into_iter()
        .map(|(controller, path)| {
            let mut root = rpc::Cgroup_root::new();
            root.set_ctrl(controller);
            root.set_path(path);
            root
        })
        .collect();
    let mut message = rpc::Criu_req::new();
    message.set_type(rpc::Criu_req_type::RESTORE);
    message.opts = protobuf::MessageField::some(told);
    let log = options.log(LOG);
    fs::remove_file(&log).ok();
    let answer = criu.ask(&message, &log, |stage, fd| {
        match (stage.script(), fd, scene.terminal) {
            ("setup-namespaces", ..) => hooks::before_mounts(spec, scene.saved, stage.pid()),
            ("orphan-pts-master", Some(pty), Some(socket)) => {
                terminal::send_fd(socket.as_fd(), pty.as_fd())
                    .context(|| "hand over the terminal".to_owned())
            }
            _ => Ok(()),
        }
    })?;
    Ok(answer.restore.pid())
}

/// Everything that `checkpoint` may have given a name, and where it is now. CRIU takes what it needs.
fn outside_mounts(scene: &Scene<'_>) -> Result<Vec<rpc::Ext_mount_map>> {
    let spec = scene.spec;
    let mut found = Vec::new();
    for mount in spec.mounts().iter().flatten() {
        if bundle::binds(mount) {
            found.push(pair(mount.destination(), source(mount))?);
        } else if mount.typ().as_deref() == Some("cgroup") && !has_cgroup_namespace(spec) {
            for (name, directory) in scene.cgroup.by_mount()? {
                found.push(pair(&mount.destination().join(name), &directory)?);
            }
        }
    }
    let linux = spec.linux().as_ref();
    let null = Path::new("/dev/null");
    for masked in linux
        .and_then(|linux| linux.masked_paths().as_deref())
        .unwrap_or_default()
    {
        found.push(pair(Path::new(masked), null)?);
    }
    // Nobody makes nodes in a user namespace, so these are the host's.
    for name in ["null", "zero", "full", "random", "urandom", "tty"] {
        let path = Path::new("/dev").join(name);
        found.push(pair(&path, &path)?);
    }
    Ok(found)
}

/// Namespaces with a path in config.json.
fn join_namespaces(
    spec: &Spec,
    told: &mut rpc::Criu_opts,
    passed: &mut Vec<OwnedFd>,
) -> Result<()> {
    for (kind, path) in outside_namespaces(spec) {
        let namespace = fs::File::open(path).at("open namespace", path)?;
        told.inherit_fd
            .push(pass(namespace_key(kind), namespace.as_fd(), passed)?);
    }
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_deref());
    for namespace in all.unwrap_or_default() {
        let Some(path) = namespace.path() else {
            continue;
        };
        let kind = match namespace.typ() {
            LinuxNamespaceType::Network | LinuxNamespaceType::Pid => continue,
            LinuxNamespaceType::Ipc => "ipc",
            LinuxNamespaceType::Mount => "mnt",
            LinuxNamespaceType::User => "user",
            LinuxNamespaceType::Uts => "uts",
            LinuxNamespaceType::Time => "time",
            LinuxNamespaceType::Cgroup => {
                let reason = "criu cannot join a cgroup namespace: leave out its path";
                return Err(wrong("linux.namespaces", reason));
            }
        };
        let mut join = rpc::Join_namespace::new();
        join.set_ns(kind.to_owned());
        join.set_ns_file(text(path)?);
        told.join_ns.push(join);
    }
    Ok(())
}

/// The pipes that were standard input and output are now ours.
fn pass_stdio(
    scene: &Scene<'_>,
    told: &mut rpc::Criu_opts,
    passed: &mut Vec<OwnedFd>,
) -> Result<()> {
    let path = scene.request.options.images.join(DESCRIPTORS);
    let bytes = fs::read(&path).at("read", &path)?;
    let before: Vec<String> = serde_json::from_slice(&bytes).map_err(|source| Error::Json {
        what: path.display().to_string(),
        source,
    })?;
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    let now: [BorrowedFd<'_>; 3] = match scene.stdio {
        Some(stdio) => stdio.each_ref().map(AsFd::as_fd),
        None => [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()],
    };
    for (target, fd) in before.iter().zip(now) {
        if target.starts_with("pipe:") {
            told.inherit_fd.push(pass(target, fd, passed)?);
        }
    }
    Ok(())
}

/// Lets CRIU have a descriptor for what it calls `key`.
fn pass(key: &str, fd: BorrowedFd<'_>, passed: &mut Vec<OwnedFd>) -> Result<rpc::Inherit_fd> {
    let duplicate = dup(fd).context(|| "duplicate a descriptor".to_owned())?;
    let mut inherited = rpc::Inherit_fd::new();
    inherited.set_key(key.to_owned());
    inherited.set_fd(duplicate.as_raw_fd());
    passed.push(duplicate);
    Ok(inherited)
}
