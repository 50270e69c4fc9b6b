// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Paths and bodies of the control API: HTTP/1.1 and JSON on the Unix socket of one `atoll-vmm`.
//!
//! [`ROUTES`] is the one list of what can be asked: the server dispatches on it, `atoll-vmm ctl` takes its
//! sub-commands from it, and `openapi.json` beside this crate's manifest is compared with it by a test.

mod routes;
mod saving;

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::spec::{DiskLimits, DiskSpec, NetSpec};

pub use routes::ROUTES;
pub use saving::{SavingInfo, SavingStage};

/// A request that the control API knows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Request {
    /// What the machine is; answered with [`Info`].
    Info,
    /// What it has done so far; answered with [`Counters`].
    Counters,
    /// Hold the vCPUs and the devices' queues.
    Pause,
    /// Let a paused machine go on.
    Resume,
    /// Press the ACPI power button: the guest decides what to do about it.
    PowerButton,
    /// Start the machine again from its first instruction, as the reset button of a PC does.
    Reset,
    /// End the machine now, without asking the guest; completed disk writes are flushed.
    Shutdown,
    /// Write the machine to three files, which come with the request (`spec.json`, `state.json`, `memory`); takes
    /// [`Snapshot`].
    Snapshot,
    /// How far the snapshot is that is written while the guest runs ([`Snapshot::live`]); answered with [`SavingInfo`].
    Saving,
    /// Give it up; answered with [`SavingInfo`].
    CancelSnapshot,
    /// Begin to move the machine to another process, over connected Unix sockets that come with the request: one for
    /// messages, the others for memory; takes [`Migrate`].
    Migrate,
    /// Begin to hand the machine to another process of this host, with its memory and all that is open; takes [`Upgrade`] and
    /// two connected Unix sockets: one with that process, and one on which a [`MigrationInfo`] is written, as JSON, when it
    /// is over. After that the other process answers here, or this one as before.
    Upgrade,
    /// How far the move is; answered with [`MigrationInfo`].
    Migration,
    /// Let the guest run there now, and send the rest of its memory meanwhile: of a move that may end like that
    /// ([`WhenLate::PostCopy`]); answered with [`MigrationInfo`].
    SwitchMigration,
    /// Stay here.
    CancelMigration,
    /// Pull a network card's plug, or put it in; takes [`SetLink`].
    SetLink,
    /// Limit what a network card carries; takes [`SetNetLimits`].
    SetNetLimits,
    /// Tell the network where the guest's cards are, as after a migration.
    Announce,
    /// Ask the guest for memory, or give it back; takes [`SetBalloon`].
    SetBalloon,
    /// Tell the guest that a disk has grown, and grow its image; takes [`ResizeDisk`].
    ResizeDisk,
    /// Hold a disk to other rates from now on; takes [`SetDiskLimits`].
    SetDiskLimits,
    /// Take the disc out of a drive; takes [`EjectDisk`].
    EjectDisk,
    /// Put a disc into a drive; takes [`InsertDisk`] and the open disc.
    InsertDisk,
    /// Plug a disk in while the machine runs, or is paused; takes [`AddDisk`] and its open images, answered with
    /// [`Added`].
    AddDisk,
    /// Plug a network card in; takes [`AddNet`] and its open tap, answered with [`Added`].
    AddNet,
    /// Ask the guest to let a disk or a network card go; takes [`RemoveDevice`], answered with [`Removal`].
    RemoveDevice,
    /// Let clients of NBD read disks as they are now, while the guest goes on; takes [`BeginExport`], a listening
    /// Unix socket and an empty file a disk, answered with [`Exported`].
    BeginExport,
    /// How the export is; answered with [`Exported`].
    Export,
    /// End it; takes [`EndExport`].
    EndExport,
    /// Copy a disk to another place while the guest goes on; takes [`BeginMirror`] and the target's open images,
    /// answered with [`MirrorInfo`].
    BeginMirror,
    /// How the mirrors are; answered with [`Mirrors`].
    Mirrors,
    /// Let the target take the disk's place; takes [`CompleteMirror`], answered with [`MirrorInfo`].
    CompleteMirror,
    /// Leave the disk where it is; takes [`CancelMirror`].
    CancelMirror,
}

