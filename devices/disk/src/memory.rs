// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A disk in RAM: the double against which other backends are compared, and a scratch disk for examples.

use std::io;
use std::sync::{Arc, Mutex};

use crate::backend::{
    Abilities, BlockBackend, BlockQueue, Geometry, Operation, Request, ResizeError, SharedGeometry,
};
use crate::immediate::ImmediateQueue;

/// A disk in RAM. Carries out each request when its completion is asked for.
#[derive(Debug, Clone)]
pub struct MemoryBackend {
    // Protects the sectors of all queues; a leaf lock, held for one copy.
    sectors: Arc<Mutex<Vec<u8>>>,
    geometry: Arc<SharedGeometry>,
}

impl MemoryBackend {
    /// A disk of zeroes in the process's memory, for tests and fuzzers.
    pub fn new(geometry: Geometry) -> Self {
        let size = usize::try_from(geometry.size_bytes).expect("a disk in RAM fits in RAM");
        Self {
            sectors: Arc::new(Mutex::new(vec![0; size])),
            geometry: Arc::new(SharedGeometry::new(geometry)),
        }
    }
}

impl BlockBackend for MemoryBackend {
    fn geometry(&self) -> Geometry {
        self.geometry.get()
    }

    fn abilities(&self) -> Abilities {
        Abilities {
            discard_bytes: Some(512),
            write_zeroes: true,
            ..Abilities::default()
        }
    }

    fn resize(&self, size_bytes: u64) -> Result<(), ResizeError> {
        self.geometry.check_growth(size_bytes, 512)?;
        let size = usize::try_from(size_bytes).map_err(|_| ResizeError::Unsupported)?;
        let mut sectors = self.sectors.lock().expect("no holder of this lock panics");
        sectors.resize(size, 0);
        self.geometry.set_size(size_bytes);
        Ok(())
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        let disk = self.clone();
        let transfer = Box::new(move |request: &Request| {
            transfer(&disk, request);
            Ok(())
        });
        let geometry = self.geometry.clone();
        Ok(Box::new(ImmediateQueue::new(geometry, depth, transfer)?))
    }
}

fn transfer(disk: &MemoryBackend, request: &Request) {
    let mut sectors = disk.sectors.lock().expect("no holder of this lock panics");
    let fits = "checked against the disk's size, which fits in RAM";
    let range = request.range();
    let start = usize::try_from(range.start).expect(fits);
    let end = usize::try_from(range.end).expect(fits);
    let sectors = &mut sectors[start..end];
    match request.operation {
        Operation::Read => request.segments.fill(sectors),
        Operation::Write => request.segments.drain_to(sectors),
        Operation::Discard { .. } | Operation::WriteZeroes { .. } => sectors.fill(0),
        Operation::Flush => {}
    }
}
