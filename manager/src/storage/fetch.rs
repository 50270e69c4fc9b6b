// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Fetching a file over HTTP or HTTPS, with progress lines for a task's log. A connection that breaks is made again and
//! goes on at the byte where it broke, when the server can do that and still has the same file.
//!
//! ```text
//! GET ──► 200: the whole ──► … broken ──► wait ──► GET, Range and If-Range ──┬─► 206: the rest
//!                                                             ▲              └─► 200: another file: from the beginning
//! an earlier task's unfinished file, with a mark that fits ───┘
//! ```

use std::time::{Duration, Instant};

use reqwest::StatusCode;
use reqwest::header::{
    CONTENT_RANGE, DATE, ETAG, HeaderMap, HeaderName, HeaderValue, IF_RANGE, LAST_MODIFIED, RANGE,
};
use tokio::fs::File;
use tokio::io::{AsyncSeekExt, AsyncWriteExt};

use crate::error::Error;
use crate::oci::digest::Digest;
use crate::storage::incoming::Incoming;

/// Longest silence of the server.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Time between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(3);
/// Redirects that are followed.
const REDIRECTS_MAX: usize = 5;

/// Waits for [`Limits::waits`]: a server that starts again, or a link that was down, is back after this minute.
pub const WAITS: &[Duration] = &[
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(4),
    Duration::from_secs(8),
    Duration::from_secs(15),
    Duration::from_secs(30),
];

/// What a download is allowed to do.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest file, in bytes: normally what is available on the storage.
    pub size_bytes_max: u64,
    /// Whether certificates are checked.
    pub verify_certificates: bool,
    /// How long to wait before each further try, once the server has answered and the connection broke. Every byte
    /// beyond the former ones starts them anew; after the last one the download has failed.
    pub waits: &'static [Duration],
}

/// What a server tells about a file: PVE's `query-url-metadata`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UrlMetadata {
    /// Size in bytes, when told.
    pub size_bytes: Option<u64>,
    /// Media type, when told.
    pub mime_type: Option<String>,
    /// Last part of the path.
    pub file_name: Option<String>,
}

/// Asks the server without downloading.
pub async fn metadata(url: &str, limits: Limits) -> Result<UrlMetadata, Error> {
    let response = client(limits)?
        .head(checked(url)?)
        .send()
        .await
        .and_then(reqwest::Response::error_for_status)
        .map_err(|error| Error::failed("cannot reach the URL".to_owned(), error))?;
    let header = |name: &str| {
        let value = response.headers().get(name)?;
        value.to_str().ok().map(str::to_owned)
    };
    let file_name = response
        .url()
        .path_segments()
        .and_then(|mut parts| parts.next_back().map(str::to_owned))
        .filter(|name| !name.is_empty());
    Ok(UrlMetadata {
        size_bytes: header("content-length").and_then(|text| text.parse().ok()),
        mime_type: header("content-type"),
        file_name,
    })
}

/// Writes what the URL delivers to `incoming`, which the caller then commits.
pub async fn fetch(
    url: &str,
    incoming: &Incoming,
    limits: Limits,
    log: &(dyn Fn(&str) + Sync),
) -> Result<u64, Error> {
    let url = checked(url)?;
    log(&format!(
        "downloading {url} to {}",
        incoming.destination().display()
    ));
    let file = File::options().write(true).open(incoming.path()).await;
    let mut transfer = Transfer {
        client: client(limits)?,
        url,
        file: file.map_err(|error| write_failed(incoming, error))?,
        incoming,
        limits,
        log,
        begun: false,
        received: 0,
        expected: None,
        validator: None,
        told: Instant::now(),
    };
    transfer.take_up().await?;
    let mut waits = limits.waits.iter();
    let mut furthest = 0;
    loop {
        let error = match transfer.attempt().await {
            Ok(()) => break,
            Err(Stop::Final(error)) => return Err(error),
            Err(Stop::Broken(error)) => error,
        };
        if transfer.received > furthest {
            furthest = transfer.received;
            waits = limits.waits.iter();
        }
        let Some(wait) = waits.next() else {
            return Err(error);
        };
        log(&format!(
            "broken off after {} bytes: {}; trying again in {} s",
            transfer.received,
            error.chain(),
            wait.as_secs()
        ));
        tokio::time::sleep(*wait).await;
    }
    // Whole: if it is not the right one, nobody shall go on with it.
    incoming.clear_mark();
    log(&progress(transfer.received, Some(transfer.received)));
    Ok(transfer.received)
}

