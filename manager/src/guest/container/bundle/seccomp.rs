// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! System calls that no container gets: what acts on the host's kernel whatever the namespace, and what reaches files
//! that are not mounted in the container.

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

/// The filter. With `keyctl`, keyrings, which have no namespace but that of users, may be used.
pub(super) fn filter(keyctl: bool) -> Value {
    let denied = |names: &[&str], errno: u32| json!({ "names": names, "action": "SCMP_ACT_ERRNO", "errnoRet": errno });
    let mut forced = denied(&["umount2"], EPERM);
    // MNT_FORCE ends what others do on a network file system of the host. umount(2).
    forced["args"] = json!([{ "index": 1, "value": 1, "valueTwo": 1, "op": "SCMP_CMP_MASKED_EQ" }]);
    let mut calls = vec![denied(DENIED, EPERM), forced];
    if !keyctl {
        calls.push(denied(&["keyctl", "add_key", "request_key"], ENOSYS));
    }
    json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": calls,
    })
}
