// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Containers as this node sees them: a bundle for `atoll-ct`, a mounted root file system, veth pairs.
//!
//! ```text
//! run/ct-101/       config.json  rootfs/ mp0/ … (mounted images)  pid  halt-signal  dhcp-net0
//! run/ct/ct-101/    atoll-ct's own: state, console.sock, console.log, tty1.sock …, exit.json
//! ```

pub mod bundle;
pub mod create;
pub mod dhcp;
pub mod export;
pub mod health;
pub mod idmap;
pub mod image;
pub mod import;
pub mod lxc;
pub mod lxcfs;
pub mod plug;
pub mod quota;
pub mod renew;
pub mod restart;
pub mod root;
pub mod setup;
pub mod start;
pub mod terminal;
pub mod watch;

use std::path::{Path, PathBuf};
use std::time::Duration;

use async_trait::async_trait;

use crate::error::Error;
use crate::exec::{ExecError, Program};
use crate::guest::cgroup::Group;
use crate::guest::config::GuestConfig;
use crate::guest::container::bundle::{Mount, Source};
use crate::guest::site::Seat;
use crate::guest::{Console, Guest, Load, Phase, hook};
use crate::network::link;
use crate::process::Process;
use crate::task::TaskContext;

/// Longest run of one `atoll-ct` command; none of them waits for the container's programs.
const COMMAND_MAX: Duration = Duration::from_secs(60);
/// Longest time to format an image: only its metadata is written.
const FORMAT_MAX: Duration = Duration::from_secs(600);
/// How often a mount that is busy for a moment is tried again.
const UNMOUNT_ATTEMPTS: u32 = 40;
const UNMOUNT_PAUSE: Duration = Duration::from_millis(50);

/// A container of this node, running or not.
#[derive(Debug, Clone)]
pub struct Container {
    seat: Seat,
}

impl Container {
    /// The container on this seat.
    pub fn new(seat: Seat) -> Self {
        Self { seat }
    }

    /// Runs a command of `atoll-ct` on it; `args` come before the container's name.
    pub async fn command(&self, args: &[&str], after: &[&str]) -> Result<String, ExecError> {
        Program::new(self.seat.site.program("atoll-ct"))
            .arg("--root")
            .arg(self.seat.site.containers_folder())
            .args(args)
            .arg(self.seat.name())
            .args(after)
            .deadline(COMMAND_MAX)
            .run()
            .await
    }

    /// Gives a running container the limits of a config.
    pub async fn limit(&self, config: &GuestConfig) -> Result<(), Error> {
        let path = self.seat.run_folder().join("resources.json");
        let text = bundle::resources(config).to_string();
        tokio::fs::write(&path, text)
            .await
            .map_err(|e| Error::failed(format!("write {}", path.display()), e))?;
        let args = ["update", "--resources", &path.to_string_lossy()];
        self.command(&args, &[]).await?;
        Ok(())
    }

    /// Its control group.
    pub fn group(&self) -> Group {
        Group::new(self.seat.name())
    }

    /// Whether its last run ended by a reboot from inside: the kernel ends init of a pid namespace with SIGHUP
    /// then, reboot(2).
    pub fn wants_reboot(&self) -> bool {
        self.exit().is_some_and(|exit| exit["signal"] == 1)
    }

    /// The runtime's record of the end of its last run.
    fn exit(&self) -> Option<serde_json::Value> {
        let text = std::fs::read_to_string(self.state_folder().join("exit.json"));
        serde_json::from_str(&text.ok()?).ok()
    }

    /// How its last run ended; `None` when it was asked to end, or while it runs.
    pub fn ended_by_itself(&self) -> Option<restart::Ended> {
        let exit = self.exit()?;
        (!self.asked_file().exists()).then(|| restart::Ended {
            failed: exit["exitCode"] != 0 || self.given_up_file().exists(),
        })
    }

    /// Has a container that does not work power off, and does not wait for that. It has failed then, whatever the exit
    /// code of its program.
    async fn give_up(&self, task: &TaskContext) -> Result<(), Error> {
        self.halt(&self.given_up_file(), task).await
    }

