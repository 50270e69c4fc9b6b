// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What is said between `atoll-vmm` and its callers: the machine's spec, the control API's types and a client.
//!
//! Not here: what a spec key *means* to a guest (crate `atoll-vmm`), where a spec comes from (crate
//! `atoll-manager` resolves a guest's config into one, `atoll-vmm run` its command line).
//!
//! A wire format only grows: a new field is an `Option` or has a default, and unknown fields are refused,
//! so that an old `atoll-vmm` answers a newer caller with a clear error instead of a half-built machine.
//! (Answers are the other way round: a client ignores the fields it does not know.)

pub mod api;
pub mod client;
pub mod cpu;
pub mod files;
pub mod http;
pub mod services;
pub mod spec;
