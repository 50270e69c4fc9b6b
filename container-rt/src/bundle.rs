// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Reading a bundle's config.json and making it definite: what is wrong is refused here, with the setting's
//! name, before anything is created; what is left open gets our default. Not here: idmapped mounts (`idmap`).

use std::fs;
use std::io::Write;
use std::path::{Component, Path, PathBuf};

use libcontainer::syscall::syscall::create_syscall;
use libcontainer::{utils, validator::Validator};
use oci_spec::runtime::{
    Capabilities, Capability, Hook, Hooks, LinuxCapabilities, LinuxDeviceCgroup,
    LinuxDeviceCgroupBuilder, LinuxDeviceType, LinuxNamespaceType, LinuxResources,
    LinuxSeccompAction, Mount, Process, Spec,
};
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::apparmor;
use crate::cgroup::Owner;
use crate::create::{CgroupBy, Request};
use crate::error::{Context, Error, Result};
use crate::{filter, mknod, rdt, rootless};

/// Below this every container without a `linux.cgroupsPath` gets its cgroup, under its id.
const DEFAULT_CGROUP: &str = "/atoll-ct";

/// A bundle, read and checked.
#[derive(Debug)]
pub struct Bundle {
    /// Absolute path.
    pub path: PathBuf,
    /// Absolute path of the root file system.
    pub rootfs: PathBuf,
    /// config.json, with our defaults filled in.
    pub spec: Spec,
    /// config.json as it was read.
    pub text: Vec<u8>,
}

/// An error about one setting.
pub(crate) fn wrong(field: &str, reason: impl Into<String>) -> Error {
    Error::Config {
        field: field.to_owned(),
        reason: reason.into(),
    }
}

/// Reads and checks the bundle of a container to be created.
pub fn load(request: &Request) -> Result<Bundle> {
    let path = fs::canonicalize(&request.bundle).at("find the bundle", &request.bundle)?;
    let file = match &request.config {
        Some(file) => path.join(file),
        None => path.join("config.json"),
    };
    let text = fs::read(&file).at("read", &file)?;
    let mut spec = parse(&text, &file)?;
    rootless::settle_ids(&mut spec)?;
    check(&spec)?;
    let root = spec
        .root()
        .as_ref()
        .ok_or_else(|| wrong("root", "is missing"))?;
    let rootfs = path.join(root.path());
    let rootfs = fs::canonicalize(&rootfs).at("find root.path", &rootfs)?;
    if !rootfs.is_dir() {
        return Err(wrong(
            "root.path",
            format!("{} is no directory", rootfs.display()),
        ));
    }
    settle(&mut spec, request, &path)?;
    Ok(Bundle {
        path,
        rootfs,
        spec,
        text,
    })
}

/// Parses config.json, or the copy of it that a container keeps. Capabilities that this version does not know are
/// left out, as the runtime-spec ("Process", capabilities) asks for those that cannot be granted.
pub fn parse(text: &[u8], file: &Path) -> Result<Spec> {
    parse_lenient(text, &["process"]).map_err(|source| Error::Json {
        what: file.display().to_string(),
        source,
    })
}

/// Parses a document of the runtime-spec whose process is `at` a place. The type has no room for unknown names of
/// capabilities, and none for a process without a user, who is root: both are set right before a second try.
pub(crate) fn parse_lenient<T: DeserializeOwned>(
    text: &[u8],
    at: &[&str],
) -> serde_json::Result<T> {
    serde_json::from_slice(text).or_else(|error| {
        let mut document: Value = serde_json::from_slice(text)?;
        let process = at
            .iter()
            .try_fold(&mut document, |value, name| value.get_mut(name));
        let Some(Value::Object(process)) = process else {
            return Err(error);
        };
        let root = || json!({ "uid": 0, "gid": 0 });
        process.entry("user").or_insert_with(root);
        let sets = process
            .get_mut("capabilities")
            .and_then(Value::as_object_mut);
        let sets = sets.into_iter().flat_map(serde_json::Map::values_mut);
        for names in sets.filter_map(Value::as_array_mut) {
            names.retain(is_capability);
        }
        serde_json::from_value(document)
    })
}

