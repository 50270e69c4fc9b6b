// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a request says: its format and path, its parameters (query, form or JSON body) and its credentials.
//!
//! Texts only; what they should be is checked against the route's schema in `route`.

use axum::body::Body;
use hyper::header::{AUTHORIZATION, CONTENT_TYPE, COOKIE};
use hyper::http::request::Parts;
use hyper::{HeaderMap, StatusCode};
use percent_encoding::percent_decode_str;
use serde_json::Value;

use crate::answer::{Format, Refusal};

/// Largest body of parameters, in bytes. PVE's value; uploads are streams and not limited here.
const BODY_BYTES_MAX: usize = 512 << 10;

/// Name of the login cookie, and of the scheme in `Authorization` that carries the same ticket.
const COOKIE_NAME: &str = "PVEAuthCookie";
/// Scheme in `Authorization` of API tokens.
const TOKEN_SCHEME: &str = "PVEAPIToken";

/// Parameters as sent, in order; a name may come more than once.
pub type Sent = Vec<(String, String)>;

/// Splits `/api2/FORMAT/PATH` into the format and the decoded parts of the path. `None`: not an API path.
pub fn api_path(path: &str) -> Option<Result<(Format, Vec<String>), Refusal>> {
    let rest = path.strip_prefix("/api2/")?;
    let (format, rest) = rest.split_once('/').unwrap_or((rest, ""));
    let format = match format {
        "json" => Format::Json,
        "extjs" => Format::Extjs,
        other => {
            let text = format!("no such format '{other}': use json or extjs");
            return Some(Err(Refusal::new(StatusCode::NOT_IMPLEMENTED, text)));
        }
    };
    let decode = |part: &str| percent_decode_str(part).decode_utf8_lossy().into_owned();
    let parts = rest.split('/').filter(|part| !part.is_empty());
    Some(Ok((format, parts.map(decode).collect())))
}

/// The parameters in the query, without the page's cache breaker.
pub fn query(parts: &Parts) -> Sent {
    form(parts.uri.query().unwrap_or_default().as_bytes())
}

fn form(bytes: &[u8]) -> Sent {
    form_urlencoded::parse(bytes)
        .filter(|(name, _)| name != "_dc")
        .map(|(name, value)| (name.into_owned(), value.into_owned()))
        .collect()
}

/// The parameters of a body that is a form or a JSON object.
pub async fn body(parts: &Parts, body: Body) -> Result<Sent, Refusal> {
    let bytes = axum::body::to_bytes(body, BODY_BYTES_MAX)
        .await
        .map_err(|_| {
            let text = format!("request body is longer than {BODY_BYTES_MAX} bytes or was cut off");
            Refusal::new(StatusCode::PAYLOAD_TOO_LARGE, text)
        })?;
    if bytes.is_empty() {
        return Ok(Sent::new());
    }
    match media_type(&parts.headers).as_str() {
        "" | "application/x-www-form-urlencoded" => Ok(form(&bytes)),
        "application/json" => json(&bytes),
        other => {
            let text = format!(
                "unsupported content type '{other}': send a form (application/x-www-form-urlencoded) or application/json"
            );
            Err(Refusal::new(StatusCode::UNSUPPORTED_MEDIA_TYPE, text))
        }
    }
}

/// Media type of the body, in lower case and without its parameters.
pub fn media_type(headers: &HeaderMap) -> String {
    let value = headers.get(CONTENT_TYPE).and_then(|v| v.to_str().ok());
    let value = value.unwrap_or_default().split(';').next();
    value.unwrap_or_default().trim().to_ascii_lowercase()
}

fn json(bytes: &[u8]) -> Result<Sent, Refusal> {
    let bad = |text: String| Refusal::new(StatusCode::BAD_REQUEST, text);
    let object: serde_json::Map<String, Value> = serde_json::from_slice(bytes)
        .map_err(|error| bad(format!("the body is not a JSON object: {error}")))?;
    let mut sent = Sent::new();
    for (name, value) in object {
        let values = match value {
            Value::Array(values) => values,
            value => vec![value],
        };
        for value in values {
            let text = match value {
                Value::Null => continue,
                Value::Bool(true) => "1".to_owned(),
                Value::Bool(false) => "0".to_owned(),
                Value::Number(number) => number.to_string(),
                Value::String(text) => text,
                Value::Array(_) | Value::Object(_) => {
                    let text = "type check ('string') failed - got a nested value".to_owned();
                    return Err(Refusal::parameters(vec![(name, text)]));
                }
            };
            sent.push((name.clone(), text));
        }
    }
    Ok(sent)
}

