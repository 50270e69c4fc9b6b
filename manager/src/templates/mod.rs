// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Indexes of container templates, in the form of PVE's and TurnKey's `aplinfo.dat`: where they come from, the check of
//! their signatures, and what they list. A node has none until its administrator names one.
//!
//! ```text
//! STATE/templates/sources     Name, URL, Keyring ── whom to ask, whom to trust
//!         │ refresh: URL.gz, URL.asc ──► unpacked ──► gpgv ──► parsed
//!         ▼
//! STATE/templates/NAME.dat    only ever one whose signature was good ──► list, find
//! ```
//!
//! Signatures are checked by Debian's `gpgv`, a program made for this alone, in a process of its own.
//! Not here: downloading a template (`storage::download`). Caller: the API.

pub mod index;
mod stanza;

use std::io::Read as _;
use std::path::{Path, PathBuf};

use flate2::read::MultiGzDecoder;
use reqwest::Url;

use crate::error::Error;
use crate::exec::Program;
use crate::storage::fetch::{self, Limits};
use crate::storage::incoming::{Existing, Incoming};
use crate::task::TaskContext;
use index::{Index, Template};

/// Largest index, packed or unpacked: 300 times PVE's.
const INDEX_BYTES_MAX: u64 = 64 << 20;
/// Largest detached signature; one is less than a kilobyte.
const SIGNATURE_BYTES_MAX: u64 = 1 << 20;

/// The indexes of a node; cheap to clone.
#[derive(Debug, Clone)]
pub struct Templates {
    folder: PathBuf,
}

/// One index.
#[derive(Debug)]
struct Source {
    name: String,
    url: Url,
    keyring: PathBuf,
}

impl Templates {
    /// The indexes that are configured and kept in this folder, made if missing.
    pub fn open(folder: PathBuf) -> Result<Self, Error> {
        std::fs::create_dir_all(&folder)
            .map_err(|error| Error::failed(format!("create {}", folder.display()), error))?;
        Ok(Self { folder })
    }

    /// The templates of all indexes, as they were at the last refresh. Of two files of one name, the first counts.
    pub async fn list(&self) -> Result<Vec<Template>, Error> {
        self.blocking(|templates| {
            let mut all: Vec<Template> = Vec::new();
            for source in templates.sources()? {
                let path = templates.kept(&source);
                let Some(text) = read(&path)? else { continue };
                for template in source.parse(&text)?.templates {
                    if all.iter().all(|other| other.file != template.file) {
                        all.push(template);
                    }
                }
            }
            Ok(all)
        })
        .await
    }

    /// One template by its file name.
    pub async fn find(&self, file: &str) -> Result<Template, Error> {
        let mut all = self.list().await?.into_iter();
        all.find(|template| template.file == file)
            .ok_or_else(|| Error::invalid("template", "no such template"))
    }

