// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Volumes: what is on a node's storages, and how files get there: allocation, upload, download.

use atoll_manager::Node;
use atoll_manager::access::{Caller, Check, Privilege, PrivilegeSet};
use atoll_manager::error::Error;
use atoll_manager::guest::stored;
use atoll_manager::id::GuestId;
use atoll_manager::schema::format::parse_size;
use atoll_manager::schema::{Kind, Param, format};
use atoll_manager::storage::Volume;
use atoll_manager::storage::checksum::Checksum;
use atoll_manager::storage::download::Download;
use atoll_manager::storage::fetch::{self, Limits};
use atoll_manager::storage::incoming::{Existing, Incoming};
use atoll_manager::storage::name::{
    Content, Format, StorageName, VolumeId, VolumeName, parse_format,
};
use atoll_manager::task::{NewTask, TaskContext, Upid};
use axum::extract::multipart::{Field, Multipart};
use axum::extract::{DefaultBodyLimit, FromRequest as _};
use hyper::StatusCode;
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt as _;

use super::parameters::{FORMATS, VMID, text};
use super::storage::storage_name;
use super::{object, serve};
use crate::answer::{Answer, Refusal};
use crate::route::{Call, Returns, Route};

/// Who may see a storage.
pub const SEES_STORAGE: Check = Check::Any {
    path: "/storage/{storage}",
    privileges: &[Privilege::DatastoreAudit, Privilege::DatastoreAllocateSpace],
};

const UPLOADS: Check = Check::All {
    path: "/storage/{storage}",
    privileges: &[Privilege::DatastoreAllocateTemplate],
};

const CONTENTS: Kind = Kind::Choice(&[
    "images", "rootdir", "vztmpl", "iso", "snippets", "backup", "import",
]);

/// What may be uploaded and downloaded. PVE refuses snippets, the gap that its users name first.
const FILE_CONTENT: Param = Param::new(
    "content",
    Kind::Choice(&["iso", "vztmpl", "snippets", "import"]),
    "What the file is.",
)
.required();
const CHECKSUM: Param = Param::new(
    "checksum",
    text(128),
    "Expected checksum of the file, in hexadecimal digits.",
);
const ALGORITHM: Param = Param::new(
    "checksum-algorithm",
    Kind::Choice(&["md5", "sha1", "sha224", "sha256", "sha384", "sha512"]),
    "What the checksum is made with.",
);

/// Longest field of an upload beside the file, in bytes.
const FIELD_BYTES_MAX: usize = 4096;

pub const ROUTES: &[Route] = &[
    Route::get(
        "/nodes/{node}/storage/{storage}/content",
        "List the volumes of a storage.",
        serve!(list),
    )
    .params(&[
        Param::new("content", CONTENTS, "Only volumes of this content."),
        Param::new(
            "vmid",
            Kind::NumberFormat(format::VMID),
            "Only volumes of this guest.",
        ),
    ])
    .returns(Returns::List(&[
        "volid", "content", "format", "size", "used", "ctime", "vmid",
    ]))
    .check(SEES_STORAGE),
    Route::post(
        "/nodes/{node}/storage/{storage}/content",
        "Allocate a disk for a guest.",
        serve!(allocate),
    )
    .params(&[
        VMID,
        Param::new(
            "filename",
            text(255),
            "Name of the disk; the storage picks a free one when it is taken.",
        )
        .required(),
        Param::new(
            "size",
            text(32),
            "Size in kibibytes, or with a unit M or G.",
        )
        .required(),
        Param::new(
            "format",
            FORMATS,
            "Format of the image; that of the name's ending, or raw, when it is not given.",
        ),
    ])
    .returns(Returns::Text)
    .check(Check::All {
        path: "/storage/{storage}",
        privileges: &[Privilege::DatastoreAllocateSpace],
    }),
    Route::get(
        "/nodes/{node}/storage/{storage}/content/{volume}",
        "Show one volume.",
        serve!(show),
    )
    .returns(Returns::Object(&["format", "path", "size", "used"]))
    .check(Check::AnyUser),
    Route::delete(
        "/nodes/{node}/storage/{storage}/content/{volume}",
        "Remove a volume.",
        serve!(remove),
    )
    .params(&[Param::new(
        "delay",
        Kind::Integer { min: 1, max: 30 },
        "Seconds to wait for the end of the work before answering.",
    )])
    .returns(Returns::Upid)
    .check(Check::AnyUser),
    Route::post(
        "/nodes/{node}/storage/{storage}/upload",
        "Upload an image, a template or a snippet.",
        serve!(upload),
    )
    .params(&[
        FILE_CONTENT,
        CHECKSUM,
        ALGORITHM,
        Param::new(
            "filename",
            Kind::Upload,
            "The file; it comes after all other fields.",
        )
        .required(),
    ])
    .returns(Returns::Upid)
    .check(UPLOADS),
    Route::post(
        "/nodes/{node}/storage/{storage}/download-url",
        "Download a file into a storage.",
        serve!(download),
    )
    .params(&[
        FILE_CONTENT,
        CHECKSUM,
        ALGORITHM,
        Param::new("filename", text(255), "Name to give the file.").required(),
        Param::new("url", text(2048), "Where the file is: http:// or https://.").required(),
        Param::new(
            "verify-certificates",
            Kind::Boolean,
            "Check the server's certificate.",
        )
        .default("1"),
    ])
    .returns(Returns::Upid)
    .check(Check::And(&[
        UPLOADS,
        Check::Or(&[
            Check::All {
                path: "/",
                privileges: &[Privilege::SysAudit, Privilege::SysModify],
            },
            Check::All {
                path: "/nodes/{node}",
                privileges: &[Privilege::SysAccessNetwork],
            },
        ]),
    ])),
];

