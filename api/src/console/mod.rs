// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Consoles: from a browser's websocket to a guest's console socket, or to a shell of the node.
//!
//! ```text
//! POST termproxy ──► port, ticket; task `vncproxy` begins and waits for its browser
//! GET vncwebsocket ─► ticket fits? ─► the websocket is handed to the task
//! task ─► login line ─► OK ─► bytes both ways until one side ends
//! ```
//!
//! The ports are names only, for PVE's clients: nothing listens there.

mod frames;
mod terminal;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use atoll_manager::access::Identity;
use atoll_manager::error::Error;
use atoll_manager::id::{GuestId, GuestKind};
use atoll_manager::task::{NewTask, TaskContext, Upid};
use axum::extract::ws::{Message, WebSocket};
use bytes::Bytes;
use jiff::Timestamp;
use tokio::sync::oneshot;

use crate::auth::ticket::{CONSOLE_SECONDS, ConsoleClaim};
use crate::daemon::Daemon;
use frames::{Decoder, Frame};
use terminal::{Source, Terminal};

/// Ports that are given out. PVE's range.
const PORTS: std::ops::RangeInclusive<u16> = 5900..=5999;
/// A console over which nothing came from the browser for so long ends. PVE's value; clients send keep-alives.
const IDLE: Duration = Duration::from_secs(5 * 60);
/// Bytes read from a guest at a time.
const CHUNK_BYTES: usize = 16 << 10;

/// Consoles that wait for their browser.
#[derive(Default)]
pub struct Consoles {
    /// By port. Held for a few instructions only, never over another lock or an await.
    waiting: Mutex<BTreeMap<u16, Waiting>>,
}

/// What a console is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A guest.
    Guest(GuestKind, GuestId),
    /// The node.
    Node,
}

impl Place {
    /// Its ACL path, which tickets are bound to.
    pub fn acl_path(self, daemon: &Daemon) -> String {
        match self {
            Self::Guest(_, guest) => format!("/vms/{guest}"),
            Self::Node => format!("/nodes/{}", daemon.node.name()),
        }
    }
}

struct Waiting {
    place: Place,
    user: String,
    hand_over: oneshot::Sender<WebSocket>,
}

/// What `termproxy` answers with.
pub struct Opened {
    /// Who may connect.
    pub user: String,
    /// The ticket to connect with.
    pub ticket: String,
    /// The port to name.
    pub port: u16,
    /// The console's task.
    pub upid: Upid,
}

/// Begins a console of a running guest, or of the node.
pub fn open(daemon: &Arc<Daemon>, place: Place, caller: &Identity) -> Result<Opened, Error> {
    let source = Source::find(daemon, place, caller)?;
    let user = caller.to_string();
    let (hand_over, handed_over) = oneshot::channel();
    let port = daemon.consoles.wait(Waiting {
        place,
        user: user.clone(),
        hand_over,
    })?;
    let path = place.acl_path(daemon);
    let claim = ConsoleClaim {
        user: &user,
        path: &path,
        port,
    };
    let ticket = daemon
        .keyring
        .keys()
        .console(&claim, Timestamp::now().as_second());
    let session = Session {
        daemon: Arc::clone(daemon),
        path: path.clone(),
        user: user.clone(),
        port,
    };
    let new = match place {
        Place::Guest(_, guest) => NewTask::new("vncproxy", guest, caller),
        Place::Node => NewTask::new("vncshell", "", caller),
    };
    let upid = daemon
        .node
        .tasks()
        .spawn(new.free(), async move |task: TaskContext| {
            task.log(&format!("starting console of {path}, port {port}"));
            let result = task.until_cancelled(session.run(handed_over, source)).await;
            session.daemon.consoles.forget(port);
            result
        })?;
    Ok(Opened {
        user,
        ticket,
        port,
        upid,
    })
}

impl Consoles {
    fn waiting(&self) -> MutexGuard<'_, BTreeMap<u16, Waiting>> {
        self.waiting.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait(&self, entry: Waiting) -> Result<u16, Error> {
        let mut waiting = self.waiting();
        let port = PORTS.into_iter().find(|port| !waiting.contains_key(port));
        let port = port.ok_or_else(|| Error::refused("no free console port: too many wait"))?;
        waiting.insert(port, entry);
        Ok(port)
    }

