// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The rest of a guest's memory, sent while it runs at the target already (post-copy).
//!
//! ```text
//! source                                                  target
//!   hold; End on each data connection
//!   Remaining, bitmap; State            ──►               discards what is missing, has the kernel ask for it
//!   pages, pushed                       ══►  data         takes each once (`memory::filling::arrivals`)
//!                                       ◄══  fault lines  number of a page that somebody waits for
//!   that page, if nobody has sent it    ══►  fault lines
//!                                       ◄──  Ready; Commit, Taken as in any move
//!                                       ◄══  fault lines  DONE: nothing is missing
//! ```
//! The bitmap has a bit a page, 64 in eight bytes (little endian), the ranges of the address map one after the other; a
//! request is a page's number in it, in eight bytes. So the target may build its machine, which looks at memory, before
//! Commit; until then the source goes on if anything fails. **From Commit on each side has a part of the guest**: when one
//! ends before DONE, the guest is lost, and the other one says so.

use std::io::{self, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use atoll_devices::memory::{PAGE_BYTES, Ram, WORD_PAGES, pages_of};
use atoll_devices::virtio::balloon::discard;
use atoll_thread::Kind;
use atoll_vmm_protocol::services::MemoryBacking;
use atoll_vmm_protocol::spec::MachineSpec;
use serde::{Deserialize, Serialize};
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::pages::{self, Dirty, Left};
use super::socket::Socket;
use super::{Handover, MigrationError};
use crate::memory::UserFault;
use crate::memory::filling::arrivals::{Elsewhere, Failed, Feed, Lines};

/// Instead of a page's number: nothing is missing any more.
const DONE: u64 = u64::MAX;
/// Most fault lines.
pub(super) const LINES_MAX: usize = 16;

/// That a move may end this way, as the target is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PostCopy {
    /// Connections for pages that somebody waits for, behind the data connections.
    pub fault_connections: usize,
}

/// Why a machine's memory cannot come like this, on either side.
pub fn obstacle(spec: &MachineSpec) -> Option<&'static str> {
    (spec.services.memory_backing != MemoryBacking::Anonymous).then_some(
        "post-copy needs memory that is neither shared nor huge pages: leave out --when-late post-copy",
    )
}

/// Sends the bitmap of what is missing.
pub(super) fn send_bitmap(out: &mut impl Write, missing: &Dirty) -> io::Result<()> {
    let words = missing.iter().flatten();
    let bytes: Vec<u8> = words.flat_map(|word| word.to_le_bytes()).collect();
    out.write_all(&bytes)
}

/// Receives the bitmap of `ram`'s size.
pub fn receive_bitmap(from: &mut impl Read, ram: &Ram) -> io::Result<Vec<u64>> {
    let pages = page_count(ram);
    let mut bytes = vec![0; pages / 8];
    from.read_exact(&mut bytes)?;
    let words = bytes.chunks_exact(8);
    let word = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
    Ok(words.map(word).collect())
}

fn page_count(ram: &Ram) -> usize {
    let bytes: u64 = ram.iter().map(GuestMemoryRegion::len).sum();
    usize::try_from(bytes).expect("64-bit host") / PAGE_BYTES
}

/// The source's side of the fault lines: a thread each.
pub(super) struct Service {
    results: Receiver<io::Result<()>>,
    threads: Vec<JoinHandle<()>>,
}

impl Service {
    /// Answers from `left`, which others send as well.
    pub(super) fn start(
        lines: Vec<UnixStream>,
        ram: &Arc<Ram>,
        left: &Arc<Left>,
        sent: &Arc<AtomicU64>,
    ) -> Result<Self, MigrationError> {
        let (result, results) = channel();
        let mut service = Self {
            results,
            threads: Vec::new(),
        };
        for (index, line) in lines.into_iter().enumerate() {
            let (ram, left, sent) = (ram.clone(), left.clone(), sent.clone());
            let result = result.clone();
            let body = move || {
                let served = serve(&line, &ram, &left, &sent);
                // Whoever waits here for more learns that none comes.
                let _ = line.shutdown(Shutdown::Both);
                let _ = result.send(served);
            };
            let thread = atoll_thread::spawn(Kind::Migration, &format!("fault-{index}"), body);
            let thread = thread.map_err(MigrationError::connection("start a fault line"))?;
            service.threads.push(thread);
        }
        Ok(service)
    }

