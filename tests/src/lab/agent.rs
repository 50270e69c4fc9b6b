// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The command channel: one TCP connection a command, `LENGTH\n` + script in, output + `\0RC n\n` out.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// Begins the line with the exit code.
const MARK: &str = "\0RC ";

/// What a command left behind.
#[derive(Debug, Clone)]
pub struct Output {
    /// Its exit code.
    pub code: i32,
    /// Standard output and error, interleaved.
    pub text: String,
}

/// Runs a shell script in the host and waits for its end, at most until `deadline`. `follow` gets its output line
/// by line as it comes.
pub(super) fn run(
    address: SocketAddr,
    script: &str,
    deadline: Instant,
    mut follow: impl FnMut(&str),
) -> Result<Output> {
    let left = remaining(deadline)?;
    let mut stream = TcpStream::connect_timeout(&address, left).context("connect to the agent")?;
    stream.write_all(format!("{}\n{script}", script.len()).as_bytes())?;
    let mut answer = Vec::new();
    let mut followed = 0;
    let mut buffer = [0; 16384];
    loop {
        stream.set_read_timeout(Some(remaining(deadline).with_context(|| so_far(&answer))?))?;
        match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => answer.extend_from_slice(&buffer[..count]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error).context("read from the agent"),
        }
        while let Some(length) = answer[followed..].iter().position(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(&answer[followed..followed + length]);
            follow(line.split(MARK).next().unwrap_or_default());
            followed += length + 1;
        }
    }
    parse(&answer)
}

/// Waits until the agent answers at all. A forwarded port accepts before the host listens, so each try has its
/// own short limit.
pub(super) fn wait(address: SocketAddr, deadline: Instant) -> Result<()> {
    let mut pause = Duration::from_millis(50);
    loop {
        let attempt = (Instant::now() + Duration::from_secs(5)).min(deadline);
        match run(address, "true", attempt, |_| {}) {
            Ok(output) if output.code == 0 => return Ok(()),
            _ if Instant::now() >= deadline => bail!("the host's agent does not answer"),
            _ => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(500));
    }
}

fn remaining(deadline: Instant) -> Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        bail!("the command did not end in time");
    }
    Ok(left)
}

fn so_far(answer: &[u8]) -> String {
    format!("its output so far:\n{}", String::from_utf8_lossy(answer))
}

fn parse(answer: &[u8]) -> Result<Output> {
    let mark = MARK.as_bytes();
    let Some(end) = answer
        .windows(mark.len())
        .rposition(|window| window == mark)
    else {
        bail!("the agent's answer has no end; {}", so_far(answer));
    };
    let code = std::str::from_utf8(&answer[end + mark.len()..])?
        .trim()
        .parse()
        .context("exit code")?;
    Ok(Output {
        code,
        text: String::from_utf8_lossy(&answer[..end]).into_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answer_is_split_at_its_last_mark() {
        let output = parse(b"a\0RC 1\nb\0RC 7\n").unwrap();
        assert_eq!((output.code, output.text.as_str()), (7, "a\0RC 1\nb"));
        assert!(parse(b"cut off").is_err());
    }
}
