// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The tree itself: which crate may use which, headers, lengths, README.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Every arrow between crates of this workspace that the architecture allows. `tests` and `benches` may use
/// anything, and nothing may use them.
const ARROWS: &[(&str, &str)] = &[
    ("atoll-api", "atoll-manager"),
    ("atoll-manager", "atoll-vmm-protocol"),
    ("atoll-manager", "atoll-disk"),
    ("atoll-vmm", "atoll-vmm-protocol"),
    ("atoll-vmm", "atoll-devices"),
    ("atoll-vmm", "atoll-disk"),
    ("atoll-vmm", "atoll-firmware"),
    ("atoll-relay", "atoll-vmm"),
    ("atoll-relay", "atoll-disk"),
    ("atoll-relay", "atoll-thread"),
    ("atoll-devices", "atoll-disk"),
    // A leaf: what a thread is for, and the one function that makes it.
    ("atoll-vmm", "atoll-thread"),
    ("atoll-devices", "atoll-thread"),
    ("atoll-disk", "atoll-thread"),
];

/// Crates that only some crates may depend on, whatever the version.
const CONFINED: &[(&str, &[&str])] = &[
    ("kvm-ioctls", &["atoll-vmm"]),
    (
        "tokio",
        &["atoll-manager", "atoll-api", "atoll-tests", "atoll-benches"],
    ),
    ("axum", &["atoll-api"]),
    ("redb", &["atoll-manager"]),
    ("libcontainer", &["atoll-container-rt"]),
];

/// Crates that may not come in by any path, and why.
const BANNED: &[(&str, &str)] = &[
    ("openssl-sys", "one crypto library: aws-lc-rs"),
    ("ring", "one crypto library: aws-lc-rs"),
    ("native-tls", "one TLS library: rustls"),
    ("bincode", "unmaintained, RUSTSEC-2025-0141: use postcard"),
    ("serde_yaml", "archived: use serde-saphyr"),
    ("users", "unmaintained, RUSTSEC-2025-0040"),
    ("atty", "unmaintained: std::io::IsTerminal"),
];

/// Longest source file, in lines. Tables (`keys.rs`, `routes/*.rs`) may be longer: uniform rows read well.
const FILE_LINES_MAX: usize = 900;
const README_LINES_MAX: usize = 150;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap()
        .to_owned()
}

