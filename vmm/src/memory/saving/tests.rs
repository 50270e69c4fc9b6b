// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! With the kernel's own userfaultfd: threads that write while memory is saved, and a sink that is opened and shut.

use std::fs::File;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Condvar, Mutex};

use atoll_devices::virtio::balloon::discard;

use super::*;
use crate::board::MICRO;
use crate::memory::paged::{MIB, PAGES, at, page};
use crate::memory::{Backing, HugePage, allocate};

const PATIENCE: Duration = Duration::from_secs(60);

fn device() -> Option<File> {
    crate::memory::open_device()
        .inspect_err(|error| println!("ATOLL-SKIP: {error}"))
        .ok()
}

/// What page `number` has at the moment: nothing in every third, which nobody has touched.
fn content(number: u64) -> Vec<u8> {
    let word = if number % 3 == 1 { 0 } else { number + 1 };
    word.to_le_bytes().repeat(PAGE_BYTES / 8)
}

fn ram(backing: Backing) -> Option<Arc<Ram>> {
    let ram = allocate(&MICRO, MIB, 40, backing);
    let ram = ram
        .inspect_err(|error| println!("ATOLL-SKIP: {error}"))
        .ok()?;
    for number in (0..PAGES).filter(|number| number % 3 != 1) {
        ram.write_slice(&content(number), at(number)).unwrap();
    }
    Some(Arc::new(ram))
}

/// A word as it was put: its first page, those that are wanted, and all bytes.
type Word = (u64, u64, Vec<u8>);

/// Everything that was put, and how many words may still be.
#[derive(Default)]
struct Store {
    state: Mutex<(Vec<Word>, usize)>,
    opened: Condvar,
}

impl Store {
    /// Lets so many words more in.
    fn open(&self, words: usize) {
        self.state.lock().unwrap().1 += words;
        self.opened.notify_all();
    }

    /// The pages, each once.
    fn pages(&self) -> std::collections::BTreeMap<u64, Vec<u8>> {
        let mut pages = std::collections::BTreeMap::new();
        for (first, wanted, bytes) in &self.state.lock().unwrap().0 {
            for (index, bytes) in bytes.chunks_exact(PAGE_BYTES).enumerate() {
                if wanted & 1 << index != 0 {
                    let again = pages.insert(first + index as u64, bytes.to_vec());
                    assert!(again.is_none(), "page {first} + {index} came twice");
                }
            }
        }
        pages
    }
}

/// Takes what the store lets in, or fails.
struct Gated {
    store: Arc<Store>,
    fails: bool,
}

impl Sink for Gated {
    fn put(&mut self, first: u64, wanted: u64, pages: &[u8]) -> io::Result<u64> {
        let state = self.store.state.lock().unwrap();
        let mut state = self
            .store
            .opened
            .wait_while(state, |state| state.1 == 0)
            .unwrap();
        if self.fails {
            return Err(io::Error::from_raw_os_error(libc::ENOSPC));
        }
        state.1 -= 1;
        state.0.push((first, wanted, pages.to_vec()));
        Ok(u64::from(wanted.count_ones()) * PAGE_BYTES as u64)
    }

    fn end(self: Box<Self>) -> io::Result<()> {
        Ok(())
    }
}

fn spawn<T: Send + 'static>(body: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let builder = std::thread::Builder::new().name("writer".to_owned());
    builder.spawn(body).unwrap()
}

type Ended = Receiver<Result<u64, SavingError>>;

fn start(
    writes: Writes,
    ram: &Arc<Ram>,
    wanted: Vec<u64>,
    sink: Gated,
    change: impl FnOnce(&mut Order),
) -> (Saving, Ended) {
    let (sender, ended): (Sender<_>, _) = channel();
    let mut order = Order {
        writes,
        ram: ram.clone(),
        wanted,
        unit_words: 1,
        bytes_per_second: None,
        sink: Box::new(sink),
    };
    change(&mut order);
    let told = move |done| sender.send(done).unwrap();
    (Saving::start(order, told).unwrap(), ended)
}

fn all(ram: &Ram) -> Vec<u64> {
    let mut words = Vec::new();
    mark_words(ram, &mut words, |_, words| words.fill(!0));
    words
}

#[track_caller]
fn check_content(store: &Store) {
    let pages = store.pages();
    assert_eq!(pages.len() as u64, PAGES);
    for (number, bytes) in pages {
        assert!(bytes == content(number), "page {number}");
    }
}

