// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A server of files on the loopback, by HTTP or HTTPS, that knows ranges, counts what it sends and breaks connections
//! off when it is told to.

use std::collections::BTreeMap;
use std::io::{BufRead as _, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

/// When the server says that an answer was made; files that have a time of change are older.
const DATE: &str = "Sat, 28 Nov 2026 10:00:00 GMT";

/// A file that is served.
#[derive(Clone, Default)]
pub struct Served {
    /// What is in it.
    pub bytes: Vec<u8>,
    /// Its `ETag` or `Last-Modified`.
    pub validator: Option<(&'static str, &'static str)>,
    /// How many bytes of their body the next answers send before the connection breaks, each once.
    pub cuts: Vec<usize>,
    /// What takes its place once an answer has been cut.
    pub next: Option<Box<Served>>,
    /// Ranges are sent whatever `If-Range` says, as some servers do.
    pub is_careless: bool,
}

/// A request that was answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    /// Path.
    pub path: String,
    /// `Range`.
    pub range: Option<String>,
    /// `If-Range`.
    pub if_range: Option<String>,
    /// Bytes of the body that were sent.
    pub sent: usize,
}

#[derive(Default)]
struct Shared {
    files: BTreeMap<String, Served>,
    seen: Vec<Seen>,
}

/// A running server; it ends with the test.
pub struct Server {
    url: String,
    /// Files by path and what was asked for; locked for a moment only.
    shared: Arc<Mutex<Shared>>,
}

impl Server {
    /// Listens without TLS.
    pub fn http() -> Self {
        Self::start("http", |stream| Box::new(stream))
    }

    /// Listens with TLS, under a certificate that nobody knows.
    pub fn https() -> Self {
        let made = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        let key = rustls::pki_types::PrivatePkcs8KeyDer::from(made.signing_key.serialize_der());
        let config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![made.cert.der().clone()], key.into())
            .unwrap();
        let config = Arc::new(config);
        Self::start("https", move |stream| {
            let connection = rustls::ServerConnection::new(Arc::clone(&config)).unwrap();
            Box::new(rustls::StreamOwned::new(connection, stream))
        })
    }

    fn start(scheme: &str, wrap: impl Fn(TcpStream) -> Box<dyn Stream> + Send + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("{scheme}://{}", listener.local_addr().unwrap());
        let shared = Arc::new(Mutex::new(Shared::default()));
        let answers = Arc::clone(&shared);
        let serve = move || {
            for stream in listener.incoming() {
                // A client that goes away, or does not like the certificate, is no failure of the server.
                let _ = answer(wrap(stream.unwrap()), &answers);
            }
        };
        let name = "files".to_owned();
        std::thread::Builder::new().name(name).spawn(serve).unwrap();
        Self { url, shared }
    }

    /// URL of a path.
    pub fn url(&self, path: &str) -> String {
        format!("{}{path}", self.url)
    }

    /// Serves a file from now on.
    pub fn put(&self, path: &str, file: Served) {
        let mut shared = self.shared.lock().unwrap();
        shared.files.insert(path.to_owned(), file);
    }

    /// Serves plain bytes from now on.
    pub fn put_bytes(&self, path: &str, bytes: impl Into<Vec<u8>>) {
        let bytes = bytes.into();
        self.put(
            path,
            Served {
                bytes,
                ..Served::default()
            },
        );
    }

    /// Forgets a file.
    pub fn remove(&self, path: &str) {
        self.shared.lock().unwrap().files.remove(path);
    }

    /// The requests since the last call.
    pub fn seen(&self) -> Vec<Seen> {
        std::mem::take(&mut self.shared.lock().unwrap().seen)
    }
}

trait Stream: Read + Write {}
impl<T: Read + Write> Stream for T {}

fn answer(stream: Box<dyn Stream>, shared: &Mutex<Shared>) -> std::io::Result<()> {
    let mut stream = BufReader::new(stream);
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if stream.read_line(&mut line)? == 0 {
            return Ok(());
        }
        match line.trim() {
            "" => break,
            line => lines.push(line.to_owned()),
        }
    }
    let header = |name: &str| {
        let mut pairs = lines[1..].iter().filter_map(|line| line.split_once(": "));
        let found = pairs.find(|(key, _)| key.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.to_owned())
    };
    let path = lines[0].split(' ').nth(1).unwrap().to_owned();
    let (range, if_range) = (header("range"), header("if-range"));
    let mut stream = stream.into_inner();
    let mut shared = shared.lock().unwrap();
    let Some(file) = shared.files.get_mut(&path) else {
        return stream.write_all(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n");
    };
    let is_same = file.validator.map(|(_, value)| value) == if_range.as_deref();
    let first = range
        .as_deref()
        .filter(|_| is_same || file.is_careless)
        .and_then(|range| {
            range
                .strip_prefix("bytes=")?
                .strip_suffix('-')?
                .parse()
                .ok()
        });
    let (start, total): (usize, usize) = (first.unwrap_or(0), file.bytes.len());
    if start > total {
        let text = b"HTTP/1.1 416 Range Not Satisfiable\r\nContent-Length: 0\r\n\r\n";
        return stream.write_all(text);
    }
    let mut head = match first {
        Some(first) => format!(
            "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {first}-{}/{total}\r\n",
            total - 1
        ),
        None => "HTTP/1.1 200 OK\r\n".to_owned(),
    };
    if let Some((name, value)) = file.validator {
        head.push_str(&format!("{name}: {value}\r\n"));
    }
    let length = total - start;
    head.push_str(&format!(
        "Date: {DATE}\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n"
    ));
    let cut = (!file.cuts.is_empty()).then(|| file.cuts.remove(0));
    let sent = cut.unwrap_or(length);
    let body = file.bytes[start..start + sent].to_vec();
    if let (Some(_), Some(next)) = (cut, file.next.take()) {
        *file = *next;
    }
    shared.seen.push(Seen {
        path,
        range,
        if_range,
        sent,
    });
    drop(shared);
    stream.write_all(head.as_bytes())?;
    stream.write_all(&body)?;
    stream.flush()
}
