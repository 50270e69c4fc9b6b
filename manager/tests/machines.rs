// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A real virtual machine with the probe guest, through the manager as the API uses it.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod world;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use atoll_manager::guest::move_disk::{self, Move, Wish};
use atoll_manager::guest::vm::{Vm, saved};
use atoll_manager::guest::{Action, Applied, Ask, ConfigUpdate, Console, snapshot};
use atoll_manager::id::{GuestId, GuestKind};
use atoll_manager::reconcile::Reconciler;
use atoll_manager::storage::name::{VolumeId, parse_format};
use atoll_manager::task::{TaskContext, Upid, fault, run_steps};
use atoll_manager::{Node, Settings};
use atoll_vmm_protocol::api::{
    MirrorInfo, MirrorStage, Request, SavingStage, Snapshot, SnapshotTaken,
};
use atoll_vmm_protocol::client::Client;

const USER: &str = "root@pam";
const KIND: GuestKind = GuestKind::Vm;
const USERFAULTFD: &str = "/dev/userfaultfd";

async fn open(state: &tempfile::TempDir) -> Node {
    let mut settings = Settings::new("n1", state.path());
    settings.bin_dir = world::bin_dir();
    settings.firmware_dir = world::make_firmware(state.path());
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

/// What a task that succeeds says.
async fn log_of(node: &Node, upid: Result<Upid, atoll_manager::error::Error>) -> String {
    let upid = upid.unwrap();
    let status = node.tasks().wait(&upid).await.unwrap();
    let log = format!("{:?}", node.tasks().log(&upid, 0, 0).unwrap());
    assert_eq!(status, "OK", "{log}");
    println!("{upid}: {log}");
    log
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

        new_guests_boot_by_firmware(&node, &state, id).await;
        let node = runs(node, &state, id).await;
        changes_its_disc(&node, &state, id).await;
        moves_its_disks(&node, &state, id).await;
        keeps_a_limit(&node, &state, id).await;
        goes_on_from_its_memory(&node, &state, id).await;
        devices_come_and_go(&node, id).await;
        is_saved_while_it_runs(&node, &state, id).await;
        ends(&node, &state, id).await;
        node.network().teardown().await.unwrap();
    });
}

/// Who says nothing about it gets firmware with variables beside the disk; who asks for legacy boot is warned.
async fn new_guests_boot_by_firmware(node: &Node, state: &tempfile::TempDir, id: GuestId) {
    let create = async |keys: &[(&str, &str)]| {
        let keys = keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let created = node.guests().create(KIND, id, keys.collect(), USER);
        let status = done(node, created).await;
        let config = node.guests().site().seat(KIND, id).config().unwrap();
        let destroyed = node.guests().destroy(KIND, id, false, USER);
        (status, config, done(node, destroyed).await)
    };
    let (status, config, destroyed) = create(&[("scsi0", "local:0.0625")]).await;
    assert_eq!((status.as_str(), destroyed.as_str()), ("OK", "OK"));
    assert_eq!(config.get("bios"), Some("ovmf"));
    let variables = config.get("efidisk0").unwrap();
    let prefix = format!("local:{id}/vm-{id}-disk-");
    assert!(variables.starts_with(&prefix) && variables.contains(",efitype=4m,size="));
    let images = state.path().join(format!("storage/images/{id}"));
    assert!(!images.exists(), "the variables go with the guest");
    let (status, config, _) = create(&[("bios", "seabios")]).await;
    assert_eq!(
        (status.as_str(), config.get("efidisk0")),
        ("WARNINGS: 1", None)
    );
}

/// The probe's load, which checks its memory and its disk, and tells its rounds on the serial port.
struct Load {
    serial: UnixStream,
    text: String,
}

impl Load {
    fn of(node: &Node, id: GuestId) -> Self {
        let console = node.guests().console(KIND, id).unwrap();
        let Console::Line { socket, .. } = console else {
            panic!("a machine's console is a line: {console:?}");
        };
        let serial = UnixStream::connect(socket).unwrap();
        let timeout = Duration::from_secs(1);
        serial.set_read_timeout(Some(timeout)).unwrap();
        let text = String::new();
        Self { serial, text }
    }

    fn type_line(&mut self, line: &str) {
        self.serial.write_all(line.as_bytes()).unwrap();
        self.serial.write_all(b"\r").unwrap();
    }

