// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `checkpoint`: a container's processes become files, by CRIU; `restore` makes a container of them again. What
//! comes from outside is told to CRIU by name and not saved: mounts of the host's files, namespaces with a path, the
//! pipes of standard input and output.
//!
//! An outside mount is named by its destination in config.json. Those that the runtime has made by itself (nodes of the
//! host in a user namespace, v1 cgroups) are found by what they show: a part of a file system that the container has
//! nowhere as a whole.

use std::fs;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::fcntl::OFlag;
use oci_spec::runtime::{LinuxNamespaceType, Spec};
use rust_criu::rust_criu_protobuf::rpc;

use crate::bundle::{self, wrong};
use crate::criu::{Criu, Options};
use crate::error::{Context, Error, Result};
use crate::lifecycle::{Container, Force};
use crate::state::{Status, to_json};
use crate::sys::Pid;
use crate::tree::Tree;
use crate::{cgroup, filter, mknod, terminals};

/// Where standard input and output led, as a list of three; runc's name and form.
pub(crate) const DESCRIPTORS: &str = "descriptors.json";

/// CRIU's log, in the directory of the images or of the work.
const LOG: &str = "dump.log";

/// What to do, as `atoll-ct checkpoint` takes it.
#[derive(Debug, Clone, Default)]
pub struct Request {
    /// What a restore is told alike.
    pub options: Options,
    /// Images of an earlier `pre_dump`, relative to these.
    pub parent: Option<PathBuf>,
    /// Let the container go on.
    pub leave_running: bool,
    /// Save memory only, and let the container go on.
    pub pre_dump: bool,
    /// Give a deleted file that is still open a name again.
    pub link_remap: bool,
    /// Leave out TCP connections that are about to be made.
    pub tcp_skip_in_flight: bool,
}

/// Saves a container's processes, and deletes the container unless it is to go on. Answers the warnings of its poststop
/// hooks.
pub fn checkpoint(container: &Container, request: &Request) -> Result<Vec<String>> {
    let running = [Status::Running, Status::Paused];
    container.require(&running, "only a running container can be checkpointed")?;
    container.cgroups()?;
    let Some(init) = container.saved.init else {
        return Err(Error::NotFound {
            id: container.saved.id.clone(),
        });
    };
    let spec = container.spec()?;
    refuse(&spec)?;
    if let Some(parent) = &request.parent {
        check_parent(&request.options.images, parent)?;
    }
    if request.pre_dump || request.parent.is_some() {
        need_dirty_tracking(&request.options)?;
    }
    dump(container, &spec, init.pid, request)?;
    if request.leave_running || request.pre_dump {
        return Ok(Vec::new());
    }
    container.delete(Force::Yes)
}

/// What the monitor holds for a container cannot be given back to it.
fn refuse(spec: &Spec) -> Result<()> {
    let reason = "this container cannot be checkpointed: its monitor holds a part of it";
    if terminals::wanted(spec)? > 0 {
        return Err(wrong(
            &format!("annotations[{}]", terminals::ANNOTATION),
            reason,
        ));
    }
    let linux = spec.linux().as_ref();
    let profile = linux.and_then(|linux| linux.seccomp().as_ref());
    if mknod::is_wanted(spec) || profile.is_some_and(filter::asks) {
        return Err(wrong("linux.seccomp, SCMP_ACT_NOTIFY", reason));
    }
    Ok(())
}

fn check_parent(images: &Path, parent: &Path) -> Result<()> {
    let refused = |reason: &str| {
        let parent = parent.display();
        Err(Error::Argument(format!("--parent-path {parent}: {reason}")))
    };
    if parent.is_absolute() {
        return refused("must be relative to --image-path");
    }
    if !images.join(parent).is_dir() {
        return refused("there is no such directory below --image-path");
    }
    Ok(())
}

/// Images that build on others need to know what was written to in between.
fn need_dirty_tracking(options: &Options) -> Result<()> {
    let mut request = rpc::Criu_req::new();
    request.set_type(rpc::Criu_req_type::FEATURE_CHECK);
    let mut features = rpc::Criu_features::new();
    features.set_mem_track(true);
    request.features = protobuf::MessageField::some(features);
    let answer =
        Criu::start(&options.program, None)?.ask(&request, Path::new(""), |_, _| Ok(()))?;
    if answer.features.mem_track() {
        return Ok(());
    }
    Err(Error::Argument(
        "--pre-dump and --parent-path: this kernel does not track dirty memory \
         (CONFIG_MEM_SOFT_DIRTY): make one whole checkpoint"
            .to_owned(),
    ))
}

