// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Numbered messages over one TCP connection, and back: none is lost, repeated or changed, at either end.

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::sync_channel;

use anyhow::{Context, Result, bail, ensure};

use super::{Numbers, Shared, rest};

const MESSAGE_BYTES: usize = 1024;
/// Messages that are on their way at one time.
const WINDOW: usize = 64;

type Message = [u8; MESSAGE_BYTES];

fn message(number: u64) -> Message {
    let mut message = [0; MESSAGE_BYTES];
    let mut numbers = Numbers::new(number);
    let (words, _) = message.as_chunks_mut::<8>();
    for word in &mut *words {
        *word = numbers.draw().to_le_bytes();
    }
    words[0] = number.to_le_bytes();
    message
}

/// The next message, which has to be this one; false at the end of the stream.
fn hear(stream: &mut TcpStream, number: u64) -> Result<bool> {
    let mut heard = [0; MESSAGE_BYTES];
    if stream.read(&mut heard[..1]).context("read")? == 0 {
        return Ok(false);
    }
    stream.read_exact(&mut heard[1..]).context("read on")?;
    let found = u64::from_le_bytes(*heard.first_chunk().expect("longer"));
    ensure!(found == number, "message {found} after {number} messages");
    ensure!(heard == message(number), "message {number} was changed");
    Ok(true)
}

/// The guest's end.
pub(super) fn send(shared: &Shared) -> Result<()> {
    let mut stream = TcpStream::connect(shared.peer).context("connect")?;
    stream.set_nodelay(true)?;
    let mut back = stream.try_clone()?;
    let (sender, sent) = sync_channel(WINDOW);
    std::thread::scope(|scope| {
        let echoes = scope.spawn(move || {
            for number in sent {
                if !hear(&mut back, number)? {
                    bail!("the peer ended after {number} messages");
                }
                shared.count("stream");
            }
            ensure!(!hear(&mut back, u64::MAX)?, "more came than was sent");
            Ok(())
        });
        let mut write = || -> io::Result<()> {
            for number in 0.. {
                // Ended: it says why.
                if sender.send(number).is_err() {
                    break;
                }
                stream.write_all(&message(number))?;
                if !rest(shared, 10) {
                    break;
                }
            }
            stream.shutdown(Shutdown::Write)
        };
        let written = write();
        drop(sender);
        echoes.join().expect("it does not panic")?;
        written.context("write")
    })
}

/// The other end, for one connection. Returns the number of messages.
pub fn peer(address: SocketAddr) -> Result<u64> {
    let listener = TcpListener::bind(address).context("listen")?;
    echo(&listener)
}

pub(super) fn echo(listener: &TcpListener) -> Result<u64> {
    let (mut stream, _) = listener.accept().context("accept")?;
    stream.set_nodelay(true)?;
    let mut number = 0;
    while hear(&mut stream, number)? {
        stream.write_all(&message(number)).context("write")?;
        number += 1;
    }
    Ok(number)
}
