// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The command's side of the API: one HTTPS connection a request, signed in by ticket or token.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use axum::body::Body;
use http_body_util::BodyExt as _;
use hyper::Request;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use super::login::{Login, Secret};
use crate::route::Method;

/// Largest answer that is read, in bytes: a listing of 100,000 guests is about a third of it.
const ANSWER_BYTES_MAX: usize = 128 << 20;

/// Why a request had no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server could not be reached, or is not the one that the authority vouches for.
    #[error("cannot reach {url}: {reason}")]
    Unreachable {
        /// Where.
        url: String,
        /// Why.
        reason: String,
    },
    /// The settings do not allow to ask at all.
    #[error("{0}")]
    Settings(String),
    /// The server said no.
    #[error("{text}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// In its words, parameter errors included.
        text: String,
    },
    /// The server said something that is no answer of this API.
    #[error("{url} gave an answer that is none of Atoll's: {reason}")]
    Strange {
        /// Where.
        url: String,
        /// What was wrong with it.
        reason: String,
    },
}

/// A signed-in client.
pub struct Client {
    login: Login,
    host: String,
    port: u16,
    tls: Arc<ClientConfig>,
    session: Session,
}

/// What is sent with each request to say who asks.
enum Session {
    None,
    Ticket { ticket: String, csrf: String },
    Token(String),
}

impl Client {
    /// Reaches no server yet when the login is a token; otherwise signs in.
    pub async fn open(login: Login) -> Result<Self, ClientError> {
        let (host, port) = host_and_port(&login.url)?;
        let tls = Arc::new(tls_config(login.ca_file.as_deref())?);
        let mut client = Self {
            login,
            host,
            port,
            tls,
            session: Session::None,
        };
        client.session = match &client.login.secret {
            Secret::Token(token) => Session::Token(token.clone()),
            Secret::Ticket { ticket, csrf } => Session::Ticket {
                ticket: ticket.clone(),
                csrf: csrf.clone(),
            },
            Secret::Password { username, password } => {
                let form = [("username", username.as_str()), ("password", password)];
                let signed = client.call(Method::Post, "/access/ticket", &form).await?;
                let text = |key: &str| signed[key].as_str().unwrap_or_default().to_owned();
                Session::Ticket {
                    ticket: text("ticket"),
                    csrf: text("CSRFPreventionToken"),
                }
            }
        };
        Ok(client)
    }

    /// The ticket and its CSRF token, when signed in by password.
    pub fn ticket(&self) -> Option<(&str, &str)> {
        match &self.session {
            Session::Ticket { ticket, csrf } => Some((ticket, csrf)),
            _ => None,
        }
    }

    /// Makes one request; returns `data`.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        params: &[(impl AsRef<str>, impl AsRef<str>)],
    ) -> Result<Value, ClientError> {
        let mut form = form_urlencoded::Serializer::new(String::new());
        form.extend_pairs(params);
        let form = form.finish();
        let in_query = matches!(method, Method::Get | Method::Delete);
        let uri = match in_query && !form.is_empty() {
            true => format!("/api2/json{}?{form}", encode(path)),
            false => format!("/api2/json{}", encode(path)),
        };
        let request = self.request(method, &uri)?;
        let request = match in_query {
            true => request.body(Body::empty()),
            false => request
                .header("content-type", "application/x-www-form-urlencoded")
                .body(Body::from(form)),
        };
        let request = request.map_err(|error| ClientError::Settings(error.to_string()))?;
        self.send(request).await
    }

    /// A request that says who asks, without its body.
    pub fn request(
        &self,
        method: Method,
        uri: &str,
    ) -> Result<hyper::http::request::Builder, ClientError> {
        let mut request = Request::builder().method(method.name()).uri(uri);
        request = request.header("host", format!("{}:{}", self.host, self.port));
        Ok(match &self.session {
            Session::None => request,
            Session::Token(token) => {
                request.header("authorization", format!("PVEAPIToken={token}"))
            }
            Session::Ticket { ticket, csrf } => request
                .header("authorization", format!("PVEAuthCookie={ticket}"))
                .header("csrfpreventiontoken", csrf),
        })
    }

    /// Sends a whole request; returns `data`.
    pub async fn send(&self, request: Request<Body>) -> Result<Value, ClientError> {
        let stream = self.connect().await?;
        let exchange = async {
            let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
            let connection = tokio::spawn(connection);
            let response = sender.send_request(request).await?;
            let (head, body) = response.into_parts();
            let body = http_body_util::Limited::new(body, ANSWER_BYTES_MAX);
            let bytes = body.collect().await;
            connection.abort();
            Ok::<_, hyper::Error>((head, bytes))
        };
        let (head, bytes) = exchange.await.map_err(|error| self.unreachable(error))?;
        let bytes = bytes.map_err(|error| self.strange(error))?.to_bytes();
        let mut body: Value = match serde_json::from_slice(&bytes) {
            Ok(body) => body,
            Err(error) => return Err(self.strange(format!("{}: {error}", head.status))),
        };
        if head.status.is_success() {
            return Ok(body["data"].take());
        }
        Err(ClientError::Refused {
            status: head.status.as_u16(),
            text: refusal_text(&body),
        })
    }

    /// A TLS connection to the server.
    pub async fn connect(&self) -> Result<TlsStream<TcpStream>, ClientError> {
        let name = ServerName::try_from(self.host.clone())
            .map_err(|_| ClientError::Settings(format!("'{}' is no host name", self.host)))?;
        let stream = TcpStream::connect((self.host.as_str(), self.port)).await;
        let stream = stream.map_err(|error| self.unreachable(error))?;
        let connector = TlsConnector::from(Arc::clone(&self.tls));
        let stream = connector.connect(name, stream).await;
        stream.map_err(|error| self.unreachable(error))
    }

    fn unreachable(&self, error: impl std::fmt::Display) -> ClientError {
        ClientError::Unreachable {
            url: self.login.url.clone(),
            reason: error.to_string(),
        }
    }

    fn strange(&self, error: impl std::fmt::Display) -> ClientError {
        ClientError::Strange {
            url: self.login.url.clone(),
            reason: error.to_string(),
        }
    }
}

