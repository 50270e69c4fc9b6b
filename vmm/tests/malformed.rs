// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Kernels, firmware, images and saved machines that are not what they should be: `atoll-vmm run` ends with one line that
//! names the file and what is wrong with it, and the exit code for it (1: a file; 2: the arguments), and nothing was
//! started.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail by panicking")]

use std::path::{Path, PathBuf};
use std::process::Command;

use atoll_disk::qcow2::{Qcow2Options, create};
use atoll_disk::{Format, Source};
use atoll_vmm::probe::PROBE_ELF;

/// Guest memory in MiB: little, so that something too large for it is quickly made.
const MEMORY: &str = "8";

struct Case {
    folder: tempfile::TempDir,
}

impl Case {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("good"), PROBE_ELF).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        std::fs::write(self.path(name), bytes).unwrap();
    }

    /// The line that a run ends with; paths in it are without their folder.
    #[track_caller]
    fn line(&self, arguments: &[&str]) -> String {
        let output = Command::new(env!("CARGO_BIN_EXE_atoll-vmm"))
            .arg("run")
            .args(match arguments {
                ["--restore", ..] => &[][..],
                _ => &["--console", "null", "--memory", MEMORY],
            })
            .args(arguments)
            .current_dir(self.folder.path())
            .output()
            .unwrap();
        let said = String::from_utf8(output.stderr).unwrap();
        let lines: Vec<&str> = said.lines().collect();
        let [line] = lines[..] else {
            panic!("{arguments:?}: not one line: {said}");
        };
        // What is told of the spec, before anything is opened, is the arguments' fault.
        let code = output.status.code();
        assert!(matches!(code, Some(1 | 2)), "{code:?}: {line}");
        line.to_owned()
    }

    #[track_caller]
    fn firmware(&self, keys: &str, expected: &str) {
        let line = self.line(&["--firmware", keys]);
        if no_kvm(&line) {
            return;
        }
        assert_eq!(line, format!("atoll-vmm: firmware {expected}"));
    }

    /// Restores from the folder `saved`, whose state has these bytes.
    #[track_caller]
    fn saved(&self, state: &[u8], expected: &str) {
        self.write("saved/state.json", state);
        let line = self.line(&["--restore", "saved"]);
        if no_kvm(&line) {
            return;
        }
        let rest = line.strip_prefix("atoll-vmm: ");
        assert!(
            rest.is_some_and(|rest| rest.starts_with(expected)),
            "{line}"
        );
    }

    #[track_caller]
    fn kernel(&self, bytes: &[u8], expected: &str) {
        self.write("k", bytes);
        let line = self.line(&["--kernel", "k"]);
        if no_kvm(&line) {
            return;
        }
        assert_eq!(line, format!("atoll-vmm: kernel k: {expected}"));
    }

    #[track_caller]
    fn disk(&self, keys: &str, expected: &str) {
        let line = self.line(&["--kernel", "good", "--disk", keys]);
        if no_kvm(&line) {
            return;
        }
        assert_eq!(line, format!("atoll-vmm: {expected}"));
    }
}

/// Whether this host has no KVM, so that the run ended before what is tested.
#[expect(clippy::print_stdout, reason = "a test that is skipped says so")]
fn no_kvm(line: &str) -> bool {
    let absent = line.contains("/dev/kvm");
    if absent {
        println!("ATOLL-SKIP: {line}");
    }
    absent
}

/// The probe's ELF file with bytes of its own at some places.
fn elf(changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = PROBE_ELF.to_vec();
    for (at, change) in changes {
        bytes[*at..][..change.len()].copy_from_slice(change);
    }
    bytes
}

/// Nothing but a bzImage's header; the fields of `changes` are different.
fn bzimage(changes: &[(usize, &[u8])]) -> Vec<u8> {
    let mut bytes = atoll_vmm::testing::bzimage();
    for (at, change) in changes {
        bytes[*at..][..change.len()].copy_from_slice(change);
    }
    bytes
}

const NO_KERNEL: &str = "neither a bzImage with a 64-bit entry nor an ELF file with a PVH note";

