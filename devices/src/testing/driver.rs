// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A driver that does what it is told, right or wrong: through configuration space and BAR as a guest would, with
//! rings in memory that tests may write as they like.

use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace};

use super::{CountingSink, NoDoorbells};
use crate::bus::BusDevice;
use crate::interrupt::MsixSink as _;
use crate::memory::{Memory, Ram};
use crate::pci::{Ecam, PciBus, PciDevice, PciWindow, Window};
use crate::virtio::{VirtioDevice, VirtioPci, VirtioPciOptions};

/// Guest RAM: two adjacent regions of half this size, so that buffers may cross from one to the other.
pub const RAM_BYTES: u64 = 4 << 20;
/// Window of the BARs.
const WINDOW: Window = Window {
    base: 0xc000_0000,
    size: 1 << 24,
};
/// Slot of the device.
const SLOT: u64 = 1;
/// Rings of queue `q` are here plus `q` times the stride.
const RINGS: u64 = 0x1_0000;
const RING_STRIDE: u64 = 0x4000;
/// Offsets in the BAR: the driver could find them through the capabilities; here they are checked against it.
const COMMON: u64 = 0;
const DEVICE: u64 = 0x2000;
const DOORBELLS: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x8000;
/// Nothing in these tests takes longer, on the slowest machine.
const PATIENCE: Duration = Duration::from_secs(20);

/// Descriptor flags.
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// One buffer of a chain.
#[derive(Debug, Clone, Copy)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Bytes.
    pub size: u32,
    /// For the device to write, not to read.
    pub writable: bool,
}

impl Segment {
    /// For the device to read.
    pub fn readable(address: u64, size: u32) -> Self {
        let writable = false;
        Self {
            address,
            size,
            writable,
        }
    }

    /// For the device to write.
    pub fn writable(address: u64, size: u32) -> Self {
        let writable = true;
        Self {
            address,
            size,
            writable,
        }
    }
}

/// Where a queue's rings are, and how far the driver got.
#[derive(Debug, Clone, Copy)]
pub struct Ring {
    /// Entries.
    pub size: u16,
    /// Descriptor table.
    pub descriptors: u64,
    /// Available ring.
    pub available: u64,
    /// Used ring.
    pub used: u64,
    next_descriptor: u16,
    next_available: u16,
    last_used: u16,
}

/// A machine with one virtio device and its driver.
pub struct Driver {
    /// Its memory.
    pub memory: Memory,
    /// Its device.
    pub device: Arc<VirtioPci>,
    /// The host's end of its interrupts: vector 0 is configuration, `q + 1` queue `q`.
    pub interrupts: Arc<CountingSink>,
    /// Its doorbells, not connected: kicks are BAR writes.
    pub doorbells: Arc<NoDoorbells>,
    /// Rings, after [`Driver::start`].
    pub rings: Vec<Ring>,
    /// The bus that the device is on, in slot 1.
    pub bus: Arc<PciBus>,
    ecam: Ecam,
    window: PciWindow,
}

impl Driver {
    /// Puts `device` on a bus, as it is before anybody found it.
    pub fn bare(device: Arc<dyn VirtioDevice>) -> Self {
        let half = usize::try_from(RAM_BYTES / 2).unwrap();
        let ranges = [(GuestAddress(0), half), (GuestAddress(RAM_BYTES / 2), half)];
        Self::in_memory(device, Ram::from_ranges(&ranges).unwrap())
    }

    fn in_memory(device: Arc<dyn VirtioDevice>, ram: Ram) -> Self {
        let memory = Memory::new(ram);
        let queues = u16::try_from(device.queue_sizes().len()).unwrap();
        let interrupts = Arc::new(CountingSink::new(queues + 1));
        let options = VirtioPciOptions {
            name: "test".to_owned(),
            memory: memory.clone(),
            msix: interrupts.clone(),
        };
        let device = Arc::new(VirtioPci::new(device, options).unwrap());
        let doorbells = Arc::new(NoDoorbells::default());
        let bus = PciBus::new(vec![WINDOW], doorbells.clone());
        let function: Arc<dyn PciDevice> = device.clone();
        bus.add(1, function, WINDOW.base).unwrap();
        Self {
            memory,
            device,
            interrupts,
            doorbells,
            rings: Vec::new(),
            ecam: Ecam(bus.clone()),
            window: PciWindow::new(bus.clone(), WINDOW.base),
            bus,
        }
    }

    /// Puts `device` on a bus and turns on its memory and its vectors. Its status is still 0.
    pub fn new(device: Arc<dyn VirtioDevice>) -> Self {
        Self::turned_on(Self::bare(device))
    }

