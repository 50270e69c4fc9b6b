// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll task`, and following a task to its end: its log is shown as it grows.

use std::time::Duration;

use clap::Subcommand;
use serde_json::Value;

use super::client::Client;
use super::output::Output;
use super::{CliError, print, show};
use crate::route::Method;

/// How often a running task is asked for news.
const ROUND: Duration = Duration::from_millis(250);
/// Lines of a log fetched at a time.
const LINES: u64 = 500;

/// Parameters of a request that has none.
pub const NO_PARAMS: &[(&str, &str)] = &[];

#[derive(Debug, Subcommand)]
pub enum Command {
    /// List the tasks of the cluster.
    List,
    /// Show a task's log.
    Log {
        /// The task.
        upid: String,
        /// Go on until the task has ended.
        #[arg(long)]
        wait: bool,
    },
    /// Show a task's state.
    Status {
        /// The task.
        upid: String,
    },
    /// Stop a task.
    Stop {
        /// The task.
        upid: String,
    },
}

/// Runs `atoll task …`.
pub async fn run(client: &Client, command: Command, output: Output) -> Result<(), CliError> {
    match command {
        Command::List => show(
            &client
                .call(Method::Get, "/cluster/tasks", NO_PARAMS)
                .await?,
            output,
        ),
        Command::Log { upid, wait: true } => follow(client, &upid).await,
        Command::Log { upid, wait: false } => lines(client, &upid, 0).await.map(drop),
        Command::Status { upid } => {
            let path = format!("{}/status", path(&upid)?);
            show(&client.call(Method::Get, &path, NO_PARAMS).await?, output)
        }
        Command::Stop { upid } => {
            client
                .call(Method::Delete, &path(&upid)?, NO_PARAMS)
                .await?;
            Ok(())
        }
    }
}

/// The UPID that an answer is, if it is one.
pub fn of(data: &Value) -> Option<&str> {
    data.as_str().filter(|text| text.starts_with("UPID:"))
}

/// Shows a task's log until the task ends; fails when the task did.
pub async fn follow(client: &Client, upid: &str) -> Result<(), CliError> {
    let status = format!("{}/status", path(upid)?);
    let mut seen = 0;
    loop {
        // The state first: whatever is logged before the end is then in the log that follows.
        let state = client.call(Method::Get, &status, NO_PARAMS).await?;
        seen = lines(client, upid, seen).await?;
        if state["status"] == "stopped" {
            let exit = state["exitstatus"].as_str().unwrap_or("unexpected status");
            return match exit == "OK" || exit.starts_with("WARNINGS:") {
                true => Ok(()),
                false => Err(CliError::TaskFailed(exit.to_owned())),
            };
        }
        tokio::time::sleep(ROUND).await;
    }
}

/// Prints a log from line `start`; returns the line after the last.
async fn lines(client: &Client, upid: &str, mut start: u64) -> Result<u64, CliError> {
    let log = format!("{}/log", path(upid)?);
    loop {
        let params = [("start", start.to_string()), ("limit", LINES.to_string())];
        let page = client.call(Method::Get, &log, &params).await?;
        let mut count = 0;
        for row in page.as_array().into_iter().flatten() {
            let (Some(number), Some(text)) = (row["n"].as_u64(), row["t"].as_str()) else {
                continue;
            };
            // An empty log is one line that says so, in PVE and here.
            if number > start && text != "no content" {
                print(&format!("{text}\n"))?;
                count += 1;
            }
        }
        start += count;
        if count < LINES {
            return Ok(start);
        }
    }
}

fn path(upid: &str) -> Result<String, CliError> {
    let node = upid
        .strip_prefix("UPID:")
        .and_then(|rest| rest.split(':').next());
    let node = node.ok_or_else(|| CliError::Usage(format!("'{upid}' is no UPID")))?;
    Ok(format!("/nodes/{node}/tasks/{upid}"))
}