/// One row of the control API.
#[derive(Debug, Clone, Copy)]
pub struct Route {
    /// What it asks for.
    pub request: Request,
    /// HTTP method.
    pub method: &'static str,
    /// HTTP path; without its slash also the name of the `ctl` sub-command.
    pub path: &'static str,
    /// One sentence for help and documentation.
    pub summary: &'static str,
    /// Values that it takes, as one JSON object; none when the body is empty.
    pub parameters: &'static [Parameter],
    /// Name of the answer's type among this module's.
    pub answer: &'static str,
}

/// One value that a request takes: a field of its body, and an option of `atoll-vmm ctl`.
#[derive(Debug, Clone, Copy)]
pub struct Parameter {
    /// Field of the body; with dashes for underscores the name of the option.
    pub name: &'static str,
    /// What may be given.
    pub kind: ParameterKind,
    /// Whether the request makes no sense without it.
    pub required: bool,
    /// One sentence for help and documentation.
    pub summary: &'static str,
}

/// What a parameter's value is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ParameterKind {
    /// A number, 0 or more.
    Integer,
    /// Any text.
    Text,
    /// `true` or `false`.
    Switch,
    /// Several texts; on the command line with commas between them.
    Texts,
    /// A [`DiskSpec`]; on the command line the keys of `run --disk`.
    Disk,
    /// A [`NetSpec`]; on the command line the keys of `run --net`.
    Net,
}

impl Request {
    /// The row of [`ROUTES`] that describes this request.
    #[must_use]
    pub fn route(self) -> &'static Route {
        ROUTES
            .iter()
            .find(|route| route.request == self)
            .expect("every request has a row in ROUTES")
    }
}

/// What a machine is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineState {
    /// vCPUs run.
    Running,
    /// vCPUs and queues are held.
    Paused,
    /// The guest powered off or was shut down; the process is about to end.
    Stopped,
    /// It goes on in another process; this one is about to end.
    Migrated,
}

/// Answer of `GET /info`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info {
    /// The spec's name.
    pub name: String,
    /// Version of `atoll-vmm`.
    pub version: String,
    /// Version of the machine's address map and devices, which a migration keeps.
    pub machine_version: u32,
    /// Process of the machine.
    pub pid: u32,
    /// What it is doing.
    pub state: MachineState,
    /// Time since the first vCPU ran, in milliseconds.
    pub uptime_ms: u64,
    /// vCPUs.
    pub cpu_count: u8,
    /// What each of them is, as the spec has it: a model, and what is changed about it.
    #[serde(default)]
    pub cpu: String,
    /// Guest RAM.
    pub memory_mib: u64,
    /// How often the guest, or a caller, has reset the machine.
    pub reset_count: u64,
    /// The serial port's terminal or socket, if it has one.
    pub serial_path: Option<PathBuf>,
    /// The virtio console's terminal or socket, if it has one.
    pub console_path: Option<PathBuf>,
    /// The memory balloon, if it has one.
    #[serde(default)]
    pub balloon: Option<BalloonInfo>,
    /// How far the memory is of a machine that runs while it is read.
    #[serde(default)]
    pub filling: Option<FillingInfo>,
    /// What is on the PCI bus, by slot, and the units of the SCSI host.
    #[serde(default)]
    pub devices: Vec<DeviceInfo>,
}

/// Memory that is read while the guest runs, as `GET /info` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FillingInfo {
    /// Everything is there, and its files are no longer needed.
    pub complete: bool,
    /// Read so far; what is zero is not counted.
    pub filled_bytes: u64,
    /// How often the guest or a device has waited for a page.
    pub fault_count: u64,
}

/// One device of the PCI bus or of the SCSI host, as `GET /info` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DeviceInfo {
    /// Its name: `disk0`, `net0`, `rng0`. Nothing else has it for as long as the device is there.
    pub id: String,
    /// Its PCI slot, or that of its SCSI host. It keeps it, also across a snapshot and a migration.
    pub slot: u8,
    /// Target number, if it is a unit of the SCSI host.
    #[serde(default)]
    pub target: Option<u8>,
    /// Whether it can be removed while the machine runs.
    #[serde(default)]
    pub removable: bool,
    /// Whether the guest was asked to let it go, and has not.
    #[serde(default)]
    pub leaving: bool,
}

/// Answer of `GET /counters`. Everything counts up from zero at the machine's start, resets included.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Time since the first vCPU ran, in milliseconds.
    pub uptime_ms: u64,
    /// Memory of the process that is in RAM now, guest RAM included.
    pub resident_bytes: u64,
    /// One row a vCPU.
    pub vcpus: Vec<VcpuCounters>,
    /// One row a disk: those of the spec in its order, then those that were plugged in.
    pub disks: Vec<DiskCounters>,
    /// One row a network card: those of the spec in its order, then those that were plugged in.
    pub nets: Vec<NetCounters>,
}

