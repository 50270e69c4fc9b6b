// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What machines can be like on this node, by `atoll-vmm`'s own word. Called by the API's listings.

use std::path::Path;

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

/// All models, `host` first. `vmm` is the program.
pub async fn cpu_models(vmm: &Path) -> Result<Vec<CpuModel>, Error> {
    let printed = Program::new(vmm)
        .args(["cpu-models", "--json"])
        .run()
        .await?;
    serde_json::from_str(&printed).map_err(|e| Error::failed("read the list of CPU models", e))
}
