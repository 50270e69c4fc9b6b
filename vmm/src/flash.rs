// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Firmware images: opened, checked, mapped so that the code ends at 4 GiB and the variables end where it begins.
//!
//! The code is a copy in memory that the guest can only read; writes to it reach no device. The variables are the
//! guest's own file, behind `atoll_devices::platform::Flash`. Not here: what firmware is told (`fw_cfg.rs`).

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use atoll_devices::platform::{FLASH_BLOCK_BYTES, FlashWindow};
use atoll_vmm_protocol::spec::FirmwareSpec;
use vm_memory::{Bytes, GuestAddress, GuestRegionMmap, MemoryRegionAddress, MmapRegion};

use crate::kvm::{KvmError, VirtualMachine};
use crate::machine::BuildError;

/// Where the code ends: the reset vector is 16 bytes before.
const END: u64 = 1 << 32;
/// Most bytes of code and variables together: what is below belongs to local APICs.
const BYTES_MAX: u64 = 16 << 20;
/// Place and content of the signature in the header of a firmware volume, with which both images begin. UEFI PI 1.8,
/// volume 3, section 3.2.1, "EFI_FIRMWARE_VOLUME_HEADER".
const SIGNATURE_OFFSET: usize = 40;
const SIGNATURE: &[u8] = b"_FVH";
/// Directory of the firmware images that Debian's package `ovmf` installs.
pub const PACKAGED: &str = "/usr/share/OVMF/";

/// Why this firmware cannot be used. Every one is before the guest's first instruction.
#[derive(Debug, thiserror::Error)]
pub enum FlashError {
    /// A file cannot be opened or read.
    #[error("firmware {what} {path}")]
    File {
        /// `code`, `variables` or `log`.
        what: &'static str,
        /// From the spec.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Not a flash image.
    #[error(
        "firmware {what} {path}: {bytes} bytes: a flash image is a multiple of {FLASH_BLOCK_BYTES} bytes, and both \
         together have at most {BYTES_MAX}"
    )]
    Size {
        /// `code` or `variables`.
        what: &'static str,
        /// From the spec.
        path: PathBuf,
        /// Its size.
        bytes: u64,
    },
    /// Neither firmware nor a place for its variables.
    #[error("firmware {what} {path}: is not a UEFI firmware image: {remedy}")]
    Content {
        /// `code` or `variables`.
        what: &'static str,
        /// From the spec.
        path: PathBuf,
        /// What should be there instead.
        remedy: &'static str,
    },
    /// The variables are written to by another machine.
    #[error("firmware variables {path}: another machine uses this file; each needs its own copy")]
    InUse {
        /// From the spec.
        path: PathBuf,
    },
    /// No memory for the images.
    #[error("map the firmware")]
    Map(#[source] io::Error),
}

/// Images as they were opened, before the sandbox.
#[derive(Debug)]
pub struct FirmwareFiles {
    code: Vec<u8>,
    vars: Vec<u8>,
    vars_file: File,
    /// Where the debug port writes firmware's log, at the file's end.
    pub log: Option<File>,
}

/// Images in the guest's address space, as memory of this process that KVM reads for as long as the machine exists.
pub struct FirmwareImages {
    /// Kept for as long as the machine: KVM reads it.
    pub code: Arc<GuestRegionMmap>,
    /// First guest-physical address of the variables, which end where the code begins.
    pub vars_base: u64,
    /// The variables' bytes as the guest sees them.
    pub vars: Arc<GuestRegionMmap>,
    /// Their file, locked against other machines for as long as it is open.
    pub vars_file: File,
}

impl FirmwareFiles {
    /// Opens and reads what the spec names. Fails when a file cannot be opened or read, is of no size or content that
    /// flash has, or is another machine's variables; nothing stays open or locked then. A log that did not exist stays.
    pub fn open(spec: &FirmwareSpec) -> Result<Self, FlashError> {
        Self::take(Self::files(spec)?.into(), spec)
    }

