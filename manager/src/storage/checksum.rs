// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Checksums that a user gives with an upload or a download. Computed by coreutils' programs, which know every
//! algorithm that PVE's API names.

use std::path::Path;
use std::time::Duration;

use crate::error::Error;
use crate::exec::Program;

/// Algorithms of PVE's `checksum-algorithm`, with the length of their digest in hexadecimal digits.
pub const ALGORITHMS: &[(&str, usize)] = &[
    ("md5", 32),
    ("sha1", 40),
    ("sha224", 56),
    ("sha256", 64),
    ("sha384", 96),
    ("sha512", 128),
];

/// Time to read a whole file: an hour is 20 MB/s for 72 GB.
const DEADLINE: Duration = Duration::from_secs(3600);

/// What a file's digest must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checksum {
    algorithm: &'static str,
    digest: String,
}

impl Checksum {
    /// Checks algorithm and form.
    pub fn new(algorithm: &str, digest: &str) -> Result<Self, Error> {
        let wrong = |name: &str, text: String| Error::Invalid(vec![(name.to_owned(), text)]);
        let (algorithm, length) = ALGORITHMS
            .iter()
            .find(|(name, _)| *name == algorithm)
            .ok_or_else(|| {
                wrong(
                    "checksum-algorithm",
                    format!("'{algorithm}' is not a known algorithm"),
                )
            })?;
        if digest.len() != *length || !digest.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Err(wrong(
                "checksum",
                format!("a {algorithm} checksum has {length} hexadecimal digits"),
            ));
        }
        Ok(Self {
            algorithm,
            digest: digest.to_ascii_lowercase(),
        })
    }

    /// Reads the file and compares.
    pub async fn verify(&self, path: &Path) -> Result<(), Error> {
        let printed = Program::new(format!("{}sum", self.algorithm))
            .arg("--binary")
            .arg(path)
            .deadline(DEADLINE)
            .run()
            .await?;
        // A backslash comes first when the name had to be escaped.
        let found = printed
            .trim_start_matches('\\')
            .split_whitespace()
            .next()
            .unwrap_or_default();
        if found == self.digest {
            return Ok(());
        }
        Err(Error::Refused(format!(
            "checksum mismatch: got '{found}' != expect '{}'",
            self.digest
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn digests_are_compared() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("x");
        std::fs::write(&file, "abc").unwrap();
        let right = "BA7816BF8F01CFEA414140DE5DAE2223B00361A396177A9CB410FF61F20015AD";
        Checksum::new("sha256", right)
            .unwrap()
            .verify(&file)
            .await
            .unwrap();
        let error = Checksum::new("md5", &"0".repeat(32))
            .unwrap()
            .verify(&file)
            .await
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "checksum mismatch: got '900150983cd24fb0d6963f7d28e17f72' != expect '00000000000000000000000000000000'"
        );
    }

    #[test]
    fn form_is_checked() {
        assert!(Checksum::new("sha256", "abc").is_err());
        assert!(Checksum::new("crc32", "abc").is_err());
        assert!(Checksum::new("md5", &"g".repeat(32)).is_err());
    }
}
