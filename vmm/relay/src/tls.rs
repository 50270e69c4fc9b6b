// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What protects a machine on its way: TLS 1.3, with a certificate on either side that one authority has signed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use atoll_vmm::cli::NetworkArguments;
use rustls::crypto::CryptoProvider;
use rustls::crypto::aws_lc_rs::default_provider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

use crate::session::Session;
use crate::{Address, RelayError};

/// Whether the network is trusted.
#[derive(Debug, Clone)]
pub enum Protection {
    /// By nobody: TLS.
    Tls(TlsFiles),
    /// By somebody who has said so.
    Insecure,
}

/// PEM files.
#[derive(Debug, Clone)]
pub struct TlsFiles {
    /// Certificates of the authorities that sign the other side's certificate.
    pub ca: PathBuf,
    /// This side's certificate, and those between it and the authority's.
    pub certificate: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

impl Protection {
    /// What a caller's files and his word amount to; `address` is for the refusal.
    pub fn of(network: &NetworkArguments, address: &Address) -> Result<Self, RelayError> {
        let files = [&network.tls_ca, &network.tls_cert, &network.tls_key].map(Clone::clone);
        match (files, network.insecure) {
            ([Some(ca), Some(certificate), Some(key)], false) => Ok(Self::Tls(TlsFiles {
                ca,
                certificate,
                key,
            })),
            ([None, None, None], true) => Ok(Self::Insecure),
            (_, true) => Err(RelayError::Contradiction),
            (_, false) => Err(RelayError::Unprotected(address.to_string())),
        }
    }
}

/// Makes the client's end of connections.
pub(crate) enum Client {
    Tls(Arc<ClientConfig>, ServerName<'static>),
    Insecure,
}

impl Client {
    /// For a target whose certificate is for `name`.
    pub(crate) fn new(protection: &Protection, name: &str) -> Result<Self, RelayError> {
        let Protection::Tls(files) = protection else {
            return Ok(Self::Insecure);
        };
        let builder = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(RelayError::Tls)?;
        let config = builder
            .with_root_certificates(authorities(&files.ca)?)
            .with_client_auth_cert(
                certificates("TLS certificate", &files.certificate)?,
                key(&files.key)?,
            )
            .map_err(RelayError::Tls)?;
        let server = ServerName::try_from(name.to_owned());
        let server = server.map_err(|_| RelayError::Name(name.to_owned()))?;
        Ok(Self::Tls(Arc::new(config), server))
    }

    pub(crate) fn session(&self) -> Result<Session, RelayError> {
        match self {
            Self::Insecure => Ok(Session::plain()),
            Self::Tls(config, name) => {
                let connection = ClientConnection::new(config.clone(), name.clone());
                Ok(Session::tls(connection.map_err(RelayError::Tls)?.into()))
            }
        }
    }
}

/// Makes the server's end of connections.
pub(crate) enum Server {
    Tls(Arc<ServerConfig>),
    Insecure,
}

impl Server {
    pub(crate) fn new(protection: &Protection) -> Result<Self, RelayError> {
        let Protection::Tls(files) = protection else {
            return Ok(Self::Insecure);
        };
        let roots = Arc::new(authorities(&files.ca)?);
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider()).build();
        let verifier = verifier.map_err(|error| RelayError::File {
            what: "TLS authority",
            path: files.ca.clone(),
            reason: error.to_string(),
        })?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(RelayError::Tls)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(
                certificates("TLS certificate", &files.certificate)?,
                key(&files.key)?,
            )
            .map_err(RelayError::Tls)?;
        // The first random bytes look for devices, which is over when the sandbox comes.
        let drawn = provider().secure_random.fill(&mut [0; 32]);
        drawn.map_err(|error| RelayError::Tls(error.into()))?;
        // Nobody comes again with a ticket.
        config.send_tls13_tickets = 0;
        Ok(Self::Tls(Arc::new(config)))
    }

    pub(crate) fn session(&self) -> Result<Session, RelayError> {
        match self {
            Self::Insecure => Ok(Session::plain()),
            Self::Tls(config) => {
                let connection = ServerConnection::new(config.clone());
                Ok(Session::tls(connection.map_err(RelayError::Tls)?.into()))
            }
        }
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(default_provider())
}

fn unreadable(
    what: &'static str,
    path: &Path,
) -> impl FnOnce(rustls::pki_types::pem::Error) -> RelayError {
    move |error| RelayError::File {
        what,
        path: path.to_owned(),
        reason: error.to_string(),
    }
}

fn certificates(
    what: &'static str,
    path: &Path,
) -> Result<Vec<CertificateDer<'static>>, RelayError> {
    let found = CertificateDer::pem_file_iter(path).and_then(Iterator::collect);
    let found: Vec<_> = found.map_err(unreadable(what, path))?;
    match found.is_empty() {
        false => Ok(found),
        true => Err(RelayError::File {
            what,
            path: path.to_owned(),
            reason: "there is no certificate in it".to_owned(),
        }),
    }
}

fn key(path: &Path) -> Result<PrivateKeyDer<'static>, RelayError> {
    PrivateKeyDer::from_pem_file(path).map_err(unreadable("TLS key", path))
}

fn authorities(path: &Path) -> Result<RootCertStore, RelayError> {
    let mut store = RootCertStore::empty();
    for certificate in certificates("TLS authority", path)? {
        store.add(certificate).map_err(RelayError::Tls)?;
    }
    Ok(store)
}
