// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What `features` and `spec` print: the runtime-spec's "Features Structure" for this runtime, and a config.json
//! to start from. Only what was built in is claimed; whether the host has it is another question.

use atoll_container_rt::rdt;
use serde_json::{Value, json};

/// Capabilities of a container that asks for nothing special.
const DEFAULT_CAPABILITIES: [&str; 3] = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"];

/// Every namespace, as the runtime-spec names them.
const NAMESPACES: [&str; 8] = [
    "cgroup", "ipc", "mount", "network", "pid", "time", "user", "uts",
];

/// Mount options that are understood besides those of the file systems.
const MOUNT_OPTIONS: &[&str] = &[
    "async",
    "atime",
    "bind",
    "defaults",
    "dev",
    "diratime",
    "dirsync",
    "exec",
    "idmap",
    "iversion",
    "mand",
    "noatime",
    "nodev",
    "nodiratime",
    "noexec",
    "noiversion",
    "nomand",
    "norelatime",
    "nostrictatime",
    "nosuid",
    "private",
    "rbind",
    "relatime",
    "remount",
    "ridmap",
    "ro",
    "rprivate",
    "rro",
    "rrw",
    "rshared",
    "rslave",
    "runbindable",
    "rw",
    "shared",
    "slave",
    "strictatime",
    "suid",
    "sync",
    "tmpcopyup",
    "rnosuid",
    "rnodev",
    "rnoexec",
];

/// Seccomp actions that libseccomp knows.
const SECCOMP_ACTIONS: [&str; 8] = [
    "SCMP_ACT_ALLOW",
    "SCMP_ACT_ERRNO",
    "SCMP_ACT_KILL",
    "SCMP_ACT_KILL_PROCESS",
    "SCMP_ACT_KILL_THREAD",
    "SCMP_ACT_LOG",
    "SCMP_ACT_NOTIFY",
    "SCMP_ACT_TRACE",
];

/// The runtime-spec's features document.
pub(crate) fn features() -> Value {
    json!({
        "ociVersionMin": "1.0.0",
        "ociVersionMax": oci_spec::runtime::VERSION,
        "hooks": [
            "prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"
        ],
        "mountOptions": MOUNT_OPTIONS,
        "linux": {
            "namespaces": NAMESPACES,
            "cgroup": {
                "v1": true, "v2": true, "systemd": true, "systemdUser": false, "rdma": false
            },
            "seccomp": {
                "enabled": true,
                "actions": SECCOMP_ACTIONS,
                "operators": [
                    "SCMP_CMP_NE", "SCMP_CMP_LT", "SCMP_CMP_LE", "SCMP_CMP_EQ", "SCMP_CMP_GE",
                    "SCMP_CMP_GT", "SCMP_CMP_MASKED_EQ"
                ],
            },
            "apparmor": { "enabled": true },
            "selinux": { "enabled": false },
            "intelRdt": { "enabled": rdt::is_there() },
            "mountExtensions": { "idmap": { "enabled": true } },
            "netDevices": { "enabled": true },
        },
        "annotations": {
            "dev.atoll.version": env!("CARGO_PKG_VERSION"),
            // By whoever is root of a user namespace.
            "dev.atoll.rootless": "true",
            // runc's name for it, which engines look for.
            "org.opencontainers.runc.checkpoint.enabled": "true",
        },
    })
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Value {
    json!({ "destination": destination, "type": kind, "source": source, "options": options })
}

/// A config.json that runs a shell in `rootfs`, with a terminal: `run` serves it, and `create` takes it with
/// --console-socket or --monitor.
/// Without privileges the container shares the host's network and has no cgroup, and this user is its root.
pub(crate) fn default_config(rootless: bool) -> Value {
    let mut config = default();
    if rootless {
        let (uid, gid) = (
            nix::unistd::geteuid().as_raw(),
            nix::unistd::getegid().as_raw(),
        );
        let linux = &mut config["linux"];
        linux["uidMappings"] = json!([{ "containerID": 0, "hostID": uid, "size": 1 }]);
        linux["gidMappings"] = json!([{ "containerID": 0, "hostID": gid, "size": 1 }]);
        linux["resources"] = json!({});
        let kinds = ["pid", "ipc", "uts", "mount", "cgroup", "user"];
        linux["namespaces"] = kinds.iter().map(|kind| json!({ "type": kind })).collect();
        let sys = json!(["rbind", "nosuid", "noexec", "nodev", "ro"]);
        for mount in config["mounts"].as_array_mut().into_iter().flatten() {
            match mount["destination"].as_str() {
                Some("/sys") => {
                    *mount = json!({ "destination": "/sys", "type": "none", "source": "/sys", "options": sys });
                }
                // The group of terminals has no mapping.
                Some("/dev/pts") => {
                    if let Some(options) = mount["options"].as_array_mut() {
                        options.retain(|option| option != "gid=5");
                    }
                }
                _ => {}
            }
        }
    }
    config
}

fn default() -> Value {
    let mut config = with_all_namespaces();
    if !std::path::Path::new("/sys/fs/cgroup/cgroup.controllers").exists()
        && let Some(namespaces) = config["linux"]["namespaces"].as_array_mut()
    {
        // As runc: on v1 a container reads the host's paths of its cgroups.
        namespaces.retain(|namespace| namespace["type"] != "cgroup");
    }
    config
}

fn with_all_namespaces() -> Value {
    json!({
        "ociVersion": oci_spec::runtime::VERSION,
        "process": {
            "terminal": true,
            "user": { "uid": 0, "gid": 0 },
            "args": ["sh"],
            "env": [
                "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "TERM=xterm"
            ],
            "cwd": "/",
            "capabilities": {
                "bounding": DEFAULT_CAPABILITIES,
                "effective": DEFAULT_CAPABILITIES,
                "permitted": DEFAULT_CAPABILITIES,
            },
            "rlimits": [{ "type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024 }],
            "noNewPrivileges": true,
        },
        "root": { "path": "rootfs", "readonly": true },
        "hostname": "atoll",
        "mounts": [
            mount("/proc", "proc", "proc", &[]),
            mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/dev/pts", "devpts", "devpts",
                &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"]),
            mount("/dev/shm", "tmpfs", "shm",
                &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
            mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
            mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
            mount("/sys/fs/cgroup", "cgroup", "cgroup",
                &["nosuid", "noexec", "nodev", "relatime", "ro"]),
        ],
        "linux": {
            "resources": { "devices": [{ "allow": false, "access": "rwm" }] },
            "namespaces": [
                { "type": "pid" }, { "type": "network" }, { "type": "ipc" }, { "type": "uts" },
                { "type": "cgroup" }, { "type": "mount" }
            ],
            "maskedPaths": [
                "/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
                "/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware",
                "/proc/scsi"
            ],
            "readonlyPaths": [
                "/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"
            ],
        },
    })
}
