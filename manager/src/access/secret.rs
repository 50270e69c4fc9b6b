// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Passwords and token secrets: made, hashed and compared. Files: `priv/shadow.cfg` (`NAME:HASH:`, argon2id) and
//! `priv/token.cfg` (`USER!TOKEN HASH`, SHA-256: a secret of 122 random bits needs no slow hash).

use std::collections::BTreeMap;

use argon2::Argon2;
use argon2::password_hash::phc::PasswordHash;
use argon2::password_hash::{PasswordHasher, PasswordVerifier};
use aws_lc_rs::{constant_time, digest, rand};

use crate::error::Error;

/// Longest password that is hashed. Our choice: hashing must not become a way to use up a node's memory.
pub(super) const PASSWORD_LENGTH_MAX: usize = 1024;

/// Random bytes of a salt, as argon2's authors recommend (RFC 9106 §3.1).
const SALT_BYTES: usize = 16;

/// A hash to compare with when there is no such user, so that the answer takes as long: argon2id of nothing useful,
/// with the parameters that [`hash_password`] uses.
const NOBODY: &str = "$argon2id$v=19$m=19456,t=2,p=1$bm9ib2R5IGlzIGhlcmU$jr8mPxfwxiLRHzSF8GhNWWGYGaV6ZKGWkvCB3mBIpsQ";

/// Hashes a password. Takes tens of milliseconds: call it where blocking is allowed.
pub(super) fn hash_password(password: &str) -> Result<String, Error> {
    let mut salt = [0u8; SALT_BYTES];
    fill_random(&mut salt)?;
    let hash: PasswordHash = Argon2::default()
        .hash_password_with_salt(password.as_bytes(), &salt)
        .map_err(|e| Error::failed("hash the password", e))?;
    Ok(hash.to_string())
}

/// Whether a password is the one that was hashed; `None` is a user that does not exist.
pub(super) fn password_fits(password: &str, hash: Option<&str>) -> bool {
    let Ok(parsed) = PasswordHash::new(hash.unwrap_or(NOBODY)) else {
        return false;
    };
    let fits = Argon2::default().verify_password(password.as_bytes(), &parsed);
    fits.is_ok() && hash.is_some()
}

/// A password for people to type: 20 letters and digits that cannot be mistaken for each other.
pub(super) fn random_password() -> Result<String, Error> {
    const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";
    let mut bytes = [0u8; 20];
    fill_random(&mut bytes)?;
    let letter = |byte: u8| char::from(LETTERS[usize::from(byte % 32)]);
    Ok(bytes.into_iter().map(letter).collect())
}

/// A token's secret, a random UUID as clients expect it.
pub(super) fn random_secret() -> Result<String, Error> {
    let mut bytes = [0u8; 16];
    fill_random(&mut bytes)?;
    Ok(uuid::Builder::from_random_bytes(bytes)
        .into_uuid()
        .to_string())
}

/// What is stored of a token's secret.
pub(super) fn hash_secret(secret: &str) -> String {
    let hash = digest::digest(&digest::SHA256, secret.as_bytes());
    let hex: String = hash.as_ref().iter().map(|b| format!("{b:02x}")).collect();
    format!("sha256:{hex}")
}

/// Whether a secret is the one that was stored.
pub(super) fn secret_fits(secret: &str, stored: Option<&str>) -> bool {
    let stored = stored.unwrap_or_default();
    constant_time::verify_slices_are_equal(hash_secret(secret).as_bytes(), stored.as_bytes())
        .is_ok()
}

fn fill_random(bytes: &mut [u8]) -> Result<(), Error> {
    rand::fill(bytes).map_err(|e| Error::failed("get random bytes", e))
}

/// Reads either file: a name and a hash a line, divided by a colon or a blank.
pub(super) fn parse(text: &str, divider: char) -> BTreeMap<String, String> {
    let pair = |line: &str| {
        let (name, hash) = line.split_once(divider)?;
        Some((name.to_owned(), hash.trim_end_matches(':').to_owned()))
    };
    text.lines().filter_map(pair).collect()
}

/// Writes `priv/shadow.cfg`.
pub(super) fn print_shadow(hashes: &BTreeMap<String, String>) -> String {
    hashes
        .iter()
        .map(|(name, hash)| format!("{name}:{hash}:\n"))
        .collect()
}

/// Writes `priv/token.cfg`.
pub(super) fn print_tokens(hashes: &BTreeMap<String, String>) -> String {
    hashes
        .iter()
        .map(|(name, hash)| format!("{name} {hash}\n"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords() {
        let hash = hash_password("tiger").unwrap();
        assert!(
            hash.starts_with("$argon2id$v=19$m=19456,t=2,p=1$"),
            "{hash}"
        );
        assert!(password_fits("tiger", Some(&hash)));
        assert!(!password_fits("Tiger", Some(&hash)));
        assert!(!password_fits("tiger", None));
        assert!(!password_fits("tiger", Some("broken")));
        PasswordHash::new(NOBODY).unwrap();
    }

    #[test]
    fn secrets() {
        let secret = random_secret().unwrap();
        let stored = hash_secret(&secret);
        assert!(secret_fits(&secret, Some(&stored)));
        assert!(!secret_fits("x", Some(&stored)) && !secret_fits("", None));
        assert_eq!(secret.parse::<uuid::Uuid>().unwrap().get_version_num(), 4);
        assert_ne!(random_password().unwrap(), random_password().unwrap());
    }

    #[test]
    fn files_read_back() {
        let hashes = BTreeMap::from([("a".to_owned(), "$argon2id$v=19$m=1,t=2$x".to_owned())]);
        assert_eq!(parse(&print_shadow(&hashes), ':'), hashes);
        let tokens = BTreeMap::from([("a@pve!t".to_owned(), hash_secret("x"))]);
        assert_eq!(parse(&print_tokens(&tokens), ' '), tokens);
    }
}