    /// Fetches all indexes anew, as the work of a task. One that fails keeps what it had, and does not keep the others
    /// from being fetched.
    pub async fn refresh(&self, task: &TaskContext) -> Result<(), Error> {
        let sources = self.blocking(Self::sources).await?;
        let mut failed = None;
        for source in &sources {
            match task.until_cancelled(self.fetch(source, task)).await {
                Ok(()) => {}
                Err(Error::Interrupted) => return Err(Error::Interrupted),
                Err(error) => {
                    task.log(&format!("index '{}': {}", source.name, error.chain()));
                    failed = Some(error);
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    async fn fetch(&self, source: &Source, task: &TaskContext) -> Result<(), Error> {
        let log = |line: &str| task.log(line);
        let limits = |size_bytes_max| Limits {
            size_bytes_max,
            verify_certificates: true,
            waits: fetch::WAITS,
        };
        let [signature, packed, index] = [
            self.incoming(source, "asc")?,
            self.incoming(source, "gz")?,
            self.incoming(source, "dat")?,
        ];
        let url = format!("{}.asc", source.url);
        fetch::fetch(&url, &signature, limits(SIGNATURE_BYTES_MAX), &log).await?;
        let url = format!("{}.gz", source.url);
        fetch::fetch(&url, &packed, limits(INDEX_BYTES_MAX), &log).await?;
        let (from, to) = (packed.path().to_owned(), index.path().to_owned());
        let text = self.blocking(move |_| unpack(&from, &to)).await?;
        let signer = source.verify(signature.path(), index.path()).await?;
        task.log(&format!("the signature is good, by key {signer}"));
        let parsed = source.parse(&text)?;
        for reason in &parsed.left_out {
            task.log(&format!("left out: {reason}"));
        }
        index.commit(None, Existing::Replace).await?;
        task.log(&format!(
            "index '{}' has {} templates",
            source.name,
            parsed.templates.len()
        ));
        Ok(())
    }

    /// What is configured. That there is nothing is an error which says what to do.
    fn sources(&self) -> Result<Vec<Source>, Error> {
        let path = self.folder.join("sources");
        let wrong = |reason: String| Error::Refused(format!("{}: {reason}", path.display()));
        let text = read(&path)?.unwrap_or_default();
        let stanzas = stanza::parse(&text).map_err(|error| wrong(error.to_string()))?;
        if stanzas.is_empty() {
            return Err(Error::Refused(format!(
                "no index of container templates is configured: name one in {} by three lines, 'Name: a word', \
                 'URL: https://.../aplinfo.dat' and 'Keyring: a file with the public keys that may sign it', and \
                 refresh then",
                path.display()
            )));
        }
        let mut sources: Vec<Source> = Vec::new();
        for stanza in stanzas {
            let value = |key: &str| {
                let value = stanza.get(&key.to_ascii_lowercase());
                value.ok_or_else(|| wrong(format!("an index has no '{key}'")))
            };
            let name = value("Name")?;
            let is_word = |c: char| c.is_ascii_alphanumeric() || c == '-';
            if !name.chars().all(is_word) || sources.iter().any(|other| other.name == *name) {
                return Err(wrong(format!(
                    "'{name}' is no name, or that of two indexes"
                )));
            }
            let url = value("URL")?;
            sources.push(Source {
                name: name.clone(),
                url: Url::parse(url).map_err(|error| wrong(format!("'{url}': {error}")))?,
                keyring: self.folder.join(value("Keyring")?),
            });
        }
        Ok(sources)
    }

    /// Where an index is kept once its signature was good.
    fn kept(&self, source: &Source) -> PathBuf {
        self.folder.join(format!("{}.dat", source.name))
    }

    /// An empty file beside the index, removed when it is dropped.
    fn incoming(&self, source: &Source, ending: &str) -> Result<Incoming, Error> {
        let name = format!(".{}-{}.{ending}", source.name, uuid::Uuid::new_v4());
        let path = self.folder.join(name);
        std::fs::write(&path, "")
            .map_err(|error| Error::failed(format!("cannot write {}", path.display()), error))?;
        Ok(Incoming::new(path, self.kept(source)))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let templates = self.clone();
        tokio::task::spawn_blocking(move || work(&templates))
            .await
            .map_err(|error| Error::failed("read the index of templates", error))?
    }
}

impl Source {
    fn parse(&self, text: &str) -> Result<Index, Error> {
        let wrong = |error| Error::Refused(format!("index '{}', {error}", self.name));
        index::parse(text, &self.url).map_err(wrong)
    }

    /// Checks the signature; returns the fingerprint of the key that made it. Any key of the keyring may have, unless it
    /// has expired or was revoked, which `gpgv` lets pass.
    async fn verify(&self, signature: &Path, index: &Path) -> Result<String, Error> {
        let keyring = self.keyring.display();
        let head = tokio::fs::read(&self.keyring).await;
        let head = head.map_err(|error| Error::failed(format!("read keyring {keyring}"), error))?;
        if head.starts_with(b"-----BEGIN") {
            return Err(Error::Refused(format!(
                "keyring {keyring} is armored, which gpgv does not read: convert it by gpg --dearmor"
            )));
        }
        let said = Program::new("gpgv")
            .args(["--status-fd", "1", "--weak-digest", "SHA1", "--keyring"])
            .arg(&self.keyring)
            .arg(signature)
            .arg(index)
            .run()
            .await
            .map_err(|error| {
                let missing = matches!(error, crate::exec::ExecError::Start { .. });
                match missing {
                    true => Error::from(error),
                    false => Error::failed("the signature is not good", error),
                }
            })?;
        signer(&said).map_err(|reason| {
            Error::Refused(format!(
                "index '{}': {reason} (keyring {keyring})",
                self.name
            ))
        })
    }
}

/// The key of a signature that counts, by what `gpgv` says: a verdict, then the fingerprint. GnuPG's `doc/DETAILS`.
fn signer(said: &str) -> Result<String, String> {
    const UNKNOWN: Option<&str> = Some("gpgv has not called good");
    let mut refused = "the signature is not good".to_owned();
    let mut flaw = UNKNOWN;
    for line in said
        .lines()
        .filter_map(|line| line.strip_prefix("[GNUPG:] "))
    {
        let mut words = line.split(' ');
        match words.next().unwrap_or_default() {
            "NEWSIG" => flaw = UNKNOWN,
            "GOODSIG" => flaw = None,
            "EXPKEYSIG" => flaw = Some("has expired: put the renewed one in its place"),
            "REVKEYSIG" => flaw = Some("was revoked: put its successor in its place"),
            "EXPSIG" => flaw = Some("meant it until a date that has passed: fetch a newer index"),
            "VALIDSIG" => {
                let signer = words.next().unwrap_or_default();
                match flaw {
                    None => return Ok(signer.to_owned()),
                    Some(flaw) => refused = format!("it is signed by key {signer}, which {flaw}"),
                }
            }
            _ => {}
        }
    }
    Err(refused)
}

/// A file's text; none when it does not exist.
fn read(path: &Path) -> Result<Option<String>, Error> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(String::from_utf8_lossy(&bytes).into_owned())),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::failed(format!("read {}", path.display()), error)),
    }
}

