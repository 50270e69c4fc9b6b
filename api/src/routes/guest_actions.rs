// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What is done to a guest that exists: power, disks' sizes, its console.

use std::time::Duration;

use atoll_manager::access::{Check, Privilege};
use atoll_manager::error::Error;
use atoll_manager::guest::{Action, Ask};
use atoll_manager::schema::{Kind, Param};
use axum::extract::FromRequestParts as _;
use axum::extract::ws::WebSocketUpgrade;
use hyper::StatusCode;
use jiff::Timestamp;
use serde_json::json;

use super::guests::{id, kind, stored};
use super::parameters::{DIGEST, text};
use super::serve;
use crate::answer::{Answer, Refusal};
use crate::auth::ticket::ConsoleClaim;
use crate::auth::unauthorized;
use crate::console;
use crate::route::{Call, Returns, Route};

const POWERS: Check = Check::All {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmPowerMgmt],
};
const LOOKS: Check = Check::All {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmConsole],
};
const RESIZES: Check = Check::All {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmConfigDisk],
};

const TIMEOUT: Param = Param::new(
    "timeout",
    Kind::Integer {
        min: 0,
        max: 86_400,
    },
    "Seconds that the guest has.",
);
const SKIPLOCK: Param = Param::new(
    "skiplock",
    Kind::Boolean,
    "Accepted for PVE's clients; locks are not skipped.",
);

/// Largest websocket message that a client may send, in bytes.
const MESSAGE_BYTES_MAX: usize = 128 << 10;

/// The rows of both kinds.
macro_rules! rows {
    ($guest:literal) => {
        &[
            Route::post(
                concat!($guest, "/status/start"),
                "Start a guest.",
                serve!(start),
            )
            .params(&[SKIPLOCK, TIMEOUT])
            .returns(Returns::Upid)
            .check(POWERS),
            Route::post(
                concat!($guest, "/status/stop"),
                "Stop a guest at once.",
                serve!(stop),
            )
            .params(&[
                SKIPLOCK,
                TIMEOUT,
                Param::new("keepActive", Kind::Boolean, "Accepted for PVE's clients."),
                Param::new(
                    "overrule-shutdown",
                    Kind::Boolean,
                    "Stop the tasks that are shutting it down.",
                ),
            ])
            .returns(Returns::Upid)
            .check(POWERS),
            Route::post(
                concat!($guest, "/status/shutdown"),
                "Ask a guest to shut down.",
                serve!(shutdown),
            )
            .params(&[
                SKIPLOCK,
                TIMEOUT,
                Param::new(
                    "forceStop",
                    Kind::Boolean,
                    "Stop it when it does not obey in time.",
                ),
                Param::new("keepActive", Kind::Boolean, "Accepted for PVE's clients."),
            ])
            .returns(Returns::Upid)
            .check(POWERS),
            Route::post(
                concat!($guest, "/status/reboot"),
                "Shut a guest down and start it again.",
                serve!(reboot),
            )
            .params(&[TIMEOUT])
            .returns(Returns::Upid)
            .check(POWERS),
            Route::post(
                concat!($guest, "/status/suspend"),
                "Halt a guest where it is.",
                serve!(suspend),
            )
            .params(&[
                SKIPLOCK,
                Param::new(
                    "todisk",
                    Kind::Boolean,
                    "Keeping the state on disk is not there yet.",
                ),
            ])
            .returns(Returns::Upid)
            .check(POWERS),
            Route::post(
                concat!($guest, "/status/resume"),
                "Let a suspended guest go on.",
                serve!(resume),
            )
            .params(&[
                SKIPLOCK,
                Param::new("nocheck", Kind::Boolean, "Accepted for PVE's clients."),
            ])
            .returns(Returns::Upid)
            .check(POWERS),
            Route::put(concat!($guest, "/resize"), "Grow a disk.", serve!(resize))
                .params(&[
                    Param::new(
                        "disk",
                        text(32),
                        "Key of the disk, such as scsi0 or rootfs.",
                    )
                    .required(),
                    Param::new("size", text(32), "New size, or +SIZE to add.").required(),
                    DIGEST,
                    SKIPLOCK,
                ])
                .returns(Returns::Upid)
                .check(RESIZES),
            Route::post(
                concat!($guest, "/termproxy"),
                "Begin a terminal on a guest's console.",
                serve!(terminal),
            )
            .params(&[Param::new(
                "serial",
                Kind::Choice(&["serial0"]),
                "Which serial console.",
            )])
            .returns(Returns::Object(&["user", "ticket", "port", "upid"]))
            .check(LOOKS),
            Route::get(
                concat!($guest, "/vncwebsocket"),
                "Connect to a terminal that was begun.",
                serve!(connect),
            )
            .params(&[
                Param::new(
                    "port",
                    Kind::Integer {
                        min: 5900,
                        max: 5999,
                    },
                    "Port that termproxy answered with.",
                )
                .required(),
                Param::new(
                    "vncticket",
                    text(512),
                    "Ticket that termproxy answered with.",
                )
                .required(),
            ])
            .returns(Returns::Stream)
            .check(LOOKS),
        ]
    };
}

