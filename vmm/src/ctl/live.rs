// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `ctl snapshot --live true`: what the machine needs for it, and the wait until it is whole.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::Context;
use atoll_vmm_protocol::api::{Request, SavingInfo, SavingStage, SnapshotTaken};
use atoll_vmm_protocol::client::Client;

use super::POLL;
use crate::memory::{USERFAULTFD, open_device};
use crate::saved::MachineState;

/// What gives the machine's process, which may open nothing, a userfaultfd.
pub(super) fn device() -> anyhow::Result<File> {
    open_device().with_context(|| {
        format!("{USERFAULTFD}, which a live snapshot takes (be root, or let this user open it)")
    })
}

/// Waits until the snapshot into `to` has ended. Its state is written last: where there is one, it is whole, whatever became
/// of the machine since.
pub(super) fn wait(
    client: &Client,
    to: &str,
    state: &File,
    taken: SnapshotTaken,
) -> anyhow::Result<SnapshotTaken> {
    let is_whole = || {
        let mut bytes = vec![0; usize::try_from(state.metadata()?.len())?];
        state.read_exact_at(&mut bytes, 0)?;
        anyhow::Ok(MachineState::from_json(&bytes).is_ok())
    };
    loop {
        match client.ask::<SavingInfo>(Request::Saving) {
            Ok(info) if info.to == to => match (info.stage, info.error) {
                (SavingStage::Saving, _) => std::thread::sleep(POLL),
                (SavingStage::Completed, _) => {
                    return Ok(SnapshotTaken {
                        memory_bytes: info.memory_bytes,
                        ..taken
                    });
                }
                (_, error) => anyhow::bail!(error.unwrap_or_default()),
            },
            // Another one has begun since.
            Ok(_) if is_whole()? => return Ok(taken),
            Ok(_) => anyhow::bail!("nothing came of it, and another one was begun"),
            Err(_) if is_whole()? => return Ok(taken),
            Err(error) => {
                return Err(error).context("the machine ended before its memory was written");
            }
        }
    }
}
