// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Saved machines of every release are restored by this one: `tests/golden/VERSION-BOARD.json`, a spec and the state of
//! a machine of that board with every kind of device that needs nothing of the host, but for the bytes of its memory.
//! Those are made here: the guest is one instruction that waits for ever, at 1 MiB.
//!
//! A host's own part in a vCPU (CPUID, MSRs, the speed of its counter) is put in from a machine that is made here and
//! now, since a CPU of another vendor or speed refuses the golden one's, and rightly. Everything else is as it was.
//!
//! A release adds its files: `ATOLL_GOLDEN=write cargo nextest run -p atoll-vmm --test golden`. One that exists is
//! not written again; before its release has been made it may be deleted, when a change to a machine that nobody has
//! yet needs it.

#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "helpers of tests fail by panicking, and say what they skip"
)]

mod guest;

use atoll_vmm_protocol::api::{MachineState, Request};
use guest::{Guest, Place, eventually, kvm};
use serde_json::Value;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use atoll_vmm::testing::pvh_elf;

/// `jmp` to itself behind `hlt`, with interrupts off.
const WAIT: &[u8] = &[0xf4, 0xeb, 0xfd];
const ENTRY: u64 = 0x10_0000;
const MEMORY_MIB: u64 = 8;
const BOARDS: [&str; 2] = ["micro", "pc"];

/// What a restore changes: timers, the generation id, and the event that tells of it.
const MOVING: [&str; 4] = [
    "interval timer.device.state.pit",
    "acpi registers.device.state.timer",
    "generation id.device.state.value",
    "acpi registers.device.state.event_status",
];

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden")
}

/// A folder with the files of the machines.
fn folder() -> Place {
    let place = Place::new();
    std::fs::write(place.path("kernel"), pvh_elf(WAIT)).unwrap();
    std::fs::copy(place.path("disk"), place.path("other")).unwrap();
    place
}

/// A machine of that board, waiting.
fn start(board: &str) -> Guest {
    let memory = MEMORY_MIB.to_string();
    let mut arguments = vec!["run", "--kernel", "kernel", "--profile", board];
    arguments.extend(["--memory", &memory, "--cpus", "2", "--cpu", "x86-64"]);
    for disk in [
        "path=disk,format=raw",
        "path=other,format=raw,bus=scsi",
        "bus=cdrom",
    ] {
        arguments.extend(["--disk", disk]);
    }
    arguments.extend(["--console", "socket=serial", "--virtio-console", "null"]);
    arguments.extend(["--port", "name=a.port,socket=port", "--balloon"]);
    arguments.extend(["--watchdog", "action=none", "--panic", "action=none"]);
    arguments.extend(["--generation-id", "00112233-4455-6677-8899-aabbccddeeff"]);
    folder().start(&arguments)
}

/// Waits for the guest to stand at its second instruction, and takes its spec and state.
fn snapshot(guest: &mut Guest, name: &str) -> (Value, Value) {
    drop(guest.serial());
    eventually("the machine", || {
        let info = guest.client().info().ok()?;
        (info.state == MachineState::Running).then_some(())
    });
    guest.client().act(Request::Pause).unwrap();
    guest.ctl(&["snapshot", "--to", name]).unwrap();
    let read = |file: &str| {
        let text = std::fs::read(guest.path(name).join(file)).unwrap();
        serde_json::from_slice(&text).unwrap()
    };
    (read("spec.json"), read("state.json"))
}

/// One line a device and a vCPU.
fn written(spec: &Value, state: &Value) -> String {
    let mut text = format!("{{\n\"spec\": {spec},\n\"state\": {{");
    for (index, (key, value)) in state.as_object().unwrap().iter().enumerate() {
        let comma = if index == 0 { "" } else { "," };
        let _ = write!(text, "{comma}\n  \"{key}\": ");
        match value.as_array() {
            None => text += &value.to_string(),
            Some(items) => {
                let items: Vec<String> = items.iter().map(|item| format!("\n    {item}")).collect();
                let _ = write!(text, "[{}\n  ]", items.join(","));
            }
        }
    }
    text + "\n}}\n"
}