fn dump(container: &Container, spec: &Spec, init: Pid, request: &Request) -> Result<()> {
    let options = &request.options;
    let (images, work) = options.open_directories()?;
    let mut told = options.request(spec, LOG);
    told.set_images_dir_fd(images.as_raw_fd());
    if let Some(work) = &work {
        told.set_work_dir_fd(work.as_raw_fd());
    }
    told.set_pid(init);
    told.set_root(text(&container.saved.rootfs)?);
    told.set_leave_running(request.leave_running);
    told.set_link_remap(request.link_remap);
    told.set_tcp_skip_in_flight(request.tcp_skip_in_flight);
    if let Some(freezer) = cgroup::freezer_directory(&container.saved.cgroups) {
        told.set_freeze_cgroup(text(&freezer)?);
    }
    if let Some(parent) = &request.parent {
        told.set_parent_img(text(parent)?);
        told.set_track_mem(true);
    }
    for (kind, path) in outside_namespaces(spec) {
        let inode = fs::metadata(path).at("find namespace", path)?.ino();
        let key = namespace_key(kind);
        told.external.push(format!("{kind}[{inode}]:{key}"));
    }
    let mut message = rpc::Criu_req::new();
    message.set_type(rpc::Criu_req_type::DUMP);
    if request.pre_dump {
        message.set_type(rpc::Criu_req_type::PRE_DUMP);
    } else {
        told.ext_mnt = outside_mounts(spec, init)?;
        let path = options.images.join(DESCRIPTORS);
        fs::write(&path, to_json(&descriptors(init))?).at("write", &path)?;
    }
    message.opts = protobuf::MessageField::some(told);
    let log = options.log(LOG);
    fs::remove_file(&log).ok();
    Criu::start(&options.program, None)?
        .ask(&message, &log, |_, _| Ok(()))
        .map(drop)
}

/// A path for CRIU, whose messages are UTF-8.
pub(crate) fn text(path: &Path) -> Result<String> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| Error::Argument(format!("{}: the path is not UTF-8", path.display())))
}

/// Where the init's first descriptors lead.
fn descriptors(init: Pid) -> Vec<String> {
    let target = |number: u8| fs::read_link(format!("/proc/{init}/fd/{number}"));
    let shown = |number| target(number).map(|path| path.display().to_string());
    (0..3)
        .map(|number| shown(number).unwrap_or_else(|_| "/dev/null".to_owned()))
        .collect()
}

/// The namespaces of config.json that exist without the container and that CRIU can leave alone.
pub(crate) fn outside_namespaces(spec: &Spec) -> Vec<(&'static str, &Path)> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_deref());
    let outside = all.unwrap_or_default().iter().filter_map(|namespace| {
        let kind = match namespace.typ() {
            LinuxNamespaceType::Network => "net",
            LinuxNamespaceType::Pid => "pid",
            _ => return None,
        };
        Some((kind, namespace.path().as_deref()?))
    });
    outside.collect()
}

/// What CRIU calls such a namespace in the images; runc's names.
pub(crate) fn namespace_key(kind: &str) -> &'static str {
    match kind {
        "net" => "extRootNetNS",
        _ => "extRootPidNS",
    }
}

/// Whether the container has a cgroup namespace, in which cgroups are mounted and not bound.
pub(crate) fn has_cgroup_namespace(spec: &Spec) -> bool {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_deref());
    let mut all = all.unwrap_or_default().iter();
    all.any(|namespace| namespace.typ() == LinuxNamespaceType::Cgroup)
}

/// A mount as proc(5), /proc/PID/mountinfo, describes it.
#[derive(Debug, PartialEq, Eq)]
struct Mounted {
    device: String,
    root: PathBuf,
    place: PathBuf,
    file_system: String,
}

