// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A device that comes and goes, in a container with a user namespace and in one without; one of the start goes, too.
//! For the tests of both versions of cgroups.

use serde_json::{Value, json};

use super::Scene;

pub fn come_and_go() {
    for unprivileged in [true, false] {
        let mut scene = Scene::new(&["sleep", "1000"]);
        if unprivileged {
            scene = scene.unprivileged();
        }
        let fuse = json!({ "path": "/dev/first", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666 });
        scene.config["linux"]["devices"] = json!([fuse]);
        let rule = json!({ "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rw" });
        scene.config["linux"]["resources"]["devices"] = json!([rule]);
        let all = json!(["CAP_MKNOD", "CAP_DAC_OVERRIDE"]);
        scene.config["process"]["capabilities"] =
            json!({ "bounding": all, "effective": all, "permitted": all });
        scene.start(&[]);
        let change = |verb: &str, list: Value| {
            std::fs::write(scene.path("devices.json"), list.to_string()).unwrap();
            scene.ct(&["devices", verb, "ID", "devices.json"])
        };
        let opens = |path: &str| {
            let words = ["exec", "ID", "sh", "-c"];
            let script = format!("exec 3<{path} && echo opened");
            scene.ct(&[&words[..], &[&script]].concat()).stdout == "opened\n"
        };
        assert!(opens("/dev/first") && !opens("/dev/net/tun"));
        let tun = json!([{
            "path": "/dev/net/tun", "type": "c", "major": 10, "minor": 200, "fileMode": 0o644, "uid": 7, "gid": 8,
            "access": "rw",
        }]);
        change("add", tun.clone()).ok();
        let said = scene
            .exec("busybox stat -c %t:%T-%a-%u:%g /dev/net/tun")
            .ok();
        assert_eq!(said, "a:c8-644-7:8\n");
        assert!(opens("/dev/net/tun"));
        let again = change("add", tun);
        assert!(again.stderr.contains("has it already"), "{}", again.stderr);
        // Its own node of the same number is of no use once the device is taken away.
        let made = scene.exec("busybox mknod /dev/mine c 10 200").code;
        assert_eq!(made == Some(0), !unprivileged);
        assert_eq!(opens("/dev/mine"), !unprivileged);
        change("remove", json!([{ "path": "/dev/net/tun" }])).ok();
        assert!(!opens("/dev/net/tun") && !opens("/dev/mine"));
        assert!(scene.exec("busybox stat /dev/net/tun").code != Some(0));
        change("remove", json!([{ "path": "/dev/first" }])).ok();
        assert!(!opens("/dev/first") && opens("/dev/null"));
        let missing = change("remove", json!([{ "path": "/dev/first" }]));
        assert!(
            missing.stderr.contains("has no /dev/first"),
            "{}",
            missing.stderr
        );
    }
}