    fn forget(&self, port: u16) {
        self.waiting().remove(&port);
    }

    /// Takes the console that waits at `port` for `user`; `None` when there is none of `place`.
    pub fn claim(&self, port: u16, place: Place, user: &str) -> Option<oneshot::Sender<WebSocket>> {
        let mut waiting = self.waiting();
        let fits = |entry: &Waiting| entry.place == place && entry.user == user;
        if !waiting.get(&port).is_some_and(fits) {
            return None;
        }
        waiting.remove(&port).map(|entry| entry.hand_over)
    }
}

struct Session {
    daemon: Arc<Daemon>,
    /// ACL path of what it is of.
    path: String,
    user: String,
    port: u16,
}

impl Session {
    async fn run(
        &self,
        handed_over: oneshot::Receiver<WebSocket>,
        source: Source,
    ) -> Result<(), Error> {
        let wait = Duration::from_secs(CONSOLE_SECONDS.unsigned_abs());
        let Ok(Ok(mut browser)) = tokio::time::timeout(wait, handed_over).await else {
            return Err(Error::refused("connection timed out"));
        };
        let mut decoder = Decoder::default();
        let login = tokio::time::timeout(wait, login(&mut browser, &mut decoder)).await;
        let Some(line) = login.ok().flatten().filter(|line| self.admits(line)) else {
            return Err(Error::refused("authentication failure"));
        };
        drop(line);
        send(&mut browser, Bytes::from_static(b"OK")).await;
        bridge(browser, decoder, source.open().await?).await
    }

    fn admits(&self, line: &str) -> bool {
        let Some((user, ticket)) = line.split_once(':') else {
            return false;
        };
        let claim = ConsoleClaim {
            user: &self.user,
            path: &self.path,
            port: self.port,
        };
        let keys = self.daemon.keyring.keys();
        user == self.user && keys.console_fits(ticket, &claim, Timestamp::now().as_second())
    }
}

/// Carries bytes until either side ends or the browser is silent for too long.
async fn bridge(
    mut browser: WebSocket,
    mut decoder: Decoder,
    mut terminal: Terminal,
) -> Result<(), Error> {
    let mut chunk = vec![0; CHUNK_BYTES];
    let idle = tokio::time::sleep(IDLE);
    tokio::pin!(idle);
    loop {
        // What came with the login line, or with the message before, goes first.
        while let Some(frame) = decoder.next().map_err(|e| Error::refused(e.to_string()))? {
            match frame {
                Frame::KeepAlive => {}
                Frame::Input(bytes) => terminal.write_all(&bytes).await?,
                Frame::Resize { columns, rows } => terminal.resize(columns, rows).await,
            }
        }
        tokio::select! {
            read = terminal.read(&mut chunk) => match read {
                Ok(0) | Err(_) => break,
                Ok(count) => {
                    if !send(&mut browser, Bytes::copy_from_slice(&chunk[..count])).await {
                        break;
                    }
                }
            },
            message = browser.recv() => match message {
                Some(Ok(Message::Binary(bytes))) => decoder.push(&bytes),
                Some(Ok(Message::Text(text))) => decoder.push(text.as_bytes()),
                Some(Ok(Message::Ping(_) | Message::Pong(_))) => {}
                Some(Ok(Message::Close(_)) | Err(_)) | None => break,
            },
            () = &mut idle => break,
        }
        idle.as_mut().reset(tokio::time::Instant::now() + IDLE);
    }
    drop(browser.send(Message::Close(None)).await);
    Ok(())
}

/// The browser's first line.
async fn login(browser: &mut WebSocket, decoder: &mut Decoder) -> Option<String> {
    loop {
        match decoder.login() {
            Ok(Some(line)) => return Some(line),
            Ok(None) => {}
            Err(_) => return None,
        }
        match browser.recv().await? {
            Ok(Message::Binary(bytes)) => decoder.push(&bytes),
            Ok(Message::Text(text)) => decoder.push(text.as_bytes()),
            Ok(Message::Ping(_) | Message::Pong(_)) => {}
            Ok(Message::Close(_)) | Err(_) => return None,
        }
    }
}

async fn send(browser: &mut WebSocket, bytes: Bytes) -> bool {
    browser.send(Message::Binary(bytes)).await.is_ok()
}