/// The mounts of a process, in their order.
fn parse_mounts(mountinfo: &str) -> Vec<Mounted> {
    let one = |line: &str| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(2);
        Some(Mounted {
            device: fields.next()?.to_owned(),
            root: unescape(fields.next()?),
            place: unescape(fields.next()?),
            file_system: after.split(' ').next()?.to_owned(),
        })
    };
    mountinfo.lines().filter_map(one).collect()
}

/// Space, tab, newline and backslash are three octal digits after a backslash.
fn unescape(text: &str) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|d| std::str::from_utf8(d).ok());
        let code = digits.and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code.filter(|_| *first == b'\\') {
            Some(code) => {
                bytes.push(code);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// The mounts that CRIU is not to save, each with its name.
fn outside_mounts(spec: &Spec, init: Pid) -> Result<Vec<rpc::Ext_mount_map>> {
    let path = PathBuf::from(format!("/proc/{init}/mountinfo"));
    let mounted = parse_mounts(&fs::read_to_string(&path).at("read", &path)?);
    let tree = PathBuf::from(format!("/proc/{init}/root"));
    let tree = Tree::below(&tree).at("open", &tree)?;
    let mut found = Vec::new();
    for mount in spec.mounts().iter().flatten().filter(|m| bundle::binds(m)) {
        // A link in the image may have led elsewhere.
        let Ok(place) = tree.open(mount.destination(), OFlag::O_PATH) else {
            continue;
        };
        found.push((shown_path(place.as_fd())?, mount.destination().clone()));
    }
    for mount in &mounted {
        let known = found.iter().any(|(place, _)| place == &mount.place);
        if !known && is_outside(mount, &mounted, has_cgroup_namespace(spec)) {
            found.push((mount.place.clone(), mount.place.clone()));
        }
    }
    found
        .iter()
        .map(|(place, name)| pair(place, name))
        .collect()
}

/// A line of CRIU's table of outside mounts.
pub(crate) fn pair(key: &Path, value: &Path) -> Result<rpc::Ext_mount_map> {
    let mut pair = rpc::Ext_mount_map::new();
    pair.set_key(text(key)?);
    pair.set_val(text(value)?);
    Ok(pair)
}

/// Where a descriptor is in its own mount namespace.
fn shown_path(fd: impl AsFd) -> Result<PathBuf> {
    let link = format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd());
    fs::read_link(&link).at("read", Path::new(&link))
}

/// Whether a mount shows a part of a file system that the container has nowhere as a whole.
fn is_outside(mount: &Mounted, all: &[Mounted], cgroup_namespace: bool) -> bool {
    let whole = Path::new("/");
    if mount.place == whole || mount.root == whole {
        return false;
    }
    if mount.file_system.starts_with("cgroup") && cgroup_namespace {
        return false;
    }
    let contains = |other: &&Mounted| {
        other.device == mount.device
            && other.place != mount.place
            && mount.root.starts_with(&other.root)
            && mount.root != other.root
    };
    !all.iter().any(|other| contains(&other))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mounts_that_show_a_part_of_something_else_are_outside() {
        let text = "\
            70 60 8:1 /images/root / rw - ext4 /dev/sda rw\n\
            71 70 0:30 / /proc rw - proc proc rw\n\
            72 71 0:30 /sys /proc/sys ro - proc proc rw\n\
            73 70 0:31 / /dev rw - tmpfs tmpfs rw\n\
            74 71 0:31 /null /proc/keys rw - tmpfs tmpfs rw\n\
            75 73 0:6 /zero /dev/zero rw - devtmpfs udev rw\n\
            76 70 8:1 /data/a\\040b /my\\134data rw - ext4 /dev/sda rw\n\
            77 70 8:1 /images/root/srv /copy rw - ext4 /dev/sda rw\n\
            78 70 0:40 /group /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n";
        let all = parse_mounts(text);
        assert_eq!(all.len(), 9);
        assert_eq!(all[6].root, Path::new("/data/a b"));
        let outside = |namespace| -> Vec<&str> {
            let found = all.iter().filter(|m| is_outside(m, &all, namespace));
            found.map(|m| m.place.to_str().unwrap()).collect()
        };
        assert_eq!(outside(true), ["/dev/zero", r"/my\data"]);
        let bound = ["/dev/zero", r"/my\data", "/sys/fs/cgroup/cpu"];
        assert_eq!(outside(false), bound);
    }
}