/// What is saved is what was there at the start, whoever writes what and where meanwhile: with and without words that are
/// saved in order.
#[track_caller]
fn check_kind(writes: impl Fn() -> Writes, ram: impl Fn() -> Arc<Ram>, unit_words: usize) {
    for pace in [Some(1), None] {
        check_pace(writes(), &ram(), unit_words, pace);
    }
}

#[track_caller]
fn check_pace(writes: Writes, ram: &Arc<Ram>, unit_words: usize, pace: Option<u64>) {
    let store = Arc::new(Store::default());
    let sink = Gated {
        store: store.clone(),
        fails: false,
    };
    let (saving, ended) = start(writes, ram, all(ram), sink, |order| {
        order.unit_words = unit_words;
        order.bytes_per_second = pace;
    });
    std::thread::scope(|scope| {
        for first in 0..4 {
            scope.spawn(move || {
                // Backwards, each another quarter of every word; also what did not exist, and twice.
                for number in (0..PAGES).rev().filter(|number| number % 4 == first) {
                    for _ in 0..2 {
                        ram.write_slice(&[7; 100], GuestAddress(at(number).0 + 50))
                            .unwrap();
                    }
                    // By the kernel.
                    let zero = File::open("/dev/zero").unwrap();
                    let done = ram.read_exact_volatile_from(at(number), &mut { zero }, 10);
                    done.unwrap();
                }
            });
        }
        store.open(usize::MAX >> 1);
    });
    let bytes = ended.recv_timeout(PATIENCE).unwrap().unwrap();
    assert_eq!(bytes, MIB << 20);
    assert!(saving.left_bytes() == 0 && (pace.is_none() || saving.fault_count() > 0));
    check_content(&store);
    for number in 0..PAGES {
        let page = page(ram, number);
        assert!(page[..10] == [0; 10] && page[50..150] == [7; 100]);
        assert!(page[200..] == content(number)[200..]);
    }
}

#[test]
fn what_is_saved_is_what_was_there() {
    let Some(device) = device() else { return };
    let anonymous = || ram(Backing::Anonymous).unwrap();
    let shared = || ram(Backing::Shared).unwrap();
    check_kind(|| Writes::open(&device, false).unwrap(), anonymous, 1);
    check_kind(|| Writes::open_as_old(&device).unwrap(), anonymous, 1);
    check_kind(|| Writes::open(&device, true).unwrap(), shared, 1);
    let huge = || ram(Backing::Huge(HugePage::Mib2));
    if huge().is_some() {
        let huge = || huge().unwrap();
        check_kind(|| Writes::open(&device, true).unwrap(), huge, 8);
    }
}

/// The guest waits for a page that is not saved, and goes on when it is read, before it is written anywhere.
#[test]
fn who_writes_waits_until_the_page_is_read() {
    let Some(device) = device() else { return };
    let ram = ram(Backing::Anonymous).unwrap();
    let store = Arc::new(Store::default());
    let sink = Gated {
        store: store.clone(),
        fails: false,
    };
    // Nothing in order.
    let writes = Writes::open(&device, false).unwrap();
    let (saving, ended) = start(writes, &ram, all(&ram), sink, |order| {
        order.bytes_per_second = Some(1);
    });
    let write = |number: u64| {
        let ram = ram.clone();
        spawn(move || ram.write_obj(9_u8, at(number)).unwrap())
    };
    // The first word's turn has come; it is read, and the sink does not take it.
    write(10).join().unwrap();
    let waits = write(700);
    assert_eq!(page(&ram, 700), content(700), "can be read");
    std::thread::sleep(Duration::from_millis(20));
    assert!(!waits.is_finished() && store.pages().is_empty());
    store.open(1);
    waits.join().unwrap();
    store.open(usize::MAX >> 1);
    while store.pages().len() < 128 {
        std::thread::sleep(Duration::from_millis(1));
    }
    saving.cancel();
    let ended = ended.recv_timeout(PATIENCE).unwrap();
    assert!(matches!(ended, Err(SavingError::Cancelled)), "{ended:?}");
    let pages = store.pages();
    assert!(pages.keys().all(|number| [0, 10].contains(&(number / 64))));
    assert!(
        pages
            .iter()
            .all(|(number, bytes)| *bytes == content(*number))
    );
    assert!(saving.fault_count() > 0);
    assert_eq!(saving.left_bytes(), 14 << 18);
    // Nothing waits now, and nobody has to write to what is given back.
    for number in 0..PAGES {
        ram.write_obj(1_u8, at(number)).unwrap();
    }
    assert!(ram.iter().all(|region| !memory::log(region).keeps()));
}

