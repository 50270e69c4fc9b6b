// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Names and numbers of things, checked once.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Smallest number a guest may have; smaller ones are reserved, as in PVE.
pub const GUEST_ID_MIN: u32 = 100;
/// Largest number a guest may have.
pub const GUEST_ID_MAX: u32 = 999_999_999;

/// A text that is not the identifier it claims to be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a valid {what}")]
pub struct InvalidId {
    /// What was given.
    pub text: String,
    /// What it should have been.
    pub what: &'static str,
}

/// Number of a guest, unique in the cluster, [`GUEST_ID_MIN`] to [`GUEST_ID_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct GuestId(u32);

impl TryFrom<u32> for GuestId {
    type Error = InvalidId;

    fn try_from(number: u32) -> Result<Self, InvalidId> {
        if (GUEST_ID_MIN..=GUEST_ID_MAX).contains(&number) {
            Ok(Self(number))
        } else {
            Err(InvalidId {
                text: number.to_string(),
                what: "guest id",
            })
        }
    }
}

impl From<GuestId> for u32 {
    fn from(id: GuestId) -> u32 {
        id.0
    }
}

impl FromStr for GuestId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId {
            text: text.to_owned(),
            what: "guest id",
        };
        // Only one spelling: `+100` or `0100` would name a second file of the same guest.
        if !text.bytes().all(|b| b.is_ascii_digit()) || text.starts_with('0') {
            return Err(invalid());
        }
        Self::try_from(text.parse::<u32>().map_err(|_| invalid())?)
    }
}

impl fmt::Display for GuestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The two kinds of guests.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum GuestKind {
    /// A virtual machine: `qemu` in paths and API, for PVE's clients.
    Vm,
    /// A container: `lxc` in paths and API.
    Container,
}

impl GuestKind {
    /// Both, in the order of listings.
    pub const ALL: [Self; 2] = [Self::Vm, Self::Container];

    /// PVE's word in paths, resource ids and `type` members: `qemu` or `lxc`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Vm => "qemu",
            Self::Container => "lxc",
        }
    }

    /// Directory of the configs below `nodes/N/`: `qemu-server` or `lxc`.
    pub fn directory(self) -> &'static str {
        match self {
            Self::Vm => "qemu-server",
            Self::Container => "lxc",
        }
    }

    /// What error texts call it: `VM` or `CT`.
    pub fn title(self) -> &'static str {
        match self {
            Self::Vm => "VM",
            Self::Container => "CT",
        }
    }

    /// Store key of a guest's config.
    pub fn config_key(self, node: &str, id: GuestId) -> String {
        format!("nodes/{node}/{}/{id}.conf", self.directory())
    }
}

/// Reads a config's store key back: node, kind and number. `None` for any other key.
pub fn parse_config_key(key: &str) -> Option<(&str, GuestKind, GuestId)> {
    let (node, rest) = key.strip_prefix("nodes/")?.split_once('/')?;
    let (directory, file) = rest.split_once('/')?;
    let kind = GuestKind::ALL
        .into_iter()
        .find(|kind| kind.directory() == directory)?;
    let id = file.strip_suffix(".conf")?.parse().ok()?;
    Some((node, kind, id))
}

/// What a node may be called: a host name label, since it becomes part of paths and UPIDs.
pub fn check_node_name(name: &str) -> Result<(), InvalidId> {
    let bytes = name.as_bytes();
    let inner = |b: &u8| b.is_ascii_alphanumeric() || *b == b'-';
    let fits = !bytes.is_empty()
        && bytes.len() <= 63
        && bytes.iter().all(inner)
        && bytes[0] != b'-'
        && bytes[bytes.len() - 1] != b'-';
    if fits {
        Ok(())
    } else {
        Err(InvalidId {
            text: name.to_owned(),
            what: "node name",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn config_keys_read_back() {
        let id: GuestId = "101".parse().unwrap();
        let key = GuestKind::Container.config_key("n1", id);
        assert_eq!(key, "nodes/n1/lxc/101.conf");
        assert_eq!(
            parse_config_key(&key),
            Some(("n1", GuestKind::Container, id))
        );
        assert_eq!(parse_config_key("nodes/n1/lxc/99.conf"), None);
        assert_eq!(parse_config_key("nodes/n1/lxc/101.conf.tmp"), None);
    }

    #[test]
    fn node_names_are_host_labels() {
        assert!(check_node_name("pve-1").is_ok());
        for bad in ["", "-a", "a-", "a.b", "a b", "a:b", "ä"] {
            assert!(check_node_name(bad).is_err(), "{bad}");
        }
    }
}