    /// Opens the same, in the order in which [`FirmwareFiles::take`] takes them.
    pub fn files(spec: &FirmwareSpec) -> Result<Vec<OwnedFd>, FlashError> {
        let read = OpenOptions::new().read(true).clone();
        let both = OpenOptions::new().read(true).write(true).clone();
        let open = |what, path: &Path, options: &OpenOptions| {
            options.open(path).map_err(failed(what, path))
        };
        let mut files = vec![
            open("code", &spec.code, &read)?.into(),
            open("variables", &spec.vars, &both)?.into(),
        ];
        if let Some(path) = &spec.log {
            let log = OpenOptions::new().append(true).create(true).clone();
            files.push(open("log", path, &log)?.into());
        }
        Ok(files)
    }

    /// Takes files that are open, here or in another process: code, variables, and the log if the spec names one. Reads and
    /// locks them.
    pub fn take(mut files: VecDeque<OwnedFd>, spec: &FirmwareSpec) -> Result<Self, FlashError> {
        let mut next = |what, path: &Path| {
            let file = files.pop_front().map(File::from);
            file.ok_or_else(|| failed(what, path)(io::ErrorKind::NotFound.into()))
        };
        let code = next("code", &spec.code)?;
        let vars_file = next("variables", &spec.vars)?;
        let log = spec.log.as_deref().map(|path| next("log", path));
        let log = log.transpose()?;
        let code = read("code", &spec.code, &code)?;
        if !is_volume(&code) {
            return Err(FlashError::Content {
                what: "code",
                path: spec.code.clone(),
                remedy: "OVMF_CODE_4M.fd of the package ovmf is one",
            });
        }
        let vars = read("variables", &spec.vars, &vars_file)?;
        if !is_volume(&vars) && !is_blank(&vars) {
            return Err(FlashError::Content {
                what: "variables",
                path: spec.vars.clone(),
                remedy: "a copy of OVMF_VARS_4M.fd of the package ovmf is one",
            });
        }
        let lock = rustix::fs::FlockOperation::NonBlockingLockExclusive;
        rustix::fs::flock(&vars_file, lock).map_err(|_| FlashError::InUse {
            path: spec.vars.clone(),
        })?;
        if code.len() as u64 + vars.len() as u64 > BYTES_MAX {
            return Err(FlashError::Size {
                what: "code",
                path: spec.code.clone(),
                bytes: code.len() as u64,
            });
        }
        Ok(Self {
            code,
            vars,
            vars_file,
            log,
        })
    }

    /// Bytes of the code and of the variables, in this order.
    #[must_use]
    pub fn sizes(&self) -> (u64, u64) {
        (self.code.len() as u64, self.vars.len() as u64)
    }

    /// Maps the images and gives the guest the code; the variables' slot is the caller's, by [`FlashSlot`].
    pub fn map(self, machine: &VirtualMachine) -> Result<FirmwareImages, BuildError> {
        let code_base = END - self.code.len() as u64;
        let vars_base = code_base - self.vars.len() as u64;
        let code = region(code_base, &self.code)?;
        machine.set_rom(CODE_SLOT, &code)?;
        Ok(FirmwareImages {
            vars: region(vars_base, &self.vars)?,
            code,
            vars_base,
            vars_file: self.vars_file,
        })
    }
}

/// Memory slots of the images, above those of RAM.
const CODE_SLOT: u32 = 30;
const VARS_SLOT: u32 = 31;

/// The variables as a read-only memory slot of the guest, while their array is shown.
pub struct FlashSlot {
    machine: VirtualMachine,
    vars: Arc<GuestRegionMmap>,
}

impl FlashSlot {
    /// Shows the variables to the guest, in a memory slot of their own that it cannot write.
    pub fn new(machine: VirtualMachine, vars: Arc<GuestRegionMmap>) -> Result<Self, KvmError> {
        machine.set_rom(VARS_SLOT, &vars)?;
        Ok(Self { machine, vars })
    }
}

