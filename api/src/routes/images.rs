// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! OCI images from registries: what tags there are, and pulling one into a storage, where it is a template like others.

use atoll_manager::access::{Check, Privilege};
use atoll_manager::error::Error;
use atoll_manager::oci::registry;
use atoll_manager::schema::Param;
use atoll_manager::storage::incoming::Existing;
use atoll_manager::storage::name::{Content, VolumeName};
use atoll_manager::task::{NewTask, TaskContext};
use serde_json::json;

use super::parameters::text;
use super::serve;
use super::volumes::storage_name;
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
    let volume = VolumeName::file(Content::Vztmpl, &name)
        .map_err(|_| Error::invalid("filename", format!("'{name}' is no name of a file")))?;
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

async fn update(call: Call) -> Result<Answer, Refusal> {
    let (id, user) = (super::guests::id(&call), call.caller().identity());
    let template = call.values.required("ostemplate");
    let guests = call.daemon.node.guests();
    let upid = guests.update_image(id, template, user)?;
    Ok(Answer::Data(json!(upid.to_string())))
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
