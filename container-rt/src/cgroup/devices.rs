// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The device list of a container on cgroup v2, as a BPF program that the kernel asks at every open and mknod
//! of a device node. libcontainer enforces the list only when built with a C library (libbpf), and otherwise
//! silently not at all; a filter of comparisons needs no library.
//!
//! The program decides each requested right (mknod, read, write) by the last rule that names the device and the
//! right, as the runtime-spec's "Entries MUST be applied in order" has it; what no rule names is denied.
//!
//! ```text
//!  r2 = type   r3 = rights still undecided   r4 = major   r5 = minor
//!  for each rule, last first:  device differs -> next rule
//!      allow: r3 &= !rights;  r3 == 0 -> allow       deny: r3 & rights != 0 -> deny
//!  deny
//! ```

use std::fs::File;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDeviceCgroup, LinuxDeviceType};

use crate::error::{Context, Error, Result};
use crate::sys;

/// Rights as `BPF_DEVCG_ACC_*` numbers them.
const RIGHTS: [(char, i32); 3] = [('m', 1), ('r', 2), ('w', 4)];

/// `BPF_DEVCG_DEV_BLOCK` and `BPF_DEVCG_DEV_CHAR`.
const BLOCK: i32 = 1;
const CHARACTER: i32 = 2;

/// One rule; `None` is any.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Rule {
    allow: bool,
    kind: Option<i32>,
    major: Option<i32>,
    minor: Option<i32>,
    rights: i32,
}

/// What every container may use, whatever its list says: the devices that the runtime-spec's "Default Devices"
/// creates, terminals, and making nodes (using them is another right).
const ALWAYS: [Rule; 10] = [
    any_node(CHARACTER),
    any_node(BLOCK),
    device(1, Some(3)), // null
    device(1, Some(5)), // zero
    device(1, Some(7)), // full
    device(1, Some(8)), // random
    device(1, Some(9)), // urandom
    device(5, Some(0)), // tty
    device(5, Some(2)), // ptmx
    device(136, None),  // pts/*
];

const fn any_node(kind: i32) -> Rule {
    Rule {
        allow: true,
        kind: Some(kind),
        major: None,
        minor: None,
        rights: 1,
    }
}

const fn device(major: i32, minor: Option<i32>) -> Rule {
    Rule {
        allow: true,
        kind: Some(CHARACTER),
        major: Some(major),
        minor,
        rights: 7,
    }
}

fn parse(spec: &LinuxDeviceCgroup) -> Result<Rule> {
    let wrong = |reason: String| Error::Config {
        field: "linux.resources.devices".to_owned(),
        reason,
    };
    let kind = match spec.typ() {
        None | Some(LinuxDeviceType::A) => None,
        Some(LinuxDeviceType::B) => Some(BLOCK),
        Some(LinuxDeviceType::C | LinuxDeviceType::U) => Some(CHARACTER),
        Some(LinuxDeviceType::P) => return Err(wrong("a fifo has no device number".to_owned())),
    };
    // -1 is runc's way to say any.
    let number = |number: Option<i64>| match number {
        None | Some(-1) => Ok(None),
        Some(n) => i32::try_from(n)
            .map(Some)
            .map_err(|_| wrong(format!("device number {n}"))),
    };
    let mut rights = 0;
    for letter in spec.access().as_deref().unwrap_or("rwm").chars() {
        let right = RIGHTS.iter().find(|(known, _)| *known == letter);
        let (_, bit) = right.ok_or_else(|| wrong(format!("access {letter:?}: use r, w and m")))?;
        rights |= bit;
    }
    Ok(Rule {
        allow: spec.allow(),
        kind,
        major: number(spec.major())?,
        minor: number(spec.minor())?,
        rights,
    })
}

