// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The generation id: its row of the build table, where it is on either way to boot, and when it changes.
//!
//! Not here: the device (`atoll_devices::platform::GenerationId`), its AML and firmware's script (`atoll-firmware`).

use std::io;
use std::sync::Arc;

use atoll_devices::platform::{FwCfgItems, GenerationId};
use atoll_firmware::acpi;
use atoll_firmware::table_loader::{
    GENERATION_ADDRESS_FILE, GENERATION_FILE, GENERATION_FILE_BYTES, GENERATION_OFFSET,
};
use atoll_vmm_protocol::spec::BootSpec;

use super::assembly::{Assembly, BuildError};
use crate::{check, layout};

/// Of its state, and in messages.
const NAME: &str = "generation id";

/// Adds the device, if the spec has one.
pub(super) fn add(assembly: &mut Assembly<'_>) -> Result<(), BuildError> {
    if assembly.spec.generation_id.is_none() {
        return Ok(());
    }
    let value = check::generation_id(assembly.spec);
    let value = match value.map_err(BuildError::device(NAME))? {
        Some(value) => value,
        None => random().map_err(BuildError::device(NAME))?,
    };
    let (number, event) = assembly.acpi_event()?;
    let address = match assembly.spec.boot {
        BootSpec::Kernel(_) => layout::GENERATION_ID,
        BootSpec::Firmware(_) => GENERATION_OFFSET,
    };
    assembly.acpi_device(acpi::generation_id(address, number));
    let device = GenerationId::new(value, assembly.memory.clone(), event);
    let device = Arc::new(device);
    assembly.saved(NAME, device.clone());
    assembly.generation = Some(device);
    Ok(())
}

/// Has firmware place the id, and say where.
pub(super) fn tell_firmware(device: &Arc<GenerationId>, items: &mut FwCfgItems) {
    let offset = usize::try_from(GENERATION_OFFSET).expect("small");
    let mut page = vec![0; GENERATION_FILE_BYTES];
    let value = device.value();
    page[offset..offset + value.len()].copy_from_slice(&value);
    items.add(GENERATION_FILE, page);
    let pointer = GenerationId::pointer(device, GENERATION_OFFSET.into());
    items.add_written(GENERATION_ADDRESS_FILE, 8, pointer);
}

/// After the restore of a snapshot: the value of the spec, which the device was built with, when the saved machine had
/// another; else a random one.
pub(super) fn renew(device: &GenerationId, built_with: &[u8]) -> io::Result<()> {
    let own = <[u8; 16]>::try_from(built_with).ok();
    let own = own.filter(|own| device.value() != own);
    device.renew(own.map_or_else(random, Ok)?);
    Ok(())
}

/// Sixteen random bytes.
pub(super) fn random() -> io::Result<[u8; 16]> {
    let mut value = [0; 16];
    rustix::rand::getrandom(&mut value, rustix::rand::GetRandomFlags::empty())?;
    Ok(value)
}
