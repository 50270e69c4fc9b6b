// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! First and only process of the benchmarks' Linux guests: a stock kernel with this program and the drivers' modules in
//! its initramfs, and nothing else that would take time. Says on the console that it runs, loads the modules in
//! `/modules` in the order of the file `order` there, gives the card the address `bench=` of the kernel's command line,
//! and does what the host asks for (`traffic`).
#![expect(
    unsafe_code,
    reason = "system calls that no dependency has: finit_module, and ioctls of an interface"
)]

use std::fs::{self, File};
use std::io::{self, Write};
use std::mem;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use atoll_benches::traffic;
use nix::libc;
use nix::mount::{MsFlags, mount};

const INTERFACE: &[u8] = b"eth0";
const NETMASK: Ipv4Addr = Ipv4Addr::new(255, 255, 255, 252);
/// Longest time that the card takes to be there once its driver is.
const CARD: Duration = Duration::from_secs(10);
const DISK: &str = "/dev/vda";

fn main() {
    say(&format!("guest: init after {} s", uptime()));
    match prepare() {
        Ok(listener) => loop {
            if let Err(error) = traffic::serve(&listener, Path::new(DISK)) {
                say(&format!("guest: {error:#}"));
            }
        },
        Err(error) => say(&format!("guest: not ready: {error:#}")),
    }
    // The kernel panics without its first process.
    loop {
        std::thread::park();
    }
}

fn say(text: &str) {
    // The console is all there is to complain to.
    let _ = writeln!(io::stdout(), "{text}");
}

/// Seconds since the kernel began to keep time, in hundredths.
fn uptime() -> String {
    // Without a /proc nothing is ready later, which is told then.
    let _ = mount_one("proc", "/proc");
    let both = fs::read_to_string("/proc/uptime").unwrap_or_default();
    both.split_whitespace().next().unwrap_or("?").to_owned()
}

fn mount_one(kind: &str, place: &'static str) -> anyhow::Result<()> {
    let flags = MsFlags::empty();
    mount(Some(kind), place, Some(kind), flags, None::<&str>).context(place)
}

fn prepare() -> anyhow::Result<TcpListener> {
    mount_one("devtmpfs", "/dev")?;
    let modules = Path::new("/modules");
    for name in fs::read_to_string(modules.join("order"))?.lines() {
        load(&modules.join(name)).context(name.to_owned())?;
    }
    let cmdline = fs::read_to_string("/proc/cmdline")?;
    let address = cmdline
        .split_whitespace()
        .find_map(|word| word.strip_prefix("bench="));
    let address = address.context("no bench= on the command line")?;
    let address: Ipv4Addr = address.parse()?;
    let start = Instant::now();
    while let Err(error) = set_up(address) {
        anyhow::ensure!(start.elapsed() < CARD, "the card: {error}");
        std::thread::sleep(Duration::from_millis(5));
    }
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, traffic::PORT))?;
    say("guest: ready");
    Ok(listener)
}

fn load(path: &Path) -> anyhow::Result<()> {
    let file = File::open(path)?;
    // SAFETY: an open file, an empty string that is terminated, no flags.
    let result =
        unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), c"".as_ptr(), 0) };
    anyhow::ensure!(result == 0, "finit_module: {}", io::Error::last_os_error());
    Ok(())
}

/// Address, mask, and up.
fn set_up(address: Ipv4Addr) -> io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    let internet = |address: Ipv4Addr| libc::sockaddr_in {
        sin_family: libc::sa_family_t::try_from(libc::AF_INET).expect("2"),
        sin_port: 0,
        sin_addr: libc::in_addr {
            s_addr: u32::from(address).to_be(),
        },
        sin_zero: [0; 8],
    };
    let mut request = Request {
        name: [0; libc::IFNAMSIZ],
        value: Value { flags: 0 },
        rest: [0; 8],
    };
    request.name[..INTERFACE.len()].copy_from_slice(INTERFACE);
    for (number, value) in [
        (
            libc::SIOCSIFADDR,
            Value {
                address: internet(address),
            },
        ),
        (
            libc::SIOCSIFNETMASK,
            Value {
                address: internet(NETMASK),
            },
        ),
        (
            libc::SIOCSIFFLAGS,
            Value {
                flags: libc::IFF_UP,
            },
        ),
    ] {
        request.value = value;
        // SAFETY: an open socket; the request is as large as the kernel's struct ifreq, which it reads.
        let result = unsafe { libc::ioctl(socket.as_raw_fd(), number, &raw const request) };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}

/// `struct ifreq` of netdevice(7).
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    value: Value,
    rest: [u8; 8],
}

/// What its union is for us.
#[repr(C)]
#[derive(Clone, Copy)]
union Value {
    address: libc::sockaddr_in,
    flags: i32,
}

const _: () = assert!(mem::size_of::<Request>() == 40);
