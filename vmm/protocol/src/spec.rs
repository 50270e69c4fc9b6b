// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One virtual machine, resolved on one node: paths, file descriptors and MAC addresses, no names.
//!
//! Written by `atoll-manager` (as JSON, `atoll-vmm run --spec FILE`) or by `atoll-vmm run` from its own
//! arguments; read by the VMM's build table. There is no third shape between a guest's config and its machine.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::cpu::CpuSpec;
use crate::services::{GuestServices, VhostUserSocket};

/// Everything that the VMM needs to build one machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MachineSpec {
    /// Name shown by `info` and in log lines; has no effect on the guest.
    pub name: String,
    /// vCPUs, 1 to 255.
    pub cpu_count: u8,
    /// What each of them is.
    #[serde(default)]
    pub cpu: CpuSpec,
    /// Guest RAM in MiB, at least 1.
    pub memory_mib: u64,
    /// The board: which hardware there is beside the devices below.
    #[serde(default)]
    pub profile: Profile,
    /// How the first instruction is reached.
    pub boot: BootSpec,
    /// What the guest reads about its board (SMBIOS); told by firmware only.
    #[serde(default)]
    pub identity: IdentitySpec,
    /// Value by which the guest learns that it has become another machine (VMGenID): a UUID, or `1` for a random one. It
    /// changes when a snapshot is restored: to this value, if the saved machine had another, else to a random one. No such
    /// device when absent.
    #[serde(default)]
    pub generation_id: Option<String>,
    /// Disks. At power-on their PCI slots are in this order.
    #[serde(default)]
    pub disks: Vec<DiskSpec>,
    /// Network cards. At power-on their PCI slots are in this order, behind the disks.
    #[serde(default)]
    pub nets: Vec<NetSpec>,
    /// Where the serial port COM1 ends.
    #[serde(default)]
    pub serial: ConsoleSpec,
    /// Where the virtio console ends; no such device when absent.
    #[serde(default)]
    pub console: Option<ConsoleSpec>,
    /// Whether the guest has a virtio entropy source, fed from the host's getrandom(2).
    #[serde(default = "yes")]
    pub rng: bool,
    /// What else connects the guest with its host.
    #[serde(default)]
    pub services: GuestServices,
}

impl MachineSpec {
    /// The smallest machine that boots so: one vCPU, 512 MiB, no device but the serial port and an entropy source.
    #[must_use]
    pub fn new(boot: BootSpec) -> Self {
        Self {
            name: "vm".to_owned(),
            cpu_count: 1,
            cpu: CpuSpec::default(),
            memory_mib: 512,
            profile: match boot {
                BootSpec::Kernel(_) => Profile::Micro,
                BootSpec::Firmware(_) => Profile::Pc,
            },
            boot,
            identity: IdentitySpec::default(),
            generation_id: None,
            disks: Vec::new(),
            nets: Vec::new(),
            serial: ConsoleSpec::default(),
            console: None,
            rng: true,
            services: GuestServices::default(),
        }
    }
}

impl DiskSpec {
    /// A raw image with nothing special about it.
    #[must_use]
    pub fn raw(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: DiskFormat::Raw,
            ..Self::default()
        }
    }
}

impl NetSpec {
    /// A card on that tap, with an address of its own choice.
    #[must_use]
    pub fn tap(name: impl Into<String>) -> Self {
        Self {
            tap: name.into(),
            ..Self::default()
        }
    }
}

/// Boards. Both have the same PCI devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Profile {
    /// The smallest: hardware-reduced ACPI, a serial port, no firmware. Starts fastest.
    #[default]
    Micro,
    /// A PC with a Q35's identity: what UEFI firmware, boot loaders and installers expect.
    Pc,
}

/// Texts of the SMBIOS system structure (DSP0134 §7.2); our own where absent.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct IdentitySpec {
    /// UUID of the machine, as text; none when absent.
    pub uuid: Option<String>,
    /// Manufacturer.
    pub manufacturer: Option<String>,
    /// Product name.
    pub product: Option<String>,
    /// Version.
    pub version: Option<String>,
    /// Serial number.
    pub serial: Option<String>,
    /// Stock keeping unit.
    pub sku: Option<String>,
    /// Family.
    pub family: Option<String>,
    /// Texts for the guest's software (type 11).
    pub options: Vec<String>,
}

/// How the first instruction is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum BootSpec {
    /// A kernel that the VMM loads itself, on either board.
    Kernel(KernelSpec),
    /// Firmware, which finds a boot loader on a disk. Needs [`Profile::Pc`].
    Firmware(FirmwareSpec),
}

impl BootSpec {
    /// The kernel, when it is one.
    #[must_use]
    pub fn kernel(&self) -> Option<&KernelSpec> {
        match self {
            Self::Kernel(kernel) => Some(kernel),
            Self::Firmware(_) => None,
        }
    }
}

