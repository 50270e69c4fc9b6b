// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The watchdog timer of Intel's 6300ESB, as a PCI function: what PVE calls `i6300esb` (Intel 300641, chapter 16).
//!
//! ```text
//!            enable          stage 1 over          stage 2 over
//!   Stopped ───────► Stage1 ─────────────► Stage2 ─────────────► the host's action
//!                       ▲ ───── feed ────────┘
//! ```
//! The machine's time is real time less pauses: [`Watchdog::pause`] keeps what is left.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::timer::{Timer, TimerThread};
use crate::pci::{Bar, ConfigSpace, Identity, PciDevice};
use crate::state::{DeviceState, Saved, SavedState, StateError};

const IDENTITY: Identity = Identity {
    vendor: 0x8086,
    device: 0x25ab,
    subsystem_vendor: 0x1af4,
    subsystem: 0x1100,
    class: 0x08_80_00,
    revision: 0,
};
const BAR_BYTES: u64 = 16;
/// Registers in the BAR: the two stages' lengths, interrupt status, reload.
const TIMER1: u64 = 0x00;
const TIMER2: u64 = 0x04;
const RELOAD: u64 = 0x0c;
/// Registers in configuration space: configuration (16 bits) and lock (8 bits).
const CONFIG: u16 = 0x60;
const LOCK: u16 = 0x68;
/// Configuration: no reset at the end of stage 2; the clock is 1 MHz, not 1 kHz.
const NO_RESET: u16 = 0x20;
const FAST: u16 = 0x04;
/// Lock: the register cannot be written any more; the timer runs; it starts again at its end.
const LOCKED: u8 = 1;
const ENABLED: u8 = 2;
const FREE_RUN: u8 = 4;
/// Reload: feed; and, written or read, the timer had expired.
const FEED: u16 = 0x100;
const EXPIRED: u16 = 0x200;
/// What opens the other registers for one write.
const KEYS: [u16; 2] = [0x80, 0x86];
/// 20 bits count a clock of 33 MHz divided by 2^15 (or 2^5).
const COUNT_MASK: u32 = 0xf_ffff;
const CLOCK_HZ: u64 = 33_000_000;

/// Registers and the stage; what is saved.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
struct Registers {
    timers: [u32; 2],
    config: u16,
    lock: u8,
    /// Keys that were written in order.
    unlocked: usize,
    expired: bool,
    /// 0 or 1 while it runs.
    stage: usize,
    /// Of the stage, while paused or saved.
    left_ns: Option<u64>,
}

const AT_RESET: Registers = Registers {
    timers: [COUNT_MASK; 2],
    config: 0,
    lock: 0,
    unlocked: 0,
    expired: false,
    stage: 0,
    left_ns: None,
};

struct State {
    registers: Registers,
    /// When the stage is over; `None`: stopped, or paused.
    deadline: Option<Instant>,
}

struct Shared {
    /// Taken by vCPUs and by the timer's thread. Held while the timer is set.
    state: Mutex<State>,
    timer: Arc<Timer>,
    bite: Box<dyn Fn() + Send + Sync>,
}

/// See the module. Dropping it ends its thread.
pub struct Watchdog {
    shared: Arc<Shared>,
    _thread: TimerThread,
}

