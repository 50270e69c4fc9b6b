// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! virtio-pci with an interrupt vector a queue (VIRTIO 1.2 §4.1), under the drivers of crate `virtio-drivers`:
//! its own PCI transport knows neither MSI-X nor a cached doorbell.

use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{Error, PhysAddr};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::interrupts::Vector;
use crate::memory::Mmio;
use crate::pci::{Device, Msix};

const VENDOR: u32 = 0x1af4;
/// PCI device id of virtio device type 0, VIRTIO 1.2 §4.1.2.
const DEVICE_ID_BASE: u32 = 0x1040;
const CAPABILITY_VENDOR: u8 = 9;
const NO_VECTOR: u16 = 0xffff;
/// Queues of one device that may be used.
pub const QUEUE_COUNT_MAX: usize = 4;

/// `virtio_pci_common_cfg`, VIRTIO 1.2 §4.1.4.3.
mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0;
    pub const DEVICE_FEATURE: u64 = 4;
    pub const DRIVER_FEATURE_SELECT: u64 = 8;
    pub const DRIVER_FEATURE: u64 = 12;
    pub const STATUS: u64 = 20;
    pub const GENERATION: u64 = 21;
    pub const QUEUE_SELECT: u64 = 22;
    pub const QUEUE_SIZE: u64 = 24;
    pub const QUEUE_VECTOR: u64 = 26;
    pub const QUEUE_ENABLE: u64 = 28;
    pub const QUEUE_NOTIFY_OFFSET: u64 = 30;
    pub const QUEUE_DESCRIPTORS: u64 = 32;
    pub const QUEUE_DRIVER: u64 = 40;
    pub const QUEUE_DEVICE: u64 = 48;
}

/// MSI-X table entry and CPU vector of each queue.
type Vectors = [Option<(u16, Vector)>; QUEUE_COUNT_MAX];

/// What of a device is measured beside its driver.
#[derive(Clone, Copy, Debug)]
pub struct Taps {
    /// A register whose reading has no effect: the device status.
    pub status: Mmio,
    /// Doorbell of queue 0.
    pub doorbell: Mmio,
    /// Interrupt of each queue.
    pub vectors: Vectors,
}

/// One virtio device on the bus.
pub struct MsixTransport {
    device_type: DeviceType,
    common: Mmio,
    isr: Mmio,
    config: Option<(Mmio, u32)>,
    /// Where the first queue is rung, and how far apart others are.
    notify: (Mmio, u32),
    /// Known once their queues are set up: there are devices that show no queue but the first to a driver that has not
    /// said hello.
    doorbells: [Mmio; QUEUE_COUNT_MAX],
    vectors: Vectors,
}

impl MsixTransport {
    /// Finds the device's structures and routes the interrupts of its first `queue_count` queues, at most
    /// [`QUEUE_COUNT_MAX`]; `None` when it is not a complete virtio device.
    pub fn new(device: Device, queue_count: usize) -> Option<MsixTransport> {
        if device.id & 0xffff != VENDOR {
            return None;
        }
        let device_type =
            DeviceType::try_from((device.id >> 16).checked_sub(DEVICE_ID_BASE)? as u8).ok()?;
        device.enable();
        let (mut common, mut isr, mut config, mut notify) = (None, None, None, None);
        for (offset, word) in device
            .capabilities()
            .filter(|(_, word)| *word as u8 == CAPABILITY_VENDOR)
        {
            let place = || {
                let bar = device.bar(device.read(offset + 4) as u8)?;
                Some(Mmio(bar.0 + u64::from(device.read(offset + 8))))
            };
            match word >> 24 {
                1 => common = place(),
                2 => notify = place().map(|base| (base, device.read(offset + 16))),
                3 => isr = place(),
                4 => config = place().map(|base| (base, device.read(offset + 12))),
                _ => {}
            }
        }
        let notify = notify?;
        let mut transport = MsixTransport {
            device_type,
            common: common?,
            isr: isr?,
            config,
            notify,
            doorbells: [notify.0; QUEUE_COUNT_MAX],
            vectors: [None; QUEUE_COUNT_MAX],
        };
        transport.common.write8(common::STATUS, 0);
        if let Some(table) = device.msix() {
            transport.route(table, queue_count);
        }
        Some(transport)
    }

    /// Entry 0 stays for configuration changes, which nobody here waits for; queues beyond a small table share its
    /// last entry.
    fn route(&mut self, table: Msix, queue_count: usize) {
        for queue in 0..queue_count {
            let entry = (queue as u16 + 1).min(table.last());
            let shared = self.vectors[..queue]
                .iter()
                .flatten()
                .find(|(used, _)| *used == entry);
            self.vectors[queue] = shared.copied().or_else(|| {
                let vector = Vector::allocate()?;
                table.route(entry, vector);
                Some((entry, vector))
            });
        }
    }

