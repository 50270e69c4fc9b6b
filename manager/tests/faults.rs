// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Every step of every table of guests fails, with real disks, mounts, links, processes and control groups: what
//! promises to be undone leaves nothing, what promises to be repeatable succeeds when it is done again.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test")]

mod world;

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::time::Duration;

use atoll_manager::guest::create::Draft;
use atoll_manager::guest::destroy::{self, Destroy};
use atoll_manager::guest::move_disk::{self, Move};
use atoll_manager::guest::resize::{self, Resize};
use atoll_manager::guest::site::Seat;
use atoll_manager::guest::snapshot::abandon::{self, Abandon};
use atoll_manager::guest::snapshot::delete::{self, Delete};
use atoll_manager::guest::snapshot::roll_back::{self, RollBack};
use atoll_manager::guest::snapshot::take::{self, Take};
use atoll_manager::guest::start::Start;
use atoll_manager::guest::stop::{SHUTDOWN, STOP, Stop};
use atoll_manager::guest::tables::TABLES;
use atoll_manager::guest::vm::suspend::{self, Suspend};
use atoll_manager::guest::{
    Ask, ConfigUpdate, Phase, clone, container, guest, start, stop, strays, update, vm,
};
use atoll_manager::id::{GuestId, GuestKind};
use atoll_manager::reconcile::Reconciler;
use atoll_manager::storage::name::Format;
use atoll_manager::storage::section::Section;
use atoll_manager::task::{self, Fault, TaskContext, TaskStep, fault, run_steps};
use atoll_manager::{Node, Settings};
use tokio_util::sync::CancellationToken;

/// What a task can leave behind: files, store keys, mounts, links, control groups.
type Traces = BTreeSet<String>;

struct Ground {
    node: Node,
    state: tempfile::TempDir,
    id: GuestId,
    kind: GuestKind,
}

impl Ground {
    async fn new(kind: GuestKind) -> Self {
        let state = tempfile::Builder::new().prefix("at").tempdir().unwrap();
        let mut settings = Settings::new("n1", state.path());
        settings.bin_dir = world::bin_dir();
        settings.firmware_dir = world::make_firmware(state.path());
        let node = Node::open(settings).await.unwrap();
        let storage = node.settings().storage_dir();
        node.storage().ensure_local(&storage).await.unwrap();
        node.network().ensure().await.unwrap();
        let id = world::guest_number().try_into().unwrap();
        Self {
            node,
            state,
            id,
            kind,
        }
    }

    fn seat(&self) -> Seat {
        self.node.guests().site().seat(self.kind, self.id)
    }

    fn draft(&self, keys: &[(&str, &str)]) -> Draft {
        let keys = keys.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        Draft::new(self.seat(), keys.collect()).unwrap()
    }

    async fn traces(&self) -> Traces {
        let mut traces = Traces::new();
        for folder in ["run", "storage"] {
            walk(&self.state.path().join(folder), &mut traces);
        }
        for entry in self.node.store().list("nodes/").unwrap() {
            traces.insert(format!("{} {:?}", entry.key, entry.value));
        }
        let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
        let below = self.state.path().to_str().unwrap().to_owned();
        let mounts = mounts.lines().filter(|line| line.contains(&below));
        traces.extend(mounts.map(|line| line.split(' ').take(2).collect::<Vec<_>>().join(" ")));
        // Not /sys/class/net: the mount there shows the namespace that it was made in.
        let links = world::run("ip", &["-o", "link"]);
        let names = links.lines().filter_map(|line| line.split(": ").nth(1));
        traces.extend(names.map(|name| format!("link {name}")));
        let pattern = format!("*/atoll/?[tm]-{}*", self.id);
        // Not world::run: groups of other tests on this machine may go while find looks, and it complains.
        let find = ["/sys/fs/cgroup", "-type", "d", "-path", &pattern];
        let groups = std::process::Command::new("find").args(find).output();
        let groups = String::from_utf8_lossy(&groups.unwrap().stdout).into_owned();
        traces.extend(groups.lines().map(str::to_owned));
        traces.extend(dhcp_clients());
        traces
    }

    /// What there is while the guest runs, its process's log left out, and whether it is held.
    async fn running(&self) -> (bool, Traces) {
        let paused = self.node.guests().is_paused(self.kind, self.id).await;
        let log = format!("{} ", self.seat().run_folder().join("log").display());
        let traces = self.traces().await.into_iter();
        (
            paused,
            traces.filter(|trace| !trace.starts_with(&log)).collect(),
        )
    }

