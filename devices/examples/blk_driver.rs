// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A virtio block device without any virtual machine: a driver in this process finds it by PCI, negotiates
//! features, writes a sector and reads it back. `cargo run -p atoll-devices --example blk_driver`
#![expect(clippy::print_stdout, reason = "an example talks to its reader")]

use std::sync::Arc;

use atoll_devices::testing::{Driver, Segment};
use atoll_devices::virtio::blk::{Blk, BlkOptions};
use atoll_disk::{Geometry, MemoryBackend};

const HEADER: u64 = 0x10_0000;
const DATA: u64 = 0x10_1000;
const STATUS: u64 = 0x10_2000;

fn main() {
    let disk = MemoryBackend::new(Geometry {
        size_bytes: 1 << 20,
        read_only: false,
    });
    let device = Blk::new(BlkOptions {
        name: "blk0".to_owned(),
        backend: Arc::new(disk),
        serial: "example".to_owned(),
        queue_count: 2,
    });
    let mut driver = Driver::new(Arc::new(device));
    println!("identity {:02x?}", driver.config_read::<4>(0));
    println!("features {:#x}", driver.offered());
    driver.start(u64::MAX);

    driver.put(DATA, b"hello, sector 5!");
    run(&mut driver, 1, Segment::readable(DATA, 512));
    driver.put(DATA, &[0; 512]);
    run(&mut driver, 0, Segment::writable(DATA, 512));
    println!("{}", String::from_utf8_lossy(&driver.get(DATA, 16)));
    println!("{:?}", driver.device.counters());
}

/// One request on sector 5: 0 reads it, 1 writes it.
fn run(driver: &mut Driver, kind: u8, data: Segment) {
    driver.put(HEADER, &[kind, 0, 0, 0, 0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0]);
    let (header, status) = (Segment::readable(HEADER, 16), Segment::writable(STATUS, 1));
    driver.add(0, &[header, data, status]);
    driver.kick(0);
    let (_, written) = driver.wait_used(0);
    println!(
        "request {kind}: status {}, {written} bytes written",
        driver.get(STATUS, 1)[0]
    );
}
