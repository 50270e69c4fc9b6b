// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What is mapped is what would have been copied: kernels of random parts, which need not begin with a page.

use std::io::Write;

use vm_memory::{GuestMemoryRegion, bitmap::Bitmap};

use super::*;
use crate::board::MICRO;
use crate::memory::{Backing, allocate};
use crate::saved::image::{self, Touched};

const MIB: u64 = 4;
const PAGE: u64 = 4096;

/// A sequence of numbers by a seed (xorshift64).
struct Random(u64);

impl Random {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Parts of an ELF file: offset, address, size. The first bytes of the file are headers and a note.
type Part = (u64, u64, u64);

fn elf(parts: &[Part], random: &mut Random) -> Vec<u8> {
    let note: Vec<u8> = [4_u32, 4, 18]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .chain(*b"Xen\0")
        .chain(0x10_0000_u32.to_le_bytes())
        .collect();
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let count = u16::try_from(parts.len() + 1).unwrap();
    file.extend([2_u16, 62].into_iter().flat_map(u16::to_le_bytes));
    file.extend(1_u32.to_le_bytes());
    file.extend(
        [0x10_0000_u64, 64, 0]
            .into_iter()
            .flat_map(u64::to_le_bytes),
    );
    file.extend(0_u32.to_le_bytes());
    file.extend(
        [64_u16, 56, count, 64, 0, 0]
            .into_iter()
            .flat_map(u16::to_le_bytes),
    );
    let note_at = 64 + 56 * u64::from(count);
    let loads = parts.iter().map(|part| (1_u32, *part));
    for (kind, (offset, address, size)) in loads.chain([(4, (note_at, 0, note.len() as u64))]) {
        file.extend([kind, 5].into_iter().flat_map(u32::to_le_bytes));
        let words = [offset, address, address, size, size, 1];
        file.extend(words.into_iter().flat_map(u64::to_le_bytes));
    }
    file.extend(note);
    let end = parts.iter().map(|(offset, _, size)| offset + size).max();
    while (file.len() as u64) < end.unwrap() {
        // Pages of zeroes are left out where they can be.
        let zero = random.below(4) == 0;
        file.extend((0..PAGE).map(|_| match zero {
            true => 0,
            false => random.below(256).to_le_bytes()[0],
        }));
    }
    file
}

fn bytes(ram: &Ram) -> Vec<u8> {
    let mut bytes = vec![0; usize::try_from(MIB << 20).unwrap()];
    ram.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

#[test]
fn what_is_mapped_is_what_would_be_copied() {
    let mut mapped = 0;
    for seed in 1..60 {
        let mut random = Random(seed);
        let part = |random: &mut Random| {
            let offset = PAGE + random.below(20 * PAGE);
            let page = 256 + random.below(500);
            // In half of them pages of the file are pages of memory.
            let within = match random.below(2) {
                0 => random.below(PAGE),
                _ => offset % PAGE,
            };
            (offset, page * PAGE + within, random.below(6 * PAGE))
        };
        let parts: Vec<Part> = (0..1 + random.below(4))
            .map(|_| part(&mut random))
            .collect();
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(&elf(&parts, &mut random)).unwrap();
        let spec = KernelSpec {
            image: file.path().to_owned(),
            initrd: None,
            cmdline: String::new(),
            shared: false,
        };
        let [mut copying, mut sharing] = [(); 2].map(|()| BootFiles::open(&spec).unwrap());
        sharing.share_alone();
        let rams = [(); 2].map(|()| allocate(&MICRO, MIB, 40, Backing::Anonymous).unwrap());
        let [copied, shared] = &rams;
        copying.load_kernel(copied, MIB << 20).unwrap();
        sharing.load_kernel(shared, MIB << 20).unwrap();
        let content = bytes(copied);
        assert!(content == bytes(shared), "{seed}: {parts:x?}");
        mapped += sharing.mapped().len();

        // What was never touched is found in the file; without knowing of it, it would be taken for zeroes.
        let touched = Touched::open()
            .unwrap()
            .with_files(sharing.mapped())
            .unwrap();
        let image = tempfile::tempfile().unwrap();
        image::write(shared, Some(&touched), &image).unwrap();
        let again = allocate(&MICRO, MIB, 40, Backing::Anonymous).unwrap();
        image::read(&again, &image).unwrap();
        assert!(content == bytes(&again), "{seed}: {parts:x?}");

        // A reset, over what a guest has written; all of it is in the log.
        for ram in &rams {
            ram.write_slice(&vec![0xaa; 1 << 20], GuestAddress(1 << 20))
                .unwrap();
        }
        let log = atoll_devices::memory::log(shared.iter().next().unwrap());
        log.switch(true);
        copying.load_kernel(copied, MIB << 20).unwrap();
        sharing.load_kernel(shared, MIB << 20).unwrap();
        let content = bytes(copied);
        assert!(content == bytes(shared), "{seed}: {parts:x?}");
        for (_, address, size) in parts.iter().filter(|(_, _, size)| *size > 0) {
            for at in [*address, address + size / 2, address + size - 1] {
                assert!(log.dirty_at(usize::try_from(at).unwrap()), "{seed}: {at:x}");
            }
        }

        let places = sharing.mapped().to_vec();
        let size: usize = places.iter().map(Range::len).sum();
        assert_eq!(sharing.part().unwrap(), size);
        assert!(sharing.mapped().is_empty());
        file.as_file().set_len(0).unwrap();
        assert!(content == bytes(shared), "{seed}: {parts:x?}");
        assert!(shared.iter().all(|region| region.len() == MIB << 20));
    }
    assert!(mapped > 20, "{mapped}");
}
