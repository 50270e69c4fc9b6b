// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Create, start and delete of a container that runs a program of three instructions: `atoll-ct` against crun and
//! runc, wall time and CPU time of everything that the runtime starts.
//!
//! Needs root. crun refuses a hybrid cgroup hierarchy, so where there is one the suite runs itself again in a mount
//! namespace without the unified part. This process is the subreaper, as a container engine's monitor is.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::Context as _;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeVal;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;

use crate::Bench;
use crate::table::{Figure, Row};

const PEERS: &[&str] = &["crun", "runc"];
const WALL: &str = "container_create_start_delete";
const CPU: &str = "container_create_start_delete_cpu";
const UNIFIED: &str = "/sys/fs/cgroup/unified";

/// The suite.
pub fn rows(bench: &Bench) -> Vec<Row> {
    if !bench.prepared && Path::new(UNIFIED).join("cgroup.controllers").exists() {
        return again(bench).unwrap_or_else(|error| absent(&error));
    }
    let mut rows = Vec::new();
    for peer in PEERS {
        match compare(bench, peer) {
            Ok(found) => rows.extend(found),
            Err(error) => {
                rows.extend(
                    [WALL, CPU].map(|name| Row::absent(&Figure::cost(name, "ms"), peer, &error)),
                );
            }
        }
    }
    rows
}

fn absent(error: &anyhow::Error) -> Vec<Row> {
    let row = |peer: &&str| Row::absent(&Figure::cost(WALL, "ms"), peer, error);
    PEERS.iter().map(row).collect()
}

fn again(bench: &Bench) -> anyhow::Result<Vec<Row>> {
    let script = format!("umount {UNIFIED} && exec \"$@\"");
    let output = Command::new("unshare")
        .args(["--mount", "sh", "-c", &script, "sh"])
        .arg(std::env::current_exe()?)
        .args([
            "container",
            "--prepared",
            "--runs",
            &bench.runs.to_string(),
            "--bin-dir",
        ])
        .arg(&bench.bin_dir)
        .stderr(Stdio::piped())
        .output()
        .context("unshare")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(
        output.status.success(),
        "without the unified hierarchy: {}",
        complaint.trim()
    );
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(Row::parse)
        .collect())
}

fn compare(bench: &Bench, peer: &str) -> anyhow::Result<[Row; 2]> {
    let ours = bench.program("atoll-ct")?;
    nix::sys::prctl::set_child_subreaper(true).context("become a subreaper")?;
    let directory = tempfile::tempdir().context("temporary directory")?;
    let bundle = bundle(directory.path())?;
    let (mut wall, mut cpu) = (Vec::new(), Vec::new());
    for turn in 0..=bench.runs {
        let us = life(&ours, directory.path(), &bundle, turn)?;
        let them = life(Path::new(peer), directory.path(), &bundle, turn)?;
        wall.push((us.wall_ms, them.wall_ms));
        cpu.push((us.cpu_ms, them.cpu_ms));
    }
    // The first turn read the programs from disk.
    Ok([
        Row::pairs(&Figure::cost(WALL, "ms"), peer, &wall[1..]),
        Row::pairs(&Figure::cost(CPU, "ms"), peer, &cpu[1..]),
    ])
}

struct Cost {
    wall_ms: f64,
    cpu_ms: f64,
}