/// A path as it may stand in a URL: slashes stay.
fn encode(path: &str) -> String {
    const KEPT: percent_encoding::AsciiSet = percent_encoding::NON_ALPHANUMERIC
        .remove(b'/')
        .remove(b'-')
        .remove(b'_')
        .remove(b'.')
        .remove(b'~')
        .remove(b':')
        .remove(b'@')
        .remove(b'!');
    percent_encoding::utf8_percent_encode(path, &KEPT).to_string()
}

fn refusal_text(body: &Value) -> String {
    let message = body["message"].as_str().unwrap_or("no reason given");
    let message = message.trim().replace('\n', " ");
    let Some(errors) = body["errors"].as_object() else {
        return message;
    };
    let each = errors.iter().map(|(name, text)| {
        let text = text.as_str().unwrap_or_default();
        format!("{name}: {text}")
    });
    format!("{message} {}", each.collect::<Vec<_>>().join("; "))
}

fn host_and_port(url: &str) -> Result<(String, u16), ClientError> {
    let wrong = || ClientError::Settings(format!("'{url}' is not like https://HOST:8006"));
    let rest = url.strip_prefix("https://").ok_or_else(wrong)?;
    let authority = rest.split('/').next().unwrap_or_default();
    let uri: hyper::http::uri::Authority = authority.parse().map_err(|_| wrong())?;
    let host = uri.host().trim_matches(['[', ']']).to_owned();
    match host.is_empty() {
        true => Err(wrong()),
        false => Ok((host, uri.port_u16().unwrap_or(8006))),
    }
}

fn tls_config(ca_file: Option<&Path>) -> Result<ClientConfig, ClientError> {
    let Some(file) = ca_file.map(PathBuf::from) else {
        let text =
            "no certificate authority to trust: give --ca-file (the server's is STATE/pki/ca.pem)";
        return Err(ClientError::Settings(text.to_owned()));
    };
    let wrong = |error: String| ClientError::Settings(format!("{}: {error}", file.display()));
    let certificate = CertificateDer::from_pem_file(&file).map_err(|e| wrong(e.to_string()))?;
    let mut roots = RootCertStore::empty();
    roots.add(certificate).map_err(|e| wrong(e.to_string()))?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|e| ClientError::Settings(e.to_string()))?;
    Ok(builder.with_root_certificates(roots).with_no_client_auth())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_taken_apart() {
        let parse = |url| host_and_port(url).ok();
        assert_eq!(
            parse("https://localhost:8006"),
            Some(("localhost".into(), 8006))
        );
        assert_eq!(parse("https://[::1]:1/"), Some(("::1".into(), 1)));
        assert_eq!(parse("https://n1"), Some(("n1".into(), 8006)));
        assert_eq!(parse("http://n1"), None);
        assert_eq!(parse("https://"), None);
    }

    #[test]
    fn refusals_are_one_line() {
        let body = serde_json::json!({"message": "wrong.\n", "errors": {"a": "b"}});
        assert_eq!(refusal_text(&body), "wrong. a: b");
    }
}
