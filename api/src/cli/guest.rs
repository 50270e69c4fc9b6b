// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll vm` and `atoll ct`: guests by their number alone, wherever in the cluster they are; and `atoll node`.

use clap::Subcommand;
use serde_json::{Value, json};

use super::client::Client;
use super::output::Output;
use super::path::{self, Args as PathArgs};
use super::task::{self, NO_PARAMS};
use super::{CliError, console, show, volumes};
use crate::route::Method;

/// Which kind of guest a command is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Virtual machines.
    Vm,
    /// Containers.
    Container,
}

impl Kind {
    /// Its name in the API's paths.
    fn name(self) -> &'static str {
        match self {
            Self::Vm => "qemu",
            Self::Container => "lxc",
        }
    }
}

/// What can be done with a guest.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the guests.
    List,
    /// Create a guest: ID, then the keys of its config as `--key value`.
    Create {
        /// Node to create it on; the one that answers when not given.
        #[arg(long)]
        node: Option<String>,
        /// Its number, 100 or more, and its config.
        #[command(flatten)]
        rest: Numbered,
    },
    /// Start a guest.
    Start(Target),
    /// Ask a guest to shut down.
    Shutdown(Target),
    /// Stop a guest at once, as if its plug were pulled.
    Stop(Target),
    /// Shut a guest down and start it again.
    Reboot(Target),
    /// Halt a guest where it is.
    Suspend {
        /// The guest.
        #[command(flatten)]
        target: Target,
        /// Write the memory of a virtual machine to a volume and end it; its next start goes on from there.
        #[arg(long)]
        to_disk: bool,
    },
    /// Let a suspended guest go on.
    Resume(Target),
    /// Remove a guest and its volumes.
    Delete(Target),
    /// Show how a guest is.
    Status {
        /// Number of the guest.
        id: u32,
    },
    /// Show a guest's config, or change it by `--key value`.
    Config(Numbered),
    /// Use a guest's console; Ctrl-] ends it.
    Console {
        /// Number of the guest.
        id: u32,
    },
    #[command(flatten)]
    Volumes(volumes::Command),
    /// Make a template of a guest, for good: it is not started again, only cloned.
    Template(Target),
}

/// A guest and whether to wait.
#[derive(Debug, clap::Args)]
pub struct Target {
    /// Number of the guest.
    id: u32,
    /// Print the task's UPID instead of following it to its end.
    #[arg(long)]
    no_wait: bool,
}

/// A guest and keys of its config.
#[derive(Debug, clap::Args)]
pub struct Numbered {
    /// Number of the guest.
    id: u32,
    /// Keys of its config, as `--key value`.
    #[arg(
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_name = "--KEY VALUE"
    )]
    rest: Vec<String>,
}

/// Runs `atoll vm …` or `atoll ct …`.
pub async fn run(
    client: &Client,
    kind: Kind,
    command: Command,
    output: Output,
) -> Result<(), CliError> {
    let act_with = |target: Target, method, below: &'static str, params| async move {
        let params: &[(&str, &str)] = params;
        let path = format!("{}{below}", guest_path(client, kind, target.id).await?);
        let data = client.call(method, &path, params).await?;
        match task::of(&data) {
            Some(upid) if !target.no_wait => task::follow(client, upid).await,
            _ => show(&data, output),
        }
    };
    let act = |target, method, below| act_with(target, method, below, &[]);
    match command {
        Command::List => show(&list(client, kind).await?, output),
        Command::Create { node, rest } => {
            let node = match node {
                Some(node) => node,
                None => local_node(client).await?,
            };
            let mut words = vec![
                "--vmid".to_owned(),
                rest.id.to_string(),
                "--wait".to_owned(),
            ];
            words.extend(rest.rest);
            let path = format!("/nodes/{node}/{}", kind.name());
            by_path(client, Method::Post, path, words, output).await
        }
        Command::Start(target) => act(target, Method::Post, "/status/start").await,
        Command::Shutdown(target) => act(target, Method::Post, "/status/shutdown").await,
        Command::Stop(target) => act(target, Method::Post, "/status/stop").await,
        Command::Reboot(target) => act(target, Method::Post, "/status/reboot").await,
        Command::Suspend { target, to_disk } => {
            let params: &[_] = if to_disk { &[("todisk", "1")] } else { &[] };
            act_with(target, Method::Post, "/status/suspend", params).await
        }
        Command::Resume(target) => act(target, Method::Post, "/status/resume").await,
        Command::Delete(target) => act(target, Method::Delete, "").await,
        Command::Status { id } => {
            let path = format!("{}/status/current", guest_path(client, kind, id).await?);
            show(&client.call(Method::Get, &path, NO_PARAMS).await?, output)
        }
        Command::Config(Numbered { id, rest }) => {
            let path = format!("{}/config", guest_path(client, kind, id).await?);
            let method = if rest.is_empty() {
                Method::Get
            } else {
                Method::Put
            };
            by_path(client, method, path, rest, output).await
        }
        Command::Console { id } => console::run(client, &guest_path(client, kind, id).await?).await,
        Command::Volumes(command) => volumes::run(client, kind, command, output).await,
        Command::Template(target) => act(target, Method::Post, "/template").await,
    }
}

