// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The web page's files, built from `api/web` and kept inside the binary.
//!
//! The page finds its own way by the URL (deep links), so that every path without a file is answered with
//! `index.html`. A binary that was built before the page says how to build it.

use axum::body::Body;
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, ETAG, HeaderValue, IF_NONE_MATCH};
use hyper::http::request::Parts;
use hyper::{Method, Response, StatusCode};

/// What the page's build writes. The folder may be absent: the binary then has no page.
#[derive(rust_embed::RustEmbed)]
#[folder = "web/dist"]
#[allow_missing = true]
struct Files;

const ABSENT: &str = "This atolld was built without its web page. Build it with `npm ci && npm run build` in api/web, \
                      then build atolld again. The API answers at /api2/json.\n";

/// What a page may load and do: everything from here and nothing from elsewhere. The terminal and the charts
/// set element styles, hence `unsafe-inline` for styles alone.
const CONTENT_SECURITY_POLICY: &str = "default-src 'self'; style-src 'self' 'unsafe-inline'; \
    img-src 'self' data:; connect-src 'self'; object-src 'none'; base-uri 'none'; \
    form-action 'self'; frame-ancestors 'none'";

/// Answers a request for anything outside the API.
pub fn respond(parts: &Parts) -> Response<Body> {
    if parts.method != Method::GET && parts.method != Method::HEAD {
        return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET here\n");
    }
    let path = parts.uri.path().trim_start_matches('/');
    let is_asset = path.starts_with("assets/");
    let (name, file) = match Files::get(path) {
        Some(file) => (path, file),
        None if is_asset => return plain(StatusCode::NOT_FOUND, "no such file\n"),
        None => match Files::get("index.html") {
            Some(file) => ("index.html", file),
            None => return plain(StatusCode::OK, ABSENT),
        },
    };
    let etag = etag(&file.metadata.sha256_hash());
    let known = parts.headers.get(IF_NONE_MATCH) == Some(&etag);
    let mut response = match (known, parts.method == Method::HEAD) {
        (true, _) | (_, true) => Response::new(Body::empty()),
        (false, false) => Response::new(Body::from(file.data)),
    };
    if known {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
    }
    // Names under assets/ carry a hash of their content; the rest is asked for again each time.
    let cache = match name.starts_with("assets/") {
        true => "public, max-age=31536000, immutable",
        false => "no-cache",
    };
    let headers = response.headers_mut();
    headers.insert(CACHE_CONTROL, HeaderValue::from_static(cache));
    headers.insert(ETAG, etag);
    if let Ok(kind) = HeaderValue::from_str(file.metadata.mimetype()) {
        headers.insert(CONTENT_TYPE, kind);
    }
    response
}

/// Sets the headers that keep a browser from being used against its owner; on every answer, API included.
pub fn secure(response: &mut Response<Body>) {
    let headers = response.headers_mut();
    for (name, value) in [
        ("content-security-policy", CONTENT_SECURITY_POLICY),
        ("x-content-type-options", "nosniff"),
        ("x-frame-options", "DENY"),
        ("referrer-policy", "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
}

fn etag(hash: &[u8; 32]) -> HeaderValue {
    let hex: String = hash[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    HeaderValue::from_str(&format!("\"{hex}\"")).expect("hexadecimal digits fit a header")
}

fn plain(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::from(text));
    *response.status_mut() = status;
    let kind = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}
