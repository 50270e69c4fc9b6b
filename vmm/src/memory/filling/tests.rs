// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! With the kernel's own userfaultfd, real devices and their fake driver.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::channel;
use std::time::Duration;

use atoll_devices::testing::replay::Random;
use atoll_devices::testing::{Driver, RAM_BYTES, Segment};
use atoll_devices::virtio::balloon::{Balloon, BalloonOptions};
use atoll_devices::virtio::blk::{Blk, BlkOptions};
use atoll_disk::{Cache, Engine, Format, OpenOptions, Source as Image};
use vm_memory::{Bytes, GuestAddress, GuestAddressSpace};

use super::places::{first_run, run};
use super::*;
use crate::board::MICRO;
use crate::memory::paged::{MIB, PAGES, at, page};
use crate::memory::{Backing, allocate};
use crate::saved::packed::{self, Packed, Wanted};
use crate::saved::{Layer, image, layers::Layers};

fn userfault() -> Option<UserFault> {
    let opened = UserFault::open();
    opened
        .inspect_err(|error| println!("ATOLL-SKIP: {error}"))
        .ok()
}

fn ram() -> Ram {
    allocate(&MICRO, MIB, 40, Backing::Anonymous).unwrap()
}

/// What page `number` has: words of its number; nothing in every seventh.
fn content(number: u64) -> Vec<u8> {
    let word = if number % 7 == 3 { 0 } else { number + 1 };
    word.to_le_bytes().repeat(PAGE_BYTES / 8)
}

/// A file with [`content`] in each of its pages, with holes.
fn image_file() -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(MIB << 20).unwrap();
    for number in 0..PAGES {
        let bytes = content(number);
        if !is_zero(&bytes) {
            file.write_all_at(&bytes, at(number).0).unwrap();
        }
    }
    file
}

fn image_layer() -> Layer {
    Layer {
        file: image_file(),
        packed: false,
    }
}

/// Brings the first word's pages, and the others only when they are asked for, until the gate is open.
struct Gated {
    source: Layers,
    open: Arc<AtomicBool>,
}

impl Source for Gated {
    fn next(&mut self, from: u64) -> io::Result<Option<u64>> {
        match self.open.load(Ordering::SeqCst) {
            true => self.source.next(from),
            false => Ok(Some(0)),
        }
    }

    fn read(&mut self, first: u64, pages: &mut [u8]) -> io::Result<()> {
        self.source.read(first, pages)
    }
}

fn fill(faults: UserFault, ram: Arc<Ram>, source: impl Source + 'static) -> Filling {
    let failed = |error: io::Error| panic!("{error}");
    Filling::start(faults, ram, Box::new(source), failed).unwrap()
}

fn gated(faults: UserFault, ram: Arc<Ram>, layers: Vec<Layer>) -> (Filling, Arc<AtomicBool>) {
    let open = Arc::new(AtomicBool::new(false));
    let source = Gated {
        source: Layers::open(layers, MIB << 20).unwrap(),
        open: open.clone(),
    };
    (fill(faults, ram, source), open)
}