/// Unpacks an index, of which the signature is still unknown, into a file and into memory.
fn unpack(from: &Path, to: &Path) -> Result<String, Error> {
    let unpacked = || -> std::io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        let mut reader = MultiGzDecoder::new(std::fs::File::open(from)?).take(INDEX_BYTES_MAX + 1);
        reader.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let bytes = unpacked().map_err(|error| Error::failed("unpack the index", error))?;
    if bytes.len() as u64 > INDEX_BYTES_MAX {
        return Err(Error::Refused(format!(
            "the index is larger than {} MiB",
            INDEX_BYTES_MAX >> 20
        )));
    }
    std::fs::write(to, &bytes)
        .map_err(|error| Error::failed(format!("cannot write {}", to.display()), error))?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_signature_that_counts_is_enough() {
        let said = |verdict: &str, key: &str| {
            format!("[GNUPG:] NEWSIG\n[GNUPG:] {verdict} 1 A\n[GNUPG:] VALIDSIG {key} 2026-11-28\n")
        };
        let (good, old) = (said("GOODSIG", "K1"), said("EXPKEYSIG", "K2"));
        for both in [good.clone() + &old, old.clone() + &good] {
            assert_eq!(signer(&both), Ok("K1".to_owned()));
        }
        for (verdict, reason) in [
            ("EXPKEYSIG", "which has expired"),
            ("REVKEYSIG", "which was revoked"),
            ("EXPSIG", "a date that has passed"),
            ("ANYTHING", "gpgv has not called good"),
        ] {
            let refused = signer(&said(verdict, "K3")).unwrap_err();
            assert!(
                refused.contains("K3") && refused.contains(reason),
                "{refused}"
            );
        }
        for nothing in [
            "",
            "[GNUPG:] BADSIG 1 A\n",
            "[GNUPG:] GOODSIG 1 A\n",
            "VALIDSIG K\n",
        ] {
            assert_eq!(signer(nothing), Err("the signature is not good".to_owned()));
        }
    }
}
