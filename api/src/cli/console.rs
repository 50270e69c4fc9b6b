// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll vm|ct console`: this terminal becomes the guest's, by the same websocket that the web page uses.
//!
//! Everything typed goes to the guest, except Ctrl-], which ends the session.

use futures_util::{SinkExt as _, StreamExt as _};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::signal::unix::{SignalKind, signal};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;

use super::client::{Client, ClientError};
use super::{CliError, task};
use crate::route::Method;

/// Ctrl-], as in telnet.
const ESCAPE: u8 = 0x1d;
/// How often the server is told that somebody is there; it ends a silent session after five minutes.
const KEEP_ALIVE: std::time::Duration = std::time::Duration::from_secs(30);

/// Opens the console of the guest at `path` and stays in it until either side ends.
pub async fn run(client: &Client, path: &str) -> Result<(), CliError> {
    let opened = client
        .call(Method::Post, &format!("{path}/termproxy"), task::NO_PARAMS)
        .await?;
    let text = |key: &str| match &opened[key] {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    };
    let (user, ticket, port) = (text("user"), text("ticket"), text("port"));
    let mut query = form_urlencoded::Serializer::new(String::new());
    query
        .append_pair("port", &port)
        .append_pair("vncticket", &ticket);
    let uri = format!("/api2/json{path}/vncwebsocket?{}", query.finish());

    let settings = |error: String| ClientError::Settings(error);
    let signed = client.request(Method::Get, &uri)?.body(());
    let signed = signed.map_err(|error| settings(error.to_string()))?;
    let host = signed.headers()["host"].to_str().unwrap_or_default();
    let request = format!("wss://{host}{uri}").into_client_request();
    let mut request = request.map_err(|error| settings(error.to_string()))?;
    request.headers_mut().extend(signed.headers().clone());
    let protocol = hyper::header::HeaderValue::from_static("binary");
    request
        .headers_mut()
        .insert("sec-websocket-protocol", protocol);

    let stream = client.connect().await?;
    let failed = |error: tokio_tungstenite::tungstenite::Error| {
        CliError::Local(format!("the console's connection failed: {error}"))
    };
    let (mut socket, _) = tokio_tungstenite::client_async(request, stream)
        .await
        .map_err(failed)?;
    let login = format!("{user}:{ticket}\n");
    socket
        .send(Message::binary(login.into_bytes()))
        .await
        .map_err(failed)?;
    match socket.next().await {
        Some(Ok(message)) if message.clone().into_data().starts_with(b"OK") => {
            let rest = message.into_data().slice(2..);
            let terminal = Terminal::raw()?;
            let result = session(&mut socket, &rest).await;
            drop(terminal);
            result.map_err(failed)
        }
        _ => Err(CliError::Local("the console did not open".to_owned())),
    }
}

type Socket =
    tokio_tungstenite::WebSocketStream<tokio_rustls::client::TlsStream<tokio::net::TcpStream>>;

async fn session(
    socket: &mut Socket,
    first: &[u8],
) -> Result<(), tokio_tungstenite::tungstenite::Error> {
    let mut output = tokio::io::stdout();
    let mut input = tokio::io::stdin();
    let mut resized = signal(SignalKind::window_change())?;
    let mut keep_alive = tokio::time::interval(KEEP_ALIVE);
    let mut typed = [0; 4096];
    output.write_all(first).await?;
    socket.send(size()).await?;
    loop {
        tokio::select! {
            read = input.read(&mut typed) => {
                let count = read?;
                let end = typed[..count].iter().position(|byte| *byte == ESCAPE);
                let bytes = &typed[..end.unwrap_or(count)];
                if !bytes.is_empty() {
                    let mut frame = format!("0:{}:", bytes.len()).into_bytes();
                    frame.extend_from_slice(bytes);
                    socket.send(Message::binary(frame)).await?;
                }
                if end.is_some() || count == 0 {
                    return socket.close(None).await;
                }
            }
            message = socket.next() => match message {
                Some(Ok(Message::Binary(bytes))) => {
                    output.write_all(&bytes).await?;
                    output.flush().await?;
                }
                Some(Ok(Message::Close(_)) | Err(_)) | None => return Ok(()),
                Some(Ok(_)) => {}
            },
            _ = resized.recv() => socket.send(size()).await?,
            _ = keep_alive.tick() => socket.send(Message::binary(&b"2"[..])).await?,
        }
    }
}

fn size() -> Message {
    let size = tcgetwinsize(std::io::stdout());
    let (columns, rows) = size.map_or((80, 24), |size| (size.ws_col, size.ws_row));
    Message::binary(format!("1:{columns}:{rows}:").into_bytes())
}

/// The terminal as it was, set back when dropped.
struct Terminal(Option<Termios>);

impl Terminal {
    /// Every key goes through as it is; input that is no terminal stays as it is.
    fn raw() -> Result<Self, CliError> {
        let Ok(before) = tcgetattr(std::io::stdin()) else {
            return Ok(Self(None));
        };
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(std::io::stdin(), OptionalActions::Now, &raw)
            .map_err(|error| CliError::Local(format!("set the terminal up: {error}")))?;
        Ok(Self(Some(before)))
    }
}

impl Drop for Terminal {
    fn drop(&mut self) {
        if let Some(before) = &self.0 {
            // Nobody is left to tell that it did not work.
            let _ = tcsetattr(std::io::stdin(), OptionalActions::Now, before);
        }
    }
}
