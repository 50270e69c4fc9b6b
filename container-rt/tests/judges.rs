// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The suites of crun and runc judge `atoll-ct` in the same run as the runtimes that they were written for
//! (`tests/judges/judge.py`). A quick part of both; all of it with `ATOLL_JUDGES=whole`, as `make soak` does.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::path::Path;
use std::process::Command;

use scene::can_run;

/// Exit code of the script when the suites cannot be had.
const NOTHING_TO_RUN: i32 = 77;

/// What the script answers with these options besides.
fn judge(output: &str, options: &[&str]) {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let mut command = Command::new("python3");
    command
        .arg(top.join("tests/judges/judge.py"))
        .args(["--ours", env!("CARGO_BIN_EXE_atoll-ct"), "--output"])
        .arg(top.join("target/test").join(output))
        .args(options);
    if std::env::var("ATOLL_JUDGES").as_deref() != Ok("whole") {
        command.arg("--fast");
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    println!("{text}");
    if output.status.code() == Some(NOTHING_TO_RUN) {
        println!("ATOLL-SKIP: {}", text.trim());
        return;
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{errors}");
}

#[test]
fn nothing_fails_that_runc_passes() {
    if can_run() {
        judge("judges.tsv", &[]);
    }
}

#[test]
fn nothing_fails_that_runc_passes_on_v2() {
    // A host that has v2 alone has it above, too.
    if can_run() && !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        judge("judges-v2.tsv", &["--v2", "--runtimes=atoll-ct,runc"]);
    }
}
