// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! SMBIOS 3.3 tables: what a guest reads about "its" board, in `dmidecode` and `/sys/class/dmi`. Types 0, 1, 3, 4, 16,
//! 17, 19, 32 and the end (DMTF DSP0134).
//!
//! Pure. Firmware fetches entry point and structures as two files and places them; without firmware the VMM writes
//! both where a kernel searches.

/// Name of the file with the entry point.
pub const ANCHOR_FILE: &str = "etc/smbios/smbios-anchor";
/// Name of the file with the structures.
pub const TABLES_FILE: &str = "etc/smbios/smbios-tables";

/// Largest size in MiB that a memory device says in its 15-bit field.
const SHORT_MIB: u64 = 0x7fff;
/// "Unknown" and "other" in most enumerations (§7).
const OTHER: u8 = 1;
const UNKNOWN: u8 = 2;
/// "Not provided" for handles of error structures.
const NO_ERROR_INFORMATION: u16 = 0xfffe;
/// Handles: one range a type.
const HANDLE_PROCESSOR: u16 = 0x400;
const HANDLE_CHASSIS: u16 = 0x300;
const HANDLE_MEMORY: u16 = 0x1000;

/// What the tables say of the machine (System Management BIOS 3.6 §7.2): empty texts are left out.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Identity {
    /// The system's UUID, as text orders its bytes.
    pub uuid: [u8; 16],
    /// `Atoll` unless the user says something else; likewise the following.
    pub manufacturer: Option<String>,
    /// Product name, type 1.
    pub product: Option<String>,
    /// Version, type 1.
    pub version: Option<String>,
    /// Serial number, type 1.
    pub serial: Option<String>,
    /// Stock keeping unit, type 1.
    pub sku: Option<String>,
    /// Family, type 1.
    pub family: Option<String>,
    /// Texts for the guest's software (type 11).
    pub options: Vec<String>,
}

/// One structure in the making: its fixed part, and its strings.
struct Structure {
    bytes: Vec<u8>,
    strings: Vec<String>,
}

impl Structure {
    fn new(kind: u8, handle: u16) -> Self {
        let mut bytes = vec![kind, 0];
        bytes.extend(handle.to_le_bytes());
        Self {
            bytes,
            strings: Vec::new(),
        }
    }

    fn put(mut self, bytes: &[u8]) -> Self {
        self.bytes.extend(bytes);
        self
    }

    /// A string's number; 0 is none.
    fn text(mut self, text: Option<&str>) -> Self {
        match text {
            None => self.bytes.push(0),
            Some(text) => {
                self.strings.push(text.replace('\0', ""));
                let number = u8::try_from(self.strings.len()).expect("a few strings");
                self.bytes.push(number);
            }
        }
        self
    }

    fn finish(mut self) -> Vec<u8> {
        self.bytes[1] = u8::try_from(self.bytes.len()).expect("structures are short");
        for text in self.strings.iter().filter(|text| !text.is_empty()) {
            self.bytes.extend(text.as_bytes());
            self.bytes.push(0);
        }
        if self.strings.iter().all(String::is_empty) {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        self.bytes
    }
}

/// All structures, for a machine with that many processors and RAM in those ranges (base, size).
#[must_use]
pub fn tables(identity: &Identity, version: &str, cpu_count: u8, ram: &[(u64, u64)]) -> Vec<u8> {
    let mut all = vec![bios(version), system(identity), chassis(identity)];
    // One socket, as CPUID says, with a core each.
    all.push(processor(cpu_count));
    let bytes: u64 = ram.iter().map(|(_, size)| size).sum();
    all.push(memory_array(bytes));
    all.push(memory_device(bytes));
    all.extend((0..).zip(ram).map(|(index, range)| mapped(index, *range)));
    if !identity.options.is_empty() {
        all.push(options(&identity.options));
    }
    all.push(boot_information());
    all.push(Structure::new(127, 0x7f00).finish());
    all.concat()
}

/// The 64-bit entry point (§5.2.2) of structures at `address`. Firmware that places them itself ignores the address.
#[must_use]
pub fn anchor(tables: &[u8], address: u64) -> Vec<u8> {
    let mut bytes = b"_SM3_".to_vec();
    // Checksum, length, version 3.3, revision of the entry point.
    bytes.extend([0, 24, 3, 3, 0, 1, 0]);
    let size = u32::try_from(tables.len()).expect("a few KiB");
    bytes.extend(size.to_le_bytes());
    bytes.extend(address.to_le_bytes());
    let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
    bytes[5] = sum.wrapping_neg();
    bytes
}

fn bios(version: &str) -> Vec<u8> {
    Structure::new(0, 0)
        .text(Some("Atoll"))
        .text(Some(version))
        .put(&0xe800_u16.to_le_bytes())
        .text(Some("01/01/2026"))
        // ROM size; characteristics: none known; extension: ACPI; UEFI, and this is a virtual machine (§7.1.2.2).
        .put(&[0])
        .put(&(1_u64 << 3).to_le_bytes())
        .put(&[1, 1 << 3 | 1 << 4])
        // Releases of BIOS and embedded controller; extended ROM size.
        .put(&[0, 0, 0xff, 0xff, 0, 0])
        .finish()
}

fn system(identity: &Identity) -> Vec<u8> {
    let text = |given: &'_ Option<String>, default: &str| {
        Some(given.clone().unwrap_or_else(|| default.to_owned()))
    };
    // The first three fields of a UUID are little-endian here (§7.2.1).
    let mut uuid = identity.uuid;
    uuid[0..4].reverse();
    uuid[4..6].reverse();
    uuid[6..8].reverse();
    const POWER_SWITCH: u8 = 6;
    Structure::new(1, 0x100)
        .text(text(&identity.manufacturer, "Atoll").as_deref())
        .text(text(&identity.product, "Atoll Virtual Machine").as_deref())
        .text(text(&identity.version, "1").as_deref())
        .text(identity.serial.as_deref())
        .put(&uuid)
        .put(&[POWER_SWITCH])
        .text(identity.sku.as_deref())
        .text(identity.family.as_deref())
        .finish()
}

