// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Real containers from a busybox template, through the manager as the API uses it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use atoll_manager::guest::bulk::{StartAll, StopAll};
use atoll_manager::guest::container::health::{Health, State};
use atoll_manager::guest::{Action, Ask, ConfigUpdate, Console};
use atoll_manager::id::{GuestId, GuestKind};
use atoll_manager::shell::Shell;
use atoll_manager::task::{TaskFilter, TaskRecord, Upid};
use atoll_manager::{Node, Settings};
use tokio_util::sync::CancellationToken;

const USER: &str = "root@pam";

struct Ground {
    node: Node,
    state: tempfile::TempDir,
    id: GuestId,
}

impl Ground {
    /// A node with a template; `None` where containers cannot be run.
    async fn new() -> Option<Self> {
        if !world::has_binary("atoll-ct") {
            return None;
        }
        let state = tempfile::Builder::new().prefix("at").tempdir().unwrap();
        let template = state.path().join("storage/template/cache/busybox.tar.gz");
        if !world::make_template(&template) {
            return None;
        }
        let node = open(&state).await;
        let id = world::guest_number().try_into().unwrap();
        Some(Self { node, state, id })
    }

    async fn done(&self, upid: Result<Upid, atoll_manager::error::Error>) -> String {
        let upid = upid.unwrap();
        let status = self.node.tasks().wait(&upid).await.unwrap();
        let log = self.node.tasks().log(&upid, 0, 0).unwrap();
        println!("{upid}: {log:?}");
        status
    }

    async fn act(&self, action: Action) -> String {
        self.done(
            self.node
                .guests()
                .act(GuestKind::Container, self.id, action, USER),
        )
        .await
    }

    async fn create(&self, net: &str) {
        let keys = [
            ("mp0", "local:0.0625,mp=/srv"),
            ("hostname", "box"),
            ("password", "secret"),
            ("net0", net),
        ];
        self.create_with(self.id, &keys).await;
    }

    async fn create_with(&self, id: GuestId, keys: &[(&str, &str)]) {
        let number = id.to_string();
        let always = [
            ("vmid", number.as_str()),
            ("ostemplate", "local:vztmpl/busybox.tar.gz"),
            ("rootfs", "local:0.0625"),
            ("memory", "128"),
        ];
        let params = always.iter().chain(keys);
        let params = params.map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
        let guests = self.node.guests();
        let created = guests.create(GuestKind::Container, id, params.collect(), USER);
        assert_eq!(self.done(created).await, "OK");
    }

    /// What tasks of that type wrote, the last first.
    fn logs_of(&self, kind: &str) -> Vec<Vec<String>> {
        let filter = TaskFilter {
            kind: Some(kind.to_owned()),
            ..TaskFilter::default()
        };
        let (records, _) = self.node.tasks().list(&filter);
        let log = |record: &TaskRecord| {
            let page = self.node.tasks().log(&record.upid, 0, 0).unwrap();
            page.lines.into_iter().map(|(_, line)| line).collect()
        };
        records.iter().map(log).collect()
    }

    async fn pid(&self) -> Option<u32> {
        let status = self.node.guests().status(GuestKind::Container, self.id);
        status.await.unwrap().pid
    }

    /// The socket of what its console shows, which is that terminal.
    #[track_caller]
    fn line(&self, expected: Option<u8>) -> PathBuf {
        let guests = self.node.guests();
        match guests.console(GuestKind::Container, self.id).unwrap() {
            Console::Line { socket, tty } if tty == expected => socket,
            other => panic!("{other:?}"),
        }
    }

    fn sh(&self, script: &str) {
        let root = self.state.path().join("run/ct");
        let (root, name) = (root.to_str().unwrap(), format!("ct-{}", self.id));
        let runtime = world::bin_dir().join("atoll-ct");
        let words = ["--root", root, "exec", &name, "sh", "-c", script];
        world::run(runtime.to_str().unwrap(), &words);
    }

    async fn set(&self, keys: &[(&str, &str)]) {
        let wish = keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let none = BTreeSet::new;
        let update = ConfigUpdate::new(GuestKind::Container, wish.collect(), none(), none(), None);
        let guests = self.node.guests();
        let update = guests.update(GuestKind::Container, self.id, update.unwrap());
        update.await.unwrap();
    }

    async fn running(&self) -> bool {
        self.node
            .guests()
            .status(GuestKind::Container, self.id)
            .await
            .unwrap()
            .running
    }
}

