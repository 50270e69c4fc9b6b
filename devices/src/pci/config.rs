// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The 256 bytes of a function's configuration space: values, and which bits of them the guest may write.
//!
//! Pure data. BAR sizing works by itself: a BAR's address bits below its size are not writable, so that the
//! guest which writes all ones reads the size mask back. PCI Local Bus 3.0 §6.1 and §6.2.5.

/// Bytes of configuration space a conventional function has.
pub(super) const CONFIG_BYTES: usize = 256;
/// Command register, PCI 3.0 §6.2.2.
const COMMAND: usize = 0x04;
/// Command bits a guest may set: memory space, bus master, SERR#, INTx disable.
const COMMAND_WRITABLE: u16 = 0x0506;
/// Command bit: the function answers in its memory BARs.
const COMMAND_MEMORY: u16 = 1 << 1;
/// Status register.
const STATUS: usize = 0x06;
/// Status bit: there is a capability list.
const STATUS_CAPABILITIES: u8 = 1 << 4;
/// First BAR.
const BAR0: usize = 0x10;
/// BARs of a type 0 header.
const BAR_COUNT: usize = 6;
/// Low bits of a 64-bit memory BAR, not prefetchable. PCI 3.0 §6.2.5.1.
const BAR_MEMORY_64: u8 = 0b100;
/// Offset of the first capability.
const CAPABILITY_POINTER: usize = 0x34;
/// Interrupt line: no meaning to us, software keeps a note there.
const INTERRUPT_LINE: usize = 0x3c;
/// Where capabilities begin.
const CAPABILITIES_START: usize = 0x40;

/// What a function says it is: the registers by which a guest chooses its driver, PCI 3.0 §6.2.1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID: 0x1af4 for virtio.
    pub vendor: u16,
    /// Device ID, a number of that vendor's.
    pub device: u16,
    /// Subsystem vendor ID, PCI 3.0 §6.2.4.
    pub subsystem_vendor: u16,
    /// Subsystem ID, a number of the subsystem's vendor.
    pub subsystem: u16,
    /// Base class, sub class, programming interface: `0xCCSSPP`.
    pub class: u32,
    /// Revision ID, a number of the vendor's.
    pub revision: u8,
}

/// One 64-bit memory BAR; it takes two of the six registers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bar {
    /// Index of the first of its two registers: 0, 2 or 4.
    pub index: usize,
    /// Bytes that it decodes: a power of two, at least 16.
    pub size: u64,
}

/// One entry of the capability list, without its two-byte header.
#[derive(Debug, Clone)]
pub struct Capability {
    /// Capability ID, PCI 3.0 appendix H: 0x09 for a vendor's own, 0x11 for MSI-X.
    pub id: u8,
    /// Bytes behind the ID and the `next` pointer, as at power-on.
    pub body: Vec<u8>,
    /// Which bits of `body` the guest may write; missing bytes are read-only.
    pub writable: Vec<u8>,
}

/// Values, writable bits and BARs of one function.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_BYTES],
    writable: [u8; CONFIG_BYTES],
    bars: Vec<Bar>,
    next_capability: usize,
    last_pointer: usize,
}

