// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! One vCPU: a thread named `vcpu0`, `vcpu1`, … that runs the guest, answers its exits, and obeys its owner.
//!
//! ```text
//!            Command::Run              Command::Hold
//!   held ────────────────────► running ────────────────► held
//!    │  ◄── save, restore, enter                           │
//!    └── Command::End ──► thread ends ◄────────────────────┘
//! ```
//!
//! **Stopping.** The owner sends a command, then sets `immediate_exit` in the vCPU's shared page, then sends a
//! signal: whether the thread is in the guest, on its way into it, or answering an exit, its next or current
//! `KVM_RUN` returns EINTR, and only then does the thread look at its commands. So an access that the guest
//! has begun is always finished: KVM completes it at the start of that `KVM_RUN` (`api.rst` §5, the note on
//! KVM_EXIT_IO), and a vCPU that is held has no half-done instruction. The thread clears `immediate_exit`
//! before it reads its commands, hence none is missed.
//!
//! No lock is held while a guest runs or while an exit is answered.

#![expect(
    unsafe_code,
    reason = "a byte of the page that KVM shares with this process, and the clock of a thread"
)]

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::sync::mpsc::{
    Receiver, RecvTimeoutError, Sender, SyncSender, TryRecvError, channel, sync_channel,
};
use std::thread::JoinHandle;
use std::time::Duration;

use atoll_devices::bus::Bus;
use atoll_thread::Kind;
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::signal::{Killable, register_signal_handler};

use super::setup::{self, Entry};
use super::state::{self, Scope, VcpuState};
use super::{Offset, Tsc};
use crate::kvm::KvmError;

/// What a vCPU reports to its owner.
#[derive(Debug)]
pub enum Report {
    /// The guest cannot go on: it triple-faulted.
    TripleFault {
        /// Which vCPU.
        vcpu: u8,
        /// Its registers, for whoever looks for the reason.
        place: String,
    },
    /// KVM cannot go on.
    Failed {
        /// Which vCPU.
        vcpu: u8,
        /// Why, in one sentence.
        reason: String,
    },
}

/// The buses that exits are answered from.
#[derive(Clone)]
pub struct Buses {
    /// I/O ports: `KVM_EXIT_IO`.
    pub ports: Bus,
    /// Guest-physical addresses that are not RAM: `KVM_EXIT_MMIO`.
    pub memory: Bus,
}

/// Exits to this process so far, by kind: those that KVM answers itself are not counted.
#[derive(Debug, Default)]
pub struct Exits {
    /// Accesses to I/O ports.
    pub port: AtomicU64,
    /// Accesses to guest-physical addresses that are not RAM.
    pub mmio: AtomicU64,
    /// All others, of which a running guest has few.
    pub other: AtomicU64,
}

enum Command {
    Run,
    Hold(SyncSender<()>),
    Rest(Duration),
    Save(Arc<Scope>, SyncSender<Result<VcpuState, KvmError>>),
    Restore(Arc<VcpuState>, Tsc, SyncSender<Result<Offset, KvmError>>),
    Enter(Entry, SyncSender<Result<(), KvmError>>),
    End,
}

/// First instruction after a reset (Intel SDM vol. 3A §10.1.4). KVM on AMD resets a vCPU before it reports a triple
/// fault, since the hardware leaves its state undefined (AMD APM vol. 2 §15.14.3).
const RESET_CS: u16 = 0xf000;
const RESET_RIP: u64 = 0xfff0;

/// The owner's end of a vCPU. Its calls send a command to the vCPU's thread and, where they have an answer, wait for it.
/// Dropping it ends the thread.
pub struct Vcpu {
    commands: Sender<Command>,
    immediate_exit: ImmediateExit,
    /// The thread gives its descriptor back, so that the shared page is mapped for as long as this exists.
    thread: Option<JoinHandle<VcpuFd>>,
    clock: libc::clockid_t,
    exits: Arc<Exits>,
}

/// What a vCPU's thread has been asked for.
pub struct Pending<T>(Receiver<Result<T, KvmError>>);

impl<T> Pending<T> {
    /// Waits for it; an error if KVM refuses, or the thread has ended.
    pub fn wait(self) -> Result<T, KvmError> {
        self.0.recv().unwrap_or_else(|_| Err(ended()))
    }

