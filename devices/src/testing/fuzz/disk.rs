// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What reaches the block layer beside guests and images: clients of an export, and a record of changes.

use std::io::{self, Read, Write};
use std::sync::Arc;

use atoll_disk::changes::{
    BlockSet, ChangeFile, CheckpointId, Found, ImageStamp, Medium, Recorder, Tracked,
};
use atoll_disk::conformance::write;
use atoll_disk::nbd::{self, Content, Export};
use atoll_disk::{Freezable, Geometry, MemoryBackend};

use super::platform::scratch;
use super::saved::assert_one_line;

const DISK_BYTES: u64 = 0x1_0200;
const BLOCK_BYTES: u32 = 512;

fn disk() -> Arc<MemoryBackend> {
    Arc::new(MemoryBackend::new(Geometry {
        size_bytes: DISK_BYTES,
        read_only: false,
    }))
}

/// A connection whose other end has said everything, and listens as long as it likes.
struct Client<'a> {
    says: &'a [u8],
    heard: u64,
    hears_max: u64,
}

impl Read for Client<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.says.read(buffer)
    }
}

impl Write for Client<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        if self.heard > self.hears_max {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.heard += buffer.len() as u64;
        Ok(buffer.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Everything that a client sends, from its flags on. Byte 0: how much it hears before it leaves.
pub fn nbd(input: &[u8]) {
    let Some((&patience, says)) = input.split_first() else {
        return;
    };
    let disk = Freezable::new(disk());
    write(&disk, 0x8000, &[7; 512]).unwrap();
    let mut changed = BlockSet::new(DISK_BYTES, BLOCK_BYTES);
    changed.insert(&(0x8000..0x8200));
    changed.insert(&(DISK_BYTES - 1..DISK_BYTES));
    let export = |name: &str, changed: Option<BlockSet>| Export {
        name: name.to_owned(),
        content: Content::Frozen(disk.freeze(scratch("fleece", 0)).unwrap()),
        changed: changed.map(|set| ("backup".to_owned(), set)),
    };
    let exports = [export("disk0", Some(changed))];
    let mut client = Client {
        says,
        heard: 0,
        hears_max: match patience {
            0xff => u64::MAX,
            few => u64::from(few) * 16,
        },
    };
    match nbd::converse(&mut client, &exports, |export| export.content.open()) {
        Ok(()) => {}
        Err(error) => assert_one_line(&error),
    }
    // An answer to each request, no longer than the disk and its extents; a request has 28 bytes, an option 16.
    let answers = 1 + says.len() as u64 / 16;
    assert!(
        client.heard <= answers * (2 * DISK_BYTES + 4096),
        "{}",
        client.heard
    );
}

/// A client's flags, then its words.
fn client(words: &[Vec<u8>]) -> Vec<u8> {
    [&[0xff, 0, 0, 0, 3][..], &words.concat()].concat()
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = b"IHAVEOPT".to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    bytes
}

fn request(flags: u16, command: u16, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend([9; 8]);
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

fn text(text: &str) -> Vec<u8> {
    let length = u32::try_from(text.len()).unwrap();
    [&length.to_be_bytes()[..], text.as_bytes()].concat()
}

/// Requests that are right, and wrong in one way.
fn requests() -> [Vec<u8>; 12] {
    let size = u32::try_from(DISK_BYTES).unwrap();
    let last = DISK_BYTES - 512;
    [
        request(0, 0, 0, size),
        request(1 << 2, 0, last, 512),
        request(0, 0, last, 513),
        request(0, 0, u64::MAX, u32::MAX),
        request(0, 0, 0, 0),
        request(0, 3, 0, 0),
        request(0, 1, 0, 4),
        request(0, 4, 0, 4),
        request(0, 7, 0, size),
        request(1 << 3, 7, 0x8100, 0x8000),
        request(0, 7, last, 600),
        request(0, 99, 0, 0),
    ]
}

/// Whole conversations, by simple and by structured replies, and each option and request with something wrong.
pub fn nbd_corpus() -> Vec<Vec<u8>> {
    let go = option(7, &[text("disk0"), vec![0, 3, 0, 0, 0, 1, 0, 3]].concat());
    let query = |name: &str| [text("disk0"), vec![0, 0, 0, 1], text(name)].concat();
    let structured = option(8, &[]);
    let chosen = option(10, &query("qemu:dirty-bitmap:backup"));
    let end = request(0, 2, 0, 0);
    let mut all = vec![Vec::new(), vec![0xff; 5], vec![0, 0, 0, 0, 1], client(&[])];
    for request in &requests() {
        let words = [go.clone(), request.clone(), end.clone()];
        all.push(client(&words));
        let words = [
            structured.clone(),
            chosen.clone(),
            go.clone(),
            request.clone(),
            end.clone(),
        ];
        all.push(client(&words));
        let mut impatient = client(&words);
        impatient[0] = 20;
        all.push(impatient);
    }
    all.push(client(&[
        go.clone(),
        request(0, 1, 0, 512),
        vec![1; 512],
        end.clone(),
    ]));
    for words in [
        option(1, b"disk0"),
        option(1, b""),
        option(1, b"another"),
        option(2, &[]),
        option(3, &[]),
        option(3, b"x"),
        option(5, &[]),
        option(6, &[text("disk0"), vec![0, 2, 0, 1]].concat()),
        option(6, &text("disk0")),
        option(7, &[text("another"), vec![0, 0]].concat()),
        option(7, &[0xff; 6]),
        option(8, b"x"),
        option(9, &query("base:")),
        option(9, &[text(""), vec![0; 4]].concat()),
        option(10, &[text("disk0"), vec![0xff; 4]].concat()),
    ] {
        all.push(client(&[
            structured.clone(),
            words,
            go.clone(),
            end.clone(),
        ]));
    }
    let mut large = option(3, &[]);
    large[12..].copy_from_slice(&u32::MAX.to_be_bytes());
    all.push(client(&[large]));
    all
}

/// A file in memory.
#[derive(Default)]
struct Bytes(Vec<u8>);

impl Medium for &mut Bytes {
    fn read_exact_at(&self, buffer: &mut [u8], offset_bytes: u64) -> io::Result<()> {
        let start = usize::try_from(offset_bytes).unwrap();
        let part = self
            .0
            .get(start..)
            .and_then(|rest| rest.get(..buffer.len()));
        buffer.copy_from_slice(part.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_all_at(&mut self, data: &[u8], offset_bytes: u64) -> io::Result<()> {
        let start = usize::try_from(offset_bytes).unwrap();
        let end = start + data.len();
        self.0.resize(self.0.len().max(end), 0);
        self.0[start..end].copy_from_slice(data);
        Ok(())
    }

    fn sync(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// CRC-32, as the file has it.
fn crc32(bytes: &[u8]) -> u32 {
    let step = |sum: u32, byte: &u8| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            sum >> 1 ^ (0xedb8_8320 & 0_u32.wrapping_sub(sum & 1))
        })
    };
    !bytes.iter().fold(u32::MAX, step)
}

/// Offsets of the checksum of the bits and of that of the header, and of the bits.
const BITS_SUM: usize = 28;
const HEADER_SUM: usize = 68;
const BITS: usize = 4096;

/// A record of changes, as the last run left it. Byte 0: bit 0 makes its checksums right, so that the fields behind them
/// count.
pub fn changes(input: &[u8]) {
    let Some((&first, file)) = input.split_first() else {
        return;
    };
    let mut file = Bytes(file.to_vec());
    if first & 1 != 0 && file.0.len() > HEADER_SUM + 4 {
        let words = usize::try_from(DISK_BYTES.div_ceil(512).div_ceil(64)).unwrap();
        let bits = file.0.get(BITS..).unwrap_or_default();
        let sum = crc32(&bits[..bits.len().min(8 * words)]);
        file.0[BITS_SUM..][..4].copy_from_slice(&sum.to_le_bytes());
        let sum = crc32(&file.0[..HEADER_SUM]);
        file.0[HEADER_SUM..][..4].copy_from_slice(&sum.to_le_bytes());
    }
    let stamp = ImageStamp::default();
    let tracked = Tracked::new(disk());
    let opened = Recorder::open(ChangeFile::new(&mut file), &tracked, stamp, BLOCK_BYTES);
    let (mut recorder, found) = opened.expect("memory");
    let changes = recorder.begin().unwrap();
    assert_eq!(
        changes.since,
        match found {
            Found::Since(checkpoint) => Some(checkpoint),
            Found::Nothing { .. } => None,
        }
    );
    let mut last = 0;
    for range in changes.blocks.ranges() {
        assert!(range.start >= last && range.start < range.end && range.end <= DISK_BYTES);
        last = range.end;
    }
    let total = changes.blocks.total_bytes();
    assert!(
        changes.since.is_some() || total == DISK_BYTES,
        "all of it is to be copied"
    );
    let checkpoint = CheckpointId([1; 16]);
    recorder.commit(checkpoint).unwrap();
    recorder.close(stamp).unwrap();
    // What this run left is good, whatever it began with.
    let again = Recorder::open(ChangeFile::new(&mut file), &tracked, stamp, BLOCK_BYTES);
    assert_eq!(again.unwrap().1, Found::Since(checkpoint));
}

/// A file of a run that ended, one in use, and one whose bits go beyond the disk's end.
pub fn changes_corpus() -> Vec<Vec<u8>> {
    let mut file = Bytes::default();
    let stamp = ImageStamp::default();
    let tracked = Tracked::new(disk());
    let opened = Recorder::open(ChangeFile::new(&mut file), &tracked, stamp, BLOCK_BYTES);
    let (mut recorder, _) = opened.unwrap();
    recorder.begin().unwrap();
    recorder.commit(CheckpointId([3; 16])).unwrap();
    write(&tracked, 512, &[1; 1024]).unwrap();
    recorder.close(stamp).unwrap();
    let with = |first: u8, change: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = file.0.clone();
        change(&mut bytes);
        [vec![first], bytes].concat()
    };
    vec![
        Vec::new(),
        with(0, &|_| {}),
        with(1, &|_| {}),
        with(1, &|bytes| bytes[12] = 0),
        with(1, &|bytes| bytes.truncate(BITS + 3)),
        // Blocks of 1024 bytes, half as many.
        with(1, &|bytes| bytes[25] = 4),
        // Blocks behind the last.
        with(1, &|bytes| bytes[BITS..].fill(0xff)),
    ]
}