fn chassis(identity: &Identity) -> Vec<u8> {
    const SAFE: u8 = 3;
    let manufacturer = identity.manufacturer.as_deref().unwrap_or("Atoll");
    Structure::new(3, HANDLE_CHASSIS)
        .text(Some(manufacturer))
        .put(&[OTHER])
        .text(Some("1"))
        .text(None)
        .text(None)
        // Boot-up, power supply, thermal, security state; OEM-defined; height, cords, contained elements.
        .put(&[SAFE, SAFE, SAFE, UNKNOWN])
        .put(&[0; 8])
        .text(None)
        .finish()
}

fn processor(core_count: u8) -> Vec<u8> {
    const CENTRAL: u8 = 3;
    const ENABLED_AND_POPULATED: u8 = 0x41;
    const NO_CACHE: [u8; 2] = [0xff, 0xff];
    let count = u16::from(core_count).to_le_bytes();
    Structure::new(4, HANDLE_PROCESSOR)
        .text(Some("CPU 0"))
        .put(&[CENTRAL, OTHER])
        .text(Some("Atoll"))
        .put(&[0; 8])
        .text(None)
        // Voltage, external clock, maximal and current speed: unknown.
        .put(&[0; 7])
        .put(&[ENABLED_AND_POPULATED, OTHER])
        .put(&[NO_CACHE, NO_CACHE, NO_CACHE].concat())
        .text(None)
        .text(None)
        .text(None)
        // Cores, enabled ones, threads: as bytes and, further on, as words. 64-bit capable.
        .put(&[core_count; 3])
        .put(&[1 << 2, 0])
        .put(&u16::from(UNKNOWN).to_le_bytes())
        .put(&[count, count, count].concat())
        .finish()
}

fn memory_array(bytes: u64) -> Vec<u8> {
    const SYSTEM_BOARD_LIKE: u8 = OTHER;
    const SYSTEM_MEMORY: u8 = 3;
    const MULTI_BIT_ECC: u8 = 6;
    /// In this field, the capacity is in the extended one.
    const EXTENDED: u32 = 0x8000_0000;
    Structure::new(16, HANDLE_MEMORY)
        .put(&[SYSTEM_BOARD_LIKE, SYSTEM_MEMORY, MULTI_BIT_ECC])
        .put(&EXTENDED.to_le_bytes())
        .put(&NO_ERROR_INFORMATION.to_le_bytes())
        .put(&1_u16.to_le_bytes())
        .put(&bytes.to_le_bytes())
        .finish()
}

fn memory_device(bytes: u64) -> Vec<u8> {
    const DIMM: u8 = 9;
    const RAM: u8 = 7;
    let mib = bytes >> 20;
    let short = u16::try_from(mib.min(SHORT_MIB)).expect("15 bits");
    let long = if mib < SHORT_MIB { 0 } else { mib };
    Structure::new(17, HANDLE_MEMORY + 0x100)
        .put(&HANDLE_MEMORY.to_le_bytes())
        .put(&NO_ERROR_INFORMATION.to_le_bytes())
        // Widths: unknown.
        .put(&[0xff; 4])
        .put(&short.to_le_bytes())
        .put(&[DIMM, 0])
        .text(Some("DIMM 0"))
        .text(None)
        .put(&[RAM])
        .put(&u16::from(UNKNOWN).to_le_bytes())
        .put(&[0, 0])
        .text(Some("Atoll"))
        .text(None)
        .text(None)
        .text(None)
        .put(&[0])
        .put(&u32::try_from(long).unwrap_or(u32::MAX >> 1).to_le_bytes())
        // Configured speed, voltages.
        .put(&[0; 8])
        .finish()
}

