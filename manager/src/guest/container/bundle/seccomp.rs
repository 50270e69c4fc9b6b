// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! System calls that no container gets: what acts on the host's kernel whatever the namespace, and what reaches files
//! that are not mounted in the container.

use std::path::Path;

use serde_json::{Value, json};

/// errno(3).
const EPERM: u32 = 1;
const ENOSYS: u32 = 38;

/// Refused to every container. `open_by_handle_at` opens any file of a file system of which one directory is mounted
/// (the way out of containers that was published as "shocker"); the others load code into the kernel.
const DENIED: &[&str] = &[
    "kexec_load",
    "kexec_file_load",
    "open_by_handle_at",
    "init_module",
    "finit_module",
    "delete_module",
];

/// Kinds of files in a mode: inode(7).
const KIND_MASK: u32 = 0o170_000;
const CHARACTER_DEVICE: u32 = 0o020_000;

/// What a container may do beyond the usual.
pub(super) struct Allowed<'a> {
    /// Use keyrings, which have no namespace but that of users.
    pub(super) keyctl: bool,
    /// Make device nodes by the help of its monitor, which listens at this path.
    pub(super) mknod: Option<&'a Path>,
}

/// The filter.
pub(super) fn filter(allowed: &Allowed<'_>) -> Value {
    let denied = |names: &[&str], errno: u32| json!({ "names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno });
    let mut forced = denied(&["umount2"], EPERM);
    // MNT_FORCE ends what others do on a network file system of the host. umount(2).
    forced["args"] = json!([{ "index": 1, "value": 1, "valueTwo": 1, "op": "SCMP_CMP_MASKED_EQ" }]);
    let mut calls = vec![denied(DENIED, EPERM), forced];
    if !allowed.keyctl {
        calls.push(denied(&["keyctl", "add_key", "request_key"], ENOSYS));
    }
    // Only calls for character devices wait for the monitor's answer.
    let asked = |name: &str, index: u32| {
        json!({ "names": [name], "action": "SCMP_ACT_NOTIFY", "args": [{
            "index": index, "value": KIND_MASK, "valueTwo": CHARACTER_DEVICE, "op": "SCMP_CMP_MASKED_EQ",
        }]})
    };
    if allowed.mknod.is_some() {
        calls.extend([asked("mknod", 1), asked("mknodat", 2)]);
    }
    let mut filter = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": calls,
    });
    if let Some(path) = allowed.mknod {
        filter["listenerPath"] = json!(path);
    }
    filter
}