/// Work of one vCPU.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct VcpuCounters {
    /// CPU time of its thread, guest and exits together.
    pub cpu_time_us: u64,
    /// Port accesses that left the guest.
    pub port_exits: u64,
    /// Memory-mapped accesses that left the guest.
    pub mmio_exits: u64,
    /// Every other exit.
    pub other_exits: u64,
}

/// Work of one disk.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct DiskCounters {
    /// The disk.
    #[serde(default)]
    pub id: String,
    /// Bytes that the guest read.
    pub read_bytes: u64,
    /// Bytes that the guest wrote.
    pub written_bytes: u64,
    /// Read requests.
    pub read_requests: u64,
    /// Write requests.
    pub write_requests: u64,
    /// Flush requests.
    pub flush_requests: u64,
    /// Requests that were answered with an error.
    pub failed_requests: u64,
}

/// Work of one network card, as the guest sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct NetCounters {
    /// The card.
    #[serde(default)]
    pub id: String,
    /// Bytes that the guest received.
    pub received_bytes: u64,
    /// Frames that the guest received.
    pub received_packets: u64,
    /// Frames for the guest that were dropped because it offered no buffer.
    pub received_drops: u64,
    /// Bytes that the guest sent.
    pub sent_bytes: u64,
    /// Frames that the guest sent.
    pub sent_packets: u64,
}

/// Body of `PUT /set-link`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetLink {
    /// The card: `net0` is the first of the spec.
    pub id: String,
    /// Whether the plug is in.
    pub up: bool,
}

/// Body of `PUT /set-net-limits`. Like the spec's `NetLimits`, of one card, whose packets the VMM's threads move from now
/// on wherever the machine goes on, also when it has no rates left.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetNetLimits {
    /// The card: `net0` is the first of the spec.
    pub id: String,
    /// What the guest receives, on average; 0 is no limit.
    #[serde(default)]
    pub receive_bytes_per_second: u64,
    /// What an idle card may receive at once; 0 is a tenth of a second's worth.
    #[serde(default)]
    pub receive_burst_bytes: u64,
    /// What the guest sends, on average; 0 is no limit.
    #[serde(default)]
    pub send_bytes_per_second: u64,
    /// What an idle card may send at once; 0 is a tenth of a second's worth.
    #[serde(default)]
    pub send_burst_bytes: u64,
}

/// Body of `PUT /set-balloon`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetBalloon {
    /// Memory that the guest is to keep, in MiB.
    pub target_mib: u64,
}

/// A memory balloon, as `GET /info` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct BalloonInfo {
    /// Memory that the guest is to keep.
    pub target_mib: u64,
    /// Memory that it has now.
    pub actual_mib: u64,
    /// Memory that its kernel manages; this and what follows is absent until the guest tells, every few seconds.
    pub total_bytes: Option<u64>,
    /// Not used for anything.
    pub free_bytes: Option<u64>,
    /// What a program could get without swapping.
    pub available_bytes: Option<u64>,
    /// Files in memory.
    pub cache_bytes: Option<u64>,
    /// Swapped in since boot.
    pub swapped_in_bytes: Option<u64>,
    /// Swapped out since boot.
    pub swapped_out_bytes: Option<u64>,
    /// Page faults that waited for a disk.
    pub major_faults: Option<u64>,
    /// Page faults that did not.
    pub minor_faults: Option<u64>,
}

/// Body of `PUT /resize-disk`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeDisk {
    /// The disk: `disk0` is the first of the spec.
    pub id: String,
    /// New size in bytes; a disk in use can only grow.
    pub size_bytes: u64,
}

/// Body of `PUT /eject-disk`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EjectDisk {
    /// The drive: `disk0` is the first disk of the spec.
    pub id: String,
    /// Also when the guest has locked the tray.
    #[serde(default)]
    pub force: bool,
}

/// Body of `PUT /insert-disk`; the disc comes as a descriptor, open for reading.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InsertDisk {
    /// The drive: `disk0` is the first disk of the spec.
    pub id: String,
    /// The disc's path, for messages and for whoever restores the machine.
    pub path: PathBuf,
    /// Also when the guest has locked the tray.
    #[serde(default)]
    pub force: bool,
}

