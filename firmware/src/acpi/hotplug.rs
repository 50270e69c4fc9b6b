// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! AML of PCI hot-plug: what a guest does about functions that come to bus 0 and leave it. The registers, and why there
//! are any: `atoll-devices`, `pci/hotplug.rs`.
//!
//! ```text
//! event ─► SCAN: reads "look" and "leave", clears what it read ─► Notify(slot, 1): look there
//!                                                                 Notify(slot, 3): let it go, then _EJ0 ─► "eject"
//! ```
//! Notifications are those of ACPI 6.5 §5.6.6, `_EJ0` §6.3.3, `_SUN` §6.1.11. A slot has no `_STA`: whether something is
//! in it, its configuration space tells.

use acpi_tables::{Aml, aml};

use super::{PciHotplug, hid, ports, serialized};

/// Ports of the registers.
const PORT_COUNT: u8 = 12;
/// "Device check", and "eject request".
const LOOK: u8 = 1;
const LEAVE: u8 = 3;

/// Every slot that may change, and those only: firmware and systems offer their user to remove what has an `_EJ0`.
fn each(slots: u32) -> impl Iterator<Item = u32> {
    (1..32).filter(move |slot| slots & 1 << slot != 0)
}

fn name(slot: u32) -> String {
    format!("S{slot:03X}")
}

/// The slots, inside the host bridge.
pub(super) fn slots(hotplug: &PciHotplug) -> Vec<u8> {
    let eject = aml::Path::new("\\_SB_.PHPC.EJCT");
    each(hotplug.slots)
        .flat_map(|slot| {
            let bit = 1_u32 << slot;
            let let_go = aml::Store::new(&eject, &bit);
            serialized(&aml::Device::new(
                name(slot).as_str().into(),
                vec![
                    &aml::Name::new("_ADR".into(), &(slot << 16)),
                    &aml::Name::new("_SUN".into(), &slot),
                    &aml::Method::new("_EJ0".into(), 1, true, vec![&let_go]),
                ],
            ))
        })
        .collect()
}

/// The device with the registers.
pub(super) fn registers(hotplug: &PciHotplug) -> Vec<u8> {
    let ports = ports(hotplug.port, PORT_COUNT);
    let entry = |name: &[u8; 4]| aml::FieldEntry::Named(*name, 32);
    let scan = scan_body(hotplug.slots);
    serialized(&aml::Device::new(
        "PHPC".into(),
        vec![
            &hid("PNP0A06"),
            &aml::Name::new("_UID".into(), &"PCI hot-plug"),
            &super::Raw(&ports),
            &aml::OpRegion::new(
                "REGS".into(),
                aml::OpRegionSpace::SystemIO,
                &hotplug.port,
                &PORT_COUNT,
            ),
            &aml::Field::new(
                "REGS".into(),
                aml::FieldAccessType::DWord,
                aml::FieldLockRule::NoLock,
                aml::FieldUpdateRule::WriteAsZeroes,
                vec![entry(b"LOOK"), entry(b"LEAV"), entry(b"EJCT")],
            ),
            // Serialized: two at a time would clear each other's bits unseen.
            &aml::Method::new("SCAN".into(), 0, true, vec![&super::Raw(&scan)]),
        ],
    ))
}

/// What the event does.
pub(super) fn scan() -> Vec<u8> {
    serialized(&aml::MethodCall::new("\\_SB_.PHPC.SCAN".into(), Vec::new()))
}