#[test]
fn the_release_under_way_has_its_files() {
    let version = env!("CARGO_PKG_VERSION");
    for board in BOARDS {
        let path = directory().join(format!("{version}-{board}.json"));
        if path.exists() {
            continue;
        }
        assert_eq!(
            std::env::var("ATOLL_GOLDEN").as_deref(),
            Ok("write"),
            "{} is missing: make it as the head of this file says",
            path.display()
        );
        let (spec, state) = snapshot(&mut start(board), "golden");
        std::fs::create_dir_all(directory()).unwrap();
        std::fs::write(path, written(&spec, &state)).unwrap();
    }
}

/// What differs from `golden`, but for fields that came later and those that a restore changes.
fn difference(golden: &Value, now: &Value, at: &str) -> Option<String> {
    match (golden, now) {
        _ if MOVING.contains(&at) => None,
        (Value::Object(golden), Value::Object(now)) => golden.iter().find_map(|(key, value)| {
            let at = format!("{at}.{key}");
            match now.get(key) {
                None => Some(format!("{at} is gone")),
                Some(now) => difference(value, now, &at),
            }
        }),
        (Value::Array(golden), Value::Array(now)) if golden.len() == now.len() => {
            let mut pairs = golden.iter().zip(now).enumerate();
            pairs.find_map(|(index, (golden, now))| {
                difference(golden, now, &format!("{at}[{index}]"))
            })
        }
        _ if golden == now => None,
        _ => Some(format!("{at} was {golden}, is {now}")),
    }
}

#[test]
fn machines_of_every_release_go_on() {
    if !kvm() {
        return;
    }
    let mut here = BOARDS.map(|board| (board, snapshot(&mut start(board), "here").1));
    let mut count = 0;
    for entry in std::fs::read_dir(directory()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
        let golden: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let mut state = golden["state"].clone();
        let (_, own) = here
            .iter_mut()
            .find(|(board, _)| name.ends_with(&format!("-{board}")))
            .unwrap();
        state["clock"]["tsc_khz"] = own["clock"]["tsc_khz"].clone();
        for (vcpu, own) in [0, 1].map(|index| (index, &own["vcpus"][index])) {
            for field in ["cpuid", "msrs"] {
                state["vcpus"][vcpu][field] = own[field].clone();
            }
        }
        restored_as_it_was(&name, &golden["spec"], &state);
        count += 1;
    }
    assert!(count >= BOARDS.len());
}

fn restored_as_it_was(name: &str, spec: &Value, state: &Value) {
    let place = folder();
    std::fs::create_dir(place.path("golden")).unwrap();
    std::fs::write(place.path("golden/spec.json"), spec.to_string()).unwrap();
    std::fs::write(place.path("golden/state.json"), state.to_string()).unwrap();
    let mut memory = vec![0; usize::try_from(MEMORY_MIB << 20).unwrap()];
    let entry = usize::try_from(ENTRY).unwrap();
    memory[entry..entry + WAIT.len()].copy_from_slice(WAIT);
    std::fs::write(place.path("golden/memory"), memory).unwrap();
    let mut guest = place.start(&["run", "--restore", "golden"]);
    let (_, now) = snapshot(&mut guest, "again");
    let all = |state: &Value, list: &str| state[list].as_array().unwrap().clone();
    let devices = all(state, "devices").into_iter().zip(all(&now, "devices"));
    for (golden, now) in devices {
        let device = golden["name"].as_str().unwrap();
        assert_eq!(difference(&golden, &now, device), None, "{name}");
    }
    for (golden, now) in all(state, "vcpus").iter().zip(all(&now, "vcpus")) {
        for field in ["regs", "sregs", "xcrs", "mp_state"] {
            assert_eq!(
                difference(&golden[field], &now[field], field),
                None,
                "{name}"
            );
        }
    }
    // And it goes on: a reset starts its kernel once more.
    guest.client().act(Request::Resume).unwrap();
    guest.client().act(Request::Reset).unwrap();
    assert_eq!(guest.client().info().unwrap().reset_count, 1);
}
