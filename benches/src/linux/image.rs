// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the Linux guests boot: Debian's kernel as the plain ELF file that every VMM takes (decompression would be part of
//! every start), and an initramfs of `bin/guest`, the libraries that it is linked with, and Debian's drivers.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::Context as _;

/// Drivers, with what they need, in an order that loads: PCI's and Firecracker's bus, disk, card.
const DRIVERS: &[&str] = &["virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net"];
/// An LZ4 frame of the kind that Linux packs itself into, lz4(1) `-l`.
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];

/// Both files.
#[derive(Debug)]
pub struct Image {
    /// The kernel, ELF with a PVH entry.
    pub kernel: PathBuf,
    /// The initramfs.
    pub initrd: PathBuf,
}

impl Image {
    /// In `folder`, where it was made.
    pub fn at(folder: &Path) -> Self {
        Self {
            kernel: folder.join("vmlinux"),
            initrd: folder.join("initrd"),
        }
    }

    /// Makes it in `folder` from the stock guest (`run/guest-image.sh`), with `program` as the first process.
    pub fn make(folder: &Path, stock: &Path, program: &Path) -> anyhow::Result<Self> {
        let image = Self::at(folder);
        extract(&stock.join("vmlinuz"), &image.kernel).context("extract the kernel")?;
        let archive = initramfs(&stock.join("disk.raw"), program).context("make an initramfs")?;
        fs::write(&image.initrd, archive)?;
        Ok(image)
    }
}

/// The payload of a bzImage (Linux boot protocol: setup_sects at 0x1f1, payload_offset at 0x248, payload_length at 0x24c,
/// in which its size when decompressed is the last 4 bytes).
fn extract(bzimage: &Path, kernel: &Path) -> anyhow::Result<()> {
    let bytes = fs::read(bzimage).with_context(|| bzimage.display().to_string())?;
    let word = |at: usize| -> anyhow::Result<usize> {
        let bytes = bytes.get(at..at + 4).context("a header is too short")?;
        Ok(u32::from_le_bytes(bytes.try_into()?).try_into()?)
    };
    let start = (usize::from(bytes[0x1f1]) + 1) * 512 + word(0x248)?;
    let end = (start + word(0x24c)?).saturating_sub(4);
    let payload = bytes.get(start..end).context("a payload outside")?;
    anyhow::ensure!(payload.starts_with(&LZ4_LEGACY), "it is not packed by LZ4");
    let packed = kernel.with_extension("lz4");
    fs::write(&packed, payload)?;
    let mut unpack = Command::new("lz4");
    run(unpack.args(["-dqf"]).arg(&packed).arg(kernel))?;
    fs::remove_file(packed)?;
    Ok(())
}

fn initramfs(disk: &Path, program: &Path) -> anyhow::Result<Vec<u8>> {
    let mut archive = Archive::default();
    for folder in [
        "dev",
        "proc",
        "modules",
        "lib64",
        "lib",
        "lib/x86_64-linux-gnu",
    ] {
        archive.add(folder, Kind::Folder);
    }
    archive.add("dev/console", Kind::Console);
    archive.add("init", Kind::File(&fs::read(program)?));
    let libraries = run(Command::new("ldd").arg(program))?;
    for path in String::from_utf8(libraries)?.split_whitespace() {
        if let Some(inside) = path.strip_prefix('/') {
            archive.add(inside, Kind::File(&fs::read(path)?));
        }
    }
    let listed = debugfs(disk, "ls -p /usr/lib/modules")?;
    let listed = String::from_utf8(listed)?;
    let version = listed.split('/').find(|name| name.ends_with("-amd64"));
    let folder = format!("/usr/lib/modules/{}", version.context("no modules")?);
    let dependencies = debugfs(disk, &format!("cat {folder}/modules.dep"))?;
    let files = load_order(&String::from_utf8(dependencies)?, DRIVERS);
    let mut order = String::new();
    for file in files {
        let module = debugfs(disk, &format!("cat {folder}/{file}"))?;
        let name = file.rsplit('/').next().unwrap_or(&file);
        archive.add(&format!("modules/{name}"), Kind::File(&module));
        order += name;
        order.push('\n');
    }
    archive.add("modules/order", Kind::File(order.as_bytes()));
    Ok(archive.end())
}

/// Files of modules and all they need, in the order in which they load. A line of `modules.dep` names a module, then
/// those that it needs, the first to load last.
fn load_order(dependencies: &str, names: &[&str]) -> Vec<String> {
    let mut order: Vec<String> = Vec::new();
    for name in names {
        let ending = format!("/{name}.ko");
        let line = dependencies.lines().find_map(|line| {
            line.split_once(':')
                .filter(|(file, _)| file.ends_with(&ending))
        });
        // A driver that is missing is built in, or missed when the guest is not ready.
        let Some((file, needed)) = line else { continue };
        for file in needed.split_whitespace().rev().chain([file]) {
            if !order.iter().any(|known| known == file) {
                order.push(file.to_owned());
            }
        }
    }
    order
}