    /// Waits until the target has all, or is gone; `look` is called now and then.
    pub(super) fn wait(&self, mut look: impl FnMut()) -> io::Result<()> {
        let mut failed = None;
        let mut count = 0;
        while count < self.threads.len() {
            match self.results.recv_timeout(super::source::LOOK) {
                // One line's word is enough: the others end with it.
                Ok(Ok(())) => return Ok(()),
                Ok(Err(error)) => {
                    count += 1;
                    failed = Some(error);
                }
                Err(_) => look(),
            }
        }
        Err(failed.unwrap_or_else(|| io::ErrorKind::UnexpectedEof.into()))
    }

    /// Once their connections are cut.
    pub(super) fn end(self) {
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

/// Sends the pages that are asked for and that nobody has sent, until the target says that it has all.
fn serve(line: &UnixStream, ram: &Ram, left: &Left, sent: &AtomicU64) -> io::Result<()> {
    let (mut requests, mut out) = (BufReader::new(line), line);
    loop {
        let mut number = [0; 8];
        requests.read_exact(&mut number)?;
        let number = u64::from_le_bytes(number);
        if number == DONE {
            return Ok(());
        }
        let place = place(ram, number);
        let (address, region, page) =
            place.ok_or_else(|| io::Error::other("the target asks for a page that is none"))?;
        let bit = 1 << (page % WORD_PAGES);
        let word = &left[region][page / WORD_PAGES];
        if word.fetch_and(!bit, Ordering::SeqCst) & bit != 0 {
            let bytes = pages::send_page(ram, address, &mut out)?;
            sent.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }
}

/// A page's address, its region, and its number in that.
fn place(ram: &Ram, number: u64) -> Option<(GuestAddress, usize, usize)> {
    let mut page = usize::try_from(number).ok()?;
    for (index, region) in ram.iter().enumerate() {
        let pages = usize::try_from(region.len()).expect("64-bit host") / PAGE_BYTES;
        if page < pages {
            let address = region.start_addr().0 + (page * PAGE_BYTES) as u64;
            return Some((GuestAddress(address), index, page));
        }
        page -= pages;
    }
    None
}

/// What a target has of a machine whose memory is not all there.
pub struct Late {
    /// Opened before the sandbox.
    pub faults: UserFault,
    missing: Vec<u64>,
    data: Vec<BufReader<Socket>>,
    lines: Vec<UnixStream>,
    taken: Arc<AtomicBool>,
}

impl Late {
    /// Empties what is missing of `ram`, which nobody uses yet.
    pub(super) fn new(
        faults: UserFault,
        ram: &Ram,
        missing: Vec<u64>,
        data: Vec<BufReader<Socket>>,
        lines: Vec<UnixStream>,
        handover: &Handover,
    ) -> io::Result<Self> {
        let mut words = missing.as_slice();
        for region in ram.iter() {
            let pages = usize::try_from(region.len()).expect("64-bit host") / PAGE_BYTES;
            let (own, rest) = words.split_at(pages / WORD_PAGES);
            words = rest;
            for (first, count) in runs(own) {
                let address = region.start_addr().0 + (first * PAGE_BYTES) as u64;
                discard(ram, address, (count * PAGE_BYTES) as u64)?;
            }
        }
        Ok(Self {
            faults,
            missing,
            data,
            lines,
            taken: handover.taken(),
        })
    }

    /// Its parts as the memory takes them.
    pub fn into_elsewhere(self) -> io::Result<(UserFault, Elsewhere)> {
        let data = self.data.iter().map(|data| data.get_ref().try_clone());
        let lines = self
            .lines
            .iter()
            .map(|line| line.try_clone().map(Socket::from));
        let all = data.chain(lines).collect::<io::Result<_>>()?;
        let asking = self.lines.iter().map(UnixStream::try_clone);
        let lines = Requests {
            asking: asking
                .map(|line| line.map(Mutex::new))
                .collect::<io::Result<_>>()?,
            all,
        };
        let data = self.data.into_iter().map(feed);
        let answers = self
            .lines
            .into_iter()
            .map(|line| feed(BufReader::new(line.into())));
        let elsewhere = Elsewhere {
            missing: self.missing,
            feeds: data.chain(answers).collect(),
            lines: Box::new(lines),
            failed: end_without_memory(self.taken),
        };
        Ok((self.faults, elsewhere))
    }
}

fn feed(mut stream: BufReader<Socket>) -> Feed {
    Box::new(move |take| pages::receive_each(&mut stream, take))
}

/// Runs of bits that are set.
fn runs(words: &[u64]) -> Vec<(usize, usize)> {
    let mut runs: Vec<(usize, usize)> = Vec::new();
    for page in pages_of(words.iter().copied()) {
        match runs.last_mut() {
            Some((first, count)) if *first + *count == page => *count += 1,
            _ => runs.push((page, 1)),
        }
    }
    runs
}

/// The target's side of the fault lines, and all of its connections.
struct Requests {
    /// Leaf locks, held while a request is written.
    asking: Vec<Mutex<UnixStream>>,
    all: Vec<Socket>,
}

impl Requests {
    fn say(&self, line: usize, number: u64) -> io::Result<()> {
        let line = &self.asking[line % self.asking.len()];
        let mut line = line.lock().unwrap_or_else(PoisonError::into_inner);
        line.write_all(&number.to_le_bytes())
    }
}

impl Lines for Requests {
    fn ask(&self, page: u64) -> io::Result<()> {
        let line = usize::try_from(page).expect("64-bit host");
        self.say(line, page)
    }

    fn end(&self) {
        for line in 0..self.asking.len() {
            // A source that is gone needs not know.
            let _ = self.say(line, DONE);
        }
        self.all.iter().for_each(Socket::end);
    }
}

/// Ends the process: whoever waits for a page that does not come cannot be woken, and may be any thread.
fn end_without_memory(taken: Arc<AtomicBool>) -> Failed {
    Box::new(move |pages, error| {
        let missing_kib = pages * (PAGE_BYTES as u64 >> 10);
        match taken.load(Ordering::SeqCst) {
            true => tracing::error!(
                %error,
                missing_kib,
                "the guest is lost: the source ended before all of the guest's memory was here"
            ),
            false => tracing::error!(
                %error,
                missing_kib,
                "the source ended before the machine was handed over, and may have it still"
            ),
        }
        std::process::exit(1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::board::MICRO;
    use crate::memory::{Backing, allocate};
    use vm_memory::Bytes;

    #[test]
    fn runs_go_on_from_word_to_word() {
        assert_eq!(runs(&[0, 1 << 63, 0b1001]), [(127, 2), (131, 1)]);
        assert_eq!(runs(&[!0, !0, 0]), [(0, 128)]);
        assert_eq!(runs(&[]), []);
    }

    #[test]
    fn the_bitmap_is_read_as_it_was_written_and_has_rams_size() {
        let ram = allocate(&MICRO, 1, 40, Backing::Anonymous).unwrap();
        let missing = vec![vec![1, 0, u64::MAX, 1 << 63]];
        let mut bytes = Vec::new();
        send_bitmap(&mut bytes, &missing).unwrap();
        assert_eq!(receive_bitmap(&mut &*bytes, &ram).unwrap(), missing[0]);
        receive_bitmap(&mut &bytes[1..], &ram).unwrap_err();
    }

    /// Asked for twice or already sent, a page goes once; what is no page ends the line.
    #[test]
    fn a_page_is_sent_once() {
        let ram = Arc::new(allocate(&MICRO, 1, 40, Backing::Anonymous).unwrap());
        ram.write_slice(&[7; PAGE_BYTES], GuestAddress(2 << 12))
            .unwrap();
        let left = Arc::new(pages::left(vec![vec![0b1100, 0, 0, 0]]));
        let (near, mut far) = UnixStream::pair().unwrap();
        let service = Service::start(vec![near], &ram, &left, &Arc::default()).unwrap();
        for number in [2_u64, 2, 1, 3, 256] {
            far.write_all(&number.to_le_bytes()).unwrap();
        }
        let error = service.wait(|| ()).unwrap_err().to_string();
        assert!(error.contains("a page that is none"), "{error}");
        let mut came = Vec::new();
        let end = pages::receive_each(&mut far, &mut |address, size, bytes| {
            came.push((address, size, bytes.map(|bytes| bytes[9])));
            Ok(())
        });
        end.unwrap_err();
        assert_eq!(came, [(2 << 12, 4096, Some(7)), (3 << 12, 4096, None)]);
        assert_eq!(pages::rest(&left)[0], [0; 4]);
        service.end();
    }
}
