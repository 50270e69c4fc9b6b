// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll-vmm ctl`: sends one request to a running machine, and opens on its behalf what the request names, since
//! the machine's process can open nothing itself.

mod live;
mod upgrade;

use std::ffi::OsString;
use std::fs::{DirBuilder, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use atoll_vmm_protocol::api::{
    AddDisk, AddNet, BeginExport, BeginMirror, DISK_CONNECTIONS, EndExport, Exported,
    FAULT_CONNECTIONS, InsertDisk, Migrate, MigrationInfo, MigrationStage, RemovalStage,
    RemoveDevice, Request, Snapshot, SnapshotTaken, Upgrade, WhenLate,
};
use atoll_vmm_protocol::client::Client;
use atoll_vmm_protocol::spec::DiskSpec;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::cli::NetworkArguments;
use crate::relay::{self, Relay};
use crate::resources::{CardEnd, image_files};
use crate::saved::{MEMORY_FILE, SPEC_FILE, STATE_FILE, packed};
use crate::socket;

/// Most connections beside that for messages.
const CONNECTIONS_MAX: usize = 64;
/// How often a migration is asked how far it is.
const POLL: Duration = Duration::from_millis(20);
/// How long a machine's RAM may take to be written.
const SNAPSHOT_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// Sends a request whose body the command line gave, and gives the answer.
pub fn send(client: &Client, request: Request, body: &Map<String, Value>) -> anyhow::Result<Value> {
    match request {
        Request::Snapshot => {
            let body: Snapshot = serde_json::from_value(Value::Object(body.clone()))?;
            Ok(serde_json::to_value(snapshot(client, &body)?)?)
        }
        Request::Migrate => {
            let body: Migrate = serde_json::from_value(Value::Object(body.clone()))?;
            Ok(serde_json::to_value(migrate(client, &body)?)?)
        }
        Request::Upgrade => {
            let body: Upgrade = serde_json::from_value(Value::Object(body.clone()))?;
            Ok(serde_json::to_value(upgrade::upgrade(client, &body)?)?)
        }
        Request::InsertDisk => {
            let mut disc: InsertDisk = serde_json::from_value(Value::Object(body.clone()))?;
            let file = File::open(&disc.path);
            let file = file.with_context(|| format!("disc {}", disc.path.display()))?;
            disc.path = std::path::absolute(&disc.path)?;
            Ok(client.ask_with_files(request, &disc, &[file.as_fd()])?)
        }
        Request::AddDisk => {
            let mut body: AddDisk = serde_json::from_value(Value::Object(body.clone()))?;
            make_absolute(&mut body.disk)?;
            let files = image_files(&body.disk)?;
            with_files(client, request, &body, &files)
        }
        Request::AddNet => {
            let body: AddNet = serde_json::from_value(Value::Object(body.clone()))?;
            let files = CardEnd::open(&body.net)?.into_files();
            with_files(client, request, &body, &files)
        }
        Request::BeginExport => {
            let mut body: BeginExport = serde_json::from_value(Value::Object(body.clone()))?;
            let socket = std::path::absolute(&body.socket)?;
            body.socket = socket.display().to_string();
            let exported = begin_export(client, &body);
            if exported.is_err() {
                let _ = std::fs::remove_file(&socket);
            }
            exported
        }
        Request::EndExport => {
            let body: EndExport = serde_json::from_value(Value::Object(body.clone()))?;
            let exported: Exported = client.ask(Request::Export)?;
            let ended: Value = client.ask_with(request, &body)?;
            // The machine's process cannot reach it.
            let _ = std::fs::remove_file(&exported.socket);
            Ok(ended)
        }
        Request::BeginMirror => {
            let mut body: BeginMirror = serde_json::from_value(Value::Object(body.clone()))?;
            make_absolute(&mut body.to)?;
            let files = image_files(&body.to)?;
            with_files(client, request, &body, &files)
        }
        Request::RemoveDevice => {
            let body: RemoveDevice = serde_json::from_value(Value::Object(body.clone()))?;
            let removal = client.remove_device(&body)?;
            let RemoveDevice { id, .. } = body;
            anyhow::ensure!(
                removal.stage == RemovalStage::Gone,
                "the guest has not let {id} go: it has it still, and may let it go later; ask again, or say --force true"
            );
            Ok(serde_json::to_value(removal)?)
        }
        _ if request.route().parameters.is_empty() => Ok(client.ask(request)?),
        _ => Ok(client.ask_with(request, body)?),
    }
}

/// The machine's process is elsewhere, and so is whoever restores it.
fn make_absolute(disk: &mut DiskSpec) -> io::Result<()> {
    if !disk.path.as_os_str().is_empty() {
        disk.path = std::path::absolute(&disk.path)?;
    }
    for image in &mut disk.backing {
        image.path = std::path::absolute(&image.path)?;
    }
    if let Some(changes) = &mut disk.changes {
        *changes = std::path::absolute(&changes)?;
    }
    Ok(())
}

fn with_files(
    client: &Client,
    request: Request,
    body: &impl Serialize,
    files: &[File],
) -> anyhow::Result<Value> {
    let descriptors: Vec<_> = files.iter().map(File::as_fd).collect();
    Ok(client.ask_with_files(request, body, &descriptors)?)
}

/// Makes the socket and the fleeces of an export. The files have no name: their space is free when the export ends.
fn begin_export(client: &Client, body: &BeginExport) -> anyhow::Result<Value> {
    let socket = Path::new(&body.socket);
    socket::remove_stale(socket).with_context(|| format!("socket {}", body.socket))?;
    let listener = UnixListener::bind(socket).with_context(|| format!("socket {}", body.socket))?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    let mut descriptors = vec![OwnedFd::from(listener)];
    for _ in &body.disks {
        let fleece = tempfile::tempfile_in(&body.fleece);
        let fleece = fleece.with_context(|| format!("a fleece in {}", body.fleece))?;
        descriptors.push(fleece.into());
    }
    let descriptors: Vec<_> = descriptors.iter().map(OwnedFd::as_fd).collect();
    Ok(client.ask_with_files(Request::BeginExport, body, &descriptors)?)
}

/// Connects to the process that waits for the machine, lets the machine move there, and waits for the end. A
/// machine that has moved is told to end its process.
pub fn migrate(client: &Client, body: &Migrate) -> anyhow::Result<MigrationInfo> {
    let count = usize::try_from(body.connections.unwrap_or(1)).unwrap_or(usize::MAX);
    anyhow::ensure!(
        (1..=CONNECTIONS_MAX).contains(&count),
        "{count} connections: 1 to {CONNECTIONS_MAX}"
    );
    let of_disks = body.disks.len() * DISK_CONNECTIONS;
    anyhow::ensure!(
        count + of_disks <= CONNECTIONS_MAX,
        "{} connections, {DISK_CONNECTIONS} of them a disk: at most {CONNECTIONS_MAX}",
        count + of_disks
    );
    let lines = match body.when_late {
        Some(WhenLate::PostCopy) => FAULT_CONNECTIONS,
        _ => 0,
    };
    let (mut relay, sockets) = connect(body, [count, lines + of_disks])?;
    let info = ask_and_wait(client, body, sockets, relay.is_some())?;
    if info.stage == MigrationStage::Completed {
        // A process that has ended already needs not be told.
        let _ = client.act(Request::Shutdown);
        relay.into_iter().for_each(Relay::finish);
        return Ok(info);
    }
    let mut error = info.error.clone().unwrap_or_default();
    if info.stage == MigrationStage::Lost {
        let _ = client.act(Request::Shutdown);
        anyhow::bail!(error)
    }
    if let Some(trouble) = relay.as_mut().and_then(Relay::trouble) {
        error = format!("{error} ({}: {trouble})", body.to);
    }
    let taken = match (info.stage, &mut relay) {
        (MigrationStage::InDoubt, Some(relay)) => relay.was_taken(),
        (MigrationStage::InDoubt, None) => None,
        _ => Some(false),
    };
    match taken {
        Some(true) => {
            client.act(Request::Shutdown)?;
            anyhow::ensure!(
                lines == 0 || info.remaining_bytes == 0,
                "the target had taken the guest, and did not say that the last of its memory had come ({} KiB or more \
                 may be missing): it runs there, or is lost if that process has ended",
                info.remaining_bytes >> 10
            );
            Ok(MigrationInfo {
                stage: MigrationStage::Completed,
                error: None,
                ..info
            })
        }
        Some(false) => {
            if info.stage == MigrationStage::InDoubt {
                client.act(Request::Resume)?;
            }
            anyhow::bail!("the machine stays: {error}")
        }
        None => anyhow::bail!(
            "{error}, and nobody answers at {}: the machine is paused here; say `ctl shutdown` if it runs there, `ctl \
             resume` if it does not",
            body.to
        ),
    }
}

/// Has the machine move over these connections; how that ended.
fn ask_and_wait(
    client: &Client,
    body: &Migrate,
    sockets: Vec<OwnedFd>,
    through_relay: bool,
) -> anyhow::Result<MigrationInfo> {
    let descriptors: Vec<_> = sockets.iter().map(OwnedFd::as_fd).collect();
    // What is for the network stays here.
    let asked = Migrate {
        to: body.to.clone(),
        connections: body.connections,
        downtime_limit_ms: body.downtime_limit_ms,
        relayed: through_relay.then_some(true).or(body.relayed),
        max_bytes_per_second: body.max_bytes_per_second,
        throttle: body.throttle,
        when_late: body.when_late,
        disks: body.disks.clone(),
        ..Migrate::default()
    };
    let mut info: MigrationInfo = client.ask_with_files(Request::Migrate, &asked, &descriptors)?;
    // The machine has its own handles: the end of its connections must be the end of all.
    drop(sockets);
    while matches!(
        info.stage,
        MigrationStage::Copying | MigrationStage::Switching | MigrationStage::PostCopy
    ) {
        std::thread::sleep(POLL);
        info = client.ask(Request::Migration)?;
    }
    Ok(info)
}

/// The machine's ends of all connections, that for messages first, then so many for pages and so many others; and what
/// carries their bytes if they go over a network.
fn connect(body: &Migrate, counts: [usize; 2]) -> anyhow::Result<(Option<Relay>, Vec<OwnedFd>)> {
    let count: usize = counts.iter().sum();
    if body.to.starts_with(relay::SCHEME) {
        let (relay, _) = Relay::start(&for_relay(body, counts))?;
        let ends = (0..=count).map(|_| relay.next());
        let ends = ends.collect::<io::Result<Vec<_>>>();
        let ends = ends.context("take the connections of atoll-relay")?;
        return Ok((Some(relay), ends));
    }
    let connect = |_| UnixStream::connect(&body.to).map(OwnedFd::from);
    let sockets = (0..=count).map(connect).collect::<io::Result<Vec<_>>>();
    let sockets = sockets.with_context(|| format!("connect to {}", body.to))?;
    Ok((None, sockets))
}

/// What `atoll-relay` is to do.
fn for_relay(body: &Migrate, [pages, others]: [usize; 2]) -> Vec<OsString> {
    let mut all: Vec<OsString> = vec!["connect".into(), "--to".into(), (&body.to).into()];
    all.extend(["--pages".into(), pages.to_string().into()]);
    all.extend(["--others".into(), others.to_string().into()]);
    if let Some(name) = &body.tls_name {
        all.extend(["--tls-name".into(), name.into()]);
    }
    if body.when_late == Some(WhenLate::PostCopy) {
        all.push("--to-the-end".into());
    }
    let network = NetworkArguments {
        tls_ca: body.tls_ca.clone(),
        tls_cert: body.tls_cert.clone(),
        tls_key: body.tls_key.clone(),
        insecure: body.insecure.unwrap_or(false),
        silence_limit_ms: body.silence_limit_ms,
    };
    all.extend(network.for_relay());
    all
}

/// Makes `directory` and lets the machine write itself into it. Leaves nothing there when that fails.
pub fn snapshot(client: &Client, body: &Snapshot) -> anyhow::Result<SnapshotTaken> {
    let directory = Path::new(&body.to);
    let context = || format!("snapshot {}", directory.display());
    // A guest's RAM has its secrets in it.
    let made = DirBuilder::new().mode(0o700).create(directory);
    made.with_context(context)?;
    let taken = write_into(client, directory, body).with_context(context);
    if taken.is_err() {
        let _ = std::fs::remove_dir_all(directory);
    }
    taken
}

fn write_into(client: &Client, directory: &Path, body: &Snapshot) -> anyhow::Result<SnapshotTaken> {
    let create = |name: &str| {
        let mut options = File::options();
        let options = options.read(true).write(true).create_new(true).mode(0o600);
        options.open(directory.join(name))
    };
    let files = [
        create(SPEC_FILE)?,
        create(STATE_FILE)?,
        create(MEMORY_FILE)?,
    ];
    let mut body = body.clone();
    let mut sent: Vec<&File> = files.iter().collect();
    let parent = body.parent.take().map(|parent| {
        let parent = Path::new(&parent);
        let state = parent.join(STATE_FILE);
        let file = File::open(&state).with_context(|| format!("parent {}", state.display()))?;
        anyhow::Ok((file, way_to(parent, directory)?))
    });
    let parent = parent.transpose()?;
    if let Some((file, way)) = &parent {
        sent.push(file);
        body.parent = Some(way.clone());
    }
    let is_live = body.live == Some(true);
    let device = is_live.then(live::device).transpose()?;
    sent.extend(&device);
    let descriptors: Vec<_> = sent.into_iter().map(File::as_fd).collect();
    let client = client.clone().with_timeout(SNAPSHOT_TIMEOUT);
    let mut taken = client.ask_with_files(Request::Snapshot, &body, &descriptors)?;
    if is_live {
        taken = live::wait(&client, &body.to, &files[1], taken)?;
    }
    if body.packed == Some(true) {
        let new = format!("{MEMORY_FILE}.new");
        let compressed = create(&new)?;
        packed::compress(&files[2], &compressed)?;
        compressed.sync_all()?;
        std::fs::rename(directory.join(new), directory.join(MEMORY_FILE))?;
    }
    for file in &files {
        file.sync_all()?;
    }
    File::open(directory)?.sync_all()?;
    Ok(taken)
}

/// The way from a snapshot's directory to its parent's: one that stays right when both are moved, where they are
/// neighbours.
fn way_to(parent: &Path, child: &Path) -> anyhow::Result<String> {
    let (parent, child) = (parent.canonicalize()?, child.canonicalize()?);
    let way = match (parent.parent() == child.parent(), parent.file_name()) {
        (true, Some(name)) => Path::new("..").join(name),
        _ => parent,
    };
    let way = way.to_str().map(str::to_owned);
    way.context("the parent's path is not UTF-8")
}