    fn wait_for(&mut self, expected: &str) -> String {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            if let Some(at) = self.text.find(expected) {
                let rest = self.text.split_off(at + expected.len());
                return std::mem::replace(&mut self.text, rest);
            }
            let so_far = &self.text;
            assert!(Instant::now() < deadline, "no {expected:?} in {so_far:?}");
            let mut chunk = [0; 4096];
            if let Ok(count) = self.serial.read(&mut chunk) {
                let said = String::from_utf8_lossy(&chunk[..count]);
                self.text.push_str(&said);
            }
        }
    }

    /// The next rounds that it tells.
    fn rounds(&mut self) -> u64 {
        loop {
            self.wait_for("load ");
            if let Ok(rounds) = self.wait_for("\r\n").trim().parse() {
                return rounds;
            }
        }
    }
}

/// Suspended to disk and started, and taken back to a snapshot with its memory: the load goes on from that moment, with
/// a memory and a disk that are as it left them.
async fn goes_on_from_its_memory(node: &Node, state: &tempfile::TempDir, id: GuestId) {
    let seat = node.guests().site().seat(KIND, id);
    let images = state.path().join(format!("storage/images/{id}"));
    let mut load = Load::of(node, id);
    load.type_line("");
    load.wait_for("probe> ");
    load.type_line("load");
    let first = load.rounds();
    let snapshot = node.guests().snapshot(KIND, id, "warm", "", true, USER);
    let told = log_of(node, snapshot).await;
    assert!(told.contains("(--share-kernel)"), "it is held: {told}");
    let kept = images.join(format!("vm-{id}-state-warm.raw"));
    assert!(std::fs::metadata(&kept).unwrap().len() > 64 << 20);
    assert!(snapshot::list(&seat.config().unwrap())[0].has_memory);
    let later = std::iter::repeat_with(|| load.rounds()).find(|rounds| *rounds > 4 * first);

    let suspended = node.guests().suspend_to_disk(id, None, USER);
    assert_eq!(done(node, suspended).await, "OK");
    let config = seat.config().unwrap();
    let volume = format!("local:{id}/vm-{id}-state-suspend.raw");
    assert_eq!(config.get("lock"), Some("suspended"));
    assert_eq!(config.get("vmstate"), Some(volume.as_str()));
    assert!(!state.path().join(format!("run/vm-{id}")).exists());
    let resumed = node.guests().act(KIND, id, Action::Resume, USER);
    assert_eq!(done(node, resumed).await, "OK");
    let mut load = Load::of(node, id);
    assert!(load.rounds() > later.unwrap());
    let config = seat.config().unwrap();
    assert_eq!((config.get("lock"), config.get("vmstate")), (None, None));
    assert!(!images.join(format!("vm-{id}-state-suspend.raw")).exists());

    let back = node.guests().roll_back(KIND, id, "warm", false, USER);
    assert_eq!(done(node, back).await, "OK");
    let mut load = Load::of(node, id);
    let rounds = load.rounds();
    assert!(rounds >= first && rounds < later.unwrap(), "{rounds}");
    load.type_line("");
    let said = load.wait_for("load ended after ");
    assert!(!said.contains("FAILED"), "{said}");
    let deleted = node.guests().delete_snapshot(KIND, id, "warm", USER);
    assert_eq!(done(node, deleted).await, "OK");
    assert!(!kept.exists());
}

