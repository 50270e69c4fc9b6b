// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A real virtual machine with the probe guest, through the manager as the API uses it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod world;

use std::collections::BTreeMap;

use atoll_manager::guest::{Action, Ask};
use atoll_manager::id::{GuestId, GuestKind};
use atoll_manager::task::Upid;
use atoll_manager::{Node, Settings};

const USER: &str = "root@pam";
const KIND: GuestKind = GuestKind::Vm;

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

async fn done(node: &Node, upid: Result<Upid, atoll_manager::error::Error>) -> String {
    let upid = upid.unwrap();
    let status = node.tasks().wait(&upid).await.unwrap();
    println!("{upid}: {:?}", node.tasks().log(&upid, 0, 0).unwrap());
    status
}

#[test]
fn a_machine_lives_and_leaves_nothing() {
    world::isolated("a_machine_lives_and_leaves_nothing", async || {
        if !world::has_binary("atoll-vmm") {
            return;
        }
        if std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/kvm")
            .is_err()
        {
            println!("ATOLL-SKIP: /dev/kvm cannot be opened");
            return;
        }
        let state = tempfile::Builder::new().prefix("at").tempdir().unwrap();
        let snippets = state.path().join("storage/snippets");
        std::fs::create_dir_all(&snippets).unwrap();
        let vmm = world::bin_dir().join("atoll-vmm");
        let probe = snippets.join("probe");
        world::run(
            vmm.to_str().unwrap(),
            &["probe", "--extract", probe.to_str().unwrap()],
        );
        let node = open(&state).await;
        let id: GuestId = world::guest_number().try_into().unwrap();

        let node = runs(node, &state, id).await;
        ends(&node, &state, id).await;
        node.network().teardown().await.unwrap();
    });
}

/// It is created, started, paused, and found again by another daemon.
async fn runs(node: Node, state: &tempfile::TempDir, id: GuestId) -> Node {
    let params = [
        ("name", "probe"),
        ("memory", "64"),
        ("kernel", "local:snippets/probe"),
        ("cmdline", "stay"),
        ("scsi0", "local:0.0625"),
        ("net0", "virtio,bridge=vmbr0"),
        ("start", "1"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()));
    let created = node.guests().create(KIND, id, BTreeMap::from(params), USER);
    assert_eq!(done(&node, created).await, "OK");
    let status = node.guests().status(KIND, id).await.unwrap();
    assert!(status.running && status.load.memory_bytes > 0, "{status:?}");
    assert_eq!(
        (status.name.as_str(), status.disk_bytes_max),
        ("probe", 64 << 20)
    );
    assert_eq!(
        done(&node, node.guests().act(KIND, id, Action::Suspend, USER)).await,
        "OK"
    );
    assert!(node.guests().is_paused(KIND, id).await);

    // A daemon that is gone has lost nothing: another one finds the same machine.
    drop(node);
    let node = open(state).await;
    let adopted = node.guests().status(KIND, id).await.unwrap();
    assert_eq!(adopted.pid, status.pid);
    assert_eq!(
        done(&node, node.guests().act(KIND, id, Action::Resume, USER)).await,
        "OK"
    );
    assert!(!node.guests().is_paused(KIND, id).await);
    assert!(node.guests().console(KIND, id).unwrap().exists());
    node
}

/// It is shut down by force, started, stopped and destroyed.
async fn ends(node: &Node, state: &tempfile::TempDir, id: GuestId) {
    let ask = Ask {
        timeout: std::time::Duration::from_secs(1),
        force: true,
    };
    assert_eq!(
        done(
            node,
            node.guests().act(KIND, id, Action::Shutdown(ask), USER)
        )
        .await,
        "OK"
    );
    assert!(!node.guests().status(KIND, id).await.unwrap().running);
    assert_eq!(
        done(node, node.guests().act(KIND, id, Action::Start, USER)).await,
        "OK"
    );
    assert_eq!(
        done(node, node.guests().act(KIND, id, Action::Reset, USER)).await,
        "OK"
    );
    assert_eq!(
        done(node, node.guests().act(KIND, id, Action::Stop, USER)).await,
        "OK"
    );
    assert!(!state.path().join(format!("run/vm-{id}")).exists());
    let links = world::run("ip", &["-o", "link"]);
    assert!(!links.contains("tap"), "{links}");
    assert_eq!(
        done(node, node.guests().destroy(KIND, id, false, USER)).await,
        "OK"
    );
    assert!(!state.path().join(format!("storage/images/{id}")).exists());
}
