// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The control API's server: one thread, `api`, that takes one request at a time from the Unix socket and
//! passes it to the machine's owner.
//!
//! Bounds: a request's head and body (`atoll_vmm_protocol::http`), and the time for which a client may keep
//! the thread waiting. Not here: what a request does (`machine`).

use std::collections::VecDeque;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use atoll_thread::Kind;
use atoll_vmm_protocol::api::{ROUTES, Refused, Request};
use atoll_vmm_protocol::files::Receiving;
use atoll_vmm_protocol::http::{self, MessageError, RequestMessage};
use rustix::event::{PollFd, PollFlags, poll};
use serde_json::Value;

use crate::socket;

/// How long a client may take to send its request or to read the answer.
const CLIENT_PATIENCE: Duration = Duration::from_secs(2);
/// Longest path of a Unix socket, without its final zero (`sockaddr_un`, unix(7)).
const PATH_BYTES_MAX: usize = 107;

/// A request as it came, its path and method known to be in the API's table, its body not looked at.
#[derive(Debug)]
pub struct Asked {
    /// What is asked for: one of the API's table.
    pub request: Request,
    /// An empty object when there is none; see [`body`].
    pub body: Value,
    /// Open files that came with it, in the order that the body names them.
    pub files: VecDeque<OwnedFd>,
}

impl Asked {
    /// The next file; `what` names it in the refusal of a request that has none.
    pub fn file(&mut self, what: &str) -> Result<File, Answer> {
        let file = self.files.pop_front().map(File::from);
        file.ok_or_else(|| {
            let text = format!("{what}: comes as a descriptor with the request, and there is none");
            refusal(400, text)
        })
    }
}

/// An answer: HTTP status and JSON body.
pub type Answer = (u16, Vec<u8>);

