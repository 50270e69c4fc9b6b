// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Requests of the control API that change a device while the machine runs, or is paused. Called by the owner.

use atoll_devices::virtio::net::Net;
use atoll_vmm_protocol::api::{Request, SetLink, SetNetLimits};

use super::devices::rate;
use super::parts::Parts;
use crate::api::{self, Answer, Asked};

/// Does it; an error is the refusal that the asker gets.
pub(super) fn obey(parts: &Parts, asked: Asked) -> Result<(), Answer> {
    match asked.request {
        Request::SetLink => set_link(parts, &api::body(asked.body)?),
        Request::SetNetLimits => set_net_limits(parts, &api::body(asked.body)?),
        Request::Announce => {
            parts.nets.iter().for_each(|net| net.device.announce());
            Ok(())
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

fn set_net_limits(parts: &Parts, body: &SetNetLimits) -> Result<(), Answer> {
    let card = card(parts, &body.id)?;
    if card.is_in_kernel() {
        let text =
            "vhost-net moves this card's packets and limits no rate: start it with vhost=off";
        return Err(api::refusal(409, text));
    }
    card.set_limits(
        rate(body.receive_bytes_per_second, body.receive_burst_bytes),
        rate(body.send_bytes_per_second, body.send_burst_bytes),
    );
    Ok(())
}
