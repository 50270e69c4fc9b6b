// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Who a request comes from, and whether he may make it.
//!
//! ```text
//! Authorization or cookie ─┬─ ticket ─► keys ─► user still enabled? ─► CSRF token, unless GET ─┬─► Identity
//!                          └─ API token ─► access ─────────────────────────────────────────────┘      │
//!                                                                      the route's Check ◄────────────┘
//! ```
//!
//! The refusals' texts are PVE's. Passwords are checked in `routes::access` alone.

pub mod gate;
pub mod keys;
pub mod pam;
pub mod ticket;

use async_trait::async_trait;
use atoll_manager::access::{Caller, Check, Identity, PasswordVerifier, UserId};
use atoll_manager::error::Error;
use hyper::{HeaderMap, StatusCode};
use jiff::Timestamp;

use crate::answer::Refusal;
use crate::daemon::Daemon;
use crate::request::{self, Credentials, Sent};
use crate::route::{Method, Route};

/// Realm `pam` for the manager, which knows no PAM.
#[derive(Debug)]
pub struct HostUsers;

#[async_trait]
impl PasswordVerifier for HostUsers {
    async fn verify(&self, name: &str, password: &str) -> Result<bool, Error> {
        pam::check(name, password).await
    }
}

/// Who makes a request with these headers.
pub fn identify(daemon: &Daemon, method: Method, headers: &HeaderMap) -> Result<Caller, Refusal> {
    let access = daemon.node.access();
    let identity = match request::credentials(headers).ok_or_else(|| unauthorized("No ticket"))? {
        Credentials::Token { id, secret } => {
            let wrong = || unauthorized("invalid token value!");
            let identity: Identity = id.parse().map_err(|_| wrong())?;
            match identity.token.is_some() && access.verify_token(&identity, &secret).is_ok() {
                true => identity,
                false => return Err(wrong()),
            }
        }
        Credentials::Ticket(ticket) => {
            let wrong = || unauthorized("permission denied - invalid PVE ticket");
            let keys = daemon.keyring.keys();
            let now = Timestamp::now().as_second();
            let user = keys.login_user(&ticket, now).ok_or_else(wrong)?;
            let csrf = headers
                .get("CSRFPreventionToken")
                .and_then(|value| value.to_str().ok());
            let needs_csrf = method != Method::Get;
            if needs_csrf && !csrf.is_some_and(|token| keys.csrf_fits(token, user, now)) {
                return Err(unauthorized("Permission denied - invalid csrf token"));
            }
            let user: UserId = user.parse().map_err(|_| wrong())?;
            // He may have been disabled or removed since he signed in.
            match access.may_sign_in(&user)? {
                true => user.into(),
                false => return Err(wrong()),
            }
        }
    };
    Ok(access.caller(&identity)?)
}

/// Whether a check lets anybody in, so that no identity is needed.
pub fn is_open(check: &Check) -> bool {
    matches!(check, Check::World)
}

/// Whether `caller` may call `route` with what he sent.
pub fn authorize(route: &Route, caller: Option<&Caller>, sent: &Sent) -> Result<(), Refusal> {
    if is_open(&route.check) {
        return Ok(());
    }
    let caller = caller.ok_or_else(|| unauthorized("No ticket"))?;
    let lookup = |name: &str| {
        let mut sent = sent.iter();
        sent.find(|(sent, _)| sent == name)
            .map(|(_, value)| value.as_str())
    };
    Ok(caller.check(&route.check, &lookup)?)
}

/// A refusal for want of an identity; `serve` delays it.
pub fn unauthorized(text: &str) -> Refusal {
    Refusal::new(StatusCode::UNAUTHORIZED, text)
}
