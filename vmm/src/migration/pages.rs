// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Pages of RAM on data connections: headers of 16 bytes (address, size, kind; little endian), and the bytes,
//! of [`WORD_PAGES`] pages at most.
//!
//! RAM is dealt out to the connections in stripes. A page always takes the same one, so that two versions of it
//! cannot overtake each other. What is zero travels as a header.

#![expect(unsafe_code, reason = "madvise(2) about guest memory")]

use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use atoll_devices::memory::{DirtyLog, PAGE_BYTES, Ram, WORD_PAGES};
use vm_memory::bitmap::BitmapSlice;
use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, ReadVolatile, VolatileMemory, VolatileMemoryError, VolatileSlice,
    WriteVolatile,
};

use crate::memory::filling::arrivals::Take;
use crate::saved::image::{Touched, is_zero};

/// Bytes of a header.
const HEADER_BYTES: usize = 16;
/// Kinds of header.
const DATA: u32 = 0;
const ZERO: u32 = 1;
/// The connection's last header.
const END: u32 = 2;
/// Words of a stripe: 2 MiB.
const STRIPE_WORDS: usize = 8;
/// Bytes of the pages that one header is about, at most.
const RUN_BYTES_MAX: usize = WORD_PAGES * PAGE_BYTES;
/// From this size on, bytes go between a socket and guest memory without a copy in between; smaller ones are gathered,
/// so that a page here and a page there are not a system call each.
const DIRECT_BYTES: usize = 4 * PAGE_BYTES;
/// What is gathered before it goes into a socket, and what is read ahead of a header.
pub const BUFFER_BYTES: usize = 2 * DIRECT_BYTES;

/// Pages to send: a bit a page, of each region.
pub type Dirty = Vec<Vec<u64>>;

/// The same while they are sent: whoever sends a page takes it out first.
pub type Left = Vec<Vec<AtomicU64>>;

/// Pages that nobody has begun to send.
#[must_use]
pub fn left(dirty: Dirty) -> Left {
    let region = |words: Vec<u64>| words.into_iter().map(AtomicU64::new).collect();
    dirty.into_iter().map(region).collect()
}

/// What is left of them now.
#[must_use]
pub fn rest(left: &Left) -> Dirty {
    let word = |word: &AtomicU64| word.load(Ordering::SeqCst);
    let region = |words: &Vec<AtomicU64>| words.iter().map(word).collect();
    left.iter().map(region).collect()
}

/// The set of every page of `ram`, for a first round.
#[must_use]
pub fn all(ram: &Ram) -> Dirty {
    ram.iter()
        .map(|region| {
            let pages = usize::try_from(region.len()).expect("64-bit host") / PAGE_BYTES;
            let mut words = vec![!0; pages / WORD_PAGES];
            if !pages.is_multiple_of(WORD_PAGES) {
                words.push((1 << (pages % WORD_PAGES)) - 1);
            }
            words
        })
        .collect()
}

/// Adds pages to others of the same RAM.
pub fn merge(pages: &mut Dirty, others: &Dirty) {
    let words = pages.iter_mut().flatten().zip(others.iter().flatten());
    words.for_each(|(word, other)| *word |= other);
}

/// Bytes of these pages, whatever is in them.
#[must_use]
pub fn size_bytes(dirty: &Dirty) -> u64 {
    let words = dirty.iter().flatten();
    words.map(|word| u64::from(word.count_ones())).sum::<u64>() * PAGE_BYTES as u64
}

/// One of several connections: which pages of each round are its to send.
#[derive(Debug, Clone, Copy)]
pub struct Stripe {
    /// Number of the connection, from 0.
    pub index: usize,
    /// How many connections there are; the same for all rounds of a migration.
    pub count: usize,
}

/// What a round of sending is about: which pages, and whether those that are zero are left out.
pub struct Round<'a> {
    /// The RAM that pages are read from, which the guest may be writing to.
    pub ram: &'a Ram,
    /// Which pages are sent, of all connections.
    pub left: &'a Left,
    /// Once this is true, the rest stays in `left`.
    pub stop: Option<&'a AtomicBool>,
    /// Pages are taken and sent a few at a time, for others take some, too, and somebody may wait for any.
    pub eager: bool,
    /// In the first round what is zero is not sent, as the target's RAM is zero; and what this tells was never
    /// touched is not looked at.
    pub first: Option<Option<&'a Touched>>,
    /// Bytes are added here as they go, headers included, for whoever looks at the progress.
    pub sent: &'a AtomicU64,
    /// How fast they may go; shared by all connections.
    pub pace: &'a Pace,
    /// Told of pages before they are looked at.
    pub forget: &'a Forget<'a>,
}

