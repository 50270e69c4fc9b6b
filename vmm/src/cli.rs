// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The command line of `atoll-vmm`: its arguments, and how they become a spec. Not here: what a machine is.

#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "comments on arguments are help texts, where brackets are what may be left out"
)]

mod confinement;
mod ctl;
mod receive;
mod services;

use std::path::{Path, PathBuf};

use atoll_vmm_protocol::cpu::CpuSpec;
use atoll_vmm_protocol::services::{MemoryBacking, VhostUserSocket};
use atoll_vmm_protocol::spec::{
    BackingSpec, BootSpec, CacheMode, ConsoleSpec, DiskBus, DiskFormat, DiskLimits, DiskSpec,
    FirmwareSpec, KernelSpec, MachineSpec, NetSpec, Profile, VhostNet,
};
use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, Parser, Subcommand};

pub use self::confinement::{ConfinementArguments, Filters, Switch};
pub use self::ctl::{CtlArguments, CtlRequest};
pub use self::receive::{NetworkArguments, ReceiveArguments};
use crate::saved::image;
use crate::{check, cpu_models, flash, probe, serve};

/// Runs one virtual machine on KVM, in the foreground, until its guest ends.
#[derive(Debug, Parser)]
#[command(name = "atoll-vmm", version, about, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

const EXIT_CODES: &str = "\
Exit codes:
  0  the guest powered off, or was shut down
  1  the host could not do it; standard error says why in one line
  2  the arguments or the spec are wrong
  3  the guest crashed (triple fault)
  4  a thread made a system call that its filter denies; the log names it";

const RUN_EXAMPLES: &str = "\
Examples:
  # A kernel and its initial RAM disk, the serial console on this terminal:
  atoll-vmm run --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0' --cpus 2 --memory 1G

  # Debian from a disk, with a network card and a control socket:
  atoll-vmm run --kernel vmlinuz --initrd initrd.img --cmdline 'console=ttyS0 root=/dev/vda rw' \\
      --cpus 4 --memory 2G --disk path=debian.raw,format=raw --net tap=tap0,mac=52:54:00:12:34:56 \\
      --console socket=/run/vm/serial --api-socket /run/vm/api
  atoll-vmm ctl --api-socket /run/vm/api power-button

  # A disk image that boots by UEFI, as installers make them (Debian: apt install ovmf):
  cp /usr/share/OVMF/OVMF_VARS_4M.fd vars.fd
  atoll-vmm run --firmware vars=vars.fd --memory 2G --disk path=disk.raw,format=raw,bootindex=0

Keys of --disk:
  id=NAME               in the control API; the lowest free of disk0, disk1, … when absent
  path=FILE             image file or block device
  format=raw|qcow2|nbd  never guessed: a guest can write any header; of nbd the path is a Unix socket, where a server has
                        the disk as its default export
  backing=FORMAT:FILE   the image behind a qcow2 image, if its header names one; repeat for the one behind that
  bus=blk|scsi|cdrom    virtio-blk (default), or a target of the SCSI host; a cdrom needs neither format nor path
  target=N              its number there; the lowest that is free when absent
  readonly              the guest may not write
  serial=TEXT           what the guest reads as the disk's serial number
  queues=N              virtqueues; one a vCPU when absent
  bootindex=N           place in the firmware's boot order, lowest first
  cache=MODE            writeback (default), none, writethrough, directsync, unsafe
  discard               give space back that the guest discards
  detect-zeroes         writes of nothing but zeroes take no space
  changes=FILE          changed blocks are recorded there from one run to the next, for incremental backups
                        (ctl begin-export)
  bytes-per-second=N operations-per-second=N, each also with read- or write- before it, and with
  bytes-burst=N operations-burst=N: rates to which the disk is held";

const DISK_KEYS: &str = "path=, format=, id=, backing=, bus=, target=, readonly, serial=, queues=, bootindex=, cache=, discard, detect-zeroes, changes=, \
    bytes-per-second=, bytes-burst=, operations-per-second=, operations-burst=, read-… and write-… of these";

