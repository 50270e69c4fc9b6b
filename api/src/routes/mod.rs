// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The routes: one table a file. A row names its parameters, its answer and the privilege that it takes; `route`
//! checks all of it before the handler below the table runs.

mod access;
mod atoll;
mod cluster;
mod guest_actions;
mod guests;
mod nodes;
pub mod parameters;
mod series;
mod storage;
mod tasks;
mod ticket;
mod volumes;

use std::collections::BTreeMap;

use serde_json::Value;

use crate::route::Route;

/// Every table.
pub const TABLES: &[&[Route]] = &[
    access::ROUTES,
    atoll::ROUTES,
    cluster::ROUTES,
    guest_actions::CONTAINERS,
    guest_actions::RESET,
    guest_actions::VMS,
    guests::ASYNC_UPDATE,
    guests::CONTAINERS,
    guests::INTERFACES,
    guests::VMS,
    nodes::ROUTES,
    series::ROUTES,
    storage::ROUTES,
    tasks::ROUTES,
    ticket::ROUTES,
    volumes::ROUTES,
];

/// An async function as a row's handler.
macro_rules! serve {
    ($handler:path) => {
        |call| Box::pin($handler(call))
    };
}
use serve;

/// A boolean as PVE sends it.
fn bit(flag: bool) -> Value {
    u8::from(flag).into()
}

/// An object of those members that there are.
fn object<const N: usize>(members: [(&str, Option<Value>); N]) -> Value {
    let present = members
        .into_iter()
        .filter_map(|(name, value)| Some((name.to_owned(), value?)));
    present.collect::<serde_json::Map<_, _>>().into()
}

/// Texts by name as an object.
fn texts(members: &BTreeMap<String, String>) -> Value {
    let texts = members.iter().map(|(k, v)| (k.clone(), v.as_str().into()));
    texts.collect::<serde_json::Map<_, _>>().into()
}
