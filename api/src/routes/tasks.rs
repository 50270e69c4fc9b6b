// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tasks: what runs and what ran on a node, its logs, and how to stop it.
//!
//! Users see their own tasks; who has `Sys.Audit` on the node sees all.

use atoll_manager::access::{Check, Identity, Privilege};
use atoll_manager::error::Error;
use atoll_manager::schema::{Kind, Param, format};
use atoll_manager::task::{StatusClass, TaskFilter, TaskRecord, TaskSource, Upid};
use axum::body::Body;
use hyper::Response;
use hyper::header::{CONTENT_DISPOSITION, CONTENT_TYPE, HeaderValue};
use serde_json::{Value, json};
use tokio_util::io::ReaderStream;

use super::parameters::{COUNT, TIME, text};
use super::{object, serve};
use crate::answer::{Answer, Refusal};
use crate::daemon::Daemon;
use crate::route::{Call, Returns, Route};

/// Rows of a page when none are asked for. PVE's value.
const LIMIT_DEFAULT: usize = 50;

const START: Param = Param::new("start", COUNT, "First row to show, from 0.");
const LIMIT: Param = Param::new("limit", COUNT, "Most rows to show.").default("50");

const MEMBERS: &[&str] = &[
    "endtime",
    "id",
    "node",
    "pid",
    "pstart",
    "starttime",
    "status",
    "type",
    "upid",
    "user",
];

pub const ROUTES: &[Route] = &[
    Route::get(
        "/nodes/{node}/tasks",
        "List the tasks of a node.",
        serve!(list),
    )
    .params(&[
        START,
        LIMIT,
        Param::new("errors", Kind::Boolean, "Only tasks that failed."),
        Param::new(
            "since",
            TIME,
            "Only tasks that began at this time or later.",
        ),
        Param::new(
            "until",
            TIME,
            "Only tasks that began at this time or earlier.",
        ),
        Param::new(
            "source",
            Kind::Choice(&["archive", "active", "all"]),
            "Ended tasks, running ones, or both.",
        )
        .default("archive"),
        Param::new(
            "statusfilter",
            Kind::Format(CLASS_LIST),
            "Only tasks that ended so: ok, warning, error, unknown.",
        ),
        Param::new("typefilter", text(64), "Only tasks of this type."),
        Param::new(
            "userfilter",
            text(64),
            "Only tasks of users whose name has this text.",
        ),
        Param::new(
            "vmid",
            Kind::NumberFormat(format::VMID),
            "Only tasks on this guest.",
        ),
    ])
    .returns(Returns::List(MEMBERS))
    .check(Check::AnyUser),
    Route::delete("/nodes/{node}/tasks/{upid}", "Stop a task.", serve!(stop)).check(Check::AnyUser),
    Route::get(
        "/nodes/{node}/tasks/{upid}/status",
        "Show how a task is.",
        serve!(status),
    )
    .returns(Returns::Object(&[
        "exitstatus",
        "id",
        "node",
        "pid",
        "pstart",
        "starttime",
        "status",
        "type",
        "upid",
        "user",
    ]))
    .check(Check::AnyUser),
    Route::get(
        "/nodes/{node}/tasks/{upid}/log",
        "Read a task's log.",
        serve!(log),
    )
    .params(&[
        START,
        LIMIT,
        Param::new("download", Kind::Boolean, "Send the whole log as a file."),
    ])
    .returns(Returns::List(&["n", "t"]))
    .check(Check::AnyUser),
    Route::get(
        "/cluster/tasks",
        "List recent tasks of the cluster.",
        serve!(recent),
    )
    .returns(Returns::List(MEMBERS))
    .check(Check::AnyUser),
];

const CLASSES: &[(&str, StatusClass)] = &[
    ("ok", StatusClass::Ok),
    ("warning", StatusClass::Warning),
    ("error", StatusClass::Error),
    ("unknown", StatusClass::Unknown),
];

const CLASS_LIST: atoll_manager::schema::Format = atoll_manager::schema::Format {
    name: "pve-task-status-type-list",
    check: |text| {
        let known = |word: &str| CLASSES.iter().any(|(name, _)| *name == word);
        match atoll_manager::schema::split_list(text).find(|word| !known(word)) {
            None => Ok(()),
            Some(word) => Err(format!(
                "'{word}' is not one of ok, warning, error, unknown"
            )),
        }
    },
};

/// The caller sees the tasks of others.
fn sees_all(call: &Call) -> bool {
    let path = format!("/nodes/{}", call.daemon.node.name());
    call.caller().has(&path, Privilege::SysAudit)
}

/// The task of the path, if the caller may know of it.
fn task(call: &Call, allowed_to_others: bool) -> Result<Upid, Error> {
    let upid: Upid = call.values.required("upid").parse().map_err(
        |error: atoll_manager::task::InvalidUpid| Error::invalid("upid", error.to_string()),
    )?;
    match allowed_to_others || owns(call.caller().identity(), &upid) {
        true => Ok(upid),
        false => {
            let node = call.daemon.node.name();
            Err(Error::Denied(format!(
                "Permission check failed (/nodes/{node}, Sys.Audit)"
            )))
        }
    }
}

fn owns(caller: &Identity, upid: &Upid) -> bool {
    upid.user == caller.to_string()
        || (caller.token.is_none() && upid.user.split('!').next() == Some(caller.user.as_str()))
}

