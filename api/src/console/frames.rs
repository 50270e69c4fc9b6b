// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The framing that PVE's terminal speaks from browser to server; the other way goes raw. Pure.
//!
//! ```text
//! first line    USER:TICKET\n            answered with OK
//! input         0:LENGTH:BYTES           LENGTH counts bytes
//! resize        1:COLUMNS:ROWS:
//! keep alive    2
//! ```
//!
//! Frames do not respect the websocket's messages, so that the decoder keeps what is not whole yet.

/// Longest input that one frame may carry, in bytes: more than anybody pastes into a terminal.
const INPUT_BYTES_MAX: usize = 64 << 10;
/// Longest head of a frame: its kind, two numbers and three colons.
const HEAD_BYTES_MAX: usize = 24;
/// Longest first line: the longest user, and a ticket.
const LOGIN_BYTES_MAX: usize = 1024;

/// What a client says.
#[derive(Debug, PartialEq, Eq)]
pub enum Frame {
    /// Bytes for the guest.
    Input(Vec<u8>),
    /// The terminal's new size.
    Resize {
        /// Columns.
        columns: u16,
        /// Rows.
        rows: u16,
    },
    /// Nothing, so that the connection stays.
    KeepAlive,
}

/// Bytes that are no frame; the connection ends.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a terminal frame")]
pub struct BadFrame;

/// Puts frames together from pieces.
#[derive(Debug, Default)]
pub struct Decoder {
    pending: Vec<u8>,
}

impl Decoder {
    /// Takes a piece in.
    pub fn push(&mut self, bytes: &[u8]) {
        self.pending.extend_from_slice(bytes);
    }

    /// The first line, without its end, once it is whole.
    pub fn login(&mut self) -> Result<Option<String>, BadFrame> {
        let end = self.pending.iter().position(|byte| *byte == b'\n');
        if end.unwrap_or(self.pending.len()) > LOGIN_BYTES_MAX {
            return Err(BadFrame);
        }
        let Some(end) = end else { return Ok(None) };
        let line: Vec<u8> = self.pending.drain(..=end).collect();
        let line = String::from_utf8(line).map_err(|_| BadFrame)?;
        Ok(Some(line.trim_end().to_owned()))
    }

    /// The next whole frame.
    pub fn next(&mut self) -> Result<Option<Frame>, BadFrame> {
        let Some((used, frame)) = parse(&self.pending)? else {
            return Ok(None);
        };
        self.pending.drain(..used);
        Ok(Some(frame))
    }
}

/// The frame at the beginning of `bytes` and its length; `None` while it is not whole.
fn parse(bytes: &[u8]) -> Result<Option<(usize, Frame)>, BadFrame> {
    match bytes.first() {
        None => return Ok(None),
        Some(b'2') => return Ok(Some((1, Frame::KeepAlive))),
        Some(b'0' | b'1') => {}
        Some(_) => return Err(BadFrame),
    }
    let fields = if bytes[0] == b'0' { 2 } else { 3 };
    let head = &bytes[..bytes.len().min(HEAD_BYTES_MAX)];
    let mut colons = head.iter().enumerate().filter(|(_, byte)| **byte == b':');
    let Some((colon, _)) = colons.nth(fields - 1) else {
        // More bytes than any head has, and still no end of it.
        return if head.len() == HEAD_BYTES_MAX {
            Err(BadFrame)
        } else {
            Ok(None)
        };
    };
    let text = std::str::from_utf8(&head[..colon]).map_err(|_| BadFrame)?;
    let mut numbers = text.split(':').skip(1).map(|text| text.parse::<u32>());
    let mut number = || numbers.next().and_then(Result::ok).ok_or(BadFrame);
    let start = colon + 1;
    if bytes[0] == b'1' {
        let mut size = || u16::try_from(number()?).map_err(|_| BadFrame);
        let (columns, rows) = (size()?, size()?);
        return Ok(Some((start, Frame::Resize { columns, rows })));
    }
    let length = usize::try_from(number()?).map_err(|_| BadFrame)?;
    if length > INPUT_BYTES_MAX {
        return Err(BadFrame);
    }
    let whole = bytes.get(start..start + length);
    Ok(whole.map(|input| (start + length, Frame::Input(input.to_vec()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decode(pieces: &[&[u8]]) -> Result<Vec<Frame>, BadFrame> {
        let mut decoder = Decoder::default();
        let mut frames = Vec::new();
        for piece in pieces {
            decoder.push(piece);
            while let Some(frame) = decoder.next()? {
                frames.push(frame);
            }
        }
        Ok(frames)
    }

    #[test]
    fn frames_in_any_pieces() {
        let whole: &[u8] = b"0:3:a\xc3\xa9" as &[u8];
        let all = [whole, b"1:80:24:", b"2", b"0:0:"].concat();
        let expected = || {
            vec![
                Frame::Input("aé".as_bytes().to_vec()),
                Frame::Resize {
                    columns: 80,
                    rows: 24,
                },
                Frame::KeepAlive,
                Frame::Input(Vec::new()),
            ]
        };
        assert_eq!(decode(&[&all]), Ok(expected()));
        let bytes: Vec<&[u8]> = all.chunks(1).collect();
        assert_eq!(decode(&bytes), Ok(expected()));
    }

    #[test]
    fn what_is_no_frame_ends_the_connection() {
        for bad in [
            b"x".as_slice(),
            b"0:x:",
            b"0:-1:",
            b"0:99999999:",
            b"1:80:99999:",
            b"0000000000000000000000000000000000",
        ] {
            assert_eq!(decode(&[bad]), Err(BadFrame), "{bad:?}");
        }
    }

    #[test]
    fn the_login_is_a_line() {
        let mut decoder = Decoder::default();
        decoder.push(b"root@pam:PVEVNC:00");
        assert_eq!(decoder.login(), Ok(None));
        decoder.push(b"::x\n2");
        assert_eq!(
            decoder.login(),
            Ok(Some("root@pam:PVEVNC:00::x".to_owned()))
        );
        assert_eq!(decoder.next(), Ok(Some(Frame::KeepAlive)));
        decoder.push(&[b'a'; LOGIN_BYTES_MAX + 1]);
        assert_eq!(decoder.login(), Err(BadFrame));
    }
}
