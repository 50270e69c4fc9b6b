// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What every backend must do, as a suite that each implementation's tests run.
#![expect(unsafe_code, reason = "requests point at the suite's own buffers")]

use std::io;

use rustix::event::{PollFd, PollFlags, poll};

use crate::backend::{
    BlockBackend, BlockQueue, Completion, Geometry, Operation, Request, SECTOR_BYTES, Space,
};
use crate::segments::Segments;

const SIZE_BYTES: u64 = 1 << 20;

/// Runs the suite on disks that `make` makes, zeroed, of the geometry that it is given. Panics at a violation.
pub fn check(make: impl Fn(Geometry) -> Box<dyn BlockBackend>) {
    let writable = Geometry {
        size_bytes: SIZE_BYTES,
        read_only: false,
    };
    let read_only = Geometry {
        size_bytes: SIZE_BYTES,
        read_only: true,
    };
    keeps_what_it_is_given(&*make(writable));
    scatters_and_gathers(&*make(writable));
    takes_much_memory_of_any_address(&*make(Geometry {
        size_bytes: 8 * SIZE_BYTES,
        ..writable
    }));
    bounds_its_queue(&*make(writable));
    refuses_what_is_beyond_its_end(&*make(writable));
    refuses_writes_when_read_only(&*make(read_only));
    queues_share_one_disk(&*make(writable));
    dropping_a_queue_waits(&*make(writable));
    zeroes_and_discards(&*make(writable));
    refuses_zeroing_where_it_may_not(&*make(writable), &*make(read_only));
    grows_under_its_queues(&*make(writable));
}

/// Reads one range and waits for it.
pub fn read(backend: &dyn BlockBackend, offset_bytes: u64, buffer: &mut [u8]) -> io::Result<()> {
    let segments = segments(&mut [buffer]);
    one(
        backend,
        Request {
            token: 1,
            operation: Operation::Read,
            offset_bytes,
            segments,
        },
    )
}

/// Writes one range and waits for it.
pub fn write(backend: &dyn BlockBackend, offset_bytes: u64, data: &[u8]) -> io::Result<()> {
    let mut copy = data.to_vec();
    let segments = segments(&mut [&mut copy]);
    one(
        backend,
        Request {
            token: 1,
            operation: Operation::Write,
            offset_bytes,
            segments,
        },
    )
}

/// A list of ranges over buffers of the caller, who keeps them until the completion.
fn segments(buffers: &mut [&mut [u8]]) -> Segments {
    let mut segments = Segments::new();
    for buffer in buffers {
        // SAFETY: every caller in this module holds the buffers, untouched, until the queue that gets the
        // request has completed it or was dropped.
        unsafe { segments.push(buffer.as_mut_ptr(), buffer.len()) };
    }
    segments
}

/// Carries out a request without data and waits for it.
pub fn act(backend: &dyn BlockBackend, offset_bytes: u64, operation: Operation) -> io::Result<()> {
    one(
        backend,
        Request {
            token: 1,
            operation,
            offset_bytes,
            segments: Segments::new(),
        },
    )
}

fn flush(token: u64) -> Request {
    Request {
        token,
        operation: Operation::Flush,
        offset_bytes: 0,
        segments: Segments::new(),
    }
}

fn one(backend: &dyn BlockBackend, request: Request) -> io::Result<()> {
    let mut queue = backend.open_queue(1)?;
    queue
        .submit(request)
        .expect("an empty queue takes a request");
    let mut done = run(&mut *queue)?;
    assert_eq!(done.len(), 1, "one request, one completion");
    done.remove(0).result
}

/// Kicks and waits for everything in flight.
fn run(queue: &mut dyn BlockQueue) -> io::Result<Vec<Completion>> {
    let mut done = Vec::new();
    queue.kick()?;
    while queue.in_flight() > 0 {
        let fds = [Some(queue.completion_fd()), queue.timer_fd()];
        let mut fds: Vec<_> = fds
            .into_iter()
            .flatten()
            .map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN))
            .collect();
        poll(&mut fds, None)?;
        queue.complete(&mut done)?;
    }
    Ok(done)
}

fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0..=u8::MAX)
        .cycle()
        .map(|byte| byte.wrapping_mul(31) ^ seed)
        .take(length)
        .collect()
}

fn keeps_what_it_is_given(backend: &dyn BlockBackend) {
    let mut buffer = vec![0xff; 8192];
    read(backend, 0, &mut buffer).expect("read a new disk");
    assert!(
        buffer.iter().all(|byte| *byte == 0),
        "a new disk reads as zeroes"
    );
    let data = pattern(7, 8192);
    write(backend, SIZE_BYTES - 8192, &data).expect("write the last sectors");
    one(backend, flush(3)).expect("flush");
    read(backend, SIZE_BYTES - 8192, &mut buffer).expect("read the last sectors");
    assert_eq!(buffer, data);
}

