// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The machine's numbers, gathered from where they are counted into the control API's form.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;

use atoll_devices::counters::CounterList;
use atoll_devices::virtio::VirtioPci;
use atoll_vmm_protocol::api::{Counters, DiskCounters, NetCounters, VcpuCounters};

use super::parts::Parts;
use crate::vcpu::Vcpu;

/// Everything that `GET /counters` tells.
pub(super) fn of(parts: &Parts, uptime_ms: u64) -> Counters {
    Counters {
        uptime_ms,
        resident_bytes: resident_bytes(parts.statm.as_ref()),
        vcpus: parts.vcpus.iter().map(vcpu).collect(),
        disks: parts
            .disks
            .iter()
            .map(|disk| disk_counters(disk.id(), &disk.counters()))
            .collect(),
        nets: parts
            .nets
            .iter()
            .map(|net| net_counters(&net.function))
            .collect(),
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

/// The device's counter of that name.
fn named(list: &CounterList, name: &str) -> u64 {
    let found = list.iter().find(|(counter, _)| *counter == name);
    found.expect("devices count what the API tells").1
}

fn disk_counters(id: &str, list: &CounterList) -> DiskCounters {
    let value = |name| named(list, name);
    DiskCounters {
        id: id.to_owned(),
        read_bytes: value("read_bytes"),
        written_bytes: value("written_bytes"),
        read_requests: value("reads"),
        write_requests: value("writes"),
        flush_requests: value("flushes"),
        failed_requests: value("errors"),
    }
}

fn net_counters(net: &VirtioPci) -> NetCounters {
    let (list, _) = net.counters();
    let value = |name| named(&list, name);
    NetCounters {
        id: net.name().to_owned(),
        received_bytes: value("received_bytes"),
        received_packets: value("received"),
        received_drops: value("dropped"),
        sent_bytes: value("sent_bytes"),
        sent_packets: value("sent"),
    }
}

/// Second number of `/proc/self/statm`, in pages (proc(5)); 0 where there is no /proc.
fn resident_bytes(statm: Option<&File>) -> u64 {
    let mut text = [0; 128];
    let pages = statm
        .and_then(|file| file.read_at(&mut text, 0).ok())
        .and_then(|size| std::str::from_utf8(&text[..size]).ok())
        .and_then(|text| text.split_whitespace().nth(1)?.parse::<u64>().ok());
    pages.unwrap_or_default() * rustix::param::page_size() as u64
}
