// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Has the tables of `filters` compiled (`program`), installs them on threads, and names a denied call in the log.
//!
//! A filter holds for the thread that installs it and for all that this one makes. So the threads of the machine's
//! start are made before the starter gets its own, and have exactly one filter each; a vCPU's exits cost one.

#![expect(
    unsafe_code,
    reason = "a signal handler, and the registers of the denied call"
)]

use std::io::{self, Write};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use atoll_thread::Kind;
use seccompiler::{BpfProgram, apply_filter};
use vmm_sys_util::signal::register_signal_handler;

use super::{DENIED_EXIT_CODE, SandboxError, Seccomp, filters, names, program};

/// What happens with a denied call; set once, by [`arm`].
static MODE: OnceLock<Seccomp> = OnceLock::new();
/// Compiled when the first thread of a kind asks.
static PROGRAMS: [OnceLock<BpfProgram>; Kind::ALL.len()] =
    [const { OnceLock::new() }; Kind::ALL.len()];
/// Who says so in the handler's line: `atoll-vmm`, `atoll-relay`, or what embeds this crate.
static PROGRAM: OnceLock<String> = OnceLock::new();
/// Where the handler writes its line.
static LOG: AtomicI32 = AtomicI32::new(libc::STDERR_FILENO);

/// From now on every thread that is made gets the filter of its kind.
pub(super) fn arm(mode: Seccomp, log: RawFd) -> Result<(), SandboxError> {
    if mode == Seccomp::Off {
        return Ok(());
    }
    LOG.store(log, Ordering::Relaxed);
    PROGRAM.get_or_init(program_name);
    keep_one_heap();
    let _ = MODE.set(mode);
    name_denied_calls().map_err(SandboxError::Handler)?;
    atoll_thread::confine(enter).map_err(SandboxError::Starter)
}

fn program_name() -> String {
    let path = PathBuf::from(std::env::args_os().next().unwrap_or_default());
    let name = path.file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
}

/// Of all threads. Otherwise the C library opens files: in /sys to count CPUs before it makes one more heap, in /proc
/// before it gives memory of a second one back. Threads that serve a guest allocate rarely, and one heap is less
/// memory. Heaps that exist stay, so this comes before any thread of a process that will have filters.
pub(crate) fn keep_one_heap() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a number, before there are other threads.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1)
    };
}

/// Whether [`arm`] was called, with filters.
pub(super) fn is_armed() -> bool {
    MODE.get().is_some()
}

/// Puts the calling thread under the filter of `kind`.
pub(super) fn enter(kind: Kind) {
    let program = PROGRAMS[kind as usize].get_or_init(|| compile(kind));
    if let Err(error) = apply_filter(program) {
        // A thread without its filter must not run, and nobody waits for its result who could say so better.
        tracing::error!(?kind, %error, "this kernel does not take a system-call filter: start with --seccomp off");
        std::process::exit(DENIED_EXIT_CODE);
    }
}

/// Compiles the filters of the owner, of the starter, and of the threads that it makes.
pub(super) fn prepare() {
    for kind in filters::LATE.iter().chain(&[Kind::Owner, Kind::Starter]) {
        PROGRAMS[*kind as usize].get_or_init(|| compile(*kind));
    }
}

fn compile(kind: Kind) -> BpfProgram {
    let late: &[Kind] = match kind {
        Kind::Starter => filters::LATE,
        _ => &[],
    };
    let denied = match MODE.get() {
        Some(Seccomp::Log) => libc::SECCOMP_RET_LOG,
        _ => libc::SECCOMP_RET_TRAP,
    };
    let kinds = std::iter::once(&kind).chain(late);
    let tables = kinds.flat_map(|kind| filters::tables(*kind));
    program::compile(tables.copied().flatten(), denied)
}

/// Installs the handler of SIGSYS, which the kernel sends instead of carrying out a denied call.
fn name_denied_calls() -> io::Result<()> {
    // It calls only what is safe in a handler.
    Ok(register_signal_handler(libc::SIGSYS, denied)?)
}

/// Says which thread made which call, and ends the process. Allocates nothing and takes no lock.
extern "C" fn denied(_: libc::c_int, _: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel passes the interrupted thread's context to a handler with SA_SIGINFO.
    let context = unsafe { &*context.cast::<libc::ucontext_t>() };
    let registers = &context.uc_mcontext.gregs;
    let at = |register: libc::c_int| {
        let index = usize::try_from(register).unwrap_or_default();
        registers.get(index).copied().unwrap_or_default()
    };
    let mut line = Line::default();
    let mut thread = [0_u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes, the last of them zero.
    unsafe { libc::prctl(libc::PR_GET_NAME, thread.as_mut_ptr()) };
    let end = thread.iter().position(|byte| *byte == 0);
    let thread = std::str::from_utf8(&thread[..end.unwrap_or_default()]).unwrap_or("?");
    let program = PROGRAM.get().map_or("", String::as_str);
    // What does not fit is cut off.
    let number = at(libc::REG_RAX);
    let name = names::name(number).unwrap_or("?");
    let _ = write!(
        line,
        "{program}: thread {thread} made a system call that its filter denies: {name} (number {number}), arguments"
    );
    for register in [
        libc::REG_RDI,
        libc::REG_RSI,
        libc::REG_RDX,
        libc::REG_R10,
        libc::REG_R8,
        libc::REG_R9,
    ] {
        let _ = write!(line, " {:#x}", at(register));
    }
    let _ = line.write_all(b"; the machine ends\n");
    // SAFETY: the bytes are initialized. The descriptor is the log's; if it is closed, nobody is told.
    unsafe {
        libc::write(
            LOG.load(Ordering::Relaxed),
            line.bytes.as_ptr().cast(),
            line.size,
        )
    };
    // SAFETY: ends the process without running anything of it.
    unsafe { libc::_exit(DENIED_EXIT_CODE) };
}

/// A line on the stack.
struct Line {
    bytes: [u8; 320],
    size: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 320],
            size: 0,
        }
    }
}

