// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A disk in RAM: the double against which other backends are compared, and a scratch disk for examples.

use std::io;
use std::sync::{Arc, Mutex};

use crate::backend::{BlockBackend, BlockQueue, Geometry, Operation, Request};
use crate::immediate::ImmediateQueue;

/// A disk in RAM. Completes each request when it is kicked.
#[derive(Debug, Clone)]
pub struct MemoryBackend {
    // Protects the sectors of all queues; a leaf lock, held for one copy.
    sectors: Arc<Mutex<Vec<u8>>>,
    geometry: Geometry,
}

impl MemoryBackend {
    /// A disk of zeroes.
    pub fn new(geometry: Geometry) -> Self {
        let size = usize::try_from(geometry.size_bytes).expect("a disk in RAM fits in RAM");
        Self {
            sectors: Arc::new(Mutex::new(vec![0; size])),
            geometry,
        }
    }
}

impl BlockBackend for MemoryBackend {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn open_queue(&self, depth: u16) -> io::Result<Box<dyn BlockQueue>> {
        let disk = self.clone();
        let transfer = Box::new(move |request: &Request| {
            transfer(&disk, request);
            Ok(())
        });
        Ok(Box::new(ImmediateQueue::new(
            self.geometry,
            depth,
            transfer,
        )?))
    }
}

fn transfer(disk: &MemoryBackend, request: &Request) {
    let mut sectors = disk.sectors.lock().expect("no holder of this lock panics");
    let fits = "checked against the disk's size, which fits in RAM";
    let start = usize::try_from(request.offset_bytes).expect(fits);
    let length = usize::try_from(request.segments.total_bytes()).expect(fits);
    match request.operation {
        Operation::Read => request.segments.fill(&sectors[start..start + length]),
        Operation::Write => request
            .segments
            .drain_to(&mut sectors[start..start + length]),
        Operation::Flush => {}
    }
}
