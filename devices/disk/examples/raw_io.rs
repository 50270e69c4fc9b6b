// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Opens a raw image, writes one sector through a queue and reads it back.
//!
//!     cargo run -p atoll-disk --example raw_io
#![expect(unsafe_code, reason = "a request points at memory of the caller")]
#![expect(clippy::print_stdout, reason = "an example talks to its reader")]

use std::error::Error;
use std::fs::File;

use atoll_disk::{Format, OpenOptions, Operation, Request, Segments, Source};
use rustix::event::{PollFd, PollFlags, poll};

fn main() -> Result<(), Box<dyn Error>> {
    let directory = tempfile::tempdir()?;
    let path = directory.path().join("disk.raw");
    File::create(&path)?.set_len(1 << 20)?;

    let source = Source {
        path,
        format: Format::Raw,
        backing: Vec::new(),
    };
    let disk = atoll_disk::open(&source, OpenOptions::default())?;
    println!("{:?}, {:?}", disk.geometry(), disk.abilities());

    let mut sector = *b"hello, sector 3!";
    let mut queue = disk.open_queue(16)?;
    for operation in [Operation::Write, Operation::Flush, Operation::Read] {
        let mut segments = Segments::new();
        if operation != Operation::Flush {
            // SAFETY: `sector` lives, untouched, until the completion below was taken.
            unsafe { segments.push(sector.as_mut_ptr(), sector.len()) };
        }
        let request = Request {
            token: 0,
            operation,
            offset_bytes: 3 * 512,
            segments,
        };
        queue.submit(request).map_err(|_| "the queue is full")?;
        queue.kick()?;
        poll(
            &mut [PollFd::from_borrowed_fd(
                queue.completion_fd(),
                PollFlags::IN,
            )],
            None,
        )?;
        let mut done = Vec::new();
        queue.complete(&mut done)?;
        for completion in done {
            println!("{operation:?}: {:?}", completion.result);
        }
    }
    println!("read back: {}", String::from_utf8_lossy(&sector));
    Ok(())
}
