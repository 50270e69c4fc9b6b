// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The outermost layer: `atolld` with the REST API and the web page, and the command `atoll`.
//!
//! ```text
//! bin/atolld ─► daemon ─► serve ─┬─ page                             the web page's files
//!                                └─ request ─► route ─► routes/* ─► answer
//!                                      auth ──────┘       └─► atoll_manager::Node, console
//! bin/atoll ──► cli ── HTTPS ──► (the above)
//! route tables ─► openapi, cli::usage, the page's forms
//! ```
//!
//! Only this crate knows HTTP, tickets and the public JSON names; what it serves, the manager does.

pub mod answer;
pub mod auth;
pub mod cli;
pub mod console;
pub mod daemon;
pub mod openapi;
pub mod page;
pub mod pki;
pub mod request;
pub mod route;
pub mod routes;
pub mod serve;
