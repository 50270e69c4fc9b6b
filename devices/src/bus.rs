// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Which device answers at an address: one immutable sorted table a bus (ports, memory).
//!
//! Built once by the VMM before the first vCPU runs, then shared by all vCPU threads without a lock. Queue
//! kicks never come here (ioeventfd). What moves while the guest runs, the PCI BARs, sits behind one entry: the
//! PCI window, which has its own table ([`crate::pci::PciBus`]).

use std::sync::Arc;

/// A device that answers port or memory exits.
///
/// Called by any vCPU thread, several at once. `data` has 1, 2, 4 or 8 bytes (KVM splits larger accesses), and
/// `offset` counts from the start of the range; an access may reach past the range's end by `data.len() - 1`.
/// No access is wrong from the host's point of view: what makes no sense reads as ones and writes nothing.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest wrote `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// One row of a bus table: a range of addresses and the device that answers there. Built by the VMM's build table.
#[derive(Clone)]
pub struct BusRange {
    /// First address: a port number or a guest-physical address, as the bus is of ports or of memory.
    pub base: u64,
    /// Addresses covered, at least 1; with `base` it ends within the 64-bit address space.
    pub size: u64,
    /// Shown in errors and logs, to the machine's operator: `serial port`.
    pub name: &'static str,
    /// Who answers; called with offsets from `base`, by several vCPUs at once.
    pub device: Arc<dyn BusDevice>,
}

/// Two rows claim the same address, or one claims none or wraps.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// Both rows are named.
    #[error("{first} and {second} overlap at {base:#x}")]
    Overlap {
        /// Lower range.
        first: &'static str,
        /// Higher range.
        second: &'static str,
        /// Start of the higher one.
        base: u64,
    },
    /// Empty, or past the end of the address space.
    #[error("{name}: a range of {size:#x} bytes at {base:#x} is not possible")]
    Range {
        /// The row.
        name: &'static str,
        /// Its base.
        base: u64,
        /// Its size.
        size: u64,
    },
}

/// An address space with devices in it.
#[derive(Clone, Default)]
pub struct Bus {
    ranges: Arc<[BusRange]>,
}

impl Bus {
    /// Makes the bus's table, for good: sorts `ranges`, and refuses those that overlap, are empty or wrap.
    pub fn new(mut ranges: Vec<BusRange>) -> Result<Self, BusError> {
        ranges.sort_by_key(|range| range.base);
        for range in &ranges {
            if range.size == 0 || range.base.checked_add(range.size - 1).is_none() {
                let BusRange {
                    name, base, size, ..
                } = *range;
                return Err(BusError::Range { name, base, size });
            }
        }
        for pair in ranges.windows(2) {
            if pair[1].base - pair[0].base < pair[0].size {
                return Err(BusError::Overlap {
                    first: pair[0].name,
                    second: pair[1].name,
                    base: pair[1].base,
                });
            }
        }
        Ok(Self {
            ranges: ranges.into(),
        })
    }

    /// The rows in ascending order of their addresses, none of which two rows share.
    pub fn ranges(&self) -> &[BusRange] {
        &self.ranges
    }

    /// A guest's read. Where nobody answers, the data is all ones; returns whether somebody did.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address) {
            Some(range) => {
                range.device.read(address - range.base, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// A guest's write; dropped where nobody answers. Returns whether somebody did.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address) {
            Some(range) => {
                range.device.write(address - range.base, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64) -> Option<&BusRange> {
        let after = self.ranges.partition_point(|range| range.base <= address);
        let range = self.ranges.get(after.checked_sub(1)?)?;
        (address - range.base < range.size).then_some(range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Constant(u8);

    impl BusDevice for Constant {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0 + u8::try_from(offset).unwrap());
        }
        fn write(&self, _: u64, _: &[u8]) {}
    }

    fn row(name: &'static str, base: u64, size: u64) -> BusRange {
        let device = Arc::new(Constant(u8::try_from(base & 0x7f).unwrap()));
        BusRange {
            base,
            size,
            name,
            device,
        }
    }

    #[test]
    fn finds_the_range_of_an_address() {
        let bus = Bus::new(vec![row("b", 0x20, 8), row("a", 0x10, 16)]).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x1f, &mut data));
        assert_eq!(data, [0x1f; 2]);
        assert!(bus.read(0x20, &mut data));
        assert_eq!(data, [0x20; 2]);
        assert!(!bus.read(0x28, &mut data));
        assert_eq!(data, [0xff; 2]);
        assert!(!bus.read(0xf, &mut data));
        assert!(!bus.write(0, &[0]));
    }

    #[test]
    fn refuses_what_cannot_be() {
        let overlap = Bus::new(vec![row("a", 0x10, 0x11), row("b", 0x20, 8)]).err();
        assert_eq!(
            overlap.unwrap().to_string(),
            "a and b overlap at 0x20".to_owned()
        );
        assert!(matches!(
            Bus::new(vec![row("a", 1, 0)]),
            Err(BusError::Range { .. })
        ));
        assert!(matches!(
            Bus::new(vec![row("a", u64::MAX, 2)]),
            Err(BusError::Range { .. })
        ));
    }
}