#[test]
fn files_that_are_no_kernel() {
    let case = Case::new();
    case.kernel(b"", NO_KERNEL);
    case.kernel(&b"#!/bin/sh\n".repeat(100), NO_KERNEL);
    case.kernel(&[0; 5000], NO_KERNEL);
    // An old boot protocol, and no 64-bit entry.
    case.kernel(&bzimage(&[(0x206, &[0, 2])]), NO_KERNEL);
    case.kernel(&bzimage(&[(0x236, &[0, 0])]), NO_KERNEL);
    let note = first_header(4);
    case.kernel(&elf(&[(note, &[0; 4])]), NO_KERNEL);
}

/// Where the first program header of a kind is in the probe's file.
fn first_header(kind: u8) -> usize {
    let is = |at: &usize| PROBE_ELF[*at..][..4] == [kind, 0, 0, 0];
    (64..).step_by(56).find(is).unwrap()
}

#[test]
fn elf_files_that_are_damaged() {
    let case = Case::new();
    let size = PROBE_ELF.len();
    let cut = |end: u64, bytes: usize| {
        format!("cut off or damaged: its headers speak of {end} bytes, it has {bytes}")
    };
    case.kernel(&PROBE_ELF[..40], &cut(64, 40));
    case.kernel(&PROBE_ELF[..100], &cut(120, 100));
    let foreign = "an ELF file, but not for 64-bit x86";
    for (at, byte) in [(4, 1), (5, 2), (18, 183)] {
        case.kernel(&elf(&[(at, &[byte])]), foreign);
    }
    // The table of program headers, and a segment's place in the file, its size there, in memory, and address.
    let load = first_header(1);
    case.kernel(&elf(&[(32, &[0xff; 8])]), &cut(u64::MAX, size));
    case.kernel(&elf(&[(load + 8, &[0xff; 8])]), &cut(u64::MAX, size));
    case.kernel(
        &elf(&[(load + 32, &[0, 0, 0, 0, 0, 0, 0, 0x10])]),
        &cut((1 << 60) + 0x120, size),
    );
    let unfit = |bytes: u64, address: u64| {
        format!(
            "loads {bytes} bytes at {address:#x}, which do not fit into the guest's memory: give the machine more, \
             or link it elsewhere"
        )
    };
    case.kernel(
        &elf(&[(load + 40, &[0, 0, 0, 0, 0, 1, 0, 0])]),
        &unfit(1 << 40, 0x10_0000),
    );
    let bytes = u64::from_le_bytes(PROBE_ELF[load + 40..][..8].try_into().unwrap());
    // Boot parameters would be written over it.
    case.kernel(
        &elf(&[(load + 24, &[0, 0x70, 0, 0, 0, 0, 0, 0])]),
        &format!(
            "loads {bytes} bytes at 0x7000: the first MiB is for boot parameters, link it above"
        ),
    );
    case.kernel(
        &elf(&[(load + 24, &[0, 0, 0, 0, 0, 1, 0, 0])]),
        &unfit(bytes, 1 << 40),
    );
}

#[test]
fn bzimages_that_are_damaged_or_too_large() {
    let case = Case::new();
    let whole = bzimage(&[]);
    // A download that stopped.
    case.kernel(
        &whole[..0x1000],
        "cut off or damaged: its headers speak of 5120 bytes, it has 4096",
    );
    case.kernel(
        &bzimage(&[(0x260, &[0, 0, 0, 0x40])]),
        "loads 1073741824 bytes at 0x100000, which do not fit into the guest's memory: give the machine more, or \
         link it elsewhere",
    );
    // Found by the fuzz target `kernel`: the sum of these two wrapped around.
    case.kernel(
        &bzimage(&[(0x258, &[0xff; 8])]),
        "loads 18446744073708503039 bytes at 0x100000, which do not fit into the guest's memory: give the machine \
         more, or link it elsewhere",
    );
}

