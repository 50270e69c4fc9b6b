// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The table of raw keys: those that PVE lets through, with what each does here.

use serde_json::{Value, json};

use super::{Draft, Line, capabilities, mounts, words};

/// What a key does.
pub(super) enum Effect {
    /// It changes the bundle.
    Sets(fn(&mut Draft<'_>, &Line<'_>) -> Result<(), String>),
    /// Nothing; the text says why.
    None(&'static str),
    /// It cannot be followed, and silence would mislead; the text says what to do instead.
    Refused(&'static str),
    /// A map of ids, which is read before.
    Maps,
}

use Effect::{Maps, None, Refused, Sets};

const OWN_CONSOLE: &str = "the keys console and tty say that; the runtime's monitor serves them";
const OWN_LOG: &str = "the runtime's log is kept with the container's state";
const OWN_START: &str = "onboot and startup decide that";
const NO_PROFILE: &str = "there is no generated AppArmor profile to change";
const HOST_HOOKS: &str = "use lxc.hook.pre-start, start-host, start or post-stop, or a hookscript";
const OWN_NAMESPACES: &str = "each container has namespaces of its own";
const OWN_ROOT: &str = "the key rootfs says where the root file system is";

/// By name, a family's ending in a star. Names before liblxc 2.1 are those of configs that were never touched since.
pub(super) static KEYS: &[(&str, Effect)] = &[
    ("lxc.idmap", Maps),
    ("lxc.id_map", Maps),
    (mounts::ENTRY, Sets(mounts::entry)),
    ("lxc.mount.auto", Sets(mounts::auto)),
    (
        "lxc.mount.fstab",
        Refused("write its lines as lxc.mount.entry"),
    ),
    ("lxc.mount", Refused("write its lines as lxc.mount.entry")),
    ("lxc.cgroup2.devices.*", Sets(device_rule)),
    ("lxc.cgroup.devices.*", Sets(device_rule)),
    ("lxc.cgroup2.*", Sets(limit)),
    (
        "lxc.cgroup.*",
        None("it is for cgroup v1; lxc.cgroup2 is what a host with v2 follows, too"),
    ),
    ("lxc.cap.drop", Sets(capabilities::drop)),
    ("lxc.cap.keep", Sets(capabilities::keep)),
    ("lxc.apparmor.profile", Sets(profile)),
    ("lxc.aa_profile", Sets(profile)),
    ("lxc.apparmor.*", None(NO_PROFILE)),
    ("lxc.selinux.*", Refused("SELinux is not supported")),
    ("lxc.seccomp.profile", Sets(seccomp)),
    ("lxc.seccomp", Sets(seccomp)),
    (
        "lxc.seccomp.*",
        Refused("system calls cannot be passed to a supervisor yet"),
    ),
    ("lxc.environment", Sets(environment)),
    ("lxc.environment.runtime", Sets(environment)),
    (
        "lxc.init.cmd",
        Sets(|draft, line| set(draft, "process/args", json!(words(line.value)))),
    ),
    (
        "lxc.init_cmd",
        Sets(|draft, line| set(draft, "process/args", json!(words(line.value)))),
    ),
    (
        "lxc.init.uid",
        Sets(|draft, line| number(draft, "process/user/uid", line)),
    ),
    (
        "lxc.init.gid",
        Sets(|draft, line| number(draft, "process/user/gid", line)),
    ),
    (
        "lxc.init.cwd",
        Sets(|draft, line| set(draft, "process/cwd", json!(line.value))),
    ),
    ("lxc.execute.cmd", None("it is for lxc-execute")),
    ("lxc.signal.halt", Sets(halt)),
    ("lxc.haltsignal", Sets(halt)),
    (
        "lxc.signal.reboot",
        None("a reboot is a shutdown and a start"),
    ),
    ("lxc.signal.stop", None("a stop is always by SIGKILL")),
    ("lxc.prlimit.*", Sets(resource_limit)),
    (
        "lxc.sysctl.*",
        Sets(|draft, line| {
            set(
                draft,
                &format!("linux/sysctl/{}", line.rest),
                json!(line.value),
            )
        }),
    ),
    (
        "lxc.proc.oom_score_adj",
        Sets(|draft, line| number(draft, "process/oomScoreAdj", line)),
    ),
    ("lxc.proc.*", Refused("only oom_score_adj can be set")),
    (
        "lxc.no_new_privs",
        Sets(|draft, line| set(draft, "process/noNewPrivileges", json!(line.value == "1"))),
    ),
    (
        "lxc.uts.name",
        Sets(|draft, line| set(draft, "hostname", json!(line.value))),
    ),
    (
        "lxc.utsname",
        Sets(|draft, line| set(draft, "hostname", json!(line.value))),
    ),
    ("lxc.arch", Sets(architecture)),
    (
        "lxc.hook.pre-start",
        Sets(|draft, line| hook(draft, "createRuntime", "pre-start", line)),
    ),
    (
        "lxc.hook.start-host",
        Sets(|draft, line| hook(draft, "poststart", "start-host", line)),
    ),
    (
        "lxc.hook.start",
        Sets(|draft, line| hook(draft, "startContainer", "start", line)),
    ),
    (
        "lxc.hook.post-stop",
        Sets(|draft, line| hook(draft, "poststop", "post-stop", line)),
    ),
    (
        "lxc.hook.version",
        None("hooks get both forms: arguments and variables"),
    ),
    ("lxc.hook.*", Refused(HOST_HOOKS)),
    ("lxc.net.*", Refused("use net0 and so on")),
    ("lxc.network.*", Refused("use net0 and so on")),
    ("lxc.autodev", Sets(on_only)),
    ("lxc.autodev.*", None("/dev has the size it needs")),
    ("lxc.kmsg", None("the container has no /dev/kmsg")),
    ("lxc.tty.*", None(OWN_CONSOLE)),
    (
        "lxc.pty.max",
        None("the number of terminals is not limited"),
    ),
    ("lxc.devtty.dir", None(OWN_CONSOLE)),
    ("lxc.console.*", None(OWN_CONSOLE)),
    ("lxc.log.*", None(OWN_LOG)),
    ("lxc.syslog", None(OWN_LOG)),
    ("lxc.start.*", None(OWN_START)),
    ("lxc.group", None(OWN_START)),
    ("lxc.monitor.*", None("the monitor is the runtime's own")),
    ("lxc.ephemeral", Refused("use a clone of a template")),
    ("lxc.namespace.*", Refused(OWN_NAMESPACES)),
    ("lxc.include", Refused("write the lines of that file here")),
    ("lxc.rootfs.*", Refused(OWN_ROOT)),
    ("lxc.rootfs", Refused(OWN_ROOT)),
    (
        "lxc.time.offset.*",
        Refused("containers have the host's clocks"),
    ),
    (
        "lxc.sched.core",
        Refused("core scheduling is not available"),
    ),
    (
        "lxc.keyring.*",
        None("each container has a session keyring of its own"),
    ),
];

fn set(draft: &mut Draft<'_>, path: &str, value: Value) -> Result<(), String> {
    // A name of sysctl has dots, which divide nothing here.
    *draft.at(path) = value;
    Ok(())
}

fn number(draft: &mut Draft<'_>, path: &str, line: &Line<'_>) -> Result<(), String> {
    let number: i64 = line
        .value
        .parse()
        .map_err(|_| "expected a number".to_owned())?;
    set(draft, path, json!(number))
}

fn on_only(_: &mut Draft<'_>, line: &Line<'_>) -> Result<(), String> {
    match line.value {
        "1" => Ok(()),
        _ => Err("the runtime always furnishes /dev".to_owned()),
    }
}

fn environment(draft: &mut Draft<'_>, line: &Line<'_>) -> Result<(), String> {
    if !line.value.contains('=') {
        return Err("expected NAME=VALUE: nothing is taken over from the host".to_owned());
    }
    draft.push("process/env", json!(line.value));
    Ok(())
}

/// `unconfined` and `generated` are what a container without a profile has; any other must be loaded on the host,
/// which the runtime checks.
fn profile(draft: &mut Draft<'_>, line: &Line<'_>) -> Result<(), String> {
    match line.value {
        "unconfined" | "unchanged" => {}
        "generated" => draft
            .bundle
            .notes
            .push("lxc.apparmor.profile: no effect: no profile is generated yet".to_owned()),
        name => *draft.at("process/apparmorProfile") = json!(name),
    }
    Ok(())
}

/// An empty one takes our filter away. liblxc's form of a filter is not OCI's.
fn seccomp(draft: &mut Draft<'_>, line: &Line<'_>) -> Result<(), String> {
    if !line.value.is_empty() {
        return Err(
            "filters of liblxc's form are not read: leave it out for the usual one".to_owned(),
        );
    }
    if let Some(linux) = draft.at("linux").as_object_mut() {
        linux.remove("seccomp");
    }
    Ok(())
}

fn halt(draft: &mut Draft<'_>, line: &Line<'_>) -> Result<(), String> {
    draft.bundle.halt_signal = Some(line.value.to_owned());
    Ok(())
}

fn architecture(_: &mut Draft<'_>, line: &Line<'_>) -> Result<(), String> {
    match line.value {
        "amd64" | "x86_64" | "linux64" => Ok(()),
        _ => Err("containers have the host's architecture, amd64".to_owned()),
    }
}

/// `SOFT[:HARD]`, each a number or `unlimited`.
fn resource_limit(draft: &mut Draft<'_>, line: &Line<'_>) -> Result<(), String> {
    let value = |text: &str| match text.trim() {
        "unlimited" => Ok(u64::MAX),
        text => text
            .parse()
            .map_err(|_| "expected numbers or 'unlimited'".to_owned()),
    };
    let (soft, hard) = line
        .value
        .split_once(':')
        .unwrap_or((line.value, line.value));
    let kind = format!("RLIMIT_{}", line.rest.to_ascii_uppercase());
    draft.push(
        "process/rlimits",
        json!({ "type": kind, "soft": value(soft)?, "hard": value(hard)? }),
    );
    Ok(())
}

/// `allow` and `deny`: `c 10:200 rwm`, numbers may be stars, and `a` is all.
fn device_rule(draft: &mut Draft<'_>, line: &Line<'_>) -> Result<(), String> {
    let allow = match line.rest {
        "allow" => true,
        "deny" => false,
        _ => return Err("expected devices.allow or devices.deny".to_owned()),
    };
    let mut fields = line.value.split_whitespace();
    let kind = fields.next().unwrap_or_default();
    if !["a", "b", "c"].contains(&kind) {
        return Err("expected a, b or c, then MAJOR:MINOR and access".to_owned());
    }
    let mut rule = json!({ "allow": allow, "type": kind });
    let numbers = fields.next().unwrap_or("*:*");
    let (major, minor) = numbers
        .split_once(':')
        .ok_or_else(|| format!("{numbers} is not MAJOR:MINOR"))?;
    for (name, text) in [("major", major), ("minor", minor)] {
        if text != "*" {
            let number: u32 = text.parse().map_err(|_| format!("{text} is no number"))?;
            rule[name] = json!(number);
        }
    }
    let access = fields.next().unwrap_or("rwm");
    if access.is_empty() || access.bytes().any(|byte| !b"rwm".contains(&byte)) {
        return Err(format!("access {access}: expected letters of rwm"));
    }
    rule["access"] = json!(access);
    draft.push("linux/resources/devices", rule);
    Ok(())
}

/// A file of cgroup v2. Those for which the runtime-spec has a name get it, and work on v1, too.
fn limit(draft: &mut Draft<'_>, line: &Line<'_>) -> Result<(), String> {
    let (name, value) = (line.rest, line.value);
    if !name.contains('.') || name.contains('/') || name.starts_with("cgroup.") {
        return Err("expected CONTROLLER.FILE".to_owned());
    }
    let bytes = || match value {
        "max" => Ok(-1),
        text => bytes(text).ok_or_else(|| "expected an amount of memory".to_owned()),
    };
    match name {
        "memory.max" => {
            let limit = bytes()?;
            let memory = draft.at("linux/resources/memory");
            // OCI counts both together in "swap".
            let swap = memory["swap"].as_i64().zip(memory["limit"].as_i64());
            let swap = swap.map_or(0, |(both, limit)| both.saturating_sub(limit).max(0));
            let both = if limit < 0 {
                -1
            } else {
                limit.saturating_add(swap)
            };
            *memory = json!({ "limit": limit, "swap": both });
        }
        "memory.swap.max" => {
            let swap = bytes()?;
            let memory = draft.at("linux/resources/memory");
            let limit = memory["limit"].as_i64().unwrap_or(-1);
            let both = if swap < 0 || limit < 0 {
                -1
            } else {
                limit.saturating_add(swap)
            };
            memory["swap"] = json!(both);
        }
        "pids.max" => {
            let limit = match value {
                "max" => -1,
                text => text.parse().map_err(|_| "expected a number".to_owned())?,
            };
            *draft.at("linux/resources/pids") = json!({ "limit": limit });
        }
        "cpuset.cpus" => *draft.at("linux/resources/cpu/cpus") = json!(value),
        "cpuset.mems" => *draft.at("linux/resources/cpu/mems") = json!(value),
        name => draft.at("linux/resources/unified")[name] = json!(value),
    }
    Ok(())
}

/// Bytes, with a unit of 1024 as the kernel takes it.
fn bytes(text: &str) -> Option<i64> {
    let (digits, shift) = match text.as_bytes().last()?.to_ascii_uppercase() {
        b'K' => (&text[..text.len() - 1], 10),
        b'M' => (&text[..text.len() - 1], 20),
        b'G' => (&text[..text.len() - 1], 30),
        b'T' => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: i64 = digits.parse().ok()?;
    number.checked_mul(1 << shift).filter(|bytes| *bytes >= 0)
}

/// A hook of liblxc, called with its arguments and variables.
fn hook(draft: &mut Draft<'_>, list: &str, kind: &str, line: &Line<'_>) -> Result<(), String> {
    let mut command = words(line.value).into_iter();
    let path = command.next().filter(|path| path.starts_with('/'));
    let path = path.ok_or_else(|| "expected the path of a program".to_owned())?;
    let name = draft.id.to_string();
    let mut args = vec![path.clone()];
    args.extend(command);
    args.extend([name.clone(), "lxc".to_owned(), kind.to_owned()]);
    let env = [
        "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned(),
        format!("LXC_NAME={name}"),
        format!("LXC_HOOK_TYPE={kind}"),
        "LXC_HOOK_SECTION=lxc".to_owned(),
        "LXC_HOOK_VERSION=0".to_owned(),
    ];
    draft.push(
        &format!("hooks/{list}"),
        json!({ "path": path, "args": args, "env": env }),
    );
    Ok(())
}