fn mapped(index: u16, (base, size): (u64, u64)) -> Vec<u8> {
    /// In these fields, the addresses are in the extended ones.
    const EXTENDED: [u8; 4] = [0xff; 4];
    Structure::new(19, HANDLE_MEMORY + 0x300 + index)
        .put(&EXTENDED)
        .put(&EXTENDED)
        .put(&HANDLE_MEMORY.to_le_bytes())
        .put(&[1])
        .put(&base.to_le_bytes())
        .put(&(base + (size - 1)).to_le_bytes())
        .finish()
}

fn options(texts: &[String]) -> Vec<u8> {
    let count = u8::try_from(texts.len()).unwrap_or(u8::MAX);
    let mut structure = Structure::new(11, 0xe00).put(&[count]);
    structure.strings = texts.iter().take(count.into()).cloned().collect();
    structure.finish()
}

fn boot_information() -> Vec<u8> {
    Structure::new(32, 0x2000).put(&[0; 7]).finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Type, handle, fixed part and strings of each structure, walked as a kernel does.
    fn walk(mut bytes: &[u8]) -> Vec<(u8, u16, Vec<u8>, Vec<String>)> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            let (fixed, rest) = bytes.split_at(bytes[1].into());
            let end = rest.windows(2).position(|pair| pair == [0, 0]).unwrap();
            let strings = rest[..end]
                .split(|byte| *byte == 0)
                .filter(|text| !text.is_empty());
            let strings = strings.map(|text| String::from_utf8(text.to_vec()).unwrap());
            let handle = u16::from_le_bytes([fixed[2], fixed[3]]);
            found.push((fixed[0], handle, fixed.to_vec(), strings.collect()));
            bytes = &rest[end + 2..];
        }
        found
    }

    fn identity() -> Identity {
        Identity {
            uuid: std::array::from_fn(|index| u8::try_from(index).unwrap()),
            serial: Some("S1".to_owned()),
            options: vec!["one=1".to_owned(), "two=2".to_owned()],
            ..Identity::default()
        }
    }

    #[test]
    fn a_kernel_finds_every_type() {
        let gib = 1_u64 << 30;
        let ram = [(0, 2 * gib), (4 * gib, 38 * gib)];
        let all = walk(&tables(&identity(), "0.1", 3, &ram));
        let kinds: Vec<u8> = all.iter().map(|(kind, ..)| *kind).collect();
        assert_eq!(kinds, [0, 1, 3, 4, 16, 17, 19, 19, 11, 32, 127]);
        let lengths: Vec<usize> = all.iter().map(|(_, _, fixed, _)| fixed.len()).collect();
        assert_eq!(lengths, [26, 27, 22, 48, 23, 40, 31, 31, 5, 11, 4]);
        let mut handles: Vec<u16> = all.iter().map(|(_, handle, ..)| *handle).collect();
        handles.sort_unstable();
        handles.dedup();
        assert_eq!(handles.len(), all.len());
        let (.., system, strings) = &all[1];
        assert_eq!(strings, &["Atoll", "Atoll Virtual Machine", "1", "S1"]);
        assert_eq!(system[7], 4);
        assert_eq!(system[8..18], [3, 2, 1, 0, 5, 4, 7, 6, 8, 9]);
        assert_eq!(all[3].2[0x23..0x26], [3, 3, 3]);
        let device = &all[5].2;
        assert_eq!(device[12..14], [0xff, 0x7f]);
        assert_eq!(device[28..32], (40_u32 << 10).to_le_bytes());
        assert_eq!(all[7].2[15..23], (4 * gib).to_le_bytes());
        assert_eq!(all[7].2[23..31], (42 * gib - 1).to_le_bytes());
        assert_eq!(all[8].3, ["one=1", "two=2"]);
    }

    #[test]
    fn the_entry_point_sums_to_zero() {
        let bytes = anchor(&[0; 300], 0xf_0020);
        assert_eq!((bytes.len(), &bytes[..5]), (24, &b"_SM3_"[..]));
        let sum = bytes.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte));
        assert_eq!(sum, 0);
        assert_eq!(bytes[12..16], 300_u32.to_le_bytes());
        assert_eq!(bytes[16..24], 0xf_0020_u64.to_le_bytes());
    }
}
