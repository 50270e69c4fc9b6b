// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Requests of the control API that change a device while the machine runs, or is paused. Called by the owner.
//!
//! What is changed goes with the machine, wherever it goes on: as the device's own state (a plug, a balloon's target), in
//! its image (a disk's size), or by the spec, which says what a device was made with (rates, a drive's disc).

use atoll_devices::virtio::net::Net;
use atoll_vmm_protocol::api::{BalloonInfo, Request, SetBalloon, SetLink, SetNetLimits};
use atoll_vmm_protocol::spec::{MachineSpec, NetLimits, VhostNet};

use super::parts::Parts;
use super::{devices, disks};
use crate::api::{self, Answer, Asked};
use crate::check;

/// Does it; an error is the refusal that the asker gets.
pub(super) fn obey(
    parts: &mut Parts,
    spec: &mut MachineSpec,
    mut asked: Asked,
) -> Result<(), Answer> {
    match asked.request {
        Request::SetLink => set_link(parts, &api::body(asked.body)?),
        Request::SetNetLimits => set_net_limits(parts, spec, &api::body(asked.body)?),
        Request::Announce => {
            parts.nets.iter().for_each(|net| net.device.announce());
            Ok(())
        }
        Request::SetBalloon => set_balloon(parts, spec.memory_mib, &api::body(asked.body)?),
        Request::ResizeDisk => disks::resize(parts, &api::body(asked.body)?),
        Request::SetDiskLimits => disks::set_limits(parts, spec, &api::body(asked.body)?),
        Request::EjectDisk => disks::eject(parts, spec, &api::body(asked.body)?),
        Request::InsertDisk => {
            let disc = asked.file("the disc")?;
            disks::insert(parts, spec, &api::body(asked.body)?, disc)
        }
        other => unreachable!("{other:?} is the owner's own"),
    }
}

fn card<'a>(parts: &'a Parts, id: &str) -> Result<&'a Net, Answer> {
    match parts.nets.iter().find(|net| net.function.name() == id) {
        Some(net) => Ok(&net.device),
        None => {
            let known = parts.nets.iter().map(|net| net.function.name());
            let known: Vec<_> = known.collect();
            let text = format!("no network card {id}; there are: {}", known.join(" "));
            Err(api::refusal(404, text))
        }
    }
}

fn set_link(parts: &Parts, body: &SetLink) -> Result<(), Answer> {
    card(parts, &body.id)?.set_link(body.up);
    Ok(())
}

fn set_net_limits(
    parts: &Parts,
    spec: &mut MachineSpec,
    body: &SetNetLimits,
) -> Result<(), Answer> {
    let card = card(parts, &body.id)?;
    if let Some(why) = card.limit_refusal() {
        return Err(api::refusal(409, format!("no rate can be limited: {why}")));
    }
    let limits = NetLimits {
        receive_bytes_per_second: body.receive_bytes_per_second,
        receive_burst_bytes: body.receive_burst_bytes,
        send_bytes_per_second: body.send_bytes_per_second,
        send_burst_bytes: body.send_burst_bytes,
    };
    devices::limit(card, &limits);
    let mut nets = spec.nets.iter_mut();
    let net = nets.find(|net| check::id_of(&net.id) == body.id);
    let net = net.expect("a machine's cards are its spec's");
    net.limits = limits;
    // Whoever changes its rates wants to change them again, in the next process too, where the kernel could take over once
    // there are none.
    net.vhost = VhostNet::Off;
    Ok(())
}

fn set_balloon(parts: &Parts, memory_mib: u64, body: &SetBalloon) -> Result<(), Answer> {
    let target_mib = body.target_mib;
    let Some(balloon) = &parts.balloon else {
        let text = "the machine has no balloon: start it with --balloon";
        return Err(api::refusal(409, text));
    };
    if target_mib == 0 || target_mib > memory_mib {
        let text = format!("{target_mib} MiB: the guest keeps 1 to {memory_mib} MiB");
        return Err(api::refusal(400, text));
    }
    balloon.set_target((memory_mib - target_mib) << 20);
    Ok(())
}

/// What `info` tells of the balloon.
pub(super) fn balloon(parts: &Parts, memory_mib: u64) -> Option<BalloonInfo> {
    let balloon = parts.balloon.as_ref()?;
    let left = |bytes: u64| memory_mib.saturating_sub(bytes >> 20);
    let told = balloon.statistics().unwrap_or_default();
    Some(BalloonInfo {
        target_mib: left(balloon.target()),
        actual_mib: left(balloon.actual()),
        total_bytes: told.total,
        free_bytes: told.free,
        available_bytes: told.available,
        cache_bytes: told.caches,
        swapped_in_bytes: told.swapped_in,
        swapped_out_bytes: told.swapped_out,
        major_faults: told.major_faults,
        minor_faults: told.minor_faults,
    })
}
