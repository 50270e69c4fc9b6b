// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Whether a process can have the AppArmor profile that it asks for, found out before anything runs: libcontainer
//! finds out in the middle, in words that name neither the profile nor the remedy. It still does the applying
//! (`/proc/self/attr/apparmor/exec`), for the init by itself and for a further process by [`crate::exec`].

use std::fs;

use oci_spec::runtime::Process;

use crate::bundle::wrong;
use crate::error::Result;

/// The loaded profiles that our AppArmor namespace sees, a line each: `NAME (MODE)`.
const PROFILES: &str = "/sys/kernel/security/apparmor/profiles";

/// The profile that every kernel has, and the same as none.
const UNCONFINED: &str = "unconfined";

/// Refuses a process whose profile the host has not. Where the kernel has no AppArmor, `unconfined` is what the
/// process is anyway, and is taken out; another profile is refused, as by runc.
pub(crate) fn settle(process: &mut Process) -> Result<()> {
    let profile = process.apparmor_profile().as_deref().unwrap_or_default();
    if profile.is_empty() {
        return Ok(());
    }
    let refused = |reason| {
        let reason = format!("{profile}: {reason}");
        Err(wrong("process.apparmorProfile", reason))
    };
    if !libcontainer::apparmor::is_enabled().unwrap_or(false) {
        if profile == UNCONFINED {
            process.set_apparmor_profile(None);
            return Ok(());
        }
        return refused("AppArmor is not enabled on this host: leave it out");
    }
    // Without securityfs, as inside a container, only the kernel can tell; the init or the child asks it.
    let Ok(list) = fs::read_to_string(PROFILES) else {
        return Ok(());
    };
    if !may_be_loaded(&list, profile) {
        return refused("no such AppArmor profile is loaded: load it with apparmor_parser");
    }
    Ok(())
}

/// Whether a list as in [`PROFILES`] has a profile. Stacks and names of other namespaces are left to the kernel:
/// apparmor(7), "Profile names" of apparmor.d(5).
fn may_be_loaded(list: &str, profile: &str) -> bool {
    if profile == UNCONFINED || profile.starts_with([':', '&']) || profile.contains("//&") {
        return true;
    }
    // A name may have blanks and parentheses, too; the mode is the last.
    let mut names = list.lines().filter_map(|line| line.rsplit_once(" ("));
    names.any(|(name, _mode)| name == profile)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_profile_is_loaded_when_a_line_has_its_whole_name() {
        let list =
            "docker-default (enforce)\n/usr/sbin/cups (d) (complain)\nman//filter (kill)\nflaw\n";
        for loaded in [
            "docker-default",
            "/usr/sbin/cups (d)",
            "man//filter",
            // Not ours to judge.
            "unconfined",
            ":other:docker-default",
            "&docker-default",
            "docker-default//&nosuch",
        ] {
            assert!(may_be_loaded(list, loaded), "{loaded}");
            assert_eq!(may_be_loaded("", loaded), may_be_loaded("x (kill)", loaded));
        }
        for unknown in [
            "docker",
            "docker-default (enforce)",
            "docker-default ",
            "/usr/sbin/cups",
            "man",
            "filter",
            "flaw",
            "docker-default (enforce)\n/usr/sbin/cups (d)",
        ] {
            assert!(!may_be_loaded(list, unknown), "{unknown}");
        }
    }
}