/// Whether a JSON string names a capability.
fn is_capability(name: &Value) -> bool {
    let known = serde_json::from_value::<Capability>(name.clone()).is_ok();
    if !known {
        warn(&format!("capability {name} is unknown and left out"));
    }
    known
}

/// Tells the caller about something that does not keep the operation from going on.
pub(crate) fn warn(text: &str) {
    // A caller without standard error does not want to know.
    writeln!(std::io::stderr(), "atoll-ct: warning: {text}").ok();
}

/// Refuses what cannot work. libcontainer's own checks come last: theirs name no setting.
fn check(spec: &Spec) -> Result<()> {
    if !spec.version().starts_with("1.") {
        return Err(wrong(
            "ociVersion",
            format!("{:?}: 1.x is supported", spec.version()),
        ));
    }
    let process = spec
        .process()
        .as_ref()
        .ok_or_else(|| wrong("process", "is missing"))?;
    if process.args().as_deref().unwrap_or_default().is_empty() {
        return Err(wrong(
            "process.args",
            "is empty: name the program to execute",
        ));
    }
    if !process.cwd().is_absolute() {
        return Err(wrong(
            "process.cwd",
            format!("{} is not absolute", process.cwd().display()),
        ));
    }
    let given = |label: &Option<String>| label.as_ref().is_some_and(|label| !label.is_empty());
    let linux = spec.linux().as_ref();
    let refused = [
        (
            given(process.selinux_label()),
            "process.selinuxLabel",
            "SELinux",
        ),
        (
            linux.is_some_and(|linux| given(linux.mount_label())),
            "linux.mountLabel",
            "SELinux",
        ),
    ];
    if let Some((_, field, what)) = refused.into_iter().find(|(asked, ..)| *asked) {
        return Err(wrong(
            field,
            format!("{what} is not supported: leave it out"),
        ));
    }
    for mount in spec.mounts().as_deref().unwrap_or_default() {
        if !mount.destination().is_absolute() {
            let destination = mount.destination().display();
            return Err(wrong(
                "mounts",
                format!("destination {destination} is not absolute"),
            ));
        }
    }
    check_linux(spec)?;
    rdt::check(spec)?;
    check_seccomp(spec)?;
    check_by_libcontainer(spec)
}

fn check_linux(spec: &Spec) -> Result<()> {
    let linux = spec
        .linux()
        .as_ref()
        .ok_or_else(|| wrong("linux", "is missing"))?;
    let empty = |list: &Option<Vec<_>>| list.as_ref().is_none_or(Vec::is_empty);
    if has_own(spec, LinuxNamespaceType::User)
        && (empty(linux.uid_mappings()) || empty(linux.gid_mappings()))
    {
        let reason = "a new user namespace needs both";
        return Err(wrong("linux.uidMappings, linux.gidMappings", reason));
    }
    Ok(())
}

/// What would be found out in the middle.
fn check_seccomp(spec: &Spec) -> Result<()> {
    let linux = spec.linux().as_ref();
    let Some(profile) = linux.and_then(|linux| linux.seccomp().as_ref()) else {
        return Ok(());
    };
    let field = "linux.seccomp";
    if profile.default_action() == LinuxSeccompAction::ScmpActNotify {
        let reason = "SCMP_ACT_NOTIFY cannot be used as default action";
        return Err(wrong(field, reason));
    }
    if !filter::asks(profile) {
        return Ok(());
    }
    let rules = profile.syscalls().iter().flatten();
    let mut notified = rules.filter(|r| r.action() == LinuxSeccompAction::ScmpActNotify);
    if notified.any(|rule| rule.names().iter().any(|name| name == "write")) {
        // The runtime itself writes, to tell about the listener.
        return Err(wrong(
            field,
            "SCMP_ACT_NOTIFY cannot be used for the write syscall",
        ));
    }
    match profile.listener_path() {
        Some(path) if path.exists() || mknod::is_wanted(spec) => Ok(()),
        Some(path) => {
            let path = path.display();
            Err(wrong(
                field,
                format!("failed to connect with seccomp agent at {path}: it does not exist"),
            ))
        }
        None => Err(wrong(field, "SCMP_ACT_NOTIFY needs a listenerPath")),
    }
}

