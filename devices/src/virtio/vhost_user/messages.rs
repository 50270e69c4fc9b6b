// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The few messages that crate `vhost` has not, or not as they are needed here. All of them are a header (request,
//! flags, size of what follows; 32 bits each) and at most two 64-bit numbers.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Requests to the backend, "Front-end message types".
const SET_LOG_BASE: u32 = 6;
pub(super) const GET_QUEUE_NUM: u32 = 17;
pub(super) const SEND_RARP: u32 = 19;
pub(super) const NET_SET_MTU: u32 = 20;
/// The backend's own, "Back-end message types": its configuration changed.
const CONFIG_CHANGE: u32 = 2;

/// Flags: version 1, "this is the answer", "an answer is wanted".
const VERSION: u32 = 1;
const VERSION_MASK: u32 = 3;
const REPLY: u32 = 4;
const NEED_REPLY: u32 = 8;

const HEADER_BYTES: usize = 12;

fn header(request: u32, flags: u32, size: u32) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    for (part, word) in bytes.chunks_mut(4).zip([request, VERSION | flags, size]) {
        part.copy_from_slice(&word.to_ne_bytes());
    }
    bytes
}

fn words(header: [u8; HEADER_BYTES]) -> [u32; 3] {
    let (words, _) = header.as_chunks::<4>();
    std::array::from_fn(|at| u32::from_ne_bytes(words[at]))
}

/// Sends a number; there is no answer.
pub(super) fn tell(mut stream: &UnixStream, request: u32, value: u64) -> io::Result<()> {
    let mut bytes = header(request, 0, 8).to_vec();
    bytes.extend(value.to_ne_bytes());
    stream.write_all(&bytes)
}

/// Asks for a number.
pub(super) fn ask(mut stream: &UnixStream, request: u32) -> io::Result<u64> {
    stream.write_all(&header(request, 0, 0))?;
    let mut answer = [0; HEADER_BYTES];
    stream.read_exact(&mut answer)?;
    let [answered, flags, size] = words(answer);
    if answered != request || flags & REPLY == 0 || size != 8 {
        return Err(io::Error::other("an answer to something else"));
    }
    let mut value = [0; 8];
    stream.read_exact(&mut value)?;
    Ok(u64::from_ne_bytes(value))
}

/// Has the backend note in this file, from its begin on, which pages it writes. Its answer has two numbers by the
/// protocol, one from QEMU's programs, and none from DPDK, so that crate `vhost` takes only some for one.
pub(super) fn set_log(mut stream: &UnixStream, file: impl AsFd, size: u64) -> io::Result<()> {
    let mut message = header(SET_LOG_BASE, 0, 16).to_vec();
    message.extend([size.to_ne_bytes(), [0; 8]].as_flattened());
    let file = file.as_fd().as_raw_fd();
    let sent = stream.send_with_fd(message.as_slice(), file)?;
    // The descriptor has gone with the first byte.
    stream.write_all(&message[sent..])?;
    let mut answer = [0; HEADER_BYTES];
    stream.read_exact(&mut answer)?;
    let [answered, flags, size] = words(answer);
    if answered != SET_LOG_BASE || flags & REPLY == 0 || !matches!(size, 0 | 8 | 16) {
        return Err(io::Error::other("an answer to something else"));
    }
    let mut rest = [0; 16];
    stream.read_exact(&mut rest[..size as usize])
}

/// Takes one message of the backend's own from `channel`, which does not block. Returns whether its configuration
/// changed; what it may want besides is not for us, and answered so. An error ends the channel.
pub(super) fn take_notice(mut channel: &UnixStream) -> io::Result<bool> {
    let mut message = [0; HEADER_BYTES];
    // A message of this size is written at once; descriptors that come with one are closed by the kernel.
    let size = channel.read(&mut message)?;
    if size != HEADER_BYTES {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    let [request, flags, size] = words(message);
    if flags & VERSION_MASK != VERSION || size != 0 {
        // Only the message that we have asked for has nothing behind its header.
        return Err(io::Error::other("an unexpected message"));
    }
    let changed = request == CONFIG_CHANGE;
    if flags & NEED_REPLY != 0 {
        let mut answer = header(request, REPLY, 8).to_vec();
        answer.extend(u64::from(!changed).to_ne_bytes());
        channel.write_all(&answer)?;
    }
    Ok(changed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_and_come() {
        let (here, mut there) = UnixStream::pair().unwrap();
        tell(&here, SEND_RARP, 0x0102).unwrap();
        let mut seen = [0; 20];
        there.read_exact(&mut seen).unwrap();
        assert_eq!(words(seen[..12].try_into().unwrap()), [19, 1, 8]);
        assert_eq!(seen[12..], 0x0102_u64.to_ne_bytes());

        there.write_all(&header(GET_QUEUE_NUM, REPLY, 8)).unwrap();
        there.write_all(&7_u64.to_ne_bytes()).unwrap();
        assert_eq!(ask(&here, GET_QUEUE_NUM).unwrap(), 7);
        there.write_all(&header(GET_QUEUE_NUM, REPLY, 4)).unwrap();
        ask(&here, GET_QUEUE_NUM).unwrap_err();
    }

    #[test]
    fn any_known_answer_to_a_log_is_taken() {
        let (here, mut there) = UnixStream::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        for (size, is_taken) in [(0, true), (8, true), (16, true), (4, false)] {
            there.write_all(&header(SET_LOG_BASE, REPLY, size)).unwrap();
            there.write_all(&vec![1; size as usize]).unwrap();
            assert_eq!(set_log(&here, &file, 0x0102).is_ok(), is_taken);
            let mut seen = [0; 28];
            let (count, files) = there.recv_with_fd(&mut seen).unwrap();
            assert_eq!((count, files.is_some()), (28, true));
            assert_eq!(words(seen[..12].try_into().unwrap()), [6, 1, 16]);
            assert_eq!(seen[12..20], 0x0102_u64.to_ne_bytes());
        }
    }

    #[test]
    fn a_notice_is_understood_and_nonsense_is_not() {
        let (here, mut there) = UnixStream::pair().unwrap();
        here.set_nonblocking(true).unwrap();
        let nothing = take_notice(&here).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        there
            .write_all(&header(CONFIG_CHANGE, NEED_REPLY, 0))
            .unwrap();
        assert!(take_notice(&here).unwrap());
        let mut answer = [0; 20];
        there.read_exact(&mut answer).unwrap();
        assert_eq!(answer[12..], [0; 8]);
        there.write_all(&header(9, 0, 0)).unwrap();
        assert!(!take_notice(&here).unwrap());
        there.write_all(&header(CONFIG_CHANGE, 0, 4)).unwrap();
        take_notice(&here).unwrap_err();
        there.write_all(&[1]).unwrap();
        take_notice(&here).unwrap_err();
        drop(there);
        take_notice(&here).unwrap_err();
    }
}
