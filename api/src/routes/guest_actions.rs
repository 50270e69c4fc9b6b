// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What is done to a guest that exists: power, disks' sizes. Its console is in `terminals`.

use std::time::Duration;

use atoll_manager::access::{Check, Privilege};
use atoll_manager::error::Error;
use atoll_manager::guest::{Action, Ask};
use atoll_manager::id::GuestKind;
use atoll_manager::schema::{Kind, Param, format};
use atoll_manager::storage::name::StorageName;
use serde_json::json;

use super::guests::{id, kind, stored};
use super::parameters::{DIGEST, text};
use super::serve;
use crate::answer::{Answer, Refusal};
use crate::route::{Call, Returns, Route};

const POWERS: Check = Check::All {
    path: "/vms/{vmid}",
    privileges: &[Privilege::VmPowerMgmt],
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
                    "Write a virtual machine's memory to a volume and end it; its next start goes on from there.",
                ),
                Param::new(
                    "statestorage",
                    Kind::Format(format::STORAGE_ID),
                    "Storage of that volume; vmstatestorage of the config, or the first disk's, when it is not given.",
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
    if !call.values.flag("todisk") {
        return act(&call, Action::Suspend);
    }
    if kind(&call) == GuestKind::Container {
        let text = "containers cannot be suspended to disk: leave todisk out to suspend in memory";
        return Err(Error::invalid("todisk", text).into());
    }
    let storage = call.values.text("statestorage").map(|name| name.parse());
    let storage = storage.transpose();
    let storage: Option<StorageName> =
        storage.map_err(|error| Error::invalid("statestorage", format!("{error}")))?;
    let vm = (format!("/vms/{}", id(&call)), Privilege::VmConfigDisk);
    let place = storage.as_ref().map(|storage| {
        let path = format!("/storage/{storage}");
        (path, Privilege::DatastoreAllocateSpace)
    });
    for (path, privilege) in [Some(vm), place].into_iter().flatten() {
        if !call.caller().has(&path, privilege) {
            let text = format!("Permission check failed ({path}, {privilege})");
            return Err(Error::Denied(text).into());
        }
    }
    let guests = call.daemon.node.guests();
    let upid = guests.suspend_to_disk(id(&call), storage, call.caller().identity())?;
    Ok(Answer::Data(json!(upid.to_string())))
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