/// A machine that shares no memory is held while its disks are copied, and goes on while its memory is written. Taken
/// back, it goes on from the moment of its disks.
async fn is_saved_while_it_runs(node: &Node, state: &tempfile::TempDir, id: GuestId) {
    let device = File::options().read(true).write(true).open(USERFAULTFD);
    let Ok(device) = device.inspect_err(|why| println!("ATOLL-SKIP: {USERFAULTFD}: {why}")) else {
        return;
    };
    let images = state.path().join(format!("storage/images/{id}"));
    let seat = node.guests().site().seat(KIND, id);
    let vm = Vm::new(seat.clone());
    let act = async |action| {
        let acted = node.guests().act(KIND, id, action, USER);
        assert_eq!(done(node, acted).await, "OK");
    };
    act(Action::Stop).await;
    let alone = ["sharekernel".to_owned()].into();
    let update = ConfigUpdate::new(KIND, BTreeMap::new(), alone, Default::default(), None);
    node.guests()
        .update(KIND, id, update.unwrap())
        .await
        .unwrap();
    act(Action::Start).await;
    let mut load = Load::of(node, id);
    load.type_line("");
    load.wait_for("probe> ");
    load.type_line("load");
    let first = load.rounds();
    let snapshot = node.guests().snapshot(KIND, id, "live", "", true, USER);
    let told = log_of(node, snapshot).await;
    assert!(told.contains("the guest goes on, after "), "{told}");
    assert!(told.contains("wrote memory: "), "{told}");
    let volume = format!("local:{id}/vm-{id}-state-live.raw");
    let info = vm.last_saving().await.unwrap().unwrap();
    assert_eq!((info.stage, &info.to), (SavingStage::Completed, &volume));
    let later = std::iter::repeat_with(|| load.rounds()).find(|rounds| *rounds > 4 * first);
    let back = node.guests().roll_back(KIND, id, "live", false, USER);
    assert_eq!(done(node, back).await, "OK");
    let mut load = Load::of(node, id);
    let rounds = load.rounds();
    assert!(rounds >= first && rounds < later.unwrap(), "{rounds}");

    suspends_with_its_progress(node, id).await;
    let mut load = Load::of(node, id);
    assert!(load.rounds() > rounds);

    // One that nobody finishes: so slow that it is not complete before the next daemon gives it up.
    let file = || tempfile::tempfile().unwrap();
    let files = [file(), file(), file(), device];
    let volume: VolumeId = volume.parse().unwrap();
    let body = Snapshot {
        to: volume.to_string(),
        live: Some(true),
        max_bytes_per_second: Some(1),
        ..Snapshot::default()
    };
    let client = Client::new(vm.api_socket());
    let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
    let _: SnapshotTaken = client
        .ask_with_files(Request::Snapshot, &body, &files)
        .unwrap();
    let info = vm.last_saving().await.unwrap().unwrap();
    assert_eq!(info.stage, SavingStage::Saving);
    saved::give_up(&seat, Some(&volume)).await.unwrap();
    let info = vm.last_saving().await.unwrap().unwrap();
    assert_eq!(info.stage, SavingStage::Cancelled);
    assert!(!images.join(format!("vm-{id}-state-live.raw")).exists());
    load.rounds();
    load.type_line("");
    let said = load.wait_for("load ended after ");
    assert!(!said.contains("FAILED"), "{said}");
    let deleted = node.guests().delete_snapshot(KIND, id, "live", USER);
    assert_eq!(done(node, deleted).await, "OK");
}

/// It is held and written as a live snapshot is, so that the task tells how far it is.
async fn suspends_with_its_progress(node: &Node, id: GuestId) {
    let suspended = node.guests().suspend_to_disk(id, None, USER);
    let told = log_of(node, suspended).await;
    assert!(told.contains("wrote memory: "), "{told}");
    let resumed = node.guests().act(KIND, id, Action::Resume, USER);
    assert_eq!(done(node, resumed).await, "OK");
}

/// A disc goes in and out of its drive while the machine runs; everything else of a drive waits.
async fn changes_its_disc(node: &Node, state: &tempfile::TempDir, id: GuestId) {
    let isos = state.path().join("storage/template/iso");
    std::fs::create_dir_all(&isos).unwrap();
    std::fs::write(isos.join("x.iso"), [1; 4096]).unwrap();
    let set = async |key: &str, value: &str| {
        let set = BTreeMap::from([(key.to_owned(), value.to_owned())]);
        let none = std::collections::BTreeSet::new();
        let update = ConfigUpdate::new(KIND, set, none.clone(), none, None).unwrap();
        node.guests().update(KIND, id, update).await
    };
    let now = |applied: &Applied| applied.now.len();
    let inserted = set("ide2", "local:iso/x.iso,media=cdrom").await.unwrap();
    assert_eq!((now(&inserted), inserted.pending.len()), (1, 0));
    let ejected = set("ide2", "none,media=cdrom").await.unwrap();
    assert_eq!((now(&ejected), ejected.pending.len()), (1, 0));
    let missing = set("ide2", "local:iso/y.iso,media=cdrom").await;
    assert!(missing.unwrap_err().to_string().contains("does not exist"));
}

