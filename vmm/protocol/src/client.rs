// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A blocking client of the control API; used by `atoll-vmm ctl` and by the manager (on its blocking threads).

use std::io;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::api::{
    Acted, Counters, Info, Refused, Removal, RemovalStage, RemoveDevice, Request, Route,
};
use crate::files::Sending;
use crate::http::{self, MessageError};

/// How long one answer may take unless the caller says otherwise: a reset loads the kernel again, which has
/// taken more than ten seconds on an emulated host.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// How long a guest may take to let a device go, unless the caller says otherwise.
const REMOVAL_TIMEOUT_MS: u64 = 30_000;
/// How often a machine is asked whether a device is gone.
const REMOVAL_POLL: Duration = Duration::from_millis(20);

/// Why a request has no answer, by what the caller can do about it.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody listens: the machine has ended, or the path is not its socket.
    #[error("no virtual machine listens on {path}")]
    Absent {
        /// The socket.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Connected, but there was no answer in time; the machine may still do what it was asked.
    #[error("no answer from the virtual machine on {path} within {seconds} s")]
    Late {
        /// The socket.
        path: PathBuf,
        /// The limit.
        seconds: u64,
    },
    /// Connected, but the exchange broke off.
    #[error("talk to the virtual machine on {path}")]
    Exchange {
        /// The socket.
        path: PathBuf,
        /// What went wrong.
        source: MessageError,
    },
    /// The machine answered that it will not.
    #[error("{error}")]
    Refused {
        /// HTTP status: 400, 404, 405, 409, 500, 503.
        status: u16,
        /// The machine's sentence.
        error: String,
    },
    /// The answer is not of the expected type: something else listens there.
    #[error("{path} answered something that is not the control API's")]
    Foreign {
        /// The socket.
        path: PathBuf,
    },
}

/// The control API of one machine. Cheap: every request is its own connection.
#[derive(Debug, Clone)]
pub struct Client {
    path: PathBuf,
    timeout: Duration,
}

impl Client {
    /// A client of the machine whose API socket is `path`; connects with the first request.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            timeout: TIMEOUT,
        }
    }

    /// The same client with another limit on each read and write of the socket.
    #[must_use]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// The socket's path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the machine is and does.
    pub fn info(&self) -> Result<Info, ClientError> {
        self.ask(Request::Info)
    }

    /// What it has done so far.
    pub fn counters(&self) -> Result<Counters, ClientError> {
        self.ask(Request::Counters)
    }

    /// Makes it do something: any request but [`Request::Info`] and [`Request::Counters`].
    pub fn act(&self, request: Request) -> Result<Acted, ClientError> {
        self.ask(request)
    }

    /// Asks for a device, and waits until the guest has let it go. A guest that has not within the body's time still
    /// has the device (`Asked`), and may let it go later; the same may be asked again.
    pub fn remove_device(&self, body: &RemoveDevice) -> Result<Removal, ClientError> {
        let timeout = body.timeout_ms.unwrap_or(REMOVAL_TIMEOUT_MS);
        let deadline = Instant::now() + Duration::from_millis(timeout);
        let removal: Removal = self.ask_with(Request::RemoveDevice, body)?;
        if removal.stage == RemovalStage::Gone {
            return Ok(removal);
        }
        loop {
            let devices = self.info()?.devices;
            if !devices.iter().any(|device| device.id == body.id) {
                let stage = RemovalStage::Gone;
                return Ok(Removal { stage });
            }
            if Instant::now() >= deadline {
                return Ok(removal);
            }
            std::thread::sleep(REMOVAL_POLL);
        }
    }

    /// Sends one request without a body and gives the answer's JSON, whatever its type.
    pub fn ask<T: DeserializeOwned>(&self, request: Request) -> Result<T, ClientError> {
        self.send(request, b"", &[])
    }

    /// Sends one request with its body (the type that [`Request`] names) and gives the answer's JSON.
    pub fn ask_with<T: DeserializeOwned>(
        &self,
        request: Request,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        self.ask_with_files(request, body, &[])
    }

    /// The same with open files, of which the body says by their order what they are: the machine can open
    /// nothing itself.
    pub fn ask_with_files<T: DeserializeOwned>(
        &self,
        request: Request,
        body: &impl Serialize,
        files: &[BorrowedFd<'_>],
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).expect("the API's types have string keys only");
        self.send(request, &body, files)
    }

    fn send<T: DeserializeOwned>(
        &self,
        request: Request,
        body: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> Result<T, ClientError> {
        let response = self.exchange(request.route(), body, files)?;
        let foreign = |_| ClientError::Foreign {
            path: self.path.clone(),
        };
        if response.status == 200 {
            return serde_json::from_slice(&response.body).map_err(foreign);
        }
        let refused: Refused = serde_json::from_slice(&response.body).map_err(foreign)?;
        Err(ClientError::Refused {
            status: response.status,
            error: refused.error,
        })
    }

    fn exchange(
        &self,
        route: &Route,
        body: &[u8],
        files: &[BorrowedFd<'_>],
    ) -> Result<http::ResponseMessage, ClientError> {
        let failed = |source: MessageError| match source {
            // How a read from a socket with a timeout says that it has passed.
            MessageError::Io(error) if error.kind() == io::ErrorKind::WouldBlock => {
                ClientError::Late {
                    path: self.path.clone(),
                    seconds: self.timeout.as_secs(),
                }
            }
            source => ClientError::Exchange {
                path: self.path.clone(),
                source,
            },
        };
        let mut stream = UnixStream::connect(&self.path).map_err(|source| ClientError::Absent {
            path: self.path.clone(),
            source,
        })?;
        let timeout = Some(self.timeout);
        stream
            .set_read_timeout(timeout)
            .and_then(|()| stream.set_write_timeout(timeout))
            .and_then(|()| {
                let mut sending = Sending::new(&stream, files);
                http::write_request(&mut sending, route.method, route.path, body)
            })
            .map_err(|error| failed(error.into()))?;
        http::read_response(&mut stream).map_err(failed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn answered(status: u16, body: &'static str) -> Result<Acted, ClientError> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                assert_eq!(http::read_request(&mut stream).unwrap().target, "/pause");
                http::write_response(&mut stream, status, body.as_bytes()).unwrap();
            });
            Client::new(&path).act(Request::Pause)
        })
    }

    #[test]
    fn answers_and_refusals_are_told_apart() {
        let acted = answered(200, r#"{"state":"paused","later_field":1}"#).unwrap();
        assert_eq!(acted.state, crate::api::MachineState::Paused);
        let refused = answered(409, r#"{"error":"the machine is stopped"}"#).unwrap_err();
        assert_eq!(refused.to_string(), "the machine is stopped");
        assert!(matches!(
            answered(200, "<html>").unwrap_err(),
            ClientError::Foreign { .. }
        ));
    }

    #[test]
    fn an_absent_machine_is_named() {
        let error = Client::new("/nonexistent/s").info().unwrap_err();
        assert_eq!(
            error.to_string(),
            "no virtual machine listens on /nonexistent/s"
        );
    }
}