fn debugfs(disk: &Path, request: &str) -> anyhow::Result<Vec<u8>> {
    run(Command::new("debugfs").args(["-R", request]).arg(disk))
}

fn run(command: &mut Command) -> anyhow::Result<Vec<u8>> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(output.status.success(), "{command:?}: {complaint}");
    Ok(output.stdout)
}

/// An archive as the kernel takes it: cpio, "newc" (`Documentation/driver-api/early-userspace/buffer-format.rst`).
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    count: u32,
}

enum Kind<'a> {
    Folder,
    File(&'a [u8]),
    /// Without it the first process has no output.
    Console,
}

impl Archive {
    fn add(&mut self, name: &str, kind: Kind<'_>) {
        let (mode, device, content): (u32, (u32, u32), &[u8]) = match kind {
            Kind::Folder => (0o040_755, (0, 0), &[]),
            Kind::File(content) => (0o100_755, (0, 0), content),
            Kind::Console => (0o020_600, (5, 1), &[]),
        };
        self.count += 1;
        let size = u32::try_from(content.len()).expect("below 4 GiB");
        let name_size = u32::try_from(name.len() + 1).expect("short");
        // Number, mode, owner, group, links, time, size, device, special device, size of the name, checksum.
        let fields = [
            self.count, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0,
        ];
        self.bytes.extend(b"070701");
        for field in fields {
            write!(self.bytes, "{field:08x}").expect("a vector takes all");
        }
        self.bytes.extend(name.bytes().chain([0]));
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn end(mut self) -> Vec<u8> {
        self.add("TRAILER!!!", Kind::File(&[]));
        self.bytes
    }
}

/// Copies `qemu-system-x86_64` of this machine with the libraries and firmware that it needs to `folder`, and a script in
/// front of it: lab hosts have the same system, but not this program.
pub fn copy_qemu(folder: &Path) -> anyhow::Result<()> {
    let name = "qemu-system-x86_64";
    let program = Path::new("/usr/bin").join(name);
    let inside = folder.join("qemu");
    fs::create_dir(&inside)?;
    fs::copy(&program, inside.join(name)).context("qemu-system-x86_64")?;
    let libraries = run(Command::new("ldd").arg(&program))?;
    for path in String::from_utf8(libraries)?.split_whitespace() {
        let path = Path::new(path);
        if let (true, Some(name)) = (path.is_absolute(), path.file_name()) {
            fs::copy(path, inside.join(name))?;
        }
    }
    for firmware in [
        "bios-256k.bin",
        "kvmvapic.bin",
        "linuxboot_dma.bin",
        "pvh.bin",
    ] {
        let path = ["/usr/share/qemu", "/usr/share/seabios"]
            .map(|folder| Path::new(folder).join(firmware));
        let path = path.iter().find(|path| path.exists());
        fs::copy(path.context(firmware)?, inside.join(firmware))?;
    }
    let script = format!(
        "#!/bin/sh\nhere=$(dirname \"$0\")/qemu\nLD_LIBRARY_PATH=$here exec \"$here/{name}\" -L \"$here\" \"$@\"\n"
    );
    let front = folder.join(name);
    fs::write(&front, script)?;
    fs::set_permissions(front, fs::Permissions::from_mode(0o755))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_load_after_what_they_need() {
        let dependencies = "k/virtio.ko: k/ring.ko\nk/ring.ko:\nk/virtio_net.ko: k/failover.ko k/virtio.ko k/ring.ko\n";
        let order = load_order(dependencies, &["virtio", "builtin", "virtio_net"]);
        let expected = [
            "k/ring.ko",
            "k/virtio.ko",
            "k/failover.ko",
            "k/virtio_net.ko",
        ];
        assert_eq!(order, expected);
    }

    #[test]
    fn cpio_lists_what_the_archive_has() {
        let mut archive = Archive::default();
        archive.add("dev", Kind::Folder);
        archive.add("dev/console", Kind::Console);
        archive.add("init", Kind::File(b"odd"));
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("archive");
        fs::write(&file, archive.end()).unwrap();
        let listed = run(Command::new("cpio")
            .args(["-tv", "--quiet", "-F"])
            .arg(&file))
        .unwrap();
        let listed = String::from_utf8(listed).unwrap();
        let lines: Vec<Vec<&str>> = listed
            .lines()
            .map(|line| line.split_whitespace().collect())
            .collect();
        assert_eq!(lines[0][0], "drwxr-xr-x", "{listed}");
        assert_eq!(
            (lines[1][0], lines[1][4], lines[1][5]),
            ("crw-------", "5,", "1"),
            "{listed}"
        );
        assert_eq!((lines[2][0], lines[2][4]), ("-rwxr-xr-x", "3"), "{listed}");
    }
}