/// A disk goes to another volume and back while the machine runs. Whatever step fails, the machine and its config say
/// afterwards where it was, and the guest goes on.
async fn moves_its_disks(node: &Node, state: &tempfile::TempDir, id: GuestId) {
    let seat = node.guests().site().seat(KIND, id);
    let wish = |format, deletes| Wish {
        disk: "virtio2".into(),
        storage: None,
        format: parse_format(format),
        deletes,
        bytes_per_second: None,
    };
    let images = state.path().join(format!("storage/images/{id}"));
    let describe = async |(): &()| {
        let files = std::fs::read_dir(&images).unwrap();
        let files = files.map(|file| file.unwrap().file_name());
        let config = seat.config().unwrap().current;
        let mirrors = Vm::new(seat.clone()).mirrors().await.unwrap();
        let paused = node.guests().is_paused(KIND, id).await;
        let files: std::collections::BTreeSet<_> = files.collect();
        (files, config.values, mirrors.len(), paused)
    };
    let make = async || ((), Move::new(seat.clone(), wish("raw", false)));
    fault::fails_cleanly(move_disk::STEPS, make, describe).await;

    let moved = node.guests().move_disk(KIND, id, wish("raw", true), USER);
    assert_eq!(done(node, moved).await, "OK");
    let config = seat.config().unwrap();
    let value = config.get("virtio2").unwrap().to_owned();
    assert!(value.ends_with(".raw,size=1M"), "{value}");
    assert_eq!(config.get("unused0"), None, "the former volume is deleted");
    let name = value.split([',', '/']).nth(1).unwrap();
    let content = std::fs::read(images.join(name)).unwrap();
    assert!(content.len() == 1 << 20 && content.iter().all(|byte| *byte == 5));
    let mirrors = Vm::new(seat.clone()).mirrors().await.unwrap();
    assert!(mirrors[0].path.ends_with(name), "{mirrors:?}");
    assert!(!node.guests().is_paused(KIND, id).await);

    // A daemon that ends between the switch and the config: the next one takes the switch back.
    let cut_off = &move_disk::STEPS[..4];
    let before = describe(&()).await.0;
    let task = TaskContext::detached(fault::upid(), None);
    let mut moving = Move::new(seat.clone(), wish("qcow2", false));
    run_steps(cut_off, &mut moving, &task).await.unwrap();
    drop(moving);
    assert!(node.guests().is_paused(KIND, id).await);
    let (guests, network) = (node.guests().clone(), node.network().clone());
    Reconciler::new(guests, network).tick().await;
    assert!(!node.guests().is_paused(KIND, id).await);
    assert!(Vm::new(seat.clone()).mirrors().await.unwrap().is_empty());
    // The volume of the move that was cut off is nobody's, as after any task whose daemon was killed.
    let left = describe(&()).await.0;
    for file in left.difference(&before) {
        std::fs::remove_file(images.join(file)).unwrap();
    }
    assert_eq!(seat.config().unwrap().get("virtio2"), Some(value.as_str()));

    // Firmware's variables are the machine's own file.
    let mut variables = wish("raw", false);
    variables.disk = "efidisk0".into();
    let refused = node.guests().move_disk(KIND, id, variables, USER);
    assert!(done(node, refused).await.contains("does not exist"));
}

