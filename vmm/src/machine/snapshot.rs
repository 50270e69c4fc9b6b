// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The request `snapshot`: a held machine's spec, state and RAM into three files of the asker.
//!
//! ```text
//! hold ─► state (JSON) ─► memory (holes for zeroes) ─► spec.json, state.json ─► release
//! ```
//! The state's file is written last: a directory in which it is empty is no snapshot. Not here: the formats
//! (`crate::saved`), the names of the files (`crate::ctl`), the machine's disks, whose copy is the asker's affair.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use atoll_devices::virtio::Act;
use atoll_vmm_protocol::api::{Snapshot, SnapshotTaken};

use super::owner::Machine;
use super::{RunError, saved};
use crate::api::{self, Answer, Asked};
use crate::saved::image;

/// Files of a snapshot, in the order in which they come with the request.
struct Files {
    spec: File,
    state: File,
    memory: File,
}

impl Files {
    fn of(asked: &mut Asked) -> Result<Self, Answer> {
        Ok(Self {
            spec: asked.file("spec.json")?,
            state: asked.file("state.json")?,
            memory: asked.file("memory")?,
        })
    }
}

impl Machine {
    /// Holds the machine for as long as its RAM takes to be written.
    pub(super) fn snapshot(&mut self, mut asked: Asked) -> Result<Answer, RunError> {
        let files = Files::of(&mut asked);
        let body = api::body(asked.body);
        let (files, Snapshot { to }) = match files.and_then(|files| Ok((files, body?))) {
            Ok(asked) => asked,
            Err(refused) => return Ok(refused),
        };
        if let Some(text) = self.parts.obstacle(Act::Snapshot) {
            return Ok(api::refusal(409, text));
        }
        let (written, held_us) = self.while_held(|machine| {
            machine.settle_mirrors();
            machine.write_snapshot(&files)
        })?;
        Ok(match written {
            Ok(memory_bytes) => {
                tracing::info!(name = self.spec.name, to, memory_bytes, held_us, "snapshot");
                let taken = SnapshotTaken {
                    memory_bytes,
                    held_us,
                };
                api::json(200, &taken)
            }
            Err(error) => api::refusal(500, format!("snapshot to {to}: {error:#}")),
        })
    }

    fn write_snapshot(&self, files: &Files) -> anyhow::Result<u64> {
        let state = saved::save(&self.parts, &self.spec)?;
        let spec = serde_json::to_vec_pretty(&self.spec)?;
        let memory_bytes = image::write(
            &self.parts.memory,
            self.parts.touched.as_deref(),
            &files.memory,
        )?;
        let whole = |file: &File, bytes: &[u8]| -> io::Result<()> {
            file.set_len(0)?;
            file.write_all_at(bytes, 0)
        };
        whole(&files.spec, &spec)?;
        whole(&files.state, &state.to_json())?;
        Ok(memory_bytes)
    }
}