/// The volume of the path; a name without a storage is on the storage of the path.
fn volume(call: &Call) -> Result<VolumeId, Error> {
    let storage = call.values.required("storage");
    let name = call.values.required("volume");
    let id = match name.contains(':') {
        true => name.to_owned(),
        false => format!("{storage}:{name}"),
    };
    let volume: VolumeId = id
        .parse()
        .map_err(|_| Error::refused(format!("unable to parse volume ID '{id}'")))?;
    match volume.storage.as_str() == storage {
        true => Ok(volume),
        false => Err(Error::invalid(
            "volume",
            format!("'{id}' is not on storage '{storage}'"),
        )),
    }
}

/// A guest's disks belong to who may see the guest, the rest to who may see the storage.
pub fn authorize(caller: &Caller, volume: &VolumeId, needed: Needed) -> Result<(), Error> {
    let storage = format!("/storage/{}", volume.storage);
    let storage_has = caller.privileges(&storage);
    let guest = volume.name.owner().map(|guest| format!("/vms/{guest}"));
    let allowed = match &guest {
        _ if storage_has.contains(Privilege::DatastoreAllocate) => true,
        Some(guest) => {
            let guest_has = caller.privileges(guest);
            guest_has.contains(needed.of_guest)
                && !storage_has.intersection(needed.of_storage).is_empty()
        }
        None => !storage_has.intersection(needed.of_file).is_empty(),
    };
    match allowed {
        true => Ok(()),
        false => {
            let path = guest.unwrap_or(storage);
            Err(Error::Denied(format!(
                "Permission check failed ({path}, {})",
                needed.of_guest
            )))
        }
    }
}

/// What it takes to do something with a volume.
#[derive(Clone, Copy)]
pub struct Needed {
    /// On the guest that owns it.
    of_guest: Privilege,
    /// On the storage, when a guest owns it: one of these.
    of_storage: PrivilegeSet,
    /// On the storage, when nobody owns it: one of these.
    of_file: PrivilegeSet,
}

/// To see a volume.
pub const TO_SEE: Needed = Needed {
    of_guest: Privilege::VmAudit,
    of_storage: PrivilegeSet::of(&[Privilege::DatastoreAudit, Privilege::DatastoreAllocateSpace]),
    of_file: PrivilegeSet::of(&[Privilege::DatastoreAudit, Privilege::DatastoreAllocateSpace]),
};

const TO_REMOVE: Needed = Needed {
    of_guest: Privilege::VmConfigDisk,
    of_storage: PrivilegeSet::of(&[Privilege::DatastoreAllocateSpace]),
    of_file: PrivilegeSet::of(&[Privilege::DatastoreAllocateTemplate]),
};

fn row(storage: &StorageName, volume: &Volume) -> Value {
    let id = VolumeId {
        storage: storage.clone(),
        name: volume.name.clone(),
    };
    object([
        ("volid", Some(json!(id.to_string()))),
        ("content", Some(json!(volume.name.content().as_str()))),
        ("format", Some(json!(volume.name.format()))),
        ("size", Some(json!(volume.size_bytes))),
        ("used", Some(json!(volume.used_bytes))),
        ("ctime", Some(json!(volume.changed_at))),
        (
            "vmid",
            volume.name.owner().map(|guest| json!(u32::from(guest))),
        ),
    ])
}

