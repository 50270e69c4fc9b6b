// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Containers whose cgroup is a systemd scope, on a host that systemd runs, with cgroup v2 alone; and its AppArmor.

use std::time::Duration;

use atoll_tests::lab::{self, Host};
use atoll_tests::tree;

const SECOND: Duration = Duration::from_secs(1);

/// Defines `ct ARGUMENT…`, whose output a container may keep open, and `gone`, which waits until systemd and the
/// cgroup file system have nothing of the container any more. The bundle is the working directory.
const SHELL: &str = r#"set -e
cd /var/bundle
group=/sys/fs/cgroup/atoll.slice/atoll-lab.slice/ct-a.scope
limits() { (cd $group && cat memory.max pids.max cpu.max cpuset.cpus | paste -sd:); }
ct() {
  if /payload/atoll-ct --root /run/ct --systemd-cgroup "$@" >/tmp/said 2>&1 </dev/null; then cat /tmp/said
  else code=$?; cat /tmp/said; return $code; fi
}
gone() {
  for i in $(seq 600); do
    units=$(systemctl list-units --all --plain --no-legend 'ct-*.scope')
    [ -z "$units" ] && [ ! -e $group ] && return
    sleep 0.1
  done
  echo "left: $units"; ls -d $group; cat $group/cgroup.procs; return 1
}
config() { jq "$1" config.json > new && mv new config.json; }
"#;

const BUNDLE: &str = r#"
mkdir -p rootfs/bin rootfs/proc rootfs/sys rootfs/dev rootfs/tmp
cp /bin/busybox rootfs/bin/
for name in sh sleep head mknod cat; do ln -s busybox rootfs/bin/$name; done
ct spec
config '.process.terminal = false | .process.args = ["sleep", "10000"] | .root.readonly = false
  | (.process.capabilities.bounding, .process.capabilities.effective, .process.capabilities.permitted) += ["CAP_MKNOD"]
  | .linux.cgroupsPath = "atoll-lab.slice:ct:a" | .linux.resources.memory.limit = 67108864
  | .linux.resources.pids.limit = 50
  | .linux.resources.cpu = { "quota": 50000, "period": 100000, "cpus": "0" }'
"#;

#[track_caller]
fn on_host(host: &Host, script: &str) -> String {
    host.check(&format!("{SHELL}{script}"), SECOND * 180)
        .unwrap()
        .trim()
        .to_owned()
}

/// What the files say, and what systemd says: memory, tasks, CPU time, CPUs.
#[track_caller]
fn assert_limits(host: &Host, files: &str, properties: [&str; 4]) {
    let [memory, tasks, time, cpus] = properties;
    let expected = format!(
        "ActiveState=active\nAllowedCPUs={cpus}\nCPUQuotaPerSecUSec={time}\nDelegate=yes\nMemoryMax={memory}\n\
         Slice=atoll-lab.slice\nTasksMax={tasks}"
    );
    let show = "systemctl show ct-a.scope --property=ActiveState,AllowedCPUs,CPUQuotaPerSecUSec,Delegate,MemoryMax \
        --property=Slice,TasksMax | sort; limits";
    assert_eq!(on_host(host, show), format!("{expected}\n{files}"));
}

/// Has systemd write all that it knows again, by a reload and a change of the slice, and waits until it has: `number`
/// is another one each time.
fn reload(number: u32) -> String {
    let low = number * 4096;
    format!(
        "systemctl daemon-reload
         systemctl set-property --runtime atoll-lab.slice CPUWeight={number}
         systemctl set-property --runtime ct-a.scope MemoryLow={low}
         until [ $(cat $group/memory.low) = {low} ]; do sleep 0.1; done"
    )
}

