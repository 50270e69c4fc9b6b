// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! virtio-fs with the crate `virtiofsd` as the other process.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use atoll_devices::testing::{Driver, Segment};
use atoll_devices::virtio::vhost_user::VhostUser;
use atoll_devices::virtio::{Act, VirtioDevice};

use crate::vhost_user::{Server, connect, options};

const DATA: u64 = 0x10_0000;

/// The crate's program, built when it is missing. It has to be a program of its own: it is another process.
fn virtiofsd() -> Option<PathBuf> {
    let recipe = Path::new(env!("CARGO_MANIFEST_DIR")).join("../run/virtiofsd.sh");
    let output = Command::new(recipe).output().unwrap();
    if !output.status.success() {
        let why = String::from_utf8_lossy(&output.stderr);
        println!("ATOLL-SKIP: run/virtiofsd.sh: {}", why.trim());
        return None;
    }
    let directory = String::from_utf8(output.stdout).unwrap();
    Some(Path::new(directory.trim()).join("bin/virtiofsd"))
}

fn serve(directory: &Path) -> Option<(Server, UnixStream)> {
    let socket = directory.join("s");
    let shared = directory.join("shared");
    std::fs::create_dir(&shared).unwrap();
    let mut command = Command::new(virtiofsd()?);
    command
        .arg(format!("--socket-path={}", socket.display()))
        .arg(format!("--shared-dir={}", shared.display()))
        .arg("--sandbox=chroot");
    let server = Server::start(&mut command).unwrap();
    Some((server, connect(&socket)))
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
    let Some((server, stream)) = serve(directory.path()) else {
        return;
    };
    let device = VhostUser::file_system("share", options(stream, None));
    let device = Arc::new(device.unwrap());
    let mut driver = Driver::with_shared_memory(device.clone());
    assert_eq!(driver.device_config::<6>(0), *b"share\0");
    assert_eq!(driver.device_config::<4>(36), [1, 0, 0, 0]);
    driver.start(u64::MAX);
    initialize(&mut driver, 0x1234);
    assert!(driver.interrupts.wait(2, Duration::from_secs(20)));
    // A pause takes the queues back, a resume gives them away again, where they stood.
    driver.device.pause();
    driver.device.resume().unwrap();
    initialize(&mut driver, 0x1235);
    let text = device.obstacle(Act::Snapshot).unwrap();
    assert!(text.contains("open files"), "{text}");
    drop(server);
    driver.wait_broken();
    driver.reset();
    assert_eq!(driver.status(), 0);
}
