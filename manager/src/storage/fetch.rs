// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Downloading a file into a storage over HTTP or HTTPS, with progress lines for a task's log.

use std::time::{Duration, Instant};

use tokio::io::AsyncWriteExt;

use crate::error::Error;
use crate::storage::incoming::Incoming;

/// Longest silence of the server.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Time between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(3);
/// Redirects that are followed.
const REDIRECTS_MAX: usize = 5;

/// What a download is allowed to do.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Largest file, in bytes: normally what is available on the storage.
    pub size_bytes_max: u64,
    /// Whether certificates are checked.
    pub verify_certificates: bool,
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
    let mut response = client(limits)?
        .get(url)
        .send()
        .await
        .and_then(reqwest::Response::error_for_status)
        .map_err(|error| Error::failed("download failed".to_owned(), error))?;
    let expected = response.content_length();
    if expected.is_some_and(|size| size > limits.size_bytes_max) {
        return Err(too_large(limits));
    }
    let write = |error| Error::failed(format!("cannot write {}", incoming.path().display()), error);
    let mut file = tokio::fs::File::options()
        .write(true)
        .open(incoming.path())
        .await
        .map_err(write)?;
    let (mut received, mut told) = (0_u64, Instant::now());
    while let Some(chunk) = response
        .chunk()
        .await
        .map_err(|error| Error::failed("download failed".to_owned(), error))?
    {
        received += chunk.len() as u64;
        if received > limits.size_bytes_max {
            return Err(too_large(limits));
        }
        file.write_all(&chunk).await.map_err(write)?;
        if told.elapsed() >= PROGRESS_EVERY {
            told = Instant::now();
            log(&progress(received, expected));
        }
    }
    file.flush().await.map_err(write)?;
    if expected.is_some_and(|size| size != received) {
        return Err(Error::Refused(format!(
            "download ended early, after {received} bytes"
        )));
    }
    log(&progress(received, Some(received)));
    Ok(received)
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
        "the file is larger than the {} MiB that are available",
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
