// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! How the process is to be confined, as its arguments say. What that means: `sandbox`.

use clap::builder::RangedU64ValueParser;
use clap::{Args, ValueEnum};

use crate::check::SpecError;
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
    /// Run as this user instead of one of its own [default: 4290000000 + process number]; root only, in the sandbox
    #[arg(long, value_name = "NUMBER", value_parser = identity_number())]
    pub uid: Option<u32>,
    /// Run as this group [default: the user's number]; root only, in the sandbox
    #[arg(long, value_name = "NUMBER", value_parser = identity_number())]
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
    /// Refuses a user and a group that the process, which is `own` now, would not become.
    pub fn check(&self, own: Identity) -> Result<(), SpecError> {
        let wanted = [("--uid", self.uid, own.uid), ("--gid", self.gid, own.gid)];
        for (name, wanted, own_number) in wanted {
            let Some(wanted) = wanted.filter(|wanted| *wanted != own_number) else {
                continue;
            };
            let remedy = match self.sandbox {
                Switch::Off => "that is the sandbox's work: leave out --sandbox off",
                Switch::On if own.uid != 0 => "only root becomes somebody else: start it as root",
                Switch::On => continue,
            };
            return Err(SpecError(format!("{name} {wanted}: {remedy}")));
        }
        Ok(())
    }

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

/// All but the last, by which the kernel means "as it is" (setresuid(2)).
fn identity_number() -> RangedU64ValueParser<u32> {
    RangedU64ValueParser::new().range(..u64::from(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_that_cannot_be_had_is_refused() {
        let (root, somebody) = (Identity { uid: 0, gid: 0 }, Identity { uid: 7, gid: 8 });
        // In the group of root, but not root.
        let grouped = Identity { uid: 7, gid: 0 };
        let not_root = "only root becomes somebody else: start it as root";
        let no_sandbox = "that is the sandbox's work: leave out --sandbox off";
        for (own, sandbox, uid, gid, expected) in [
            (root, Switch::On, Some(5), Some(6), None),
            (root, Switch::Off, None, None, None),
            (root, Switch::Off, Some(0), None, None),
            (
                root,
                Switch::Off,
                Some(5),
                None,
                Some(("--uid 5", no_sandbox)),
            ),
            (somebody, Switch::On, Some(7), Some(8), None),
            (
                somebody,
                Switch::On,
                Some(5),
                None,
                Some(("--uid 5", not_root)),
            ),
            (
                somebody,
                Switch::On,
                Some(7),
                Some(7),
                Some(("--gid 7", not_root)),
            ),
            (
                somebody,
                Switch::Off,
                None,
                Some(7),
                Some(("--gid 7", no_sandbox)),
            ),
            (
                grouped,
                Switch::On,
                None,
                Some(6),
                Some(("--gid 6", not_root)),
            ),
        ] {
            let seccomp = Filters::On;
            let arguments = ConfinementArguments {
                sandbox,
                seccomp,
                uid,
                gid,
            };
            let said = arguments.check(own).err().map(|error| error.to_string());
            let expected = expected.map(|(what, why)| format!("{what}: {why}"));
            assert_eq!(said, expected, "{own:?} {arguments:?}");
        }
    }
}
