// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What the `pc` board has beside PCI devices: clock, timer, configuration device, flash, LPC bridge, old resets.
//! Called by `assembly`, once all other devices are there, since firmware is told of them.

use std::sync::Arc;

use atoll_devices::platform::q35::{LPC_SLOT, LpcBridge};
use atoll_devices::platform::{AcpiPm, DebugPort, Flash, FwCfg, KeyboardReset, Rtc, SystemControl};
use atoll_devices::state::{DeviceState, Saved, SavedState, StateError};
use atoll_firmware::acpi::{self, AcpiDevice};
use atoll_firmware::smbios;
use atoll_vmm_protocol::spec::{BootSpec, IdentitySpec};
use vm_memory::{GuestMemoryRegion, GuestRegionMmap};

use super::assembly::{Assembly, BuildError};
use super::devices::boot_order;
use super::generation;
use crate::flash::{FirmwareFiles, FlashSlot};
use crate::kvm::VirtualMachine;
use crate::saved::Raw;
use crate::{check, fw_cfg, layout};
use kvm_bindings::kvm_pit_state2;
use serde::{Deserialize, Serialize};

/// The clock as ACPI tells the guest.
pub(super) fn clock() -> AcpiDevice {
    AcpiDevice {
        name: "RTC0",
        hid: "PNP0B00",
        objects: acpi::ports_and_interrupt(Rtc::PORT, 8, layout::CLOCK_GSI),
        event: None,
    }
}

/// Those devices that a reset puts back.
pub(super) struct Legacy {
    pm: Arc<AcpiPm>,
    clock: Arc<Rtc>,
    system_control: Arc<SystemControl>,
    firmware: Option<Firmware>,
}

struct Firmware {
    flash: Arc<Flash>,
    fw_cfg: Arc<FwCfg>,
    /// The guest's view of the code; only kept.
    _code: Arc<GuestRegionMmap>,
}

impl Legacy {
    /// Puts everything on its bus.
    pub(super) fn add(
        assembly: &mut Assembly<'_>,
        machine: &VirtualMachine,
        pm: Arc<AcpiPm>,
    ) -> Result<Self, BuildError> {
        machine.create_timer()?;
        let timer = Arc::new(IntervalTimer(machine.clone()));
        assembly.saved("interval timer", timer);
        let control = assembly.control();
        let ram = assembly.board.ram(assembly.memory_bytes());
        let high: u64 = ram.iter().skip(1).map(|(_, size)| size).sum();
        let system_control = Arc::new(SystemControl::new(control.clone()));
        let clock_line = Arc::new(assembly.routes.pin(layout::CLOCK_GSI)?);
        let clock = Rtc::new(ram[0].1, high, clock_line).map_err(BuildError::device("clock"))?;
        let clock = Arc::new(clock);
        assembly.port("rtc", Rtc::PORT, Rtc::SIZE, clock.clone());
        assembly.port("acpi registers", layout::PM_PORT, AcpiPm::SIZE, pm.clone());
        assembly.port(
            "system control",
            SystemControl::PORT,
            1,
            system_control.clone(),
        );
        let keyboard = Arc::new(KeyboardReset(control));
        assembly.port("keyboard controller", KeyboardReset::PORT, 1, keyboard);
        let lpc = LpcBridge {
            pm_base: layout::PM_PORT,
        };
        assembly.backplane.pci().add(LPC_SLOT, Arc::new(lpc), 0)?;
        let firmware = match assembly.opened.firmware.take() {
            None => None,
            Some(files) => Some(firmware(assembly, machine, files)?),
        };
        Ok(Self {
            pm,
            clock,
            system_control,
            firmware,
        })
    }

    /// No device of these acts by itself any more.
    pub(super) fn pause(&self) {
        self.clock.pause();
    }

    /// They may again.
    pub(super) fn resume(&self) {
        self.clock.resume();
    }

    /// As at power-on. The clock goes on, and the variables stay.
    pub(super) fn reset(&self) {
        self.pm.reset();
        self.clock.reset();
        self.system_control.reset();
        if let Some(firmware) = &self.firmware {
            firmware.flash.reset();
            firmware.fw_cfg.reset();
        }
    }
}

/// What SMBIOS tells, from a spec that was checked.
pub(crate) fn identity(spec: &IdentitySpec) -> smbios::Identity {
    let uuid = spec.uuid.as_deref().and_then(|text| check::uuid(text).ok());
    smbios::Identity {
        uuid: uuid.unwrap_or_default(),
        manufacturer: spec.manufacturer.clone(),
        product: spec.product.clone(),
        version: spec.version.clone(),
        serial: spec.serial.clone(),
        sku: spec.sku.clone(),
        family: spec.family.clone(),
        options: spec.options.clone(),
    }
}

/// KVM's interval timer, as far as its state is concerned.
struct IntervalTimer(VirtualMachine);

#[derive(Serialize, Deserialize)]
struct TimerState {
    pit: Raw<kvm_pit_state2>,
}

impl SavedState for TimerState {
    const KIND: &'static str = "interval-timer";
    const VERSION: u32 = 1;
}

impl DeviceState for IntervalTimer {
    fn save(&self) -> Saved {
        let pit = self.0.timer().expect("the machine has the timer");
        Saved::of(&TimerState { pit: Raw(pit) })
    }

    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let state: TimerState = saved.open()?;
        self.0
            .set_timer(&state.pit.0)
            .map_err(|error| StateError::Differs {
                kind: TimerState::KIND,
                what: error.to_string(),
            })
    }
}

fn firmware(
    assembly: &mut Assembly<'_>,
    machine: &VirtualMachine,
    mut files: FirmwareFiles,
) -> Result<Firmware, BuildError> {
    if let Some(log) = files.log.take() {
        assembly.port(
            "debug port",
            DebugPort::PORT,
            1,
            Arc::new(DebugPort::new(log)),
        );
    }
    let images = files.map(machine)?;
    let window = FlashSlot::new(machine.clone(), images.vars.clone())?;
    let range = (images.vars_base, images.vars.len());
    let flash = Arc::new(Flash::new(images.vars, images.vars_file, Box::new(window)));
    assembly.memory_mapped("flash", range, flash.clone());
    let menu_ms = match &assembly.spec.boot {
        BootSpec::Firmware(spec) => spec.menu_ms,
        BootSpec::Kernel(_) => None,
    };
    let ram = assembly.board.ram(assembly.memory_bytes());
    let boot_order = boot_order(assembly.spec, &assembly.backplane)?;
    let identity = identity(&assembly.spec.identity);
    let mut items = fw_cfg::items(&assembly.platform(), &ram, &identity, boot_order, menu_ms);
    if let Some(device) = &assembly.generation {
        generation::tell_firmware(device, &mut items);
    }
    if assembly.vmx {
        fw_cfg::switch_vmx_on(&mut items);
    }
    let fw_cfg = Arc::new(FwCfg::new(items, assembly.memory.clone()));
    assembly.port("fw_cfg", FwCfg::PORT, FwCfg::SIZE, fw_cfg.clone());
    Ok(Firmware {
        flash,
        fw_cfg,
        _code: images.code,
    })
}
