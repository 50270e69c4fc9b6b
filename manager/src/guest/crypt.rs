// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Passwords for guests, as crypt(3) keeps them: for root of a new container, for cloud-init's user.

/// A SHA-512 crypt(3) hash, which every distribution's login understands.
pub fn hash(password: &str) -> std::io::Result<String> {
    use sha_crypt::{PasswordHasher, ShaCrypt};
    let mut salt = [0; SALT_BYTES];
    aws_lc_rs::rand::fill(&mut salt).map_err(std::io::Error::other)?;
    let hash = ShaCrypt::SHA512.hash_password_with_salt(password.as_bytes(), &salt);
    Ok(hash.map_err(std::io::Error::other)?.to_string())
}

/// Random bytes of a salt: 16 characters when printed. crypt(3) cuts a longer salt off, and then its hash differs
/// from the stored one in the salt.
const SALT_BYTES: usize = 12;

#[cfg(test)]
mod tests {
    #[test]
    fn hashes_are_crypts() {
        let hash = super::hash("secret").unwrap();
        let fields: Vec<&str> = hash.split('$').collect();
        assert_eq!((fields[1], fields[3].len()), ("6", 16), "{hash}");
    }
}