#[test]
fn kernels_and_initial_disks_that_cannot_be_read() {
    let case = Case::new();
    let fifo = case.path("fifo");
    assert!(
        Command::new("mkfifo")
            .arg(&fifo)
            .status()
            .unwrap()
            .success()
    );
    for (arguments, expected) in [
        (
            &["--kernel", "absent"][..],
            "kernel absent: No such file or directory (os error 2)",
        ),
        (&["--kernel", "."], "kernel .: is a directory"),
        (&["--kernel", "fifo"], "kernel fifo: is not a file"),
        (
            &["--kernel", "good", "--initrd", "fifo"],
            "initrd fifo: is not a file",
        ),
    ] {
        assert_eq!(case.line(arguments), format!("atoll-vmm: {expected}"));
    }
    let initrd = std::fs::File::create(case.path("initrd")).unwrap();
    initrd.set_len(64 << 20).unwrap();
    let line = case.line(&["--kernel", "good", "--initrd", "initrd"]);
    let expected = "atoll-vmm: initrd initrd: an initial RAM disk of 67108864 bytes does not fit below 0x800000, ";
    assert!(no_kvm(&line) || line.starts_with(expected), "{line}");
}

#[test]
fn images_that_are_no_disk() {
    let case = Case::new();
    case.write("none", b"");
    case.write("odd", b"1234567");
    let size = "bytes, expected a multiple of 512 above 0 (truncate -s)";
    case.disk("path=none,format=raw", &format!("disk none has 0 {size}"));
    case.disk("path=odd,format=raw", &format!("disk odd has 7 {size}"));
    for format in ["raw", "qcow2"] {
        let keys = |path: &str| format!("path={path},format={format}");
        case.disk(&keys("."), "disk .: is a directory");
        case.disk(
            &keys("absent"),
            "disk absent: No such file or directory (os error 2)",
        );
    }
    for name in ["none", "odd", "good"] {
        case.disk(
            &format!("path={name},format=qcow2"),
            &format!("disk {name}: is not a qcow2 image: say its real format"),
        );
    }
}

#[test]
fn qcow2_images_that_are_damaged() {
    let case = Case::new();
    create(&case.path("image"), 1 << 20, &Qcow2Options::default()).unwrap();
    let good = std::fs::read(case.path("image")).unwrap();
    let changes: &[(usize, &[u8], &str)] = &[
        (4, &[0, 0, 0, 9], "is qcow2 version 9, expected 2 or 3"),
        (
            20,
            &[0xff; 4],
            "malformed qcow2 header: cluster_bits is 4294967295, expected 9 to 21",
        ),
        (
            24,
            &[0xff; 8],
            "malformed qcow2 header: size is 18446744073709551615, expected a multiple of 512 bytes, less than 64 PiB",
        ),
        (
            32,
            &[0, 0, 0, 1],
            "is encrypted, which is not supported: convert it: qemu-img convert",
        ),
        (
            40,
            &[0xff; 8],
            "malformed qcow2 header: l1_table_offset is 18446744073709551615, expected a table at a cluster's start, \
             of a sane size",
        ),
        (
            72,
            &[0xff],
            "malformed qcow2 header: incompatible_features is 18374686479671623680, expected no unknown bit",
        ),
    ];
    let extension = usize::from(good[103]);
    let names = &[0x68, 3, 0xf8, 0x57, 0, 0, 0, 49][..];
    let cut = "malformed qcow2 header: feature name table is 49, expected 48 bytes for each name";
    for (at, change, expected) in changes.iter().chain(&[(extension, names, cut)]) {
        let mut bad = good.clone();
        bad[*at..][..change.len()].copy_from_slice(change);
        case.write("bad", &bad);
        case.disk("path=bad,format=qcow2", &format!("disk bad: {expected}"));
    }
    for bytes in [3, 71, 103] {
        case.write("bad", &good[..bytes]);
        let line = case.line(&["--kernel", "good", "--disk", "path=bad,format=qcow2"]);
        assert!(
            no_kvm(&line)
                || bytes == 3
                || line
                    .starts_with("atoll-vmm: disk bad: the image is cut off: its header ends at"),
            "{line}"
        );
    }
}