impl Watchdog {
    /// Calls `bite`, which must not block, when the guest has not fed it in time.
    pub fn new(bite: Box<dyn Fn() + Send + Sync>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                registers: AT_RESET,
                deadline: None,
            }),
            timer: Timer::new()?,
            bite,
        });
        let expiring = shared.clone();
        let thread = TimerThread::spawn("watchdog", &shared.timer, move || expiring.expire())?;
        Ok(Self {
            shared,
            _thread: thread,
        })
    }

    /// Stops the time, with the machine: a guest that cannot run is not late. What is left is kept for [`Watchdog::resume`].
    pub fn pause(&self) {
        let mut state = self.shared.lock();
        if let Some(deadline) = state.deadline.take() {
            let left = deadline.saturating_duration_since(Instant::now());
            state.registers.left_ns = Some(nanos(left));
            self.shared.arm(&state);
        }
    }

    /// Lets the time go on with what was left at the pause.
    pub fn resume(&self) {
        let mut state = self.shared.lock();
        if let Some(left) = state.registers.left_ns.take() {
            state.deadline = Some(Instant::now() + Duration::from_nanos(left));
            self.shared.arm(&state);
        }
    }

    /// As at power-on, but for the memory of having expired, which a guest asks for after the reset.
    pub fn reset(&self) {
        let mut state = self.shared.lock();
        let expired = state.registers.expired;
        state.registers = Registers {
            expired,
            ..AT_RESET
        };
        state.deadline = None;
        self.shared.arm(&state);
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Registers {
    /// Length of the present stage.
    fn stage_time(&self) -> Duration {
        let shift = if self.config & FAST != 0 { 5 } else { 15 };
        let ticks = u64::from(self.timers[self.stage]) << shift;
        Duration::from_nanos(ticks * 1000 / (CLOCK_HZ / 1_000_000))
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the timer to the deadline, or stops it.
    fn arm(&self, state: &State) {
        self.timer.set(state.deadline);
    }

    /// From the beginning of a stage.
    fn start(&self, state: &mut State, stage: usize) {
        state.registers.stage = stage;
        state.deadline = Some(Instant::now() + state.registers.stage_time());
        self.arm(state);
    }

    /// The timer fired.
    fn expire(&self) {
        let mut state = self.lock();
        // Fed or paused at the last moment: the timer was set again, and this was the old one's end.
        let due = state
            .deadline
            .is_some_and(|deadline| deadline <= Instant::now());
        if !due {
            self.arm(&state);
            return;
        }
        if state.registers.stage == 0 {
            self.start(&mut state, 1);
            return;
        }
        state.deadline = None;
        if state.registers.lock & FREE_RUN != 0 {
            self.start(&mut state, 0);
        }
        if state.registers.config & NO_RESET == 0 {
            state.registers.expired = true;
            drop(state);
            (self.bite)();
        }
    }

    /// A write of `size` bytes to the BAR.
    fn write(&self, offset: u64, value: u32) {
        let mut state = self.lock();
        let half = u16::try_from(value & 0xffff).expect("masked");
        let unlocked = state.registers.unlocked;
        if offset == RELOAD && unlocked < KEYS.len() && half == KEYS[unlocked] {
            state.registers.unlocked += 1;
            return;
        }
        state.registers.unlocked = 0;
        if unlocked < KEYS.len() {
            return;
        }
        match offset {
            TIMER1 => state.registers.timers[0] = value & COUNT_MASK,
            TIMER2 => state.registers.timers[1] = value & COUNT_MASK,
            RELOAD => {
                if half & EXPIRED != 0 {
                    state.registers.expired = false;
                }
                if half & FEED != 0 && state.registers.lock & ENABLED != 0 {
                    self.start(&mut state, 0);
                }
            }
            _ => {}
        }
    }

    fn set_lock(&self, value: u8) {
        let mut state = self.lock();
        if state.registers.lock & LOCKED != 0 {
            return;
        }
        let before = state.registers.lock & ENABLED;
        state.registers.lock = value & (LOCKED | ENABLED | FREE_RUN);
        match (before, value & ENABLED) {
            (0, ENABLED) => self.start(&mut state, 0),
            (ENABLED, 0) => {
                state.deadline = None;
                self.arm(&state);
            }
            _ => {}
        }
    }
}

impl PciDevice for Watchdog {
    fn config_space(&self) -> ConfigSpace {
        let mut config = ConfigSpace::new(IDENTITY);
        config.add_bar(Bar {
            index: 0,
            size: BAR_BYTES,
        });
        config.add_register(CONFIG, &[0xff, 0xff]);
        config.add_register(LOCK, &[0xff]);
        config
    }

    fn bar_read(&self, _bar: usize, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if offset == RELOAD && data.len() >= 2 && self.shared.lock().registers.expired {
            // Bit 9, and bit 12: the reset was a system reset.
            data[..2].copy_from_slice(&(EXPIRED | 0x1000).to_le_bytes());
        }
    }

    fn bar_write(&self, _bar: usize, offset: u64, data: &[u8]) {
        let mut word = [0; 4];
        let size = data.len().min(4);
        word[..size].copy_from_slice(&data[..size]);
        if size >= 2 {
            self.shared.write(offset, u32::from_le_bytes(word));
        }
    }

    fn before_config_read(&self, config: &mut ConfigSpace, _offset: u16, _size: usize) {
        let registers = self.shared.lock().registers;
        config.put(CONFIG.into(), &registers.config.to_le_bytes());
        config.put(LOCK.into(), &[registers.lock]);
    }

    fn after_config_write(&self, config: &mut ConfigSpace, offset: u16, size: usize) {
        let written = |register: u16, width: usize| {
            let (start, end) = (usize::from(offset), usize::from(offset) + size);
            start < usize::from(register) + width && end > usize::from(register)
        };
        // A reset of the bus writes everything at once; the machine resets the watchdog itself.
        if size > 8 {
            return;
        }
        if written(CONFIG, 2) {
            let value = u16::from_le_bytes(config.get(CONFIG.into()));
            self.shared.lock().registers.config = value;
        }
        if written(LOCK, 1) {
            let [value] = config.get(LOCK.into());
            self.shared.set_lock(value);
        }
    }
}

impl SavedState for Registers {
    const KIND: &'static str = "i6300esb";
    const VERSION: u32 = 1;
}

impl DeviceState for Watchdog {
    fn save(&self) -> Saved {
        Saved::of(&self.shared.lock().registers)
    }

    /// The time goes on with [`Watchdog::resume`].
    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let mut registers: Registers = saved.open()?;
        registers.stage = registers.stage.min(1);
        let mut state = self.shared.lock();
        state.registers = registers;
        state.deadline = None;
        self.shared.arm(&state);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    fn watchdog() -> (Watchdog, Receiver<()>) {
        let (sender, receiver) = channel();
        let bite = Box::new(move || {
            let _ = sender.send(());
        });
        (Watchdog::new(bite).unwrap(), receiver)
    }

    fn unlocked(watchdog: &Watchdog, offset: u64, data: &[u8]) {
        watchdog.bar_write(0, RELOAD, &KEYS[0].to_le_bytes());
        watchdog.bar_write(0, RELOAD, &KEYS[1].to_le_bytes());
        watchdog.bar_write(0, offset, data);
    }

    fn config_write(watchdog: &Watchdog, offset: u16, data: &[u8]) {
        let mut config = watchdog.config_space();
        config.write(offset, data);
        watchdog.after_config_write(&mut config, offset, data.len());
    }

    /// As Linux does, with stages of `count` milliseconds.
    fn enable(watchdog: &Watchdog, count: u32) {
        unlocked(watchdog, TIMER1, &count.to_le_bytes());
        unlocked(watchdog, TIMER2, &count.to_le_bytes());
        unlocked(watchdog, RELOAD, &FEED.to_le_bytes());
        config_write(watchdog, LOCK, &[ENABLED]);
    }

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn it_bites_when_nobody_feeds_it() {
        let (watchdog, bites) = watchdog();
        let start = Instant::now();
        enable(&watchdog, 20);
        bites.recv_timeout(PATIENCE).unwrap();
        assert!(start.elapsed() >= Duration::from_millis(39));
        let mut word = [0; 2];
        watchdog.bar_read(0, RELOAD, &mut word);
        assert_eq!(u16::from_le_bytes(word), 0x1200);
        watchdog.reset();
        unlocked(&watchdog, RELOAD, &EXPIRED.to_le_bytes());
        watchdog.bar_read(0, RELOAD, &mut word);
        assert_eq!(word, [0, 0]);
    }

    #[test]
    fn it_does_not_bite_while_fed_stopped_paused_or_told_not_to() {
        let (watchdog, bites) = watchdog();
        enable(&watchdog, 400);
        for _ in 0..3 {
            assert!(bites.recv_timeout(Duration::from_millis(200)).is_err());
            unlocked(&watchdog, RELOAD, &FEED.to_le_bytes());
        }
        // Without the keys nothing is fed, and without them nothing is set.
        watchdog.bar_write(0, TIMER1, &1u32.to_le_bytes());
        config_write(&watchdog, LOCK, &[0]);
        enable(&watchdog, 10);
        watchdog.pause();
        let saved = watchdog.save();
        assert!(bites.recv_timeout(Duration::from_millis(60)).is_err());
        config_write(&watchdog, LOCK, &[0]);
        config_write(&watchdog, CONFIG, &NO_RESET.to_le_bytes());
        enable(&watchdog, 10);
        assert!(bites.recv_timeout(Duration::from_millis(60)).is_err());
        // A copy goes on with what was left.
        let (copy, copies_bites) = self::watchdog();
        copy.restore(&saved).unwrap();
        assert!(
            copies_bites
                .recv_timeout(Duration::from_millis(30))
                .is_err()
        );
        copy.resume();
        copies_bites.recv_timeout(PATIENCE).unwrap();
    }

    #[test]
    fn a_locked_timer_stays_on() {
        let (watchdog, bites) = watchdog();
        unlocked(&watchdog, TIMER1, &10u32.to_le_bytes());
        unlocked(&watchdog, TIMER2, &10u32.to_le_bytes());
        config_write(&watchdog, LOCK, &[ENABLED | LOCKED]);
        config_write(&watchdog, LOCK, &[0]);
        bites.recv_timeout(PATIENCE).unwrap();
        let mut config = watchdog.config_space();
        watchdog.before_config_read(&mut config, LOCK, 1);
        assert_eq!(config.get::<1>(LOCK.into()), [ENABLED | LOCKED]);
    }
}
