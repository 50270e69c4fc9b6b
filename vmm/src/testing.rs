// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Bodies of the fuzz targets in `vmm/fuzz`: what comes from outside the machine before a guest runs. Ordinary tests
//! replay a corpus, its mutations and random bytes on the stable toolchain. And the smallest kernel, for tests. Behind
//! the feature `testing`.

use std::collections::VecDeque;
use std::error::Error;
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;

use atoll_devices::memory::Ram;
use atoll_vmm_protocol::http;
use atoll_vmm_protocol::spec::{KernelSpec, MachineSpec};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use crate::board::MICRO;
use crate::loader::BootFiles;
use crate::memory::{self, Backing};
use crate::probe::PROBE_ELF;
use crate::vcpu::setup::Entry;
use crate::{api, check};

/// Guest RAM of a machine whose kernel is fuzzed.
const MEMORY_MIB: u64 = 16;

/// An error is one line for a user: its causes on it, no line break, not too long to read.
fn assert_one_line(error: &dyn Error) {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    assert!(!text.contains('\n') && text.len() < 1000, "{text}");
}

/// Loads the input as a kernel. Either the guest would start inside its memory, or there is a line that says why not.
pub fn kernel(input: &[u8]) {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create("kernel", flags).expect("a memfd");
    let mut file = File::from(file);
    file.write_all(input).expect("memory for the kernel");
    let boot = KernelSpec {
        image: format!("/proc/self/fd/{}", file.as_raw_fd()).into(),
        initrd: None,
        cmdline: "console=ttyS0".to_owned(),
    };
    let mut files = BootFiles::open(&boot).expect("it was just made");
    let platform = MICRO.platform(1, &MICRO.windows(MEMORY_MIB << 20, 40), Vec::new());
    let ram: Ram = memory::allocate(&MICRO, MEMORY_MIB, 40, Backing::Anonymous).expect("16 MiB");
    match files.load(&ram, MEMORY_MIB << 20, &MICRO, &platform) {
        Ok(Entry::Pvh { address } | Entry::Long { address }) => {
            assert!(ram.address_in_range(GuestAddress(address)), "{address:#x}");
        }
        Err(error) => assert_one_line(&error),
    }
}

/// A PVH kernel, and a bzImage that is nothing but its header.
#[must_use]
pub fn kernel_corpus() -> Vec<Vec<u8>> {
    let mut image = vec![0_u8; 0x2000];
    // Kernel `Documentation/arch/x86/boot.rst`, "The Real-Mode Kernel Header".
    for (offset, bytes) in [
        (0x1f1, &[1_u8][..]),                    // setup_sects
        (0x1f4, &0x100_u32.to_le_bytes()),       // syssize
        (0x1fe, &0xaa55_u16.to_le_bytes()),      // boot_flag
        (0x200, &[0xeb, 0x66]),                  // jump
        (0x202, b"HdrS"),                        // header
        (0x206, &0x020f_u16.to_le_bytes()),      // version
        (0x211, &[1]),                           // loadflags: loaded high
        (0x214, &0x10_0000_u32.to_le_bytes()),   // code32_start
        (0x22c, &0x7fff_ffff_u32.to_le_bytes()), // initrd_addr_max
        (0x236, &3_u16.to_le_bytes()),           // xloadflags: 64-bit entry
        (0x238, &2047_u32.to_le_bytes()),        // cmdline_size
        (0x258, &0x10_0000_u64.to_le_bytes()),   // pref_address
        (0x260, &0x20_0000_u32.to_le_bytes()),   // init_size
    ] {
        image[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
    vec![Vec::new(), b"\x7fELF".to_vec(), PROBE_ELF.to_vec(), image]
}

/// Reads the input as the bytes of a connection to the control API, up to what its owner would be asked.
pub fn request(input: &[u8]) {
    match http::read_request(&mut &*input) {
        Ok(message) => match api::understand(&message, VecDeque::new()) {
            Ok(asked) => assert_eq!(asked.request.route().path, message.target),
            Err((status, body)) => {
                assert!((400..500).contains(&status));
                serde_json::from_slice::<serde_json::Value>(&body).expect("answers are JSON");
            }
        },
        Err(error) => assert_one_line(&error),
    }
}

/// Requests of every route, and heads that are wrong in one way.
#[must_use]
pub fn request_corpus() -> Vec<Vec<u8>> {
    let routes = atoll_vmm_protocol::api::ROUTES.iter().map(|route| {
        let (method, path) = (route.method, route.path);
        format!(
            "{method} {path} HTTP/1.1\r\nHost: l\r\nContent-Length: 13\r\n\r\n{{\"net\": \"x\"}} "
        )
    });
    let wrong = [
        "GET /info HTTP/1.1\r\nContent-Length: 18446744073709551616\r\n\r\n",
        "GET /info HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
        "PUT /pause HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
        "GET \u{7f} HTTP/9.9\r\n\r\n",
    ];
    routes
        .chain(wrong.map(str::to_owned))
        .map(String::into_bytes)
        .collect()
}

/// Reads the input as a machine's spec, as `--spec FILE` does.
pub fn spec(input: &[u8]) {
    match serde_json::from_slice::<MachineSpec>(input) {
        Ok(spec) => {
            if let Err(error) = check::spec(&spec) {
                assert_one_line(&error);
            }
        }
        Err(error) => assert_one_line(&error),
    }
}

/// A whole spec, and the smallest one.
#[must_use]
pub fn spec_corpus() -> Vec<Vec<u8>> {
    let whole = r#"{"name":"a","cpu_count":2,"memory_mib":64,"boot":{"kernel":{"image":"/k","initrd":"/i","cmdline":"x"}},
        "disks":[{"path":"/d","format":"raw","readonly":true,"serial":"s","queue_count":4}],
        "nets":[{"tap":"tap0","mac":"52:54:00:00:00:01","mtu":1500}],
        "serial":{"socket":"/s"},"console":"pty","rng":false}"#;
    let least = r#"{"name":"","cpu_count":1,"memory_mib":1,"boot":{"kernel":{"image":"k"}}}"#;
    [whole, least].map(|text| text.as_bytes().to_vec()).into()
}

/// An ELF file with a PVH note and `code` at 1 MiB, its entry.
#[must_use]
pub fn pvh_elf(code: &[u8]) -> Vec<u8> {
    const ENTRY: u64 = 0x10_0000;
    const HEADERS: u64 = 64 + 2 * 56;
    let note: Vec<u8> = [4_u32, 8, 18]
        .into_iter()
        .flat_map(u32::to_le_bytes)
        .chain(*b"Xen\0")
        .chain(ENTRY.to_le_bytes())
        .collect();
    let code_at = HEADERS + note.len() as u64;
    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    for half in [2_u16, 62] {
        file.extend(half.to_le_bytes());
    }
    file.extend(1_u32.to_le_bytes());
    for word in [ENTRY, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    for half in [64_u16, 56, 2, 64, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    for (kind, offset, address, size) in [
        (1_u32, code_at, ENTRY, code.len() as u64),
        (4, HEADERS, 0, note.len() as u64),
    ] {
        file.extend(kind.to_le_bytes());
        file.extend(5_u32.to_le_bytes());
        for word in [offset, address, address, size, size, 4] {
            file.extend(word.to_le_bytes());
        }
    }
    file.extend(note);
    file.extend(code);
    file
}