    /// Runs a table that must succeed.
    async fn pass<C>(&self, steps: &[TaskStep<C>], mut context: C) {
        let task = TaskContext::detached(fault::upid(), None);
        run_steps(steps, &mut context, &task).await.unwrap();
    }

    /// Ends the guest and removes it, whatever state it is in.
    async fn forget(&self) {
        let seat = self.seat();
        if seat.config().is_err() {
            return;
        }
        let task = TaskContext::detached(fault::upid(), None);
        stop(&seat, Ask::default(), &task).await.unwrap();
        self.pass(destroy::STEPS, Destroy::new(seat, false)).await;
    }
}

/// The host's DHCP clients, from the moment they are spawned.
fn dhcp_clients() -> Option<String> {
    let folders = std::fs::read_dir("/proc").unwrap().flatten();
    let commands = folders.filter_map(|folder| std::fs::read(folder.path().join("cmdline")).ok());
    let commands = commands.map(|command| String::from_utf8_lossy(&command).into_owned());
    let count = commands
        .filter(|command| command.contains("\0udhcpc\0"))
        .count();
    (count > 0).then(|| format!("{count} DHCP clients"))
}

/// Names and sizes below a folder; sockets and logs of the programs themselves are left out, and what is in a file
/// system that is mounted there: a container's init is at work in it (busybox's ifup writes /var/run/ifstate.new, and
/// renames it), and that there is a mount is a trace of its own.
fn walk(folder: &Path, traces: &mut Traces) {
    let here = std::fs::metadata(folder).map(|folder| folder.dev()).ok();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let (path, kind) = (entry.path(), entry.metadata().unwrap());
        if kind.is_dir() {
            traces.insert(format!("{}", path.display()));
            if Some(kind.dev()) == here {
                walk(&path, traces);
            }
        } else if !["dnsmasq", "/dhcp-net"]
            .iter()
            .any(|name| path.to_string_lossy().contains(name))
        {
            traces.insert(format!("{} {}", path.display(), kind.len()));
        }
    }
}

/// The folder of all containers is made once and stays.
fn make_lasting_folders(ground: &Ground) {
    std::fs::create_dir_all(ground.node.guests().site().containers_folder()).unwrap();
    std::fs::create_dir_all(ground.state.path().join("storage/images")).unwrap();
}

const VM: &[(&str, &str)] = &[
    ("name", "probe"),
    ("memory", "64"),
    ("kernel", "local:snippets/probe"),
    ("cmdline", "stay"),
    ("scsi0", "local:0.0625"),
    ("efidisk0", "local:1,pre-enrolled-keys=1"),
    ("ide2", "none,media=cdrom"),
    ("net0", "virtio=BC:24:11:00:00:01,bridge=vmbr0"),
];

#[test]
fn machines() {
    world::isolated("machines", async || {
        let ground = Ground::new(GuestKind::Vm).await;
        make_lasting_folders(&ground);
        let make = async || (&ground, ground.draft(VM));
        let traces = async |ground: &&Ground| ground.traces().await;
        fault::fails_cleanly(vm::create::STEPS, make, traces).await;

        let created = async || {
            ground.forget().await;
            ground.pass(vm::create::STEPS, ground.draft(VM)).await;
            &ground
        };
        let grow =
            async |ground: &&Ground| Resize::new(ground.seat(), "scsi0".into(), "80M".into());
        let sizes = async |ground: &&Ground| {
            let config = ground.seat().config().unwrap();
            config.get("scsi0").map(str::to_owned)
        };
        fault::can_be_repeated(resize::STEPS, resize::STEPS, created, grow, sizes).await;
        let end = async |ground: &&Ground| Destroy::new(ground.seat(), false);
        fault::can_be_repeated(destroy::STEPS, destroy::STEPS, created, end, traces).await;
        ground.pass(vm::create::STEPS, ground.draft(VM)).await;
        copies(&ground).await;
        moves(&ground).await;
        cut_off(&ground).await;
        running_machines(&ground).await;
    });
}

