// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One HTTP/1.1 message on a stream: read with bounds, written at once. Used by the client here and by the
//! server in `atoll-vmm`.
//!
//! Not a general HTTP implementation: bodies have a `Content-Length` (no chunked encoding), a connection
//! carries one exchange.

use std::io::{self, Read, Write};

/// Longest head (first line and header fields) that is read, in bytes.
pub const HEAD_BYTES_MAX: usize = 8 << 10;
/// Longest body that is read, in bytes.
pub const BODY_BYTES_MAX: usize = 1 << 20;
/// Most header fields in a message.
const HEADERS_MAX: usize = 32;

/// Why a message could not be read.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The stream failed or its deadline passed.
    #[error("read from the socket")]
    Io(#[from] io::Error),
    /// The other side closed the connection before a whole message.
    #[error("the connection was closed in the middle of a message")]
    Closed,
    /// Not HTTP/1.1 as spoken here.
    #[error("malformed HTTP message: {0}")]
    Malformed(&'static str),
    /// Longer than the bounds above.
    #[error("HTTP message longer than {0} bytes")]
    TooLong(usize),
}

/// A request's first line and body.
#[derive(Debug, PartialEq, Eq)]
pub struct RequestMessage {
    /// `GET`, `PUT`, …
    pub method: String,
    /// Path with its query, as sent.
    pub target: String,
    /// Body; empty when there is none.
    pub body: Vec<u8>,
}

/// A response's status and body.
#[derive(Debug, PartialEq, Eq)]
pub struct ResponseMessage {
    /// Three-digit status.
    pub status: u16,
    /// Body; empty when there is none.
    pub body: Vec<u8>,
}

/// Reads one request.
pub fn read_request(stream: &mut impl Read) -> Result<RequestMessage, MessageError> {
    let (head, rest) = read_head(stream)?;
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut request = httparse::Request::new(&mut headers);
    match request.parse(&head) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(MessageError::Malformed("incomplete head")),
        Err(_) => return Err(MessageError::Malformed("request line or header field")),
    }
    let length = content_length(request.headers)?;
    Ok(RequestMessage {
        method: request.method.unwrap_or_default().to_owned(),
        target: request.path.unwrap_or_default().to_owned(),
        body: read_body(stream, rest, length)?,
    })
}

/// Reads one response.
pub fn read_response(stream: &mut impl Read) -> Result<ResponseMessage, MessageError> {
    let (head, rest) = read_head(stream)?;
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut response = httparse::Response::new(&mut headers);
    match response.parse(&head) {
        Ok(httparse::Status::Complete(_)) => {}
        Ok(httparse::Status::Partial) => return Err(MessageError::Malformed("incomplete head")),
        Err(_) => return Err(MessageError::Malformed("status line or header field")),
    }
    let length = content_length(response.headers)?;
    Ok(ResponseMessage {
        status: response
            .code
            .ok_or(MessageError::Malformed("no status code"))?,
        body: read_body(stream, rest, length)?,
    })
}

/// Writes a request in one piece.
pub fn write_request(
    stream: &mut impl Write,
    method: &str,
    target: &str,
    body: &[u8],
) -> io::Result<()> {
    let head = format!(
        "{method} {target} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n\
         Content-Length: {}\r\nConnection: close\r\n\r\n",
        body.len()
    );
    write_once(stream, head, body)
}

/// Writes a JSON response in one piece.
pub fn write_response(stream: &mut impl Write, status: u16, body: &[u8]) -> io::Result<()> {
    let head = format!(
        "HTTP/1.1 {status} {}\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\
         Connection: close\r\n\r\n",
        reason(status),
        body.len()
    );
    write_once(stream, head, body)
}

fn write_once(stream: &mut impl Write, head: String, body: &[u8]) -> io::Result<()> {
    let mut bytes = head.into_bytes();
    bytes.extend_from_slice(body);
    stream.write_all(&bytes)
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        409 => "Conflict",
        413 => "Content Too Large",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

/// Reads up to and including the empty line; also gives what came behind it.
fn read_head(stream: &mut impl Read) -> Result<(Vec<u8>, Vec<u8>), MessageError> {
    let mut bytes = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        if let Some(at) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
            let rest = bytes.split_off(at + 4);
            return Ok((bytes, rest));
        }
        if bytes.len() > HEAD_BYTES_MAX {
            return Err(MessageError::TooLong(HEAD_BYTES_MAX));
        }
        match stream.read(&mut chunk)? {
            0 => return Err(MessageError::Closed),
            count => bytes.extend_from_slice(&chunk[..count]),
        }
    }
}

fn content_length(headers: &[httparse::Header<'_>]) -> Result<usize, MessageError> {
    let mut length = 0;
    for header in headers {
        if header.name.eq_ignore_ascii_case("transfer-encoding") {
            return Err(MessageError::Malformed("transfer encodings are not spoken"));
        }
        if header.name.eq_ignore_ascii_case("content-length") {
            length = std::str::from_utf8(header.value)
                .ok()
                .and_then(|text| text.trim().parse().ok())
                .ok_or(MessageError::Malformed("Content-Length is not a number"))?;
        }
    }
    if length > BODY_BYTES_MAX {
        return Err(MessageError::TooLong(BODY_BYTES_MAX));
    }
    Ok(length)
}

fn read_body(
    stream: &mut impl Read,
    mut body: Vec<u8>,
    length: usize,
) -> Result<Vec<u8>, MessageError> {
    if body.len() > length {
        return Err(MessageError::Malformed("bytes behind the body"));
    }
    let read = body.len();
    body.resize(length, 0);
    stream.read_exact(&mut body[read..]).map_err(|error| {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            MessageError::Closed
        } else {
            MessageError::Io(error)
        }
    })?;
    Ok(body)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(bytes: &[u8], expected: &str) {
        let answer = match read_request(&mut &*bytes) {
            Ok(request) => format!(
                "{} {} {}",
                request.method,
                request.target,
                request.body.len()
            ),
            Err(error) => error.to_string(),
        };
        assert_eq!(answer, expected);
    }

    #[test]
    fn requests_are_read_within_bounds() {
        check(b"GET /info HTTP/1.1\r\n\r\n", "GET /info 0");
        check(
            b"PUT /pause HTTP/1.1\r\ncontent-length: 2\r\n\r\n{}",
            "PUT /pause 2",
        );
        check(
            b"PUT /pause HTTP/1.1\r\nContent-Length: 3\r\n\r\n{}",
            "the connection was closed in the middle of a message",
        );
        check(
            b"GET /info",
            "the connection was closed in the middle of a message",
        );
        check(
            b"PUT / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n",
            "HTTP message longer than 1048576 bytes",
        );
        check(
            b"PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
            "malformed HTTP message: transfer encodings are not spoken",
        );
        check(
            b"\0\0\0\r\n\r\n",
            "malformed HTTP message: request line or header field",
        );
        check(&vec![b'a'; 10_000], "HTTP message longer than 8192 bytes");
    }

    #[test]
    fn a_response_is_read_as_it_was_written() {
        let mut bytes = Vec::new();
        write_response(&mut bytes, 409, b"{\"error\":\"x\"}").unwrap();
        let response = read_response(&mut bytes.as_slice()).unwrap();
        assert_eq!(
            (response.status, response.body.as_slice()),
            (409, b"{\"error\":\"x\"}".as_slice())
        );
    }
}
