// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! DPDK's testpmd, a vhost-user backend for network cards that others wrote: started the same way for the tests of a card
//! and for those of machines.

use std::fs::{File, remove_file};
use std::io;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// Starts testpmd with a port on each of the directory's sockets, which appear a moment later. Alone, a port sends each
/// packet back on the pair of queues that it came from; two ports are connected with each other. What it prints goes to
/// the directory's file `testpmd`.
///
/// It needs neither huge pages nor devices; one of its threads polls. It ends at the end of its standard input, a pipe
/// that the result holds, but whoever ends it without a word leaves its sockets: the next one takes them over here.
pub fn start_testpmd(directory: &Path, sockets: &[&str], pair_count: u16) -> io::Result<Child> {
    let log = File::create(directory.join("testpmd"))?;
    let mut command = Command::new("dpdk-testpmd");
    command
        // For files of its own.
        .env("RUNTIME_DIRECTORY", directory)
        .args(["--lcores=0@(0-1),1@(0-1)", "-m64", "--no-huge"])
        .args(["--no-pci", "--no-shconf", "--no-telemetry"])
        .arg("--log-level=lib.vhost.config:info");
    for (index, socket) in sockets.iter().enumerate() {
        let socket = directory.join(socket);
        match remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let socket = socket.display();
        command.arg(format!(
            "--vdev=net_vhost{index},iface={socket},queues={pair_count}"
        ));
    }
    command
        .args(["--", "--forward-mode=io", "--total-num-mbufs=2048"])
        .arg(format!("--rxq={pair_count}"))
        .arg(format!("--txq={pair_count}"))
        .stdin(Stdio::piped())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
}
