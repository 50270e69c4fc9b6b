// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Terminals: of guests, on their consoles, and of the node. How bytes go to and fro is in `console`.

use atoll_manager::access::{Check, Privilege};
use atoll_manager::error::Error;
use atoll_manager::schema::{Kind, Param};
use axum::extract::FromRequestParts as _;
use axum::extract::ws::WebSocketUpgrade;
use hyper::StatusCode;
use jiff::Timestamp;
use serde_json::json;

use super::guests::{id, kind};
use super::parameters::text;
use super::serve;
use crate::answer::{Answer, Refusal};
use crate::auth::ticket::ConsoleClaim;
use crate::auth::unauthorized;
use crate::console::{self, Place};
use crate::route::{Call, Returns, Route};

/// Largest websocket message that a client may send, in bytes.
const MESSAGE_BYTES_MAX: usize = 128 << 10;

const OF_GUEST: Check = Check::All {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmConsole],
};
const OF_NODE: Check = Check::All {
    path: "/nodes/{node}",
    privileges: &[Privilege::SysConsole],
};

const PORT: Param = Param::new(
    "port",
    Kind::Integer {
        min: 5900,
        max: 5999,
    },
    "Port that termproxy answered with.",
)
.required();
const TICKET: Param = Param::new(
    "vncticket",
    text(512),
    "Ticket that termproxy answered with.",
)
.required();
const SERIAL: Param = Param::new(
    "serial",
    Kind::Choice(&["serial0"]),
    "Which serial console.",
);
const COMMAND: Param = Param::new(
    "cmd",
    Kind::Choice(&["login"]),
    "What to run: a login, as root without a password for root@pam.",
);

/// The two rows of one place.
macro_rules! rows {
    ($place:literal, $of:literal, $param:expr, $check:expr) => {
        &[
            Route::post(
                concat!($place, "/termproxy"),
                concat!("Begin a terminal ", $of, "."),
                serve!(begin),
            )
            .params(&[$param])
            .returns(Returns::Object(&["user", "ticket", "port", "upid"]))
            .check($check),
            Route::get(
                concat!($place, "/vncwebsocket"),
                "Connect to a terminal that was begun.",
                serve!(connect),
            )
            .params(&[PORT, TICKET])
            .returns(Returns::Stream)
            .check($check),
        ]
    };
}

pub const NODES: &[Route] = rows!("/nodes/{node}", "on a node", COMMAND, OF_NODE);
pub const VMS: &[Route] = rows!(
    "/nodes/{node}/qemu/{vmid}",
    "on a guest's console",
    SERIAL,
    OF_GUEST
);
pub const CONTAINERS: &[Route] = rows!(
    "/nodes/{node}/lxc/{vmid}",
    "on a guest's console",
    SERIAL,
    OF_GUEST
);

fn place(call: &Call) -> Place {
    match call.values.text("vmid") {
        Some(_) => Place::Guest(kind(call), id(call)),
        None => Place::Node,
    }
}

async fn begin(call: Call) -> Result<Answer, Refusal> {
    let opened = console::open(&call.daemon, place(&call), call.caller().identity())?;
    Ok(Answer::Data(json!({
        "user": opened.user,
        "ticket": opened.ticket,
        // A text, as PVE sends it here.
        "port": opened.port.to_string(),
        "upid": opened.upid.to_string(),
    })))
}

async fn connect(call: Call) -> Result<Answer, Refusal> {
    let place = place(&call);
    let port = call
        .values
        .number("port")
        .expect("the schema's range is a port's");
    let user = call.caller().identity().to_string();
    let claim = ConsoleClaim {
        user: &user,
        path: &place.acl_path(&call.daemon),
        port,
    };
    let ticket = call.values.required("vncticket");
    let now = Timestamp::now().as_second();
    if !call.daemon.keyring.keys().console_fits(ticket, &claim, now) {
        return Err(unauthorized("permission denied - invalid PVEVNC ticket"));
    }
    let (mut parts, _) = call.request.into_parts();
    let upgrade = WebSocketUpgrade::from_request_parts(&mut parts, &()).await;
    let upgrade = upgrade.map_err(|error| {
        Refusal::new(
            StatusCode::BAD_REQUEST,
            format!("not a websocket request: {error}"),
        )
    })?;
    // Taken only now, so that a request that is no websocket does not use the console up.
    let hand_over = call.daemon.consoles.claim(port, place, &user);
    let hand_over =
        hand_over.ok_or_else(|| Error::refused(format!("no console waits at port {port}")))?;
    let response = upgrade
        .protocols(["binary"])
        .max_message_size(MESSAGE_BYTES_MAX)
        .on_upgrade(async move |socket| drop(hand_over.send(socket)));
    Ok(Answer::Response(Box::new(response)))
}