async fn list(call: Call) -> Result<Answer, Refusal> {
    let name = storage_name(&call)?;
    let node = &call.daemon.node;
    let volumes = node.storage().open(&name)?.list().await?;
    let content = call.values.text("content");
    let guest: Option<GuestId> = call.values.number("vmid");
    let rows = volumes.iter().filter(|volume| {
        let id = VolumeId {
            storage: name.clone(),
            name: volume.name.clone(),
        };
        // A disk's name does not tell whether a VM or a container has it.
        let is_content = content.is_none_or(|content| {
            let own = volume.name.content();
            own.as_str() == content || (own == Content::Images && content == "rootdir")
        });
        is_content
            && guest.is_none_or(|guest| volume.name.owner() == Some(guest))
            && authorize(call.caller(), &id, TO_SEE).is_ok()
    });
    Ok(Answer::Data(
        rows.map(|volume| row(&name, volume)).collect(),
    ))
}

async fn allocate(call: Call) -> Result<Answer, Refusal> {
    let name = storage_name(&call)?;
    let guest: GuestId = call
        .values
        .number("vmid")
        .expect("vmid is required and checked");
    let text = call.values.required("size");
    let kibibytes = text
        .parse::<u64>()
        .ok()
        .and_then(|size| size.checked_mul(1024));
    let size = kibibytes
        .or_else(|| parse_size(text))
        .filter(|size| *size > 0);
    let size = size.ok_or_else(|| Error::invalid("size", format!("'{text}' is not a size")))?;
    let storage = call
        .daemon
        .node
        .storage()
        .open_for(&name, Content::Images)?;
    let ending = call.values.required("filename").rsplit_once('.');
    let format = call.values.text("format").or(ending.map(|(_, end)| end));
    let format = format.and_then(parse_format).unwrap_or(Format::Raw);
    let volume = storage.allocate(guest, size, format).await?;
    Ok(Answer::Data(json!(
        VolumeId {
            storage: name,
            name: volume
        }
        .to_string()
    )))
}

async fn show(call: Call) -> Result<Answer, Refusal> {
    let id = volume(&call)?;
    let node = &call.daemon.node;
    authorize(call.caller(), &id, TO_SEE)?;
    let path = node.storage().path(&id).await?;
    let size = node.storage().size_bytes(&id).await?;
    let used = tokio::fs::metadata(&path).await.map_or(0, |metadata| {
        use std::os::unix::fs::MetadataExt as _;
        // st_blocks counts units of 512 bytes, whatever the file system's own are. stat(2).
        metadata.blocks() * 512
    });
    Ok(Answer::Data(json!({
        "path": path, "format": id.name.format(), "size": size, "used": used,
    })))
}

async fn remove(call: Call) -> Result<Answer, Refusal> {
    let id = volume(&call)?;
    let node = call.daemon.node.clone();
    authorize(call.caller(), &id, TO_REMOVE)?;
    if let Some(guest) = id.name.owner()
        && is_used(&node, guest, &id)?
    {
        let text =
            format!("cannot remove '{id}': guest {guest} uses it; take it out of its config first");
        return Err(Error::refused(text).into());
    }
    // It must be there, so that a wrong name is told at once.
    drop(node.storage().path(&id).await?);
    let new = NewTask::new(
        "imgdel",
        format!("{}@{}", id.name, id.storage),
        call.caller().identity(),
    );
    let upid = call
        .daemon
        .node
        .tasks()
        .spawn(new, async move |task: TaskContext| {
            node.storage().open(&id.storage)?.free(&id.name).await?;
            task.log(&format!("removed volume '{id}'"));
            Ok(())
        })?;
    Ok(Answer::Data(json!(upid.to_string())))
}

/// Whether the config of the guest that owns a volume names it.
fn is_used(node: &Node, guest: GuestId, volume: &VolumeId) -> Result<bool, Error> {
    let Some((name, kind)) = stored::find(node.store().as_ref(), guest)? else {
        return Ok(false);
    };
    let config = stored::load(node.store().as_ref(), &name, kind, guest)?.config;
    let volume = volume.to_string();
    let values = config.current.values.iter().chain(&config.pending.values);
    // A disk that was taken out of the guest is kept as `unused[n]`: that one may go.
    let mut disks = values.filter(|(key, _)| !key.starts_with("unused"));
    Ok(disks.any(|(_, value)| {
        value
            .split(',')
            .any(|item| item.trim_start_matches("file=") == volume)
    }))
}

fn checksum(algorithm: Option<&str>, digest: Option<&str>) -> Result<Option<Checksum>, Error> {
    match (algorithm, digest) {
        (Some(algorithm), Some(digest)) => Ok(Some(Checksum::new(algorithm, digest)?)),
        (None, None) => Ok(None),
        (None, Some(_)) => Err(Error::invalid(
            "checksum-algorithm",
            "is needed for the checksum",
        )),
        (Some(_), None) => Err(Error::invalid(
            "checksum",
            "is needed for the checksum-algorithm",
        )),
    }
}