/// Makes a request of the words that a user types after a path.
pub(super) async fn by_path(
    client: &Client,
    method: Method,
    path: String,
    rest: Vec<String>,
    output: Output,
) -> Result<(), CliError> {
    path::parse(PathArgs::new(path, rest), output)?
        .run(client, method)
        .await
}

async fn list(client: &Client, kind: Kind) -> Result<Value, CliError> {
    let all = client
        .call(Method::Get, "/cluster/resources", &[("type", "vm")])
        .await?;
    let rows = all.as_array().into_iter().flatten();
    let ours = rows.filter(|row| row["type"] == kind.name()).map(|row| {
        json!({
            "vmid": row["vmid"], "name": row["name"], "status": row["status"], "node": row["node"],
            "maxcpu": row["maxcpu"], "maxmem": row["maxmem"], "maxdisk": row["maxdisk"], "uptime": row["uptime"],
        })
    });
    Ok(ours.collect())
}

/// The API path of a guest.
pub(super) async fn guest_path(client: &Client, kind: Kind, id: u32) -> Result<String, CliError> {
    let all = list(client, kind).await?;
    let mut rows = all.as_array().into_iter().flatten();
    let node = rows
        .find(|row| row["vmid"] == id)
        .and_then(|row| row["node"].as_str());
    let what = match kind {
        Kind::Vm => "VM",
        Kind::Container => "container",
    };
    let node = node.ok_or_else(|| CliError::Local(format!("there is no {what} {id}")))?;
    Ok(format!("/nodes/{node}/{}/{id}", kind.name()))
}

/// The node that answers.
async fn local_node(client: &Client) -> Result<String, CliError> {
    let rows = client
        .call(Method::Get, "/cluster/status", NO_PARAMS)
        .await?;
    let mut rows = rows.as_array().into_iter().flatten();
    let local = rows
        .find(|row| row["local"] == 1)
        .and_then(|row| row["name"].as_str());
    let missing =
        || CliError::Local("no node says that it is the local one: give --node".to_owned());
    local.map(str::to_owned).ok_or_else(missing)
}

/// What can be done with a node.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the nodes.
    List,
    /// Show how a node is.
    Status {
        /// Its name; the one that answers when not given.
        node: Option<String>,
    },
    /// Start the guests of a node that have onboot, in the order of their key `startup`.
    StartAll {
        /// Its name; the one that answers when not given.
        node: Option<String>,
        /// Follow the task to its end.
        #[arg(long)]
        wait: bool,
    },
    /// Shut down all guests of a node, the last to start first, and stop those that take too long.
    StopAll {
        /// Its name; the one that answers when not given.
        node: Option<String>,
        /// Follow the task to its end.
        #[arg(long)]
        wait: bool,
        /// Seconds that each guest has, unless its key `startup` says otherwise.
        #[arg(long, default_value_t = 180)]
        timeout: u16,
    },
}

/// Runs `atoll node …`.
pub async fn run_node(
    client: &Client,
    command: NodeCommand,
    output: Output,
) -> Result<(), CliError> {
    let named = |node: Option<String>| async {
        match node {
            Some(node) => Ok(node),
            None => local_node(client).await,
        }
    };
    match command {
        NodeCommand::List => show(
            &client.call(Method::Get, "/nodes", NO_PARAMS).await?,
            output,
        ),
        NodeCommand::Status { node } => {
            let path = format!("/nodes/{}/status", named(node).await?);
            show(&client.call(Method::Get, &path, NO_PARAMS).await?, output)
        }
        NodeCommand::StartAll { node, wait } => {
            all(client, &named(node).await?, "startall", &[], wait, output).await
        }
        NodeCommand::StopAll {
            node,
            wait,
            timeout,
        } => {
            let timeout = [("timeout", timeout.to_string())];
            all(
                client,
                &named(node).await?,
                "stopall",
                &timeout,
                wait,
                output,
            )
            .await
        }
    }
}

/// A task over all guests of a node.
async fn all(
    client: &Client,
    node: &str,
    what: &str,
    params: &[(&str, String)],
    wait: bool,
    output: Output,
) -> Result<(), CliError> {
    let path = format!("/nodes/{node}/{what}");
    let data = client.call(Method::Post, &path, params).await?;
    match task::of(&data) {
        Some(upid) if wait => task::follow(client, upid).await,
        _ => show(&data, output),
    }
}