fn wait_for(filling: &Filling) {
    while !filling.is_complete() {
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// RAM of the image, as its packed file, or as a child that has only some of it.
fn packed_layer(write: impl Fn(&Ram, &File)) -> Layer {
    let ram = ram();
    image::read(&ram, &image_file()).unwrap();
    let [raw, file] = [(); 2].map(|()| tempfile::tempfile().unwrap());
    write(&ram, &raw);
    packed::compress(&raw, &file).unwrap();
    Layer { file, packed: true }
}

fn whole() -> Layer {
    packed_layer(|ram, file| {
        packed::write(ram, Wanted::All(None), file).unwrap();
    })
}

/// Something over something, zeroes over something, something over a hole, and what did not change.
fn child() -> Layer {
    packed_layer(|ram, file| {
        ram.write_slice(&content(7), at(500)).unwrap();
        ram.write_slice(&[0; PAGE_BYTES], at(501)).unwrap();
        ram.write_slice(&content(9), at(3)).unwrap();
        let mut pages = vec![vec![0; index(PAGES) / WORD_PAGES]];
        for number in [500, 501, 3, 900] {
            pages[0][number / WORD_PAGES] |= 1 << (number % WORD_PAGES);
        }
        packed::write(ram, Wanted::Written(&pages), file).unwrap();
    })
}

/// Read by several threads at once, in any order, while the rest comes.
#[test]
fn every_page_is_what_an_eager_restore_has() {
    let forms: [fn() -> Vec<Layer>; 4] = [
        || vec![image_layer()],
        || vec![whole()],
        || vec![image_layer(), child()],
        || vec![whole(), child()],
    ];
    for layers in forms {
        let eager = ram();
        for layer in layers() {
            match layer.packed {
                true => Packed::open(layer.file, MIB << 20).unwrap().read(&eager),
                false => image::read(&eager, &layer.file),
            }
            .unwrap();
        }
        let Some(faults) = userfault() else { return };
        let lazy = Arc::new(ram());
        let source = Layers::open(layers(), MIB << 20).unwrap();
        let filling = fill(faults, lazy.clone(), source);
        std::thread::scope(|scope| {
            for seed in 1..4 {
                let (eager, lazy) = (&eager, &lazy);
                scope.spawn(move || {
                    let mut random = Random(seed);
                    for _ in 0..500 {
                        let number = random.below(index(PAGES)) as u64;
                        assert!(page(lazy, number) == page(eager, number), "{number}");
                    }
                });
            }
        });
        wait_for(&filling);
        for number in 0..PAGES {
            assert!(page(&lazy, number) == page(&eager, number), "{number}");
        }
    }
}

/// What is known to have nothing in it takes no memory, and what is touched of it is zeroes.
#[test]
fn only_what_is_asked_for_comes_while_the_rest_waits() {
    let Some(faults) = userfault() else { return };
    let ram = Arc::new(ram());
    let (filling, open) = gated(faults, ram.clone(), vec![image_layer()]);
    assert!(page(&ram, 700) == content(700));
    assert!(page(&ram, 71) == content(71));
    assert!(is_zero(&page(&ram, 73)), "nothing is in it");
    let info = filling.info();
    assert!(!info.complete && info.filled_bytes <= 3 << 18, "{info:?}");
    assert!((3..=4).contains(&info.fault_count), "{info:?}");
    open.store(true, Ordering::SeqCst);
    wait_for(&filling);
    let filled = (0..PAGES).filter(|number| !is_zero(&content(*number)));
    assert_eq!(filling.info().filled_bytes, filled.count() as u64 * 4096);
}

/// The kernel touches memory for a system call as much as a thread does.
#[test]
fn system_calls_wait_for_pages_as_well() {
    let Some(faults) = userfault() else { return };
    let ram = Arc::new(ram());
    let (_filling, _closed) = gated(faults, ram.clone(), vec![image_layer()]);
    let mut file = tempfile::tempfile().unwrap();
    ram.write_all_volatile_to(at(200), &mut file, 4 * PAGE_BYTES)
        .unwrap();
    let mut seen = vec![0; 4 * PAGE_BYTES];
    file.read_exact_at(&mut seen, 0).unwrap();
    for (bytes, number) in seen.chunks(PAGE_BYTES).zip(200..) {
        assert!(bytes == content(number), "{number}");
    }
    // Half of a page: the other half is the source's.
    let mut source = tempfile::tempfile().unwrap();
    source.write_all_at(&[9; 2048], 0).unwrap();
    std::io::Seek::rewind(&mut source).unwrap();
    ram.read_exact_volatile_from(at(400), &mut source, 2048)
        .unwrap();
    let bytes = page(&ram, 400);
    assert!(bytes[..2048] == [9; 2048] && bytes[2048..] == content(400)[2048..]);
}

const HEADER: u64 = 0x10_0000;
const STATUS: u64 = 0x10_1000;

/// One request of a disk, whose header's and status' pages are there.
fn request(driver: &mut Driver, kind: u32, sector: u64, data: Segment) {
    driver.put(
        HEADER,
        &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat(),
    );
    driver.put(STATUS, &[0xee]);
    let chain = [
        Segment::readable(HEADER, 16),
        data,
        Segment::writable(STATUS, 1),
    ];
    driver.add(0, &chain);
    driver.kick(0);
    driver.wait_used(0);
    assert_eq!(driver.get(STATUS, 1), [0]);
}

/// A disk writes from and reads into pages that are not there: by io_uring and by threads, with and without the host's
/// cache.
#[test]
fn a_disks_requests_wait_for_pages_as_well() {
    for engine in [Engine::Uring, Engine::Threads] {
        for cache in [Cache::Writeback, Cache::None] {
            let Some(faults) = userfault() else { return };
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(1 << 20).unwrap();
            let image = Image {
                path: file.path().to_owned(),
                format: Format::Raw,
                backing: Vec::new(),
            };
            let options = OpenOptions {
                engine: Some(engine),
                cache,
                ..OpenOptions::default()
            };
            let backend = match atoll_disk::open(&image, options) {
                Ok(backend) => backend,
                Err(error) => {
                    println!("ATOLL-SKIP: {}", atoll_disk::chain(&error));
                    continue;
                }
            };
            let mut driver = Driver::new(Arc::new(Blk::new(BlkOptions {
                name: "blk0".to_owned(),
                backend: Arc::new(backend),
                serial: String::new(),
                queue_count: 1,
            })));
            let ram = driver.memory.memory().into_inner();
            let (_filling, _closed) = gated(faults, ram.clone(), vec![image_layer()]);
            driver.start(u64::MAX);
            // Pages 640 to 643 to the disk, in two words; back into the middle of 771 and what is around it.
            request(&mut driver, 1, 0, Segment::readable(at(638).0, 4 * 4096));
            request(
                &mut driver,
                0,
                0,
                Segment::writable(at(771).0 - 512, 4 * 4096),
            );
            let wanted: Vec<u8> = (638..642).flat_map(content).collect();
            let mut back = vec![0; 4 * 4096];
            ram.read_slice(&mut back, GuestAddress(at(771).0 - 512))
                .unwrap();
            assert!(back == wanted, "{engine:?} {cache:?}");
            assert!(page(&ram, 770)[..4096 - 512] == content(770)[512..]);
            assert!(page(&ram, 774)[4096 - 512..] == content(774)[..512]);
        }
    }
}

/// The balloon takes pages that the source has: they come back as zeroes, those around them as they were.
#[test]
fn what_the_balloon_takes_does_not_come_from_the_source() {
    let Some(faults) = userfault() else { return };
    let balloon = Arc::new(Balloon::new(BalloonOptions {
        deflate_on_oom: true,
        reporting: true,
    }));
    let mut driver = Driver::new(balloon);
    assert_eq!(RAM_BYTES, MIB << 20);
    let ram = driver.memory.memory().into_inner();
    let (filling, open) = gated(faults, ram.clone(), vec![image_layer()]);
    driver.start(u64::MAX);
    // One that is there, one of its word that came with it, one of which nothing was touched.
    assert!(page(&ram, 900) == content(900));
    let taken = [900, 901, 600_u32];
    let numbers: Vec<u8> = taken.iter().flat_map(|page| page.to_le_bytes()).collect();
    let request = 0x10_0000;
    driver.put(request, &numbers);
    driver.add(0, &[Segment::readable(request, 12)]);
    driver.kick(0);
    driver.wait_used(0);
    assert!(is_zero(&page(&ram, 600)));
    open.store(true, Ordering::SeqCst);
    wait_for(&filling);
    for number in taken {
        assert!(is_zero(&page(&ram, number.into())), "{number}");
    }
    for number in [599, 601, 899, 902] {
        assert!(page(&ram, number) == content(number), "{number}");
    }
}

/// Threads that read, remove and write, each its own pages, while the source's come.
#[test]
fn removals_at_any_moment_lose_nothing_and_bring_nothing_back() {
    const THREADS: u64 = 4;
    for round in 0..5 {
        let Some(faults) = userfault() else { return };
        let ram = Arc::new(ram());
        let source = Layers::open(vec![image_layer()], MIB << 20).unwrap();
        let filling = fill(faults, ram.clone(), source);
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                let ram = &ram;
                scope.spawn(move || {
                    let mut random = Random(round * THREADS + thread + 1);
                    let mut pages: Vec<u64> = (thread..PAGES).step_by(4).collect();
                    let expected = |number, wanted: &[u8]| {
                        assert!(page(ram, number) == wanted, "page {number}, round {round}");
                    };
                    while !pages.is_empty() {
                        let number = pages.swap_remove(random.below(pages.len()));
                        match random.below(4) {
                            0 => expected(number, &content(number)),
                            1 => {
                                ram.write_slice(&[5; 8], at(number)).unwrap();
                                let rest = [&[5; 8], &content(number)[8..]].concat();
                                expected(number, &rest);
                            }
                            removed => {
                                remove(ram, number);
                                if removed == 3 {
                                    ram.write_slice(&[6; 8], at(number)).unwrap();
                                    remove(ram, number);
                                }
                                expected(number, &[0; PAGE_BYTES]);
                            }
                        }
                    }
                });
            }
        });
        wait_for(&filling);
    }
}