/// Sub-commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Build a machine and run it until its guest ends
    Run(Box<RunArguments>),
    /// Wait for a machine that another process moves here (`ctl migrate`), then run it
    Receive(Box<ReceiveArguments>),
    /// Ask or tell a running machine, by its control socket
    Ctl(CtlArguments),
    /// Let another process use a disk, over NBD: what `ctl begin-mirror` copies to, or `run --disk path=SOCKET,format=nbd`
    ServeDisk(Box<serve::Arguments>),
    /// Which CPU models there are, and which of them this host can give
    CpuModels(cpu_models::Arguments),
    /// Can this host run guests, and how fast?
    Probe(probe::Arguments),
}

/// Arguments of `run`.
#[derive(Debug, Args)]
#[command(after_help = RUN_EXAMPLES)]
pub struct RunArguments {
    /// The whole machine as a JSON file, instead of the arguments below
    #[arg(long, value_name = "FILE", conflicts_with_all = MACHINE_ARGUMENTS)]
    pub spec: Option<PathBuf>,
    /// Go on where a snapshot was taken (`ctl snapshot`); with --spec the machine's files and taps are those of FILE
    #[arg(long, value_name = "DIR", conflicts_with_all = MACHINE_ARGUMENTS)]
    pub restore: Option<PathBuf>,
    /// How the snapshot's memory comes back
    #[arg(
        long,
        value_name = "MODE",
        default_value = "read",
        requires = "restore"
    )]
    pub memory_mode: image::Mode,
    /// The board: micro starts a kernel fastest, pc is what firmware and installers expect; pc when --firmware is given
    #[arg(long, value_name = "BOARD", value_parser = profile())]
    pub profile: Option<Profile>,
    /// Linux kernel: a bzImage, or an ELF file with a PVH note
    #[arg(long, value_name = "FILE", required_unless_present_any = ["spec", "restore", "firmware"])]
    pub kernel: Option<PathBuf>,
    /// Share the kernel's pages with other machines that have the same file, until a guest writes to them: less memory, and
    /// no reading at the start. The file must be an ELF file. Never write to it: rename a new one over it. Who opens it for
    /// writing waits until the machines have copies
    #[arg(long, requires = "kernel")]
    pub share_kernel: bool,
    /// UEFI firmware: vars=FILE[,code=FILE][,menu=MILLISECONDS][,log=FILE]; vars is this guest's own copy of
    /// OVMF_VARS_4M.fd, code is OVMF_CODE_4M.fd of Debian's package ovmf unless given
    #[arg(long, value_name = "KEYS", value_parser = firmware, conflicts_with_all = ["kernel", "initrd", "cmdline"])]
    pub firmware: Option<FirmwareSpec>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0")]
    pub cmdline: String,
    /// vCPUs, 1 to 255
    #[arg(long, value_name = "N", default_value = "1", value_parser = clap::value_parser!(u8).range(1..))]
    pub cpus: u8,
    /// What each of them is: host, or the name of a model (see `atoll-vmm cpu-models`)
    /// [,+FEATURE][,-FEATURE][,hidden][,phys-bits=N]
    #[arg(long, value_name = "MODEL", default_value = "host", value_parser = cpu)]
    pub cpu: CpuSpec,
    /// Models of your own for --cpu: every *.json in DIR
    #[arg(long, value_name = "DIR")]
    pub cpu_models: Option<PathBuf>,
    /// Guest memory: a number of MiB, or with a unit: 512M, 4G[,hugepages=2M|1G][,shared]
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = memory)]
    pub memory: (u64, MemoryBacking),
    /// Adds a generation id (VMGenID), by which a restored guest learns that it is a copy: a UUID, or 1 for a random one
    #[arg(long, value_name = "UUID")]
    pub generation_id: Option<String>,
    /// A disk: path=FILE,format=raw|qcow2|nbd[,KEY…]; may be repeated; its keys are below
    #[arg(long, value_name = "KEYS", value_parser = disk)]
    pub disk: Vec<DiskSpec>,
    /// A network card: tap=NAME or vhost-user=SOCKET[,reconnect], then [,id=NAME][,mac=AA:BB:CC:DD:EE:FF][,mtu=N]
    /// [,queues=PAIRS][,vhost=auto|on|off]
    /// [,rate=BYTES a second, each way][,link=up|down][,bootindex=N]; may be repeated
    #[arg(long, value_name = "KEYS", value_parser = net)]
    pub net: Vec<NetSpec>,
    /// Where the serial port (ttyS0) ends: stdio, pty, socket=PATH or null
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = console)]
    pub console: ConsoleSpec,
    /// Adds a virtio console (hvc0), and says where it ends
    #[arg(long, value_name = "WHERE", value_parser = console)]
    pub virtio_console: Option<ConsoleSpec>,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "each argument has its own, and clap takes none here"
    )]
    pub services: services::ServiceArguments,
    /// Name shown by `ctl info` and in the log
    #[arg(long, value_name = "TEXT", default_value = "vm")]
    pub name: String,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "each argument has its own, and clap takes none here"
    )]
    pub host: HostArguments,
}

