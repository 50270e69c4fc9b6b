// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What kind of host this is: numbers of different kinds must never be compared.

use std::fs;
use std::path::Path;

/// `lab` (everything emulated by QEMU), `pvm` (a KVM without hardware virtualization) or `metal`.
pub fn kind() -> &'static str {
    let vendor = fs::read_to_string("/sys/class/dmi/id/sys_vendor").unwrap_or_default();
    let cpu = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    if vendor.starts_with("QEMU") || cpu.contains("QEMU TCG") {
        "lab"
    } else if Path::new("/sys/module/kvm_pvm").exists() {
        "pvm"
    } else {
        "metal"
    }
}
