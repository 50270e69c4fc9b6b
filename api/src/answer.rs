// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! From a handler's result to the bytes that PVE's clients expect: envelopes, reason phrases, content type.
//!
//! Some clients read only the status line, others only the body, so an error's text is in both. This is the only
//! place that knows HTTP status codes; called by `serve` for every API request.

use atoll_manager::error::Error;
use axum::body::Body;
use bytes::Bytes;
use hyper::ext::ReasonPhrase;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue};
use hyper::{Response, StatusCode};
use serde_json::{Value, json};

/// The exact content type of every JSON answer: one widely used client compares the whole text.
pub const JSON: HeaderValue = HeaderValue::from_static("application/json;charset=UTF-8");

/// Longest reason phrase that is sent, in bytes; the body has the whole text.
const REASON_BYTES_MAX: usize = 512;

/// What is said when parameters do not fit. PVE's text.
const PARAMETERS: &str = "Parameter verification failed.";

/// What a handler gives back when it succeeds.
pub enum Answer {
    /// The value of `data`.
    Data(Value),
    /// The value of `data`, serialised already.
    Text(Bytes),
    /// A part of a longer list, with the length of the whole.
    Page {
        /// The part.
        data: Value,
        /// Length of the whole.
        total: u64,
    },
    /// Something else than an envelope: a file, or the switch to a websocket.
    Response(Box<Response<Body>>),
}

impl Answer {
    /// `{"data":null}`, the answer of what returns nothing.
    pub const NULL: Self = Self::Data(Value::Null);
}

/// The formats of `/api2/FORMAT/…` that are answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// HTTP status and envelope.
    Json,
    /// Always status 200; success is a member of the envelope.
    Extjs,
}

/// Why a request was not served, with what HTTP needs to say so.
#[derive(Debug)]
pub struct Refusal {
    /// The status.
    pub status: StatusCode,
    /// One line for people, and for clients that match on it.
    pub text: String,
    /// What is wrong with which parameter.
    pub errors: Vec<(String, String)>,
}

impl Refusal {
    /// A refusal without parameter errors.
    pub fn new(status: StatusCode, text: impl Into<String>) -> Self {
        Self {
            status,
            text: text.into(),
            errors: Vec::new(),
        }
    }

    /// Parameters that do not fit.
    pub fn parameters(errors: Vec<(String, String)>) -> Self {
        Error::Invalid(errors).into()
    }

    /// A path and method that Atoll does not serve.
    pub fn not_implemented(method: &hyper::Method, path: &str) -> Self {
        Self::new(
            StatusCode::NOT_IMPLEMENTED,
            format!("Method '{method} {path}' not implemented"),
        )
    }
}

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        let status = match &error {
            Error::Invalid(_) => StatusCode::BAD_REQUEST,
            Error::Denied(_) => StatusCode::FORBIDDEN,
            // PVE has no 404 and no 409: whatever dies answers 500, and clients read the text.
            Error::Refused(_) | Error::Interrupted | Error::Failed { .. } => {
                StatusCode::INTERNAL_SERVER_ERROR
            }
            Error::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        match error {
            Error::Invalid(errors) => Self {
                status,
                text: PARAMETERS.to_owned(),
                errors,
            },
            other => Self::new(status, other.chain()),
        }
    }
}

/// The response to an API request.
pub fn respond(format: Format, result: Result<Answer, Refusal>) -> Response<Body> {
    match (format, result) {
        (_, Ok(Answer::Response(response))) => *response,
        (Format::Json, Ok(answer)) => json_response(StatusCode::OK, success(&answer, "")),
        (Format::Extjs, Ok(answer)) => {
            json_response(StatusCode::OK, success(&answer, "\"success\":1,"))
        }
        (Format::Json, Err(refusal)) => {
            let mut response = json_response(refusal.status, failure(&refusal).to_string());
            if let Some(phrase) = reason(&refusal.text) {
                response.extensions_mut().insert(phrase);
            }
            response
        }
        (Format::Extjs, Err(refusal)) => {
            let mut body = failure(&refusal);
            body["success"] = json!(0);
            body["status"] = json!(refusal.status.as_u16());
            json_response(StatusCode::OK, body.to_string())
        }
    }
}

