// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The agent in a virtual machine: QEMU's guest agent protocol over the machine's channel for it.
//!
//! ```text
//! us     FF {"execute":"guest-sync-delimited","arguments":{"id":N}}     forget what was half said before
//! agent  FF {"return":N}
//! us     {"execute":"guest-…","arguments":{…}}
//! agent  {"return":…} or {"error":{"class":…,"desc":…}}
//! ```
//!
//! What the agent says is the guest's word and nothing more: it is bounded, and handed on as data.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::net::UnixStream;

use crate::error::Error;
use crate::guest::site::Seat;
use crate::guest::vm::resolve;
use crate::guest::{Phase, guest};

/// PVE's text for an agent that does not answer; clients wait for it to go away.
const NOT_RUNNING: &str = "QEMU guest agent is not running";
/// Longest wait for the answer to the first line.
const SYNC_MAX: Duration = Duration::from_secs(3);
/// Longest wait for the answer to a command; freezing file systems takes as long as writing them out.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Longest answer, in bytes: a file of 16 MiB in base64 is the longest that is asked for.
const ANSWER_BYTES_MAX: u64 = 24 << 20;
/// Byte that no JSON text has, before an answer to `guest-sync-delimited`.
const DELIMITER: u8 = 0xff;

/// Has the agent do something, and gives its answer.
pub async fn call(seat: &Seat, command: &str, arguments: Value) -> Result<Value, Error> {
    let config = seat.config()?;
    if !matches!(guest(seat).phase(), Phase::Running { .. }) {
        return Err(Error::refused(format!("{} is not running", seat.title())));
    }
    let agent = config.properties("agent")?.unwrap_or_default();
    let socket = resolve::agent_socket(&seat.run_folder());
    if !agent.is_set("enabled") {
        return Err(Error::refused("No QEMU guest agent configured"));
    }
    // One conversation at a time: the channel does not tell whose answer is whose.
    let _guard = seat.site.agents.acquire(seat.id).await?;
    converse(&socket, command, arguments).await
}

async fn converse(socket: &Path, command: &str, arguments: Value) -> Result<Value, Error> {
    let silent = || Error::refused(NOT_RUNNING);
    let stream = UnixStream::connect(socket).await.map_err(|_| silent())?;
    let mut stream = BufReader::new(stream);
    tokio::time::timeout(SYNC_MAX, synchronize(&mut stream))
        .await
        .map_err(|_| silent())?
        .map_err(|_| silent())?;
    let request = json!({ "execute": command, "arguments": arguments });
    let answer = tokio::time::timeout(ANSWER_MAX, ask(&mut stream, &request));
    let answer = answer
        .await
        .map_err(|_| Error::refused(format!("agent command '{command}' - got timeout")))?
        .map_err(|e| Error::failed(format!("agent command '{command}'"), e))?;
    if let Some(error) = answer.get("error") {
        let said = error["desc"].as_str().unwrap_or("no reason given");
        return Err(Error::refused(format!("Agent error: {said}")));
    }
    Ok(answer.get("return").cloned().unwrap_or(Value::Null))
}

/// Makes sure that the next answer is one to our next question.
async fn synchronize(stream: &mut BufReader<UnixStream>) -> std::io::Result<()> {
    let id = u32::from_ne_bytes(
        uuid::Uuid::new_v4().into_bytes()[..4]
            .try_into()
            .unwrap_or([1; 4]),
    );
    let request = json!({ "execute": "guest-sync-delimited", "arguments": { "id": id } });
    stream.write_all(&[DELIMITER]).await?;
    stream.write_all(format!("{request}\n").as_bytes()).await?;
    loop {
        let mut before = Vec::new();
        let mut bounded = (&mut *stream).take(ANSWER_BYTES_MAX);
        bounded.read_until(DELIMITER, &mut before).await?;
        if before.last() != Some(&DELIMITER) {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if read_answer(stream).await?["return"] == id {
            return Ok(());
        }
    }
}

async fn ask(stream: &mut BufReader<UnixStream>, request: &Value) -> std::io::Result<Value> {
    stream.write_all(format!("{request}\n").as_bytes()).await?;
    read_answer(stream).await
}

async fn read_answer(stream: &mut BufReader<UnixStream>) -> std::io::Result<Value> {
    let mut line = Vec::new();
    let mut bounded = stream.take(ANSWER_BYTES_MAX);
    bounded.read_until(b'\n', &mut line).await?;
    if line.last() != Some(&b'\n') {
        return Err(std::io::Error::other("the answer is cut off or too long"));
    }
    serde_json::from_slice(&line).map_err(std::io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// An agent that says `stale` first, answers the synchronization, then each command with its own name.
    async fn agent(listener: UnixListener) {
        let (stream, _) = listener.accept().await.unwrap();
        let mut stream = BufReader::new(stream);
        let mut line = String::new();
        assert_eq!(stream.read_u8().await.unwrap(), DELIMITER);
        stream.read_line(&mut line).await.unwrap();
        let sync: Value = serde_json::from_str(&line).unwrap();
        let id = &sync["arguments"]["id"];
        let said = format!("{{\"return\":\"stale\"}}\n\u{0}{{\"return\":{id}}}\n");
        let said: Vec<u8> = said.into_bytes();
        let said: Vec<u8> = said
            .into_iter()
            .map(|b| if b == 0 { DELIMITER } else { b })
            .collect();
        stream.write_all(&said).await.unwrap();
        line.clear();
        stream.read_line(&mut line).await.unwrap();
        let request: Value = serde_json::from_str(&line).unwrap();
        let answer = match request["execute"].as_str() {
            Some("guest-fail") => json!({ "error": { "desc": "no such thing" } }),
            _ => json!({ "return": request["execute"] }),
        };
        stream
            .write_all(format!("{answer}\n").as_bytes())
            .await
            .unwrap();
    }

    async fn check(command: &str) -> Result<Value, String> {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let listener = UnixListener::bind(&socket).unwrap();
        let (answer, ()) = tokio::join!(converse(&socket, command, json!({})), agent(listener));
        answer.map_err(|error| error.to_string())
    }

    #[tokio::test]
    async fn answers_are_those_to_our_questions() {
        assert_eq!(check("guest-ping").await, Ok(json!("guest-ping")));
        assert_eq!(
            check("guest-fail").await,
            Err("Agent error: no such thing".to_owned())
        );
    }

    #[tokio::test(start_paused = true)]
    async fn silence_is_told_in_the_words_that_clients_wait_for() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("s");
        let absent = converse(&socket, "guest-ping", json!({}))
            .await
            .unwrap_err();
        assert_eq!(absent.to_string(), NOT_RUNNING);
        let _listener = UnixListener::bind(&socket).unwrap();
        let silent = converse(&socket, "guest-ping", json!({}))
            .await
            .unwrap_err();
        assert_eq!(silent.to_string(), NOT_RUNNING);
    }
}