fn scatters_and_gathers(backend: &dyn BlockBackend) {
    let data = pattern(9, 4096);
    let (mut a, mut b, mut c) = (
        data[..512].to_vec(),
        data[512..513].to_vec(),
        data[513..].to_vec(),
    );
    let list = segments(&mut [&mut a, &mut b, &mut c]);
    assert_eq!((list.count(), list.total_bytes()), (3, 4096));
    one(
        backend,
        Request {
            token: 1,
            operation: Operation::Write,
            offset_bytes: 512,
            segments: list,
        },
    )
    .expect("gathering write");
    let (mut head, mut tail) = (vec![0; 4095], vec![0; 1]);
    let list = segments(&mut [&mut head, &mut tail]);
    one(
        backend,
        Request {
            token: 1,
            operation: Operation::Read,
            offset_bytes: 512,
            segments: list,
        },
    )
    .expect("scattering read");
    head.append(&mut tail);
    assert_eq!(head, data);
}

/// More than an implementation copies at once, at addresses that direct I/O does not take; and memory that a request
/// names more than once.
fn takes_much_memory_of_any_address(backend: &dyn BlockBackend) {
    const HALF: usize = 3 << 20;
    let request = |operation, offset_bytes: usize, segments| Request {
        token: 1,
        operation,
        offset_bytes: offset_bytes as u64,
        segments,
    };
    let mut queue = backend.open_queue(4).expect("open a queue");
    let mut pass = |requests: Vec<Request>| {
        for request in requests {
            queue.submit(request).expect("within the depth");
        }
        for completion in run(&mut *queue).expect("run") {
            completion.result.expect("any memory will do");
        }
    };
    let mut data = pattern(3, 2 * HALF + 1);
    let all = segments(&mut [&mut data[1..]]);
    pass(vec![request(Operation::Write, 0, all)]);
    let mut back = [vec![0; HALF + 1], vec![0; HALF + 1]];
    let reads = (0..).zip(&mut back).map(|(index, half)| {
        let half = segments(&mut [&mut half[1..]]);
        request(Operation::Read, index * HALF, half)
    });
    pass(reads.collect());
    assert!(back[0][1..] == data[1..=HALF] && back[1][1..] == data[HALF + 1..]);

    let mut piece = pattern(5, (512 << 10) + 1);
    let mut many = Segments::new();
    for range in [0, piece.len() - 1, piece.len() - 1, 0, piece.len() - 1] {
        // SAFETY: as in `segments`; nothing else reads or writes the piece until then.
        unsafe { many.push(piece[1..].as_mut_ptr(), range) };
    }
    pass(vec![request(Operation::Write, 4096, many)]);
    let mut back = vec![0; 3 * (512 << 10)];
    read(backend, 4096, &mut back).expect("read it again");
    for part in back.chunks(512 << 10) {
        assert!(part == &piece[1..], "each time the same");
    }
}

fn bounds_its_queue(backend: &dyn BlockBackend) {
    // More than an implementation carries out at once.
    const DEPTH: u16 = 100;
    let mut queue = backend.open_queue(DEPTH).expect("open a queue");
    for token in 0..DEPTH.into() {
        queue.submit(flush(token)).expect("within the depth");
    }
    let refused = queue.submit(flush(999)).expect_err("beyond the depth");
    assert_eq!(refused.0.token, 999, "the request comes back");
    let mut tokens: Vec<u64> = run(&mut *queue)
        .expect("run")
        .iter()
        .map(|completion| completion.token)
        .collect();
    tokens.sort_unstable();
    assert!(tokens.into_iter().eq(0..DEPTH.into()));
    queue.submit(flush(5)).expect("there is room again");
    assert_eq!(run(&mut *queue).expect("run").len(), 1);
}

fn refuses_what_is_beyond_its_end(backend: &dyn BlockBackend) {
    let mut buffer = vec![0; 1024];
    for offset in [
        SIZE_BYTES - 512,
        SIZE_BYTES,
        u64::MAX - 511,
        u64::MAX / 512 * 512,
    ] {
        read(backend, offset, &mut buffer).expect_err("read beyond the end");
        write(backend, offset, &buffer).expect_err("write beyond the end");
    }
    assert_eq!(backend.geometry().size_bytes, SIZE_BYTES, "nothing grew");
}

fn refuses_writes_when_read_only(backend: &dyn BlockBackend) {
    let error = write(backend, 0, &[1; 512]).expect_err("write to a read-only disk");
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    let mut buffer = vec![1; 512];
    read(backend, 0, &mut buffer).expect("read a read-only disk");
    assert_eq!(buffer, vec![0; 512]);
}

