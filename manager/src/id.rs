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
        let number: u32 = text.parse().map_err(|_| InvalidId {
            text: text.to_owned(),
            what: "guest id",
        })?;
        Self::try_from(number)
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