    /// Asks them all, and then waits for all: they do it at the same time. Their answers are in the same order.
    pub fn all(asked: impl Iterator<Item = Self>) -> Result<Vec<T>, KvmError> {
        let asked: Vec<_> = asked.collect();
        asked.into_iter().map(Self::wait).collect()
    }
}

/// The byte of a vCPU's shared page that makes `KVM_RUN` return at once.
#[derive(Clone, Copy)]
struct ImmediateExit(*const AtomicU8);

// SAFETY: the pointer is to a byte of a shared mapping that is only ever accessed atomically through this
// type and by the kernel, and that stays mapped until `Vcpu` has joined the thread which owns it.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    fn of(fd: &mut VcpuFd) -> Self {
        Self(
            (&raw mut fd.get_kvm_run().immediate_exit)
                .cast_const()
                .cast(),
        )
    }

    fn set(self, value: u8) {
        // SAFETY: see `Send`; an AtomicU8 has the size and alignment of the byte.
        let byte = unsafe { &*self.0 };
        byte.store(value, Ordering::SeqCst);
    }
}

impl Vcpu {
    /// Starts the thread of vCPU `id`, held: it has not executed anything.
    pub fn start(
        id: u8,
        mut fd: VcpuFd,
        buses: Buses,
        report: impl Fn(Report) + Send + 'static,
    ) -> io::Result<Self> {
        let immediate_exit = ImmediateExit::of(&mut fd);
        let (commands, received) = channel();
        let exits = Arc::new(Exits::default());
        let mut body = Body {
            id,
            fd,
            buses,
            exits: exits.clone(),
            commands: received,
            immediate_exit,
        };
        let thread = atoll_thread::spawn(Kind::Vcpu, &format!("vcpu{id}"), move || {
            body.obey(&report);
            body.fd
        })?;
        let mut clock = 0;
        // SAFETY: the thread has not been joined, so its id is valid; `clock` is writable.
        let result = unsafe { libc::pthread_getcpuclockid(thread.as_pthread_t(), &raw mut clock) };
        if result != 0 {
            return Err(io::Error::from_raw_os_error(result));
        }
        Ok(Self {
            commands,
            immediate_exit,
            thread: Some(thread),
            clock,
            exits,
        })
    }

    /// Lets the guest go on. Returns at once.
    pub fn run(&self) {
        self.send(Command::Run);
    }

    /// Stops the guest; the answer comes when the vCPU is at rest. Ask all vCPUs, then wait for all.
    #[must_use]
    pub fn hold(&self) -> Receiver<()> {
        let (answer, held) = sync_channel(1);
        self.send(Command::Hold(answer));
        self.kick();
        held
    }

    /// Makes a running guest rest for a while, or until the next command. Returns at once.
    pub fn rest(&self, time: Duration) {
        self.send(Command::Rest(time));
        self.kick();
    }

    /// Takes the state of a held vCPU. Its thread does so while the caller asks others.
    #[must_use]
    pub fn save(&self, scope: &Arc<Scope>) -> Pending<VcpuState> {
        let (answer, saved) = sync_channel(1);
        self.send(Command::Save(scope.clone(), answer));
        Pending(saved)
    }

    /// Puts a held vCPU into a state; how its counter is set then. Its thread does so while the caller asks others.
    #[must_use]
    pub fn restore(&self, state: &Arc<VcpuState>, tsc: Tsc) -> Pending<Offset> {
        let (answer, restored) = sync_channel(1);
        self.send(Command::Restore(state.clone(), tsc, answer));
        Pending(restored)
    }

    /// Points a held vCPU, whose state is that of power-on, at a kernel.
    pub fn enter(&self, entry: Entry) -> Result<(), KvmError> {
        let (answer, entered) = sync_channel(1);
        self.send(Command::Enter(entry, answer));
        entered.recv().unwrap_or_else(|_| Err(ended()))
    }

    /// Exits of this vCPU so far; may be read while it runs.
    #[must_use]
    pub fn exits(&self) -> &Exits {
        &self.exits
    }