async fn running_machines(ground: &Ground) {
    let kvm = std::fs::File::options()
        .read(true)
        .write(true)
        .open("/dev/kvm");
    if !world::has_binary("atoll-vmm") || kvm.is_err() {
        println!("ATOLL-SKIP: machines cannot be started here");
        return;
    }
    let snippets = ground.state.path().join("storage/snippets");
    std::fs::create_dir_all(&snippets).unwrap();
    let (vmm, probe) = (world::bin_dir().join("atoll-vmm"), snippets.join("probe"));
    let arguments = ["probe", "--extract", probe.to_str().unwrap()];
    world::run(vmm.to_str().unwrap(), &arguments);
    ground.forget().await;
    ground.pass(vm::create::STEPS, ground.draft(VM)).await;
    let new = || Start::new(ground.seat());
    let traces = async |ground: &&Ground| ground.traces().await;
    fault::fails_cleanly(vm::start::STEPS, async || (ground, new()), traces).await;

    held_while_copied(ground).await;
    ends_repeatably(ground).await;
    ground.forget().await;
}

/// Takes a snapshot of the guest while it runs: it goes on afterwards, and also when the copy fails.
async fn held_while_copied(ground: &Ground) {
    let task = TaskContext::detached(fault::upid(), None);
    start(&ground.seat(), &task).await.unwrap();
    let paused = async || {
        let guests = ground.node.guests();
        guests.is_paused(ground.kind, ground.id).await
    };
    let take = || Take::new(ground.seat(), "running".into(), String::new());
    let fails = take::STEPS
        .iter()
        .position(|step| step.name == "copy disks");
    let fault = task::Fault {
        step: fails.unwrap(),
        moment: task::Moment::After,
    };
    let task = TaskContext::detached(fault::upid(), Some(fault));
    assert!(run_steps(take::STEPS, &mut take(), &task).await.is_err());
    assert!(!paused().await && task.warnings() == 0);
    ground.pass(take::STEPS, take()).await;
    assert!(!paused().await);
    let delete = Delete::new(ground.seat(), "running".into());
    ground.pass(delete::STEPS, delete).await;
    if ground.kind == GuestKind::Container {
        return abandoned(ground, take::STEPS, take).await;
    }
    let with_memory = || Take::new(ground.seat(), "warm".into(), String::new()).with_memory();
    let state = async |ground: &&Ground| ground.running().await;
    fault::fails_cleanly(take::STEPS, async || (ground, with_memory()), state).await;
    let suspend = || Suspend::new(ground.seat(), None);
    fault::fails_cleanly(suspend::STEPS, async || (ground, suspend()), state).await;
    abandoned(ground, take::STEPS, with_memory).await;
    abandoned(ground, suspend::STEPS, suspend).await;
    suspended(ground).await;
}