fn check_by_libcontainer(spec: &Spec) -> Result<()> {
    let invalid = |reason: String| Error::Init(reason);
    let syscall = create_syscall();
    Validator::validate_spec(spec).map_err(|e| invalid(e.to_string()))?;
    utils::validate_spec_for_net_devices(spec, &*syscall).map_err(|e| invalid(e.to_string()))?;
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    utils::validate_mount_options(mounts).map_err(|e| invalid(e.to_string()))
}

/// Fills in what config.json leaves open and the runtime must decide.
fn settle(spec: &mut Spec, request: &Request, folder: &Path) -> Result<()> {
    let mut mounts = spec.mounts().clone().unwrap_or_default();
    for mount in &mut mounts {
        // Kernel file systems need none, but libcontainer does.
        if mount.source().is_none() {
            mount.set_source(mount.typ().clone().map(PathBuf::from));
        }
        let bind = binds(mount);
        // The runtime-spec: "Config", mounts: relative to the bundle, not to where the caller happens to be.
        let source = mount.source().as_ref().filter(|_| bind);
        if let Some(relative) = source.filter(|source| source.is_relative()) {
            mount.set_source(Some(folder.join(relative)));
        }
    }
    spec.set_mounts(Some(mounts));
    inherit_environment(spec);
    if let Some(mut process) = spec.process().clone() {
        close_capabilities(&mut process);
        apparmor::settle(&mut process)?;
        if process.no_new_privileges() == Some(false) {
            // libcontainer takes "given" for "true" when it chooses the moment to load the seccomp filter.
            process.set_no_new_privileges(None);
        }
        spec.set_process(Some(process));
    }
    let Some(mut linux) = spec.linux().clone() else {
        return Ok(());
    };
    let path = linux
        .cgroups_path()
        .clone()
        .filter(|p| !p.as_os_str().is_empty());
    let id = &request.id;
    let path = path.unwrap_or_else(|| match request.cgroup_by {
        CgroupBy::Systemd => format!(":atoll-ct:{id}").into(),
        CgroupBy::Us | CgroupBy::Nobody => Path::new(DEFAULT_CGROUP).join(id),
    });
    linux.set_cgroups_path(Some(path));
    // libcontainer always applies it to everything below, and knows only the names without the r for that.
    let propagation = linux.rootfs_propagation().clone().filter(|p| !p.is_empty());
    let propagation = propagation.map(|p| match p.as_str() {
        "rprivate" | "rshared" | "rslave" | "runbindable" => p[1..].to_owned(),
        _ => p,
    });
    linux.set_rootfs_propagation(propagation);
    let mut resources = linux.resources().clone().unwrap_or_default();
    close_devices(&mut resources);
    linux.set_resources(Some(resources));
    spec.set_linux(Some(linux));
    Ok(())
}

/// Whether a mount of config.json shows a directory or file of the host.
pub(crate) fn binds(mount: &Mount) -> bool {
    let bind = |option: &String| option == "bind" || option == "rbind";
    mount.typ().as_deref() == Some("bind") || mount.options().iter().flatten().any(bind)
}

/// One kind of hooks.
type Hooked = fn(&mut Hooks) -> &mut Option<Vec<Hook>>;

/// Hooks in the host that name no environment get ours, as under runc and crun. Later ones get it in `hooks`.
fn inherit_environment(spec: &mut Spec) {
    let Some(mut hooks) = spec.hooks().clone() else {
        return;
    };
    let own: Vec<String> = std::env::vars()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    for list in [Hooks::prestart_mut, Hooks::create_runtime_mut as Hooked] {
        for hook in list(&mut hooks)
            .iter_mut()
            .flatten()
            .filter(|hook| hook.env().is_none())
        {
            hook.set_env(Some(own.clone()));
        }
    }
    spec.set_hooks(Some(hooks));
}

