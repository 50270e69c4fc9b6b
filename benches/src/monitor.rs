// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The VMMs that are compared. Each is a name and the command that runs a guest (the probe, or Linux) with some devices,
//! its serial port on standard output; `atoll-vmm` as it runs by default, with its sandbox and system-call filters.

use std::fs::File;
use std::io::{Read, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::Bench;
use crate::tap::in_namespace;

/// Memory of every guest.
pub const MEMORY_MIB: u64 = 128;
/// Longest silence of a guest that is at work, which takes about a second: a lost interrupt must not hold the
/// benchmarks for ever.
const SILENCE: Duration = Duration::from_secs(20);
/// Longest time that a VMM whose guest has powered off, or that was asked to end, takes for that.
const END: Duration = Duration::from_secs(5);

/// What a guest has beside memory and a serial port.
#[derive(Debug, Default)]
pub struct Guest {
    /// The kernel's command line.
    pub cmdline: String,
    /// Its disk.
    pub disk: Option<Disk>,
    /// Its network card.
    pub card: Option<Card>,
}

/// A network card.
#[derive(Debug)]
pub struct Card {
    /// Name of its tap.
    pub tap: String,
    /// The host's kernel moves its packets.
    pub vhost: bool,
}

/// A disk.
#[derive(Debug, Clone)]
pub struct Disk {
    /// The image.
    pub path: PathBuf,
    /// `raw` or `qcow2`.
    pub format: &'static str,
    /// How the VMM opens it.
    pub access: Access,
    /// Virtqueues; the guest has as many vCPUs, since not all VMMs allow more queues than that.
    pub queues: u16,
}

/// How a VMM opens an image, as far as it can be told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    /// As it does by itself: its cache, its engine, its threads.
    Default,
    /// In the host's page cache, with io_uring.
    Cached,
    /// Past the host's page cache, with io_uring.
    Direct,
}

impl Guest {
    fn cpus(&self) -> String {
        let queues = self.disk.as_ref().map_or(1, |disk| disk.queues);
        queues.to_string()
    }
}

/// The network card's address.
pub const GUEST_MAC: &str = "02:00:00:00:00:02";

/// A VMM.
#[derive(Debug)]
pub struct Monitor {
    /// In the table.
    pub name: &'static str,
    prepare: fn(&Programs, &Guest) -> anyhow::Result<Prepared>,
    /// Its firmware takes seconds before the guest begins: fewer turns.
    starts_slowly: bool,
}

pub const OURS: Monitor = Monitor {
    name: "atoll-vmm",
    prepare: |programs, guest| Ok(ours(programs, guest).into()),
    starts_slowly: false,
};

/// Ours with the kernel's pages shared among all machines.
pub const OURS_SHARING: Monitor = Monitor {
    name: "atoll-vmm with a shared kernel",
    prepare: |programs, guest| {
        let mut command = ours(programs, guest);
        command.arg("--share-kernel");
        Ok(command.into())
    },
    starts_slowly: false,
};

/// Ours as [`FIRECRACKER`] is, which has neither without its jailer: for what they cost.
pub const UNCONFINED: Monitor = Monitor {
    name: "atoll-vmm without sandbox and filters",
    prepare: |programs, guest| {
        let mut command = ours(programs, guest);
        command.args(["--sandbox", "off", "--seccomp", "off"]);
        Ok(command.into())
    },
    starts_slowly: false,
};

pub const FIRECRACKER: Monitor = Monitor {
    name: "firecracker",
    prepare: firecracker,
    starts_slowly: false,
};

/// The same as it is run for guests of strangers, and as ours runs by default.
pub const JAILED_FIRECRACKER: Monitor = Monitor {
    name: "firecracker under its jailer, with filters",
    prepare: jailed_firecracker,
    starts_slowly: false,
};

pub const CLOUD_HYPERVISOR: Monitor = Monitor {
    name: "cloud-hypervisor",
    prepare: cloud_hypervisor,
    starts_slowly: false,
};

/// Without PCI devices: its firmware assigns them no addresses, and the probe is no operating system that would.
pub const QEMU_MICROVM: Monitor = Monitor {
    name: "qemu-microvm",
    prepare: |programs, guest| Ok(qemu(programs, guest, "microvm").into()),
    starts_slowly: false,
};

