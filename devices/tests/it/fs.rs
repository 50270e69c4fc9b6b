// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! virtio-fs with a real `virtiofsd` as the other process.

use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use atoll_devices::testing::{Driver, Segment};
use atoll_devices::virtio::vhost_user::VhostUserFs;

const DATA: u64 = 0x10_0000;
/// Where Debian's package `qemu-system-common` has it.
const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn serve(directory: &std::path::Path) -> Option<(Server, UnixStream)> {
    let socket = directory.join("s");
    let shared = directory.join("shared");
    std::fs::create_dir(&shared).unwrap();
    let mut command = Command::new(VIRTIOFSD);
    command
        .arg(format!("--socket-path={}", socket.display()))
        .args(["-o", &format!("source={}", shared.display())])
        .args(["-o", "sandbox=chroot"]);
    let child = match command.stderr(Stdio::null()).spawn() {
        Ok(child) => Server(child),
        Err(error) => {
            println!("ATOLL-SKIP: {VIRTIOFSD}: {error}");
            return None;
        }
    };
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        if let Ok(stream) = UnixStream::connect(&socket) {
            return Some((child, stream));
        }
        assert!(Instant::now() < deadline, "virtiofsd does not listen");
        std::thread::yield_now();
    }
}

/// `FUSE_INIT` (linux/fuse.h): header, version 7.31, read-ahead, no flags.
fn initialize(driver: &mut Driver, unique: u64) {
    let mut request = 56u32.to_le_bytes().to_vec();
    request.extend(26u32.to_le_bytes());
    request.extend(unique.to_le_bytes());
    request.resize(40, 0);
    for word in [7u32, 31, 4096, 0] {
        request.extend(word.to_le_bytes());
    }
    driver.put(DATA, &request);
    driver.put(DATA + 0x1000, &[0; 80]);
    let chain = [
        Segment::readable(DATA, 40),
        Segment::readable(DATA + 40, 16),
        Segment::writable(DATA + 0x1000, 16),
        Segment::writable(DATA + 0x1010, 64),
    ];
    driver.add(1, &chain);
    driver.kick(1);
    driver.wait_used(1);
    let answer = driver.get(DATA + 0x1000, 24);
    assert_eq!(answer[4..8], [0; 4], "no error");
    assert_eq!(answer[8..16], unique.to_le_bytes());
    assert_eq!(answer[16..20], 7u32.to_le_bytes());
}

#[test]
fn another_process_serves_the_queues() {
    let directory = tempfile::tempdir().unwrap();
    let Some((_server, stream)) = serve(directory.path()) else {
        return;
    };
    let device = Arc::new(VhostUserFs::new("share", stream).unwrap());
    let mut driver = Driver::with_shared_memory(device);
    assert_eq!(driver.device_config::<6>(0), *b"share\0");
    assert_eq!(driver.device_config::<4>(36), [1, 0, 0, 0]);
    driver.start(u64::MAX);
    initialize(&mut driver, 0x1234);
    assert!(driver.interrupts.wait(2, Duration::from_secs(20)));
    // A pause takes the queues back, a resume gives them away again, where they stood.
    driver.device.pause();
    driver.device.resume().unwrap();
    initialize(&mut driver, 0x1235);
    driver.reset();
    assert_eq!(driver.status(), 0);
}