/// Makes every capability set definite: one that config.json leaves out is empty. libcontainer would leave it as
/// it is, with everything that this process may do.
pub(crate) fn close_capabilities(process: &mut Process) {
    let mut sets = LinuxCapabilities::default();
    let given = process.capabilities().as_ref();
    let set = |get: fn(&LinuxCapabilities) -> &Option<Capabilities>| {
        Some(given.and_then(|sets| get(sets).clone()).unwrap_or_default())
    };
    sets.set_bounding(set(LinuxCapabilities::bounding));
    sets.set_effective(set(LinuxCapabilities::effective));
    sets.set_permitted(set(LinuxCapabilities::permitted));
    sets.set_inheritable(set(LinuxCapabilities::inheritable));
    sets.set_ambient(set(LinuxCapabilities::ambient));
    process.set_capabilities(Some(sets));
}

/// The path of a cgroup as all hierarchies have it: absolute, without dots, and never a hierarchy's root, which
/// has the whole host in it.
pub fn cgroup_path(path: &Path) -> Result<PathBuf> {
    let mut absolute = PathBuf::from("/");
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) => absolute.push(name),
            Component::ParentDir | Component::Prefix(_) => {
                return Err(wrong(
                    "linux.cgroupsPath",
                    format!("{} has ..", path.display()),
                ));
            }
        }
    }
    if absolute.parent().is_none() {
        return Err(wrong(
            "linux.cgroupsPath",
            "is a hierarchy's root: name a cgroup",
        ));
    }
    Ok(absolute)
}

/// Makes the device list begin with "deny all", as every list means it: a bundle without one must not give the
/// host's devices away.
fn close_devices(resources: &mut LinuxResources) {
    let mut list = resources.devices().clone().unwrap_or_default();
    for rule in &mut list {
        // Engines write -1 for "any"; the v1 files take only a star for it.
        rule.set_major(rule.major().filter(|n| *n >= 0));
        rule.set_minor(rule.minor().filter(|n| *n >= 0));
    }
    let denies_all = |rule: &LinuxDeviceCgroup| {
        !rule.allow()
            && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
            && rule.major().is_none()
            && rule.minor().is_none()
    };
    if !list.first().is_some_and(denies_all) {
        let builder = LinuxDeviceCgroupBuilder::default()
            .allow(false)
            .typ(LinuxDeviceType::A);
        let rule = builder
            .access("rwm")
            .build()
            .expect("a rule needs no other field");
        list.insert(0, rule);
    } else if let Some(first) = list.first_mut() {
        first.set_typ(Some(LinuxDeviceType::A));
    }
    resources.set_devices(Some(list));
}

/// Whether the container gets a new namespace of a kind, not one that is there already.
pub(crate) fn has_own(spec: &Spec, kind: LinuxNamespaceType) -> bool {
    let linux = spec.linux().as_ref();
    let namespaces = linux.and_then(|linux| linux.namespaces().as_deref());
    let mut all = namespaces.into_iter().flatten();
    all.any(|n| n.typ() == kind && n.path().is_none())
}

/// The host ids of the container's root, when it has its own user namespace.
pub fn owner(spec: &Spec) -> Option<Owner> {
    let linux = spec.linux().as_ref()?;
    if !has_own(spec, LinuxNamespaceType::User) {
        return None;
    }
    let uids = linux.uid_mappings().as_deref()?.iter();
    let gids = linux.gid_mappings().as_deref()?.iter();
    Some(Owner {
        uid: uids.into_iter().find(|m| m.container_id() == 0)?.host_id(),
        gid: gids.into_iter().find(|m| m.container_id() == 0)?.host_id(),
    })
}

/// Whether the container's program gets a terminal.
pub fn has_terminal(spec: &Spec) -> bool {
    spec.process()
        .as_ref()
        .and_then(oci_spec::runtime::Process::terminal)
        .unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup_paths() {
        let path = |text: &str| cgroup_path(Path::new(text)).map(|p| p.display().to_string());
        assert_eq!(path("/a/b").unwrap(), "/a/b");
        assert_eq!(path("a").unwrap(), "/a");
        assert!(path("/").is_err());
        assert!(path("").is_err());
        assert!(path("/a/../..").is_err());
    }

    #[test]
    fn device_lists_begin_closed() {
        let mut resources = LinuxResources::default();
        close_devices(&mut resources);
        assert!(!resources.devices().as_ref().unwrap()[0].allow());
        let before = resources.clone();
        close_devices(&mut resources);
        assert_eq!(resources, before, "closing twice changes nothing");
    }
}