#[test]
fn chains_that_do_not_fit() {
    let case = Case::new();
    create(&case.path("base"), 1 << 20, &Qcow2Options::default()).unwrap();
    let over = |name: &str, format| Qcow2Options {
        backing: Some((name.to_owned(), format)),
        ..Qcow2Options::default()
    };
    create(&case.path("top"), 1 << 20, &over("base", Format::Qcow2)).unwrap();
    case.disk(
        "path=top,format=qcow2",
        "disk top: its header names the backing file \"base\", which the disk's spec does not: add backing=, or \
         rebase it",
    );
    case.disk(
        "path=top,format=qcow2,backing=qcow2:absent",
        "disk absent: No such file or directory (os error 2)",
    );
    case.disk(
        "path=top,format=qcow2,backing=raw:base",
        "disk top: its header says that its backing file is qcow2, the disk's spec says raw",
    );
    case.disk(
        "path=base,format=qcow2,backing=raw:top",
        "disk base: the disk's spec names a backing file, but the image's header names none",
    );
    case.disk(
        "path=top,format=raw,backing=qcow2:base",
        "disk top: a raw image has no backing file",
    );
    // Somebody else writes to it.
    let source = Source {
        path: Path::new(&case.path("base")).to_owned(),
        format: Format::Qcow2,
        backing: Vec::new(),
    };
    let _other = atoll_disk::open(&source, atoll_disk::OpenOptions::default()).unwrap();
    case.disk(
        "path=top,format=qcow2,backing=qcow2:base",
        "disk base is in use: another machine or qemu-img has it open; end that first, or make both read-only",
    );
}

#[test]
fn firmware_that_is_none() {
    let case = Case::new();
    let fifo = case.path("fifo");
    let made = Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    let mut volume = [0; 4096];
    volume[40..44].copy_from_slice(b"_FVH");
    case.write("code", &volume);
    case.write("vars", &volume);
    case.write("text", &[b'#'; 4096]);
    case.write("none", b"");
    case.write("odd", &[0; 4097]);
    case.write("huge", &volume);
    let huge = std::fs::File::options().write(true).open(case.path("huge"));
    huge.unwrap().set_len(16 << 20).unwrap();
    let content = |what: &str, remedy: &str| {
        format!("{what} text: is not a UEFI firmware image: {remedy} of the package ovmf is one")
    };
    let size = |what: &str, path: &str, bytes: u64| {
        format!(
            "{what} {path}: {bytes} bytes: a flash image is a multiple of 4096 bytes, and both together have at most \
             16777216"
        )
    };
    for (code, vars, expected) in [
        (
            "absent",
            "vars",
            "code absent: No such file or directory (os error 2)".to_owned(),
        ),
        (
            "code",
            "absent",
            "variables absent: No such file or directory (os error 2)".to_owned(),
        ),
        (".", "vars", "code .: is a directory".to_owned()),
        ("fifo", "vars", "code fifo: is not a file".to_owned()),
        ("code", "fifo", "variables fifo: is not a file".to_owned()),
        ("none", "vars", size("code", "none", 0)),
        ("odd", "vars", size("code", "odd", 4097)),
        ("code", "none", size("variables", "none", 0)),
        ("code", "odd", size("variables", "odd", 4097)),
        ("huge", "vars", size("code", "huge", 16 << 20)),
        ("text", "vars", content("code", "OVMF_CODE_4M.fd")),
        (
            "code",
            "text",
            content("variables", "a copy of OVMF_VARS_4M.fd"),
        ),
    ] {
        case.firmware(&format!("code={code},vars={vars}"), &expected);
    }
    let vars = std::fs::File::open(case.path("vars")).unwrap();
    rustix::fs::flock(&vars, rustix::fs::FlockOperation::LockExclusive).unwrap();
    case.firmware(
        "code=code,vars=vars",
        "variables vars: another machine uses this file; each needs its own copy",
    );
}

