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
//! Changes to users and rules are in `edit`, what a caller may do is in `evaluate`.

mod check;
mod edit;
mod evaluate;
mod identity;
mod privilege;
mod role;
mod secret;
#[cfg(test)]
mod tests;
mod user_config;

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use async_trait::async_trait;
use tokio::sync::Semaphore;

pub use check::{Check, fill_path};
pub use edit::{RuleChange, TokenChange, UserChange, parse_privileges};
pub use evaluate::{Caller, Granted};
pub use identity::{Identity, UserId};
pub use privilege::{Privilege, PrivilegeSet};
pub use role::{BUILT_IN as BUILT_IN_ROLES, built_in as built_in_role};
pub use user_config::{Group, Pool, Rule, Subject, Token, User, UserConfig, normalize_path};

use crate::error::Error;
use crate::store::{ConfigStore, Revision};

/// Text of every failed sign-in: it does not say which part was wrong. PVE's words.
pub const AUTHENTICATION_FAILURE: &str = "authentication failure";

/// The realms there are, with a note for people.
pub const REALMS: &[(&str, &str)] = &[
    ("pam", "Linux PAM standard authentication"),
    ("pve", "Atoll's own accounts"),
];

/// How many passwords are hashed at the same time. Our choice: 19 MiB each.
const HASHES_MAX: usize = 4;

/// Checks passwords of a realm that is not ours: `pam`.
#[async_trait]
pub trait PasswordVerifier: Send + Sync + std::fmt::Debug {
    /// Whether the password of the host's user `name` is right; an error says why the host could not tell.
    async fn verify(&self, name: &str, password: &str) -> Result<bool, Error>;
}

/// Users and their rights; cheap to clone.
#[derive(Debug, Clone)]
pub struct Access {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    store: Arc<dyn ConfigStore>,
    /// `user.cfg` as parsed last, and the revision it was parsed at. Innermost lock.
    parsed: RwLock<(Revision, Arc<UserConfig>)>,
    /// Realm pam. Set once at start. Innermost lock.
    verifier: RwLock<Option<Arc<dyn PasswordVerifier>>>,
    hashing: Semaphore,
}

impl Access {
    /// The rights that a store holds.
    pub fn new(store: Arc<dyn ConfigStore>) -> Self {
        Self {
            shared: Arc::new(Shared {
                store,
                parsed: RwLock::default(),
                verifier: RwLock::new(None),
                hashing: Semaphore::new(HASHES_MAX),
            }),
        }
    }

    /// Says who checks passwords of realm pam; without it nobody of that realm can sign in.
    pub fn set_verifier(&self, verifier: Arc<dyn PasswordVerifier>) {
        let mut slot = self
            .shared
            .verifier
            .write()
            .unwrap_or_else(|e| e.into_inner());
        *slot = Some(verifier);
    }

    /// Users, groups, roles and rules as they are now.
    pub fn config(&self) -> Result<Arc<UserConfig>, Error> {
        let entry = self.shared.store.get(edit::USER_CONFIG)?;
        let (revision, value) = match &entry {
            Some(entry) => (entry.revision, entry.value.as_ref()),
            None => (Revision::default(), &b""[..]),
        };
        let parsed = self.shared.parsed.read().unwrap_or_else(|e| e.into_inner());
        if parsed.0 == revision {
            return Ok(Arc::clone(&parsed.1));
        }
        drop(parsed);
        let config = Arc::new(UserConfig::parse(&String::from_utf8_lossy(value)));
        let mut parsed = self
            .shared
            .parsed
            .write()
            .unwrap_or_else(|e| e.into_inner());
        *parsed = (revision, Arc::clone(&config));
        Ok(config)
    }

    /// A caller to ask about many paths. Make one for each request: it sees the rules of this moment.
    pub fn caller(&self, identity: &Identity) -> Result<Caller, Error> {
        Ok(Caller::new(self.config()?, identity.clone(), now()))
    }

    /// Whether a demand of a route holds for a caller; see [`Caller::check`].
    pub fn check<'a>(
        &self,
        identity: &Identity,
        check: &Check,
        lookup: impl Fn(&str) -> Option<&'a str>,
    ) -> Result<(), Error> {
        self.caller(identity)?.check(check, &lookup)
    }

    /// What somebody may do on a path.
    pub fn privileges(&self, identity: &Identity, path: &str) -> Result<PrivilegeSet, Error> {
        Ok(self.caller(identity)?.privileges(path))
    }

    /// Everything somebody may do, by path; the value says whether it holds below the path, too.
    pub fn permissions(
        &self,
        identity: &Identity,
        path: Option<&str>,
    ) -> Result<BTreeMap<String, BTreeMap<Privilege, bool>>, Error> {
        Ok(self.caller(identity)?.permissions(path))
    }

    /// Whether a user exists, is enabled and has not expired.
    pub fn may_sign_in(&self, user: &UserId) -> Result<bool, Error> {
        Ok(evaluate::may_sign_in(&*self.config()?, user, now()))
    }

    /// Checks a password. Takes as long for a user that does not exist.
    pub async fn verify_password(&self, user: &UserId, password: &str) -> Result<(), Error> {
        let failure = || Error::Denied(AUTHENTICATION_FAILURE.to_owned());
        if password.is_empty() || password.len() > secret::PASSWORD_LENGTH_MAX {
            return Err(failure());
        }
        let fits = match user.realm() {
            "pve" => self.verify_own(user, password).await?,
            "pam" => self.verify_host(user, password).await?,
            _ => false,
        };
        if fits && self.may_sign_in(user)? {
            return Ok(());
        }
        Err(failure())
    }

    /// Checks a token's secret. That the token and its user have not ended is checked with every demand.
    pub fn verify_token(&self, identity: &Identity, secret: &str) -> Result<(), Error> {
        let stored = self.secrets(edit::TOKEN_SECRETS, ' ')?;
        let hash = stored.get(&identity.to_string()).map(String::as_str);
        let fits = secret::secret_fits(secret, hash);
        if fits && identity.token.is_some() && self.may_sign_in(&identity.user)? {
            return Ok(());
        }
        Err(Error::Denied(AUTHENTICATION_FAILURE.to_owned()))
    }

    async fn verify_own(&self, user: &UserId, password: &str) -> Result<bool, Error> {
        let hashes = self.secrets(edit::SHADOW, ':')?;
        let hash = hashes.get(user.name()).cloned();
        let password = password.to_owned();
        self.hashing(move || Ok(secret::password_fits(&password, hash.as_deref())))
            .await
    }

    async fn verify_host(&self, user: &UserId, password: &str) -> Result<bool, Error> {
        match self.verifier() {
            Some(verifier) => verifier.verify(user.name(), password).await,
            None => Ok(false),
        }
    }

    fn verifier(&self) -> Option<Arc<dyn PasswordVerifier>> {
        let verifier = self.shared.verifier.read();
        verifier.unwrap_or_else(|e| e.into_inner()).clone()
    }

    /// Runs slow work on passwords where it may block, a few at a time.
    async fn hashing<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let permit = self.shared.hashing.acquire().await;
        let _permit = permit.map_err(|e| Error::failed("hash a password", e))?;
        tokio::task::spawn_blocking(work)
            .await
            .map_err(|e| Error::failed("hash a password", e))?
    }

    fn secrets(&self, key: &str, divider: char) -> Result<BTreeMap<String, String>, Error> {
        let entry = self.shared.store.get(key)?;
        Ok(entry.map_or_else(BTreeMap::new, |entry| {
            secret::parse(&String::from_utf8_lossy(&entry.value), divider)
        }))
    }
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
