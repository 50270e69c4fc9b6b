// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A guest's hook script (key `hookscript`): a snippet that the host runs as root around a start and a stop, with the
//! guest's number and the moment as its arguments, as PVE does.

use std::os::unix::fs::PermissionsExt as _;
use std::time::Duration;

use crate::error::Error;
use crate::exec::Program;
use crate::guest::config::GuestConfig;
use crate::guest::site::Seat;
use crate::storage::name::{Content, VolumeId};
use crate::task::TaskContext;

/// Before anything of a start. A failure ends the start.
pub const PRE_START: &str = "pre-start";
/// When the guest runs.
pub const POST_START: &str = "post-start";
/// Before it is asked or made to end.
pub const PRE_STOP: &str = "pre-stop";
/// When it has ended, by itself or not, before what it used is given back.
pub const POST_STOP: &str = "post-stop";

/// Longest run of a script.
const SCRIPT_MAX: Duration = Duration::from_secs(600);

/// Runs the script of one moment, if the guest has one; what it writes goes to the task's log.
pub async fn demand(
    seat: &Seat,
    config: &GuestConfig,
    moment: &str,
    task: &TaskContext,
) -> Result<(), Error> {
    let output = call(seat, config, moment).await?;
    output.lines().for_each(|line| task.log(line));
    Ok(())
}

/// The same where nothing can be refused any more: a failure is a warning.
pub async fn run(seat: &Seat, config: &GuestConfig, moment: &str, task: &TaskContext) {
    if let Err(error) = demand(seat, config, moment, task).await {
        task.warn(&format!("hook script, {moment}: {}", error.chain()));
    }
}

/// The same outside of a task.
pub async fn run_quietly(seat: &Seat, moment: &str) {
    let Ok(config) = seat.config() else { return };
    if let Err(error) = call(seat, &config, moment).await {
        tracing::warn!(
            guest = seat.title(),
            moment,
            error = error.chain(),
            "hook script"
        );
    }
}

async fn call(seat: &Seat, config: &GuestConfig, moment: &str) -> Result<String, Error> {
    let Some(volume) = config.get("hookscript") else {
        return Ok(String::new());
    };
    let wrong = |text: String| Error::refused(format!("hookscript: {volume}: {text}"));
    let id: VolumeId = volume.parse().map_err(|e| wrong(format!("{e}")))?;
    if id.name.content() != Content::Snippets {
        return Err(wrong("is no snippet".to_owned()));
    }
    let path = seat.site.storage.path(&id).await?;
    let metadata = tokio::fs::metadata(&path).await;
    let metadata = metadata.map_err(|e| Error::failed(format!("read {}", path.display()), e))?;
    if metadata.permissions().mode() & 0o100 == 0 {
        return Err(wrong("is not executable".to_owned()));
    }
    let script = Program::new(&path).arg(seat.id.to_string()).arg(moment);
    Ok(script.deadline(SCRIPT_MAX).run().await?)
}
