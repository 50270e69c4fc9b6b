// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The guest agent of virtual machines, at PVE's paths. Most commands have no parameters and are named by their path.

use atoll_manager::access::{Check, Privilege};
use atoll_manager::error::Error;
use atoll_manager::guest::agent;
use atoll_manager::guest::site::Seat;
use atoll_manager::id::GuestKind;
use atoll_manager::schema::{Kind, Param};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::json;

use super::guests::id;
use super::parameters::text;
use super::serve;
use crate::answer::{Answer, Refusal};
use crate::route::{Call, Returns, Route};

/// Longest file that is read, in bytes. PVE's limit.
const FILE_BYTES_MAX: u64 = 16 << 20;

const fn any(privileges: &'static [Privilege]) -> Check {
    Check::Any {
        path: "/vms/{vmid}",
        privileges,
    }
}

const ASKS: Check = any(&[
    Privilege::VmGuestAgentAudit,
    Privilege::VmGuestAgentUnrestricted,
]);
const MANAGES_FILE_SYSTEMS: Check = any(&[
    Privilege::VmGuestAgentFileSystemMgmt,
    Privilege::VmGuestAgentUnrestricted,
]);
const READS: Check = any(&[
    Privilege::VmGuestAgentFileRead,
    Privilege::VmGuestAgentUnrestricted,
]);
const WRITES: Check = any(&[
    Privilege::VmGuestAgentFileWrite,
    Privilege::VmGuestAgentUnrestricted,
]);
const DOES_ANYTHING: Check = any(&[Privilege::VmGuestAgentUnrestricted]);
const POWERS: Check = any(&[Privilege::VmPowerMgmt, Privilege::VmGuestAgentUnrestricted]);

/// Rows whose command is `guest-` and the end of the path.
macro_rules! plain {
    ($($method:ident $name:literal $check:ident $summary:literal;)*) => {
        &[$(
            Route::$method(
                concat!("/nodes/{node}/qemu/{vmid}/agent/", $name),
                $summary,
                serve!(plain),
            )
            .returns(Returns::Object(&["result"]))
            .check($check),
        )*]
    };
}

pub const PLAIN: &[Route] = plain! {
    get "get-fsinfo" ASKS "List the file systems in the guest.";
    get "get-host-name" ASKS "Host name in the guest.";
    get "get-memory-block-info" ASKS "Size of the guest's memory blocks.";
    get "get-memory-blocks" ASKS "List the guest's memory blocks.";
    get "get-osinfo" ASKS "Operating system of the guest.";
    get "get-time" ASKS "Time in the guest.";
    get "get-timezone" ASKS "Time zone of the guest.";
    get "get-users" ASKS "List who is signed in to the guest.";
    get "get-vcpus" ASKS "List the guest's CPUs.";
    get "info" ASKS "Version of the agent, and what it can do.";
    get "network-get-interfaces" ASKS "List the network interfaces in the guest.";
    post "ping" ASKS "See whether the agent answers.";
    post "fsfreeze-freeze" MANAGES_FILE_SYSTEMS "Freeze the guest's file systems.";
    post "fsfreeze-status" MANAGES_FILE_SYSTEMS "Whether the guest's file systems are frozen.";
    post "fsfreeze-thaw" MANAGES_FILE_SYSTEMS "Let the guest's file systems go on.";
    post "fstrim" MANAGES_FILE_SYSTEMS "Discard what the guest's file systems do not use.";
    post "shutdown" POWERS "Have the guest power off.";
};

pub const ROUTES: &[Route] = &[
    Route::post(
        "/nodes/{node}/qemu/{vmid}/agent/exec",
        "Run a program in the guest.",
        serve!(execute),
    )
    .params(&[
        Param::new(
            "command",
            Kind::List { length_max: 65_536 },
            "The program and its arguments.",
        )
        .required(),
        Param::new("input-data", text(65_536), "What it reads."),
    ])
    .returns(Returns::Object(&["pid"]))
    .check(DOES_ANYTHING),
    Route::get(
        "/nodes/{node}/qemu/{vmid}/agent/exec-status",
        "See how a program in the guest is, and what it has written.",
        serve!(execution),
    )
    .params(&[Param::new(
        "pid",
        Kind::Integer {
            min: 0,
            max: i64::MAX,
        },
        "What exec answered.",
    )
    .required()])
    .returns(Returns::Object(&[
        "exited", "exitcode", "signal", "out-data", "err-data",
    ]))
    .check(DOES_ANYTHING),
    Route::get(
        "/nodes/{node}/qemu/{vmid}/agent/file-read",
        "Read a file in the guest, up to 16 MiB of it.",
        serve!(read),
    )
    .params(&[Param::new("file", text(4096), "Its path.").required()])
    .returns(Returns::Object(&["content", "truncated"]))
    .check(READS),
    Route::post(
        "/nodes/{node}/qemu/{vmid}/agent/file-write",
        "Write a file in the guest.",
        serve!(write),
    )
    .params(&[
        Param::new("file", text(4096), "Its path.").required(),
        Param::new("content", text(61_440), "What it is to hold.").required(),
        Param::new(
            "encode",
            Kind::Boolean,
            "The content is text; otherwise it is base64 already.",
        )
        .default("1"),
    ])
    .check(WRITES),
    Route::post(
        "/nodes/{node}/qemu/{vmid}/agent/set-user-password",
        "Set the password of a user in the guest.",
        serve!(set_password),
    )
    .params(&[
        Param::new("username", text(256), "The user.").required(),
        Param::new("password", text(1024), "The password.").required(),
        Param::new(
            "crypted",
            Kind::Boolean,
            "It has been through crypt(3) already.",
        ),
    ])
    .returns(Returns::Object(&["result"]))
    .check(DOES_ANYTHING),
];