    /// The same in memory that another process can map.
    pub fn with_shared_memory(device: Arc<dyn VirtioDevice>) -> Self {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = std::fs::File::from(rustix::fs::memfd_create("test", flags).unwrap());
        file.set_len(RAM_BYTES).unwrap();
        let half = RAM_BYTES / 2;
        let ranges = [0, half].map(|start| {
            let part = FileOffset::new(file.try_clone().unwrap(), start);
            let size = usize::try_from(half).unwrap();
            (GuestAddress(start), size, Some(part))
        });
        let ram = Ram::from_ranges_with_files(ranges).unwrap();
        Self::turned_on(Self::in_memory(device, ram))
    }

    fn turned_on(driver: Self) -> Self {
        let queues = u64::from(driver.interrupts.vector_count()) - 1;
        driver.config_write(4, &6u16.to_le_bytes()); // Memory space, bus master.
        for vector in 0..=queues {
            let entry = MSIX_TABLE + vector * 16;
            driver.write(entry, &0xfee0_0000_u64.to_le_bytes());
            driver.write(entry + 8, &(0x30 + vector).to_le_bytes());
        }
        let msix = driver.capability(0x11).unwrap();
        driver.config_write(msix + 2, &0x8000_u16.to_le_bytes());
        driver
    }

    /// Reads configuration space.
    pub fn config_read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.ecam.read((SLOT << 15) + offset, &mut data);
        data
    }

    /// Writes configuration space.
    pub fn config_write(&self, offset: u64, data: &[u8]) {
        self.ecam.write((SLOT << 15) + offset, data);
    }

    /// Offset of the first capability with this ID.
    pub fn capability(&self, id: u8) -> Option<u64> {
        let [mut at] = self.config_read::<1>(0x34);
        while at != 0 {
            let [found, next] = self.config_read::<2>(at.into());
            if found == id {
                return Some(at.into());
            }
            at = next;
        }
        None
    }

    /// Reads the BAR.
    pub fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.window.read(offset, &mut data);
        data
    }

    /// Writes the BAR.
    pub fn write(&self, offset: u64, data: &[u8]) {
        self.window.write(offset, data);
    }

    /// Reads device configuration.
    pub fn device_config<const N: usize>(&self, offset: u64) -> [u8; N] {
        self.read(DEVICE + offset)
    }

    /// Writes the device's own configuration.
    pub fn set_device_config(&self, offset: u64, data: &[u8]) {
        self.write(DEVICE + offset, data);
    }

    /// The status byte.
    pub fn status(&self) -> u8 {
        self.read::<1>(COMMON + 0x14)[0]
    }

    /// Writes the status byte.
    pub fn set_status(&self, status: u8) {
        self.write(COMMON + 0x14, &[status]);
    }

    /// What the device offers.
    pub fn offered(&self) -> u64 {
        let half = |select: u32| {
            self.write(COMMON, &select.to_le_bytes());
            u64::from(u32::from_le_bytes(self.read(COMMON + 4)))
        };
        half(0) | half(1) << 32
    }

    /// ACKNOWLEDGE, DRIVER, these features, FEATURES_OK. Returns whether the device agreed.
    pub fn negotiate(&self, features: u64) -> bool {
        self.set_status(1);
        self.set_status(3);
        for select in 0..2_u32 {
            self.write(COMMON + 8, &select.to_le_bytes());
            let bytes = features.to_le_bytes();
            let at = usize::try_from(select * 4).unwrap();
            self.write(COMMON + 12, &bytes[at..at + 4]);
        }
        self.set_status(11);
        self.status() & 8 != 0
    }

    /// Tells the device about queue `index` with `size` entries, and enables it.
    pub fn enable_queue(&mut self, index: u16, size: u16) {
        let base = RINGS + u64::from(index) * RING_STRIDE;
        let ring = Ring {
            size,
            descriptors: base,
            available: base + 0x2000,
            used: base + 0x3000,
            next_descriptor: 0,
            next_available: 0,
            last_used: 0,
        };
        let ram = self.memory.memory();
        ram.write_slice(&[0; 0x4000], GuestAddress(base)).unwrap();
        self.describe_queue(index, ring);
        self.write(COMMON + 0x1c, &1u16.to_le_bytes());
        self.rings.push(ring);
    }

    /// Writes a queue's registers, without enabling it.
    pub fn describe_queue(&self, index: u16, ring: Ring) {
        self.write(COMMON + 0x16, &index.to_le_bytes());
        self.write(COMMON + 0x18, &ring.size.to_le_bytes());
        self.write(COMMON + 0x1a, &(index + 1).to_le_bytes());
        self.write(COMMON + 0x20, &ring.descriptors.to_le_bytes());
        self.write(COMMON + 0x28, &ring.available.to_le_bytes());
        self.write(COMMON + 0x30, &ring.used.to_le_bytes());
    }

    /// The whole way to DRIVER_OK, with `features` of those offered and every queue at its largest size.
    pub fn start(&mut self, features: u64) {
        let agreed = self.negotiate(features & self.offered());
        assert!(agreed, "the device refused {features:#x}");
        self.write(COMMON + 0x10, &0u16.to_le_bytes());
        let count = u16::from_le_bytes(self.read(COMMON + 0x12));
        self.rings.clear();
        for index in 0..count {
            self.write(COMMON + 0x16, &index.to_le_bytes());
            let size = u16::from_le_bytes(self.read(COMMON + 0x18));
            self.enable_queue(index, size);
        }
        self.set_status(15);
    }

    /// Resets the device.
    pub fn reset(&self) {
        self.set_status(0);
    }

    /// Writes guest memory.
    pub fn put(&self, address: u64, data: &[u8]) {
        let ram = self.memory.memory();
        ram.write_slice(data, GuestAddress(address)).unwrap();
    }

    /// Reads guest memory.
    pub fn get(&self, address: u64, size: usize) -> Vec<u8> {
        let mut data = vec![0; size];
        let ram = self.memory.memory();
        ram.read_slice(&mut data, GuestAddress(address)).unwrap();
        data
    }

    /// Writes one descriptor, whatever it says.
    pub fn put_descriptor(&self, table: u64, index: u16, fields: (u64, u32, u16, u16)) {
        let (address, size, flags, next) = fields;
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&size.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.put(table + u64::from(index) * 16, &bytes);
    }

    /// Writes a chain into free descriptors of `queue` and offers it, without ringing. Returns its head.
    pub fn add(&mut self, queue: usize, segments: &[Segment]) -> u16 {
        let ring = self.rings[queue];
        let index = |at: usize| (ring.next_descriptor + u16::try_from(at).unwrap()) % ring.size;
        for (at, segment) in segments.iter().enumerate() {
            let mut flags = if segment.writable { WRITE } else { 0 };
            if at + 1 < segments.len() {
                flags |= NEXT;
            }
            let fields = (segment.address, segment.size, flags, index(at + 1));
            self.put_descriptor(ring.descriptors, index(at), fields);
        }
        self.rings[queue].next_descriptor = index(segments.len());
        self.offer(queue, index(0));
        index(0)
    }

    /// Puts `head` into the available ring.
    pub fn offer(&mut self, queue: usize, head: u16) {
        let ring = &mut self.rings[queue];
        let entry = ring.available + 4 + 2 * u64::from(ring.next_available % ring.size);
        ring.next_available = ring.next_available.wrapping_add(1);
        let (index_at, index) = (ring.available + 2, ring.next_available);
        self.put(entry, &head.to_le_bytes());
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        self.put(index_at, &index.to_le_bytes());
    }

    /// Rings the doorbell of `queue`.
    pub fn kick(&self, queue: usize) {
        let offset = DOORBELLS + 4 * u64::try_from(queue).unwrap();
        self.write(offset, &u16::try_from(queue).unwrap().to_le_bytes());
    }

    /// Rings the doorbell of `queue` of a device whose BAR the test has moved to `bar`.
    pub fn kick_at(&self, bar: u64, queue: usize) {
        let offset = bar - WINDOW.base + DOORBELLS + 4 * u64::try_from(queue).unwrap();
        let bytes = u16::try_from(queue).unwrap().to_le_bytes();
        self.window.write(offset, &bytes);
    }

    /// Takes the next used element of `queue` if there is one: head and bytes written.
    pub fn used(&mut self, queue: usize) -> Option<(u16, u32)> {
        let ring = self.rings[queue];
        let index = self.get(ring.used + 2, 2);
        if u16::from_le_bytes([index[0], index[1]]) == ring.last_used {
            return None;
        }
        let at = ring.used + 4 + 8 * u64::from(ring.last_used % ring.size);
        let element = self.get(at, 8);
        self.rings[queue].last_used = ring.last_used.wrapping_add(1);
        let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
        Some((u16::try_from(word(0)).unwrap(), word(4)))
    }

    /// Waits for the next used element.
    #[track_caller]
    pub fn wait_used(&mut self, queue: usize) -> (u16, u32) {
        let mut found = None;
        self.wait_until("a used buffer", |driver| {
            found = driver.used(queue);
            found.is_some()
        });
        found.unwrap()
    }

    /// Waits until the device says NEEDS_RESET.
    #[track_caller]
    pub fn wait_broken(&mut self) {
        self.wait_until("NEEDS_RESET", |driver| driver.status() & 0x40 != 0);
    }

    /// Waits until `done`; panics after a long time.
    #[track_caller]
    pub fn wait_until(&mut self, what: &str, mut done: impl FnMut(&mut Self) -> bool) {
        let deadline = Instant::now() + PATIENCE;
        while !done(self) {
            assert!(Instant::now() < deadline, "no {what} within {PATIENCE:?}");
            std::thread::yield_now();
        }
    }
}