    /// Sends init the signal to power off, once `mark` says why.
    async fn halt(&self, mark: &Path, task: &TaskContext) -> Result<(), Error> {
        let signal = tokio::fs::read_to_string(self.halt_file()).await;
        let signal = signal.unwrap_or_else(|_| "SIGPWR".to_owned());
        task.log(&format!("sending {signal} to init"));
        tokio::fs::write(mark, "")
            .await
            .map_err(|e| Error::failed(format!("write {}", mark.display()), e))?;
        self.command(&["kill"], &[&signal]).await?;
        Ok(())
    }

    /// Made when it is given up because it does not work.
    fn given_up_file(&self) -> PathBuf {
        self.seat.run_folder().join("given-up")
    }

    /// Made when it is asked to power off.
    fn asked_file(&self) -> PathBuf {
        self.seat.run_folder().join("asked")
    }

    /// Where its root file system is mounted while it runs.
    pub fn rootfs(&self) -> PathBuf {
        self.seat.run_folder().join("rootfs")
    }

    fn state_folder(&self) -> PathBuf {
        self.seat.site.containers_folder().join(self.seat.name())
    }

    fn pid_file(&self) -> PathBuf {
        self.seat.run_folder().join("pid")
    }

    fn halt_file(&self) -> PathBuf {
        self.seat.run_folder().join("halt-signal")
    }
}

#[async_trait]
impl Guest for Container {
    /// Init. The number in the file may be another program's by now: ours is in our group.
    fn process(&self) -> Option<Process> {
        let text = std::fs::read_to_string(self.pid_file()).ok()?;
        let process = Process::open(text.trim().parse().ok()?)?;
        self.group().contains(process.pid()).then_some(process)
    }

    fn left_traces(&self) -> bool {
        self.seat.run_folder().exists() || self.state_folder().exists()
    }

    async fn is_paused(&self) -> bool {
        let state = self.command(&["state"], &[]).await.unwrap_or_default();
        serde_json::from_str(&state)
            .is_ok_and(|state: serde_json::Value| state["status"] == "paused")
    }

    async fn pause(&self) -> Result<(), Error> {
        self.command(&["pause"], &[]).await?;
        Ok(())
    }

    async fn resume(&self) -> Result<(), Error> {
        self.command(&["resume"], &[]).await?;
        Ok(())
    }

    /// Its file systems are mounted on this host, which has pages of them that are not in the images yet.
    async fn settle(&self) -> Result<(), Error> {
        let mounts = mounts_below(&self.seat.run_folder());
        let sync = tokio::task::spawn_blocking(move || {
            for mount in mounts {
                rustix::fs::syncfs(std::fs::File::open(mount)?)?;
            }
            Ok::<_, std::io::Error>(())
        });
        sync.await
            .map_err(|e| Error::failed("write the container's file systems", e))?
            .map_err(|e| Error::failed("write the container's file systems", e))
    }

    async fn power_off(&self, task: &TaskContext) -> Result<(), Error> {
        self.halt(&self.asked_file(), task).await
    }

    /// The runtime kills, thaws and collects whatever there is.
    async fn end(&self, _: &TaskContext) -> Result<(), Error> {
        self.clean_up().await
    }

    fn console(&self) -> Result<Console, Error> {
        terminal::console(self, &self.seat.config()?)
    }

    async fn resize_console(&self, tty: Option<u8>, columns: u16, rows: u16) -> Result<(), Error> {
        let (columns, rows) = (columns.to_string(), rows.to_string());
        let tty = tty.map(|number| format!("--tty={number}"));
        let mut words = vec![columns.as_str(), &rows];
        words.extend(tty.as_deref());
        self.command(&["resize"], &words).await?;
        Ok(())
    }

    async fn load(&self) -> Load {
        if !matches!(self.phase(), Phase::Running { .. }) {
            return Load::default();
        }
        let (usage, traffic) = (self.group().usage(), link::guest_traffic(self.seat.id));
        let space = rustix::fs::statvfs(self.rootfs()).ok();
        Load {
            cpu_ns: usage.cpu_ns,
            memory_bytes: usage.memory_bytes,
            read_bytes: usage.read_bytes,
            written_bytes: usage.written_bytes,
            received_bytes: traffic.sent_bytes,
            sent_bytes: traffic.received_bytes,
            disk_bytes: space.map_or(0, |s| s.f_frsize * s.f_blocks.saturating_sub(s.f_bfree)),
        }
    }

