// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! OCI images from registries: what tags there are, and pulling one into a storage, where it is a template like others;
//! and writing one to an archive that other programs read.

use atoll_manager::access::{Check, Privilege};
use atoll_manager::error::Error;
use atoll_manager::guest::container::export::{Export, From};
use atoll_manager::id::GuestId;
use atoll_manager::oci::export::Form;
use atoll_manager::oci::registry;
use atoll_manager::schema::{Kind, Param, format};
use atoll_manager::storage::incoming::Existing;
use atoll_manager::storage::name::{Content, VolumeId, VolumeName};
use atoll_manager::task::{NewTask, TaskContext};
use serde_json::json;

use super::parameters::text;
use super::serve;
use super::storage::storage_name;
use super::volumes::{TO_SEE, authorize};
use crate::answer::{Answer, Refusal};
use crate::route::{Call, Returns, Route};

const ACCESSES_NETWORK: Check = Check::All {
    path: "/nodes/{node}",
    privileges: &[Privilege::SysAccessNetwork],
};

const REFERENCE: Param = Param::new(
    "reference",
    text(512),
    "The image: registry/repository:tag, or @sha256:… for a digest. Without a registry it is Docker's.",
)
.required();

pub const ROUTES: &[Route] = &[
    Route::get(
        "/nodes/{node}/query-oci-repo-tags",
        "List the tags of a repository of images.",
        serve!(tags),
    )
    .params(&[REFERENCE])
    .returns(Returns::Texts)
    .check(ACCESSES_NETWORK),
    Route::post(
        "/nodes/{node}/storage/{storage}/oci-registry-pull",
        "Pull an image from a registry into a storage, as a container template.",
        serve!(pull),
    )
    .params(&[
        REFERENCE,
        Param::new(
            "filename",
            text(200),
            "Name to give the file; the image's own when it is not given. It ends in .tar.",
        ),
    ])
    .returns(Returns::Upid)
    .check(Check::And(&[
        Check::All {
            path: "/storage/{storage}",
            privileges: &[Privilege::DatastoreAllocateTemplate],
        },
        ACCESSES_NETWORK,
    ])),
    Route::post(
        "/nodes/{node}/storage/{storage}/oci-export",
        "Write an image to an archive in a storage: the one in another archive, or the one of a container.",
        serve!(export),
    )
    .params(&[
        Param::new("volume", text(512), "The image's archive: STORAGE:vztmpl/NAME.tar."),
        Param::new(
            "vmid",
            Kind::NumberFormat(format::VMID),
            "A container of this node, whose image it is. What the container has changed is not part of it.",
        ),
        Param::new(
            "format",
            Kind::Choice(&["oci", "docker"]),
            "Kind of the new archive: an OCI image layout, or what docker load reads.",
        )
        .default("oci"),
        Param::new(
            "filename",
            text(200),
            "Name to give the file. It ends in .tar.",
        )
        .required(),
    ])
    .returns(Returns::Upid)
    .check(Check::All {
        path: "/storage/{storage}",
        privileges: &[Privilege::DatastoreAllocateTemplate],
    })
    .own(),
    Route::post(
        "/nodes/{node}/lxc/{vmid}/image",
        "Give a container another image, keeping its mount points: a snapshot is taken first, and when the container does \
         not work afterwards, it is taken back to it.",
        serve!(update),
    )
    .params(&[Param::new(
        "ostemplate",
        text(512),
        "The image: STORAGE:vztmpl/NAME.tar.",
    )
    .required()])
    .returns(Returns::Upid)
    .check(Check::All {
        path: "/vms/{vmid}",
        privileges: &[Privilege::VmAllocate, Privilege::VmSnapshot],
    })
    .own(),
];

async fn tags(call: Call) -> Result<Answer, Refusal> {
    let reference = registry::reference(call.values.required("reference"))?;
    Ok(Answer::Data(json!(registry::tags(&reference).await?)))
}

