// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a host says to AppArmor profiles that it does not have. Confinement itself needs a host with AppArmor; the lab
//! has one.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::path::Path;

use scene::{Scene, can_run};
use serde_json::json;

const PROFILE: &str = "atoll-test-nosuch";

/// What the host says, if it is ours to judge.
fn refusal() -> Option<&'static str> {
    let enabled = std::fs::read_to_string("/sys/module/apparmor/parameters/enabled");
    if !enabled.is_ok_and(|text| text.starts_with('Y')) {
        Some("AppArmor is not enabled on this host: leave it out")
    } else if Path::new("/sys/kernel/security/apparmor/profiles").exists() {
        Some("no such AppArmor profile is loaded: load it with apparmor_parser")
    } else {
        println!("ATOLL-SKIP: AppArmor is enabled, and securityfs is not mounted");
        None
    }
}

#[test]
fn a_profile_that_the_host_has_not_is_refused_by_name() {
    if !can_run() {
        return;
    }
    let Some(reason) = refusal() else {
        return;
    };
    let mut scene = Scene::new(&["sh", "-c", "echo ran >/tmp/ran; exec sleep 1000"]);
    scene.config["process"]["apparmorProfile"] = json!(PROFILE);
    for command in ["create", "run"] {
        let refused = scene.ct(&[command, "ID"]);
        assert_eq!(refused.code, Some(1), "{command}");
        let said = refused.stderr.trim();
        assert!(
            said.contains(PROFILE) && said.contains(reason) && said.lines().count() == 1,
            "{command}: {said}"
        );
        assert_eq!(scene.ct(&["list", "-q"]).ok(), "", "{command}");
        assert_eq!(scene.cgroups().len(), 0, "{command}");
    }
    assert!(!scene.path("rootfs/tmp/ran").exists());

    // No profile at all is every host's.
    scene.config["process"]["apparmorProfile"] = json!("unconfined");
    scene.start(&[]);
    let document = json!({ "cwd": "/", "user": { "uid": 0, "gid": 0 }, "args": ["true"],
        "apparmorProfile": PROFILE });
    std::fs::write(scene.path("process.json"), document.to_string()).unwrap();
    for how in [
        &["exec", "--apparmor", PROFILE, "ID", "true"][..],
        &["exec", "--process", "process.json", "ID"],
    ] {
        let refused = scene.ct(how);
        assert_eq!(refused.code, Some(255), "{how:?}");
        let said = refused.stderr.trim();
        assert!(
            said.contains(PROFILE) && said.contains(reason) && said.lines().count() == 1,
            "{how:?}: {said}"
        );
    }
    for profile in ["unconfined", ""] {
        let words = ["exec", "--apparmor", profile, "ID", "echo", "yes"];
        assert_eq!(scene.ct(&words).ok(), "yes\n");
    }
}