/// Encodes one instruction: Documentation/bpf/standardization/instruction-set.rst, "Basic instruction encoding".
fn instruction(opcode: u8, destination: u8, source: u8, offset: i16, immediate: i32) -> u64 {
    u64::from(opcode)
        | u64::from(destination | source << 4) << 8
        | u64::from(offset.cast_unsigned()) << 16
        | u64::from(immediate.cast_unsigned()) << 32
}

/// `if register != value, skip that many instructions`.
fn skip_unless(register: u8, value: i32, skip: i16) -> u64 {
    instruction(0x55, register, 0, skip, value)
}

/// `return verdict`.
fn verdict(allow: bool) -> [u64; 2] {
    [
        instruction(0xb7, 0, 0, 0, allow.into()),
        instruction(0x95, 0, 0, 0, 0),
    ]
}

/// Instructions of one rule. The skips count to its end.
fn compile_rule(rule: Rule) -> Vec<u64> {
    let mut action = if rule.allow {
        // r3 &= !rights; if r3 != 0 skip the verdict.
        vec![
            instruction(0x57, 3, 0, 0, !rule.rights),
            skip_unless(3, 0, 2),
        ]
    } else {
        // r6 = r3 & rights; if r6 == 0 skip the verdict.
        vec![
            instruction(0xbf, 6, 3, 0, 0),
            instruction(0x57, 6, 0, 0, rule.rights),
            instruction(0x15, 6, 0, 2, 0),
        ]
    };
    action.extend(verdict(rule.allow));
    // Prepended one by one, each skips what is there already.
    for (register, value) in [(5, rule.minor), (4, rule.major), (2, rule.kind)] {
        if let Some(value) = value {
            let skip = i16::try_from(action.len()).expect("a rule is at most ten instructions");
            action.insert(0, skip_unless(register, value, skip));
        }
    }
    action
}

/// The whole program for rules in the order of config.json.
fn compile(rules: &[Rule]) -> Vec<u64> {
    // struct bpf_cgroup_dev_ctx: u32 access_type (rights << 16 | type), u32 major, u32 minor.
    let mut program = vec![
        instruction(0x61, 2, 1, 0, 0),
        instruction(0xbf, 3, 2, 0, 0),
        instruction(0x77, 3, 0, 0, 16),
        instruction(0x57, 2, 0, 0, 0xffff),
        instruction(0x61, 4, 1, 4, 0),
        instruction(0x61, 5, 1, 8, 0),
    ];
    for rule in rules.iter().rev() {
        program.extend(compile_rule(*rule));
    }
    program.extend(verdict(false));
    program
}

/// Filters the devices of the cgroup v2 directory by config.json's list, in force when this returns.
pub fn enforce(directory: &Path, list: &[LinuxDeviceCgroup]) -> Result<()> {
    let mut rules = list.iter().map(parse).collect::<Result<Vec<Rule>>>()?;
    rules.extend(ALWAYS);
    let program = sys::bpf_load_device_filter(&compile(&rules))
        .context(|| "load the device filter (needs CAP_BPF or CAP_SYS_ADMIN)".to_owned())?;
    let cgroup = File::open(directory).at("open", directory)?;
    sys::bpf_attach_device_filter(cgroup.as_fd(), program.as_fd())
        .at("attach the device filter to", directory)
}

/// Changes what a container may use on cgroup v1, where each rule is an order of its own. What every container may use
/// stays, whatever the rule says.
pub fn change(directories: &[PathBuf], rule: &LinuxDeviceCgroup) -> Result<()> {
    let parsed = parse(rule)?;
    let covers = |usual: &Rule| {
        usual.rights == parsed.rights
            && usual.kind == parsed.kind
            && usual.major == parsed.major
            && (usual.minor.is_none() || usual.minor == parsed.minor)
    };
    if !parsed.allow && ALWAYS.iter().any(covers) {
        return Ok(());
    }
    let file = if parsed.allow {
        "devices.allow"
    } else {
        "devices.deny"
    };
    let letter = match parsed.kind {
        Some(BLOCK) => "b",
        Some(_) => "c",
        None => "a",
    };
    let number = |number: Option<i32>| number.map_or("*".to_owned(), |n| n.to_string());
    let (major, minor) = (number(parsed.major), number(parsed.minor));
    let access = rule.access().as_deref().unwrap_or("rwm");
    let line = format!("{letter} {major}:{minor} {access}");
    let file = directories
        .iter()
        .map(|d| d.join(file))
        .find(|f| f.exists());
    // A host without the controller limits no device.
    file.map_or(Ok(()), |file| {
        std::fs::write(&file, line).at("write", &file)
    })
}

