// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Inheritable capabilities. libcontainer drops the effective and permitted sets first and raises the inheritable
//! one last, when the kernel no longer allows it (capabilities(7): beyond what is inherited, it must be permitted).
//! What a process has inherited already needs no raising, so the set is given on from here: by `create` before
//! libcontainer forks, and by `exec` before it drops. In a new user namespace the kernel empties the set; there
//! an inheritable capability must be permitted, too.

use std::str::FromStr;

use caps::{CapSet, CapsHashSet};
use oci_spec::runtime::Process;

use crate::error::{Error, Result};

/// What this process inherits to its children meanwhile; dropping it restores what was.
pub(crate) struct Inheritable(CapsHashSet);

impl Drop for Inheritable {
    fn drop(&mut self) {
        // Giving capabilities up is always allowed.
        caps::set(None, CapSet::Inheritable, &self.0).ok();
    }
}

/// Makes the process's inheritable set ours.
pub(crate) fn raise(process: &Process) -> Result<Inheritable> {
    let failed = |e: &dyn std::error::Error| Error::Argument(format!("capabilities: {e}"));
    let before = caps::read(None, CapSet::Inheritable).map_err(|e| failed(&e))?;
    let wanted = process.capabilities().as_ref();
    let wanted: CapsHashSet = wanted
        .and_then(|sets| sets.inheritable().as_ref())
        .into_iter()
        .flatten()
        .filter_map(|name| caps::Capability::from_str(&format!("CAP_{name}")).ok())
        .collect();
    // A capability that we do not have is left for libcontainer to refuse, by its name.
    if !wanted.is_empty() && !before.is_superset(&wanted) {
        caps::set(None, CapSet::Inheritable, &wanted).ok();
    }
    Ok(Inheritable(before))
}