#[test]
fn saved_machines_that_are_damaged() {
    let case = Case::new();
    let line = case.line(&["--restore", "saved"]);
    assert!(no_kvm(&line) || line.contains("saved/spec.json"), "{line}");
    std::fs::create_dir(case.path("saved")).unwrap();
    case.write("saved/spec.json", b"{\"name\": 1}");
    case.saved(
        b"",
        "spec saved/spec.json: invalid type: integer `1`, expected a string",
    );
    let spec = serde_json::json!({
        "name": "a", "cpu_count": 1, "memory_mib": 8,
        "boot": {"kernel": {"image": case.path("good")}}, "rng": false,
    });
    case.write("saved/spec.json", spec.to_string().as_bytes());
    case.saved(b"", "saved/memory: No such file");
    std::fs::remove_file(case.path("saved/state.json")).unwrap();
    let line = case.line(&["--restore", "saved"]);
    assert!(
        no_kvm(&line) || line.contains("saved/state.json: No such file"),
        "{line}"
    );
    case.write("saved/memory", &[0; 4096]);
    for (bytes, expected) in [
        ("", "machine state: damaged: EOF"),
        ("[1]", "machine state: damaged: invalid type"),
        (
            "{}",
            "machine state: the format is \"\", expected \"atoll-machine-state\"",
        ),
    ] {
        case.saved(bytes.as_bytes(), expected);
    }
    fields_that_are_wrong(&case);
}

fn fields_that_are_wrong(case: &Case) {
    // The state of a machine with one vCPU, as the fuzz target `state` begins with.
    let whole = atoll_vmm::testing::state_corpus().swap_remove(0);
    let text = String::from_utf8(whole).unwrap();
    let half = &text.as_bytes()[..text.len() / 2];
    case.saved(half, "machine state: damaged: EOF");
    for (from, to, expected) in [
        (
            "\"version\":1,\"program\"",
            "\"version\":7,\"program\"",
            "machine state: version 7, written by",
        ),
        (
            "\"machine_version\":1",
            "\"machine_version\":7",
            "the state is of machine version 7",
        ),
        (
            "\"cpu_count\":1",
            "\"cpu_count\":3",
            "the state has 3 vCPUs, the spec 1",
        ),
        (
            "\"memory_mib\":1",
            "\"memory_mib\":9",
            "the state has 9 MiB of memory, the spec 8",
        ),
        (
            "\"mp_state\":\"",
            "\"mp_state\":\"00",
            "machine state: damaged: ",
        ),
        (
            "\"mp_state\":\"",
            "\"nested\":\"00\",\"mp_state\":\"",
            "machine state: damaged: 1 bytes, expected 128",
        ),
        (
            "\"memory_mib\":1",
            "\"memory_mib\":8",
            "this host's CPU is not the guest's",
        ),
    ] {
        assert!(text.contains(from), "{from}");
        case.saved(text.replace(from, to).as_bytes(), expected);
    }
}

/// A state that this host could go on with, but for its memory, which is cut off.
#[test]
fn saved_memory_that_is_cut_off() {
    let case = Case::new();
    std::fs::create_dir(case.path("saved")).unwrap();
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden/0.1.0-micro.json");
    let golden: serde_json::Value =
        serde_json::from_slice(&std::fs::read(golden).unwrap()).unwrap();
    let mut state = golden["state"].clone();
    let Ok(kvm) = atoll_vmm::kvm::Kvm::open() else {
        return;
    };
    let leaves = atoll_vmm::saved::leaves(kvm.cpu().unwrap().entries());
    for vcpu in state["vcpus"].as_array_mut().unwrap() {
        vcpu["cpuid"] = serde_json::json!(leaves);
        vcpu["msrs"] = serde_json::json!([]);
    }
    for name in ["kernel", "disk", "other"] {
        case.write(name, &[0; 1 << 20]);
    }
    case.write("saved/spec.json", golden["spec"].to_string().as_bytes());
    // A larger one has something else behind the memory, which is its keeper's affair.
    for bytes in [0, 4096, (8 << 20) - 1] {
        let memory = std::fs::File::create(case.path("saved/memory")).unwrap();
        memory.set_len(bytes).unwrap();
        let expected = format!("the memory file has {bytes} bytes, the machine 8388608");
        let state = state.to_string();
        case.write("saved/state.json", state.as_bytes());
        let line = case.line(&["--restore", "saved"]);
        assert!(no_kvm(&line) || line.contains(&expected), "{line}");
    }
}