/// Who the caller claims to be.
#[derive(Debug, PartialEq, Eq)]
pub enum Credentials {
    /// A login ticket.
    Ticket(String),
    /// An API token: `user@realm!name` and its secret.
    Token {
        /// `user@realm!name`.
        id: String,
        /// The secret.
        secret: String,
    },
}

/// The credentials in the headers: `Authorization` is looked at first.
pub fn credentials(headers: &HeaderMap) -> Option<Credentials> {
    let text = |name| headers.get_all(name).iter().filter_map(|v| v.to_str().ok());
    for value in text(AUTHORIZATION) {
        let value = value.trim();
        if let Some(token) = scheme(value, TOKEN_SCHEME) {
            let (id, secret) = token.split_once('=')?;
            return Some(Credentials::Token {
                id: percent_decode_str(id).decode_utf8_lossy().into_owned(),
                secret: secret.to_owned(),
            });
        }
        if let Some(ticket) = scheme(value, COOKIE_NAME) {
            return Some(ticket_of(ticket));
        }
    }
    text(COOKIE)
        .flat_map(|line| line.split(';'))
        .find_map(|pair| scheme(pair.trim(), COOKIE_NAME))
        .map(ticket_of)
}

/// What follows `name=` or `name `.
fn scheme<'a>(value: &'a str, name: &str) -> Option<&'a str> {
    value.strip_prefix(name)?.strip_prefix(['=', ' '])
}

fn ticket_of(text: &str) -> Credentials {
    let text = text.trim().trim_matches('"');
    Credentials::Ticket(percent_decode_str(text).decode_utf8_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check_credentials(name: &'static str, value: &str, expected: Option<Credentials>) {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().unwrap());
        assert_eq!(credentials(&headers), expected, "{name}: {value}");
    }

    #[test]
    fn credentials_in_each_form() {
        let ticket = || Some(Credentials::Ticket("PVE:a@pve:00::x+y".to_owned()));
        check_credentials(
            "cookie",
            "x=1; PVEAuthCookie=PVE%3Aa@pve%3A00%3A%3Ax%2By",
            ticket(),
        );
        check_credentials("cookie", "PVEAuthCookie=PVE:a@pve:00::x+y", ticket());
        check_credentials("authorization", "PVEAuthCookie=PVE:a@pve:00::x+y", ticket());
        let token = Some(Credentials::Token {
            id: "a@pve!ci".to_owned(),
            secret: "s=t".to_owned(),
        });
        check_credentials("authorization", "PVEAPIToken=a@pve!ci=s=t", token);
        check_credentials("authorization", "Basic abc", None);
        check_credentials("cookie", "PVEAuthCookies=1", None);
    }

    #[test]
    fn paths_are_decoded_after_they_are_split() {
        let (format, parts) =
            api_path("/api2/json/nodes/n1/storage/local/content/local:iso%2Fa.iso")
                .unwrap()
                .unwrap();
        assert_eq!(format, Format::Json);
        assert_eq!(parts.last().unwrap(), "local:iso/a.iso");
        assert!(api_path("/index.html").is_none());
        assert!(api_path("/api2/html/nodes").unwrap().is_err());
        assert_eq!(api_path("/api2/json").unwrap().unwrap().1, [""; 0]);
    }

    #[test]
    fn json_bodies_become_texts_and_lists_repeat() {
        let sent = json(br#"{"a":1,"b":true,"c":["x","y"],"d":null,"e":1.5}"#).unwrap();
        let sent: Vec<_> = sent.iter().map(|(k, v)| format!("{k}={v}")).collect();
        assert_eq!(sent, ["a=1", "b=1", "c=x", "c=y", "e=1.5"]);
        assert!(json(br#"{"a":{"b":1}}"#).is_err());
        assert!(json(b"[1]").is_err());
    }
}