pub const VMS: &[Route] = rows!("/nodes/{node}/qemu/{vmid}");
pub const CONTAINERS: &[Route] = rows!("/nodes/{node}/lxc/{vmid}");
pub const RESET: &[Route] = &[Route::post(
    "/nodes/{node}/qemu/{vmid}/status/reset",
    "Press a machine's reset button.",
    serve!(reset),
)
.params(&[SKIPLOCK])
.returns(Returns::Upid)
.check(POWERS)];

fn act(call: &Call, action: Action) -> Result<Answer, Refusal> {
    let user = call.caller().identity();
    let upid = call
        .daemon
        .node
        .guests()
        .act(kind(call), id(call), action, user)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

/// How the guest is asked: PVE's three minutes unless the caller says otherwise.
fn ask(call: &Call) -> Ask {
    let default = Ask::default();
    let timeout = call.values.number("timeout").map(Duration::from_secs);
    Ask {
        timeout: timeout.unwrap_or(default.timeout),
        force: call.values.flag("forceStop"),
    }
}

async fn start(call: Call) -> Result<Answer, Refusal> {
    act(&call, Action::Start)
}

async fn stop(call: Call) -> Result<Answer, Refusal> {
    act(&call, Action::Stop)
}

async fn shutdown(call: Call) -> Result<Answer, Refusal> {
    act(&call, Action::Shutdown(ask(&call)))
}

async fn reboot(call: Call) -> Result<Answer, Refusal> {
    act(&call, Action::Reboot(ask(&call)))
}

async fn reset(call: Call) -> Result<Answer, Refusal> {
    act(&call, Action::Reset)
}

async fn suspend(call: Call) -> Result<Answer, Refusal> {
    if call.values.flag("todisk") {
        let text = "suspending to disk is not there yet: leave todisk out to suspend in memory";
        return Err(Error::invalid("todisk", text).into());
    }
    act(&call, Action::Suspend)
}

async fn resume(call: Call) -> Result<Answer, Refusal> {
    act(&call, Action::Resume)
}

async fn resize(call: Call) -> Result<Answer, Refusal> {
    let (kind, id) = (kind(&call), id(&call));
    let guests = call.daemon.node.guests();
    stored(&call)?
        .config
        .check_digest(call.values.text("digest"))?;
    let (disk, size) = (call.values.required("disk"), call.values.required("size"));
    let upid = guests.resize(kind, id, disk, size, call.caller().identity())?;
    Ok(Answer::Data(json!(upid.to_string())))
}

async fn terminal(call: Call) -> Result<Answer, Refusal> {
    let opened = console::open(
        &call.daemon,
        kind(&call),
        id(&call),
        call.caller().identity(),
    )?;
    Ok(Answer::Data(json!({
        "user": opened.user,
        "ticket": opened.ticket,
        // A text, as PVE sends it here.
        "port": opened.port.to_string(),
        "upid": opened.upid.to_string(),
    })))
}

async fn connect(call: Call) -> Result<Answer, Refusal> {
    let guest = id(&call);
    let port = call
        .values
        .number("port")
        .expect("the schema's range is a port's");
    let user = call.caller().identity().to_string();
    let claim = ConsoleClaim {
        user: &user,
        path: &console::acl_path(guest),
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
    let hand_over = call.daemon.consoles.claim(port, guest, &user);
    let hand_over =
        hand_over.ok_or_else(|| Error::refused(format!("no console waits at port {port}")))?;
    let response = upgrade
        .protocols(["binary"])
        .max_message_size(MESSAGE_BYTES_MAX)
        .on_upgrade(async move |socket| drop(hand_over.send(socket)));
    Ok(Answer::Response(Box::new(response)))
}