/// Body of `PUT /add-disk`; the image comes as a descriptor, then those behind it, nearest first. Each is open as the
/// cache mode says (O_DIRECT, O_DSYNC), for writing unless the disk is read-only. None comes for a drive without a disc.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddDisk {
    /// The disk. Its paths are for messages and for whoever restores the machine.
    pub disk: DiskSpec,
}

/// Body of `PUT /add-net`; one descriptor of the tap comes for each pair of queues. If the kernel is to move the
/// packets, as many of `/dev/vhost-net` follow, and then, if they can be had, `tx_packets`, `tx_bytes`, `rx_packets`,
/// `rx_bytes` and `tx_dropped` of the tap's statistics in sysfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddNet {
    /// The card. Its tap's name is for messages and for whoever restores the machine.
    pub net: NetSpec,
}

/// Answer of the requests that plug a device in: it is there for the guest, which has been told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Added {
    /// Its name.
    pub id: String,
    /// Its PCI slot, or that of its SCSI host.
    pub slot: u8,
    /// Target number, if it is a unit of the SCSI host.
    pub target: Option<u8>,
}

/// Body of `PUT /remove-device`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveDevice {
    /// The disk or card.
    pub id: String,
    /// Take it now, whatever the guest does with it.
    #[serde(default)]
    pub force: bool,
    /// How long the asker waits for the guest (`Client::remove_device`): the machine answers at once.
    #[serde(default)]
    pub timeout_ms: Option<u64>,
}

/// Where a removal is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RemovalStage {
    /// The guest has been asked and has the device still: `info` lists it as leaving until the guest lets it go.
    Asked,
    /// The device is gone, and its files are closed.
    Gone,
}

/// Answer of `PUT /remove-device`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removal {
    /// Where it is.
    pub stage: RemovalStage,
}

/// Body of `PUT /set-disk-limits`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "serde_json::Map<String, serde_json::Value>")]
pub struct SetDiskLimits {
    /// The disk: `disk0` is the first of the spec.
    pub id: String,
    /// All of its limits.
    #[serde(flatten)]
    pub limits: DiskLimits,
}

// Derived code would let unknown names beside flattened fields pass: a mistyped limit would be none.
impl TryFrom<serde_json::Map<String, serde_json::Value>> for SetDiskLimits {
    type Error = String;

    fn try_from(mut body: serde_json::Map<String, serde_json::Value>) -> Result<Self, String> {
        let id = match body.remove("id") {
            Some(serde_json::Value::String(id)) => id,
            _ => return Err("missing field `id`".to_owned()),
        };
        let limits = serde_json::from_value(body.into()).map_err(|error| error.to_string())?;
        Ok(Self { id, limits })
    }
}

/// Answer of the requests that change what the machine does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Acted {
    /// What the machine is doing now.
    pub state: MachineState,
}

/// Body of [`Request::Snapshot`]; its files come as descriptors: `spec.json`, `state.json` and `memory`, which are
/// written, the parent's `state.json`, where there is one, and `/dev/userfaultfd`, where it is live.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// The directory in which the files are: for the log.
    pub to: String,
    /// Whether memory is written as the pages that are not zero; who asked compresses them then.
    #[serde(default)]
    pub packed: Option<bool>,
    /// Whether what the guest writes from now on is logged, so that the next snapshot may have this one as its parent.
    #[serde(default)]
    pub track: Option<bool>,
    /// The last snapshot, which was tracked: its directory, from that of this one, which has only the pages that were
    /// written since.
    #[serde(default)]
    pub parent: Option<String>,
    /// Whether memory is written while the guest runs. Then the answer comes at once, when what is saved is certain; the
    /// state is written last, when all memory is ([`Request::Saving`]). A machine that is paused may be resumed meanwhile.
    #[serde(default)]
    pub live: Option<bool>,
    /// Bytes of memory that are written in a second at most, beside those that the guest waits for: of a live one.
    #[serde(default)]
    pub max_bytes_per_second: Option<u64>,
}

/// Answer of [`Request::Snapshot`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct SnapshotTaken {
    /// Bytes of RAM that were written to the snapshot and not zero, by page; of a live one, so far.
    pub memory_bytes: u64,
    /// For how long the machine was held, in microseconds.
    pub held_us: u64,
}

/// Connections of one disk that moves with its machine: one request a connection at a time.
pub const DISK_CONNECTIONS: usize = 2;