/// As the balloon does it.
#[expect(unsafe_code, reason = "madvise(2)")]
fn remove(ram: &Ram, number: u64) {
    let host = ram.get_host_address(at(number)).unwrap();
    // SAFETY: one page of RAM, to which there are no references.
    let done = unsafe { libc::madvise(host.cast(), PAGE_BYTES, libc::MADV_DONTNEED) };
    assert_eq!(done, 0);
}

/// Has its first pages, then an end.
struct Cut;

impl Source for Cut {
    fn next(&mut self, from: u64) -> io::Result<Option<u64>> {
        Ok(Some(from.min(WORD_PAGES as u64)))
    }

    fn read(&mut self, first: u64, pages: &mut [u8]) -> io::Result<()> {
        pages.fill(1);
        match first {
            0 => Ok(()),
            _ => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[test]
fn a_source_that_fails_is_told_and_gives_nobody_zeroes() {
    let Some(faults) = userfault() else { return };
    let ram = Arc::new(ram());
    let (sender, failures) = channel();
    let failed = move |error| sender.send(error).unwrap();
    let filling = Filling::start(faults, ram.clone(), Box::new(Cut), failed).unwrap();
    // Before anybody asks for what there is not.
    assert_eq!(page(&ram, 5), [1; PAGE_BYTES]);
    let waiting = {
        let ram = ram.clone();
        // Waits for ever; the process does not wait for it.
        let body = move || page(&ram, 900);
        std::thread::Builder::new()
            .name("waits".to_owned())
            .spawn(body)
            .unwrap()
    };
    let error = failures.recv().unwrap();
    assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    assert!(!filling.is_complete());
    drop(filling);
    assert!(!waiting.is_finished());
}

/// Files that are cut off after they were looked at.
#[test]
fn a_file_that_becomes_shorter_is_an_error() {
    for layer in [image_layer(), whole()] {
        let file = layer.file.try_clone().unwrap();
        let mut layers = Layers::open(vec![layer], MIB << 20).unwrap();
        assert_eq!(layers.next(0).unwrap(), Some(0));
        file.set_len(file.metadata().unwrap().len() / 2).unwrap();
        let mut pages = vec![0; WORD_PAGES * PAGE_BYTES];
        let mut next = 0;
        let failed = loop {
            match layers.next(next) {
                Ok(Some(page)) => next = page / 64 * 64 + 64,
                Ok(None) => break false,
                Err(_) => break true,
            }
            if layers.read(next - 64, &mut pages).is_err() {
                break true;
            }
        };
        assert!(failed);
    }
}

#[test]
fn a_machine_that_ends_first_ends_it() {
    let Some(faults) = userfault() else { return };
    let ram = Arc::new(ram());
    let (filling, _closed) = gated(faults, ram.clone(), vec![image_layer()]);
    assert!(page(&ram, 300) == content(300));
    drop(filling);
    assert_eq!(Arc::strong_count(&ram), 1);
}

#[test]
fn runs_of_bits() {
    assert_eq!(first_run(0), None);
    assert_eq!(first_run(u64::MAX), Some((0, 64)));
    assert_eq!(first_run(0b1011_0000), Some((4, 2)));
    assert_eq!(first_run(1 << 63), Some((63, 1)));
    assert_eq!(
        (run(0, 64), run(63, 1), run(4, 2), run(9, 0)),
        (u64::MAX, 1 << 63, 0b11_0000, 0)
    );
}