pub const QEMU_Q35: Monitor = Monitor {
    name: "qemu-q35",
    prepare: |programs, guest| Ok(qemu(programs, guest, "q35").into()),
    starts_slowly: true,
};

impl Monitor {
    /// What runs that guest.
    pub fn command(&self, programs: &Programs, guest: &Guest) -> anyhow::Result<Command> {
        Ok((self.prepare)(programs, guest)?.command)
    }

    /// Turns that it takes part in.
    pub fn turns_max(&self) -> usize {
        if self.starts_slowly { 2 } else { usize::MAX }
    }
}

/// Where the programs are, and a folder for what they need.
#[derive(Debug)]
pub struct Programs {
    folder: TempDir,
    vmm: PathBuf,
    kernel: PathBuf,
    initrd: Option<PathBuf>,
    peers: Option<PathBuf>,
    /// On a disk, as jails are unless somebody asks for something else.
    jails: PathBuf,
    /// What a jailer is handed, empty.
    network: anyhow::Result<File>,
}

impl Programs {
    /// Ours, the probe, and where peers would be.
    pub fn find(bench: &Bench) -> anyhow::Result<Self> {
        let mut programs = Self::with_kernel(bench, PathBuf::new())?;
        programs.kernel = programs.folder.path().join("probe.elf");
        let status = Command::new(&programs.vmm)
            .args(["probe", "--extract"])
            .arg(&programs.kernel)
            .status()?;
        anyhow::ensure!(status.success(), "atoll-vmm probe --extract: {status}");
        Ok(programs)
    }

    /// The same with Linux instead of the probe.
    pub fn with_linux(bench: &Bench, kernel: PathBuf, initrd: PathBuf) -> anyhow::Result<Self> {
        let mut programs = Self::with_kernel(bench, kernel)?;
        programs.initrd = Some(initrd);
        Ok(programs)
    }

    fn with_kernel(bench: &Bench, kernel: PathBuf) -> anyhow::Result<Self> {
        let network = || File::open("/proc/thread-self/ns/net").context("its network namespace");
        Ok(Self {
            folder: tempfile::tempdir().context("temporary directory")?,
            vmm: bench.program("atoll-vmm")?,
            kernel,
            initrd: None,
            peers: bench.peers.clone(),
            jails: bench.folder.clone(),
            network: in_namespace(network),
        })
    }

    /// Ours.
    pub fn vmm(&self) -> &Path {
        &self.vmm
    }

    /// What every guest runs: the probe, or Linux.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// A peer that the system does not have.
    pub fn peer(&self, name: &str) -> anyhow::Result<PathBuf> {
        let path = self.peers.as_ref().map(|folder| folder.join(name));
        path.filter(|path| path.is_file())
            .with_context(|| format!("no `{name}` in the folder that --peers (PEERS=) names"))
    }

    /// A file that describes the guest to Firecracker.
    pub fn firecracker_config(&self, guest: &Guest) -> anyhow::Result<PathBuf> {
        let config = firecracker_config(&self.kernel, self.initrd.as_deref(), guest)?;
        let name = format!("firecracker-{}.json", firecracker_number());
        let path = self.folder.path().join(name);
        std::fs::write(&path, Value::to_string(&config))?;
        Ok(path)
    }
}

/// A VMM's command, all that it needs in place.
#[derive(Debug)]
pub struct Prepared {
    command: Command,
    jail: Option<TempDir>,
}

impl From<Command> for Prepared {
    fn from(mut command: Command) -> Self {
        command.stdin(Stdio::null());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let jail = None;
        Self { command, jail }
    }
}

impl Prepared {
    /// `monitor` with that guest.
    pub fn new(programs: &Programs, monitor: &Monitor, guest: &Guest) -> anyhow::Result<Self> {
        (monitor.prepare)(programs, guest)
    }

    /// Starts it.
    pub fn start(mut self) -> anyhow::Result<Running> {
        let process = self.command.spawn().context("start it")?;
        Ok(Running {
            process,
            _jail: self.jail,
        })
    }

    /// The same, with a serial port that can be typed into.
    pub fn start_to_type(mut self) -> anyhow::Result<Running> {
        self.command.stdin(Stdio::piped());
        self.start()
    }
}