fn metadata() -> serde_json::Value {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--format-version",
            "1",
            "--offline",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Files that git tracks or would track, relative to the root.
fn tracked() -> Vec<PathBuf> {
    let output = Command::new("git")
        .args(["ls-files", "--cached", "--others", "--exclude-standard"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let listed = String::from_utf8(output.stdout).unwrap();
    listed
        .lines()
        .map(PathBuf::from)
        .filter(|path| root().join(path).is_file())
        .collect()
}

fn with_extension<'a>(
    files: &'a [PathBuf],
    extensions: &'a [&str],
) -> impl Iterator<Item = &'a PathBuf> {
    files.iter().filter(|path| {
        path.extension()
            .and_then(|e| e.to_str())
            .is_some_and(|e| extensions.contains(&e))
    })
}

#[test]
fn crate_graph_is_the_designed_one() {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().unwrap();
    let ours: BTreeSet<&str> = packages
        .iter()
        .map(|p| p["name"].as_str().unwrap())
        .collect();
    let mut wrong = Vec::new();
    for package in packages {
        let from = package["name"].as_str().unwrap();
        for dependency in package["dependencies"].as_array().unwrap() {
            let to = dependency["name"].as_str().unwrap();
            let free = matches!(from, "atoll-tests" | "atoll-benches");
            if ours.contains(to) && from != to && !free && !ARROWS.contains(&(from, to)) {
                wrong.push(format!("{from} -> {to} is not in the design's picture"));
            }
            if let Some((_, allowed)) = CONFINED.iter().find(|(name, _)| *name == to)
                && !allowed.contains(&from)
            {
                wrong.push(format!("{from} uses {to}, which is only for {allowed:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn banned_crates_stay_out() {
    // What is really built here: the lock file also lists what features that are off would bring.
    let output = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--workspace",
            "--prefix",
            "none",
            "--format",
            "{p}",
            "--offline",
            "--locked",
        ])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let built = String::from_utf8(output.stdout).unwrap();
    let built: BTreeSet<&str> = built
        .lines()
        .filter_map(|line| line.split(' ').next())
        .collect();
    let wrong: Vec<_> = BANNED
        .iter()
        .filter(|(name, _)| built.contains(name))
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn every_source_names_its_licence_and_its_purpose() {
    let mut wrong = Vec::new();
    let files = tracked();
    for path in with_extension(&files, &["rs", "ts", "tsx", "py", "sh", "toml"]) {
        let text = std::fs::read_to_string(root().join(path)).unwrap();
        if !text
            .lines()
            .take(3)
            .any(|line| line.contains("SPDX-License-Identifier: Apache-2.0"))
            && !matches!(
                path.file_name().and_then(|n| n.to_str()),
                Some("rustfmt.toml" | "clippy.toml")
            )
        {
            wrong.push(format!(
                "{}: no SPDX line among the first three",
                path.display()
            ));
        }
        if path.extension().is_some_and(|e| e == "rs")
            && !text.lines().take(8).any(|line| line.starts_with("//!"))
        {
            wrong.push(format!(
                "{}: no //! header that says what it is",
                path.display()
            ));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn no_file_outgrows_a_reader() {
    let files = tracked();
    let wrong: Vec<String> = with_extension(&files, &["rs", "ts", "tsx"])
        .filter(|path| {
            let name = path.to_string_lossy();
            !(name.ends_with("keys.rs") || name.contains("routes/") || name.contains(".gen."))
        })
        .filter_map(|path| {
            let lines = std::fs::read_to_string(root().join(path))
                .unwrap()
                .lines()
                .count();
            (lines > FILE_LINES_MAX).then(|| format!("{}: {lines} lines", path.display()))
        })
        .collect();
    assert!(
        wrong.is_empty(),
        "split by concept (at most {FILE_LINES_MAX} lines):\n{}",
        wrong.join("\n")
    );
}

/// A thread of a virtual machine's process that is made in any other way would run unconfined.
#[test]
fn the_vmm_makes_threads_by_kind_only() {
    let files = tracked();
    let mut wrong = Vec::new();
    for path in with_extension(&files, &["rs"]) {
        let name = path.to_string_lossy();
        let confined = ["vmm/src/", "devices/src/", "devices/disk/src/"]
            .iter()
            .any(|folder| name.starts_with(folder));
        // The probe is a command of its own, which runs a VMM as its child; the others are tests' code.
        let elsewhere = [
            "vmm/src/probe",
            "devices/src/testing",
            "devices/disk/src/conformance",
        ];
        let is_tests = name.ends_with("/tests.rs") || name.contains("/tests/");
        if !confined || is_tests || elsewhere.iter().any(|start| name.starts_with(start)) {
            continue;
        }
        let text = std::fs::read_to_string(root().join(path)).unwrap();
        let code = text.split("#[cfg(test)]").next().unwrap();
        for way in ["thread::Builder", "thread::spawn(", "thread::scope("] {
            if code.replace("atoll_thread::spawn(", "").contains(way) {
                wrong.push(format!(
                    "{name}: {way}: use atoll_thread::spawn with a kind"
                ));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn readme_stays_short() {
    let lines = std::fs::read_to_string(root().join("README.md"))
        .unwrap()
        .lines()
        .count();
    assert!(
        lines <= README_LINES_MAX,
        "README.md: {lines} lines, at most {README_LINES_MAX}"
    );
}

#[test]
fn no_binary_files() {
    let wrong: Vec<_> = tracked()
        .into_iter()
        .filter(|path| !path.starts_with("fuzz") && !path.to_string_lossy().contains("/corpus/"))
        .filter(|path| std::fs::read(root().join(path)).unwrap().contains(&0))
        .collect();
    assert!(wrong.is_empty(), "{wrong:?}");
}
