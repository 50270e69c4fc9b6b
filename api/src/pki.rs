// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The node's certificates, in `STATE/pki`: an authority of its own, made once, and a server certificate for the
//! names by which this node is reached, renewed when those change or its end comes near.
//!
//! Clients are given `ca.pem`; nothing needs to trust a certificate blindly. Called by `atolld` when it starts;
//! blocks on files.

use std::fs;
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use jiff::{Timestamp, ToSpan as _};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose,
};
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use serde::{Deserialize, Serialize};

/// Life of the authority, in days. Our choice: longer than any installation should go without a new one.
const AUTHORITY_DAYS: i64 = 3650;
/// Life of a server certificate, in days: browsers refuse private ones beyond 825.
const SERVER_DAYS: i64 = 730;
/// A server certificate with less than this left is renewed at start, in days.
const RENEW_DAYS: i64 = 60;

/// Why the certificates could not be had.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// A file of `pki/` could not be read or written.
    #[error("{path}")]
    File {
        /// Which.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file of `pki/` is not what it should be; removing it makes a new one.
    #[error("{path} does not hold a usable key or certificate; remove it to get a new one")]
    Content {
        /// Which.
        path: PathBuf,
        /// Why.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// A certificate could not be made.
    #[error("make a certificate")]
    Make(#[from] rcgen::Error),
    /// The TLS library refuses the certificate.
    #[error("TLS")]
    Tls(#[from] rustls::Error),
}

/// What the present server certificate was made for; kept beside it.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Issued {
    names: Vec<String>,
    until: Timestamp,
}

/// Path of the authority's certificate, which clients need.
pub fn ca_file(directory: &Path) -> PathBuf {
    directory.join("ca.pem")
}

/// TLS configuration for a server known by `names` (host names and addresses), from the files in `directory`.
pub fn server_config(directory: &Path, names: &[String]) -> Result<ServerConfig, PkiError> {
    fs::create_dir_all(directory).map_err(at(directory))?;
    let authority_key = key(&directory.join("ca.key"))?;
    let authority = authority(directory, &authority_key)?;
    issue_when_needed(directory, names, &authority)?;

    let certificate_file = directory.join("server.pem");
    let mut chain = Vec::new();
    for file in [&certificate_file, &ca_file(directory)] {
        chain.push(CertificateDer::from_pem_file(file).map_err(content(file))?);
    }
    let key_file = directory.join("server.key");
    let key = PrivateKeyDer::from_pem_file(&key_file).map_err(content(&key_file))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    // Only HTTP/1.1 is spoken, since reason phrases are part of the API: no protocol list is offered at all.
    Ok(ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_no_client_auth()
        .with_single_cert(chain, key)?)
}

fn authority<'a>(
    directory: &Path,
    key: &'a KeyPair,
) -> Result<Issuer<'static, &'a KeyPair>, PkiError> {
    let file = ca_file(directory);
    if !file.exists() {
        let mut params = CertificateParams::default();
        let identity = uuid::Uuid::new_v4();
        params.distinguished_name = common_name(&format!("Atoll cluster authority {identity}"));
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        limit(&mut params, AUTHORITY_DAYS);
        write(&file, &params.self_signed(key)?.pem(), 0o644)?;
    }
    let pem = fs::read_to_string(&file).map_err(at(&file))?;
    Issuer::from_ca_cert_pem(&pem, key).map_err(content(&file))
}

fn issue_when_needed(
    directory: &Path,
    names: &[String],
    authority: &Issuer<'_, &KeyPair>,
) -> Result<(), PkiError> {
    let record = directory.join("server.json");
    let present: Option<Issued> = fs::read(&record)
        .ok()
        .and_then(|bytes| serde_json::from_slice(&bytes).ok());
    let soon = Timestamp::now() + (24 * RENEW_DAYS).hours();
    if present.is_some_and(|issued| issued.names == names && issued.until > soon) {
        return Ok(());
    }
    let mut params = CertificateParams::new(names)?;
    params.distinguished_name = common_name(names.first().map_or("atoll", String::as_str));
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    let until = limit(&mut params, SERVER_DAYS);
    let key = key(&directory.join("server.key"))?;
    let certificate = params.signed_by(&key, authority)?;
    write(&directory.join("server.pem"), &certificate.pem(), 0o644)?;
    let issued = Issued {
        names: names.to_vec(),
        until,
    };
    let text = serde_json::to_string(&issued).expect("names and a time serialise");
    write(&record, &text, 0o644)
}

/// The key in `file`; a new one when there is none.
fn key(file: &Path) -> Result<KeyPair, PkiError> {
    if !file.exists() {
        write(file, &KeyPair::generate()?.serialize_pem(), 0o600)?;
    }
    let pem = fs::read_to_string(file).map_err(at(file))?;
    KeyPair::from_pem(&pem).map_err(content(file))
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// Sets the validity to `days` from now (and a day back, for clocks that lag); returns its end.
fn limit(params: &mut CertificateParams, days: i64) -> Timestamp {
    let now = Timestamp::now();
    let until = now + (24 * days).hours();
    let date = |time: Timestamp| {
        let date = time.to_zoned(jiff::tz::TimeZone::UTC).date();
        let part = |n: i8| u8::try_from(n).expect("months and days are positive");
        rcgen::date_time_ymd(date.year().into(), part(date.month()), part(date.day()))
    };
    params.not_before = date(now - 24.hours());
    params.not_after = date(until);
    until
}

/// Writes a whole file under another name first, so that a crash leaves the old one or the new one.
fn write(file: &Path, text: &str, mode: u32) -> Result<(), PkiError> {
    let fresh = file.with_extension("new");
    let mut options = fs::OpenOptions::new();
    let options = options.write(true).create(true).truncate(true).mode(mode);
    options
        .open(&fresh)
        .and_then(|mut opened| {
            opened.write_all(text.as_bytes())?;
            opened.sync_all()
        })
        .and_then(|()| fs::rename(&fresh, file))
        .map_err(at(file))
}

fn at(path: &Path) -> impl FnOnce(io::Error) -> PkiError + '_ {
    move |source| PkiError::File {
        path: path.to_owned(),
        source,
    }
}

fn content<E: std::error::Error + Send + Sync + 'static>(
    path: &Path,
) -> impl FnOnce(E) -> PkiError + '_ {
    move |source| PkiError::Content {
        path: path.to_owned(),
        source: Box::new(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn certificates_are_kept_until_the_names_change() {
        let directory = tempfile::tempdir().unwrap();
        let read = |name: &str| fs::read_to_string(directory.path().join(name)).unwrap();
        let names = |list: &[&str]| list.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>();

        server_config(directory.path(), &names(&["n1", "127.0.0.1"])).unwrap();
        let (ca, server) = (read("ca.pem"), read("server.pem"));
        server_config(directory.path(), &names(&["n1", "127.0.0.1"])).unwrap();
        assert_eq!(
            (ca.clone(), server.clone()),
            (read("ca.pem"), read("server.pem"))
        );
        server_config(directory.path(), &names(&["n1", "127.0.0.1", "10.0.0.1"])).unwrap();
        assert_eq!(ca, read("ca.pem"));
        assert_ne!(server, read("server.pem"));
    }

    #[test]
    fn a_damaged_key_is_named() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("ca.key"), "nonsense").unwrap();
        let error = server_config(directory.path(), &["n1".to_owned()]).unwrap_err();
        assert!(error.to_string().contains("ca.key"), "{error}");
    }
}
