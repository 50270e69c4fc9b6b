// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What firmware is told about the machine, by name (the device: `atoll_devices::platform::FwCfg`).
//!
//! Pure: numbers in, items out.

use atoll_devices::platform::FwCfgItems;
use atoll_devices::platform::fw_cfg::{BOOT_MENU, CPU_COUNT, CPU_COUNT_MAX, UUID};
use atoll_firmware::acpi::Platform;
use atoll_firmware::boot::{self, MemoryKind, MemoryRange};
use atoll_firmware::smbios;
use atoll_firmware::table_loader::{self, RSDP_FILE, SCRIPT_FILE, TABLES_FILE};

/// Sleep states, a byte each, of which S3 and S4 can be switched off: the machine has neither (QEMU
/// `hw/acpi/ich9.c`, read by OVMF's `QemuFwCfgS3Lib`).
const SYSTEM_STATES: [u8; 6] = [128, 0, 0, 1, 2, 128];

/// A device in the boot order that firmware is told of, in the file `bootorder`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct BootEntry {
    /// Its place, as the user's `bootindex`: the lowest is tried first.
    pub index: u16,
    /// PCI slot of the function on bus 0.
    pub slot: usize,
    /// What is there, and where behind the function.
    pub kind: BootKind,
}

/// What a machine can boot from, as firmware's device paths tell it apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BootKind {
    /// A virtio-blk disk.
    Disk,
    /// A disk or a CD-ROM drive on the SCSI host, by its target number.
    Scsi(u8),
    /// A network card.
    Net,
}

impl BootEntry {
    /// Its Open Firmware device path, as OVMF's `QemuBootOrderLib` translates it.
    fn path(self) -> String {
        let slot = self.slot;
        match self.kind {
            BootKind::Disk => format!("/pci@i0cf8/scsi@{slot:x}/disk@0,0"),
            BootKind::Scsi(target) => {
                format!("/pci@i0cf8/scsi@{slot:x}/channel@0/disk@{target:x},0")
            }
            BootKind::Net => format!("/pci@i0cf8/ethernet@{slot:x}/ethernet-phy@0"),
        }
    }
}

/// All items of a machine, before the first instruction. `ram` is base and bytes of each range; `menu_ms` shows firmware's
/// boot menu for that long.
#[must_use]
pub fn items(
    platform: &Platform,
    ram: &[(u64, u64)],
    identity: &smbios::Identity,
    mut boot_order: Vec<BootEntry>,
    menu_ms: Option<u16>,
) -> FwCfgItems {
    let mut items = FwCfgItems::default();
    let cpu_count = u16::from(platform.cpu_count).to_le_bytes();
    items.set(CPU_COUNT, cpu_count);
    items.set(CPU_COUNT_MAX, cpu_count);
    let map: Vec<MemoryRange> = ram
        .iter()
        .map(|&(base, size)| MemoryRange {
            base,
            size,
            kind: MemoryKind::Ram,
        })
        .collect();
    items.add("etc/e820", boot::e820(&map));
    items.add("etc/system-states", SYSTEM_STATES);
    let files = table_loader::table_files(platform);
    items.add(RSDP_FILE, files.rsdp);
    items.add(TABLES_FILE, files.tables);
    items.add(SCRIPT_FILE, files.script);
    let tables = smbios::tables(identity, env!("CARGO_PKG_VERSION"), platform.cpu_count, ram);
    items.add(smbios::ANCHOR_FILE, smbios::anchor(&tables, 0));
    items.add(smbios::TABLES_FILE, tables);
    items.set(UUID, identity.uuid);
    boot_order.sort_unstable();
    if !boot_order.is_empty() {
        let paths: Vec<String> = boot_order.into_iter().map(BootEntry::path).collect();
        items.add("bootorder", paths.join("\n") + "\0");
    }
    if let Some(menu_ms) = menu_ms {
        items.set(BOOT_MENU, 1_u16.to_le_bytes());
        items.add("etc/boot-menu-wait", menu_ms.to_le_bytes());
    }
    items
}

/// Value of IA32_FEATURE_CONTROL that allows VMX and cannot be changed any more until a reset: bits 0 and 2 (SDM vol. 4,
/// table 2-2).
const FEATURE_CONTROL_VMX: u64 = 1 | 1 << 2;

/// Has firmware write it on every vCPU (OVMF `PlatformPei/FeatureControl.c`), as a PC's firmware does: a guest's own
/// hypervisor may look only whether it is there. Linux writes it itself where nobody did.
pub fn switch_vmx_on(items: &mut FwCfgItems) {
    items.add("etc/msr_feature_control", FEATURE_CONTROL_VMX.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::PC;

    #[test]
    fn firmware_reads_memory_and_boot_order() {
        let windows = PC.windows(3 << 30, 40);
        let platform = PC.platform(2, &windows, Vec::new());
        let entry = |index, slot, kind| BootEntry { index, slot, kind };
        let order = vec![
            entry(2, 11, BootKind::Disk),
            entry(1, 3, BootKind::Net),
            entry(2, 4, BootKind::Disk),
            entry(0, 18, BootKind::Scsi(31)),
        ];
        let items = items(
            &platform,
            &PC.ram(3 << 30),
            &smbios::Identity::default(),
            order,
            Some(500),
        );
        let file = |name: &str| items.file(name).unwrap_or_default().to_vec();
        assert_eq!(
            String::from_utf8(file("bootorder")).unwrap(),
            "/pci@i0cf8/scsi@12/channel@0/disk@1f,0\n/pci@i0cf8/ethernet@3/ethernet-phy@0\n\
             /pci@i0cf8/scsi@4/disk@0,0\n/pci@i0cf8/scsi@b/disk@0,0\0"
        );
        assert_eq!(file("etc/boot-menu-wait"), [0xf4, 1]);
        let e820 = file("etc/e820");
        assert_eq!(e820.len(), 40);
        assert_eq!(e820[8..20], [0, 0, 0, 0x80, 0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(
            e820[20..36],
            [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0x40, 0, 0, 0, 0]
        );
    }
}