/// Why there is no control API, and so no machine: all of them are before its start.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// Another machine has it.
    #[error("API socket {path} is in use by a running machine")]
    InUse {
        /// The socket.
        path: PathBuf,
    },
    /// The kernel could not take it.
    #[error("API socket {path}: a Unix socket's path has at most {PATH_BYTES_MAX} bytes")]
    TooLong {
        /// The socket.
        path: PathBuf,
    },
    /// Anything else.
    #[error("API socket {path}")]
    Socket {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// A refusal with a sentence for the caller: `status` is HTTP's, 400 and above.
#[must_use]
pub fn refusal(status: u16, error: impl Into<String>) -> Answer {
    let refused = Refused {
        error: error.into(),
    };
    json(status, &refused)
}

/// A request's body as the type that it takes, or the refusal.
pub fn body<T: serde::de::DeserializeOwned>(value: Value) -> Result<T, Answer> {
    serde_json::from_value(value).map_err(|error| refusal(400, format!("the body: {error}")))
}

/// An answer of a type of the API.
#[must_use]
pub fn json(status: u16, value: &impl serde::Serialize) -> Answer {
    let body = serde_json::to_vec(value).expect("the API's types have string keys only");
    (status, body)
}

/// The listening socket, before its thread. Connections wait until there is one.
#[derive(Debug)]
pub struct ApiSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ApiSocket {
    /// Listens on `path`, for this user only. Replaces the socket of a machine that was killed.
    pub fn open(path: &Path) -> Result<Self, ApiError> {
        Ok(Self {
            listener: listen(path)?,
            path: path.to_owned(),
        })
    }

    /// A socket that listens already, in another process, too. A descriptor that is none serves nobody.
    pub fn of(listener: UnixListener, path: &Path) -> Result<Self, ApiError> {
        Ok(Self {
            listener,
            path: path.to_owned(),
        })
    }
}

impl AsFd for ApiSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

/// Whether connections are accepted. While it is shut they wait, for whoever has the socket next, or for the same server.
#[derive(Debug, Default)]
pub struct Gate {
    /// Leaf lock; held while a connection is accepted, so that none is once the gate has been shut.
    state: Mutex<GateState>,
    opened: Condvar,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum GateState {
    #[default]
    Open,
    Shut,
    /// For good: the thread ends.
    Over,
}

impl Gate {
    /// One that lets nobody in yet.
    #[must_use]
    pub fn closed() -> Self {
        let gate = Self::default();
        gate.shut();
        gate
    }

    /// No connection is accepted after this. Waits for one that is being accepted, not for its request.
    pub fn shut(&self) {
        self.set(GateState::Shut);
    }

    /// They are again.
    pub fn open(&self) {
        self.set(GateState::Open);
    }

    fn set(&self, state: GateState) -> GateState {
        let before = std::mem::replace(&mut *self.lock(), state);
        self.opened.notify_all();
        before
    }

    fn lock(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next connection that is there; blocks until the gate is open, not for a connection. `None` when it is over.
    fn accept(&self, listener: &UnixListener) -> Option<io::Result<UnixStream>> {
        let state = self.lock();
        let wait = self
            .opened
            .wait_while(state, |state| *state == GateState::Shut);
        let state = wait.unwrap_or_else(PoisonError::into_inner);
        // A socket that does not block says of its own end only that nobody is there.
        (*state == GateState::Open).then(|| listener.accept().map(|(stream, _)| stream))
    }
}

/// The listening socket and its thread. Dropping it ends both and removes the socket's file; while its gate is shut both are
/// another process's, and nothing is done: this one ends.
pub struct ApiServer {
    listener: UnixListener,
    gate: Arc<Gate>,
    path: PathBuf,
    thread: Option<JoinHandle<()>>,
}

impl ApiServer {
    /// Serves an open socket, from the moment on in which `gate` is open. `answer` is called on the `api` thread and may wait.
    pub fn start(
        socket: ApiSocket,
        gate: Gate,
        answer: impl Fn(Asked) -> Answer + Send + 'static,
    ) -> Result<Self, ApiError> {
        let ApiSocket { listener, path } = socket;
        let failed = |source| ApiError::Socket {
            path: path.clone(),
            source,
        };
        let accepting = listener.try_clone().map_err(failed)?;
        // Another process may take a connection that this one has been told of.
        accepting.set_nonblocking(true).map_err(failed)?;
        let gate = Arc::new(gate);
        let opened = gate.clone();
        let serve = move || serve(&accepting, &opened, &answer);
        let thread = atoll_thread::spawn(Kind::Api, "api", serve).map_err(failed)?;
        Ok(Self {
            listener,
            gate,
            path,
            thread: Some(thread),
        })
    }

    /// What lets connections in.
    #[must_use]
    pub fn gate(&self) -> Arc<Gate> {
        self.gate.clone()
    }
}

impl Drop for ApiServer {
    fn drop(&mut self) {
        if self.gate.set(GateState::Over) == GateState::Shut {
            return;
        }
        let _ = std::fs::remove_file(&self.path);
        // Wakes the thread's poll(2).
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Binds the socket; one that a killed machine left behind is replaced.
fn listen(path: &Path) -> Result<UnixListener, ApiError> {
    let failed = |source| ApiError::Socket {
        path: path.to_owned(),
        source,
    };
    if path.as_os_str().len() > PATH_BYTES_MAX {
        return Err(ApiError::TooLong {
            path: path.to_owned(),
        });
    }
    socket::remove_stale(path).map_err(|source| match source.kind() {
        io::ErrorKind::AddrInUse => ApiError::InUse {
            path: path.to_owned(),
        },
        _ => failed(source),
    })?;
    let listener = UnixListener::bind(path).map_err(failed)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    Ok(listener)
}

fn serve(listener: &UnixListener, gate: &Gate, answer: &impl Fn(Asked) -> Answer) {
    loop {
        // Fails when interrupted; whatever else there may be, accept(2) says it.
        let _ = poll(&mut [PollFd::new(listener, PollFlags::IN)], None);
        let Some(accepted) = gate.accept(listener) else {
            return;
        };
        match accepted {
            Ok(stream) => converse(stream, answer),
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
                ) => {}
            // Out of descriptors for a moment: the client's timeout is longer than this.
            Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
                std::thread::sleep(Duration::from_millis(100));
            }
            Err(_) => return,
        }
    }
}

/// One exchange. A client that breaks it off has nobody to be told.
fn converse(mut stream: UnixStream, answer: &impl Fn(Asked) -> Answer) {
    let _ = stream.set_read_timeout(Some(CLIENT_PATIENCE));
    let _ = stream.set_write_timeout(Some(CLIENT_PATIENCE));
    let mut receiving = Receiving::new(&stream);
    let message = http::read_request(&mut receiving);
    let files = receiving.into_files().into();
    let (status, body) = match message {
        Ok(message) => understand(&message, files)
            .map(answer)
            .unwrap_or_else(|refused| refused),
        Err(error @ MessageError::TooLong(_)) => refusal(413, error.to_string()),
        Err(error) => refusal(400, error.to_string()),
    };
    let _ = http::write_response(&mut stream, status, &body);
}

/// The body's JSON; an empty body is an empty object.
fn parse(body: &[u8]) -> Result<Value, Answer> {
    if body.is_empty() {
        return Ok(Value::Object(serde_json::Map::new()));
    }
    serde_json::from_slice(body)
        .map_err(|error| refusal(400, format!("the body is not JSON: {error}")))
}

/// What a message asks for, or the refusal.
pub fn understand(message: &RequestMessage, files: VecDeque<OwnedFd>) -> Result<Asked, Answer> {
    Ok(Asked {
        request: route(&message.method, &message.target)?,
        body: parse(&message.body)?,
        files,
    })
}

fn route(method: &str, target: &str) -> Result<Request, Answer> {
    let mut at_path = ROUTES
        .iter()
        .filter(|route| route.path == target)
        .peekable();
    if at_path.peek().is_none() {
        let paths: Vec<&str> = ROUTES.iter().map(|route| route.path).collect();
        let known = paths.join(" ");
        return Err(refusal(
            404,
            format!("no such path: {target}; there are {known}"),
        ));
    }
    at_path
        .find(|route| route.method == method)
        .map(|route| route.request)
        .ok_or_else(|| refusal(405, format!("{target} does not take {method}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_vmm_protocol::client::{Client, ClientError};
    use std::io::Write;

    fn server(path: &Path) -> ApiServer {
        ApiServer::start(
            ApiSocket::open(path).unwrap(),
            Gate::default(),
            |asked| match asked.request {
                Request::Pause => refusal(409, "the machine is stopped"),
                _ => json(200, &serde_json::json!({"state": "running"})),
            },
        )
        .unwrap()
    }

    #[test]
    fn requests_reach_the_owner_and_the_socket_goes_with_the_server() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let running = server(&path);
        let client = Client::new(&path);
        client.act(Request::Resume).unwrap();
        let refused = client.act(Request::Pause).unwrap_err();
        assert!(matches!(refused, ClientError::Refused { status: 409, .. }));
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        drop(running);
        assert!(!path.exists());
    }

    #[test]
    fn files_and_bodies_reach_the_owner() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let socket = ApiSocket::open(&path).unwrap();
        let _running = ApiServer::start(socket, Gate::default(), |mut asked| {
            let said = (|| {
                let name: String = body(asked.body.take())?;
                let text = io::read_to_string(asked.file("the disk")?).unwrap();
                Ok(json(200, &format!("{name}: {text}")))
            })();
            said.unwrap_or_else(|refused| refused)
        });
        let client = Client::new(&path);
        std::fs::write(folder.path().join("disk"), "sectors").unwrap();
        let disk = File::open(folder.path().join("disk")).unwrap();
        let answer: String = client
            .ask_with_files(Request::Resume, &"vda", &[disk.as_fd()])
            .unwrap();
        assert_eq!(answer, "vda: sectors");
        let refused = client.ask_with::<String>(Request::Resume, &"vda");
        let said = refused.unwrap_err().to_string();
        assert!(said.starts_with("the disk: comes as a"), "{said}");
    }

    #[test]
    fn what_is_not_a_request_is_refused_in_words() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let _running = server(&path);
        for (bytes, status) in [
            (&b"GET /nonsense HTTP/1.1\r\n\r\n"[..], 404),
            (b"GET /pause HTTP/1.1\r\n\r\n", 405),
            (b"nonsense\r\n\r\n", 400),
            (
                b"PUT /set-link HTTP/1.1\r\nContent-Length: 2\r\n\r\n{]",
                400,
            ),
            (&[b'a'; 9000], 413),
        ] {
            let mut stream = UnixStream::connect(&path).unwrap();
            let _ = stream.write_all(bytes);
            let response = http::read_response(&mut stream).unwrap();
            assert_eq!(response.status, status);
            serde_json::from_slice::<Refused>(&response.body).unwrap();
        }
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        drop(UnixListener::bind(&path).unwrap());
        let _running = server(&path);
        let second = ApiSocket::open(&path);
        assert!(matches!(second, Err(ApiError::InUse { .. })));
        let long = ApiSocket::open(&folder.path().join("x".repeat(100)));
        assert!(matches!(long, Err(ApiError::TooLong { .. })));
    }
}