/// Connections for pages that a guest waits for, of a move that may end with post-copy: behind those for memory.
pub const FAULT_CONNECTIONS: usize = 2;

/// Body of [`Request::Migrate`]; its connections come as descriptors, that for messages first.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Migrate {
    /// Where the other process listens: for whoever connects, and for the log.
    pub to: String,
    /// How many connections are for memory: for whoever connects.
    #[serde(default)]
    pub connections: Option<u64>,
    /// How long the guest may stand still, in milliseconds.
    #[serde(default)]
    pub downtime_limit_ms: Option<u64>,
    /// Whether the end of a connection may be something else than the end of the other process.
    #[serde(default)]
    pub relayed: Option<bool>,
    /// Bytes a second that are sent at most.
    #[serde(default)]
    pub max_bytes_per_second: Option<u64>,
    /// Whether the guest's vCPUs may be slowed down, when it writes faster than its memory is sent.
    #[serde(default)]
    pub throttle: Option<bool>,
    /// What to do when the guest writes faster all the same.
    #[serde(default)]
    pub when_late: Option<WhenLate>,
    /// Disks whose content moves along, to images of the same size that the other side has: what these held is lost.
    /// [`DISK_CONNECTIONS`] for each come behind those for memory. All others are opened by both sides.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub disks: Vec<String>,
    /// PEM file of the authorities that sign the other side's certificate. As all that follows: for whoever connects,
    /// over a network; the machine needs none of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_ca: Option<PathBuf>,
    /// PEM file of this side's certificate.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file of its key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<PathBuf>,
    /// Whom the other side's certificate is for, if not the host that is connected to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_name: Option<String>,
    /// Whether memory may go over the network without TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub insecure: Option<bool>,
    /// For how long nothing may be heard, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub silence_limit_ms: Option<u64>,
}

/// Body of [`Request::Upgrade`]; its connections come as descriptors. The machine itself needs none of what it says: all of
/// it is for whoever starts the new process, who must not take it from a process that may be the guest's.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Upgrade {
    /// The new program: for the log.
    pub to: String,
    /// The file in which the process's number is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid_file: Option<String>,
    /// Control groups that the new process enters.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub cgroup: Vec<String>,
    /// Where its log goes; to the old one's standard error when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_file: Option<String>,
    /// `on` or `off`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub sandbox: Option<String>,
    /// `on`, `log` or `off`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seccomp: Option<String>,
    /// The user that it becomes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uid: Option<u32>,
    /// The group that it becomes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gid: Option<u32>,
}

/// What becomes of a move whose downtime limit cannot be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenLate {
    /// The guest stays.
    #[default]
    Cancel,
    /// Memory is sent until the guest writes less, or somebody says `cancel-migration`.
    GoOn,
    /// The guest runs there before all of its memory is there, and waits for each page that is not ([`FAULT_CONNECTIONS`]).
    PostCopy,
}

/// Where a move to another process is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MigrationStage {
    /// The guest runs here, and its memory is sent.
    Copying,
    /// The guest is held; the rest is sent.
    Switching,
    /// The guest runs there, and the rest of its memory is sent: it needs both sides.
    PostCopy,
    /// The guest runs there.
    Completed,
    /// The guest runs here: something went wrong.
    Failed,
    /// The guest runs here: somebody wanted it so.
    Cancelled,
    /// The guest ran there without all of its memory when the two sides lost each other: it runs nowhere. Or there, if
    /// `error` says that all was sent, and only the target knows whether it came.
    Lost,
    /// The guest is paused here, and may run there: say `resume` if it does not, `shutdown` if it does.
    InDoubt,
}

/// Answer of the requests about a move to another process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MigrationInfo {
    /// Where it is.
    pub stage: MigrationStage,
    /// Passes over memory that are complete.
    pub rounds: u32,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Bytes of memory that are still to be sent in this pass; in doubt, a page at least unless all is known to have come.
    pub remaining_bytes: u64,
    /// Time since it began, in milliseconds.
    pub elapsed_ms: u64,
    /// For how long the guest stood still, in microseconds; 0 until it is known.
    pub downtime_us: u64,
    /// Of a hundred parts of their time, how many the guest's vCPUs are made to rest, so that it writes less.
    #[serde(default)]
    pub throttle_percent: u8,
    /// The disks whose content moves along; until little is left of each, no memory is sent.
    #[serde(default)]
    pub disks: Vec<DiskMigration>,
    /// Why it did not happen.
    pub error: Option<String>,
}