fn limits_survive(host: &Host) {
    on_host(host, "ct run --detach a");
    let before = "67108864:50:50000 100000:0";
    on_host(host, &reload(11));
    assert_limits(host, before, ["67108864", "50", "500ms", "0"]);
    on_host(
        host,
        "ct update --memory 100663296 --pids-limit 40 --cpu-quota 20000 a",
    );
    let after = "100663296:40:20000 100000:0";
    on_host(host, &reload(12));
    assert_limits(host, after, ["100663296", "40", "200ms", "0"]);
    // The device list is as it was, too, and still changes.
    let open =
        "ct exec a sh -c 'mknod /tmp/k c 10 200 2>/dev/null; exec 3</tmp/k && echo open' || true";
    let said = on_host(host, open);
    assert!(said.contains("Operation not permitted"), "{said}");
    let tun = r#"[{"path":"/dev/net/tun","type":"c","major":10,"minor":200,"fileMode":438}]"#;
    on_host(
        host,
        &format!("echo '{tun}' > d; ct devices add a d; {}", reload(13)),
    );
    assert_eq!(on_host(host, open), "open");
}

/// No profile can be loaded here, for want of apparmor_parser; what is not loaded the kernel's list tells.
fn an_unknown_profile_is_refused(host: &Host) {
    let refused = "nosuch: no such AppArmor profile is loaded";
    let said = on_host(host, "! ct exec --apparmor nosuch a cat /dev/null");
    assert!(said.contains(refused), "{said}");
    let current = "ct exec --apparmor unconfined a cat /proc/self/attr/current";
    assert_eq!(on_host(host, current), "unconfined");
    let said = on_host(
        host,
        "cp config.json kept; config '.process.apparmorProfile = \"nosuch\"'; ! ct create b; mv kept config.json",
    );
    assert!(said.contains(refused), "{said}");
}

fn nothing_is_left(host: &Host) {
    let second = on_host(host, "! ct create b");
    assert!(
        second.contains("linux.cgroupsPath: ct-a.scope: systemd has such a unit"),
        "{second}"
    );
    on_host(host, "[ ! -e /run/ct/b ]; [ -d $group ]");
    on_host(host, "ct delete --force a; gone; [ ! -e /run/ct/a ]");
    // One that ends by itself, and one that could not be made.
    on_host(
        host,
        "config '.process.args = [\"sleep\", \"0\"] | .linux.resources.pids.limit = 2'; ct run a; gone",
    );
    on_host(
        host,
        "config '.process.args = [\"nosuch\"]'; ! ct create a; gone; [ ! -e /run/ct/a ]",
    );
    on_host(host, "config '.process.args = [\"sleep\", \"10000\"]'");
}

fn a_killed_creator_leaves_nothing(host: &Host) {
    // At a moment when there is an init already; without its creator it goes, and the scope with it.
    let hook = r#"config '.hooks.createRuntime = [{ "path": "/bin/sh", "args": ["sh", "-c", "kill -9 $PPID"] }]'"#;
    on_host(
        host,
        &format!(
            "{hook}; ! ct create a; gone; ct delete --force a; [ ! -e /run/ct/a ]; config 'del(.hooks)'"
        ),
    );
    // At any moment. What came to be by then is created or half so, and delete takes it.
    on_host(
        host,
        "for time in 0.1 0.3; do
           timeout -s KILL $time /payload/atoll-ct --root /run/ct --systemd-cgroup create a </dev/null >/dev/null 2>&1 || true
           ct delete --force a; gone
         done",
    );
}

#[test]
fn a_container_is_a_scope_that_keeps_its_limits_and_goes() {
    let payload = tempfile::tempdir().unwrap();
    std::fs::copy(tree::binary("atoll-ct"), payload.path().join("atoll-ct")).unwrap();
    let work = lab::Scratch::new_in(&std::env::temp_dir()).unwrap();
    let hosts = lab::start(&lab::Settings {
        host_count: 1,
        memory_mib: lab::MEMORY_MIB,
        kernel: lab::HostKernel::Suite,
        payload: Some(payload.path()),
        directory: work.path().to_owned(),
        api: None,
    })
    .unwrap();
    let host = &hosts[0];
    host.check("mkdir -p /var/bundle; modprobe tun", SECOND * 60)
        .unwrap();
    on_host(host, BUNDLE);
    limits_survive(host);
    an_unknown_profile_is_refused(host);
    nothing_is_left(host);
    a_killed_creator_leaves_nothing(host);
}