/// A daemon that is killed when the suspension is complete, and the next one at the end of the start after it: the
/// machine ends, and goes on, and nothing of it is left.
async fn suspended(ground: &Ground) {
    let reconcile = async || {
        let (guests, network) = (ground.node.guests().clone(), ground.node.network().clone());
        Reconciler::new(guests, network).tick().await;
    };
    // The first one notes the start of the host.
    reconcile().await;
    let before = ground.running().await;
    ground
        .pass(suspend::STEPS, Suspend::new(ground.seat(), None))
        .await;
    let phase = || guest(&ground.seat()).phase();
    for _ in 0..100 {
        reconcile().await;
        if phase() == Phase::Stopped {
            break;
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(phase(), Phase::Stopped);
    let failed = Fault {
        step: start_steps() - 1,
        moment: task::Moment::After,
    };
    let task = TaskContext::detached(fault::upid(), Some(failed));
    assert!(start(&ground.seat(), &task).await.is_err());
    assert_eq!(phase(), Phase::Stopped);
    assert_eq!(
        ground.seat().config().unwrap().get("lock"),
        Some("suspended")
    );
    ground
        .pass(vm::start::STEPS, Start::new(ground.seat()))
        .await;
    reconcile().await;
    assert_eq!(ground.running().await, before);
}

fn start_steps() -> usize {
    vm::start::STEPS.len()
}

/// What a daemon leaves that is killed in one of these tables, with the guest held: the next one lets the guest go
/// on and removes the rest, at whatever step that fails at first.
async fn abandoned<C>(ground: &Ground, steps: &[TaskStep<C>], context: impl Fn() -> C) {
    let cut_off = async || {
        let mut context = context();
        let task = TaskContext::detached(fault::upid(), None);
        for step in &steps[..3] {
            (step.run)(&mut context, &task).await.unwrap();
        }
        ground
    };
    let abandon = async |ground: &&Ground| Abandon::new(ground.seat());
    let state = async |ground: &&Ground| ground.running().await;
    let before = state(&ground).await;
    fault::can_be_repeated(abandon::STEPS, abandon::STEPS, cut_off, abandon, state).await;
    assert_eq!(state(&ground).await, before);
}

/// Fails the tables of snapshots and clones, at each step.
async fn copies(ground: &Ground) {
    let traces = async |ground: &&Ground| ground.traces().await;
    let take = || Take::new(ground.seat(), "before".into(), "note".into());
    fault::fails_cleanly(take::STEPS, async || (ground, take()), traces).await;
    let other = u32::from(ground.id) + 1;
    let target = || {
        let site = ground.node.guests().site();
        site.seat(ground.kind, other.try_into().unwrap())
    };
    let copy = || clone::Cloning::new(ground.seat(), target(), clone::Wish::default()).unwrap();
    fault::fails_cleanly(clone::STEPS, async || (ground, copy()), traces).await;
    ground.pass(clone::STEPS, copy()).await;
    ground
        .pass(destroy::STEPS, Destroy::new(target(), false))
        .await;

    let lines = async |ground: &&Ground| {
        let config = ground.seat().config().unwrap();
        let files = ground.traces().await.into_iter();
        let files = files.filter(|trace| trace.contains("/storage/"));
        let files: Vec<_> = files.collect();
        (
            config.get("parent").map(str::to_owned),
            config.sections.len(),
            files,
        )
    };
    let taken = async || {
        if !ground
            .seat()
            .config()
            .unwrap()
            .sections
            .contains_key("before")
        {
            ground.pass(take::STEPS, take()).await;
        }
        ground
    };
    let back = async |ground: &&Ground| RollBack::new(ground.seat(), "before".into());
    fault::can_be_repeated(roll_back::STEPS, roll_back::STEPS, taken, back, lines).await;
    let delete = async |ground: &&Ground| Delete::new(ground.seat(), "before".into());
    fault::can_be_repeated(delete::STEPS, delete::STEPS, taken, delete, lines).await;
}

/// Fails a disk's move to another format at each step, then moves it.
async fn moves(ground: &Ground) {
    let traces = async |ground: &&Ground| ground.traces().await;
    let to = |format| {
        let wish = move_disk::Wish {
            disk: "scsi0".into(),
            storage: None,
            format: Some(format),
            deletes: false,
            bytes_per_second: None,
        };
        Move::new(ground.seat(), wish)
    };
    let start = async || (ground, to(Format::Qcow2));
    fault::fails_cleanly(move_disk::STEPS, start, traces).await;
    let mut moving = to(Format::Qcow2);
    let task = TaskContext::detached(fault::upid(), None);
    run_steps(move_disk::STEPS, &mut moving, &task)
        .await
        .unwrap();
    let config = ground.seat().config().unwrap();
    let (disk, unused) = (config.get("scsi0").unwrap(), config.get("unused0").unwrap());
    assert!(disk.contains(".qcow2,size="), "{disk}");
    assert!(unused.ends_with(".raw"), "{unused}");
    moving.delete_former().await.unwrap();
    assert_eq!(ground.seat().config().unwrap().get("unused0"), None);
    assert!(
        !ground
            .state
            .path()
            .join("storage/images")
            .join(unused.trim_start_matches("local:"))
            .exists()
    );
    let same = run_steps(move_disk::STEPS, &mut to(Format::Qcow2), &task).await;
    assert_eq!(
        same.unwrap_err().to_string(),
        "you can't move to the same storage with same format"
    );
}

/// A daemon that is killed while it moves a disk, after each step: the next one lists the half-made volume as unused,
/// and nothing that the guest has.
async fn cut_off(ground: &Ground) {
    let disk = || {
        ground
            .seat()
            .config()
            .unwrap()
            .get("scsi0")
            .unwrap()
            .to_owned()
    };
    let unused = || {
        let values = ground.seat().config().unwrap().current.values;
        let unused = values
            .into_iter()
            .filter(|(key, _)| key.starts_with("unused"));
        unused.map(|(_, volume)| volume).collect::<BTreeSet<_>>()
    };
    let images = async || {
        let local = "local".parse().unwrap();
        let listed = ground.node.storage().open(&local).unwrap().list().await;
        listed
            .unwrap()
            .into_iter()
            .map(|volume| format!("local:{}", volume.name))
            .collect::<BTreeSet<_>>()
    };
    // The same folder by another name: what is there has two names, and is no stray for that.
    let storage = ground.node.storage();
    let local = storage.section(&"local".parse().unwrap()).unwrap();
    let name = "twin".parse().unwrap();
    let twin = Section { name, ..local };
    storage.create(twin.clone()).await.unwrap();
    let task = TaskContext::detached(fault::upid(), None);
    for steps in 1..move_disk::STEPS.len() {
        let (before, there) = (disk(), images().await);
        let wish = move_disk::Wish {
            disk: "scsi0".into(),
            storage: None,
            format: Some(Format::Raw),
            deletes: false,
            bytes_per_second: None,
        };
        let mut moving = Move::new(ground.seat(), wish);
        for step in &move_disk::STEPS[..steps] {
            (step.run)(&mut moving, &task).await.unwrap();
        }
        // As the end of its daemon does.
        drop(moving);
        let site = ground.node.guests().site().clone();
        strays::run(site, CancellationToken::new()).await;
        let made: BTreeSet<_> = images().await.difference(&there).cloned().collect();
        assert_eq!(made.len(), usize::from(steps > 1));
        assert_eq!((disk(), unused()), (before, made), "{steps} steps");
        if steps > 1 {
            let delete = BTreeSet::from(["unused0".to_owned()]);
            let change = ConfigUpdate {
                delete,
                ..ConfigUpdate::default()
            };
            let updated = update::update(&ground.seat(), change, None).await;
            updated.unwrap();
        }
        assert_eq!(images().await, there);
    }
    storage.remove(&twin.name).await.unwrap();
}

/// Fails the tables that end a guest, at each step.
async fn ends_repeatably(ground: &Ground) {
    let running = async || {
        let guests = ground.node.guests();
        let status = guests.status(ground.kind, ground.id).await.unwrap();
        if !status.running {
            let task = TaskContext::detached(fault::upid(), None);
            start(&ground.seat(), &task).await.unwrap();
        }
        ground
    };
    let ask = Ask {
        timeout: Duration::from_millis(300),
        force: true,
    };
    let end = async |ground: &&Ground| Stop::new(ground.seat(), ask);
    let traces = async |ground: &&Ground| ground.traces().await;
    fault::can_be_repeated(STOP, STOP, running, end, traces).await;
    fault::can_be_repeated(SHUTDOWN, STOP, running, end, traces).await;
}

const CONTAINER: &[(&str, &str)] = &[
    ("hostname", "box"),
    ("memory", "128"),
    ("rootfs", "local:0.0625"),
    ("unprivileged", "1"),
    (
        "net0",
        "name=eth0,bridge=vmbr0,hwaddr=BC:24:11:00:00:02,ip=dhcp,host-managed=1",
    ),
];

#[test]
fn containers() {
    world::isolated("containers", async || {
        let ground = Ground::new(GuestKind::Container).await;
        let template = ground
            .state
            .path()
            .join("storage/template/cache/busybox.tar.gz");
        if !world::make_template(&template) {
            return;
        }
        make_lasting_folders(&ground);
        let create = || {
            let template = "local:vztmpl/busybox.tar.gz".parse().unwrap();
            container::create::Create::new(ground.draft(CONTAINER), template, None, None)
        };
        let traces = async |ground: &&Ground| ground.traces().await;
        fault::fails_cleanly(
            container::create::STEPS,
            async || (&ground, create()),
            traces,
        )
        .await;
        if !world::has_binary("atoll-ct") {
            return;
        }
        ground.pass(container::create::STEPS, create()).await;
        let new = || Start::new(ground.seat());
        // The file system inside the image is mounted while it starts: the image's size stays, which is what is seen.
        fault::fails_cleanly(container::start::STEPS, async || (&ground, new()), traces).await;

        copies(&ground).await;
        held_while_copied(&ground).await;
        ends_repeatably(&ground).await;
        ground.forget().await;
    });
}

/// The tests above name their tables; this one says when the list has one more.
#[test]
fn no_table_is_left_out() {
    let tested = [
        "qmcreate",
        "qmstart",
        "qmsuspend",
        "vzcreate",
        "vzstart",
        // In tests/images.rs.
        "vzupdate",
        "stop",
        "shutdown",
        "resize",
        "snapshot",
        "rollback",
        "delsnapshot",
        "abandon",
        "clone",
        "move",
        "destroy",
    ];
    let listed: Vec<&str> = TABLES.iter().map(|table| table.name).collect();
    assert_eq!(listed, tested);
    let steps: BTreeMap<_, _> = TABLES.iter().map(|t| (t.name, (t.steps)().len())).collect();
    assert!(steps.values().all(|count| *count > 0), "{steps:?}");
}