/// Why an attempt ended before the file did.
enum Stop {
    /// Another attempt may succeed.
    Broken(Error),
    /// None will.
    Final(Error),
}

/// A download under way, over as many connections as it takes.
struct Transfer<'a> {
    client: reqwest::Client,
    url: reqwest::Url,
    file: File,
    incoming: &'a Incoming,
    limits: Limits,
    log: &'a (dyn Fn(&str) + Sync),
    /// The server has begun to send the file. Before that nothing is tried twice: the URL may be wrong.
    begun: bool,
    /// Bytes of the file that are here.
    received: u64,
    /// Its size in bytes, when told.
    expected: Option<u64>,
    /// What the server tells this very file from a later one by, when it does.
    validator: Option<(HeaderName, HeaderValue)>,
    /// When the last line of progress was written.
    told: Instant,
}

impl Transfer<'_> {
    /// Goes on with what an earlier task has left of the same file, when the server can tell that it still is.
    async fn take_up(&mut self) -> Result<(), Error> {
        let mark = self.incoming.mark();
        let mark = mark.and_then(|text| Mark::parse(&text, &self.url));
        let size = self.file.seek(std::io::SeekFrom::End(0)).await;
        let size = size.map_err(|error| write_failed(self.incoming, error))?;
        let is_less = |whole: u64| size < whole;
        let Some(mark) = mark.filter(|mark| size > 0 && mark.expected.is_none_or(is_less)) else {
            return Ok(());
        };
        (self.log)(&format!("an earlier task has left {size} bytes of it"));
        self.received = size;
        self.expected = mark.expected;
        self.validator = Some(mark.validator);
        Ok(())
    }

    /// One connection: asks for what is missing and takes what comes.
    async fn attempt(&mut self) -> Result<(), Stop> {
        let mut request = self.client.get(self.url.clone());
        if let (Some((_, value)), 1..) = (&self.validator, self.received) {
            request = request
                .header(RANGE, format!("bytes={}-", self.received))
                .header(IF_RANGE, value);
        }
        let answer = request.send().await;
        let is_past =
            |response: &reqwest::Response| response.status() == StatusCode::RANGE_NOT_SATISFIABLE;
        if !self.begun && self.received > 0 && answer.as_ref().is_ok_and(is_past) {
            return Err(self.other_part());
        }
        let mut response = answer
            .and_then(reqwest::Response::error_for_status)
            .map_err(|error| self.stopped(error))?;
        match response.status() {
            StatusCode::PARTIAL_CONTENT => self.go_on(response.headers())?,
            _ => self.begin(&response).await?,
        }
        while let Some(chunk) = response.chunk().await.map_err(|e| self.stopped(e))? {
            self.received += chunk.len() as u64;
            if self.received > self.limits.size_bytes_max {
                return Err(Stop::Final(too_large(self.limits)));
            }
            let written = self.file.write_all(&chunk).await;
            written.map_err(|error| self.unwritten(error))?;
            if self.told.elapsed() >= PROGRESS_EVERY {
                self.told = Instant::now();
                (self.log)(&progress(self.received, self.expected));
            }
        }
        let flushed = self.file.flush().await;
        flushed.map_err(|error| self.unwritten(error))?;
        match self.expected.is_none_or(|size| size == self.received) {
            true => Ok(()),
            false => Err(Stop::Broken(Error::Refused(format!(
                "download ended early, after {} bytes",
                self.received
            )))),
        }
    }

    /// The server sends the file from its first byte.
    async fn begin(&mut self, response: &reqwest::Response) -> Result<(), Stop> {
        if self.received > 0 {
            (self.log)("the server sends the file from its beginning");
        }
        self.expected = response.content_length();
        if self
            .expected
            .is_some_and(|size| size > self.limits.size_bytes_max)
        {
            return Err(Stop::Final(too_large(self.limits)));
        }
        self.incoming.clear_mark();
        let emptied = match self.file.rewind().await {
            Ok(_) => self.file.set_len(0).await,
            Err(error) => Err(error),
        };
        emptied.map_err(|error| self.unwritten(error))?;
        self.received = 0;
        self.validator = validator(response.headers());
        if let Some(validator) = &self.validator {
            let mark = Mark {
                validator: validator.clone(),
                expected: self.expected,
            };
            self.incoming.set_mark(&mark.text(&self.url));
        }
        self.begun = true;
        Ok(())
    }

    /// The server sends a part: it must be the missing one, of the same file.
    fn go_on(&mut self, headers: &HeaderMap) -> Result<(), Stop> {
        let range = headers.get(CONTENT_RANGE).and_then(|v| v.to_str().ok());
        let fits = match (&self.validator, range.and_then(content_range)) {
            (Some((name, value)), Some((first, total))) => {
                headers.get(name).is_none_or(|now| now == value)
                    && first == self.received
                    && total.is_none_or(|total| self.expected.is_none_or(|size| size == total))
            }
            _ => false,
        };
        if fits {
            self.begun = true;
            (self.log)(&format!("going on at byte {}", self.received));
            return Ok(());
        }
        Err(self.other_part())
    }

    /// Without a validator the next attempt asks for the whole.
    fn other_part(&mut self) -> Stop {
        self.validator = None;
        self.incoming.clear_mark();
        Stop::Broken(Error::refused(
            "the server sent another part than the one that is missing",
        ))
    }

    fn stopped(&self, error: reqwest::Error) -> Stop {
        let passes = error.status().is_none_or(|status| status.is_server_error());
        let error = Error::failed("download failed", error);
        match self.begun && passes {
            true => Stop::Broken(error),
            false => Stop::Final(error),
        }
    }

    fn unwritten(&self, error: std::io::Error) -> Stop {
        Stop::Final(write_failed(self.incoming, error))
    }
}

