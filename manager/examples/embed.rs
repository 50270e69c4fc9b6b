// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Embeds the manager: opens a node in a scratch directory, changes a guest's config in the store, and runs a task
//! of two steps whose second one fails, to show the undo. `cargo run -p atoll-manager --example embed`
#![expect(clippy::print_stdout, reason = "an example shows what it does")]

use std::collections::BTreeSet;
use std::path::PathBuf;

use atoll_manager::error::Error;
use atoll_manager::guest::config::Reach;
use atoll_manager::guest::{ConfigUpdate, GuestConfig, stored};
use atoll_manager::id::GuestKind;
use atoll_manager::task::{NewTask, TaskContext, TaskStep};
use atoll_manager::{Node, Settings, step};

/// What the steps hand on to each other.
struct Export {
    file: PathBuf,
}

const EXPORT: &[TaskStep<Export>] = &[
    step!("write the file", write, undo remove),
    step!("send it", send),
];

async fn write(export: &mut Export, task: &TaskContext) -> Result<(), Error> {
    task.log(&format!("writing {}", export.file.display()));
    std::fs::write(&export.file, "all of it").map_err(|e| Error::failed("write the file", e))
}

async fn remove(export: &mut Export, task: &TaskContext) -> Result<(), Error> {
    task.log("removing what was written");
    match std::fs::remove_file(&export.file) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(Error::failed("remove the file", error))
        }
        _ => Ok(()),
    }
}

async fn send(_: &mut Export, _: &TaskContext) -> Result<(), Error> {
    Err(Error::refused("nobody is listening"))
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let state = std::env::temp_dir().join(format!("atoll-embed-{}", std::process::id()));
    let node = Node::open(Settings::new("example", &state)).await?;

    let id = node.cluster().next_id()?;
    stored::create(
        node.store(),
        node.name(),
        id,
        &GuestConfig::new(GuestKind::Vm),
    )
    .await?;
    let mut guest = stored::load(node.store().as_ref(), node.name(), GuestKind::Vm, id)?;
    let set = [
        ("name", "web"),
        ("cores", "4"),
        ("net0", "virtio,bridge=vmbr0"),
    ];
    let set = set
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
    let none = BTreeSet::new;
    let update = ConfigUpdate::new(GuestKind::Vm, set, none(), none(), None)?;
    guest.config.apply(&update, Reach::Everything)?;
    guest.save(node.store()).await?;
    println!("guest {id}:\n{}", guest.config.print());

    let export = Export {
        file: state.join("export"),
    };
    let new = NewTask::new("export", id, "root@pam");
    let upid = node.tasks().spawn_steps(new, EXPORT, export)?;
    println!("{upid}\nended as: {}", node.tasks().wait(&upid).await?);
    for (number, line) in node.tasks().log(&upid, 0, 0)?.lines {
        println!("{number} {line}");
    }
    drop(node);
    std::fs::remove_dir_all(&state)?;
    Ok(())
}
