// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The seccomp filter of a container, as its programs see it: asked by Debian's perl, which makes any system call.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "tests fail by panicking and skip by a line"
)]

mod scene;

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::process::Stdio;

use atoll_container_rt::terminal::receive_fd;
use libseccomp::{ScmpNotifReq, ScmpNotifResp, ScmpNotifRespFlags, ScmpSyscall};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{MsgFlags, recv};
use scene::{Ended, LIMIT, Scene, can_run};
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

/// What the agent answers.
const NO_DATA: i32 = 61;

/// mkdir(2), and mknod(2) of a block and a character device.
const ASKING: &str = r#"
    sub ask { $! = 0; syscall(shift, @_); return $! + 0 }
    print "new ", ask(439, 0, 0, 0, 0), " mkdir ", ask(83, 0, 0);
    print " block ", ask(133, 0, 0060600, 0), " character ", ask(133, 0, 0020600, 0), "\n";
"#;

/// [`profile`] with an agent for every mkdir, and for mknod of character devices.
fn asking_profile(listener: &std::path::Path) -> Value {
    let mut profile = profile("SCMP_ACT_ERRNO");
    profile["syscalls"][0]["names"]
        .as_array_mut()
        .unwrap()
        .retain(|name| name != "mknod");
    let character = json!([{
        "index": 1, "value": 0o170_000, "valueTwo": 0o020_000, "op": "SCMP_CMP_MASKED_EQ",
    }]);
    let rules = profile["syscalls"].as_array_mut().unwrap();
    rules.push(json!({ "names": ["mkdir"], "action": "SCMP_ACT_NOTIFY" }));
    rules.push(json!({ "names": ["mknod"], "action": "SCMP_ACT_NOTIFY", "args": character }));
    profile["listenerPath"] = json!(listener);
    profile["listenerMetadata"] = json!("for the agent");
    profile
}

/// What comes to the agent: a state and a filter.
fn accept(agent: &UnixListener) -> (Value, OwnedFd) {
    let (stream, _) = agent.accept().unwrap();
    let mut text = vec![0; 65536];
    let count = recv(stream.as_raw_fd(), &mut text, MsgFlags::MSG_PEEK).unwrap();
    let state = serde_json::from_slice(&text[..count]).unwrap();
    (state, receive_fd(&stream).unwrap())
}

fn no_data(id: u64) -> ScmpNotifResp {
    ScmpNotifResp::new_error(id, -NO_DATA, ScmpNotifRespFlags::empty())
}

/// Answers until nobody has the filter any more. Says how often that was.
fn answer_all(filter: &OwnedFd, answer: fn(u64) -> ScmpNotifResp) -> usize {
    let limit = PollTimeout::try_from(LIMIT).unwrap();
    for answered in 0.. {
        let mut polled = [PollFd::new(filter.as_fd(), PollFlags::POLLIN)];
        assert_ne!(poll(&mut polled, limit), Ok(0), "nothing came");
        if !polled[0].revents().unwrap().contains(PollFlags::POLLIN) {
            return answered;
        }
        let Ok(request) = ScmpNotifReq::receive(filter.as_raw_fd()) else {
            continue;
        };
        // Who has asked may have been killed meanwhile.
        answer(request.id).respond(filter.as_raw_fd()).ok();
    }
    unreachable!()
}