fn ours(programs: &Programs, guest: &Guest) -> Command {
    let mut command = Command::new(&programs.vmm);
    command.arg("run").arg("--kernel").arg(&programs.kernel);
    if let Some(initrd) = &programs.initrd {
        command.arg("--initrd").arg(initrd);
    }
    command.args(["--cmdline", &guest.cmdline, "--cpus", &guest.cpus()]);
    command.args(["--console", "stdio", "--memory", &MEMORY_MIB.to_string()]);
    if let Some(disk) = &guest.disk {
        let (path, format, queues) = (disk.path.display(), disk.format, disk.queues);
        let mut keys = format!("path={path},format={format},queues={queues}");
        keys.push_str(match disk.access {
            Access::Default => "",
            Access::Cached => ",cache=writeback",
            Access::Direct => ",cache=none",
        });
        command.args(["--disk", &keys]);
    }
    if let Some(Card { tap, vhost }) = &guest.card {
        let vhost = if *vhost { "on" } else { "off" };
        let keys = format!("tap={tap},mac={GUEST_MAC},vhost={vhost}");
        command.args(["--net", &keys]);
    }
    command
}

/// By itself; with PCI where there is a device, as ours have no other bus.
fn firecracker(programs: &Programs, guest: &Guest) -> anyhow::Result<Prepared> {
    let mut command = Command::new(programs.peer("firecracker")?);
    let path = programs.firecracker_config(guest)?;
    command.args(["--no-api", "--config-file"]).arg(path);
    if guest.disk.is_some() || guest.card.is_some() {
        command.arg("--enable-pci");
    }
    Ok(command.into())
}

/// In a mount namespace and a folder of its own, which the jailer copies the program to; as a user of its own; in a
/// network namespace that is there already, as the jailer wants it.
fn jailed_firecracker(programs: &Programs, guest: &Guest) -> anyhow::Result<Prepared> {
    let (program, jailer) = (programs.peer("firecracker")?, programs.peer("jailer")?);
    let filters = programs.peer("firecracker-filters.bpf")?;
    anyhow::ensure!(
        guest.disk.is_none() && guest.card.is_none() && programs.initrd.is_none(),
        "nothing but a kernel is put into its jail"
    );
    let jail = tempfile::tempdir_in(&programs.jails).context("a folder for its jail")?;
    let id = firecracker_number();
    let root = jail.path().join(format!("firecracker/{id}/root"));
    std::fs::create_dir_all(&root)?;
    std::fs::copy(&programs.kernel, root.join("kernel"))?;
    std::fs::copy(filters, root.join("filters"))?;
    let config = firecracker_config(Path::new("/kernel"), None, guest)?;
    std::fs::write(root.join("config"), Value::to_string(&config))?;
    let user = (JAILED_UID_BASE + id).to_string();
    let network = programs.network.as_ref();
    let network = network.map_err(|error| anyhow::anyhow!("{error:#}"))?;
    let (own, network) = (std::process::id(), network.as_raw_fd());
    let mut command = Command::new(jailer);
    command.args(["--id", &id.to_string(), "--uid", &user, "--gid", &user]);
    command.arg("--exec-file").arg(program);
    command.arg("--chroot-base-dir").arg(jail.path());
    command.args(["--netns", &format!("/proc/{own}/fd/{network}")]);
    command.args(["--", "--no-api", "--config-file", "/config"]);
    command.args(["--seccomp-filter", "/filters"]);
    Ok(Prepared {
        jail: Some(jail),
        ..command.into()
    })
}

/// Users of jailed machines, one each, as far from others as ours (`UID_BASE` of `vmm/src/sandbox`).
const JAILED_UID_BASE: u32 = 4_291_000_000;