#[test]
fn a_full_sink_lets_everybody_go_on() {
    let Some(device) = device() else { return };
    let ram = ram(Backing::Anonymous).unwrap();
    let store = Arc::new(Store::default());
    let sink = Gated {
        store: store.clone(),
        fails: true,
    };
    let (saving, ended) = start(
        Writes::open(&device, false).unwrap(),
        &ram,
        all(&ram),
        sink,
        |_| {},
    );
    let waiting: Vec<_> = (0..PAGES / 64)
        .map(|word| {
            let ram = ram.clone();
            spawn(move || ram.write_obj(9_u8, at(word * 64)).unwrap())
        })
        .collect();
    store.open(1);
    let error = ended.recv_timeout(PATIENCE).unwrap().unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert_eq!(error.to_string(), "write memory");
    assert!(source.starts_with("No space left"), "{source}");
    for thread in waiting {
        thread.join().unwrap();
    }
    drop(saving);
    // Another one may begin.
    let (_, ended) = start(
        Writes::open(&device, false).unwrap(),
        &ram,
        vec![0; 16],
        Gated { store, fails: true },
        |_| {},
    );
    assert_eq!(ended.recv_timeout(PATIENCE).unwrap().unwrap(), 0);
}

/// Pages that a balloon gives back are saved first; those that nobody wants are not.
#[test]
fn what_is_given_back_is_saved_first() {
    let Some(device) = device() else { return };
    for backing in [Backing::Anonymous, Backing::Shared] {
        let ram = ram(backing).unwrap();
        let store = Arc::new(Store::default());
        let sink = Gated {
            store: store.clone(),
            fails: false,
        };
        let writes = Writes::open(&device, backing == Backing::Shared).unwrap();
        let mut wanted = vec![0; 16];
        // Words 2 and 3, of the latter its odd pages.
        wanted[2] = !0;
        wanted[3] = 0xaaaa_aaaa_aaaa_aaaa;
        let (saving, ended) = start(writes, &ram, wanted, sink, |_| {});
        let giver = {
            let ram = ram.clone();
            spawn(move || discard(&ram, 0, MIB << 20).unwrap())
        };
        while saving.fault_count() == 0 && !giver.is_finished() {
            store.open(1);
            std::thread::sleep(Duration::from_millis(1));
        }
        store.open(usize::MAX >> 1);
        assert_eq!(giver.join().unwrap(), MIB << 20);
        let bytes = ended.recv_timeout(PATIENCE).unwrap().unwrap();
        assert_eq!(bytes, 96 * PAGE_BYTES as u64);
        for (number, bytes) in store.pages() {
            assert!(bytes == content(number), "{backing:?}: page {number}");
            assert!(number / 64 == 2 || (number / 64 == 3 && number % 2 == 1));
        }
        assert!((0..PAGES).all(|number| page(&ram, number) == [0; PAGE_BYTES]));
    }
}

/// Memory that is a file of its own kind is refused with one line.
#[test]
fn what_cannot_be_protected_is_refused() {
    let Some(device) = device() else { return };
    let null = File::open("/dev/null").unwrap();
    let error = Writes::open(&null, false).unwrap_err();
    assert_eq!(error.to_string(), "make a userfaultfd");
    let file = tempfile::tempfile().unwrap();
    file.set_len(MIB << 20).unwrap();
    let mapped = Arc::new(crate::saved::image::map(&MICRO, MIB, &file).unwrap());
    let order = Order {
        writes: Writes::open(&device, false).unwrap(),
        wanted: all(&mapped),
        ram: mapped.clone(),
        unit_words: 1,
        bytes_per_second: None,
        sink: Box::new(Gated {
            store: Arc::default(),
            fails: true,
        }),
    };
    let error = Saving::start(order, |_| {}).map(|_| ()).unwrap_err();
    assert!(
        matches!(error, SavingError::Writes(WritesError::Watch(_))),
        "{error:?}"
    );
    assert!(mapped.iter().all(|region| !memory::log(region).keeps()));
}