async fn open(state: &tempfile::TempDir) -> Node {
    let mut settings = Settings::new("n1", state.path());
    settings.bin_dir = world::bin_dir();
    let node = Node::open(settings).await.unwrap();
    node.storage()
        .ensure_local(&node.settings().storage_dir())
        .await
        .unwrap();
    node.network().ensure().await.unwrap();
    node
}

/// Waits until no task runs.
async fn wait_idle(ground: &Ground) {
    let deadline = Instant::now() + world::PATIENCE;
    while ground.node.tasks().running_count() > 0 {
        assert!(Instant::now() < deadline, "a task does not end");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Types a line on a console and reads until the answer is there.
fn ask_console(path: &std::path::Path, line: &str, answer: &str) {
    let mut stream = UnixStream::connect(path).unwrap();
    stream
        .set_read_timeout(Some(Duration::from_millis(200)))
        .unwrap();
    let (mut seen, mut buffer) = (String::new(), [0; 4096]);
    let deadline = Instant::now() + world::PATIENCE;
    let mut typed = Instant::now() - Duration::from_secs(60);
    while !seen.contains(answer) {
        assert!(Instant::now() < deadline, "no {answer:?} in {seen:?}");
        // The shell may not read yet when the console is there already.
        if typed.elapsed() > Duration::from_secs(2) {
            stream.write_all(line.as_bytes()).unwrap();
            typed = Instant::now();
        }
        if let Ok(count) = stream.read(&mut buffer) {
            seen.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    }
}

#[test]
fn a_container_lives_and_leaves_nothing() {
    world::isolated("a_container_lives_and_leaves_nothing", async || {
        let Some(ground) = Ground::new().await else {
            return;
        };
        ground
            .create("name=eth0,bridge=vmbr0,ip=10.64.0.10/24,gw=10.64.0.1")
            .await;
        assert!(!ground.running().await);
        assert_eq!(ground.act(Action::Start).await, "OK");
        let again = ground.act(Action::Start).await;
        assert!(again.ends_with("already running"), "{again}");
        let init = answers(&ground).await;
        let ground = adopted(ground, init).await;
        ends(&ground).await;
        grows(&ground).await;
        goes(&ground).await;
        ground.node.network().teardown().await.unwrap();
    });
}

/// It answers on its console and on the network, and has a load and a range of user ids.
async fn answers(ground: &Ground) -> u32 {
    let (kind, id) = (GuestKind::Container, ground.id);
    let console = ground.line(Some(1));
    world::until("the console's socket", || console.exists());
    ask_console(&console, "id; hostname\n", "uid=0");
    ask_console(&console, "touch /srv/new && ls -ln /srv\n", " 0        0 ");
    ask_console(&console, "ls /srv\n", "lost+found");
    world::until("an answer from 10.64.0.10", || {
        let ping = ["ping", "-c1", "-W1", "10.64.0.10"];
        let output = std::process::Command::new("busybox").args(ping).output();
        output.is_ok_and(|output| output.status.success())
    });
    let status = ground.node.guests().status(kind, id).await.unwrap();
    assert_eq!(status.name, "box");
    let load = status.load;
    assert!(
        load.memory_bytes > 0 && load.memory_bytes < 128 << 20,
        "{status:?}"
    );
    assert!(load.received_bytes > 0 && load.disk_bytes > 0, "{status:?}");
    let wish = BTreeMap::from([("memory".to_owned(), "96".to_owned())]);
    let update = ConfigUpdate::new(kind, wish, BTreeSet::new(), BTreeSet::new(), None).unwrap();
    let applied = ground.node.guests().update(kind, id, update).await.unwrap();
    assert_eq!(
        (applied.now.len(), applied.pending.len()),
        (1, 0),
        "limits change at once"
    );
    let limits = [
        "memory/atoll/ct-ID/memory.limit_in_bytes",
        "atoll/ct-ID/memory.max",
    ];
    let limit = limits.iter().find_map(|path| {
        let path = format!("/sys/fs/cgroup/{}", path.replace("ID", &id.to_string()));
        std::fs::read_to_string(path).ok()
    });
    assert_eq!(limit.unwrap().trim(), (96 << 20).to_string());
    let interfaces = ground.node.guests().interfaces(id).await.unwrap();
    let card = interfaces.iter().find(|card| card.name == "eth0").unwrap();
    assert_eq!(card.ipv4, ["10.64.0.10/24"]);
    let init = status.pid.unwrap();
    let uid_map = std::fs::read_to_string(format!("/proc/{init}/uid_map")).unwrap();
    let base = 1_000_000 + (u32::from(id) - 100) * 65_536;
    let outside = uid_map.split_whitespace().nth(1);
    assert_eq!(
        outside,
        Some(base.to_string().as_str()),
        "a range of its own"
    );
    init
}

/// A daemon that is gone has lost nothing: another one finds the same container.
async fn adopted(ground: Ground, init: u32) -> Ground {
    let Ground { node, state, id } = ground;
    drop(node);
    let node = open(&state).await;
    let status = node
        .guests()
        .status(GuestKind::Container, id)
        .await
        .unwrap();
    assert_eq!(status.pid, Some(init));
    Ground { node, state, id }
}

/// It is not destroyed while it runs, nor when it is protected, can be paused, obeys a shutdown, and leaves nothing on the host.
async fn ends(ground: &Ground) {
    let (kind, id) = (GuestKind::Container, ground.id);
    let refused = ground.node.guests().destroy(kind, id, false, USER);
    let refused = ground.done(refused).await;
    assert!(refused.ends_with(" is running"), "{refused}");
    ground.set(&[("protection", "1")]).await;
    let refused = ground.node.guests().destroy(kind, id, true, USER);
    let refused = ground.done(refused).await;
    let expected = format!("can't remove CT {id} - protection mode enabled");
    assert!(refused.ends_with(&expected), "{refused}");
    assert!(ground.running().await, "what is protected is not stopped");
    ground.set(&[("protection", "0")]).await;
    assert_eq!(ground.act(Action::Suspend).await, "OK");
    assert!(ground.node.guests().is_paused(kind, id).await);
    assert_eq!(ground.act(Action::Resume).await, "OK");
    let ask = Ask {
        timeout: world::PATIENCE,
        force: false,
    };
    assert_eq!(
        ground.act(Action::Shutdown(ask)).await,
        "OK",
        "busybox obeys SIGUSR2"
    );
    assert!(!ground.running().await);
    assert!(!ground.state.path().join(format!("run/ct-{id}")).exists());
    let links = world::run("ip", &["-o", "link"]);
    assert!(!links.contains("veth"), "{links}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&format!("ct-{id}")), "{mounts}");
}

/// Its disk grows, and the file system on it.
async fn grows(ground: &Ground) {
    let (kind, id) = (GuestKind::Container, ground.id);
    let grown = ground
        .node
        .guests()
        .resize(kind, id, "rootfs", "+32M", USER);
    assert_eq!(ground.done(grown).await, "OK");
    let config = ground.node.guests().site().seat(kind, id).config().unwrap();
    assert!(
        config.get("rootfs").unwrap().ends_with("size=96M"),
        "{config:?}"
    );
    assert_eq!(ground.act(Action::Start).await, "OK");
    let rootfs = ground.state.path().join(format!("run/ct-{id}/rootfs"));
    let space = rustix::fs::statvfs(rootfs).unwrap();
    assert!(
        space.f_frsize * space.f_blocks > 70 << 20,
        "the file system has grown, too"
    );
    assert_eq!(ground.act(Action::Stop).await, "OK");
}

/// Destroyed, nothing of it is left.
async fn goes(ground: &Ground) {
    let (kind, id) = (GuestKind::Container, ground.id);
    let destroyed = ground.node.guests().destroy(kind, id, false, USER);
    assert_eq!(ground.done(destroyed).await, "OK");
    let local = ground
        .node
        .storage()
        .open(&"local".parse().unwrap())
        .unwrap();
    let left = local.list().await.unwrap();
    assert_eq!(left.len(), 1, "only the template is left: {left:?}");
    let gone = ground.node.guests().status(kind, id).await.unwrap_err();
    let text = format!("Configuration file 'nodes/n1/lxc/{id}.conf' does not exist");
    assert_eq!(gone.to_string(), text);
}

/// A container is asked whether it works as long as it runs; one that does not is started again if its config wants
/// that. What is late is ended in the container, too.
#[test]
fn a_container_that_does_not_work_is_started_again() {
    const NAME: &str = "a_container_that_does_not_work_is_started_again";
    world::isolated(NAME, async || {
        let Some(ground) = Ground::new().await else {
            return;
        };
        let command = "/bin/sh\0-c\0[ -e /late ] && sleep 4321; [ -e /works ] || { echo broken >&2; exit 1; }";
        let keys = [
            ("health-command", command),
            ("health", "interval=1,timeout=1,retries=2"),
        ];
        ground.create_with(ground.id, &keys).await;
        let stop = CancellationToken::new();
        let reconciler = {
            let (node, stop) = (ground.node.clone(), stop.clone());
            tokio::spawn(async move { node.run(stop).await })
        };
        assert_eq!(ground.act(Action::Start).await, "OK");
        let health = async |state: State, message: &str| {
            let deadline = Instant::now() + world::PATIENCE;
            loop {
                let health = ground.node.guests().health(ground.id);
                let said = |health: &Health| health.message.clone().unwrap_or_default();
                if let Some(health) = &health
                    && health.state == state
                    && said(health).contains(message)
                {
                    return;
                }
                assert!(Instant::now() < deadline, "{state:?} {message}: {health:?}");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        health(State::Unhealthy, "broken").await;
        let first = ground.pid().await.unwrap();
        ground.sh("touch /works");
        health(State::Healthy, "").await;
        ground.sh("touch /late");
        health(State::Unhealthy, "killed").await;
        ground.sh("rm /late");
        health(State::Healthy, "").await;
        let group = format!("ct-{}", ground.id);
        let left = world::processes_of(&group);
        assert!(!left.iter().any(|line| line.contains("4321")), "{left:?}");
        assert_eq!(
            ground.pid().await,
            Some(first),
            "its config wants no restart"
        );

        ground.set(&[("restart", "on-failure")]).await;
        ground.sh("rm /works");
        let deadline = Instant::now() + world::PATIENCE;
        while ground.pid().await.is_none_or(|pid| pid == first) {
            assert!(Instant::now() < deadline, "not started again");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let log = ground.logs_of("vzunhealthy").concat().join("\n");
        assert!(
            log.contains("not healthy 2 times in a row") && log.contains("broken"),
            "{log}"
        );
        ground.set(&[("restart", "no")]).await;
        wait_idle(&ground).await;
        ground.sh("touch /works");
        health(State::Healthy, "").await;
        assert_eq!(ground.act(Action::Stop).await, "OK");
        assert_eq!(ground.node.guests().health(ground.id), None);
        stop.cancel();
        reconciler.await.unwrap().unwrap();
        ground.node.network().teardown().await.unwrap();
    });
}

/// What the console shows follows `cmode` at once; which terminals there are, `console` and `tty` at the next start.
#[test]
fn the_console_is_a_terminal_the_console_or_a_shell() {
    const NAME: &str = "the_console_is_a_terminal_the_console_or_a_shell";
    world::isolated(NAME, async || {
        let Some(ground) = Ground::new().await else {
            return;
        };
        ground.create_with(ground.id, &[]).await;
        assert_eq!(ground.act(Action::Start).await, "OK");
        ask_console(
            &ground.line(Some(1)),
            "ls -l /proc/self/fd/0\n",
            "/dev/tty1",
        );
        ask_console(
            &ground.line(Some(1)),
            "echo $container_ttys\n",
            "pts/1 pts/2",
        );
        ground.set(&[("cmode", "console")]).await;
        ask_console(&ground.line(None), "ls -l /proc/self/fd/0\n", "/dev/pts/0");
        ground.set(&[("cmode", "shell")]).await;
        shell_answers(&ground).await;

        let without = [("tty", "0"), ("console", "0"), ("cmode", "tty")];
        ground.set(&without).await;
        ask_console(&ground.line(Some(1)), "echo still-$((40+2))\n", "still-42");
        assert_eq!(ground.act(Action::Stop).await, "OK");
        assert_eq!(ground.act(Action::Start).await, "OK");
        let guests = ground.node.guests();
        let refused = guests.console(GuestKind::Container, ground.id);
        let refused = refused.unwrap_err().to_string();
        assert!(refused.contains("no terminal to show"), "{refused}");
        ground.set(&[("cmode", "shell")]).await;
        shell_answers(&ground).await;
        assert_eq!(ground.act(Action::Stop).await, "OK");
        ground.node.network().teardown().await.unwrap();
    });
}

/// A shell of root's own, which ends when nobody looks at it any more.
async fn shell_answers(ground: &Ground) {
    let (kind, id) = (GuestKind::Container, ground.id);
    let Console::Program(program) = ground.node.guests().console(kind, id).unwrap() else {
        panic!("no shell");
    };
    let shell = Shell::within(program).unwrap();
    shell.resize(91, 17).unwrap();
    let line = b"echo $0 $HOME; stty size; echo shell-$((40+2)); ls -l /proc/self/fd/0\n";
    shell.write_all(line).await.unwrap();
    let (mut said, mut buffer) = (String::new(), [0; 4096]);
    let expected = ["/bin/sh /root", "17 91", "shell-42", "/dev/pts/"];
    let heard = async {
        while !expected.iter().all(|text| said.contains(text)) {
            let count = shell.read(&mut buffer).await.unwrap();
            assert!(count > 0, "{said}");
            said.push_str(&String::from_utf8_lossy(&buffer[..count]));
        }
    };
    let heard = tokio::time::timeout(world::PATIENCE, heard).await;
    assert!(heard.is_ok(), "{said}");
    drop(shell);
    let group = format!("ct-{id}");
    world::until("the shell's end", || {
        let mut processes = world::processes_of(&group).into_iter();
        !processes.any(|command| command.starts_with("/bin/sh -l"))
    });
}

#[test]
fn dhcp_gives_addresses_and_the_reconciler_notices_ends() {
    world::isolated(
        "dhcp_gives_addresses_and_the_reconciler_notices_ends",
        async || {
            let Some(ground) = Ground::new().await else {
                return;
            };
            let stop = CancellationToken::new();
            let reconciler = {
                let (node, stop) = (ground.node.clone(), stop.clone());
                tokio::spawn(async move { node.run(stop).await })
            };
            ground.create("name=eth0,bridge=vmbr0,ip=dhcp").await;
            assert_eq!(ground.act(Action::Start).await, "OK");
            let leases = ground.state.path().join("run/dnsmasq.leases");
            world::until("a lease", || {
                std::fs::read_to_string(&leases).is_ok_and(|text| text.contains(" 10.64.0."))
            });

            let first = ground.pid().await.unwrap();
            let console = ground.line(Some(1));
            ask_console(&console, "reboot\n", "reboot");
            let deadline = Instant::now() + world::PATIENCE;
            let pid = loop {
                assert!(
                    Instant::now() < deadline,
                    "not started again after its reboot"
                );
                match ground.pid().await {
                    Some(pid) if pid != first => break pid,
                    _ => tokio::time::sleep(Duration::from_millis(50)).await,
                }
            };
            wait_idle(&ground).await;
            world::run("kill", &["-9", &pid.to_string()]);
            let folder = ground.state.path().join(format!("run/ct-{}", ground.id));
            world::until("the reconciler to clean up", || !folder.exists());
            assert!(!ground.running().await);
            stop.cancel();
            reconciler.await.unwrap().unwrap();
            ground.node.network().teardown().await.unwrap();
        },
    );
}

/// The host has started: guests with `onboot` start, the first place first. They stop the other way around.
#[test]
fn guests_start_and_stop_with_the_node_in_their_order() {
    const NAME: &str = "guests_start_and_stop_with_the_node_in_their_order";
    world::isolated(NAME, async || {
        let Some(ground) = Ground::new().await else {
            return;
        };
        let second = ground.id;
        let [first, third]: [GuestId; 2] =
            world::more_numbers().map(|number| number.try_into().unwrap());
        let with_node = [("onboot", "1"), ("startup", "order=2,down=20")];
        ground.create_with(second, &with_node).await;
        let before = [("onboot", "1"), ("startup", "order=1,up=1,down=30")];
        ground.create_with(first, &before).await;
        ground.create_with(third, &[]).await;

        let (stop, node) = (CancellationToken::new(), ground.node.clone());
        let reconciler = tokio::spawn({
            let stop = stop.clone();
            async move { node.run(stop).await }
        });
        let noted = ground.state.path().join("run/boot-id");
        world::until("the start of all", || noted.exists());
        let logs = ground.logs_of("startall");
        let expected = [
            format!("Starting CT {first}"),
            "Waiting for 1 seconds (startup delay)".to_owned(),
            format!("Starting CT {second}"),
            "TASK OK".to_owned(),
        ];
        assert_eq!(logs, [expected]);
        assert!(ground.running().await);
        stop.cancel();
        reconciler.await.unwrap().unwrap();

        let stopped = ground.node.guests().stop_all(StopAll::default(), USER);
        assert_eq!(ground.done(stopped).await, "OK");
        let expected = [
            format!("Stopping CT {second} (timeout = 20 seconds)"),
            format!("Stopping CT {first} (timeout = 30 seconds)"),
            "TASK OK".to_owned(),
        ];
        assert_eq!(ground.logs_of("stopall"), [expected]);
        assert!(!ground.node.guests().any_running().unwrap());

        let wish = StartAll {
            only: Some(vec![third]),
            force: true,
        };
        let started = ground.node.guests().start_all(wish, USER);
        assert_eq!(ground.done(started).await, "OK");
        assert!(ground.node.guests().any_running().unwrap() && !ground.running().await);
        let stopped = ground.node.guests().stop_all(StopAll::default(), USER);
        assert_eq!(ground.done(stopped).await, "OK");
        ground.node.network().teardown().await.unwrap();
    });
}
