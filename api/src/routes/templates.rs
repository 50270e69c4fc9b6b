// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Container templates from signed indexes: PVE's `aplinfo`.

use atoll_manager::access::{Check, Privilege};
use atoll_manager::schema::{Kind, Param, format};
use atoll_manager::storage::download::Download;
use atoll_manager::storage::fetch::{self, Limits};
use atoll_manager::storage::name::Content;
use atoll_manager::task::{NewTask, TaskContext};
use atoll_manager::templates::index::Template;
use serde_json::{Value, json};

use super::parameters::text;
use super::storage::storage_name;
use super::volumes::start;
use super::{serve, texts};
use crate::answer::{Answer, Refusal};
use crate::route::{Call, Returns, Route};

pub const ROUTES: &[Route] = &[
    Route::get(
        "/nodes/{node}/aplinfo",
        "List the container templates of the node's indexes, as they were at the last refresh.",
        serve!(list),
    )
    .returns(Returns::List(&[
        "template",
        "package",
        "version",
        "type",
        "os",
        "section",
        "headline",
        "description",
        "location",
        "source",
        "infopage",
    ]))
    .check(Check::AnyUser),
    Route::post(
        "/nodes/{node}/aplinfo",
        "Download a template of the indexes into a storage.",
        serve!(download),
    )
    .params(&[
        Param::new(
            "storage",
            Kind::Format(format::STORAGE_ID),
            "The storage that keeps it.",
        )
        .required(),
        Param::new("template", text(255), "Its file name in the index.").required(),
    ])
    .returns(Returns::Upid)
    .check(Check::All {
        path: "/storage/{storage}",
        privileges: &[Privilege::DatastoreAllocateTemplate],
    }),
    Route::put(
        "/nodes/{node}/aplinfo",
        "Fetch the indexes anew and check their signatures.",
        serve!(refresh),
    )
    .returns(Returns::Upid)
    .check(Check::All {
        path: "/nodes/{node}",
        privileges: &[Privilege::SysAccessNetwork],
    })
    .own(),
];

async fn list(call: Call) -> Result<Answer, Refusal> {
    let templates = call.daemon.node.templates().list().await?;
    Ok(Answer::Data(templates.into_iter().map(row).collect()))
}

fn row(template: Template) -> Value {
    let mut members = template.keys;
    members.extend([
        ("template".to_owned(), template.file),
        ("location".to_owned(), template.location.into()),
        ("source".to_owned(), template.source),
        ("headline".to_owned(), template.headline),
        ("description".to_owned(), template.description),
    ]);
    texts(&members)
}

async fn download(call: Call) -> Result<Answer, Refusal> {
    let node = &call.daemon.node;
    let storage = node
        .storage()
        .open_for(&storage_name(&call)?, Content::Vztmpl)?;
    let template = node
        .templates()
        .find(call.values.required("template"))
        .await?;
    let download = Download {
        checksum: Some(template.checksum()?),
        volume: template.volume()?,
        limits: Limits {
            size_bytes_max: storage.space().await?.available_bytes,
            verify_certificates: true,
            waits: fetch::WAITS,
        },
        storage,
        url: template.location.into(),
    };
    let upid = start(&call, &template.file, download)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

async fn refresh(call: Call) -> Result<Answer, Refusal> {
    let templates = call.daemon.node.templates().clone();
    let new = NewTask::new("aplupdate", "", call.caller().identity());
    let work = async move |task: TaskContext| templates.refresh(&task).await;
    let upid = call.daemon.node.tasks().spawn(new, work)?;
    Ok(Answer::Data(json!(upid.to_string())))
}