    /// CPU time of the thread so far, in microseconds.
    #[must_use]
    pub fn cpu_time_us(&self) -> u64 {
        let mut time = libc::timespec {
            tv_sec: 0,
            tv_nsec: 0,
        };
        // SAFETY: the clock is that of a thread of this process, `time` is writable. Once the thread has
        // ended, the call fails, which reads as no time at all.
        let result = unsafe { libc::clock_gettime(self.clock, &raw mut time) };
        if result != 0 {
            return 0;
        }
        let seconds = u64::try_from(time.tv_sec).unwrap_or_default();
        let nanoseconds = u64::try_from(time.tv_nsec).unwrap_or_default();
        seconds * 1_000_000 + nanoseconds / 1000
    }

    fn send(&self, command: Command) {
        // A thread that has ended has dropped its receiver, and obeys nothing any more.
        let _ = self.commands.send(command);
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            interrupt(self.immediate_exit, thread);
        }
    }
}

/// Has the thread's current or next `KVM_RUN` return. The byte comes first: a signal that finds the thread on its way
/// into the guest is spent there.
fn interrupt(immediate_exit: ImmediateExit, thread: &impl Killable) {
    immediate_exit.set(1);
    // A thread that has ended needs no signal.
    let _ = thread.kill(kick_signal());
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        self.send(Command::End);
        self.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn ended() -> KvmError {
    KvmError::Failed {
        what: "reach a vCPU",
        source: io::Error::other("its thread has ended"),
    }
}

/// The signal that interrupts `KVM_RUN`. Its handler does nothing: the interruption is the message.
fn kick_signal() -> libc::c_int {
    libc::SIGRTMIN()
}

/// Installs the handler; once a process, before the first vCPU starts.
pub fn handle_kicks() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    // Without SA_RESTART, so that KVM_RUN returns.
    Ok(register_signal_handler(kick_signal(), ignore)?)
}

/// What the thread owns.
struct Body {
    id: u8,
    fd: VcpuFd,
    buses: Buses,
    exits: Arc<Exits>,
    commands: Receiver<Command>,
    immediate_exit: ImmediateExit,
}

/// Why the guest does not run at the moment.
enum Stop {
    Interrupted,
    Reported(Report),
}

impl Body {
    /// The next command: `Some(None)` when there is none and the guest may run, `None` when the owner is gone.
    fn next(&self, running: bool, rest: Duration) -> Option<Option<Command>> {
        if !running {
            return self.commands.recv().ok().map(Some);
        }
        if !rest.is_zero() {
            return match self.commands.recv_timeout(rest) {
                Ok(command) => Some(Some(command)),
                Err(RecvTimeoutError::Timeout) => Some(None),
                Err(RecvTimeoutError::Disconnected) => None,
            };
        }
        match self.commands.try_recv() {
            Ok(command) => Some(Some(command)),
            Err(TryRecvError::Empty) => Some(None),
            Err(TryRecvError::Disconnected) => None,
        }
    }

    /// The thread: obeys commands until it is told to end, or its owner is gone.
    fn obey(&mut self, report: &impl Fn(Report)) {
        let mut running = false;
        // Time for which a running guest rests first.
        let mut rest = Duration::ZERO;
        loop {
            let Some(command) = self.next(running, std::mem::take(&mut rest)) else {
                return;
            };
            match command {
                Some(Command::Run) => running = true,
                Some(Command::Rest(time)) => rest = time,
                Some(Command::Hold(answer)) => {
                    running = false;
                    self.excuse();
                    let _ = answer.send(());
                }
                Some(Command::Save(scope, answer)) => {
                    let _ = answer.send(state::save(&self.fd, &scope));
                }
                Some(Command::Restore(state, tsc, answer)) => {
                    let restored = state::restore(&self.fd, &state, tsc);
                    if tsc != Tsc::Keep {
                        // What was said when it was held is not part of its state.
                        self.excuse();
                    }
                    let _ = answer.send(restored);
                }
                Some(Command::Enter(entry, answer)) => {
                    let _ = answer.send(setup::entry(&self.fd, entry));
                }
                Some(Command::End) => return,
                None => {
                    if let Stop::Reported(text) = self.run_until_interrupted() {
                        running = false;
                        report(text);
                    }
                }
            }
        }
    }

