// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! How the process is to be confined, as its arguments say. What that means: `sandbox`.

use clap::{Args, ValueEnum};

use crate::sandbox::{Confinement, Identity, Seccomp};

/// What the process gives up once everything is open.
#[derive(Debug, Args)]
pub struct ConfinementArguments {
    /// Once everything is open, give up the file system, the network and (root only) the user
    #[arg(long, value_name = "WHETHER", default_value = "on")]
    pub sandbox: Switch,
    /// System-call filters: `log` lets a denied call pass and leaves it to the kernel's log
    #[arg(long, value_name = "WHETHER", default_value = "on")]
    pub seccomp: Filters,
    /// Run as this user instead of one of its own [default: 4290000000 + process number]; root only
    #[arg(long, value_name = "NUMBER")]
    pub uid: Option<u32>,
    /// Run as this group [default: the user's number]; root only
    #[arg(long, value_name = "NUMBER")]
    pub gid: Option<u32>,
}

/// `on` or `off`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// Yes.
    On,
    /// No.
    Off,
}

/// Values of `--seccomp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Filters {
    /// A denied call ends the process.
    On,
    /// A denied call is logged by the kernel.
    Log,
    /// No filters.
    Off,
}

impl ConfinementArguments {
    /// How the process is to be confined, but for its log.
    #[must_use]
    pub fn to_confinement(&self) -> Confinement {
        let identity = Identity::new(self.uid, self.gid);
        Confinement {
            sandbox: (self.sandbox == Switch::On).then_some(identity),
            seccomp: match self.seccomp {
                Filters::On => Seccomp::On,
                Filters::Log => Seccomp::Log,
                Filters::Off => Seccomp::Off,
            },
            log: None,
        }
    }
}
