// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Fuzz targets: what comes from outside the machine before or while a guest runs. Ordinary tests replay a corpus, its
//! mutations and random bytes; `make fuzz` runs them under libFuzzer (`vmm/fuzz`). And the smallest kernel, for tests.
//! Behind the feature `testing`.

use std::collections::VecDeque;
use std::error::Error;
use std::fs::File;
use std::io::{BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use atoll_devices::memory::Ram;
pub use atoll_devices::testing::replay::{Replay, Target};
use atoll_vmm_protocol::http;
use atoll_vmm_protocol::spec::{BootSpec, FirmwareSpec, KernelSpec, MachineSpec};
use clap::Parser;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::board::{Board, MICRO};
use crate::cli::{Cli, Command};
use crate::flash::FirmwareFiles;
use crate::loader::BootFiles;
use crate::memory::{self, Backing};
use crate::migration::{self, Message, pages};
use crate::probe::PROBE_ELF;
use crate::saved::packed::{Packed, Wanted};
use crate::saved::{self, MachineState};
use crate::vcpu::setup::Entry;
use crate::{api, check, fw_cfg, machine, terminal};

/// Every target of this crate.
pub const TARGETS: &[Target] = &[
    Target {
        name: "kernel",
        run: kernel,
        corpus: kernel_corpus,
        replay: Replay {
            rounds: 400,
            random_bytes_max: 4096,
            // The headers of an ELF file, and of a bzImage.
            mutated_bytes: 0x268,
        },
    },
    Target {
        name: "initrd",
        run: initrd,
        corpus: initrd_corpus,
        replay: Replay {
            rounds: 300,
            random_bytes_max: 24,
            mutated_bytes: 24,
        },
    },
    Target {
        name: "flash",
        run: flash,
        corpus: flash_corpus,
        replay: Replay {
            rounds: 300,
            random_bytes_max: 16,
            mutated_bytes: 16,
        },
    },
    Target {
        name: "arguments",
        run: arguments,
        corpus: arguments_corpus,
        replay: Replay {
            rounds: 1000,
            random_bytes_max: 100,
            mutated_bytes: 120,
        },
    },
    Target {
        name: "spec",
        run: spec,
        corpus: spec_corpus,
        replay: Replay {
            rounds: 2000,
            random_bytes_max: 200,
            mutated_bytes: 400,
        },
    },
    Target {
        name: "request",
        run: request,
        corpus: request_corpus,
        replay: MESSAGE,
    },
    Target {
        name: "response",
        run: response,
        corpus: response_corpus,
        replay: MESSAGE,
    },
    Target {
        name: "state",
        run: state,
        corpus: state_corpus,
        replay: Replay {
            rounds: 300,
            random_bytes_max: 200,
            mutated_bytes: 20_000,
        },
    },
    Target {
        name: "packed",
        run: packed,
        corpus: packed_corpus,
        replay: Replay {
            rounds: 500,
            random_bytes_max: 200,
            // Its header and index, and short frames between them.
            mutated_bytes: 400,
        },
    },
    Target {
        name: "migration",
        run: migration,
        corpus: migration_corpus,
        replay: Replay {
            rounds: 500,
            random_bytes_max: 200,
            mutated_bytes: 400,
        },
    },
];

const MESSAGE: Replay = Replay {
    rounds: 2000,
    random_bytes_max: 300,
    mutated_bytes: 120,
};

/// Guest RAM of a machine whose kernel is fuzzed.
const MEMORY_MIB: u64 = 16;

/// An error is one line for a user: its causes on it, no line break, not too long to read.
fn assert_one_line(error: &dyn Error) {
    let text = atoll_disk::chain(error);
    assert!(!text.contains('\n') && text.len() < 1000, "{text}");
}

/// The same for an error that repeats a part of the input, as a JSON parser's does: a line as it leaves the program.
fn assert_told(error: &dyn Error, input: &[u8]) {
    let text = terminal::one_line(&atoll_disk::chain(error));
    assert!(!text.contains(char::is_control), "{text}");
    assert!(text.len() < 1000 + 10 * input.len(), "{text}");
}

/// Loads the input as a kernel. Either the guest would start inside its memory, or there is a line that says why not.
pub fn kernel(input: &[u8]) {
    let (kernel, image) = scratch(input, input.len() as u64);
    let boot = KernelSpec {
        image,
        initrd: None,
        cmdline: "console=ttyS0".to_owned(),
        shared: false,
    };
    load(&boot, MEMORY_MIB);
    drop(kernel);
}

/// A file in memory with these bytes at its beginning, and a path to it for as long as it is open.
fn scratch(bytes: &[u8], size_bytes: u64) -> (File, PathBuf) {
    let flags = rustix::fs::MemfdFlags::CLOEXEC;
    let file = rustix::fs::memfd_create("scratch", flags).expect("a memfd");
    let mut file = File::from(file);
    file.write_all(bytes).expect("memory for the file");
    file.set_len(size_bytes).expect("a hole of any size");
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    (file, path.into())
}

/// Loads what the spec names into a guest of that memory, and looks at where it would begin.
fn load(boot: &KernelSpec, memory_mib: u64) {
    let mut files = BootFiles::open(boot).expect("it was just made");
    let bytes = memory_mib << 20;
    let platform = MICRO.platform(1, &MICRO.windows(bytes, 40), Vec::new());
    let ram: Ram = memory::allocate(&MICRO, memory_mib, 40, Backing::Anonymous).expect("a few MiB");
    for shared in [false, true] {
        if shared {
            files.share_alone();
        }
        match files.load(&ram, bytes, &MICRO, &platform) {
            Ok(Entry::Pvh { address } | Entry::Long { address }) => {
                assert!(ram.address_in_range(GuestAddress(address)), "{address:#x}");
            }
            Err(error) => assert_one_line(&error),
        }
    }
    files.part().expect("memory for a few MiB");
}

/// Sizes of all that is loaded. Byte 0: the kernel (bit 0: a bzImage); byte 1: MiB of memory; two bytes: length of the
/// command line; eight: size of the initial RAM disk, a hole; then, four each: a bzImage's preferred address, its size
/// when unpacked, and the highest address of an initial RAM disk.
pub fn initrd(input: &[u8]) {
    let mut bytes = [0; 24];
    let count = input.len().min(bytes.len());
    bytes[..count].copy_from_slice(&input[..count]);
    let number = |at: usize, size: usize| {
        let mut number = [0; 8];
        number[..size].copy_from_slice(&bytes[at..at + size]);
        u64::from_le_bytes(number)
    };
    let mut kernel = match bytes[0] & 1 {
        0 => pvh_elf(&[0xf4]),
        _ => bzimage(),
    };
    if bytes[0] & 1 != 0 {
        // Offsets of these fields: see `bzimage`.
        for (from, to) in [(12, 0x258), (16, 0x260), (20, 0x22c)] {
            kernel[to..to + 4].copy_from_slice(&bytes[from..from + 4]);
        }
    }
    let (kernel_file, image) = scratch(&kernel, kernel.len() as u64);
    let memory_mib = 1 + number(1, 1);
    // No file is larger than an offset.
    let (initrd_file, initrd) = scratch(&[], number(4, 8) >> 1);
    let boot = KernelSpec {
        image,
        initrd: Some(initrd),
        cmdline: "x".repeat(usize::try_from(number(2, 2)).expect("16 bits")),
        shared: false,
    };
    load(&boot, memory_mib);
    drop((kernel_file, initrd_file));
}

/// What fits, and what misses by a little.
#[must_use]
pub fn initrd_corpus() -> Vec<Vec<u8>> {
    let input = |kernel: u8, mib: u8, cmdline: u16, initrd: u64, fields: [u32; 3]| {
        let mut bytes = vec![kernel, mib - 1];
        bytes.extend(cmdline.to_le_bytes());
        bytes.extend((initrd << 1).to_le_bytes());
        fields
            .iter()
            .for_each(|field| bytes.extend(field.to_le_bytes()));
        bytes
    };
    let usual = [0x10_0000, 0x20_0000, 0x7fff_ffff];
    let mut all = Vec::new();
    for kernel in [0, 1] {
        for (mib, initrd) in [
            (1, 0),
            (8, 1),
            (8, 4 << 20),
            (8, 8 << 20),
            (16, 13 << 20),
            (8, u64::MAX >> 1),
        ] {
            for cmdline in [0, 2047, 2048, 0xffff] {
                all.push(input(kernel, mib, cmdline, initrd, usual));
            }
        }
    }
    for fields in [[0, 0, 0], [u32::MAX; 3], [0x10_0000, 0x20_0000, 0x40_0000]] {
        all.push(input(1, 16, 10, 1 << 20, fields));
    }
    all
}

/// Opens files of these sizes as firmware's code and variables, four bytes each; a last byte is the code's first.
pub fn flash(input: &[u8]) {
    let mut bytes = [0; 9];
    let count = input.len().min(bytes.len());
    bytes[..count].copy_from_slice(&input[..count]);
    let [code, vars] = [0, 4].map(|at| {
        let size = bytes[at..at + 4].try_into().expect("four bytes");
        u64::from(u32::from_le_bytes(size))
    });
    let (code_file, code_path) = scratch(&bytes[8..], code);
    let (vars_file, vars_path) = scratch(&[], vars);
    let spec = FirmwareSpec {
        code: code_path,
        vars: vars_path,
        menu_ms: None,
        log: None,
    };
    match FirmwareFiles::open(&spec) {
        Ok(files) => {
            assert_eq!(files.sizes(), (code, vars));
            assert!(code + vars <= 16 << 20 && (code | vars) % 4096 == 0 && code * vars > 0);
        }
        Err(error) => assert_one_line(&error),
    }
    drop((code_file, vars_file));
}

/// Sizes at their bounds.
#[must_use]
pub fn flash_corpus() -> Vec<Vec<u8>> {
    const LARGEST: u32 = 16 << 20;
    let sizes = [
        (0x1000, 0x1000),
        (LARGEST - 0x1000, 0x1000),
        (LARGEST, 0x1000),
        (0, 0x1000),
        (0x1000, 0),
        (0xfff, 0x1000),
        (u32::MAX, u32::MAX),
    ];
    let bytes = |(code, vars): (u32, u32)| [code.to_le_bytes(), vars.to_le_bytes()].concat();
    sizes.map(bytes).into()
}

/// Reads lines as the arguments of `run`, and checks the spec that they make. It comes back from its file as it is.
pub fn arguments(input: &[u8]) {
    let text = String::from_utf8_lossy(input);
    let words = ["atoll-vmm", "run"].into_iter().chain(text.lines());
    // A word with a zero in it reaches no program.
    let Ok(cli) = Cli::try_parse_from(words.map(|word| word.replace('\0', ""))) else {
        return;
    };
    let Command::Run(arguments) = cli.command else {
        return;
    };
    let spec = arguments.to_spec();
    if let Err(error) = check::shape(&spec) {
        assert_told(&error, input);
    }
    let file = serde_json::to_string(&spec).expect("text");
    assert_eq!(
        serde_json::from_str::<MachineSpec>(&file).expect("its own"),
        spec
    );
}

/// Every argument with keys, right and wrong.
#[must_use]
pub fn arguments_corpus() -> Vec<Vec<u8>> {
    let with = |rest: &str| format!("--kernel\nk\n{rest}").into_bytes();
    let words = [
        "--cpus\n255\n--memory\n16777215T",
        "--memory\n2G,hugepages=1G",
        "--cpu\nx86-64-v3,+pcid,-avx2,hidden,phys-bits=46",
        "--cpu\nhost,flags=+aes;-pcid",
        "--disk\npath=d,format=raw,id=a,serial=s,queues=4,readonly,discard,cache=none",
        "--disk\npath=d,format=qcow2,backing=raw:b,bus=scsi,target=255,bootindex=65535,read-bytes-per-second=1",
        "--disk\nbus=cdrom\n--disk\npath=,format=raw",
        "--disk\n=,=,,path\n",
        "--net\ntap=t0,mac=52:54:00:12:34:56,mtu=65535,queues=64,vhost=off,rate=17179869183G,link=down",
        "--net\nvhost-user=s,reconnect,id=n",
        "--console\nsocket=s\n--virtio-console\npty",
        "--port\nname=a,socket=p\n--balloon\ntarget=1,deflate-on-oom=off\n--vsock\ncid=3,socket=v",
        "--fs\ntag=t,socket=s\n--vhost-user\nsocket=s,type=blk,queues=2,config=60\n--memory\n64,shared",
        "--watchdog\naction=reset\n--panic\naction=none\n--generation-id\nx",
        "--name\n\n--cmdline\n\u{1}",
    ];
    let mut all: Vec<Vec<u8>> = words.map(with).into();
    all.push(b"--firmware\nvars=v,code=c,menu=65535,log=l".to_vec());
    all.push(b"--spec\ns".to_vec());
    all.push(b"--restore\nd\n--spec\ns".to_vec());
    all
}

/// A PVH kernel, and a bzImage.
#[must_use]
pub fn kernel_corpus() -> Vec<Vec<u8>> {
    let elf = b"\x7fELF".to_vec();
    vec![Vec::new(), elf, PROBE_ELF.to_vec(), bzimage()]
}

/// A bzImage that is nothing but its header: it would be loaded.
#[must_use]
pub fn bzimage() -> Vec<u8> {
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
    image
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

/// Reads the input as an answer of the control API, as its client does.
pub fn response(input: &[u8]) {
    match http::read_response(&mut &*input) {
        Ok(message) => assert!(message.status < 1000 && message.body.len() <= input.len()),
        Err(error) => assert_one_line(&error),
    }
}

/// Answers that are right, and wrong in one way.
#[must_use]
pub fn response_corpus() -> Vec<Vec<u8>> {
    [
        "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}",
        "HTTP/1.1 409 Conflict\r\nContent-Length: 13\r\n\r\n{\"error\":\"x\"}",
        "HTTP/1.1 099 \r\ncontent-length: 1048577\r\n\r\n",
        "HTTP/1.0 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ]
    .map(|text| text.as_bytes().to_vec())
    .into()
}

/// Reads the input as a machine's spec, as `--spec FILE` does. From a spec that is right every table is made that
/// firmware or the guest finds in memory.
pub fn spec(input: &[u8]) {
    match serde_json::from_slice::<MachineSpec>(input) {
        Ok(spec) => match check::spec(&spec) {
            Ok(()) => tables(&spec),
            Err(error) => assert_told(&error, input),
        },
        Err(error) => assert_told(&error, input),
    }
}

/// ACPI and SMBIOS: sums that firmware checks, and lengths.
fn tables(spec: &MachineSpec) {
    let board = Board::of(spec.profile);
    let bytes = spec.memory_mib << 20;
    let platform = board.platform(spec.cpu_count, &board.windows(bytes, 40), Vec::new());
    let identity = machine::identity(&spec.identity);
    let menu_ms = match &spec.boot {
        BootSpec::Firmware(firmware) => firmware.menu_ms,
        BootSpec::Kernel(_) => None,
    };
    let items = fw_cfg::items(&platform, &board.ram(bytes), &identity, Vec::new(), menu_ms);
    let smbios = items.file(atoll_firmware::smbios::TABLES_FILE);
    let smbios = smbios.expect("every machine has these tables");
    let mut rest = smbios;
    // System Management BIOS 3.6 §6.1: type, length of the fixed part; then strings up to two zeroes.
    let mut last = 0;
    while let Some((&[kind, length], _)) = rest.split_first_chunk() {
        let strings = &rest[usize::from(length)..];
        let end = strings.windows(2).position(|pair| pair == [0, 0]);
        rest = &strings[end.expect("two zeroes end a structure") + 2..];
        last = kind;
    }
    assert!(rest.is_empty() && last == 127, "the end-of-table structure");
}

/// Reads the input as a machine's state, as a restore and a migration's target do.
pub fn state(input: &[u8]) {
    match MachineState::from_json(input) {
        Ok(state) => {
            let leaves: usize = state.cpuid().iter().map(Vec::len).sum();
            assert!(leaves <= input.len());
            MachineState::from_json(&state.to_json()).expect("as it was written");
            for vcpu in state.vcpus {
                let _ = vcpu.into_state(u64::MAX);
            }
        }
        Err(error) => assert_told(&error, input),
    }
}

/// A state of a machine with one vCPU, and heads of others.
#[must_use]
pub fn state_corpus() -> Vec<Vec<u8>> {
    let zeroes = |count: usize| "0".repeat(2 * count);
    let whole = format!(
        r#"{{"format":"atoll-machine-state","version":1,"program":"0.1.0","machine_version":1,"cpu_count":1,
        "memory_mib":1,"devices":[{{"name":"a","device":{{"kind":"b","version":1,"state":{{}}}}}}],
        "chips":["{chip}"],"clock":{{"guest_ns":1,"realtime_ns":2,"tsc_khz":3}},
        "vcpus":[{{"cpuid":[[0,0,0,1,2,3,4]],"tsc":5,"msrs":[[16,6]],"mp_state":"{mp}","regs":"{regs}",
        "sregs":"{sregs}","xsave":"{xsave}","xcrs":"{xcrs}","debug_regs":"{debug}","lapic":"{lapic}",
        "events":"{events}"}}]}}"#,
        chip = zeroes(size_of::<kvm_bindings::kvm_irqchip>()),
        mp = zeroes(size_of::<kvm_bindings::kvm_mp_state>()),
        regs = zeroes(size_of::<kvm_bindings::kvm_regs>()),
        sregs = zeroes(size_of::<kvm_bindings::kvm_sregs>()),
        xsave = zeroes(size_of::<kvm_bindings::kvm_xsave>()),
        xcrs = zeroes(size_of::<kvm_bindings::kvm_xcrs>()),
        debug = zeroes(size_of::<kvm_bindings::kvm_debugregs>()),
        lapic = zeroes(size_of::<kvm_bindings::kvm_lapic_state>()),
        events = zeroes(size_of::<kvm_bindings::kvm_vcpu_events>()),
    );
    let newer = r#"{"format":"atoll-machine-state","version":2,"program":"9"}"#;
    MachineState::from_json(whole.as_bytes()).expect("the corpus reaches far");
    vec![
        whole.into_bytes(),
        newer.as_bytes().to_vec(),
        b"{}".to_vec(),
    ]
}

/// Reads the input as a snapshot's packed memory, and compresses it again.
pub fn packed(input: &[u8]) {
    let file = || tempfile::tempfile().expect("a temporary file");
    let (from, to) = (file(), file());
    from.write_all_at(input, 0)
        .expect("a temporary file has room");
    let ram = memory::allocate(&MICRO, 1, 40, Backing::Anonymous).expect("1 MiB");
    let opened = Packed::open(from.try_clone().expect("a descriptor"), 1 << 20);
    match opened.and_then(|packed| packed.read(&ram).map(|()| packed)) {
        Ok(packed) => assert_overlay(&packed, &ram),
        Err(error) => assert_one_line(&error),
    }
    let compressed = saved::packed::compress(&from, &to);
    if compressed.is_ok() {
        let size = to.metadata().expect("a temporary file").len();
        assert!(size <= 32 + (input.len() as u64 + 24) * 4096);
    }
}

/// Read a part at a time, and only the parts that it says it has, RAM is the same.
fn assert_overlay(packed: &Packed, ram: &Ram) {
    const PART_PAGES: u64 = 48;
    let mut pages = vec![0; 48 * 4096];
    let mut next = 0;
    while let Some(page) = packed.next(next) {
        assert!((next..256).contains(&page), "{page} from {next}");
        let first = page / PART_PAGES * PART_PAGES;
        pages.fill(0);
        packed.overlay(first, &mut pages).expect("it has been read");
        let count = pages
            .len()
            .min(usize::try_from((256 - first) * 4096).expect("1 MiB"));
        let mut whole = vec![0; count];
        let at = GuestAddress(first * 4096);
        ram.read_slice(&mut whole, at).expect("1 MiB");
        assert!(whole == pages[..count], "pages from {first}");
        next = first + PART_PAGES;
    }
}

/// A few pages as a machine writes them, the same compressed, and zeroes that a child has.
#[must_use]
pub fn packed_corpus() -> Vec<Vec<u8>> {
    let ram = memory::allocate(&MICRO, 1, 40, Backing::Anonymous).expect("1 MiB");
    for page in [2, 3, 70] {
        let at = GuestAddress(page * 4096);
        ram.write_obj(page, at).expect("within 1 MiB");
    }
    let mut written = vec![vec![0; 4]];
    written[0][1] = 0b111 << 5;
    let mut all = Vec::new();
    for wanted in [Wanted::All(None), Wanted::Written(&written)] {
        let file = || tempfile::tempfile().expect("a temporary file");
        let (plain, small) = (file(), file());
        saved::packed::write(&ram, wanted, &plain).expect("RAM is readable");
        saved::packed::compress(&plain, &small).expect("as it was written");
        for file in [plain, small] {
            let size = file.metadata().expect("a temporary file").len();
            let mut bytes = vec![0; usize::try_from(size).expect("a few pages")];
            file.read_exact_at(&mut bytes, 0).expect("all of it");
            all.push(bytes);
        }
    }
    all
}

/// Reads the input as what a migration's source sends on its two kinds of connection: messages, then pages. Nothing
/// is written outside of RAM.
pub fn migration(input: &[u8]) {
    let mut messages = input;
    loop {
        match migration::receive(&mut messages) {
            Ok(Message::Hello(hello)) => {
                if let Err(error) = hello.check() {
                    assert_told(&error, input);
                }
            }
            Ok(Message::Remaining) => {
                let ram = memory::allocate(&MICRO, 1, 40, Backing::Anonymous).expect("1 MiB");
                let _ = migration::postcopy::receive_bitmap(&mut messages, &ram);
            }
            Ok(_) => {}
            Err(error) => {
                assert_told(&error, input);
                break;
            }
        }
    }
    let ram = memory::allocate(&MICRO, 1, 40, Backing::Anonymous).expect("1 MiB");
    if let Err(error) = pages::receive(&ram, &mut BufReader::new(input)) {
        assert_one_line(&error);
    }
}

/// Messages of each kind, and pages with a mistake.
#[must_use]
pub fn migration_corpus() -> Vec<Vec<u8>> {
    let [whole, least] = spec_texts();
    let hello = |spec: &str| {
        format!(
            r#"{{"hello":{{"format":"atoll-migration","version":2,"program":"0.1.0","spec":{spec},
            "machine_version":1,"cpuid":[[0,0,0,1,2,3,4]],"data_connections":2,
            "disks":[{{"id":"disk0","size_bytes":512,"connections":2}}],"post_copy":{{"fault_connections":2}}}}}}"#
        )
    };
    let state = String::from_utf8(state_corpus().swap_remove(0)).expect("JSON");
    let messages = [
        hello(whole),
        hello(least),
        r#""ready""#.to_owned(),
        r#""remaining""#.to_owned(),
        r#"{"failed":{"reason":"x"}}"#.to_owned(),
        format!(r#"{{"state":{state}}}"#),
    ];
    let mut all: Vec<Vec<u8>> = messages
        .iter()
        .map(|message| {
            let size = u32::try_from(message.len()).expect("a few KiB");
            let mut bytes = size.to_le_bytes().to_vec();
            bytes.extend(message.as_bytes());
            migration::receive(&mut &*bytes).expect("the corpus reaches far");
            bytes
        })
        .collect();
    // Headers of pages: address, size, kind; see `pages`.
    for (address, size, kind) in [
        (4096_u64, 4096_u32, 0_u32),
        (0, 8192, 1),
        (1 << 20, 4096, 1),
        (0, 0, 2),
    ] {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(size.to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        bytes.resize(bytes.len() + 4096, 7);
        all.push(bytes);
    }
    all
}

/// A whole spec, and the smallest one.
#[must_use]
pub fn spec_corpus() -> Vec<Vec<u8>> {
    spec_texts().map(|text| text.as_bytes().to_vec()).into()
}

fn spec_texts() -> [&'static str; 2] {
    let whole = r#"{"name":"a","cpu_count":2,"memory_mib":64,"boot":{"kernel":{"image":"/k","initrd":"/i","cmdline":"x"}},
        "disks":[{"path":"/d","format":"raw","readonly":true,"serial":"s","queue_count":4}],
        "nets":[{"tap":"tap0","mac":"52:54:00:00:00:01","mtu":1500}],
        "serial":{"socket":"/s"},"console":"pty","rng":false,
        "identity":{"manufacturer":"m","serial":"0","options":["a","b"]}}"#;
    let least = r#"{"name":"","cpu_count":1,"memory_mib":1,"boot":{"kernel":{"image":"k"}}}"#;
    [whole, least]
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