/// A kernel that the VMM loads itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KernelSpec {
    /// bzImage, or ELF with a PVH note.
    pub image: PathBuf,
    /// Initial RAM disk, handed over as it is.
    #[serde(default)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    #[serde(default)]
    pub cmdline: String,
    /// Machines whose kernel is the same file have its pages together, each until it writes to one: the image must be an
    /// uncompressed ELF file, and memory anonymous. The VMM holds a lease on the file: who opens it for writing waits until
    /// the machines have copies (45 seconds at most, then they may crash). To replace it, rename another file over it. Where
    /// no such lease is to be had (another user's file, network file systems), the machine does not start.
    #[serde(default)]
    pub shared: bool,
}

/// UEFI firmware: OVMF, as Debian's package `ovmf` has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FirmwareSpec {
    /// Its code, mapped read-only so that it ends at 4 GiB (`OVMF_CODE_4M.fd`).
    pub code: PathBuf,
    /// Its variables, directly below the code: this guest's own copy of `OVMF_VARS_4M.fd`, written to.
    pub vars: PathBuf,
    /// How long the firmware's boot menu waits for a key, in milliseconds; it does not when absent.
    #[serde(default)]
    pub menu_ms: Option<u16>,
    /// What firmware prints on its debug port (0x402; only debug builds do) goes to the end of this file.
    #[serde(default)]
    pub log: Option<PathBuf>,
}

/// One disk, or one drive.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskSpec {
    /// Name in the control API; the lowest free of `disk0`, `disk1`, … when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Image file or block device on the host; empty for a drive without a disc.
    pub path: PathBuf,
    /// What the guest finds it on.
    #[serde(default)]
    pub bus: DiskBus,
    /// Target number on the SCSI host, 0 to 254; the lowest that is free when absent.
    #[serde(default)]
    pub target: Option<u8>,
    /// Image format: always explicit, never probed, since the guest can write any header into a raw image.
    pub format: DiskFormat,
    /// The images behind a qcow2 image, nearest first: exactly those that the images' headers name.
    #[serde(default)]
    pub backing: Vec<BackingSpec>,
    /// The guest may not write.
    #[serde(default)]
    pub readonly: bool,
    /// Serial number that the guest reads, at most 20 bytes (VIRTIO 1.2 §5.2.6).
    #[serde(default)]
    pub serial: Option<String>,
    /// Virtqueues; one a vCPU, at most 16, when absent.
    #[serde(default)]
    pub queue_count: Option<u16>,
    /// What stands between the guest's writes and the disk.
    #[serde(default)]
    pub cache: CacheMode,
    /// Space that the guest discards is given back to the host.
    #[serde(default)]
    pub discard: bool,
    /// Writes of nothing but zeroes take no space.
    #[serde(default)]
    pub detect_zeroes: bool,
    /// File in which changed blocks are recorded from one run to the next, for incremental backups; made when it is
    /// missing. Nobody else may write to the image while the machine does not run, or the next backup reads all of it.
    #[serde(default)]
    pub changes: Option<PathBuf>,
    /// Rates to which the disk is held.
    #[serde(default)]
    pub limits: DiskLimits,
    /// Place in the firmware's boot order, lowest first; not in it when absent.
    #[serde(default)]
    pub boot_index: Option<u16>,
}

/// What a guest finds a disk on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskBus {
    /// A PCI function of its own: virtio-blk.
    #[default]
    Blk,
    /// A target of the machine's one SCSI host, virtio-scsi.
    Scsi,
    /// A CD-ROM drive, a target of the same SCSI host: read-only, its disc comes and goes.
    Cdrom,
}

/// Formats of disk images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DiskFormat {
    /// The guest's sectors, byte for byte.
    #[default]
    Raw,
    /// QEMU's copy-on-write format, version 2 or 3.
    Qcow2,
    /// No image: the path is a Unix socket, where an NBD server has the disk as its default export.
    Nbd,
}

/// An image that another one is a difference to. Opened read-only.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BackingSpec {
    /// Image file on the host.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
}

/// Cache modes, by the names that PVE and QEMU give them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CacheMode {
    /// The host's page cache; durable when the guest flushes.
    #[default]
    Writeback,
    /// No page cache (O_DIRECT); durable when the guest flushes.
    None,
    /// The host's page cache for reads; each write is durable when it completes, and the guest is told so.
    Writethrough,
    /// No page cache, and each write is durable when it completes, and the guest is told so.
    Directsync,
    /// The host's page cache, and flushes do nothing: a crash of the host loses the disk.
    Unsafe,
}