/// What is told of pages: number of the region, of the first word of its bitmap, and the words. What is written to them
/// from then on is for a later round.
pub type Forget<'a> = dyn Fn(usize, usize, &[u64]) -> io::Result<()> + 'a;

/// A limit on the bytes a second of all connections together.
#[derive(Debug)]
pub struct Pace {
    bytes_per_second: Option<u64>,
    /// Leaf lock.
    course: Mutex<PaceCourse>,
    ended: Condvar,
}

#[derive(Debug)]
struct PaceCourse {
    /// When the next bytes may go.
    next: Instant,
    /// Nobody waits any more.
    ended: bool,
}

impl Pace {
    /// A limit that holds from now on; `None` is without limit.
    #[must_use]
    pub fn new(bytes_per_second: Option<u64>) -> Self {
        Self {
            bytes_per_second,
            course: Mutex::new(PaceCourse {
                next: Instant::now(),
                ended: false,
            }),
            ended: Condvar::new(),
        }
    }

    /// Lets go whoever waits, which may be for hours, and whoever comes later: their connections have ended. Never blocks.
    pub fn end(&self) {
        self.lock().ended = true;
        self.ended.notify_all();
    }

    /// Waits until so many bytes may go, or until the end.
    fn wait(&self, bytes: usize) {
        let Some(limit) = self.bytes_per_second else {
            return;
        };
        #[expect(clippy::cast_precision_loss, reason = "a waiting time")]
        let time = Duration::try_from_secs_f64(bytes as f64 / limit.max(1) as f64);
        let mut course = self.lock();
        course.next = course.next.max(Instant::now()) + time.unwrap_or(Duration::from_secs(3600));
        let until = course.next;
        while !course.ended {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return;
            }
            let woken = self.ended.wait_timeout(course, left);
            course = woken.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn lock(&self) -> MutexGuard<'_, PaceCourse> {
        self.course.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sends the stripe's part of a round.
pub fn send(
    round: &Round<'_>,
    stripe: Stripe,
    out: &mut BufWriter<impl Write + WriteVolatile>,
) -> io::Result<()> {
    let step = if round.eager { 1 } else { STRIPE_WORDS };
    for (number, (region, words)) in round.ram.iter().zip(round.left).enumerate() {
        let stripes = words.chunks(STRIPE_WORDS).enumerate();
        for (index, words) in stripes.skip(stripe.index).step_by(stripe.count) {
            for (piece, words) in words.chunks(step).enumerate() {
                if round.stop.is_some_and(|stop| stop.load(Ordering::SeqCst)) {
                    return out.flush();
                }
                let first_word = index * STRIPE_WORDS + piece * step;
                let take = |word: &AtomicU64| word.swap(0, Ordering::SeqCst);
                let words: Vec<u64> = words.iter().map(take).collect();
                (round.forget)(number, first_word, &words)?;
                for (index, word) in (first_word..).zip(words).filter(|(_, word)| *word != 0) {
                    send_word(round, region, (index, word), out)?;
                }
                if round.eager {
                    out.flush()?;
                }
            }
        }
    }
    out.flush()
}

/// Sends the pages of a region that a word of its bitmap names, unless none of them was ever touched: runs of zeroes and
/// of others. The guest may write to them meanwhile; what of that goes is one of many true answers, since a later round
/// sends them again.
fn send_word(
    round: &Round<'_>,
    region: &GuestRegionMmap<DirtyLog>,
    (index, word): (usize, u64),
    out: &mut BufWriter<impl Write + WriteVolatile>,
) -> io::Result<()> {
    let offset = index * WORD_PAGES * PAGE_BYTES;
    let left = usize::try_from(region.len()).expect("64-bit host") - offset;
    let size = left.min(WORD_PAGES * PAGE_BYTES);
    if let Some(Some(touched)) = round.first
        && !touched.any(region.as_ptr() as usize + offset, size)
    {
        return Ok(());
    }
    let memory = region.get_slice(MemoryRegionAddress(offset as u64), size);
    let memory = memory.map_err(io::Error::other)?;
    let mut kinds = [None; WORD_PAGES];
    let kinds = &mut kinds[..size / PAGE_BYTES];
    for (page, kind) in kinds.iter_mut().enumerate() {
        if word & 1 << page != 0 {
            *kind = Some(kind_of(&memory, page * PAGE_BYTES)?);
        }
    }
    let mut next = 0;
    for run in kinds.chunk_by(|one, other| one == other) {
        let (from, bytes) = (next, run.len() * PAGE_BYTES);
        next += bytes;
        let Some(kind) = run[0] else {
            continue;
        };
        if kind == ZERO && round.first.is_some() {
            continue;
        }
        let at = region.start_addr().0 + (offset + from) as u64;
        out.write_all(&header(at, bytes, kind))?;
        let mut sent = HEADER_BYTES;
        if kind == DATA {
            write(&memory.subslice(from, bytes).map_err(to_io)?, out)?;
            sent += bytes;
        }
        round.pace.wait(sent);
        round.sent.fetch_add(sent as u64, Ordering::Relaxed);
    }
    Ok(())
}

/// Whether the page at `offset` is zero. Most that are not show it in their first word.
fn kind_of(memory: &VolatileSlice<'_, impl BitmapSlice>, offset: usize) -> io::Result<u32> {
    let word = memory.get_ref::<u64>(offset).map_err(to_io)?;
    if word.load() != 0 {
        return Ok(DATA);
    }
    let mut page = [0_u8; PAGE_BYTES];
    let from = memory.subslice(offset, PAGE_BYTES).map_err(to_io)?;
    from.copy_to(&mut page);
    Ok(if is_zero(&page) { ZERO } else { DATA })
}

/// Sends what is in guest memory now.
fn write(
    memory: &VolatileSlice<'_, impl BitmapSlice>,
    out: &mut BufWriter<impl Write + WriteVolatile>,
) -> io::Result<()> {
    if memory.len() >= DIRECT_BYTES {
        out.flush()?;
        return out.get_mut().write_all_volatile(memory).map_err(to_io);
    }
    let mut copy = [0_u8; DIRECT_BYTES];
    let copied = memory.copy_to(&mut copy[..memory.len()]);
    out.write_all(&copy[..copied])
}

fn to_io(error: VolatileMemoryError) -> io::Error {
    match error {
        VolatileMemoryError::IOError(error) => error,
        error => io::Error::other(error),
    }
}

/// Tells the target that this connection brings no more.
pub fn send_end(out: &mut impl Write) -> io::Result<()> {
    out.write_all(&header(0, 0, END))?;
    out.flush()
}

fn header(address: u64, size: usize, kind: u32) -> [u8; HEADER_BYTES] {
    let mut bytes = [0; HEADER_BYTES];
    let size = u32::try_from(size).expect("at most 64 pages");
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&size.to_le_bytes());
    bytes[12..].copy_from_slice(&kind.to_le_bytes());
    bytes
}

/// Sends one page, whatever is in it, and does not wait for the pace: somebody waits for it.
pub fn send_page(ram: &Ram, address: GuestAddress, out: &mut impl Write) -> io::Result<usize> {
    let mut message = [0; HEADER_BYTES + PAGE_BYTES];
    let (head, page) = message.split_at_mut(HEADER_BYTES);
    ram.read_slice(page, address).map_err(io::Error::other)?;
    let size = match is_zero(page) {
        true => 0,
        false => PAGE_BYTES,
    };
    let kind = if size == 0 { ZERO } else { DATA };
    head.copy_from_slice(&header(address.0, PAGE_BYTES, kind));
    out.write_all(&message[..HEADER_BYTES + size])?;
    Ok(HEADER_BYTES + size)
}

/// Receives pages into `ram` until the end that the source tells.
pub fn receive(ram: &Ram, from: &mut BufReader<impl Read + ReadVolatile>) -> io::Result<()> {
    while let Some((address, size, kind)) = receive_header(from)? {
        let memory = ram.get_slice(GuestAddress(address), size);
        let mut memory = memory.map_err(io::Error::other)?;
        match kind {
            DATA => read(&mut memory, from)?,
            _ => drop(memory.write(&ZEROES[..size], 0).map_err(to_io)?),
        }
    }
    Ok(())
}

/// Zeroes for the longest run.
static ZEROES: [u8; RUN_BYTES_MAX] = [0; RUN_BYTES_MAX];

/// Fills guest memory.
fn read(
    memory: &mut VolatileSlice<'_, impl BitmapSlice>,
    from: &mut BufReader<impl Read + ReadVolatile>,
) -> io::Result<()> {
    let mut filled = 0;
    while filled < memory.len() {
        // What has come with the header, or is too little for a call of its own.
        if from.buffer().is_empty() && memory.len() - filled >= DIRECT_BYTES {
            let mut rest = memory.offset(filled).map_err(to_io)?;
            prefault(&rest);
            return from.get_mut().read_exact_volatile(&mut rest).map_err(to_io);
        }
        let came = from.fill_buf()?;
        if came.is_empty() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let taken = memory.write(came, filled).map_err(to_io)?;
        from.consume(taken);
        filled += taken;
    }
    Ok(())
}

/// Has the kernel make the pages that are about to be filled, all at once instead of one by one in between.
fn prefault(memory: &VolatileSlice<'_, impl BitmapSlice>) {
    let guard = memory.ptr_guard_mut();
    let skip = guard.as_ptr().align_offset(PAGE_BYTES);
    if let Some(bytes) = memory.len().checked_sub(skip) {
        let start = guard.as_ptr().wrapping_add(skip);
        // Fails where the kernel is older than Linux 5.14, and where memory is short: then they come one by one.
        // SAFETY: guest RAM, which the slice keeps mapped; its content stays as it is.
        unsafe { libc::madvise(start.cast(), bytes, libc::MADV_POPULATE_WRITE) };
    }
}

/// Receives pages until the end that the source tells. `take` has the address of some, their size, which is 256 KiB at
/// most, and their content unless that is zeroes. The addresses are unchecked.
pub fn receive_each(from: &mut impl Read, take: &mut Take<'_>) -> io::Result<()> {
    let mut buffer = vec![0; RUN_BYTES_MAX];
    while let Some((address, size, kind)) = receive_header(from)? {
        match kind {
            DATA => {
                let part = &mut buffer[..size];
                from.read_exact(part)?;
                take(address, size, Some(part))?;
            }
            _ => take(address, size, None)?,
        }
    }
    Ok(())
}

/// Address, size of at most [`RUN_BYTES_MAX`] and kind of what comes next, [`DATA`] or [`ZERO`]; `None` at the end.
fn receive_header(from: &mut impl Read) -> io::Result<Option<(u64, usize, u32)>> {
    let mut bytes = [0; HEADER_BYTES];
    from.read_exact(&mut bytes)?;
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"));
    let address = u64::from(word(0)) | u64::from(word(4)) << 32;
    let (size, kind) = (word(8), word(12));
    let size = usize::try_from(size).expect("64-bit host");
    match kind {
        END => Ok(None),
        DATA | ZERO if size <= RUN_BYTES_MAX => Ok(Some((address, size, kind))),
        _ => Err(io::Error::other("a header of pages that makes no sense")),
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::os::unix::net::UnixStream;

    use super::*;
    use crate::board::MICRO;
    use crate::memory::{Backing, allocate};

    #[test]
    fn rounds_over_several_connections_make_a_copy() {
        let [ram, copy] = [(); 2].map(|()| allocate(&MICRO, 9, 40, Backing::Anonymous).unwrap());
        let put = |page: u64, byte: u8| ram.write_obj(byte, GuestAddress(page * 4096)).unwrap();
        for page in (0..9 * 256).step_by(7) {
            put(page, 1);
        }
        let sent = AtomicU64::new(0);
        let forgotten = RefCell::new(Vec::new());
        let forget = |region, first_word, words: &[u64]| {
            forgotten
                .borrow_mut()
                .push((region, first_word, words.len()));
            Ok(())
        };
        let round = |dirty: &Dirty, first| {
            let pages = left(dirty.clone());
            for index in 0..3 {
                let stripe = Stripe { index, count: 3 };
                let round = Round {
                    ram: &ram,
                    left: &pages,
                    stop: None,
                    eager: false,
                    first,
                    sent: &sent,
                    pace: &Pace::new(None),
                    forget: &forget,
                };
                let mut out = BufWriter::with_capacity(BUFFER_BYTES, Vec::new());
                send(&round, stripe, &mut out).unwrap();
                send_end(&mut out).unwrap();
                let bytes = out.into_inner().unwrap();
                let mut from = BufReader::with_capacity(BUFFER_BYTES, &bytes[..]);
                receive(&copy, &mut from).unwrap();
            }
        };
        let touched = Touched::open();
        round(&all(&ram), Some(touched.as_ref()));
        let first = sent.load(Ordering::Relaxed);
        assert_eq!(first, (9 * 256_u64).div_ceil(7) * (4096 + 16));
        // Every page once: stripes of 8 words, those of the first connection first.
        let stripes = [(0, 0, 8), (0, 24, 8), (0, 8, 8), (0, 32, 4), (0, 16, 8)];
        assert_eq!(forgotten.take(), stripes);
        // A page that became zero, and one that was written anew.
        put(7, 0);
        put(8, 9);
        let mut dirty = vec![vec![0; 36]];
        dirty[0][0] = 0b11 << 7;
        assert_eq!(size_bytes(&dirty), 8192);
        round(&dirty, None);
        assert_eq!(sent.load(Ordering::Relaxed) - first, 16 + 16 + 4096);
        let (mut left, mut right) = (vec![0; 9 << 20], vec![0; 9 << 20]);
        ram.read_slice(&mut left, GuestAddress(0)).unwrap();
        copy.read_slice(&mut right, GuestAddress(0)).unwrap();
        assert!(left == right);
    }

    /// Runs that are as long as they can be, runs of a page, and zeroes, through a socket that takes what it likes.
    #[test]
    fn runs_of_any_length_go_through_a_socket() {
        let [ram, copy] = [(); 2].map(|()| allocate(&MICRO, 4, 40, Backing::Anonymous).unwrap());
        let mut content = vec![0; 4 << 20];
        let lasts = (1..=u8::MAX).cycle();
        for (page, (bytes, last)) in content.chunks_mut(PAGE_BYTES).zip(lasts).enumerate() {
            if page < 700 || page.is_multiple_of(3) {
                bytes[PAGE_BYTES - 1] = last;
            }
        }
        ram.write_slice(&content, GuestAddress(0)).unwrap();
        copy.write_slice(&vec![9; 4 << 20], GuestAddress(0))
            .unwrap();
        let (near, far) = UnixStream::pair().unwrap();
        let (sent, pages, pace) = (AtomicU64::new(0), left(all(&ram)), Pace::new(None));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let round = Round {
                    ram: &ram,
                    left: &pages,
                    stop: None,
                    eager: false,
                    first: None,
                    sent: &sent,
                    pace: &pace,
                    forget: &|_, _, _| Ok(()),
                };
                let mut out = BufWriter::with_capacity(BUFFER_BYTES, near);
                send(&round, Stripe { index: 0, count: 1 }, &mut out).unwrap();
                send_end(&mut out).unwrap();
            });
            receive(&copy, &mut BufReader::with_capacity(BUFFER_BYTES, far)).unwrap();
        });
        let mut came = vec![0; 4 << 20];
        copy.read_slice(&mut came, GuestAddress(0)).unwrap();
        assert!(came == content);
    }

    #[test]
    fn nobody_waits_beyond_the_end() {
        let pace = std::sync::Arc::new(Pace::new(Some(1)));
        let (done, waits) = std::sync::mpsc::channel();
        let waiting = pace.clone();
        let waiter = atoll_thread::spawn(atoll_thread::Kind::Migration, "waits", move || {
            // Twelve days.
            waiting.wait(1 << 20);
            done.send(()).unwrap();
        });
        waits.recv_timeout(Duration::from_millis(50)).unwrap_err();
        pace.end();
        waits.recv_timeout(Duration::from_secs(60)).unwrap();
        pace.wait(1 << 20);
        waiter.unwrap().join().unwrap();
    }

    #[test]
    fn nonsense_is_an_error() {
        let ram = allocate(&MICRO, 1, 40, Backing::Anonymous).unwrap();
        for bytes in [
            &header(0, 4096, 7)[..],
            &header(0, 65 * 4096, DATA),
            &header(1 << 20, 4096, ZERO),
            &header(0, 4096, DATA),
        ] {
            receive(&ram, &mut BufReader::new(bytes)).unwrap_err();
        }
    }
}
