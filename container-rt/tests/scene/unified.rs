// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Pure cgroup v2, on whatever host: the test program runs itself again in a mount namespace of its own where v2
//! is mounted alone.

use std::path::Path;
use std::process::Command;

use super::can_run;

/// Set in the second run.
const INSIDE: &str = "ATOLL_TEST_UNIFIED";

/// True in the second run; the first makes it and checks how it ended.
pub fn on_unified(test: &str) -> bool {
    if !can_run() {
        return false;
    }
    let root = "/sys/fs/cgroup";
    if std::env::var_os(INSIDE).is_some() || Path::new(root).join("cgroup.controllers").exists() {
        return true;
    }
    let script = "mount --make-rprivate / && umount -R /sys/fs/cgroup && mount -t cgroup2 none /sys/fs/cgroup \
        || exit 77; exec \"$0\" --exact \"$1\" --nocapture";
    let mut command = Command::new("unshare");
    command
        .args(["-m", "sh", "-c", script])
        .arg(std::env::current_exe().unwrap())
        .arg(test);
    let output = command.env(INSIDE, "1").output().unwrap();
    if output.status.code() == Some(77) {
        let why = String::from_utf8_lossy(&output.stderr)
            .trim()
            .replace('\n', " ");
        println!("ATOLL-SKIP: cgroup v2 cannot be mounted alone here: {why}");
    } else {
        let (out, err) = (output.stdout, output.stderr);
        assert!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&out),
            String::from_utf8_lossy(&err)
        );
    }
    false
}