fn file_name(content: &str, name: &str) -> Result<(Content, VolumeName), Error> {
    let wrong = |text: String| Error::invalid("filename", text);
    let content: Content = content
        .parse()
        .map_err(|_| Error::invalid("content", "unknown content"))?;
    let volume = VolumeName::file(content, name).map_err(|error| wrong(error.to_string()))?;
    Ok((content, volume))
}

/// Streams the file to the storage while it arrives, and gives it its name in a task.
async fn upload(call: Call) -> Result<Answer, Refusal> {
    let storage = storage_name(&call)?;
    let Call {
        daemon,
        caller,
        mut request,
        ..
    } = call;
    // The file goes to the storage as it arrives; only the disk limits it.
    DefaultBodyLimit::disable().apply(&mut request);
    let caller = caller.expect("an upload needs a privilege");
    let bad = |error: &dyn std::fmt::Display| {
        Refusal::new(StatusCode::BAD_REQUEST, format!("not an upload: {error}"))
    };
    let mut form = Multipart::from_request(request, &())
        .await
        .map_err(|error| bad(&error))?;
    let mut sent = std::collections::BTreeMap::new();
    while let Some(field) = form.next_field().await.map_err(|error| bad(&error))? {
        let name = field.name().unwrap_or_default().to_owned();
        if name != "filename" {
            let value = small(field).await.map_err(|error| bad(&error))?;
            sent.insert(name, value);
            continue;
        }
        let file = field.file_name().unwrap_or_default().to_owned();
        let said = |name: &str| sent.get(name).map(String::as_str);
        let content = said("content");
        let content =
            content.ok_or_else(|| Error::invalid("content", atoll_manager::schema::MISSING))?;
        FILE_CONTENT
            .check("content", content)
            .map_err(|text| Error::invalid("content", text))?;
        let checksum = checksum(said("checksum-algorithm"), said("checksum"))?;
        let (content, volume) = file_name(content, &file)?;
        let target = daemon.node.storage().open_for(&storage, content)?;
        let incoming = target.receive(&volume).await?;
        let size = receive(field, &incoming).await?;
        let new = NewTask::new("imgcopy", "", caller.identity());
        let upid = daemon
            .node
            .tasks()
            .spawn(new, async move |task: TaskContext| {
                task.log(&format!("received '{file}', {size} bytes"));
                let path = incoming
                    .commit(checksum.as_ref(), Existing::Replace)
                    .await?;
                task.log(&format!("finished file import: {}", path.display()));
                Ok(())
            })?;
        return Ok(Answer::Data(json!(upid.to_string())));
    }
    Err(Error::invalid("filename", atoll_manager::schema::MISSING).into())
}

/// The text of a field that is not the file.
async fn small(mut field: Field<'_>) -> Result<String, String> {
    let mut bytes = Vec::new();
    while let Some(chunk) = field.chunk().await.map_err(|error| error.to_string())? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > FIELD_BYTES_MAX {
            return Err("a field before the file is too long".to_owned());
        }
    }
    String::from_utf8(bytes).map_err(|error| error.to_string())
}

async fn receive(mut field: Field<'_>, incoming: &Incoming) -> Result<u64, Error> {
    let write = |error| Error::failed(format!("cannot write {}", incoming.path().display()), error);
    let mut options = tokio::fs::File::options();
    let mut file = options
        .write(true)
        .open(incoming.path())
        .await
        .map_err(write)?;
    let mut size = 0;
    while let Some(chunk) = field
        .chunk()
        .await
        .map_err(|error| Error::failed("the upload broke off", error))?
    {
        size += chunk.len() as u64;
        file.write_all(&chunk).await.map_err(write)?;
    }
    file.flush().await.map_err(write)?;
    Ok(size)
}

async fn download(call: Call) -> Result<Answer, Refusal> {
    let name = storage_name(&call)?;
    let values = &call.values;
    let (content, volume) = file_name(values.required("content"), values.required("filename"))?;
    let checksum = checksum(values.text("checksum-algorithm"), values.text("checksum"))?;
    let storage = call.daemon.node.storage().open_for(&name, content)?;
    let download = Download {
        url: values.required("url").to_owned(),
        checksum,
        limits: Limits {
            size_bytes_max: storage.space().await?.available_bytes,
            verify_certificates: values.flag_if_given("verify-certificates").unwrap_or(true),
            waits: fetch::WAITS,
        },
        storage,
        volume,
    };
    let file = values.required("filename");
    let upid = start(&call, file, download)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

/// Downloads in a task.
pub fn start(call: &Call, file: &str, download: Download) -> Result<Upid, Error> {
    let new = NewTask::new("download", file, call.caller().identity());
    let work = async move |task: TaskContext| download.run(&task).await;
    call.daemon.node.tasks().spawn(new, work)
}
