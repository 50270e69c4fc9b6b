// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `lxc.mount.entry`, a line of fstab(5) with options of liblxc's own, and `lxc.mount.auto`.

use std::path::{Component, Path, PathBuf};

use serde_json::{Value, json};

use super::{Draft, Line};
use crate::guest::container::unescape;

/// The key.
pub(super) const ENTRY: &str = "lxc.mount.entry";
/// Where liblxc mounts root file systems on Debian; destinations may be written with it.
const ROOTFS_MOUNT: &str = "/usr/lib/x86_64-linux-gnu/lxc/rootfs";

/// The source of an entry.
pub(super) fn source(entry: &str) -> Option<PathBuf> {
    entry.split_whitespace().next().map(unescape)
}

/// Adds a mount. Missing mount points are made, whether `create=` is there or not.
pub(super) fn entry(draft: &mut Draft<'_>, line: &Line<'_>) -> Result<(), String> {
    let fields: Vec<&str> = line.value.split_whitespace().collect();
    let [source, target, kind, options, ..] = fields.as_slice() else {
        return Err("expected what, where, type and options".to_owned());
    };
    let (source, target) = (unescape(source), destination(&unescape(target))?);
    let mut kept = Vec::new();
    let (mut optional, mut binds) = (false, false);
    for option in options.split(',') {
        match option {
            "defaults" | "create=dir" | "create=file" => {}
            "optional" => optional = true,
            "relative" => {
                return Err(
                    "'relative' is not followed: name the source from the host's root".to_owned(),
                );
            }
            "idmap=container" => kept.push("idmap"),
            option if option.starts_with("idmap=") => {
                return Err(format!("{option}: only idmap=container is followed"));
            }
            option => {
                binds |= option == "bind" || option == "rbind";
                kept.push(option);
            }
        }
    }
    if binds && optional && !draft.exists(&source) {
        draft
            .bundle
            .notes
            .push(format!("{ENTRY}: {} is not there", source.display()));
        return Ok(());
    }
    if binds && !source.is_absolute() {
        return Err(format!("{} is not absolute", source.display()));
    }
    let kind = if binds { "bind" } else { kind };
    draft.push(
        "mounts",
        json!({
            "destination": target.to_string_lossy(),
            "type": kind,
            "source": source.to_string_lossy(),
            "options": kept,
        }),
    );
    Ok(())
}

/// A destination is relative to the container's root, or begins with the place where liblxc mounts that.
fn destination(path: &Path) -> Result<PathBuf, String> {
    let inside = path.strip_prefix(ROOTFS_MOUNT).unwrap_or(path);
    if inside.components().any(|part| part == Component::ParentDir) {
        return Err(format!("{}: .. is not followed", path.display()));
    }
    Ok(Path::new("/").join(inside.strip_prefix("/").unwrap_or(inside)))
}

/// How proc, sys and the control groups are mounted. Ours are namespaced, so `mixed` is what they are anyway.
pub(super) fn auto(draft: &mut Draft<'_>, line: &Line<'_>) -> Result<(), String> {
    for word in line.value.split_whitespace() {
        match word {
            "proc" | "proc:mixed" => {}
            "proc:rw" => {
                *draft.at("linux/readonlyPaths") = json!([]);
                *draft.at("linux/maskedPaths") = json!([]);
            }
            "sys" | "sys:mixed" | "sys:ro" => access(draft, "/sys", "ro"),
            "sys:rw" => access(draft, "/sys", "rw"),
            word if word.starts_with("cgroup") => {
                let readonly = word.split(':').any(|part| part == "ro");
                access(draft, "/sys/fs/cgroup", if readonly { "ro" } else { "rw" });
            }
            word => return Err(format!("{word} is not followed")),
        }
    }
    Ok(())
}

fn access(draft: &mut Draft<'_>, destination: &str, word: &str) {
    let mounts = draft.at("mounts").as_array_mut();
    let at = |mount: &&mut Value| mount["destination"] == destination;
    for mount in mounts.into_iter().flatten().filter(at) {
        let options = mount["options"].as_array_mut();
        for option in options.into_iter().flatten() {
            if *option == "ro" || *option == "rw" {
                *option = json!(word);
            }
        }
    }
}