/// A limit reaches the machine that copies: with this one the task does not end by itself.
async fn keeps_a_limit(node: &Node, state: &tempfile::TempDir, id: GuestId) {
    let seat = node.guests().site().seat(KIND, id);
    let images = state.path().join(format!("storage/images/{id}"));
    let value = seat.config().unwrap().get("scsi0").unwrap().to_owned();
    let image = images.join(value.split([',', '/']).nth(1).unwrap());
    let image = File::options().write(true).open(image).unwrap();
    image.write_all_at(&vec![5; 32 << 20], 32 << 20).unwrap();
    let before = seat.config().unwrap().current;
    let slow = Wish {
        disk: "scsi0".into(),
        storage: None,
        format: parse_format("qcow2"),
        deletes: false,
        bytes_per_second: Some(1024),
    };
    let moving = node.guests().move_disk(KIND, id, slow, USER).unwrap();
    let copies = async || {
        let mirrors = Vm::new(seat.clone()).mirrors().await.unwrap();
        let copying = |it: &MirrorInfo| it.stage == MirrorStage::Copying && it.copied_bytes > 0;
        mirrors.iter().any(|it| it.id == "scsi0" && copying(it))
    };
    while node.tasks().status(&moving).unwrap().end.is_none() && !copies().await {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for _ in 0..100 {
        assert!(copies().await, "it is over");
    }
    node.tasks().stop(&moving).unwrap();
    let status = node.tasks().wait(&moving).await.unwrap();
    assert!(status.contains("interrupted"), "{status}");
    assert_eq!(seat.config().unwrap().current, before);
    assert!(!node.guests().is_paused(KIND, id).await);
    image.set_len(32 << 20).unwrap();
    image.set_len(64 << 20).unwrap();
}

/// Disks and cards come while the machine runs; what does not go waits, and whoever asked is told.
async fn devices_come_and_go(node: &Node, id: GuestId) {
    let seat = node.guests().site().seat(KIND, id);
    let change = async |set: &[(&str, &str)], delete: &[&str]| {
        let set = set.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        let delete = delete.iter().map(|key| (*key).to_owned()).collect();
        let update = ConfigUpdate::new(KIND, set.collect(), delete, Default::default(), None);
        node.guests().update(KIND, id, update.unwrap()).await
    };
    let devices = async || {
        let info = Vm::new(seat.clone()).info().await.unwrap();
        let ids = info.devices.into_iter().map(|device| device.id);
        ids.collect::<Vec<_>>()
    };
    let new = [
        ("virtio5", "local:0.0625,format=qcow2"),
        ("scsi5", "local:0.0625,cache=writethrough"),
        ("net1", "virtio,bridge=vmbr0"),
    ];
    let added = change(&new, &[]).await.unwrap();
    assert_eq!((added.now.len(), added.pending.len()), (3, 0), "{added:?}");
    let there = devices().await;
    let keys = new.map(|(key, _)| key);
    assert!(
        keys.iter().all(|key| there.contains(&(*key).to_owned())),
        "{there:?}"
    );
    change(&[("hotplug", "0")], &[]).await.unwrap();
    let fixed = change(&[("scsi6", "local:0.0625")], &[]).await.unwrap();
    assert_eq!(fixed.pending, ["scsi6"]);
    change(&[], &["hotplug", "scsi6"]).await.unwrap();

    // The bridge is not VLAN-aware, and leads nowhere: nothing of that change happens.
    let card = seat.config().unwrap().get("net0").unwrap().to_owned();
    let refused = change(&[("net0", &format!("{card},tag=5"))], &[]).await;
    let refused = refused.unwrap_err().to_string();
    assert!(
        refused.starts_with("net0: tag=5: there is no physical interface"),
        "{refused}"
    );
    assert_eq!(seat.config().unwrap().get("net0"), Some(card.as_str()));

    // The probe guest may keep what it is asked for.
    let removed = change(&[], &keys).await;
    let left = devices().await;
    let config = seat.config().unwrap();
    for key in keys {
        let stays = left.contains(&key.to_owned());
        assert_eq!(config.get(key).is_some(), stays, "{key}: {removed:?}");
        assert_eq!(
            config.pending.delete.contains(key),
            stays,
            "{key}: {removed:?}"
        );
    }
    let told = format!("{removed:?}").contains("hotplug problem");
    assert_eq!(
        told,
        keys.iter().any(|key| left.contains(&(*key).to_owned())),
        "{removed:?}"
    );
}

/// A process has the pages of a file, not copies of them.
#[track_caller]
fn has_mapped(pid: Option<u32>, file: &std::path::Path) {
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", pid.unwrap())).unwrap();
    let inode = std::fs::metadata(file).unwrap().ino().to_string();
    // Addresses, permissions, offset, device, inode, path.
    let mut inodes = maps.lines().map(|line| line.split_whitespace().nth(4));
    assert!(inodes.any(|found| found == Some(&inode)), "{maps}");
}

/// It is created, started, paused, and found again by another daemon.
async fn runs(node: Node, state: &tempfile::TempDir, id: GuestId) -> Node {
    let params = [
        ("name", "probe"),
        ("memory", "64"),
        ("kernel", "local:snippets/probe"),
        ("cmdline", "stay"),
        ("sharekernel", "1"),
        ("scsi0", "local:0.0625"),
        ("ide2", "none,media=cdrom"),
        ("virtio1", "local:0.0625,format=qcow2,cache=writethrough"),
        (
            "virtio2",
            "local:0,import-from=local:import/x.raw,format=qcow2",
        ),
        ("net0", "virtio,bridge=vmbr0"),
        ("start", "1"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()));
    let import = state.path().join("storage/import");
    std::fs::create_dir_all(&import).unwrap();
    std::fs::write(import.join("x.raw"), vec![5; 1 << 20]).unwrap();
    let created = node.guests().create(KIND, id, BTreeMap::from(params), USER);
    assert_eq!(done(&node, created).await, "OK");
    let config = node.guests().site().seat(KIND, id).config().unwrap();
    let imported = config.get("virtio2").unwrap();
    let expected = format!("local:{id}/vm-{id}-disk-");
    assert!(
        imported.starts_with(&expected) && imported.ends_with(".qcow2,size=1M"),
        "{imported}"
    );
    let status = node.guests().status(KIND, id).await.unwrap();
    assert!(status.running && status.load.memory_bytes > 0, "{status:?}");
    has_mapped(status.pid, &state.path().join("storage/snippets/probe"));
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
    let console = node.guests().console(KIND, id).unwrap();
    assert!(
        matches!(&console, Console::Line { socket, tty: None } if socket.exists()),
        "{console:?}"
    );
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
