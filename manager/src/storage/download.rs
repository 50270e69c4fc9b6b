// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The work of a task that downloads one file into a storage: it appears under its name when it is whole and its
//! checksum right. Nothing of a wrong one stays; the next task goes on with one that is not whole.

use std::sync::Arc;

use crate::error::Error;
use crate::storage::Storage;
use crate::storage::checksum::Checksum;
use crate::storage::fetch::{self, Limits};
use crate::storage::incoming::Existing;
use crate::storage::name::VolumeName;
use crate::task::TaskContext;

/// What to download, and where to.
pub struct Download {
    /// Where the file is.
    pub url: String,
    /// What its digest must be, when known.
    pub checksum: Option<Checksum>,
    /// What it may take.
    pub limits: Limits,
    /// Where it goes.
    pub storage: Arc<dyn Storage>,
    /// Under which name.
    pub volume: VolumeName,
}

impl Download {
    /// Downloads the file, unless the very file is there already. Another one of that name is never replaced.
    pub async fn run(self, task: &TaskContext) -> Result<(), Error> {
        if let Ok(existing) = self.storage.path(&self.volume).await {
            let refusal = format!(
                "refusing to override existing file '{}'",
                existing.display()
            );
            let Some(checksum) = &self.checksum else {
                return Err(Error::Refused(refusal));
            };
            return match task.until_cancelled(checksum.verify(&existing)).await {
                Ok(()) => {
                    task.log("the file is there already, with the right checksum");
                    Ok(())
                }
                Err(Error::Refused(reason)) => Err(Error::Refused(format!("{refusal}: {reason}"))),
                Err(error) => Err(error),
            };
        }
        let incoming = self.storage.receive_rest(&self.volume).await?;
        let log = |line: &str| task.log(line);
        let fetched = task.until_cancelled(fetch::fetch(&self.url, &incoming, self.limits, &log));
        if let Err(error) = fetched.await {
            if incoming.mark().is_some() {
                task.log(
                    "what has come of it is kept for a week, and the next download goes on there",
                );
            }
            return Err(error);
        }
        let path = incoming
            .commit(self.checksum.as_ref(), Existing::Refuse)
            .await?;
        task.log(&format!("download finished: {}", path.display()));
        Ok(())
    }
}