/// How far a disk that moves with its machine is, or was in the end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskMigration {
    /// The disk.
    pub id: String,
    /// Its size.
    pub size_bytes: u64,
    /// Copied so far; more than the size, when the guest writes meanwhile.
    pub copied_bytes: u64,
    /// What is left to copy now.
    pub left_bytes: u64,
    /// Copied in a second, as measured last.
    pub bytes_per_second: u64,
}

/// Body of `PUT /begin-export`. A listening Unix socket comes as a descriptor, then for each disk an empty file that can
/// be read and written and that nobody else has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BeginExport {
    /// Where the socket is: for clients, and for the log.
    pub socket: String,
    /// The disks.
    pub disks: Vec<String>,
    /// Where the files are: for whoever makes them.
    pub fleece: String,
    /// Most that all clients together read in a second; without limit when absent. 0 is refused.
    #[serde(default)]
    pub max_bytes_per_second: Option<u64>,
}

/// Answer of the requests about an export. Each disk is an NBD export of its name, read-only; the blocks that changed
/// are in the metadata context `qemu:dirty-bitmap:changes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exported {
    /// Where clients connect.
    pub socket: String,
    /// The disks.
    pub disks: Vec<ExportedDisk>,
    /// Clients now.
    pub connection_count: u32,
    /// For how long the guest stood still, in microseconds.
    pub held_us: u64,
}

/// One disk of an export.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportedDisk {
    /// Its name.
    pub id: String,
    /// Its size.
    pub size_bytes: u64,
    /// The checkpoint since which changes are told; none when all blocks count as changed.
    pub since: Option<String>,
    /// Size of the blocks that changed.
    pub changed_bytes: u64,
    /// What the guest has overwritten since the export began, as far as it was not zeroes.
    pub saved_bytes: u64,
    /// Why it can be read no more, such as a full fleece.
    pub broken: Option<String>,
}

/// Body of `PUT /end-export`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EndExport {
    /// A UUID by which the export's moment is known from now on; when absent, the next export tells the changes that
    /// this one told, too.
    #[serde(default)]
    pub checkpoint: Option<String>,
}

/// Body of `PUT /begin-mirror`. The target's images come as descriptors, in the order of its spec.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BeginMirror {
    /// The disk.
    pub id: String,
    /// Where it is to be: an image that is as large or larger, whose content is lost. Path, format, backing images and
    /// cache; the rest is the disk's own.
    pub to: DiskSpec,
    /// Most that is copied in a second; without limit when absent.
    #[serde(default)]
    pub bytes_per_second: Option<u64>,
}

/// Body of `PUT /complete-mirror`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CompleteMirror {
    /// The disk.
    pub id: String,
    /// How long the guest may stand still for the rest, in milliseconds; 1000 when absent.
    #[serde(default)]
    pub downtime_limit_ms: Option<u64>,
}

/// Body of `PUT /cancel-mirror`.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CancelMirror {
    /// The disk.
    pub id: String,
}

/// Answer of `GET /mirrors`: of each disk its mirror, or how its last one ended.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Mirrors {
    /// In the order in which they began.
    pub mirrors: Vec<MirrorInfo>,
}

/// Where a mirror is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MirrorStage {
    /// Much is left to copy.
    Copying,
    /// Little is left: `complete-mirror` makes the guest wait for a moment only.
    Ready,
    /// The disk is at the target. While the machine has been paused since, `cancel-mirror` takes that back.
    Switched,
    /// The disk is where it was.
    Failed,
}

/// How a mirror is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MirrorInfo {
    /// The disk.
    pub id: String,
    /// The target.
    pub path: PathBuf,
    /// Where it is.
    pub stage: MirrorStage,
    /// Size of the disk.
    pub size_bytes: u64,
    /// Copied so far; more than the size, when the guest writes meanwhile.
    pub copied_bytes: u64,
    /// What is left to copy now.
    pub left_bytes: u64,
    /// Copied in a second, as measured last.
    pub bytes_per_second: u64,
    /// What the guest may write in a second, while it writes faster than can be copied.
    pub slowed_to_bytes_per_second: Option<u64>,
    /// For how long the guest stood still, in microseconds: at the beginning, or, once it has switched, for that.
    pub held_us: u64,
    /// Why it failed.
    pub error: Option<String>,
}

/// Body of every answer whose status is not 200.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    /// What is wrong, in one sentence.
    pub error: String,
}