    /// DHCP clients, the runtime's state, links, mounts, control group, run folder.
    async fn clean_up(&self) -> Result<(), Error> {
        dhcp::stop_all(&self.seat).await?;
        if self.state_folder().exists() {
            self.command(&["delete", "--force"], &[]).await?;
        }
        link::delete_all(self.seat.id).await?;
        if self.seat.run_folder().exists() {
            hook::run_quietly(&self.seat, hook::POST_STOP).await;
        }
        unmount_below(&self.seat.run_folder()).await?;
        self.group().remove().await;
        self.seat.remove_run_folder().await
    }
}

/// Makes an empty ext4 in a disk image.
pub async fn format(image: &Path) -> Result<(), Error> {
    Program::new("mkfs.ext4")
        .args([
            "-q",
            "-F",
            "-m",
            "0",
            "-E",
            "lazy_itable_init=1,lazy_journal_init=1",
        ])
        .arg(image)
        .deadline(FORMAT_MAX)
        .run()
        .await?;
    Ok(())
}

/// Mounts a disk image of ext4. The kernel gives the loop device back when it is unmounted.
pub async fn mount(image: &Path, folder: &Path) -> Result<(), Error> {
    mount_with(image, folder, "loop,nodev", Some("ext4")).await
}

/// Mounts what a mount point shows below the run folder, where the runtime takes it from. A directory of the host is
/// bound from where it is.
pub async fn mount_point(seat: &Seat, point: &Mount) -> Result<(), Error> {
    let folder = seat.run_folder().join(&point.key);
    let options = |first: &str| {
        let mut options = vec![first.to_owned()];
        options.extend(point.options.iter().cloned());
        options.join(",")
    };
    match &point.source {
        Source::Volume(volume) => {
            let volume = volume
                .parse()
                .map_err(|e| Error::refused(format!("{}: {e}", point.key)))?;
            let image = seat.site.storage.path(&volume).await?;
            mount_with(&image, &folder, &options("loop,nodev"), Some("ext4")).await
        }
        Source::Device(path) => mount_with(path, &folder, &options("nodev"), None).await,
        Source::Folder(path) if path.is_dir() => Ok(()),
        Source::Folder(path) => Err(Error::refused(format!(
            "{}: {} is no directory of this host",
            point.key,
            path.display()
        ))),
    }
}

async fn mount_with(
    source: &Path,
    folder: &Path,
    options: &str,
    file_system: Option<&str>,
) -> Result<(), Error> {
    tokio::fs::create_dir_all(folder)
        .await
        .map_err(|e| Error::failed(format!("make {}", folder.display()), e))?;
    let mut program = Program::new("mount").args(["-o", options]);
    if let Some(file_system) = file_system {
        program = program.args(["-t", file_system]);
    }
    program.arg(source).arg(folder).run().await?;
    Ok(())
}

/// Unmounts everything that is mounted on or below a folder; nothing mounted is no error.
pub async fn unmount_below(folder: &Path) -> Result<(), Error> {
    for attempt in 0.. {
        let Some(innermost) = mounts_below(folder).pop() else {
            break;
        };
        let unmounted = Program::new("umount").arg(&innermost).run().await;
        // A file of a process that is just ending keeps it busy for a moment.
        match unmounted {
            Err(error) if attempt >= UNMOUNT_ATTEMPTS => return Err(error.into()),
            Err(_) => tokio::time::sleep(UNMOUNT_PAUSE).await,
            Ok(_) => {}
        }
    }
    Ok(())
}

/// What is mounted on or below a folder, in the order in which it was mounted.
pub fn mounts_below(folder: &Path) -> Vec<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
    points
        .map(unescape)
        .filter(|path| path.starts_with(folder))
        .collect()
}

/// A path of mountinfo, where a blank is written `\040`, a tab `\011` and a backslash `\134`: proc(5).
pub(crate) fn unescape(text: &str) -> PathBuf {
    let text = text.replace("\\040", " ").replace("\\011", "\t");
    PathBuf::from(text.replace("\\134", "\\"))
}