/// What an unfinished file says about where it comes from: the digest of the URL, which may have a password in it; the
/// validator's name and value; the size of the whole, when told.
struct Mark {
    validator: (HeaderName, HeaderValue),
    expected: Option<u64>,
}

impl Mark {
    fn text(&self, url: &reqwest::Url) -> String {
        let (name, value) = &self.validator;
        let value = value.to_str().unwrap_or_default();
        let expected = self.expected.map(|size| size.to_string());
        let url = Digest::of(url.as_str().as_bytes());
        format!("{url}\n{name}\n{value}\n{}", expected.unwrap_or_default())
    }

    /// None when it is another URL's.
    fn parse(text: &str, url: &reqwest::Url) -> Option<Self> {
        let mut lines = text.split('\n');
        if lines.next()? != Digest::of(url.as_str().as_bytes()).to_string() {
            return None;
        }
        let validator = (lines.next()?.parse().ok()?, lines.next()?.parse().ok()?);
        let expected = match lines.next()? {
            "" => None,
            digits => Some(digits.parse().ok()?),
        };
        Some(Self {
            validator,
            expected,
        })
    }
}

/// What `If-Range` may name: a strong entity tag, or else the time of the last change, which is a strong validator only
/// when the file was not still changing in the second of the answer. RFC 9110 §8.8.2.2, §13.1.5.
fn validator(headers: &HeaderMap) -> Option<(HeaderName, HeaderValue)> {
    let tag = headers
        .get(ETAG)
        .filter(|tag| tag.as_bytes().starts_with(b"\""));
    if let Some(tag) = tag {
        return Some((ETAG, tag.clone()));
    }
    let (changed, now) = (headers.get(LAST_MODIFIED)?, headers.get(DATE)?);
    (changed != now).then(|| (LAST_MODIFIED, changed.clone()))
}

