// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Taps between guests and this host, in a network namespace of a suite's own.

use std::fs;
use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::Context as _;
use nix::sched::{CloneFlags, unshare};

use crate::monitor::GUEST_MAC;

/// A tap's address on the wire, as `firmware/probe/src/bench/net.rs` expects it.
const MAC: &str = "02:00:00:00:00:01";
/// Of a tap and its guest; every tap is a network of its own.
const PREFIX: u32 = 30;
/// The first of them, TEST-NET-1 of RFC 5737.
const NETWORK: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 0);

/// Runs `suite` in a thread with a network namespace, which belongs to the thread and its children, and ends with them.
pub fn in_namespace<T: Send>(
    suite: impl FnOnce() -> anyhow::Result<T> + Send,
) -> anyhow::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("net".into());
        let separate = || {
            unshare(CloneFlags::CLONE_NEWNET).context("a network namespace")?;
            suite()
        };
        let handle = thread.spawn_scoped(scope, separate)?;
        let panicked = |_| anyhow::anyhow!("the suite's thread panicked");
        handle.join().map_err(panicked)?
    })
}

/// A tap that exists as long as this value: VMMs leave different settings behind.
#[derive(Debug)]
pub struct Tap(u8);

impl Tap {
    /// The one with that number, below 64.
    pub fn new(number: u8) -> anyhow::Result<Self> {
        let tap = Self(number);
        let name = &tap.name();
        ip(&["tuntap", "add", name, "mode", "tap", "vnet_hdr"])?;
        // The machine's own traffic would be counted.
        fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1")?;
        ip(&["link", "set", name, "address", MAC, "up"])?;
        let address = format!("{}/{PREFIX}", tap.host_address());
        ip(&["address", "add", &address, "dev", name])?;
        let guest = tap.guest_address().to_string();
        ip(&["neighbor", "add", &guest, "lladdr", GUEST_MAC, "dev", name])?;
        Ok(tap)
    }

    /// The interface's name.
    pub fn name(&self) -> String {
        format!("bench{}", self.0)
    }

    /// This end's address.
    pub fn host_address(&self) -> Ipv4Addr {
        self.address(1)
    }

    /// The guest's.
    pub fn guest_address(&self) -> Ipv4Addr {
        self.address(2)
    }

    fn address(&self, host: u32) -> Ipv4Addr {
        let network = u32::from(NETWORK) + (u32::from(self.0) << (32 - PREFIX));
        Ipv4Addr::from(network + host)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        // It ends with the namespace at the latest.
        let _ = ip(&["link", "delete", &self.name()]);
    }
}

fn ip(arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("ip").args(arguments).output().context("ip")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    anyhow::ensure!(
        output.status.success(),
        "ip {}: {complaint}",
        arguments.join(" ")
    );
    Ok(())
}
