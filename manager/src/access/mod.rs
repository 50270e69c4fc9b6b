// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Who may do what: users, groups, tokens, roles, access rules, and the realms that passwords are checked in.
//!
//! ```text
//! password ──► realm pve (argon2, priv/shadow.cfg) ─┐
//!         └──► realm pam (PasswordVerifier) ────────┼──► Identity ──► Check ──► yes or no
//! token ─────► priv/token.cfg ──────────────────────┘                   └─ user.cfg: rules on paths
//! ```
//!
//! Everything is kept in PVE's files (`user.cfg` and `priv/`). Not here: tickets and cookies (crate `atoll-api`).

mod check;
mod identity;
mod privilege;

pub use check::{Check, fill_path};
pub use identity::{Identity, UserId};
pub use privilege::{Privilege, PrivilegeSet};