/// Of one machine's files, jail and user: a hundred may be reading theirs.
fn firecracker_number() -> u32 {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

fn firecracker_config(
    kernel: &Path,
    initrd: Option<&Path>,
    guest: &Guest,
) -> anyhow::Result<Value> {
    let mut config = json!({
        "boot-source": {"kernel_image_path": kernel, "boot_args": guest.cmdline, "initrd_path": initrd},
        "machine-config": {"vcpu_count": 1, "mem_size_mib": MEMORY_MIB},
        "drives": [],
    });
    if let Some(disk) = &guest.disk {
        anyhow::ensure!(disk.format == "raw", "it has raw disks only");
        anyhow::ensure!(disk.access != Access::Direct, "it has no direct I/O");
        anyhow::ensure!(disk.queues == 1, "its disks have one queue");
        let mut drive =
            json!({"drive_id": "disk", "path_on_host": disk.path, "is_root_device": false});
        if disk.access == Access::Cached {
            drive["cache_type"] = "Writeback".into();
            drive["io_engine"] = "Async".into();
        }
        config["drives"] = json!([drive]);
    }
    if let Some(Card { tap, vhost }) = &guest.card {
        anyhow::ensure!(!vhost, "it has no vhost-net");
        config["network-interfaces"] =
            json!([{"iface_id": "net", "guest_mac": GUEST_MAC, "host_dev_name": tap}]);
    }
    Ok(config)
}

fn cloud_hypervisor(programs: &Programs, guest: &Guest) -> anyhow::Result<Prepared> {
    let mut command = Command::new(programs.peer("cloud-hypervisor")?);
    command.arg("--kernel").arg(&programs.kernel);
    if let Some(initrd) = &programs.initrd {
        command.arg("--initramfs").arg(initrd);
    }
    command.args(["--cmdline", &guest.cmdline]);
    // The probe maps 512 GiB, and this VMM puts its devices at the end of the address space.
    command.args(["--cpus", &format!("boot={},max_phys_bits=39", guest.cpus())]);
    command.args(["--memory", &format!("size={MEMORY_MIB}M")]);
    command.args(["--serial", "tty", "--console", "off"]);
    if let Some(disk) = &guest.disk {
        let (path, format, queues) = (disk.path.display(), disk.format, disk.queues);
        let mut keys = format!("path={path},image_type={format},num_queues={queues}");
        keys.push_str(match disk.access {
            Access::Default => "",
            Access::Cached => ",direct=off,queue_size=256",
            Access::Direct => ",direct=on,queue_size=256",
        });
        command.args(["--disk", &keys]);
    }
    if let Some(Card { tap, vhost }) = &guest.card {
        anyhow::ensure!(!vhost, "it has no vhost-net of its own");
        command.args(["--net", &format!("tap={tap},mac={GUEST_MAC}")]);
    }
    Ok(command.into())
}

fn qemu(programs: &Programs, guest: &Guest, machine: &str) -> Command {
    let mut command = Command::new("qemu-system-x86_64");
    command.args(["-M", machine, "-accel", "kvm", "-nodefaults"]);
    // arch-capabilities=off: QEMU 7.2 asserts on this MSR under kvm_pvm; elsewhere it makes no difference to a start.
    command.args(["-cpu", "host,arch-capabilities=off", "-no-user-config"]);
    command.args(["-m", &MEMORY_MIB.to_string(), "-smp", &guest.cpus()]);
    command.args(["-display", "none", "-no-reboot", "-serial", "stdio"]);
    command.args(["-append", &guest.cmdline, "-kernel"]);
    command.arg(&programs.kernel);
    if let Some(initrd) = &programs.initrd {
        command.arg("-initrd").arg(initrd);
    }
    if let Some(disk) = &guest.disk {
        let (path, format, queues) = (disk.path.display(), disk.format, disk.queues);
        let (of_drive, of_device) = match disk.access {
            Access::Default => ("", ""),
            Access::Cached => (",cache=writeback,aio=io_uring", ",iothread=io"),
            Access::Direct => (",cache=none,aio=io_uring", ",iothread=io"),
        };
        let drive = format!("file={path},format={format},if=none,id=disk{of_drive}");
        command.args(["-drive", &drive, "-object", "iothread,id=io", "-device"]);
        command.arg(format!(
            "virtio-blk-pci,drive=disk,num-queues={queues},disable-legacy=on{of_device}"
        ));
    }
    if let Some(Card { tap, vhost }) = &guest.card {
        let vhost = if *vhost { "on" } else { "off" };
        let netdev = format!("tap,id=net,ifname={tap},script=no,downscript=no,vhost={vhost}");
        command.args(["-netdev", &netdev, "-device"]);
        command.arg(format!(
            "virtio-net-pci,netdev=net,mac={GUEST_MAC},disable-legacy=on,romfile="
        ));
    }
    command
}

/// A running VMM, ended when dropped.
#[derive(Debug)]
pub struct Running {
    process: Child,
    /// Removed after its end.
    _jail: Option<TempDir>,
}

impl Running {
    /// Starts `monitor` with that guest.
    pub fn start(programs: &Programs, monitor: &Monitor, guest: &Guest) -> anyhow::Result<Self> {
        Prepared::new(programs, monitor, guest)?.start()
    }

    /// Types into its serial port, if that was asked for ([`Prepared::start_to_type`]).
    pub fn type_in(&mut self, text: &[u8]) -> anyhow::Result<()> {
        let input = self.process.stdin.as_mut().context("its input")?;
        input.write_all(text).context("type")
    }

    /// Starts a command.
    pub fn of(command: Command) -> anyhow::Result<Self> {
        Prepared::from(command).start()
    }

    /// Its standard output, for who reads it elsewhere.
    pub fn take_output(&mut self) -> anyhow::Result<ChildStdout> {
        self.process.stdout.take().context("its output")
    }

    /// Its process.
    pub fn id(&self) -> u32 {
        self.process.id()
    }

    /// Reads the serial port until `text` has come; returns all that came.
    pub fn wait_for(&mut self, text: &[u8]) -> anyhow::Result<String> {
        self.wait_within(text, SILENCE)
    }

    /// The same, for that long.
    pub fn wait_within(&mut self, text: &[u8], longest: Duration) -> anyhow::Result<String> {
        let deadline = Instant::now() + longest;
        let output = self.process.stdout.as_mut().context("its output")?;
        let mut heard = Vec::new();
        while !heard.ends_with(text) {
            let mut event = [PollFd::new(output.as_fd(), PollFlags::POLLIN)];
            let left = deadline.saturating_duration_since(Instant::now());
            let came = poll(&mut event, PollTimeout::try_from(left)?)?;
            anyhow::ensure!(came > 0, "it says nothing more: {}", last_line(&heard));
            let mut byte = [0];
            if output.read(&mut byte)? == 0 {
                let mut complaint = Vec::new();
                if let Some(stderr) = &mut self.process.stderr {
                    stderr.read_to_end(&mut complaint)?;
                }
                let text = String::from_utf8_lossy(text);
                anyhow::bail!("it ended without {text:?}: {}", last_line(&complaint));
            }
            heard.push(byte[0]);
        }
        Ok(String::from_utf8_lossy(&heard).into_owned())
    }
}

impl Running {
    /// Waits for the end of a VMM whose guest is done; asks for it with SIGTERM when it does not come. One that is killed
    /// leaves its qcow2 image marked as in use, and the next one refuses it.
    fn finish(mut self) -> anyhow::Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.id())?);
        for _ in 0..2 {
            let deadline = Instant::now() + END;
            while Instant::now() < deadline {
                if self.process.try_wait()?.is_some() {
                    return Ok(());
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            kill(pid, Signal::SIGTERM)?;
        }
        anyhow::bail!("it does not end")
    }
}