fn success(answer: &Answer, more: &str) -> Vec<u8> {
    let mut body = format!("{{{more}\"data\":").into_bytes();
    let written = match answer {
        Answer::Data(data) | Answer::Page { data, .. } => serde_json::to_writer(&mut body, data),
        Answer::Text(text) => {
            body.extend_from_slice(text);
            Ok(())
        }
        Answer::Response(_) => unreachable!("a whole response has no envelope"),
    };
    written.expect("a JSON value always serialises to memory");
    if let Answer::Page { total, .. } = answer {
        body.extend_from_slice(format!(",\"total\":{total}").as_bytes());
    }
    body.push(b'}');
    body
}

fn failure(refusal: &Refusal) -> Value {
    let mut body = json!({ "data": null, "message": format!("{}\n", refusal.text) });
    if !refusal.errors.is_empty() {
        let errors = refusal.errors.iter();
        body["errors"] = errors.map(|(k, v)| (k.clone(), json!(v))).collect();
    }
    body
}

fn json_response(status: StatusCode, body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::new(body.into());
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, JSON);
    response
        .headers_mut()
        .insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    response
}

/// `text` as a reason phrase: one line, without what could begin another header.
fn reason(text: &str) -> Option<ReasonPhrase> {
    let line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let mut end = line.len().min(REASON_BYTES_MAX);
    while !line.is_char_boundary(end) {
        end -= 1;
    }
    ReasonPhrase::try_from(line[..end].trim().as_bytes()).ok()
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    #[track_caller]
    fn check(format: Format, result: Result<Answer, Refusal>, expected: Expect) {
        let response = respond(format, result);
        let phrase = response.extensions().get::<ReasonPhrase>();
        let phrase = phrase.map(|p| String::from_utf8_lossy(p.as_bytes()).into_owned());
        let line = format!("{} {phrase:?}", response.status().as_u16());
        assert_eq!(
            response.headers()[CONTENT_TYPE],
            "application/json;charset=UTF-8"
        );
        let body = axum::body::to_bytes(response.into_body(), 1 << 20);
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        let body = runtime.unwrap().block_on(body).unwrap();
        let text = String::from_utf8(body.to_vec()).unwrap();
        expected.assert_eq(&format!("{line}\n{text}"));
    }

    #[test]
    fn success_envelopes() {
        check(
            Format::Json,
            Ok(Answer::NULL),
            expect![[r#"
            200 None
            {"data":null}"#]],
        );
        check(
            Format::Json,
            Ok(Answer::Page {
                data: json!([1]),
                total: 7,
            }),
            expect![[r#"
                200 None
                {"data":[1],"total":7}"#]],
        );
        check(
            Format::Extjs,
            Ok(Answer::Text(Bytes::from_static(b"[]"))),
            expect![[r#"
                200 None
                {"success":1,"data":[]}"#]],
        );
    }

    #[test]
    fn errors_are_in_the_status_line_and_in_the_body() {
        let wrong = || Refusal::parameters(vec![("vmid".into(), "invalid".into())]);
        check(
            Format::Json,
            Err(wrong()),
            expect![[r#"
            400 Some("Parameter verification failed.")
            {"data":null,"errors":{"vmid":"invalid"},"message":"Parameter verification failed.\n"}"#]],
        );
        check(
            Format::Extjs,
            Err(wrong()),
            expect![[r#"
            200 None
            {"data":null,"errors":{"vmid":"invalid"},"message":"Parameter verification failed.\n","status":400,"success":0}"#]],
        );
    }

    #[test]
    fn a_text_cannot_begin_another_header() {
        check(
            Format::Json,
            Err(Error::Refused("gone\r\nSet-Cookie: x".into()).into()),
            expect![[r#"
                500 Some("gone  Set-Cookie: x")
                {"data":null,"message":"gone\r Set-Cookie: x\n"}"#]],
        );
    }
}