fn queues_share_one_disk(backend: &dyn BlockBackend) {
    std::thread::scope(|scope| {
        for index in 0..4_u8 {
            scope.spawn(move || {
                for round in 0..16 {
                    let offset = SECTOR_BYTES * (u64::from(index) * 16 + round);
                    write(backend, offset, &[index + 1; 512]).expect("write in parallel");
                }
            });
        }
    });
    let mut all = vec![0; 4 * 16 * 512];
    read(backend, 0, &mut all).expect("read everything");
    for (index, part) in (1..).zip(all.chunks(16 * 512)) {
        assert!(
            part.iter().all(|byte| *byte == index),
            "queue {index}'s sectors"
        );
    }
}

fn dropping_a_queue_waits(backend: &dyn BlockBackend) {
    let mut data = pattern(11, 65536);
    let mut queue = backend.open_queue(8).expect("open a queue");
    for (index, part) in (0..).zip(data.chunks_mut(8192)) {
        let segments = segments(&mut [part]);
        let offset_bytes = index * 8192;
        let request = Request {
            token: index,
            operation: Operation::Write,
            offset_bytes,
            segments,
        };
        queue.submit(request).expect("within the depth");
    }
    queue.kick().expect("kick");
    drop(queue);
    let mut buffer = vec![0; 65536];
    read(backend, 0, &mut buffer).expect("read");
    assert_eq!(
        buffer, data,
        "what was kicked before the drop is on the disk after it"
    );
}

fn zeroes_and_discards(backend: &dyn BlockBackend) {
    let abilities = backend.abilities();
    let mut buffer = vec![0; 65536];
    if abilities.write_zeroes {
        for (space, length_bytes) in [(Space::Keep, 12288), (Space::Free, 4096)] {
            write(backend, 0, &pattern(1, 65536)).expect("write");
            let operation = Operation::WriteZeroes {
                length_bytes,
                space,
            };
            act(backend, 8192, operation).expect("write zeroes");
            let mut expected = pattern(1, 65536);
            expected[8192..8192 + usize::try_from(length_bytes).expect("small")].fill(0);
            read(backend, 0, &mut buffer).expect("read");
            assert!(
                buffer == expected,
                "zeroes, {space:?}: there and only there"
            );
        }
    }
    write(backend, 0, &pattern(2, 65536)).expect("write");
    let length_bytes = 32768;
    act(backend, 16384, Operation::Discard { length_bytes }).expect("a discard is advice");
    read(backend, 0, &mut buffer).expect("read");
    let expected = pattern(2, 65536);
    assert!(buffer[..16384] == expected[..16384], "before a discard");
    assert!(buffer[49152..] == expected[49152..], "behind a discard");
}

fn refuses_zeroing_where_it_may_not(writable: &dyn BlockBackend, read_only: &dyn BlockBackend) {
    let space = Space::Keep;
    let zero = |length_bytes| Operation::WriteZeroes {
        length_bytes,
        space,
    };
    for (offset, length) in [
        (SIZE_BYTES - 4096, 8192),
        (u64::MAX - 511, 1024),
        (0, u64::MAX),
    ] {
        act(writable, offset, zero(length)).expect_err("zeroes beyond the end");
        let length_bytes = length;
        act(writable, offset, Operation::Discard { length_bytes })
            .expect_err("discard beyond the end");
    }
    let error = act(read_only, 0, zero(4096)).expect_err("zeroes on a read-only disk");
    assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
}

