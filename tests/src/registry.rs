// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Debian's OCI registry on the loopback, with its images in a temporary folder.
//!
//! The tests of `manager` and `container-rt` use it as well. No crate may depend on this one, so they include the file
//! itself: it needs nothing but `tempfile`.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "each test program uses its part; tests fail by panicking and skip by a line"
)]

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

/// How long it may take until it listens; the machine may be busy.
const START_MAX: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_millis(20);

/// A running registry; it ends when this is dropped, and by the kernel when the test is killed.
pub struct Registry {
    process: Child,
    folder: tempfile::TempDir,
    address: String,
}

impl Registry {
    /// Starts one on a free port and waits until it listens. `setpriv` is the program of that name, here or in
    /// another network namespace, whose loopback is up. `None`, and a line that says so, where no registry is
    /// installed. Panics where one does not start.
    pub fn start(mut setpriv: Command) -> Option<Self> {
        if Command::new("docker-registry")
            .arg("--version")
            .output()
            .is_err()
        {
            println!("ATOLL-SKIP: no registry here (apt-get install docker-registry)");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.yml");
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:0\n",
            data(folder.path()).display()
        );
        std::fs::write(&config, text).unwrap();
        let log = folder.path().join("log");
        setpriv.args(["--pdeathsig", "KILL", "docker-registry", "serve"]);
        setpriv.arg(&config).stderr(File::create(&log).unwrap());
        let mut registry = Self {
            process: setpriv.spawn().unwrap(),
            folder,
            address: String::new(),
        };
        let deadline = Instant::now() + START_MAX;
        loop {
            let log = std::fs::read_to_string(&log).unwrap();
            if let Some(address) = listening(&log) {
                registry.address = address.to_owned();
                return Some(registry);
            }
            let ended = registry.process.try_wait().unwrap();
            assert!(
                ended.is_none() && Instant::now() < deadline,
                "the registry does not listen, it ended: {ended:?}\n{log}"
            );
            std::thread::sleep(POLL);
        }
    }

    /// Where it listens: `127.0.0.1:PORT`, without TLS.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The folder with its blobs, in the layout of its `filesystem` driver.
    pub fn data(&self) -> PathBuf {
        data(self.folder.path())
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

fn data(folder: &Path) -> PathBuf {
    folder.join("data")
}

/// The address in its log, once that line is whole: `… msg="listening on 127.0.0.1:37297" …`.
fn listening(log: &str) -> Option<&str> {
    let (_, rest) = log.split_once("\"listening on ")?;
    rest.split_once('"').map(|(address, _)| address)
}