    /// Tells a guest with a paravirtual clock that time it did not see is no lockup; KVM refuses for a guest without one.
    fn excuse(&self) {
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Commands are to be read after this, not before: what interrupted it is forgotten.
    fn run_until_interrupted(&mut self) -> Stop {
        loop {
            if let Some(stop) = self.run_once() {
                self.immediate_exit.set(0);
                return stop;
            }
        }
    }

    /// One entry into the guest and the answer to the exit that ends it.
    fn run_once(&mut self) -> Option<Stop> {
        let count = |counter: &AtomicU64| {
            counter.fetch_add(1, Ordering::Relaxed);
        };
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => {
                count(&self.exits.port);
                self.buses.ports.read(port.into(), data);
            }
            Ok(VcpuExit::IoOut(port, data)) => {
                count(&self.exits.port);
                self.buses.ports.write(port.into(), data);
            }
            Ok(VcpuExit::MmioRead(address, data)) => {
                count(&self.exits.mmio);
                self.buses.memory.read(address, data);
            }
            Ok(VcpuExit::MmioWrite(address, data)) => {
                count(&self.exits.mmio);
                self.buses.memory.write(address, data);
            }
            Ok(VcpuExit::Shutdown) => {
                return Some(Stop::Reported(Report::TripleFault {
                    vcpu: self.id,
                    place: self.place(),
                }));
            }
            Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen | VcpuExit::Hlt) => {
                count(&self.exits.other);
            }
            Ok(exit) => {
                let reason = format!("{exit:?}");
                return Some(Stop::Reported(self.failed(&reason)));
            }
            Err(error) => match error.errno() {
                libc::EINTR => return Some(Stop::Interrupted),
                // A vCPU that waited for its SIPI was woken: enter again.
                libc::EAGAIN => count(&self.exits.other),
                _ => return Some(Stop::Reported(self.failed(&error.to_string()))),
            },
        }
        None
    }

    /// One sentence about an exit that ends the machine: what KVM says and where the guest was.
    fn failed(&self, reason: &str) -> Report {
        Report::Failed {
            vcpu: self.id,
            reason: format!("KVM stopped with {reason} {}", self.place()),
        }
    }

    /// Where the guest was, and the registers that say in which mode.
    fn place(&self) -> String {
        let (Ok(regs), Ok(sregs)) = (self.fd.get_regs(), self.fd.get_sregs()) else {
            return "at an unknown address".to_owned();
        };
        if regs.rip == RESET_RIP && sregs.cs.selector == RESET_CS {
            return "(this host's KVM reset it at once, so where it was is not known)".to_owned();
        }
        format!(
            "at rip {:#x}, cs {:#x}, rsp {:#x}, cr0 {:#x}, cr2 {:#x}, cr3 {:#x}, cr4 {:#x}, efer {:#x}, idt {:#x}+{:#x}",
            regs.rip,
            sregs.cs.selector,
            regs.rsp,
            sregs.cr0,
            sregs.cr2,
            sregs.cr3,
            sregs.cr4,
            sregs.efer,
            sregs.idt.base,
            sregs.idt.limit,
        )
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicPtr;

    use atoll_devices::bus::{BusDevice, BusRange};

    use super::*;
    use crate::vcpu::bare::{CODE, PATIENCE, PORT, bare, in_time};

    /// `jmp $`: the guest never leaves by itself.
    const SPINS: [u8; 2] = [0xeb, 0xfe];
    /// A page that is not RAM, and that real-mode code reaches.
    const BEHIND_RAM: u64 = 0xf_0000;

    /// The calling thread: a signal to it is handled before `kill` returns.
    struct Myself;

    // SAFETY: the thread is there for as long as this is used, by itself.
    unsafe impl Killable for Myself {
        fn pthread_handle(&self) -> libc::pthread_t {
            // SAFETY: it takes nothing, and cannot fail.
            unsafe { libc::pthread_self() }
        }
    }

    /// The vCPU has looked for commands and goes into the guest next when it is kicked: the signal is handled then, with
    /// no `KVM_RUN` to interrupt.
    #[test]
    fn a_kick_on_the_way_into_the_guest_is_not_lost() {
        static BYTE: AtomicPtr<AtomicU8> = AtomicPtr::new(std::ptr::null_mut());
        static SEEN: AtomicU8 = AtomicU8::new(0xff);
        extern "C" fn note(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
            // SAFETY: set before the signal is sent to the only thread that gets it, which has the page mapped.
            let byte = unsafe { &*BYTE.load(Ordering::SeqCst) };
            SEEN.store(byte.load(Ordering::SeqCst), Ordering::SeqCst);
        }
        let Some(mut bare) = bare(&SPINS) else { return };
        let immediate_exit = ImmediateExit::of(&mut bare.fd);
        in_time(move || {
            let (_owner, commands) = channel();
            let mut body = Body {
                id: 0,
                fd: bare.fd,
                buses: no_buses(),
                exits: Arc::default(),
                commands,
                immediate_exit,
            };
            register_signal_handler(kick_signal(), note).unwrap();
            BYTE.store(immediate_exit.0.cast_mut(), Ordering::SeqCst);
            interrupt(immediate_exit, &Myself);
            assert_eq!(SEEN.load(Ordering::SeqCst), 1, "set before the signal");
            assert!(matches!(body.run_until_interrupted(), Stop::Interrupted));
            assert_eq!(body.fd.get_regs().unwrap().rip, CODE);
            assert_eq!(body.fd.get_kvm_run().immediate_exit, 0, "and told once");
        });
    }

    fn no_buses() -> Buses {
        Buses {
            ports: Bus::default(),
            memory: Bus::default(),
        }
    }

    /// A device whose accesses wait, and whose reads have this value.
    struct Gate {
        entered: Sender<()>,
        open: Mutex<Receiver<()>>,
    }

    const READ: u8 = 0x5a;

    impl Gate {
        fn pass(&self) {
            self.entered.send(()).unwrap();
            self.open.lock().unwrap().recv().unwrap();
            // A system call, at whose end at the latest a signal is handled that was sent before the gate was opened.
            std::thread::yield_now();
        }
    }

    impl BusDevice for Gate {
        fn read(&self, _: u64, data: &mut [u8]) {
            self.pass();
            data.fill(READ);
        }

        fn write(&self, _: u64, _: &[u8]) {
            self.pass();
        }
    }

    /// Runs a guest whose `code` ends in one access, and holds it while that is answered. Returns what is saved then;
    /// `None` without KVM.
    fn held_in_an_access(code: &[u8]) -> Option<VcpuState> {
        let bare = bare(&[code, &SPINS].concat())?;
        handle_kicks().unwrap();
        let ((entered, in_it), (opener, open)) = (channel(), channel());
        let open = Mutex::new(open);
        let gate = Arc::new(Gate { entered, open });
        let bus = |base, size| {
            let device = gate.clone();
            let name = "gate";
            Bus::new(vec![BusRange {
                base,
                size,
                name,
                device,
            }])
        };
        let buses = Buses {
            ports: bus(PORT.into(), 1).unwrap(),
            memory: bus(BEHIND_RAM, 0x1000).unwrap(),
        };
        let vcpu = Vcpu::start(0, bare.fd, buses, |report| panic!("{report:?}")).unwrap();
        vcpu.run();
        in_it.recv_timeout(PATIENCE).expect("the guest's access");
        let held = vcpu.hold();
        opener.send(()).unwrap();
        held.recv_timeout(PATIENCE).expect("it is held");
        Some(vcpu.save(&Arc::new(bare.scope)).wait().unwrap())
    }

    /// The access is complete in what is saved, a read with its value: a guest that is put back from there would not do
    /// it again.
    #[test]
    fn a_kick_while_an_exit_is_answered_is_not_lost() {
        // out PORT, al; in al, PORT; mov ax, 0xf000; mov ds, ax; mov al, [0x34]
        let write = &[0xe6, PORT][..];
        let read = &[0xe4, PORT][..];
        let mmio = &[0xb8, 0x00, 0xf0, 0x8e, 0xd8, 0xa0, 0x34, 0x00][..];
        for (code, ax) in [
            (write, 0),
            (read, READ.into()),
            (mmio, 0xf000 | u64::from(READ)),
        ] {
            let Some(state) = held_in_an_access(code) else {
                return;
            };
            let end = CODE + code.len() as u64;
            assert_eq!((state.regs.rip, state.regs.rax & 0xffff), (end, ax));
        }
    }
}