fn seat(call: &Call) -> Seat {
    let site = call.daemon.node.guests().site();
    site.seat(GuestKind::Vm, id(call))
}

async fn plain(call: Call) -> Result<Answer, Refusal> {
    let seat = seat(&call);
    let name = call.route.path.rsplit('/').next().unwrap_or_default();
    let result = agent::call(&seat, &format!("guest-{name}"), json!({})).await?;
    Ok(Answer::Data(json!({ "result": result })))
}

async fn execute(call: Call) -> Result<Answer, Refusal> {
    let seat = seat(&call);
    let mut command = call.values.items("command").into_iter();
    let path = command.next().unwrap_or_default();
    let mut arguments = json!({
        "path": path, "arg": command.collect::<Vec<_>>(), "capture-output": true,
    });
    if let Some(input) = call.values.text("input-data") {
        arguments["input-data"] = json!(BASE64.encode(input));
    }
    Ok(Answer::Data(
        agent::call(&seat, "guest-exec", arguments).await?,
    ))
}

async fn execution(call: Call) -> Result<Answer, Refusal> {
    let seat = seat(&call);
    let pid: i64 = call.values.number("pid").expect("pid is a number");
    let mut status = agent::call(&seat, "guest-exec-status", json!({ "pid": pid })).await?;
    for name in ["out-data", "err-data"] {
        if let Some(data) = status[name].as_str() {
            status[name] = json!(decoded(data)?);
        }
    }
    for name in ["exited", "out-truncated", "err-truncated"] {
        if let Some(flag) = status[name].as_bool() {
            status[name] = super::bit(flag);
        }
    }
    Ok(Answer::Data(status))
}

/// What the agent sent as base64, as text.
fn decoded(data: &str) -> Result<String, Error> {
    let bytes = BASE64
        .decode(data)
        .map_err(|error| Error::failed("the agent's answer is not base64", error))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

async fn read(call: Call) -> Result<Answer, Refusal> {
    let seat = seat(&call);
    let file = call.values.required("file").to_owned();
    let opened = json!({ "path": file, "mode": "r" });
    let handle = agent::call(&seat, "guest-file-open", opened).await?;
    let wanted = json!({ "handle": handle, "count": FILE_BYTES_MAX });
    let part = agent::call(&seat, "guest-file-read", wanted).await;
    // Open files are few in the guest; whatever came of it, this one is closed.
    drop(agent::call(&seat, "guest-file-close", json!({ "handle": handle })).await);
    let part = part?;
    let content = decoded(part["buf-b64"].as_str().unwrap_or_default())?;
    let mut answer = json!({ "content": content });
    if part["eof"] == false {
        answer["truncated"] = json!(1);
    }
    Ok(Answer::Data(answer))
}

async fn write(call: Call) -> Result<Answer, Refusal> {
    let seat = seat(&call);
    let (file, content) = (
        call.values.required("file").to_owned(),
        call.values.required("content"),
    );
    let content = match call.values.flag_if_given("encode").unwrap_or(true) {
        true => BASE64.encode(content),
        false => content.to_owned(),
    };
    let opened = json!({ "path": file, "mode": "wb" });
    let handle = agent::call(&seat, "guest-file-open", opened).await?;
    let data = json!({ "handle": handle, "buf-b64": content });
    let written = agent::call(&seat, "guest-file-write", data).await;
    let closed = agent::call(&seat, "guest-file-close", json!({ "handle": handle })).await;
    written?;
    closed?;
    Ok(Answer::NULL)
}

async fn set_password(call: Call) -> Result<Answer, Refusal> {
    let seat = seat(&call);
    let arguments = json!({
        "username": call.values.required("username"),
        "password": BASE64.encode(call.values.required("password")),
        "crypted": call.values.flag("crypted"),
    });
    let result = agent::call(&seat, "guest-set-user-password", arguments).await?;
    Ok(Answer::Data(json!({ "result": result })))
}
