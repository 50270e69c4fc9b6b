// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What machines can be like on this node, by `atoll-vmm`'s own word. Called by the API's listings.

use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;

use crate::error::Error;
use crate::exec::Program;

/// A model of CPU that a guest can be given.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct CpuModel {
    /// Its name.
    pub name: String,
    /// One sentence for whoever chooses.
    pub description: String,
    /// Whether this host can give it; absent where its KVM cannot be asked.
    pub fits: Option<bool>,
}

/// The models as the program last told them: it is asked again when it is another one, or when it could not ask KVM.
#[derive(Debug, Default)]
pub struct CpuModels {
    /// Held while somebody asks, so that the others wait for what he is told.
    told: tokio::sync::Mutex<Option<Told>>,
}

#[derive(Debug)]
struct Told {
    by: Identity,
    models: Arc<[CpuModel]>,
}

/// Of a program's file: an upgrade puts another file in its place, or writes to it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    device: u64,
    inode: u64,
    size_bytes: u64,
    changed: (i64, i64),
}

impl Identity {
    fn of(file: &Metadata) -> Self {
        Self {
            device: file.dev(),
            inode: file.ino(),
            size_bytes: file.size(),
            changed: (file.ctime(), file.ctime_nsec()),
        }
    }
}

impl CpuModels {
    /// All models, `host` first. `vmm` is the program; it runs at most once at a time.
    pub async fn get(&self, vmm: &Path) -> Result<Arc<[CpuModel]>, Error> {
        let mut told = self.told.lock().await;
        // Whoever cannot be looked at cannot be run either, and running it says why.
        let file = tokio::fs::metadata(vmm).await.ok();
        let by = file.as_ref().map(Identity::of);
        if let (Some(by), Some(told)) = (by, told.as_ref())
            && told.by == by
        {
            return Ok(told.models.clone());
        }
        let models: Arc<[CpuModel]> = ask(vmm).await?.into();
        let is_certain = models.iter().all(|model| model.fits.is_some());
        *told = by.filter(|_| is_certain).map(|by| Told {
            by,
            models: models.clone(),
        });
        Ok(models)
    }
}

async fn ask(vmm: &Path) -> Result<Vec<CpuModel>, Error> {
    let printed = Program::new(vmm)
        .args(["cpu-models", "--json"])
        .run()
        .await?;
    serde_json::from_str(&printed).map_err(|e| Error::failed("read the list of CPU models", e))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    /// A program that tells one model and notes that it ran.
    fn write_program(folder: &Path, name: &str, fits: &str) {
        let runs = folder.join("runs");
        let text = format!(
            "#!/bin/sh\necho >>{}\necho '[{{\"name\":\"{name}\",\"description\":\"\",\"fits\":{fits}}}]'\n",
            runs.display()
        );
        let new = folder.join("new");
        std::fs::write(&new, text).unwrap();
        std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o755)).unwrap();
        std::fs::rename(new, folder.join("vmm")).unwrap();
    }

    #[tokio::test]
    async fn a_program_is_asked_once_and_its_successor_again() {
        let folder = tempfile::tempdir().unwrap();
        let vmm = folder.path().join("vmm");
        let cache = CpuModels::default();
        let missing = cache.get(&vmm).await.unwrap_err();
        assert!(
            missing.to_string().contains("is not installed"),
            "{missing}"
        );
        for (name, fits, asks, runs) in [
            ("first", "true", 3, 1),
            ("second", "false", 3, 2),
            // KVM may be there the next time.
            ("third", "null", 2, 4),
        ] {
            write_program(folder.path(), name, fits);
            for _ in 0..asks {
                let models = cache.get(&vmm).await.unwrap();
                assert_eq!(models[0].name, name);
            }
            let ran = std::fs::read(folder.path().join("runs")).unwrap();
            assert_eq!(ran.len(), runs, "{name}");
        }
    }
}
