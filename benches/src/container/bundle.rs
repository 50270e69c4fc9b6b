// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The bundle that all runtimes get, and the programs in it.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The smallest program.
pub const TRUE: &str = "/bin/true";
/// One that waits for a signal, for ever.
pub const PAUSE: &str = "/bin/pause";

/// Programs and their code.
const PROGRAMS: &[(&str, &[u8])] = &[
    // mov eax, 60; xor edi, edi; syscall: exit(0).
    (TRUE, &[0xb8, 60, 0, 0, 0, 0x31, 0xff, 0x0f, 0x05]),
    // mov eax, 34; syscall; jmp to the begin: pause().
    (PAUSE, &[0xb8, 34, 0, 0, 0, 0x0f, 0x05, 0xeb, 0xf7]),
];

/// A root directory with the programs, and the configuration that all runtimes get: it runs `program`.
pub fn write(directory: &Path, program: &str) -> anyhow::Result<PathBuf> {
    let bundle = directory.join("bundle");
    let root = bundle.join("rootfs");
    for name in ["bin", "proc", "dev", "sys"] {
        fs::create_dir_all(root.join(name))?;
    }
    for (path, code) in PROGRAMS {
        let path = root.join(path.trim_start_matches('/'));
        fs::write(&path, elf(code))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    }
    let namespaces =
        ["pid", "ipc", "uts", "mount", "network"].map(|kind| serde_json::json!({"type": kind}));
    let mount = |to: &str, kind: &str, options: &[&str]| serde_json::json!({"destination": to, "type": kind, "source": kind, "options": options});
    let config = serde_json::json!({
        "ociVersion": "1.0.2",
        "process": {
            "terminal": false, "user": {"uid": 0, "gid": 0}, "args": [program], "cwd": "/",
            "env": ["PATH=/bin"], "noNewPrivileges": true,
        },
        "root": {"path": root, "readonly": true},
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

/// A static ELF file.
fn elf(code: &[u8]) -> Vec<u8> {
    const BASE: u64 = 0x40_0000;
    const HEADERS: u64 = 64 + 56;
    let size = HEADERS + code.len() as u64;
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
    elf.extend(code);
    elf
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn the_smallest_program_succeeds() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("true");
        fs::write(&path, elf(PROGRAMS[0].1)).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        assert!(Command::new(&path).status().unwrap().success());
    }
}