/// What a task record has in listings and alone.
fn members(record: &TaskRecord) -> Value {
    let upid = &record.upid;
    json!({
        "upid": upid.to_string(), "node": upid.node, "pid": upid.pid, "pstart": upid.pstart,
        "starttime": upid.starttime, "type": upid.kind, "id": upid.id, "user": upid.user,
    })
}

fn row(record: &TaskRecord) -> Value {
    let mut row = members(record);
    if let Some(end) = &record.end {
        row["endtime"] = json!(end.time);
        row["status"] = json!(end.status);
    }
    row
}

async fn list(call: Call) -> Result<Answer, Refusal> {
    let values = &call.values;
    let source = match values.text("source") {
        Some("active") => TaskSource::Active,
        Some("all") => TaskSource::All,
        _ => TaskSource::Archive,
    };
    let named = values.list("statusfilter");
    let mut classes: Vec<StatusClass> = CLASSES
        .iter()
        .filter(|(name, _)| named.iter().any(|word| word == name))
        .map(|(_, class)| *class)
        .collect();
    if values.flag("errors") {
        classes.extend([StatusClass::Error, StatusClass::Unknown]);
    }
    let filter = TaskFilter {
        source,
        id: values.text("vmid").map(str::to_owned),
        kind: values.text("typefilter").map(str::to_owned),
        user: values.text("userfilter").map(str::to_owned),
        owner: (!sees_all(&call)).then(|| call.caller().identity().user.to_string()),
        since: values.number("since"),
        until: values.number("until"),
        classes,
        start: values.number("start").unwrap_or(0),
        limit: values.number("limit").unwrap_or(LIMIT_DEFAULT),
    };
    let (records, total) = call.daemon.node.tasks().list(&filter);
    let rows = records.iter().map(|record| {
        let mut shown = row(record);
        if record.end.is_none() {
            shown["status"] = json!(record.status());
        }
        shown
    });
    Ok(Answer::Page {
        data: rows.collect(),
        total: total as u64,
    })
}

async fn recent(call: Call) -> Result<Answer, Refusal> {
    let filter = TaskFilter {
        source: TaskSource::All,
        owner: (!sees_all(&call)).then(|| call.caller().identity().user.to_string()),
        limit: LIMIT_DEFAULT,
        ..TaskFilter::default()
    };
    let (records, _) = call.daemon.node.tasks().list(&filter);
    Ok(Answer::Data(records.iter().map(row).collect()))
}

async fn status(call: Call) -> Result<Answer, Refusal> {
    let upid = task(&call, sees_all(&call))?;
    let record = call.daemon.node.tasks().status(&upid)?;
    let mut data = members(&record);
    let (user, token) = match upid.user.split_once('!') {
        Some((user, token)) => (user, Some(json!(token))),
        None => (upid.user.as_str(), None),
    };
    let state = object([
        ("user", Some(json!(user))),
        ("tokenid", token),
        (
            "status",
            Some(json!(if record.end.is_some() {
                "stopped"
            } else {
                "running"
            })),
        ),
        (
            "exitstatus",
            record.end.as_ref().map(|end| json!(end.status)),
        ),
    ]);
    if let (Value::Object(data), Value::Object(state)) = (&mut data, state) {
        data.extend(state);
    }
    Ok(Answer::Data(data))
}

async fn stop(call: Call) -> Result<Answer, Refusal> {
    let path = format!("/nodes/{}", call.daemon.node.name());
    let upid = task(&call, call.caller().has(&path, Privilege::SysModify))?;
    call.daemon.node.tasks().stop(&upid)?;
    Ok(Answer::NULL)
}

async fn log(call: Call) -> Result<Answer, Refusal> {
    let upid = task(&call, sees_all(&call))?;
    if call.values.flag("download") {
        return download(&call.daemon, &upid).await;
    }
    let start = call.values.number("start").unwrap_or(0);
    let limit = call.values.number("limit").unwrap_or(LIMIT_DEFAULT);
    let tasks = call.daemon.node.tasks().clone();
    let page = tokio::task::spawn_blocking(move || tasks.log(&upid, start, limit)).await;
    let page = page.map_err(|error| Error::failed("read the task's log", error))??;
    let lines = page
        .lines
        .iter()
        .map(|(number, text)| json!({ "n": number, "t": text }));
    Ok(Answer::Page {
        data: lines.collect(),
        total: page.total as u64,
    })
}

async fn download(daemon: &Daemon, upid: &Upid) -> Result<Answer, Refusal> {
    drop(daemon.node.tasks().status(upid)?);
    let file = tokio::fs::File::open(daemon.node.tasks().log_file(upid)).await;
    let file = file.map_err(|error| Error::failed("read the task's log", error))?;
    let mut response = Response::new(Body::from_stream(ReaderStream::new(file)));
    let headers = response.headers_mut();
    headers.insert(
        CONTENT_TYPE,
        HeaderValue::from_static("text/plain; charset=utf-8"),
    );
    let name = format!(
        "attachment; filename=\"task-{}-{}.log\"",
        upid.node, upid.kind
    );
    if let Ok(value) = HeaderValue::from_str(&name) {
        headers.insert(CONTENT_DISPOSITION, value);
    }
    Ok(Answer::Response(Box::new(response)))
}