/// First byte and size of the whole in `bytes FIRST-LAST/TOTAL`, whose total may be `*`. RFC 9110 §14.4.
fn content_range(text: &str) -> Option<(u64, Option<u64>)> {
    let (range, total) = text.strip_prefix("bytes ")?.split_once('/')?;
    let (first, _) = range.split_once('-')?;
    let total = match total {
        "*" => None,
        digits => Some(digits.parse().ok()?),
    };
    Some((first.parse().ok()?, total))
}

fn write_failed(incoming: &Incoming, error: std::io::Error) -> Error {
    Error::failed(format!("cannot write {}", incoming.path().display()), error)
}

fn progress(received: u64, expected: Option<u64>) -> String {
    let mib = received >> 20;
    match expected {
        Some(size) if size > 0 => format!(
            "{mib} MiB of {} MiB ({} %)",
            size >> 20,
            received * 100 / size
        ),
        _ => format!("{mib} MiB"),
    }
}

fn too_large(limits: Limits) -> Error {
    Error::Refused(format!(
        "the file is larger than the {} MiB that it may have",
        limits.size_bytes_max >> 20
    ))
}

fn checked(url: &str) -> Result<reqwest::Url, Error> {
    let wrong = |text: String| Error::Invalid(vec![("url".to_owned(), text)]);
    let url = reqwest::Url::parse(url).map_err(|error| wrong(error.to_string()))?;
    match url.scheme() {
        "http" | "https" => Ok(url),
        other => Err(wrong(format!("'{other}' is not http or https"))),
    }
}

fn client(limits: Limits) -> Result<reqwest::Client, Error> {
    reqwest::Client::builder()
        .connect_timeout(SILENCE_MAX)
        .read_timeout(SILENCE_MAX)
        .redirect(reqwest::redirect::Policy::limited(REDIRECTS_MAX))
        .tls_danger_accept_invalid_certs(!limits.verify_certificates)
        .build()
        .map_err(|error| Error::failed("cannot prepare the download".to_owned(), error))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpListener;

    use super::*;
    use crate::storage::incoming::Existing;

    /// A server that answers one request with these bytes; returns the URL.
    fn serve(answer: &'static str) -> String {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let serve = move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut request = [0; 4096];
            assert!(stream.read(&mut request).unwrap() > 0);
            stream.write_all(answer.as_bytes()).unwrap();
        };
        std::thread::Builder::new()
            .name("server".to_owned())
            .spawn(serve)
            .unwrap();
        format!("http://{address}/x.iso")
    }

    async fn fetched(url: &str, size_bytes_max: u64) -> Result<String, Error> {
        let folder = tempfile::tempdir().unwrap();
        let temporary = folder.path().join("part");
        std::fs::write(&temporary, "").unwrap();
        let incoming = Incoming::new(temporary, folder.path().join("x.iso"));
        let limits = Limits {
            size_bytes_max,
            verify_certificates: true,
            waits: &[Duration::ZERO],
        };
        fetch(url, &incoming, limits, &|_| {}).await?;
        let path = incoming.commit(None, Existing::Refuse).await?;
        Ok(std::fs::read_to_string(path).unwrap())
    }

    #[tokio::test]
    async fn what_is_served_arrives() {
        let url = serve("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
        assert_eq!(fetched(&url, 100).await.unwrap(), "hello");
    }

    #[tokio::test]
    async fn what_is_too_large_cut_off_or_absent_does_not() {
        let large = serve("HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello");
        assert!(fetched(&large, 4).await.is_err());
        let unannounced = serve("HTTP/1.1 200 OK\r\n\r\nhello");
        assert!(fetched(&unannounced, 4).await.is_err());
        let cut = serve("HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello");
        assert!(fetched(&cut, 100).await.is_err());
        let absent = serve("HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
        assert!(fetched(&absent, 100).await.is_err());
        for url in ["file:///etc/passwd", "ftp://x/y", "x"] {
            let error = fetched(url, 100).await.unwrap_err();
            assert!(matches!(error, Error::Invalid(_)), "{url}");
        }
    }
}