#[test]
fn an_agent_decides_what_the_filter_asks_about() {
    let variants: [fn(Scene) -> Scene; 2] = [|scene| scene, Scene::unprivileged];
    for (variant, forbidden) in variants.into_iter().zip([true, false]) {
        let Some(scene) = scene() else { return };
        let mut scene = variant(scene);
        let agent = UnixListener::bind(scene.path("agent.sock")).unwrap();
        scene.config["process"]["noNewPrivileges"] = json!(forbidden);
        scene.config["process"]["args"] = json!(["/usr/bin/perl", "-e", ASKING]);
        scene.config["linux"]["seccomp"] = asking_profile(&scene.path("agent.sock"));
        scene.config["linux"]["seccomp"]["flags"] = json!(["SECCOMP_FILTER_FLAG_TSYNC"]);
        let file = |name: &str| std::fs::File::create(scene.path(name)).unwrap();
        let said = |name: &str| std::fs::read_to_string(scene.path(name)).unwrap();
        let mut create = scene.command(&["create", "ID"]);
        create
            .stdin(Stdio::null())
            .stdout(file("out"))
            .stderr(file("err"));
        assert!(create.status().unwrap().success(), "{}", said("err"));
        let (state, filter) = accept(&agent);
        let pid = scene.state()["pid"].clone();
        let bundle = scene.directory.path().canonicalize().unwrap();
        let wanted = json!({
            "ociVersion": scene.config["ociVersion"], "fds": ["seccompFd"], "pid": pid, "metadata": "for the agent",
            "state": {
                "ociVersion": scene.config["ociVersion"], "id": scene.id, "status": "creating", "pid": pid,
                "bundle": bundle, "annotations": scene.config.get("annotations").unwrap_or(&json!({})),
            },
        });
        assert_eq!(state, wanted);
        scene.ct(&["start", "ID"]).ok();
        assert_eq!(answer_all(&filter, no_data), 2);
        scene.wait_status("stopped");
        // The block device is refused by the filter itself.
        let answers = "new 38 mkdir 61 block 1 character 61\n";
        assert_eq!(said("out"), answers, "{}", said("err"));
        scene.ct(&["delete", "ID"]).ok();

        scene.config["process"]["args"] = json!(["/bin/sleep", "1000"]);
        scene.start(&[]);
        let (first, _init) = accept(&agent);
        let words = ["exec", "ID", "/usr/bin/perl", "-e", ASKING];
        let mut exec = scene.command(&words);
        exec.stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let exec = exec.spawn().unwrap();
        let (state, filter) = accept(&agent);
        assert_eq!(state["state"]["status"], "running");
        assert_eq!(state["state"]["pid"], first["pid"]);
        assert_ne!(state["pid"], first["pid"]);
        assert_eq!(answer_all(&filter, no_data), 2);
        let executed = Ended::of(&exec.wait_with_output().unwrap());
        assert_eq!(executed.ok(), answers);
    }
}

/// Everything that follows the filter asks, also what the runtime itself does, until there is an agent to answer.
#[test]
fn an_agent_is_asked_by_the_runtime_itself() {
    for forbidden in [true, false] {
        let Some(mut scene) = scene() else { return };
        let agent = UnixListener::bind(scene.path("agent.sock")).unwrap();
        scene.config["process"]["noNewPrivileges"] = json!(forbidden);
        scene.config["process"]["args"] = json!(["/bin/true"]);
        let asked = [
            "close", "execve", "mmap", "munmap", "openat", "read", "recvfrom", "sendmsg",
        ];
        scene.config["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW", "listenerPath": scene.path("agent.sock"),
            "syscalls": [{ "names": asked, "action": "SCMP_ACT_NOTIFY" }],
        });
        let mut run = scene.command(&["run", "ID"]);
        run.stdin(Stdio::null()).stdout(Stdio::null());
        let mut run = run.spawn().unwrap();
        let mut polled = [PollFd::new(agent.as_fd(), PollFlags::POLLIN)];
        let limit = PollTimeout::try_from(LIMIT).unwrap();
        if poll(&mut polled, limit) != Ok(1) {
            run.kill().unwrap();
            panic!("no filter came");
        }
        let (_, filter) = accept(&agent);
        let go_on = |id| ScmpNotifResp::new_continue(id, ScmpNotifRespFlags::empty());
        assert!(answer_all(&filter, go_on) > 4);
        assert!(run.wait().unwrap().success());
    }
}

#[test]
fn without_an_agent_there_is_no_container() {
    let Some(mut scene) = scene() else { return };
    let path = scene.path("agent.sock");
    drop(UnixListener::bind(&path).unwrap());
    scene.config["linux"]["seccomp"] = asking_profile(&path);
    let refused = scene.ct(&["create", "ID"]);
    let wanted = format!("failed to connect with seccomp agent at {}", path.display());
    assert!(
        refused.code != Some(0) && refused.stderr.contains(&wanted),
        "{}",
        refused.stderr
    );
    assert_eq!(scene.ct(&["list", "-q"]).ok(), "");
    assert!(scene.cgroups().is_empty());
    // The runtime itself has to write before there is an agent.
    for (name, value) in [
        ("defaultAction", json!("SCMP_ACT_NOTIFY")),
        ("syscalls", json!([])),
    ] {
        scene.config["linux"]["seccomp"] = asking_profile(&path);
        scene.config["linux"]["seccomp"][name] = value;
        let rules = scene.config["linux"]["seccomp"]["syscalls"].as_array_mut();
        rules
            .unwrap()
            .push(json!({ "names": ["write"], "action": "SCMP_ACT_NOTIFY" }));
        let error = scene.ct(&["create", "ID"]).stderr;
        assert!(error.contains("SCMP_ACT_NOTIFY cannot be used"), "{error}");
    }
}
