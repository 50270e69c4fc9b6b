// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `lxc.cap.drop` and `lxc.cap.keep`.

use serde_json::json;

use super::{Draft, Line};

/// Every capability, in the order of their numbers: capabilities(7) of Linux 6.
const ALL: &[&str] = &[
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

/// Takes capabilities away. Without a name, it takes back what was taken so far, our own choice included: many
/// configs have this line for containers in the container.
pub(super) fn drop(draft: &mut Draft<'_>, line: &Line<'_>) -> Result<(), String> {
    if line.value.is_empty() {
        set(
            draft,
            ALL.iter().map(|name| format!("CAP_{name}")).collect(),
        );
        return Ok(());
    }
    let gone = names(line.value)?;
    let kept = present(draft)
        .into_iter()
        .filter(|name| !gone.contains(name))
        .collect();
    set(draft, kept);
    Ok(())
}

/// Leaves only these, and those of further such lines; `none` is none.
pub(super) fn keep(draft: &mut Draft<'_>, line: &Line<'_>) -> Result<(), String> {
    let mut kept = match (draft.keeps, line.value) {
        (true, text) if text != "none" => present(draft),
        _ => Vec::new(),
    };
    draft.keeps = true;
    if line.value != "none" {
        kept.extend(names(line.value)?);
    }
    set(draft, kept);
    Ok(())
}

fn names(text: &str) -> Result<Vec<String>, String> {
    let name = |word: &str| {
        let plain = word.to_ascii_uppercase();
        let plain = plain.trim_start_matches("CAP_");
        match ALL.contains(&plain) {
            true => Ok(format!("CAP_{plain}")),
            false => Err(format!("there is no capability {word}")),
        }
    };
    text.split_whitespace().map(name).collect()
}

fn present(draft: &mut Draft<'_>) -> Vec<String> {
    let list = draft.at("process/capabilities/bounding").as_array();
    let names = list.into_iter().flatten().filter_map(|name| name.as_str());
    names.map(str::to_owned).collect()
}

fn set(draft: &mut Draft<'_>, names: Vec<String>) {
    *draft.at("process/capabilities") =
        json!({ "bounding": names, "effective": names, "permitted": names });
}