fn grows_under_its_queues(backend: &dyn BlockBackend) {
    let mut queue = backend.open_queue(2).expect("open a queue");
    backend
        .resize(SIZE_BYTES - 4096)
        .expect_err("a disk in use does not shrink");
    backend
        .resize(SIZE_BYTES + 1)
        .expect_err("sizes are whole blocks");
    assert_eq!(backend.geometry().size_bytes, SIZE_BYTES);
    backend.resize(2 * SIZE_BYTES).expect("grow");
    assert_eq!(backend.geometry().size_bytes, 2 * SIZE_BYTES);
    let mut data = pattern(3, 4096);
    let request = Request {
        token: 1,
        operation: Operation::Write,
        offset_bytes: 2 * SIZE_BYTES - 4096,
        segments: segments(&mut [&mut data]),
    };
    queue.submit(request).expect("an empty queue");
    let done = run(&mut *queue).expect("run");
    done[0]
        .result
        .as_ref()
        .expect("a queue from before sees the new end");
    let mut buffer = vec![1; 8192];
    read(backend, 2 * SIZE_BYTES - 8192, &mut buffer).expect("read the new end");
    assert!(buffer[..4096] == [0; 4096] && buffer[4096..] == data);
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{DetectZeroes, Faulty, Limited, Limits, MemoryBackend, Rate};

    #[test]
    fn memory_conforms() {
        check(|geometry| Box::new(MemoryBackend::new(geometry)));
    }

    #[test]
    fn a_decorator_without_faults_conforms() {
        check(|geometry| {
            Box::new(Faulty::new(
                MemoryBackend::new(geometry),
                Arc::new(|_, _| None),
            ))
        });
    }

    #[test]
    fn limits_and_zero_detection_conform() {
        check(|geometry| {
            let zeroes = DetectZeroes::new(Arc::new(MemoryBackend::new(geometry)), true);
            Box::new(Limited::new(Arc::new(zeroes), Limits::default()))
        });
        let operations = Rate {
            per_second: Some(20_000),
            burst: Some(4),
        };
        let mut limits = Limits::default();
        limits.total.operations = operations;
        limits.write.bytes.per_second = Some(64 << 20);
        check(move |geometry| {
            let inner = Arc::new(MemoryBackend::new(geometry));
            Box::new(Limited::new(inner, limits))
        });
    }

    #[track_caller]
    fn held(then: impl FnOnce(&Limited, &mut dyn BlockQueue)) -> usize {
        let mut limits = Limits::default();
        limits.read.operations = FEW;
        held_by(limits, Operation::Read, then)
    }

    /// Four at once, and hardly one ever after.
    const FEW: Rate = Rate {
        per_second: Some(1),
        burst: Some(4),
    };

    /// How many of 16 operations a queue has carried out after `then`, which comes after its kick.
    #[track_caller]
    fn held_by(
        limits: Limits,
        operation: Operation,
        then: impl FnOnce(&Limited, &mut dyn BlockQueue),
    ) -> usize {
        let geometry = Geometry {
            size_bytes: 4096,
            read_only: false,
        };
        let disk = Limited::new(Arc::new(MemoryBackend::new(geometry)), limits);
        let mut buffer = [0; 512];
        let mut queue = disk.open_queue(16).unwrap();
        for token in 0..16 {
            let segments = match operation {
                Operation::Read => segments(&mut [&mut buffer]),
                _ => Segments::new(),
            };
            let request = Request {
                token,
                operation,
                offset_bytes: 0,
                segments,
            };
            queue.submit(request).unwrap();
        }
        queue.kick().unwrap();
        then(&disk, &mut *queue);
        let mut done = Vec::new();
        queue.complete(&mut done).unwrap();
        queue.complete(&mut done).unwrap();
        done.len()
    }

    #[test]
    fn a_limit_holds_requests_back_until_it_is_lifted() {
        assert_eq!(held(|_, _| {}), 4, "the burst");
        assert_eq!(held(|disk, _| disk.set(Limits::default())), 16, "lifted");
        assert_eq!(held(|_, queue| queue.hurry()), 16, "a stopping device");
    }

    #[test]
    fn zeroes_count_as_the_bytes_that_they_are() {
        let mut limits = Limits::default();
        limits.write.bytes = Rate {
            per_second: Some(512),
            burst: Some(4096),
        };
        let zeroes = Operation::WriteZeroes {
            length_bytes: 2048,
            space: Space::Keep,
        };
        assert!(held_by(limits, zeroes, |_, _| {}) < 6);
    }

    #[test]
    fn zeroes_are_found_and_nothing_else() {
        let inner = MemoryBackend::new(Geometry {
            size_bytes: 65536,
            read_only: false,
        });
        let fault = |operation, _| (operation == Operation::Write).then_some(io::ErrorKind::Other);
        let plain_writes_fail = Faulty::new(inner, Arc::new(fault));
        let disk = DetectZeroes::new(Arc::new(plain_writes_fail), true);
        write(&disk, 4096, &[0; 8192]).expect("zeroes");
        let mut data = [0; 8192];
        data[8191] = 1;
        write(&disk, 4096, &data).expect_err("not only zeroes");
        write(&disk, 512, &[0; 512]).expect_err("too small to be worth it");
    }

    #[test]
    fn chosen_requests_fail_and_others_do_not() {
        let inner = MemoryBackend::new(Geometry {
            size_bytes: 4096,
            read_only: false,
        });
        let bad_sector = |operation, offset| {
            (operation == Operation::Read && offset == 512).then_some(io::ErrorKind::TimedOut)
        };
        let disk = Faulty::new(inner, Arc::new(bad_sector));
        let mut buffer = [0; 512];
        let error = read(&disk, 512, &mut buffer).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        read(&disk, 0, &mut buffer).unwrap();
        write(&disk, 512, &buffer).unwrap();
    }
}