async fn pull(call: Call) -> Result<Answer, Refusal> {
    let text = call.values.required("reference");
    let reference = registry::reference(text)?;
    let name = file_name(call.values.text("filename").unwrap_or(text));
    let volume = archive(&name)?;
    let storage = call.daemon.node.storage();
    let storage = storage.open_for(&storage_name(&call)?, Content::Vztmpl)?;
    let bytes_max = storage.space().await?.available_bytes;
    let new = NewTask::new("ociregistrypull", name, call.caller().identity());
    let tasks = call.daemon.node.tasks();
    let upid = tasks.spawn(new, async move |task: TaskContext| {
        let incoming = storage.receive(&volume).await?;
        let log = |line: &str| task.log(line);
        let pulled = registry::pull(&reference, incoming.path(), bytes_max, &log);
        task.until_cancelled(pulled).await?;
        let path = incoming.commit(None, Existing::Refuse).await?;
        task.log(&format!("pulled to {}", path.display()));
        Ok(())
    })?;
    Ok(Answer::Data(json!(upid.to_string())))
}

async fn export(call: Call) -> Result<Answer, Refusal> {
    let guest: Option<GuestId> = call.values.number("vmid");
    let from = match (call.values.text("volume"), guest) {
        (Some(text), None) => {
            let volume: VolumeId = text.parse().map_err(|_| {
                Error::invalid("volume", format!("unable to parse volume ID '{text}'"))
            })?;
            authorize(call.caller(), &volume, TO_SEE)?;
            From::Archive(volume)
        }
        // Of the guest itself it gives away no more than its config does.
        (None, Some(id)) if call.caller().has(&format!("/vms/{id}"), Privilege::VmAudit) => {
            From::Container(id)
        }
        (None, Some(id)) => {
            let text = format!(
                "Permission check failed (/vms/{id}, {})",
                Privilege::VmAudit
            );
            return Err(Error::Denied(text).into());
        }
        _ => return Err(Error::invalid("volume", "either volume or vmid is needed").into()),
    };
    let form = match call.values.text("format") {
        Some("docker") => Form::Docker,
        _ => Form::Oci,
    };
    let to = VolumeId {
        storage: storage_name(&call)?,
        name: archive(&file_name(call.values.required("filename")))?,
    };
    // A storage that takes no templates is told at once.
    let storage = call.daemon.node.storage();
    storage.open_for(&to.storage, Content::Vztmpl)?;
    let export = Export { from, form, to };
    let user = call.caller().identity();
    let upid = call.daemon.node.guests().export_image(export, user)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

async fn update(call: Call) -> Result<Answer, Refusal> {
    let (id, user) = (super::guests::id(&call), call.caller().identity());
    let template = call.values.required("ostemplate");
    let guests = call.daemon.node.guests();
    let upid = guests.update_image(id, template, user)?;
    Ok(Answer::Data(json!(upid.to_string())))
}

/// The volume of an archive.
fn archive(name: &str) -> Result<VolumeName, Error> {
    VolumeName::file(Content::Vztmpl, name)
        .map_err(|_| Error::invalid("filename", format!("'{name}' is no name of a file")))
}

/// A file's name for an image: the last part of its own, with what a file's name cannot have replaced.
fn file_name(text: &str) -> String {
    let last = text.rsplit('/').next().unwrap_or_default();
    let last = last.strip_suffix(".tar").unwrap_or(last);
    let fits = |c: char| c.is_ascii_alphanumeric() || "._-+".contains(c);
    let name: String = last
        .chars()
        .map(|c| if fits(c) { c } else { '_' })
        .collect();
    format!("{name}.tar")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_files() {
        assert_eq!(
            file_name("docker.io/library/alpine:3.20"),
            "alpine_3.20.tar"
        );
        assert_eq!(file_name("mine.tar"), "mine.tar");
        assert_eq!(file_name("x/../y@sha256:ab"), "y_sha256_ab.tar");
    }
}