/// One container from create to delete, its program's end waited for in between.
fn life(runtime: &Path, directory: &Path, bundle: &Path, turn: usize) -> anyhow::Result<Cost> {
    let name = runtime
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let id = format!("atoll-bench-{}-{name}-{turn}", std::process::id());
    let (root, pid_file) = (directory.join(&name), directory.join(format!("{name}.pid")));
    // Not pipes: the container inherits them, and reading one to its end would wait for the container.
    let log = directory.join("log");
    let call = |arguments: &[&str]| {
        let status = Command::new(runtime)
            .arg("--root")
            .arg(&root)
            .args(arguments)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log)?)
            .status()
            .with_context(|| name.clone())?;
        let complaint = fs::read_to_string(&log).unwrap_or_default();
        anyhow::ensure!(
            status.success(),
            "{name} {}: {}",
            arguments[0],
            complaint.trim()
        );
        Ok(())
    };
    let (start, cpu) = (Instant::now(), cpu_of_children()?);
    let text = |path: &Path| path.to_string_lossy().into_owned();
    call(&[
        "create",
        "--bundle",
        &text(bundle),
        "--pid-file",
        &text(&pid_file),
        &id,
    ])?;
    let ended = call(&["start", &id]).and_then(|()| {
        let pid = fs::read_to_string(&pid_file).with_context(|| format!("{name}: pid file"))?;
        Ok(waitpid(Pid::from_raw(pid.trim().parse()?), None)?)
    });
    let deleted = call(&["delete", &id]);
    let cost = Cost {
        wall_ms: start.elapsed().as_secs_f64() * 1000.0,
        cpu_ms: cpu_of_children()? - cpu,
    };
    if ended.is_err() || deleted.is_err() {
        // Leave nothing behind, whatever went wrong first.
        let _ = call(&["delete", "--force", &id]);
    }
    ended?;
    deleted?;
    Ok(cost)
}

/// Milliseconds of CPU of all children that were waited for, theirs included.
fn cpu_of_children() -> anyhow::Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let ms = |time: TimeVal| time.tv_sec() as f64 * 1000.0 + time.tv_usec() as f64 / 1000.0;
    Ok(ms(usage.user_time()) + ms(usage.system_time()))
}

/// A root directory with `/bin/true`, and the configuration that all runtimes get.
fn bundle(directory: &Path) -> anyhow::Result<PathBuf> {
    let bundle = directory.join("bundle");
    let root = bundle.join("rootfs");
    for name in ["bin", "proc", "dev", "sys"] {
        fs::create_dir_all(root.join(name))?;
    }
    let program = root.join("bin/true");
    fs::write(&program, true_elf())?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let namespaces =
        ["pid", "ipc", "uts", "mount", "network"].map(|kind| serde_json::json!({"type": kind}));
    let mount = |to: &str, kind: &str, options: &[&str]| serde_json::json!({"destination": to, "type": kind, "source": kind, "options": options});
    let config = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false, "user": {"uid": 0, "gid": 0}, "args": ["/bin/true"], "cwd": "/",
            "env": ["PATH=/bin"], "noNewPrivileges": true,
        },
        "root": {"path": "rootfs", "readonly": true},
        "hostname": "bench",
        "mounts": [
            mount("/proc", "proc", &[]),
            mount("/dev", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        ],
        "linux": {"namespaces": namespaces, "resources": {"devices": [{"allow": false, "access": "rwm"}]}},
    });
    fs::write(bundle.join("config.json"), serde_json::to_vec(&config)?)?;
    Ok(bundle)
}

/// The smallest program: a static ELF file whose code is exit(0).
fn true_elf() -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    // mov eax, 60; xor edi, edi; syscall
    const CODE: [u8; 9] = [0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05];
    let size = HEADERS + CODE.len() as u64;
    let mut elf = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x02\0\x3e\0\x01\0\0\0");
    elf.extend(
        [BASE + HEADERS, 64, 0]
            .iter()
            .flat_map(|word| word.to_le_bytes()),
    );
    elf.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
    // One segment: load, readable and executable.
    elf.extend([1, 0, 0, 0, 5, 0, 0, 0]);
    elf.extend(
        [0, BASE, BASE, size, size, 0x1000]
            .iter()
            .flat_map(|word| word.to_le_bytes()),
    );
    elf.extend(CODE);
    elf
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_smallest_program_succeeds() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("true");
        fs::write(&path, true_elf()).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(Command::new(&path).status().unwrap().success());
    }
}
