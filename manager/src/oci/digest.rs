// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Digests of image-spec, "Descriptor": SHA-256, which every registry has. A value of the type is safe as a file name.

use std::fmt;
use std::io::{self, Read};
use std::str::FromStr;

use aws_lc_rs::digest;
use serde::{Deserialize, Serialize};

use super::ImageError;

/// `sha256:` and 64 hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(String);

impl Digest {
    /// Of some bytes.
    pub fn of(bytes: &[u8]) -> Self {
        Self::from_hash(&digest::digest(&digest::SHA256, bytes))
    }

    /// The digits alone.
    pub fn hex(&self) -> &str {
        &self.0
    }

    fn from_hash(hash: &digest::Digest) -> Self {
        Self(
            hash.as_ref()
                .iter()
                .map(|byte| format!("{byte:02x}"))
                .collect(),
        )
    }
}

impl FromStr for Digest {
    type Err = ImageError;

    fn from_str(text: &str) -> Result<Self, ImageError> {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        match text.strip_prefix("sha256:") {
            Some(hex) if hex.len() == 64 && hex.bytes().all(is_digit) => Ok(Self(hex.to_owned())),
            _ => Err(ImageError::Invalid(format!("{text:?} is no sha256 digest"))),
        }
    }
}

impl TryFrom<String> for Digest {
    type Error = ImageError;

    fn try_from(text: String) -> Result<Self, ImageError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.0)
    }
}

/// Passes bytes on and computes their digest.
pub(super) struct Hashing<R> {
    inner: R,
    context: digest::Context,
}

impl<R: Read> Hashing<R> {
    pub(super) fn new(inner: R) -> Self {
        Self {
            inner,
            context: digest::Context::new(&digest::SHA256),
        }
    }

    /// Of what was read.
    pub(super) fn finish(self) -> Digest {
        Digest::from_hash(&self.context.finish())
    }

    /// Reads what is left, and refuses when all of it is not what it should be.
    pub(super) fn verify(mut self, expected: &Digest) -> Result<R, ImageError> {
        io::copy(&mut self, &mut io::sink()).map_err(|source| ImageError::Io {
            what: format!("read {expected}"),
            source,
        })?;
        let found = Digest::from_hash(&self.context.finish());
        match found == *expected {
            true => Ok(self.inner),
            false => Err(ImageError::Invalid(format!(
                "expected {expected}, found {found}"
            ))),
        }
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.inner.read(buffer)?;
        self.context.update(&buffer[..count]);
        Ok(count)
    }
}
