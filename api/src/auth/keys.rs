// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The secrets that sign tickets: kept in the store, replaced daily, the one before still good.
//!
//! One line a secret, newest first: `HEXTIME BASE64`. Any node may replace them; who loses the race uses what the
//! winner wrote, and every node reads again when the store changes.

use std::fmt::Write as _;
use std::sync::{Arc, RwLock};
use std::time::Duration;

use atoll_manager::error::Error;
use atoll_manager::store::{ConfigStore, Entry, Expect, StoreError};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use jiff::Timestamp;

use super::ticket::Keys;

/// Where the secrets are; below `priv/`, which no view of the store shows to others than root.
const KEY: &str = "priv/authkey.key";
/// Life of a secret before it is replaced, in seconds. PVE's value.
const ROTATION_SECONDS: i64 = 24 * 60 * 60;
/// Secrets that are good: the present one and the one before, so that no ticket dies before its time.
const KEPT: usize = 2;
/// Length of a secret: as long as the hash, RFC 2104 §3.
const SECRET_BYTES: usize = 32;
/// How often to look whether the secret is due.
const ROUND: Duration = Duration::from_secs(10 * 60);

/// The secrets in use.
pub struct Keyring {
    store: Arc<dyn ConfigStore>,
    /// What tickets are signed with now. Held for one clone of the `Arc`; no lock is taken under it.
    keys: RwLock<Arc<Keys>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Secret {
    made: i64,
    bytes: Vec<u8>,
}

impl Keyring {
    /// The secrets of the store; makes the first one.
    pub async fn open(store: Arc<dyn ConfigStore>) -> Result<Self, Error> {
        let keys = load(store.as_ref()).await?;
        Ok(Self {
            store,
            keys: RwLock::new(Arc::new(keys)),
        })
    }

    /// The keys to sign and verify with now.
    pub fn keys(&self) -> Arc<Keys> {
        Arc::clone(&self.keys.read().unwrap_or_else(|e| e.into_inner()))
    }

    /// Follows the store and replaces secrets when they are due. Runs as long as the daemon.
    pub async fn follow(&self) {
        let mut changes = self.store.watch();
        loop {
            match load(self.store.as_ref()).await {
                Ok(keys) => *self.keys.write().unwrap_or_else(|e| e.into_inner()) = Arc::new(keys),
                Err(error) => tracing::warn!(error = error.chain(), "read {KEY}"),
            }
            tokio::select! {
                _ = changes.changed() => {}
                () = tokio::time::sleep(ROUND) => {}
            }
        }
    }
}

async fn load(store: &dyn ConfigStore) -> Result<Keys, Error> {
    loop {
        let entry = store.get(KEY)?;
        let secrets = parse(entry.as_ref());
        let now = Timestamp::now().as_second();
        if secrets
            .first()
            .is_some_and(|newest| now - newest.made < ROTATION_SECONDS)
        {
            let secrets: Vec<_> = secrets.into_iter().map(|secret| secret.bytes).collect();
            return Ok(Keys::new(&secrets));
        }
        let text = rotated(secrets, now)?;
        let expect = entry.map_or(Expect::Absent, |entry| Expect::At(entry.revision));
        match store.put(KEY, text.into(), expect).await {
            Ok(_) | Err(StoreError::Conflict { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn parse(entry: Option<&Entry>) -> Vec<Secret> {
    let text = entry.map_or("", |entry| std::str::from_utf8(&entry.value).unwrap_or(""));
    let secret = |line: &str| {
        let (made, bytes) = line.split_once(' ')?;
        Some(Secret {
            made: i64::from_str_radix(made, 16).ok()?,
            bytes: BASE64.decode(bytes).ok()?,
        })
    };
    text.lines().filter_map(secret).collect()
}

/// The file with a new secret at its head.
fn rotated(mut secrets: Vec<Secret>, now: i64) -> Result<String, Error> {
    let mut bytes = vec![0; SECRET_BYTES];
    aws_lc_rs::rand::fill(&mut bytes)
        .map_err(|error| Error::failed("make a signing key", error))?;
    secrets.insert(0, Secret { made: now, bytes });
    secrets.truncate(KEPT);
    Ok(secrets.iter().fold(String::new(), |mut text, secret| {
        let _ = writeln!(text, "{:X} {}", secret.made, BASE64.encode(&secret.bytes));
        text
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(text: &str) -> Entry {
        Entry {
            key: KEY.to_owned(),
            value: text.to_owned().into(),
            revision: atoll_manager::store::Revision(1),
        }
    }

    #[test]
    fn rotation_keeps_the_secret_before() {
        let first = parse(Some(&entry(&rotated(Vec::new(), 10).unwrap())));
        let second = parse(Some(&entry(&rotated(first.clone(), 20).unwrap())));
        let third = parse(Some(&entry(&rotated(second.clone(), 30).unwrap())));
        assert_eq!((first.len(), second.len(), third.len()), (1, 2, 2));
        assert_eq!(second[1], first[0]);
        assert_eq!(third[1], second[0]);
        assert_eq!(first[0].bytes.len(), SECRET_BYTES);
    }

    #[test]
    fn damaged_lines_are_left_out() {
        assert_eq!(parse(Some(&entry("nonsense\nFF !!\n"))), []);
        assert_eq!(parse(None), []);
    }
}