#[cfg(test)]
mod tests {
    use oci_spec::runtime::LinuxDeviceCgroupBuilder;

    use super::*;

    /// Runs a program as the kernel would, for the few opcodes that we emit.
    fn run(program: &[u64], kind: i32, rights: i32, major: i32, minor: i32) -> bool {
        let context = [(rights << 16 | kind), major, minor];
        let mut register = [0_i64; 11];
        let mut at = 0_usize;
        loop {
            let word = program[at];
            at += 1;
            let [opcode, registers, o0, o1, immediate @ ..] = word.to_le_bytes();
            let destination = usize::from(registers & 15);
            let source = usize::from(registers >> 4);
            let offset = u16::from_le_bytes([o0, o1]);
            let immediate = i64::from(i32::from_le_bytes(immediate));
            match opcode {
                0x61 => register[destination] = context[usize::from(offset) / 4].into(),
                0xbf => register[destination] = register[source],
                0xb7 => register[destination] = immediate,
                0x77 => register[destination] >>= immediate,
                0x57 => register[destination] &= immediate,
                0x55 if register[destination] != immediate => at += usize::from(offset),
                0x15 if register[destination] == immediate => at += usize::from(offset),
                0x55 | 0x15 => {}
                0x95 => return register[0] == 1,
                opcode => panic!("opcode {opcode:#x}"),
            }
        }
    }

    fn rule(allow: bool, kind: LinuxDeviceType, major: i64, access: &str) -> Rule {
        let spec = LinuxDeviceCgroupBuilder::default()
            .allow(allow)
            .typ(kind)
            .access(access);
        parse(&spec.major(major).minor(-1).build().unwrap()).unwrap()
    }

    #[test]
    fn last_rule_wins_right_by_right() {
        let rules = [
            rule(false, LinuxDeviceType::A, -1, "rwm"),
            rule(true, LinuxDeviceType::C, 10, "r"),
            rule(true, LinuxDeviceType::C, 10, "w"),
            rule(true, LinuxDeviceType::B, 8, "rwm"),
            rule(false, LinuxDeviceType::B, 8, "w"),
        ];
        let program = compile(&rules);
        let allowed = |kind, rights, major| run(&program, kind, rights, major, 7);
        assert!(allowed(CHARACTER, 2, 10));
        assert!(
            allowed(CHARACTER, 6, 10),
            "two rules together give both rights"
        );
        assert!(!allowed(CHARACTER, 7, 10), "mknod was never given");
        assert!(!allowed(BLOCK, 2, 10), "another type");
        assert!(allowed(BLOCK, 2, 8));
        assert!(!allowed(BLOCK, 6, 8), "writing was taken back");
        assert!(!allowed(CHARACTER, 2, 11));
    }

    #[test]
    fn empty_list_denies() {
        assert!(!run(&compile(&[]), CHARACTER, 2, 1, 3));
        assert!(run(&compile(&ALWAYS), CHARACTER, 6, 1, 3));
        assert!(!run(&compile(&ALWAYS), BLOCK, 2, 8, 0));
    }

    #[test]
    fn wrong_rules_are_named() {
        let bad = LinuxDeviceCgroupBuilder::default()
            .allow(true)
            .access("rx")
            .build()
            .unwrap();
        assert!(parse(&bad).unwrap_err().to_string().contains("'x'"));
    }
}
