// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What `atoll vm …` and `atoll ct …` do with a guest's volumes: snapshots, clones, growth, moves. Each is one request,
//! with the parameters that the command names and those that are passed on as typed.

use clap::Subcommand;

use super::CliError;
use super::client::Client;
use super::guest::{Kind, by_path, guest_path};
use super::output::Output;
use crate::route::Method;

/// What can be done with a guest's volumes.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Snapshots of a guest.
    #[command(subcommand)]
    Snapshot(Snapshot),
    /// Make a new guest of one, or of a template.
    ///
    /// What is made of a template is linked to its disks, unless `--full 1` copies them.
    Clone {
        /// Number of the guest, or of the template.
        id: u32,
        /// Number of the new guest.
        new_id: u32,
        #[command(flatten)]
        more: More,
    },
    /// Let a disk grow, also under a running guest.
    Resize {
        /// Number of the guest.
        id: u32,
        /// Key of its config, such as scsi0 or rootfs.
        disk: String,
        /// Its new size, such as 32G, or what is added to it, such as +8G.
        size: String,
        #[command(flatten)]
        more: More,
    },
    /// Move a disk to another storage, a virtual machine's also while it runs.
    ///
    /// The old volume stays, as `unused`, unless `--delete 1` is given.
    MoveDisk {
        /// Number of the guest.
        id: u32,
        /// Key of its config, such as scsi0 or rootfs.
        disk: String,
        /// The storage.
        storage: String,
        #[command(flatten)]
        more: More,
    },
}

/// What can be done with a guest's snapshots.
#[derive(Debug, Subcommand)]
pub enum Snapshot {
    /// List the snapshots; `current` is the guest as it is.
    List {
        /// Number of the guest.
        id: u32,
    },
    /// Take a snapshot, also of a running guest; `--vmstate 1` keeps a virtual machine's memory, too.
    Create(Named),
    /// Make a guest what it was: what came since then is lost.
    Rollback(Named),
    /// Remove a snapshot; the guest stays as it is.
    Delete(Named),
}

/// A snapshot of a guest.
#[derive(Debug, clap::Args)]
pub struct Named {
    /// Number of the guest.
    id: u32,
    /// Name of the snapshot.
    name: String,
    #[command(flatten)]
    more: More,
}

/// Parameters that are passed on as typed.
#[derive(Debug, clap::Args)]
pub struct More {
    /// What else the API knows (`atoll usage PATH`), as `--key value`.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "--KEY VALUE"
    )]
    rest: Vec<String>,
}

/// One request about a guest.
struct Request {
    method: Method,
    id: u32,
    /// Its path below the guest's.
    below: String,
    /// Parameters that the command names.
    ours: Vec<(&'static str, String)>,
    more: Vec<String>,
}

fn request(kind: Kind, command: Command) -> Request {
    let new = |method, id, below: &str, ours: Vec<_>, more: More| Request {
        method,
        id,
        below: below.to_owned(),
        ours,
        more: more.rest,
    };
    match command {
        Command::Snapshot(command) => of_snapshots(command),
        Command::Clone { id, new_id, more } => {
            let ours = vec![("--newid", new_id.to_string())];
            new(Method::Post, id, "clone", ours, more)
        }
        Command::Resize {
            id,
            disk,
            size,
            more,
        } => {
            let ours = vec![("--disk", disk), ("--size", size)];
            new(Method::Put, id, "resize", ours, more)
        }
        Command::MoveDisk {
            id,
            disk,
            storage,
            more,
        } => {
            let (below, key) = match kind {
                Kind::Vm => ("move_disk", "--disk"),
                Kind::Container => ("move_volume", "--volume"),
            };
            let ours = vec![(key, disk), ("--storage", storage)];
            new(Method::Post, id, below, ours, more)
        }
    }
}

fn of_snapshots(command: Snapshot) -> Request {
    let named = |method, named: Named, below: String| Request {
        method,
        id: named.id,
        below: format!("snapshot{below}"),
        ours: Vec::new(),
        more: named.more.rest,
    };
    match command {
        Snapshot::List { id } => Request {
            method: Method::Get,
            id,
            below: "snapshot".to_owned(),
            ours: Vec::new(),
            more: Vec::new(),
        },
        Snapshot::Create(of) => {
            let ours = vec![("--snapname", of.name.clone())];
            Request {
                ours,
                ..named(Method::Post, of, String::new())
            }
        }
        Snapshot::Rollback(of) => {
            let below = format!("/{}/rollback", of.name);
            named(Method::Post, of, below)
        }
        Snapshot::Delete(of) => {
            let below = format!("/{}", of.name);
            named(Method::Delete, of, below)
        }
    }
}

/// Runs the command; a task that it begins is followed to its end.
pub async fn run(
    client: &Client,
    kind: Kind,
    command: Command,
    output: Output,
) -> Result<(), CliError> {
    let asked = request(kind, command);
    let guest = guest_path(client, kind, asked.id).await?;
    let path = format!("{guest}/{}", asked.below);
    let ours = asked.ours.into_iter();
    let ours = ours.flat_map(|(key, value)| [key.to_owned(), value]);
    let words = ours.chain(["--wait".to_owned()]).chain(asked.more);
    by_path(client, asked.method, path, words.collect(), output).await
}