fn scan_body(slots: u32) -> Vec<u8> {
    let mut body = Vec::new();
    let registers = [("LOOK", aml::Local(0)), ("LEAV", aml::Local(1))];
    for (register, local) in &registers {
        let register = aml::Path::new(register);
        body.extend(serialized(&aml::Store::new(local, &register)));
        body.extend(serialized(&aml::Store::new(&register, local)));
    }
    for ((_, local), value) in registers.iter().zip([LOOK, LEAVE]) {
        for slot in each(slots) {
            let slot_path = aml::Path::new(&format!("\\_SB_.PCI0.{}", name(slot)));
            let bit = 1_u32 << slot;
            let is_it = aml::And::new(&aml::ZERO, local, &bit);
            let notify = aml::Notify::new(&slot_path, &value);
            body.extend(serialized(&aml::If::new(&is_it, vec![&notify as &dyn Aml])));
        }
    }
    body
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::process::Command;

    use super::super::{Platform, tests as acpi};
    use super::*;

    const HOTPLUG: PciHotplug = PciHotplug {
        port: 0xae00,
        event: 7,
        slots: 0x7fff_fffe,
    };

    fn dsdt(platform: Platform) -> Vec<u8> {
        super::super::dsdt(&Platform {
            hotplug: Some(HOTPLUG),
            ..platform
        })
    }

    #[test]
    fn slots_that_may_change_can_be_ejected_and_no_others() {
        let few = PciHotplug {
            slots: 1 << 2 | 1 << 20,
            ..HOTPLUG
        };
        let bytes = slots(&few);
        let devices = bytes.windows(2).filter(|bytes| bytes == b"\x5b\x82");
        assert_eq!(devices.count(), 2);
        // Name (_ADR, 0x00140000), Name (_SUN, 0x14)
        let names = b"S014\x08_ADR\x0c\0\0\x14\0\x08_SUN\x0a\x14";
        assert!(bytes.windows(names.len()).any(|bytes| bytes == names));
        // Store (0x00100000, \_SB.PHPC.EJCT)
        let eject = b"\x70\x0c\0\0\x10\0\\\x2f\x03_SB_PHPCEJCT";
        assert!(bytes.windows(eject.len()).any(|bytes| bytes == eject));
    }

    /// ACPICA's own disassembler reads the tables, and its compiler takes the result without an error.
    #[test]
    fn acpica_reads_what_was_written() {
        if Command::new("iasl").arg("-v").output().is_err() {
            println!("ATOLL-SKIP: no iasl (Debian: acpica-tools)");
            return;
        }
        for (board, platform) in [("micro", acpi::platform(2)), ("pc", acpi::pc(2))] {
            let folder = tempfile::tempdir().unwrap();
            let source = read_back(folder.path(), &dsdt(platform));
            for expected in [
                "OperationRegion (REGS, SystemIO, 0xAE00, 0x0C)",
                "Field (REGS, DWordAcc, NoLock, WriteAsZeros)",
                "Method (SCAN, 0, Serialized)",
                "Notify (\\_SB.PCI0.S01E, 0x03) // Eject Request",
                "Notify (\\_SB.PCI0.S001, One) // Device Check",
                "Device (S01E)",
                "\\_SB.PHPC.SCAN ()",
            ] {
                assert!(
                    source.contains(expected),
                    "{board}: no {expected} in\n{source}"
                );
            }
        }
    }

    /// ACPICA's interpreter, which is Linux's too, runs the board's event. Its registers are memory that is filled with
    /// one byte: slots 3, 11, 19 and 27 have changed, and are wanted back.
    #[test]
    fn acpica_does_what_was_meant() {
        if Command::new("acpiexec").arg("-v").output().is_err() {
            println!("ATOLL-SKIP: no acpiexec (Debian: acpica-tools)");
            return;
        }
        let boards = [
            ("\\_SB.GED0._EVT 7", acpi::platform(2)),
            ("\\_GPE._E07", acpi::pc(2)),
        ];
        for (event, platform) in boards {
            let folder = tempfile::tempdir().unwrap();
            std::fs::write(folder.path().join("dsdt.aml"), dsdt(platform)).unwrap();
            let commands = format!("execute {event};execute \\_SB.PCI0.S003._EJ0 1");
            let done = Command::new("acpiexec")
                .args(["-fv", "0x08", "-b", &commands, "dsdt.aml"])
                .current_dir(folder.path())
                .output()
                .unwrap();
            let said =
                String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
            for slot in ["S003", "S00B", "S013", "S01B"] {
                for value in ["0x01 (Device Check)", "0x03 (Eject Request)"] {
                    let told =
                        |line: &str| line.contains(&format!("[{slot}]")) && line.ends_with(value);
                    assert_eq!(said.lines().filter(|line| told(line)).count(), 1, "{said}");
                }
            }
            let told = said.matches("Received a System Notify").count();
            assert_eq!(told, 8, "{said}");
            let ended = said.matches("No object was returned from evaluation");
            assert_eq!(ended.count(), 2, "{said}");
        }
    }

    fn read_back(folder: &Path, table: &[u8]) -> String {
        let iasl = |arguments: &[&str]| {
            let done = Command::new("iasl")
                .args(arguments)
                .current_dir(folder)
                .output();
            let done = done.unwrap();
            let said =
                String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
            assert!(done.status.success(), "iasl {arguments:?}: {said}");
            said.into_owned()
        };
        std::fs::write(folder.join("dsdt.aml"), table).unwrap();
        iasl(&["-d", "dsdt.aml"]);
        let said = iasl(&["-p", "again", "dsdt.dsl"]);
        assert!(said.contains("0 Errors"), "{said}");
        std::fs::read_to_string(folder.join("dsdt.dsl")).unwrap()
    }
}