fn last_line(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.lines().last().unwrap_or_default().to_owned()
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail when it has powered off by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Runs one work of the probe's mode `bench` (see `firmware/probe/src/bench`) in a guest of its own, since not every
/// VMM can reset a device; returns its nanoseconds.
pub fn work(
    programs: &Programs,
    monitor: &Monitor,
    guest: Guest,
    work: &str,
) -> anyhow::Result<f64> {
    let cmdline = format!("bench {} {work}", guest.cmdline);
    let mut running = Running::start(programs, monitor, &Guest { cmdline, ..guest })?;
    let said = running.wait_for(b"bench done")?;
    running.finish()?;
    let said = said.lines().find_map(|line| line.split_once("ns="));
    let (_, ns) = said.with_context(|| format!("no result of {work}"))?;
    let digits = ns.split(' ').next().unwrap_or_default();
    digits.parse().with_context(|| format!("{work}: {digits}"))
}

/// Proportional set size of the whole process, its guest's RAM included.
pub fn pss_kib(running: &Running) -> anyhow::Result<f64> {
    let lines = smaps(running)?;
    let lines = lines.lines().filter_map(|line| line.strip_prefix("Pss:"));
    let kib = lines.filter_map(|line| line.split_whitespace().next()?.parse::<u32>().ok());
    Ok(f64::from(kib.sum::<u32>()))
}

/// A process's memory map.
pub fn smaps(running: &Running) -> anyhow::Result<String> {
    let path = Path::new("/proc").join(running.id().to_string());
    std::fs::read_to_string(path.join("smaps")).context("its memory map")
}
