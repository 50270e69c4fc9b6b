// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The machine's numbers, gathered from where they are counted into the control API's form.

use std::sync::atomic::Ordering;

use atoll_vmm_protocol::api::{Counters, DiskCounters, NetCounters, VcpuCounters};

use super::assembly::Parts;
use crate::vcpu::Vcpu;

/// Everything that `GET /counters` tells.
pub(super) fn of(parts: &Parts, uptime_ms: u64) -> Counters {
    Counters {
        uptime_ms,
        resident_bytes: resident_bytes(),
        vcpus: parts.vcpus.iter().map(vcpu).collect(),
        disks: Vec::<DiskCounters>::new(),
        nets: Vec::<NetCounters>::new(),
    }
}

fn vcpu(vcpu: &Vcpu) -> VcpuCounters {
    let exits = vcpu.exits();
    VcpuCounters {
        cpu_time_us: vcpu.cpu_time_us(),
        port_exits: exits.port.load(Ordering::Relaxed),
        mmio_exits: exits.mmio.load(Ordering::Relaxed),
        other_exits: exits.other.load(Ordering::Relaxed),
    }
}

/// Second number of `/proc/self/statm`, in pages (proc(5)); 0 where there is no /proc.
fn resident_bytes() -> u64 {
    let pages = std::fs::read_to_string("/proc/self/statm")
        .ok()
        .and_then(|text| text.split_whitespace().nth(1)?.parse::<u64>().ok());
    pages.unwrap_or_default() * rustix::param::page_size() as u64
}
