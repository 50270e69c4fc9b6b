// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The seccomp filter of a container, as its programs see it: asked by Debian's perl, which makes any system call.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use libseccomp::ScmpSyscall;
use scene::{Scene, can_run};
use serde_json::{Value, json};

/// The last of a long row of numbers without a gap, on x86-64.
const NEWEST: i32 = 334;

/// What follows the answers of the calls: whether a child can be made, and the capabilities.
const SCRIPT: &str = r#"
    sub ask { $! = 0; syscall(shift, @_); return $! + 0 }
    my ($new, $unknown, $old) = (ask(439, 0, 0, 0, 0), ask(100000), ask(83, 0, 0));
    my $child = fork;
    exit 0 if defined $child && $child == 0;
    # Of clone(2): CLONE_NEWUSER and SIGCHLD.
    my $apart = syscall(56, 0x10000011, 0, 0, 0, 0);
    exit 0 if $apart == 0;
    $apart = $apart > 0 ? "works" : $! + 0;
    print "new $new unknown $unknown old $old fork ", defined $child ? "works" : "fails", " apart $apart\n";
    open my $status, "<", "/proc/self/status";
    print grep /^(Cap(Eff|Prm|Bnd|Amb)|NoNewPrivs|Uid)/, <$status>;
"#;

/// Allows everything up to [`NEWEST`] but mkdir, and of clone what makes no namespaces, as Docker's own profile does.
fn profile(default: &str) -> Value {
    let all = (0..=NEWEST).filter_map(|number| ScmpSyscall::from(number).get_name().ok());
    let names: Vec<String> = all.filter(|n| n != "mkdir" && n != "clone").collect();
    let namespaces = json!([{
        "index": 0, "value": 2_114_060_288_u64, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ",
    }]);
    json!({
        "defaultAction": default, "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            { "names": names, "action": "SCMP_ACT_ALLOW" },
            { "names": ["clone"], "action": "SCMP_ACT_ALLOW", "args": namespaces },
        ],
    })
}

/// A container in which perl runs. Only for x86-64, whose numbers are used.
fn scene() -> Option<Scene> {
    if !can_run() {
        return None;
    }
    if cfg!(not(target_arch = "x86_64")) {
        println!("ATOLL-SKIP: the numbers of the calls are those of x86-64");
        return None;
    }
    let mut scene = Scene::new(&["/usr/bin/perl", "-e", SCRIPT]);
    for link in ["lib", "lib64"] {
        std::os::unix::fs::symlink(format!("usr/{link}"), scene.path("rootfs").join(link)).unwrap();
    }
    let mounts = scene.config["mounts"].as_array_mut().unwrap();
    mounts.push(json!({ "destination": "/usr", "source": "/usr", "options": ["rbind", "ro"] }));
    Some(scene)
}

/// The answers, and the lines about rights.
fn answers(text: &str) -> (&str, Vec<&str>) {
    let (first, rest) = text.split_once('\n').unwrap_or_default();
    (first, rest.lines().collect())
}

#[test]
fn newer_calls_do_not_exist_and_rights_stay() {
    let variants: [fn(Scene) -> Scene; 2] = [|scene| scene, Scene::unprivileged];
    for variant in variants {
        for (forbidden, uid) in [(true, 0), (false, 0), (true, 7), (false, 7)] {
            let Some(scene) = scene() else { return };
            let mut scene = variant(scene);
            scene.config["process"]["noNewPrivileges"] = json!(forbidden);
            scene.config["process"]["user"]["uid"] = json!(uid);
            let plain = scene.ct(&["run", "ID"]).ok();
            let (without, rights) = answers(&plain);
            // The kernel has the first, and neither of the others fails for want of rights.
            assert!(without.starts_with("new 14 unknown 38 old 14"), "{without}");

            scene.config["linux"]["seccomp"] = profile("SCMP_ACT_ERRNO");
            let filtered = scene.ct(&["run", "ID"]);
            assert_eq!(filtered.code, Some(0), "{}", filtered.stderr);
            let wanted = ("new 38 unknown 38 old 1 fork works apart 1", rights);
            assert_eq!(answers(&filtered.stdout), wanted, "{forbidden} {uid}");

            // A process of `exec`, too.
            scene.config["process"]["args"] = json!(["/bin/sleep", "1000"]);
            scene.start(&[]);
            let executed = scene.ct(&["exec", "ID", "/usr/bin/perl", "-e", SCRIPT]);
            assert_eq!(executed.code, Some(0), "{}", executed.stderr);
            assert_eq!(answers(&executed.stdout).0, wanted.0, "{forbidden} {uid}");
        }
    }
}

#[test]
fn a_profile_that_lets_unknown_calls_through_has_no_stub() {
    let Some(mut scene) = scene() else { return };
    scene.config["linux"]["seccomp"] = profile("SCMP_ACT_LOG");
    let logged = scene.ct(&["run", "ID"]).ok();
    assert!(logged.starts_with("new 14 unknown 38 old 14"), "{logged}");
    // An errno of its own, for what is not newer.
    scene.config["linux"]["seccomp"] = profile("SCMP_ACT_ERRNO");
    scene.config["linux"]["seccomp"]["defaultErrnoRet"] = json!(13);
    let own = scene.ct(&["run", "ID"]).ok();
    assert!(own.starts_with("new 38 unknown 38 old 13"), "{own}");
}
