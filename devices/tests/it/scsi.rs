// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! SCSI host: commands of disks and drives through the rings, units that come and go, media that change.

use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use atoll_devices::scsi::{Target, TargetKind, TargetOptions};
use atoll_devices::state::DeviceState;
use atoll_devices::testing::{Driver, Segment};
use atoll_devices::virtio::scsi::{Scsi, ScsiOptions};
use atoll_disk::{
    BlockBackend, Faulty, Geometry, Limited, Limits, MemoryBackend, Operation, conformance,
};

use crate::blk::{slow, taken};
use crate::pitfalls::while_it_changes;

const DISK_BYTES: u64 = 1 << 20;
const REQUEST: u64 = 0x10_0000;
const RESPONSE: u64 = 0x10_1000;
const DATA_OUT: u64 = 0x18_0000;
const DATA_IN: u64 = 0x20_0000;
const RESPONSE_BYTES: u32 = 108;
/// First request queue.
const QUEUE: usize = 2;

pub(crate) fn memory(read_only: bool) -> Arc<MemoryBackend> {
    Arc::new(MemoryBackend::new(Geometry {
        size_bytes: DISK_BYTES,
        read_only,
    }))
}

fn target(kind: TargetKind, medium: Option<Arc<dyn BlockBackend>>) -> Arc<Target> {
    let serial = "serial-of-a-unit".to_owned();
    Arc::new(Target::new(TargetOptions {
        kind,
        serial,
        medium,
    }))
}

pub(crate) fn disk(medium: Arc<dyn BlockBackend>) -> Arc<Target> {
    target(TargetKind::Disk, Some(medium))
}

pub(crate) fn device(targets: &[(u8, Arc<Target>)]) -> (Arc<Scsi>, Driver) {
    let targets: BTreeMap<_, _> = targets.iter().cloned().collect();
    let scsi = Arc::new(
        Scsi::new(ScsiOptions {
            name: "scsi".to_owned(),
            queue_count: 2,
            targets,
        })
        .unwrap(),
    );
    let driver = Driver::new(scsi.clone());
    (scsi, driver)
}

/// What a command ended in.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Ended {
    response: u8,
    /// Key, code and qualifier of CHECK CONDITION.
    sense: Option<(u8, u8, u8)>,
    residual: u32,
    data: Vec<u8>,
}

impl Ended {
    #[track_caller]
    pub(crate) fn good(self) -> Vec<u8> {
        assert_eq!((self.response, self.sense), (0, None));
        self.data
    }

    #[track_caller]
    fn failed(self) -> (u8, u8, u8) {
        assert_eq!(self.response, 0);
        self.sense.expect("CHECK CONDITION")
    }
}

/// Runs one command on target `number`, with `out` for the unit and room for `room` bytes from it.
pub(crate) fn run(driver: &mut Driver, number: u8, cdb: &[u8], out: &[u8], room: u32) -> Ended {
    run_on(
        driver,
        QUEUE,
        [1, number, 0x40, 0, 0, 0, 0, 0],
        cdb,
        out,
        room,
    )
}

fn run_on(
    driver: &mut Driver,
    queue: usize,
    lun: [u8; 8],
    cdb: &[u8],
    out: &[u8],
    room: u32,
) -> Ended {
    let mut request = [0; 51];
    request[..8].copy_from_slice(&lun);
    request[19..19 + cdb.len()].copy_from_slice(cdb);
    driver.put(REQUEST, &request);
    driver.put(RESPONSE, &[0xee; 108]);
    driver.put(DATA_OUT, out);
    let out_bytes = u32::try_from(out.len()).unwrap();
    let mut chain = vec![Segment::readable(REQUEST, 51)];
    chain.extend((out_bytes > 0).then(|| Segment::readable(DATA_OUT, out_bytes)));
    // The response in two pieces: its parts may lie anywhere.
    chain.push(Segment::writable(RESPONSE, 7));
    chain.push(Segment::writable(RESPONSE + 7, RESPONSE_BYTES - 7));
    // Across the border of the two regions.
    chain.extend((room > 0).then(|| Segment::writable(DATA_IN - 256, room)));
    let head = driver.add(queue, &chain);
    driver.kick(queue);
    let (used, written) = driver.wait_used(queue);
    assert_eq!(used, head);
    let response = driver.get(RESPONSE, 108);
    let sense = (response[10] == 2).then(|| (response[14], response[24], response[25]));
    let data_bytes = usize::try_from(written - RESPONSE_BYTES).unwrap();
    Ended {
        response: response[11],
        sense,
        residual: u32::from_le_bytes(response[4..8].try_into().unwrap()),
        data: driver.get(DATA_IN - 256, data_bytes),
    }
}