/// What `run` and `receive` need beside the machine.
#[derive(Debug, Args)]
pub struct HostArguments {
    /// Control API: a Unix socket that is created here (see `atoll-vmm ctl --help`)
    #[arg(long, value_name = "PATH")]
    pub api_socket: Option<PathBuf>,
    /// Write the process number to this file
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Append the log to this file instead of standard error
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Enter this control group (a directory of a cgroup hierarchy) before memory is taken; may be repeated, for
    /// hierarchies of version 1
    #[arg(long, value_name = "DIRECTORY")]
    pub cgroup: Vec<PathBuf>,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "each argument has its own, and clap takes none here"
    )]
    pub confinement: ConfinementArguments,
}

/// What `--spec` stands instead of.
const MACHINE_ARGUMENTS: [&str; 22] = [
    "profile",
    "firmware",
    "kernel",
    "share_kernel",
    "initrd",
    "cmdline",
    "cpus",
    "cpu",
    "cpu_models",
    "memory",
    "generation_id",
    "disk",
    "net",
    "console",
    "virtio_console",
    "name",
    services::ARGUMENTS[0],
    services::ARGUMENTS[1],
    services::ARGUMENTS[2],
    services::ARGUMENTS[3],
    services::ARGUMENTS[4],
    services::ARGUMENTS[5],
];

impl RunArguments {
    /// The machine that the arguments describe, when there is no `--spec`.
    #[must_use]
    pub fn to_spec(&self) -> MachineSpec {
        let boot = match &self.firmware {
            Some(firmware) => BootSpec::Firmware(firmware.clone()),
            None => BootSpec::Kernel(KernelSpec {
                image: self.kernel.clone().unwrap_or_default(),
                initrd: self.initrd.clone(),
                cmdline: self.cmdline.clone(),
                shared: self.share_kernel,
            }),
        };
        let defaults = MachineSpec::new(boot);
        MachineSpec {
            name: self.name.clone(),
            cpu_count: self.cpus,
            cpu: self.cpu.clone(),
            memory_mib: self.memory.0,
            profile: self.profile.unwrap_or(defaults.profile),
            generation_id: self.generation_id.clone(),
            disks: self.disk.clone(),
            nets: self.net.clone(),
            serial: self.console.clone(),
            console: self.virtio_console.clone(),
            services: self.services.to_spec(self.memory.1),
            ..defaults
        }
    }
}