    /// For measurements.
    pub fn taps(&self) -> Taps {
        Taps {
            status: Mmio(self.common.0 + common::STATUS),
            doorbell: self.doorbells[0],
            vectors: self.vectors,
        }
    }

    /// Where queue `index`, below [`QUEUE_COUNT_MAX`], is rung once it is set up.
    pub fn doorbell(&self, index: u16) -> Mmio {
        self.doorbells[usize::from(index)]
    }

    fn config_at<T>(&self, offset: usize) -> Result<Mmio, Error> {
        let (base, length) = self.config.ok_or(Error::ConfigSpaceMissing)?;
        if offset + size_of::<T>() > length as usize {
            return Err(Error::ConfigSpaceTooSmall);
        }
        Ok(Mmio(base.0 + offset as u64))
    }
}

impl Transport for MsixTransport {
    fn device_type(&self) -> DeviceType {
        self.device_type
    }

    fn read_device_features(&mut self) -> u64 {
        [1, 0].iter().fold(0, |features, half| {
            self.common.write32(common::DEVICE_FEATURE_SELECT, *half);
            features << 32 | u64::from(self.common.read32(common::DEVICE_FEATURE))
        })
    }

    fn write_driver_features(&mut self, features: u64) {
        for (half, value) in [(0, features & 0xffff_ffff), (1, features >> 32)] {
            self.common.write32(common::DRIVER_FEATURE_SELECT, half);
            self.common.write32(common::DRIVER_FEATURE, value as u32);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.common.write16(common::QUEUE_SELECT, queue);
        u32::from(self.common.read16(common::QUEUE_SIZE))
    }

    fn notify(&mut self, queue: u16) {
        self.doorbells[usize::from(queue)].write16(0, queue);
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_truncate(u32::from(self.common.read8(common::STATUS)))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        // §3.1.1 has these two one after the other; there are devices that insist.
        if status == DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER {
            self.set_status(DeviceStatus::ACKNOWLEDGE);
        }
        self.common.write8(common::STATUS, status.bits() as u8);
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver: PhysAddr,
        device: PhysAddr,
    ) {
        let common = self.common;
        common.write16(common::QUEUE_SELECT, queue);
        common.write16(common::QUEUE_SIZE, size as u16);
        let vector = self.vectors[usize::from(queue)].map_or(NO_VECTOR, |(entry, _)| entry);
        common.write16(common::QUEUE_VECTOR, vector);
        let offset = common.read16(common::QUEUE_NOTIFY_OFFSET);
        let (first, distance) = self.notify;
        self.doorbells[usize::from(queue)].0 = first.0 + u64::from(offset) * u64::from(distance);
        common.write64(common::QUEUE_DESCRIPTORS, descriptors);
        common.write64(common::QUEUE_DRIVER, driver);
        common.write64(common::QUEUE_DEVICE, device);
        common.write16(common::QUEUE_ENABLE, 1);
    }

    /// VIRTIO 1.2 has no way back but a reset of the device.
    fn queue_unset(&mut self, _: u16) {}

    fn queue_used(&mut self, queue: u16) -> bool {
        self.common.write16(common::QUEUE_SELECT, queue);
        self.common.read16(common::QUEUE_ENABLE) == 1
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        InterruptStatus::from_bits_retain(u32::from(self.isr.read8(0)))
    }

    fn read_config_generation(&self) -> u32 {
        u32::from(self.common.read8(common::GENERATION))
    }

    /// Byte by byte for bytes, else in words of the field's size (VIRTIO 1.2 §4.1.3.1).
    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T, Error> {
        let at = self.config_at::<T>(offset)?;
        let mut value = T::new_zeroed();
        let bytes = value.as_mut_bytes();
        match bytes.len() {
            2 => bytes.copy_from_slice(&at.read16(0).to_le_bytes()),
            4 => bytes.copy_from_slice(&at.read32(0).to_le_bytes()),
            _ => {
                for (index, byte) in (0..).zip(bytes) {
                    *byte = at.read8(index);
                }
            }
        }
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> Result<(), Error> {
        let at = self.config_at::<T>(offset)?;
        match value.as_bytes() {
            [a, b] => at.write16(0, u16::from_le_bytes([*a, *b])),
            [a, b, c, d] => at.write32(0, u32::from_le_bytes([*a, *b, *c, *d])),
            bytes => {
                for (index, byte) in (0..).zip(bytes) {
                    at.write8(index, *byte);
                }
            }
        }
        Ok(())
    }
}