pub(crate) fn pattern(length: usize) -> Vec<u8> {
    (0..=250).cycle().take(length).collect()
}

const READ_10: [u8; 10] = [0x28, 0, 0, 0, 0, 3, 0, 0, 16, 0];
pub(crate) const WRITE_10: [u8; 10] = [0x2a, 0, 0, 0, 0, 3, 0, 0, 16, 0];
const READY: [u8; 6] = [0; 6];

#[test]
fn every_form_of_read_and_write() {
    let (_, mut driver) = device(&[(3, disk(memory(false)))]);
    driver.start(u64::MAX);
    let data = pattern(8192);
    let cases: [(&[u8], &[u8]); 4] = [
        (&[0x0a, 0, 0, 3, 16, 0], &[0x08, 0, 0, 3, 16, 0]),
        (&WRITE_10, &READ_10),
        (
            &[0xaa, 8, 0, 0, 0, 3, 0, 0, 0, 16, 0, 0],
            &[0xa8, 0, 0, 0, 0, 3, 0, 0, 0, 16, 0, 0],
        ),
        (
            &[0x8a, 8, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 16, 0, 0],
            &[0x88, 0, 0, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 16, 0, 0],
        ),
    ];
    for (index, (write, read)) in cases.into_iter().enumerate() {
        let mut data = data.clone();
        data[0] = u8::try_from(index).unwrap();
        run(&mut driver, 3, write, &data, 0).good();
        assert_eq!(run(&mut driver, 3, read, &[], 8192).good(), data);
        run(&mut driver, 3, &[0x35, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[], 0).good();
    }
    // More room than data; less than data.
    let ended = run(&mut driver, 3, &READ_10, &[], 10_000);
    assert_eq!((ended.residual, ended.data.len()), (10_000 - 8192, 8192));
    assert_eq!(run(&mut driver, 3, &READ_10, &[], 4096).response, 1);
    assert_eq!(run(&mut driver, 3, &WRITE_10, &data[..512], 0).response, 1);
    let nothing = [0x28, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    assert!(run(&mut driver, 3, &nothing, &[], 0).good().is_empty());
}

/// Another vCPU moves a read to blocks far behind the disk's end and back: it is one or the other.
#[test]
fn a_command_that_changes_while_it_is_read() {
    let (_, mut driver) = device(&[(0, disk(memory(false)))]);
    driver.start(u64::MAX);
    let data = pattern(512);
    let [mut write, mut read] = [WRITE_10, READ_10];
    for command in [&mut write, &mut read] {
        command[8] = 1;
    }
    run(&mut driver, 0, &write, &data, 0).good();
    let memory = driver.memory.clone();
    let highest_of_block = REQUEST + 19 + 2;
    while_it_changes(&memory, highest_of_block, [[0], [0xff]], || {
        let ended = run(&mut driver, 0, &read, &[], 512);
        let reads = ended.sense.is_none();
        match reads {
            true => assert_eq!(ended.good(), data),
            false => assert_eq!(ended.failed(), (5, 0x21, 0)),
        }
        reads
    });
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_unit_tells_what_it_is() {
    let (_, mut driver) = device(&[(0, disk(memory(false)))]);
    assert_eq!(
        u32::from_le_bytes(driver.device_config(0)),
        2,
        "request queues"
    );
    assert_eq!(u32::from_le_bytes(driver.device_config(20)), 96);
    assert_eq!(u32::from_le_bytes(driver.device_config(24)), 32);
    driver.start(u64::MAX);
    let identity = run(&mut driver, 0, &[0x12, 0, 0, 0, 255, 0], &[], 255).good();
    assert_eq!((identity.len(), identity[0], identity[1]), (36, 0, 0));
    assert_eq!(&identity[8..16], b"ATOLL   ");
    let short = run(&mut driver, 0, &[0x12, 0, 0, 0, 5, 0], &[], 255).good();
    assert_eq!(short.len(), 5);
    let page =
        |driver: &mut Driver, number| run(driver, 0, &[0x12, 1, number, 0, 255, 0], &[], 255);
    let pages = page(&mut driver, 0).good();
    for number in &pages[4..] {
        let data = page(&mut driver, *number).good();
        let length = usize::from(u16::from_be_bytes([data[2], data[3]]));
        assert_eq!((data[1], data.len()), (*number, length + 4));
    }
    assert_eq!(&page(&mut driver, 0x80).good()[4..], b"serial-of-a-unit");
    assert_eq!(page(&mut driver, 0xb2).good()[5], 0xe0, "thin");
    assert_eq!(page(&mut driver, 0x99).failed(), (5, 0x24, 0));
    let capacity = run(&mut driver, 0, &[0x25; 1], &[], 8).good();
    assert_eq!(capacity, [0, 0, 7, 0xff, 0, 0, 2, 0]);
    let mut long = [0; 16];
    (long[0], long[1], long[13]) = (0x9e, 0x10, 32);
    let capacity = run(&mut driver, 0, &long, &[], 32).good();
    assert_eq!(
        (&capacity[..8], capacity[14]),
        (&2047_u64.to_be_bytes()[..], 0x80)
    );
    let luns = run(
        &mut driver,
        0,
        &[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 64, 0, 0],
        &[],
        64,
    )
    .good();
    assert_eq!((luns.len(), luns[3]), (16, 8));
    for (cdb, header) in [
        (&[0x1a, 0, 0x3f, 0, 255, 0][..], 4),
        (&[0x5a, 0, 8, 0, 0, 0, 0, 0, 255, 0], 8),
    ] {
        let mode = run(&mut driver, 0, cdb, &[], 255).good();
        let parameter = mode[if header == 4 { 2 } else { 3 }];
        assert_eq!(
            (parameter, mode[header], mode[header + 2]),
            (0x10, 8, 4),
            "write cache"
        );
    }
    assert_eq!(
        run(&mut driver, 0, &[0x1a, 0, 0x11, 0, 255, 0], &[], 255).failed(),
        (5, 0x24, 0)
    );
    assert_eq!(
        run(&mut driver, 0, &[0x46], &[], 8).failed(),
        (5, 0x20, 0),
        "no drive"
    );
}

#[test]
fn nobody_answers_where_nobody_is() {
    let (_, mut driver) = device(&[(1, disk(memory(false)))]);
    driver.start(u64::MAX);
    for (lun, response) in [
        ([1, 0, 0x40, 0, 0, 0, 0, 0], 3),
        ([1, 200, 0, 0, 0, 0, 0, 0], 3),
        ([0, 1, 0x40, 0, 0, 0, 0, 0], 3),
        ([0xff; 8], 3),
        ([1, 1, 0, 0, 0, 0, 0, 0], 0),
    ] {
        let ended = run_on(&mut driver, QUEUE, lun, &READY, &[], 0);
        assert_eq!(ended.response, response, "{lun:?}");
    }
    let other = [1, 1, 0x40, 7, 0, 0, 0, 0];
    let ended = run_on(&mut driver, QUEUE, other, &READY, &[], 0);
    assert_eq!(ended.failed(), (5, 0x25, 0));
    let inquiry = [0x12, 0, 0, 0, 36, 0];
    let ended = run_on(&mut driver, QUEUE, other, &inquiry, &[], 36);
    assert_eq!(ended.good()[0], 0x7f);
}

#[test]
fn zeroing_unmapping_and_their_limits() {
    let backend = memory(false);
    let (_, mut driver) = device(&[(0, disk(backend.clone()))]);
    driver.start(u64::MAX);
    let full = vec![7; 65536];
    let part = |at: usize| {
        let mut buffer = vec![0; 65536];
        conformance::read(&*backend, 0, &mut buffer).unwrap();
        buffer[at * 512..(at + 1) * 512].to_vec()
    };
    let same = |flags: u8| {
        let mut cdb = [0; 16];
        (cdb[0], cdb[1], cdb[9], cdb[13]) = (0x93, flags, 4, 8);
        cdb
    };
    for (cdb, block) in [
        (same(0), vec![0; 512]),
        (same(8), vec![0; 512]),
        (same(1), Vec::new()),
    ] {
        conformance::write(&*backend, 0, &full).unwrap();
        run(&mut driver, 0, &cdb, &block, 0).good();
        assert_eq!(
            [part(3), part(4), part(11), part(12)].map(|part| part[0]),
            [7, 0, 0, 7]
        );
    }
    // Other data than zeroes is written out.
    run(&mut driver, 0, &same(0), &pattern(512), 0).good();
    assert_eq!(part(11), pattern(512));
    let mut long = same(0);
    long[12] = 0x7f;
    assert_eq!(
        run(&mut driver, 0, &long, &pattern(512), 0).failed(),
        (5, 0x21, 0)
    );
    assert_eq!(
        run(&mut driver, 0, &same(0), &[0; 100], 0).failed(),
        (5, 0x1a, 0)
    );

    let unmap = [0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0];
    let mut list = [0; 24];
    (list[1], list[3], list[15], list[19]) = (22, 16, 16, 8);
    conformance::write(&*backend, 0, &full).unwrap();
    run(&mut driver, 0, &unmap, &list, 0).good();
    assert_eq!(
        [part(15), part(16), part(23), part(24)].map(|part| part[0]),
        [7, 0, 0, 7]
    );
    list[3] = 32;
    assert_eq!(run(&mut driver, 0, &unmap, &list, 0).failed(), (5, 0x26, 0));
    list[3] = 16;
    list[8] = 1;
    assert_eq!(run(&mut driver, 0, &unmap, &list, 0).failed(), (5, 0x21, 0));
    assert_eq!(
        run(&mut driver, 0, &unmap, &list[..10], 0).failed(),
        (5, 0x1a, 0)
    );
}

#[test]
fn errors_have_their_sense() {
    let fault = |operation, offset| {
        (operation == Operation::Read && offset >= 4096).then_some(io::ErrorKind::Other)
    };
    let faulty = Arc::new(Faulty::new(memory(false), Arc::new(fault)));
    let (_, mut driver) = device(&[(0, disk(faulty)), (1, disk(memory(true)))]);
    driver.start(u64::MAX);
    let at = |opcode, block: u8| [opcode, 0, 0, 0, 0, block, 0, 0, 1, 0];
    run(&mut driver, 0, &at(0x28, 0), &[], 512).good();
    assert_eq!(
        run(&mut driver, 0, &at(0x28, 9), &[], 512).failed(),
        (3, 0x11, 0)
    );
    let beyond = [0x28, 0, 0, 0, 8, 0, 0, 0, 1, 0];
    assert_eq!(
        run(&mut driver, 0, &beyond, &[], 512).failed(),
        (5, 0x21, 0)
    );
    let far = [
        0x88, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0,
    ];
    assert_eq!(run(&mut driver, 0, &far, &[], 512).failed(), (5, 0x21, 0));
    assert_eq!(
        run(&mut driver, 1, &at(0x2a, 0), &[0; 512], 0).failed(),
        (7, 0x27, 0)
    );
    let mode = run(&mut driver, 1, &[0x1a, 0, 8, 0, 255, 0], &[], 255).good();
    assert_eq!(mode[2] & 0x80, 0x80, "write-protected");
    assert_eq!(driver.status(), 15);
}

#[test]
fn a_drive_ejects_and_takes_another_disc() {
    let drive = target(TargetKind::Cdrom, None);
    let (scsi, mut driver) = device(&[(2, drive.clone())]);
    driver.start(u64::MAX);
    let ready = |driver: &mut Driver| run(driver, 2, &READY, &[], 0);
    assert_eq!(ready(&mut driver).failed(), (2, 0x3a, 0));
    let identity = run(&mut driver, 2, &[0x12, 0, 0, 0, 36, 0], &[], 36).good();
    assert_eq!((identity[0], identity[1]), (5, 0x80));
    let disc = memory(false);
    conformance::write(&*disc, 2048, &pattern(2048)).unwrap();
    let watched = Arc::downgrade(&disc);
    scsi.insert(&drive, disc, false).unwrap();
    assert_eq!(ready(&mut driver).failed(), (6, 0x28, 0), "told once");
    ready(&mut driver).good();
    let status = [0x4a, 1, 0, 0, 0x10, 0, 0, 0, 8, 0];
    let event = |driver: &mut Driver| run(driver, 2, &status, &[], 8).good()[4..6].to_vec();
    assert_eq!(event(&mut driver), [2, 2], "new medium");
    assert_eq!(event(&mut driver), [0, 2]);
    let capacity = run(&mut driver, 2, &[0x25], &[], 8).good();
    assert_eq!(capacity, [0, 0, 1, 0xff, 0, 0, 8, 0]);
    let read = [0x28, 0, 0, 0, 0, 1, 0, 0, 1, 0];
    for queue in [QUEUE, QUEUE + 1] {
        let lun = [1, 2, 0, 0, 0, 0, 0, 0];
        let ended = run_on(&mut driver, queue, lun, &read, &[], 2048);
        assert_eq!(ended.good(), pattern(2048));
    }
    let write = [0x2a, 0, 0, 0, 0, 1, 0, 0, 1, 0];
    assert_eq!(
        run(&mut driver, 2, &write, &[0; 2048], 0).failed(),
        (5, 0x20, 0)
    );
    for (format, length) in [(0, 20), (1, 12)] {
        let toc = [0x43, 0, format, 0, 0, 0, 0, 0, 64, 0];
        assert_eq!(run(&mut driver, 2, &toc, &[], 64).good().len(), length);
    }
    let configuration = run(&mut driver, 2, &[0x46, 0, 0, 0, 0, 0, 0, 0, 64, 0], &[], 64).good();
    assert_eq!((configuration.len(), configuration[7]), (20, 8));
    // Locked in, by the guest.
    run(&mut driver, 2, &[0x1e, 0, 0, 0, 1, 0], &[], 0).good();
    let eject = [0x1b, 0, 0, 0, 2, 0];
    assert_eq!(run(&mut driver, 2, &eject, &[], 0).failed(), (5, 0x53, 2));
    for _ in 0..2 {
        let refused = scsi.eject(&drive, false).unwrap_err();
        assert!(refused.to_string().contains("locked"), "{refused}");
    }
    assert_eq!(event(&mut driver), [1, 2], "the button");
    assert_eq!(event(&mut driver), [0, 2]);
    scsi.insert(&drive, memory(false), false).unwrap_err();
    assert_eq!(event(&mut driver), [1, 2], "the button");
    run(&mut driver, 2, &[0x1e, 0, 0, 0, 0, 0], &[], 0).good();
    run(&mut driver, 2, &eject, &[], 0).good();
    driver.wait_until("every queue to let the disc go", |_| {
        watched.strong_count() == 0
    });
    assert_eq!(ready(&mut driver).failed(), (2, 0x3a, 0));
    assert_eq!(event(&mut driver), [3, 1], "removed, tray open");
    scsi.insert(&drive, memory(false), false).unwrap();
    scsi.eject(&drive, true).unwrap();
    // Its driver begins anew, and has not locked it yet.
    scsi.insert(&drive, memory(false), false).unwrap();
    while ready(&mut driver).sense.is_some() {}
    run(&mut driver, 2, &[0x1e, 0, 0, 0, 1, 0], &[], 0).good();
    scsi.eject(&drive, false).unwrap_err();
    driver.reset();
    scsi.eject(&drive, false).unwrap();
    assert!(disk(memory(false)).eject(true).is_err());
}

/// A disc that its guest has taken out is not there in the copy, whoever made that one; another disc is not taken for it.
#[test]
fn a_copy_has_the_disc_that_the_guest_left_in_the_drive() {
    let with = |medium: bool| {
        let medium = medium.then(|| -> Arc<dyn BlockBackend> { memory(false) });
        device(&[(0, target(TargetKind::Cdrom, medium))])
    };
    let (full, mut driver) = with(true);
    driver.start(u64::MAX);
    let there = full.save();
    run(&mut driver, 0, &[0x1b, 0, 0, 0, 2, 0], &[], 0).good();
    let gone = full.save();
    for copy in [true, false] {
        let (copy, mut driver) = with(copy);
        copy.restore(&gone).unwrap();
        assert_eq!(copy.save(), gone);
        driver.start(u64::MAX);
        assert_eq!(run(&mut driver, 0, &READY, &[], 0).failed(), (2, 0x3a, 0));
    }
    with(true).0.restore(&there).unwrap();
    let refused = with(false).0.restore(&there).unwrap_err().to_string();
    assert!(refused.contains("was 1048576 and is now 0"), "{refused}");
}

/// Offers the event queue a buffer and waits for it: event, target, reason.
fn event(driver: &mut Driver, happens: impl FnOnce()) -> (u32, u8, u32) {
    driver.add(1, &[Segment::writable(DATA_IN, 16)]);
    driver.kick(1);
    happens();
    assert_eq!(driver.wait_used(1).1, 16);
    let bytes = driver.get(DATA_IN, 16);
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    // What Linux takes for the unit's number.
    assert_eq!((bytes[4], &bytes[6..8]), (1, &[0, 0][..]));
    (word(0), bytes[5], word(12))
}

#[test]
fn units_come_go_and_grow() {
    let (scsi, mut driver) = device(&[]);
    driver.start(u64::MAX);
    assert_eq!(run(&mut driver, 9, &READY, &[], 0).response, 3);
    let backend = memory(false);
    let unit = disk(backend.clone());
    let added = event(&mut driver, || scsi.plug(9, unit.clone()));
    assert_eq!(added, (1, 9, 1));
    run(&mut driver, 9, &WRITE_10, &pattern(8192), 0).good();
    let grown = event(&mut driver, || {
        backend.resize(2 * DISK_BYTES).unwrap();
        scsi.resized(9, &unit);
    });
    assert_eq!(grown, (3, 9, 0x092a));
    assert_eq!(run(&mut driver, 9, &READY, &[], 0).failed(), (6, 0x2a, 9));
    let capacity = run(&mut driver, 9, &[0x25], &[], 8).good();
    assert_eq!(capacity[..4], 4095_u32.to_be_bytes());
    drop(unit);
    let removed = event(&mut driver, || drop(scsi.unplug(9)));
    assert_eq!(removed, (1, 9, 2));
    assert_eq!(run(&mut driver, 9, &READ_10, &[], 8192).response, 3);
    driver.wait_until("its image to be let go", |_| {
        Arc::strong_count(&backend) == 1
    });
    // More than are remembered while nobody offers a buffer: the driver learns that it missed some.
    for _ in 0..70 {
        scsi.plug(1, disk(backend.clone()));
        scsi.unplug(1);
    }
    assert_eq!(event(&mut driver, || {}).0, 1 | 1 << 31);
}

#[test]
fn task_management() {
    let unit = disk(memory(false));
    let (_, mut driver) = device(&[(4, unit)]);
    driver.start(u64::MAX);
    let manage = |driver: &mut Driver, function: u32, target: u8| {
        let mut request = [0; 24];
        request[4..8].copy_from_slice(&function.to_le_bytes());
        request[8..11].copy_from_slice(&[1, target, 0x40]);
        driver.put(REQUEST, &request);
        driver.add(
            0,
            &[
                Segment::readable(REQUEST, 24),
                Segment::writable(RESPONSE, 1),
            ],
        );
        driver.kick(0);
        driver.wait_used(0);
        driver.get(RESPONSE, 1)[0]
    };
    assert_eq!(manage(&mut driver, 0, 4), 0, "nothing left to abort");
    assert_eq!(manage(&mut driver, 5, 4), 0);
    assert_eq!(run(&mut driver, 4, &READY, &[], 0).failed(), (6, 0x29, 0));
    assert_eq!(manage(&mut driver, 5, 5), 3);
    assert_eq!(manage(&mut driver, 99, 4), 11);
    // Notifications: none are ever sent.
    driver.put(
        REQUEST,
        &[2, 0, 0, 0, 1, 4, 0x40, 0, 0, 0, 0, 0, 4, 0, 0, 0],
    );
    driver.add(
        0,
        &[
            Segment::readable(REQUEST, 16),
            Segment::writable(RESPONSE, 5),
        ],
    );
    driver.kick(0);
    driver.wait_used(0);
    assert_eq!(driver.get(RESPONSE, 5), [0; 5]);
}

/// A held request is not taken back: abort is refused until it is done. All are when a pause returns.
#[test]
fn what_is_in_flight_is_not_aborted_and_not_lost() {
    let mut limits = Limits::default();
    limits.total.operations.per_second = Some(1);
    limits.total.operations.burst = Some(1);
    let limited = Arc::new(Limited::new(Arc::new(slow(memory(false))), limits));
    let (_, mut driver) = device(&[(0, disk(limited.clone()))]);
    driver.start(u64::MAX);
    run(&mut driver, 0, &READ_10, &[], 8192).good();
    let mut request = [0; 51];
    (request[0], request[2]) = (1, 0x40);
    request[19..29].copy_from_slice(&READ_10);
    driver.put(REQUEST, &request);
    for _ in 0..20 {
        let chain = [
            Segment::readable(REQUEST, 51),
            Segment::writable(RESPONSE, 108),
            Segment::writable(DATA_IN, 8192),
        ];
        driver.add(QUEUE, &chain);
    }
    driver.kick(QUEUE);
    driver.put(
        REQUEST + 64,
        &[
            0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0x40, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
        ],
    );
    driver.wait_until("a refused abort", |driver| {
        driver.add(
            0,
            &[
                Segment::readable(REQUEST + 64, 24),
                Segment::writable(RESPONSE + 256, 1),
            ],
        );
        driver.kick(0);
        driver.wait_used(0);
        driver.get(RESPONSE + 256, 1) == [11]
    });
    driver.wait_until("all chains taken", |driver| taken(driver, QUEUE) == 21);
    let before = std::time::Instant::now();
    driver.device.pause();
    for done in 0..20 {
        assert!(driver.used(QUEUE).is_some(), "{done} are done");
    }
    assert!(
        before.elapsed() < Duration::from_secs(10),
        "a limit delays no pause"
    );
    driver.device.resume().unwrap();
    limited.set(Limits::default());
    run(&mut driver, 0, &READ_10, &[], 8192).good();
}

#[test]
fn pause_and_reset_lose_nothing() {
    let (_, mut driver) = device(&[(0, disk(memory(false)))]);
    driver.start(u64::MAX);
    for _ in 0..20 {
        run(&mut driver, 0, &WRITE_10, &pattern(8192), 0).good();
        driver.device.pause();
        driver.device.resume().unwrap();
        assert_eq!(
            run(&mut driver, 0, &READ_10, &[], 8192).good(),
            pattern(8192)
        );
        driver.reset();
        driver.start(u64::MAX);
    }
}