/// A model's name, then what is changed about it, also as PVE writes it (`flags=+aes;-pcid`).
fn cpu(text: &str) -> Result<CpuSpec, String> {
    let (model, rest) = text.split_once(',').unwrap_or((text, ""));
    let mut spec = CpuSpec {
        model: model.to_owned(),
        ..CpuSpec::default()
    };
    if rest.is_empty() {
        return Ok(spec);
    }
    let known = "+FEATURE, -FEATURE, hidden, phys-bits=";
    keys(rest, known, |key, value| {
        match (key, value) {
            (flag, None) if flag.starts_with(['+', '-']) => spec.flags.push(flag.to_owned()),
            ("flags", Some(flags)) => spec.flags.extend(flags.split(';').map(str::to_owned)),
            ("hidden", None) => spec.hidden = true,
            ("phys-bits", Some(value)) => spec.phys_bits = Some(number(key, value)?),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    Ok(spec)
}

/// A size, and what holds it.
fn memory(text: &str) -> Result<(u64, MemoryBacking), String> {
    let (size, rest) = text.split_once(',').unwrap_or((text, ""));
    let backing = match rest {
        "" => MemoryBacking::Anonymous,
        "shared" => MemoryBacking::Shared,
        "hugepages=2M" => MemoryBacking::Hugepages2M,
        "hugepages=1G" => MemoryBacking::Hugepages1G,
        other => {
            return Err(format!(
                "{other:?} is not one of hugepages=2M, hugepages=1G, shared"
            ));
        }
    };
    Ok((memory_mib(size)?, backing))
}

fn memory_mib(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match &text[digits.len()..] {
        "" | "M" | "MiB" => 0,
        "G" | "GiB" => 10,
        "T" | "TiB" => 20,
        unit => return Err(format!("unit {unit:?} is not one of M, G, T")),
    };
    let number: u64 = digits
        .parse()
        .map_err(|_| "expected a number of MiB, or one with a unit: 512M, 4G".to_owned())?;
    if number == 0 {
        return Err("a machine needs at least 1 MiB".to_owned());
    }
    number
        .checked_mul(1 << shift)
        .ok_or_else(|| "that is too much".to_owned())
}

/// Splits `key=value,flag,…` and gives each part to `take`, which answers whether it knows the key.
fn keys(
    text: &str,
    known: &str,
    mut take: impl FnMut(&str, Option<&str>) -> Result<bool, String>,
) -> Result<(), String> {
    for part in text.split(',') {
        let (key, value) = match part.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (part, None),
        };
        if !take(key, value)? {
            return Err(format!("{part:?} is not one of {known}"));
        }
    }
    Ok(())
}

fn number<T: std::str::FromStr>(key: &str, value: &str) -> Result<T, String> {
    value
        .parse()
        .map_err(|_| format!("{key}={value}: expected a number"))
}

fn profile() -> impl TypedValueParser<Value = Profile> {
    PossibleValuesParser::new(["micro", "pc"]).map(|name| match name.as_str() {
        "pc" => Profile::Pc,
        _ => Profile::Micro,
    })
}

fn firmware(text: &str) -> Result<FirmwareSpec, String> {
    let mut vars = None;
    let mut spec = FirmwareSpec {
        code: Path::new(flash::PACKAGED).join("OVMF_CODE_4M.fd"),
        vars: PathBuf::new(),
        menu_ms: None,
        log: None,
    };
    keys(text, "vars=, code=, menu=, log=", |key, value| {
        match (key, value) {
            ("vars", Some(value)) => vars = Some(PathBuf::from(value)),
            ("code", Some(value)) => spec.code = PathBuf::from(value),
            ("menu", Some(value)) => spec.menu_ms = Some(number(key, value)?),
            ("log", Some(value)) => spec.log = Some(PathBuf::from(value)),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    spec.vars = vars.ok_or(
        "vars= is missing: give this guest its own copy of /usr/share/OVMF/OVMF_VARS_4M.fd, which it writes to",
    )?;
    Ok(spec)
}

pub(crate) fn disk(text: &str) -> Result<DiskSpec, String> {
    let (mut path, mut format) = (None, None);
    let mut spec = DiskSpec::default();
    keys(text, DISK_KEYS, |key, value| {
        match (key, value) {
            ("id", Some(value)) => spec.id = Some(value.to_owned()),
            ("path", Some(value)) => path = Some(PathBuf::from(value)),
            ("format", Some(value)) => format = Some(disk_format(key, value)?),
            ("bus", Some("blk")) => spec.bus = DiskBus::Blk,
            ("bus", Some("scsi")) => spec.bus = DiskBus::Scsi,
            ("bus", Some("cdrom")) => spec.bus = DiskBus::Cdrom,
            ("bus", Some(other)) => {
                return Err(format!("bus={other}: there are blk, scsi and cdrom"));
            }
            ("target", Some(value)) => spec.target = Some(number(key, value)?),
            ("readonly", None) => spec.readonly = true,
            ("serial", Some(value)) => spec.serial = Some(value.to_owned()),
            ("queues", Some(value)) => spec.queue_count = Some(number(key, value)?),
            ("bootindex", Some(value)) => spec.boot_index = Some(number(key, value)?),
            ("cache", Some(value)) => spec.cache = cache_mode(value)?,
            ("discard", None) => spec.discard = true,
            ("detect-zeroes", None) => spec.detect_zeroes = true,
            ("changes", Some(value)) => spec.changes = Some(value.into()),
            ("backing", Some(value)) => {
                let (format, path) = value.split_once(':').ok_or_else(|| {
                    format!("backing={value}: expected FORMAT:FILE, as in backing=raw:base.img")
                })?;
                spec.backing.push(BackingSpec {
                    path: path.into(),
                    format: disk_format(key, format)?,
                });
            }
            (key, Some(value)) => return limit(&mut spec.limits, key, value),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    if spec.bus == DiskBus::Cdrom {
        spec.path = path.unwrap_or_default();
        spec.format = format.unwrap_or_default();
        return Ok(spec);
    }
    spec.path = path.ok_or("path= is missing")?;
    spec.format = format.ok_or(
        "format= is missing: say format=raw or format=qcow2 (a guest can write any header, so it is not guessed)",
    )?;
    Ok(spec)
}

fn disk_format(key: &str, value: &str) -> Result<DiskFormat, String> {
    match value {
        "raw" => Ok(DiskFormat::Raw),
        "qcow2" => Ok(DiskFormat::Qcow2),
        "nbd" => Ok(DiskFormat::Nbd),
        other => Err(format!("{key}={other}: there are raw, qcow2 and nbd")),
    }
}

fn cache_mode(value: &str) -> Result<CacheMode, String> {
    match value {
        "none" => Ok(CacheMode::None),
        "writeback" => Ok(CacheMode::Writeback),
        "writethrough" => Ok(CacheMode::Writethrough),
        "directsync" => Ok(CacheMode::Directsync),
        "unsafe" => Ok(CacheMode::Unsafe),
        other => Err(format!(
            "cache={other}: there are none, writeback, writethrough, directsync and unsafe"
        )),
    }
}

/// Takes a key that is a limit's name with dashes.
fn limit(limits: &mut DiskLimits, key: &str, value: &str) -> Result<bool, String> {
    for (name, field) in limits.fields() {
        if key.replace('-', "_") == name {
            *field = Some(number(key, value)?);
            return Ok(true);
        }
    }
    Ok(false)
}

fn net(text: &str) -> Result<NetSpec, String> {
    let mut spec = NetSpec::default();
    let mut reconnect = false;
    keys(
        text,
        "tap=, vhost-user=, reconnect, id=, mac=, mtu=, queues=, vhost=, rate=, link=, bootindex=",
        |key, value| {
            match (key, value) {
                ("tap", Some(value)) => spec.tap = value.to_owned(),
                ("id", Some(value)) => spec.id = Some(value.to_owned()),
                ("vhost-user", Some(value)) => {
                    spec.vhost_user = Some(VhostUserSocket {
                        path: value.into(),
                        reconnect: false,
                    });
                }
                ("reconnect", None) => reconnect = true,
                ("mac", Some(value)) => {
                    check::mac(value).map_err(|error| error.0)?;
                    spec.mac = Some(value.to_owned());
                }
                ("mtu", Some(value)) => spec.mtu = Some(number(key, value)?),
                ("bootindex", Some(value)) => spec.boot_index = Some(number(key, value)?),
                ("queues", Some(value)) => spec.queue_pairs = Some(number(key, value)?),
                ("vhost", Some("auto")) => spec.vhost = VhostNet::Auto,
                ("vhost", Some("on")) => spec.vhost = VhostNet::On,
                ("vhost", Some("off")) => spec.vhost = VhostNet::Off,
                ("rate", Some(value)) => {
                    let bytes = bytes(value)?;
                    spec.limits.receive_bytes_per_second = bytes;
                    spec.limits.send_bytes_per_second = bytes;
                }
                ("link", Some("up")) => spec.link_down = false,
                ("link", Some("down")) => spec.link_down = true,
                _ => return Ok(false),
            }
            Ok(true)
        },
    )?;
    match &mut spec.vhost_user {
        Some(socket) => socket.reconnect = reconnect,
        None if reconnect => return Err("reconnect is for vhost-user=".to_owned()),
        None if spec.tap.is_empty() => return Err("tap= or vhost-user= is missing".to_owned()),
        None => {}
    }
    Ok(spec)
}

/// A number of bytes, with K, M or G for powers of 1024.
fn bytes(text: &str) -> Result<u64, String> {
    let (digits, shift) = match text.as_bytes().last() {
        Some(b'K') => (&text[..text.len() - 1], 10),
        Some(b'M') => (&text[..text.len() - 1], 20),
        Some(b'G') => (&text[..text.len() - 1], 30),
        _ => (text, 0),
    };
    let number: Option<u64> = digits.parse().ok();
    number
        .and_then(|number| number.checked_mul(1 << shift))
        .ok_or_else(|| format!("{text:?}: expected bytes, as in 1000000, 512K, 10M or 1G"))
}

fn console(text: &str) -> Result<ConsoleSpec, String> {
    match text.split_once('=') {
        None if text == "stdio" => Ok(ConsoleSpec::Stdio),
        None if text == "pty" => Ok(ConsoleSpec::Pty),
        None if text == "null" => Ok(ConsoleSpec::Null),
        Some(("socket", path)) if !path.is_empty() => Ok(ConsoleSpec::Socket(path.into())),
        _ => Err("expected stdio, pty, socket=PATH or null".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_have_units() {
        for (text, mib) in [("512", 512), ("512M", 512), ("4G", 4096), ("1TiB", 1 << 20)] {
            assert_eq!(memory_mib(text), Ok(mib));
        }
        for text in ["", "0", "0G", "-1", "1K", "99999999999999999T", "G"] {
            assert!(memory_mib(text).is_err(), "{text}");
        }
        let huge = memory("1G,hugepages=2M");
        assert_eq!(huge, Ok((1024, MemoryBacking::Hugepages2M)));
        assert!(
            memory("1G,hugepages=4K")
                .unwrap_err()
                .contains("hugepages=1G")
        );
    }

    #[test]
    fn a_cpu_is_a_model_and_flags() {
        for text in ["host", "x86-64-v3,+pcid,-aes,hidden,phys-bits=39"] {
            assert_eq!(cpu(text).unwrap().to_string(), text);
        }
        let spec = cpu("kvm64,flags=+aes;-pcid").unwrap();
        assert_eq!(spec.flags, ["+aes", "-pcid"]);
        for (text, expected) in [
            ("host,fast", "\"fast\" is not one of +FEATURE"),
            ("host,phys-bits=x", "expected a number"),
        ] {
            assert!(cpu(text).unwrap_err().contains(expected), "{text}");
        }
    }

    #[test]
    fn a_disk_is_its_keys() {
        let spec = disk("path=/a=b,format=raw,readonly,serial=x,queues=2").unwrap();
        assert_eq!(spec.path, PathBuf::from("/a=b"));
        assert!(spec.readonly);
        assert_eq!(
            (spec.serial.as_deref(), spec.queue_count),
            (Some("x"), Some(2))
        );
        let spec = disk(
            "path=/a,format=qcow2,backing=qcow2:/b,backing=raw:/c,cache=none,discard,detect-zeroes,read-bytes-burst=7",
        )
        .unwrap();
        assert_eq!(
            (spec.format, spec.cache, spec.limits.read_bytes_burst),
            (DiskFormat::Qcow2, CacheMode::None, Some(7))
        );
        let backing: Vec<_> = spec.backing.iter().map(|one| one.format).collect();
        assert_eq!(backing, [DiskFormat::Qcow2, DiskFormat::Raw]);
        assert!(spec.discard && spec.detect_zeroes);
        let drive = disk("bus=cdrom,target=2").unwrap();
        assert_eq!((drive.bus, drive.target), (DiskBus::Cdrom, Some(2)));
        for (text, expected) in [
            ("path=/a", "format=raw or format=qcow2"),
            ("path=/a,format=vmdk", "raw, qcow2 and nbd"),
            ("path=/a,format=qcow2,backing=/b", "backing=raw:base.img"),
            ("path=/a,format=raw,cache=some", "directsync"),
            ("path=/a,format=raw,bus=ide", "scsi and cdrom"),
            ("path=/a,format=raw,bytes-burst=x", "expected a number"),
            ("path=/a,format=raw,colour=red", "readonly"),
        ] {
            assert!(disk(text).unwrap_err().contains(expected), "{text}");
        }
    }
}