/// Rates to which a disk is held, each above 0; what is absent is without limit. A burst is what may come at once after
/// idleness; a tenth of a second's worth when absent, refused without its rate. Reads draw from the plain and the `read_`
/// limits, everything that writes from the plain and the `write_` ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DiskLimits {
    /// Bytes, both directions together.
    pub bytes_per_second: Option<u64>,
    /// Burst of it.
    pub bytes_burst: Option<u64>,
    /// Requests, both directions together.
    pub operations_per_second: Option<u64>,
    /// Burst of it.
    pub operations_burst: Option<u64>,
    /// Bytes read.
    pub read_bytes_per_second: Option<u64>,
    /// Burst of it.
    pub read_bytes_burst: Option<u64>,
    /// Read requests.
    pub read_operations_per_second: Option<u64>,
    /// Burst of it.
    pub read_operations_burst: Option<u64>,
    /// Bytes written.
    pub write_bytes_per_second: Option<u64>,
    /// Burst of it.
    pub write_bytes_burst: Option<u64>,
    /// Write requests.
    pub write_operations_per_second: Option<u64>,
    /// Burst of it.
    pub write_operations_burst: Option<u64>,
}

/// One of a disk's limits: its field's name, and what it is.
pub type DiskLimit<'a> = (&'static str, &'a mut Option<u64>);

impl DiskLimits {
    /// Every rate with its burst, in order.
    pub fn pairs(&mut self) -> [[DiskLimit<'_>; 2]; 6] {
        [
            [
                ("bytes_per_second", &mut self.bytes_per_second),
                ("bytes_burst", &mut self.bytes_burst),
            ],
            [
                ("operations_per_second", &mut self.operations_per_second),
                ("operations_burst", &mut self.operations_burst),
            ],
            [
                ("read_bytes_per_second", &mut self.read_bytes_per_second),
                ("read_bytes_burst", &mut self.read_bytes_burst),
            ],
            [
                (
                    "read_operations_per_second",
                    &mut self.read_operations_per_second,
                ),
                ("read_operations_burst", &mut self.read_operations_burst),
            ],
            [
                ("write_bytes_per_second", &mut self.write_bytes_per_second),
                ("write_bytes_burst", &mut self.write_bytes_burst),
            ],
            [
                (
                    "write_operations_per_second",
                    &mut self.write_operations_per_second,
                ),
                ("write_operations_burst", &mut self.write_operations_burst),
            ],
        ]
    }

    /// Each of them, in order.
    pub fn fields(&mut self) -> impl Iterator<Item = DiskLimit<'_>> {
        self.pairs().into_iter().flatten()
    }
}

/// One virtio-net card.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetSpec {
    /// Name in the control API; the lowest free of `net0`, `net1`, … when absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Name of the host's tap interface, created when it does not exist. Absent when there is `vhost_user`.
    #[serde(default)]
    pub tap: String,
    /// Instead of a tap, another process that moves the packets (OVS with DPDK, for one). Guest memory must be shared.
    #[serde(default)]
    pub vhost_user: Option<VhostUserSocket>,
    /// MAC address, `aa:bb:cc:dd:ee:ff`; a random one of the locally administered range when absent.
    #[serde(default)]
    pub mac: Option<String>,
    /// MTU that is offered to the guest.
    #[serde(default)]
    pub mtu: Option<u16>,
    /// Pairs of queues, one when absent. With several, the tap must be one with `multi_queue`, or not exist.
    #[serde(default)]
    pub queue_pairs: Option<u16>,
    /// Whether the kernel moves the packets.
    #[serde(default)]
    pub vhost: VhostNet,
    /// The plug is not in at the start (`set-link` puts it in).
    #[serde(default)]
    pub link_down: bool,
    /// Most that the card may carry.
    #[serde(default)]
    pub limits: NetLimits,
    /// Place in the firmware's boot order, lowest first; not in it when absent.
    #[serde(default)]
    pub boot_index: Option<u16>,
}

/// Whether the kernel (`/dev/vhost-net`) moves a card's packets: faster, but without rate limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VhostNet {
    /// Where it can: the device is there, and the card has no rate limit.
    #[default]
    Auto,
    /// It must.
    On,
    /// Threads of the VMM do.
    Off,
}

/// Rate limits of a card. Absent or 0: none; a burst of 0 is a tenth of a second's worth.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct NetLimits {
    /// What the guest receives, on average.
    pub receive_bytes_per_second: u64,
    /// What an idle card may receive at once.
    pub receive_burst_bytes: u64,
    /// What the guest sends, on average.
    pub send_bytes_per_second: u64,
    /// What an idle card may send at once.
    pub send_burst_bytes: u64,
}

/// The host's end of a console.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ConsoleSpec {
    /// Output is dropped, nothing is ever typed.
    #[default]
    Null,
    /// The VMM's own standard input and output.
    Stdio,
    /// A pseudo-terminal, whose path `info` tells.
    Pty,
    /// A Unix stream socket that the VMM listens on: raw bytes both ways, several clients at once, each new
    /// client first gets the backlog (the last 64 KiB of output).
    Socket(PathBuf),
}

fn yes() -> bool {
    true
}