impl ConfigSpace {
    /// A type 0 header without BARs and capabilities.
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_BYTES],
            writable: [0; CONFIG_BYTES],
            bars: Vec::new(),
            next_capability: CAPABILITIES_START,
            last_pointer: CAPABILITY_POINTER,
        };
        space.put(0x00, &identity.vendor.to_le_bytes());
        space.put(0x02, &identity.device.to_le_bytes());
        space.put(0x08, &[identity.revision]);
        space.put(0x09, &identity.class.to_le_bytes()[..3]);
        space.put(0x2c, &identity.subsystem_vendor.to_le_bytes());
        space.put(0x2e, &identity.subsystem.to_le_bytes());
        space.writable[COMMAND..COMMAND + 2].copy_from_slice(&COMMAND_WRITABLE.to_le_bytes());
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    /// Adds a BAR. Called while building only.
    pub fn add_bar(&mut self, bar: Bar) {
        assert!(
            bar.size.is_power_of_two() && bar.size >= 16 && bar.index + 1 < BAR_COUNT,
            "a BAR of ours is a power of two in a register pair"
        );
        let at = BAR0 + bar.index * 4;
        self.bytes[at] = BAR_MEMORY_64;
        let mask = !(bar.size - 1);
        self.writable[at..at + 8].copy_from_slice(&mask.to_le_bytes());
        self.bars.push(bar);
    }

    /// Adds a capability and returns the offset of its header. Called while building only.
    pub fn add_capability(&mut self, capability: &Capability) -> u16 {
        let at = self.next_capability;
        let end = at + 2 + capability.body.len();
        assert!(end <= CONFIG_BYTES, "our capabilities fit in 192 bytes");
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.bytes[at] = capability.id;
        self.put(at + 2, &capability.body);
        self.writable[at + 2..at + 2 + capability.writable.len()]
            .copy_from_slice(&capability.writable);
        let offset = u8::try_from(at).expect("checked to lie below 256");
        self.bytes[self.last_pointer] = offset;
        self.last_pointer = at + 1;
        self.next_capability = end.next_multiple_of(4);
        u16::from(offset)
    }

    /// Makes a register of the device's own writable, by `writable` bits from `offset` on, which no capability may
    /// have. Called while building only.
    pub fn add_register(&mut self, offset: u16, writable: &[u8]) {
        let at = usize::from(offset);
        assert!(
            at >= self.next_capability,
            "registers are behind the capabilities"
        );
        self.writable[at..at + writable.len()].copy_from_slice(writable);
    }

    /// BARs, in the order they were added.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }

    /// The address now in a BAR's registers: the guest's word, to be checked by the bus.
    pub fn bar_address(&self, bar: Bar) -> u64 {
        let at = BAR0 + bar.index * 4;
        let mut raw = [0; 8];
        raw.copy_from_slice(&self.bytes[at..at + 8]);
        u64::from_le_bytes(raw) & !(bar.size - 1)
    }

    /// Sets a BAR's address, as firmware would.
    pub fn set_bar_address(&mut self, bar: Bar, address: u64) {
        let at = BAR0 + bar.index * 4;
        self.put(at, &(address | u64::from(BAR_MEMORY_64)).to_le_bytes());
    }

    /// Whether the function answers in its memory BARs.
    pub fn memory_enabled(&self) -> bool {
        let command = u16::from_le_bytes([self.bytes[COMMAND], self.bytes[COMMAND + 1]]);
        command & COMMAND_MEMORY != 0
    }

    /// Whether a write of `size` bytes at `offset` can have changed where BARs are.
    pub fn moves_bars(offset: u16, size: usize) -> bool {
        let (start, end) = (usize::from(offset), usize::from(offset) + size);
        start < COMMAND + 2 && end > COMMAND || start < BAR0 + 4 * BAR_COUNT && end > BAR0
    }

    /// A guest's read; zeroes past the end (no extended capabilities).
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (index, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(index).copied().unwrap_or(0);
        }
    }

    /// A guest's write of any size at any offset, through the mask of writable bits; what lies behind the end is dropped.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (index, byte) in (usize::from(offset)..).zip(data) {
            let Some(mask) = self.writable.get(index).copied() else {
                return;
            };
            self.bytes[index] = self.bytes[index] & !mask | byte & mask;
        }
    }

    /// All bytes.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes over what a guest may have written of `bytes`, which were saved; false if they are of another
    /// function.
    pub(super) fn restore(&mut self, bytes: &[u8]) -> bool {
        let identity = 0x00..COMMAND;
        if bytes.len() != CONFIG_BYTES || bytes[identity.clone()] != self.bytes[identity] {
            return false;
        }
        for (index, byte) in bytes.iter().enumerate() {
            let mask = self.writable[index];
            self.bytes[index] = self.bytes[index] & !mask | byte & mask;
        }
        true
    }

    /// Says which bits of the bytes from `offset` on the guest may write. Called while building only.
    pub fn set_writable(&mut self, offset: usize, mask: &[u8]) {
        self.writable[offset..offset + mask.len()].copy_from_slice(mask);
    }

    /// The host's own write, past the mask: live registers, building.
    pub fn put(&mut self, offset: usize, data: &[u8]) {
        self.bytes[offset..offset + data.len()].copy_from_slice(data);
    }

    /// The host's own read of `N` bytes.
    pub fn get<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut value = [0; N];
        value.copy_from_slice(&self.bytes[offset..offset + N]);
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const IDENTITY: Identity = Identity {
        vendor: 0x1af4,
        device: 0x1042,
        subsystem_vendor: 0x1af4,
        subsystem: 0x42,
        class: 0x01_80_00,
        revision: 1,
    };

    fn word(space: &ConfigSpace, offset: u16) -> u32 {
        let mut data = [0; 4];
        space.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    #[test]
    fn bar_sizing_as_linux_does_it() {
        let mut space = ConfigSpace::new(IDENTITY);
        let bar = Bar {
            index: 0,
            size: 0x1_0000,
        };
        space.add_bar(bar);
        space.set_bar_address(bar, 0x1_c000_0000);
        assert_eq!(word(&space, 0x10), 0xc000_0004);
        assert_eq!(word(&space, 0x14), 1);
        space.write(0x10, &[0xff; 4]);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(word(&space, 0x10), 0xffff_0004);
        assert_eq!(word(&space, 0x14), 0xffff_ffff);
        space.write(0x10, &0xc000_0004u32.to_le_bytes());
        space.write(0x14, &1u32.to_le_bytes());
        assert_eq!(space.bar_address(bar), 0x1_c000_0000);
    }

    #[test]
    fn capabilities_are_linked() {
        let mut space = ConfigSpace::new(IDENTITY);
        let capability = Capability {
            id: 9,
            body: vec![1, 2, 3],
            writable: vec![0, 0xf0],
        };
        let first = space.add_capability(&capability);
        let second = space.add_capability(&capability);
        assert_eq!((first, second), (0x40, 0x48));
        assert_eq!(space.get::<1>(0x34), [0x40]);
        assert_eq!(space.get::<5>(0x40), [9, 0x48, 1, 2, 3]);
        assert_eq!(space.get::<2>(0x48), [9, 0]);
        space.write(0x42, &[0xff; 3]);
        assert_eq!(space.get::<3>(0x42), [1, 0xf2, 3]);
    }

    #[test]
    fn identity_and_the_end_are_read_only() {
        let mut space = ConfigSpace::new(IDENTITY);
        space.write(0, &[0; 4]);
        assert_eq!(word(&space, 0), 0x1042_1af4);
        assert_eq!(word(&space, 8), 0x0180_0001);
        space.write(0xfe, &[0xff; 4]);
        assert_eq!(word(&space, 0xfe), 0);
        assert_eq!(word(&space, 0x100), 0);
    }
}