impl Write for Line {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let room = &mut self.bytes[self.size..];
        let count = room.len().min(bytes.len());
        room[..count].copy_from_slice(&bytes[..count]);
        self.size += count;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;
    use std::time::Duration;

    /// Nothing that these tests wait for takes longer.
    const PATIENCE: Duration = Duration::from_secs(60);

    #[test]
    fn every_table_compiles_within_the_kernels_limit() {
        for kind in Kind::ALL {
            let program = compile(*kind);
            // BPF_MAXINSNS of `linux/bpf_common.h`.
            assert!((1..=4096).contains(&program.len()), "{kind:?}");
        }
    }

    const CHILD: &str = "ATOLL_TEST_DENIED";

    /// Runs the test `name` of this file in a process of its own, which it may end.
    fn run_alone(name: &str, how: &str) -> (Option<i32>, String) {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("sandbox::seccomp::tests::{name}")])
            .arg("--nocapture")
            .env(CHILD, how)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        (output.status.code(), said)
    }

    fn opens_a_file() -> bool {
        std::fs::File::open("/dev/null").is_ok()
    }

    #[test]
    fn a_denied_call_is_named_with_its_thread_and_ends_the_process() {
        if std::env::var(CHILD).is_ok() {
            arm(Seccomp::On, libc::STDERR_FILENO).unwrap();
            let thread = atoll_thread::spawn(Kind::Disk, "blk0-q0", opens_a_file);
            thread.unwrap().join().unwrap();
            return;
        }
        let name = "a_denied_call_is_named_with_its_thread_and_ends_the_process";
        let (code, said) = run_alone(name, "on");
        assert_eq!(code, Some(DENIED_EXIT_CODE), "{said}");
        let line = format!(
            "{}: thread blk0-q0 made a system call that its filter denies: openat (number 257)",
            program_name()
        );
        assert!(said.contains(&line), "{said}");
    }

    /// A thread is denied a call while another one writes a line to the log, and while it does so itself.
    #[test]
    fn a_denied_call_is_named_while_the_log_is_locked() {
        if let Ok(holder) = std::env::var(CHILD) {
            arm(Seccomp::On, libc::STDERR_FILENO).unwrap();
            let _held = (holder == "another").then(|| io::stderr().lock());
            let denied = move || {
                let _held = (holder == "itself").then(|| io::stderr().lock());
                opens_a_file()
            };
            let _thread = atoll_thread::spawn(Kind::Disk, "blk0-q0", denied).unwrap();
            // Its end ends the process; in vain if it waits for what is held here.
            std::thread::sleep(PATIENCE);
            std::process::exit(0);
        }
        for holder in ["another", "itself"] {
            let name = "a_denied_call_is_named_while_the_log_is_locked";
            let (code, said) = run_alone(name, holder);
            assert_eq!(code, Some(DENIED_EXIT_CODE), "{said}");
            assert!(said.contains("thread blk0-q0 made"), "{said}");
        }
    }

    #[test]
    fn logged_calls_are_carried_out() {
        if std::env::var(CHILD).is_ok() {
            arm(Seccomp::Log, libc::STDERR_FILENO).unwrap();
            let thread = atoll_thread::spawn(Kind::Vcpu, "vcpu0", opens_a_file);
            assert!(thread.unwrap().join().unwrap());
            return;
        }
        let (code, said) = run_alone("logged_calls_are_carried_out", "log");
        assert_eq!(code, Some(0), "{said}");
    }

    #[test]
    fn every_kind_of_thread_can_be_made_end_and_allocate() {
        if std::env::var(CHILD).is_ok() {
            arm(Seccomp::On, libc::STDERR_FILENO).unwrap();
            // Before the seal with one filter, after it with two.
            for sealed in [false, true] {
                if sealed {
                    atoll_thread::seal_starter();
                    enter(Kind::Owner);
                }
                for kind in filters::LATE {
                    let body = || vec![1_u8; 3 << 20].iter().map(|one| u64::from(*one)).sum();
                    let thread = atoll_thread::spawn(*kind, "any", body).unwrap();
                    let sum: u64 = thread.join().unwrap();
                    assert_eq!(sum, 3 << 20);
                }
            }
            // The test's own harness has made threads that this thread's filter does not know.
            std::process::exit(0);
        }
        let name = "every_kind_of_thread_can_be_made_end_and_allocate";
        let (code, said) = run_alone(name, "on");
        assert_eq!(code, Some(0), "{said}");
    }
}
