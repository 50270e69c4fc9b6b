// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a route demands of its caller, as data: routes are `static` tables, and the API's listing prints them.

use super::privilege::Privilege;

/// A demand on the caller. Paths may hold parameters in braces: `/vms/{vmid}`.
#[derive(Debug, Clone, Copy)]
pub enum Check {
    /// Nobody is asked who he is.
    World,
    /// Anyone who has signed in.
    AnyUser,
    /// `root@pam` himself.
    Root,
    /// All of the privileges on the path.
    All {
        /// Path of the object.
        path: &'static str,
        /// The privileges.
        privileges: &'static [Privilege],
    },
    /// At least one of the privileges on the path.
    Any {
        /// Path of the object.
        path: &'static str,
        /// The privileges.
        privileges: &'static [Privilege],
    },
    /// `Permissions.Modify` on the path, or the right to allocate the kind of object that the path names.
    ModifyPermissions {
        /// Path of the object.
        path: &'static str,
    },
    /// The caller is the user that parameter `userid` names.
    SelfUser,
    /// All of these.
    And(&'static [Check]),
    /// One of these.
    Or(&'static [Check]),
}

/// Puts parameters into a path: `/vms/{vmid}` with `vmid` 100 is `/vms/100`. A parameter that is not given leaves
/// its place empty, which then names the parent: nobody gains by leaving one out.
pub fn fill_path<'a>(path: &str, lookup: impl Fn(&str) -> Option<&'a str>) -> String {
    let mut filled = String::with_capacity(path.len());
    let mut rest = path;
    while let Some((before, after)) = rest.split_once('{') {
        filled.push_str(before);
        let (name, tail) = after.split_once('}').unwrap_or((after, ""));
        filled.push_str(lookup(name).unwrap_or_default());
        rest = tail;
    }
    filled.push_str(rest);
    while filled.len() > 1 && filled.ends_with('/') {
        filled.pop();
    }
    filled
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_filled() {
        let lookup = |name: &str| (name == "vmid").then_some("100");
        assert_eq!(fill_path("/vms/{vmid}", lookup), "/vms/100");
        assert_eq!(fill_path("/a/{vmid}/b/{x}", lookup), "/a/100/b");
        assert_eq!(fill_path("/", lookup), "/");
        assert_eq!(fill_path("{path}", |_| Some("/vms/")), "/vms");
    }
}