impl FlashWindow for FlashSlot {
    fn show(&self, array: bool) -> io::Result<()> {
        let result = match array {
            true => self.machine.set_rom(VARS_SLOT, &self.vars),
            false => self.machine.remove_slot(VARS_SLOT),
        };
        result.map_err(io::Error::other)
    }
}

fn region(base: u64, bytes: &[u8]) -> Result<Arc<GuestRegionMmap>, FlashError> {
    let failed = |error| FlashError::Map(io::Error::other(error));
    let mapping = MmapRegion::new(bytes.len()).map_err(failed)?;
    let region = GuestRegionMmap::new(mapping, GuestAddress(base)).expect("ends at or below 4 GiB");
    region
        .write_slice(bytes, MemoryRegionAddress(0))
        .expect("as long as the bytes");
    Ok(Arc::new(region))
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FlashError {
    let path = path.to_owned();
    move |source| FlashError::File { what, path, source }
}

fn read(what: &'static str, path: &Path, file: &File) -> Result<Vec<u8>, FlashError> {
    let size = file.metadata().map_err(failed(what, path))?.len();
    if size == 0 || size > BYTES_MAX || !size.is_multiple_of(FLASH_BLOCK_BYTES) {
        return Err(FlashError::Size {
            what,
            path: path.to_owned(),
            bytes: size,
        });
    }
    let mut bytes = vec![0; usize::try_from(size).expect("at most 16 MiB")];
    file.read_exact_at(&mut bytes, 0)
        .map_err(failed(what, path))?;
    Ok(bytes)
}

/// Whether a flash image begins with the header of a firmware volume.
fn is_volume(image: &[u8]) -> bool {
    image[SIGNATURE_OFFSET..].starts_with(SIGNATURE)
}

/// Whether the first block is erased: where nothing was written yet, or where a machine ended between erasing it and
/// writing it anew, which firmware makes up for from its spare blocks.
fn is_blank(image: &[u8]) -> bool {
    let block = usize::try_from(FLASH_BLOCK_BYTES).expect("4 KiB");
    let mut bytes = image[..block].iter();
    matches!(image[0], 0 | 0xff) && bytes.all(|byte| *byte == image[0])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(directory: &Path) -> FirmwareSpec {
        FirmwareSpec {
            code: directory.join("code"),
            vars: directory.join("vars"),
            menu_ms: None,
            log: None,
        }
    }

    #[test]
    fn images_are_refused_in_words() {
        let directory = tempfile::tempdir().unwrap();
        let spec = spec(directory.path());
        let check = |expected: &str| {
            let error = FirmwareFiles::open(&spec).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check("firmware code");
        std::fs::write(&spec.code, [b'#'; 4096]).unwrap();
        check("firmware variables");
        std::fs::write(&spec.vars, [0; 4096]).unwrap();
        check("code: is not a UEFI firmware image: OVMF_CODE_4M.fd");
        let mut volume = [0; 4096];
        volume[40..44].copy_from_slice(b"_FVH");
        std::fs::write(&spec.code, volume).unwrap();
        let mut note = [b' '; 4096];
        note[..5].copy_from_slice(b"hello");
        std::fs::write(&spec.vars, note).unwrap();
        check("vars: is not a UEFI firmware image: a copy of OVMF_VARS_4M.fd");
        assert_eq!(std::fs::read(&spec.vars).unwrap(), note);
        for vars in [volume, [0xff; 4096]] {
            std::fs::write(&spec.vars, vars).unwrap();
            FirmwareFiles::open(&spec).unwrap();
        }
        std::fs::write(&spec.vars, [0; 4095]).unwrap();
        check("4095 bytes: a flash image is a multiple of 4096");
        std::fs::write(&spec.vars, [0; 4096]).unwrap();
        let first = FirmwareFiles::open(&spec).unwrap();
        check("another machine uses this file");
        drop(first);
        FirmwareFiles::open(&spec).unwrap();
        let code = File::options().write(true).open(&spec.code).unwrap();
        code.set_len(BYTES_MAX).unwrap();
        check("both together");
    }
}
