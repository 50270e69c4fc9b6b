// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A real Debian with systemd as an unprivileged container, through the manager: what is written inside for its
//! distribution is what its own programs make of it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod world;

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use atoll_manager::error::Error;
use atoll_manager::guest::{Action, Ask, Console};
use atoll_manager::id::{GuestId, GuestKind};
use atoll_manager::task::Upid;
use atoll_manager::{Node, Settings};

const KIND: GuestKind = GuestKind::Container;
const USER: &str = "root@pam";

/// The stock Debian guest's root file system, made once from Debian's packages and cached.
fn template() -> Option<PathBuf> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../run/guest-image.sh");
    let output = Command::new(script).output().unwrap();
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    if !output.status.success() {
        let reason = errors.lines().last().unwrap_or_default();
        println!("ATOLL-SKIP: run/guest-image.sh: {reason}");
        return None;
    }
    let folder = String::from_utf8(output.stdout).unwrap();
    Some(Path::new(folder.trim()).join("template.tar.zst"))
}

struct Debian {
    node: Node,
    state: tempfile::TempDir,
    id: GuestId,
}

impl Debian {
    async fn new(template: &Path) -> Self {
        let state = tempfile::Builder::new().prefix("at").tempdir().unwrap();
        let mut settings = Settings::new("n1", state.path());
        settings.bin_dir = world::bin_dir();
        let node = Node::open(settings).await.unwrap();
        let storage = node.settings().storage_dir();
        node.storage().ensure_local(&storage).await.unwrap();
        node.network().ensure().await.unwrap();
        let cache = storage.join("template/cache");
        std::fs::create_dir_all(&cache).unwrap();
        std::fs::copy(template, cache.join("debian.tar.zst")).unwrap();
        let id = world::guest_number().try_into().unwrap();
        Self { node, state, id }
    }

    async fn done(&self, upid: Result<Upid, Error>) -> String {
        let upid = upid.unwrap();
        let status = self.node.tasks().wait(&upid).await.unwrap();
        println!("{upid}: {:?}", self.node.tasks().log(&upid, 0, 0).unwrap());
        status
    }

    async fn act(&self, action: Action) -> String {
        let upid = self.node.guests().act(KIND, self.id, action, USER);
        self.done(upid).await
    }

    fn sh(&self, script: &str) -> String {
        let output = Command::new(world::bin_dir().join("atoll-ct"))
            .arg("--root")
            .arg(self.state.path().join("run/ct"))
            .args(["exec", &format!("ct-{}", self.id), "sh", "-c", script])
            .output()
            .unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

#[test]
fn debian_is_what_its_config_says() {
    world::isolated("debian_is_what_its_config_says", async || {
        if !world::has_binary("atoll-ct") {
            return;
        }
        let Some(template) = template() else { return };
        let debian = Debian::new(&template).await;
        let params = [
            ("ostemplate", "local:vztmpl/debian.tar.zst"),
            ("rootfs", "local:1"),
            ("hostname", "deb.example.org"),
            ("memory", "512"),
            ("nameserver", "10.64.0.1"),
            ("searchdomain", "example.org"),
            ("ssh-public-keys", "ssh-ed25519 AAAA me"),
            (
                "net0",
                "name=eth0,bridge=vmbr0,ip=10.64.0.30/24,gw=10.64.0.1",
            ),
        ];
        let params = params.map(|(key, value)| (key.to_owned(), value.to_owned()));
        let created = debian
            .node
            .guests()
            .create(KIND, debian.id, params.into(), USER);
        assert_eq!(debian.done(created).await, "OK");
        let seat = debian.node.guests().site().seat(KIND, debian.id);
        assert_eq!(
            seat.config().unwrap().get("ostype"),
            Some("debian"),
            "found out"
        );
        assert_eq!(debian.act(Action::Start).await, "OK");
        world::until("systemd's end of booting", || {
            let state = debian.sh("systemctl is-system-running");
            matches!(state.trim(), "running" | "degraded")
        });
        println!(
            "failed units: {:?}",
            debian.sh("systemctl --failed --plain --no-legend")
        );
        inside(&debian);
        let ask = Ask {
            timeout: world::PATIENCE,
            force: false,
        };
        assert_eq!(
            debian.act(Action::Shutdown(ask)).await,
            "OK",
            "systemd obeys SIGRTMIN+3"
        );
        debian.node.network().teardown().await.unwrap();
    });
}

fn inside(debian: &Debian) {
    assert_eq!(debian.sh("hostname"), "deb\n");
    assert_eq!(debian.sh("hostname --fqdn"), "deb.example.org\n");
    assert!(
        debian
            .sh("cat /root/.ssh/authorized_keys")
            .contains("AAAA me")
    );
    // Its own network service has taken the card over, by our file.
    world::until("systemd-networkd", || {
        debian
            .sh("networkctl status eth0")
            .contains("05-eth0.network")
    });
    let status = debian.sh("networkctl status eth0");
    assert!(
        status.contains("/etc/systemd/network/05-eth0.network"),
        "{status}"
    );
    assert!(
        status.contains("10.64.0.30") && status.contains("10.64.0.1"),
        "{status}"
    );
    assert!(
        debian
            .sh("ip route")
            .contains("default via 10.64.0.1 dev eth0")
    );
    let console = debian.sh("systemctl is-active console-getty.service");
    assert_eq!(console, "active\n", "a login on the console");
    let ttys = debian.sh("systemctl is-active container-getty@1 container-getty@2");
    assert_eq!(ttys, "active\nactive\n", "and on each terminal");
    let console = debian.node.guests().console(KIND, debian.id).unwrap();
    let Console::Line { socket, .. } = console else {
        panic!("{console:?}");
    };
    let mut line = std::os::unix::net::UnixStream::connect(socket).unwrap();
    line.set_nonblocking(true).unwrap();
    let mut said = String::new();
    world::until("a login on what the console shows", || {
        let mut bytes = [0; 4096];
        let count = line.read(&mut bytes).unwrap_or(0);
        said.push_str(&String::from_utf8_lossy(&bytes[..count]));
        said.contains("deb login:")
    });
    assert_eq!(debian.sh("stat -c %u:%g /etc/shadow"), "0:42\n");
    assert!(debian.sh("cat /proc/1/status").contains("Seccomp:\t2"));
    let ping = ["-c1", "-W5", "10.64.0.30"];
    let output = Command::new("busybox")
        .arg("ping")
        .args(ping)
        .output()
        .unwrap();
    assert!(output.status.success());
}
