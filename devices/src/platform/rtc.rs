// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The battery-backed clock and memory of a PC (Motorola MC146818A) at ports 0x70 and 0x71.
//!
//! The time is the host's, in UTC, plus what the guest changed. 24-hour mode; BCD or binary as the guest asks.
//! Interrupts come at each second, at the alarm's time and periodically, as the guest enables them; while it enables
//! none, the thread sleeps. The memory beside the clock tells firmware how much RAM there is, where it does not learn
//! that from fw_cfg.
//!
//! ```text
//!   second, alarm, period ──► flags (C) ──► enabled (B)? ──► line, once until the guest has read C
//! ```

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use super::moment::{Moment, SECONDS_A_DAY};
use super::timer::{Timer, TimerThread};
use crate::bus::BusDevice;
use crate::interrupt::IrqLine;
use crate::state::{DeviceState, Saved, SavedState, StateError};

/// Bytes of clock and memory.
const SIZE: usize = 128;
/// Registers of the clock.
const SECONDS: usize = 0x00;
const MINUTES: usize = 0x02;
const HOURS: usize = 0x04;
const WEEKDAY: usize = 0x06;
const DAY: usize = 0x07;
const MONTH: usize = 0x08;
const YEAR: usize = 0x09;
/// When the alarm is; a value from 0xc0 on is any.
const ALARM: [(usize, i64); 3] = [(0x01, 1), (0x03, 60), (0x05, 3600)];
const ALARM_ANY: u8 = 0xc0;
/// Century, as the FADT says.
const CENTURY: usize = 0x32;
/// Registers A to D. A: divider on, no periodic rate. B: mode. D: the battery is good.
const REGISTER_A: usize = 0x0a;
const REGISTER_B: usize = 0x0b;
const REGISTER_C: usize = 0x0c;
const REGISTER_D: usize = 0x0d;
const A_DIVIDER_ON: u8 = 0x20;
const A_WRITABLE: u8 = 0x7f;
const A_RATE: u8 = 0x0f;
/// The clock stands still while the guest sets it.
const B_SET: u8 = 1 << 7;
const B_BINARY: u8 = 1 << 2;
const B_24_HOURS: u8 = 1 << 1;
/// Enabled in B, and told in C: periodic, alarm, update ended. In C, bit 7: one of them was both.
const PERIODIC: u8 = 1 << 6;
const ALARMED: u8 = 1 << 5;
const UPDATED: u8 = 1 << 4;
const CAUSES: u8 = PERIODIC | ALARMED | UPDATED;
const C_INTERRUPT: u8 = 1 << 7;
const D_VALID: u8 = 1 << 7;
/// Memory size from 16 MiB on in units of 64 KiB (two bytes), and from 4 GiB on (three bytes), as OVMF and SeaBIOS
/// read them.
const MEMORY_ABOVE_16_MIB: usize = 0x34;
const MEMORY_ABOVE_4_GIB: usize = 0x5b;

/// The CMOS clock, which shows the host's time in UTC, and its 128 bytes of memory (MC146818). It waits until
/// [`Rtc::resume`]. Dropping it ends its thread.
pub struct Rtc {
    shared: Arc<Shared>,
    _thread: TimerThread,
}

struct Shared {
    /// Taken by vCPUs and by the clock's thread. Held while the timer is set and the line pulsed.
    state: Mutex<State>,
    timer: Arc<Timer>,
    line: Arc<dyn IrqLine>,
}

struct State {
    index: usize,
    memory: [u8; SIZE],
    /// What the guest's clock is ahead of the host's, in seconds.
    ahead: i64,
    /// The guest's second up to which C has its flags.
    seen: i64,
    /// When the next period ends, while those are enabled.
    period_end: Option<Instant>,
    held: bool,
}

impl Rtc {
    /// First port: the index register; the data register is the port after it.
    pub const PORT: u16 = 0x70;
    /// Ports: index and data.
    pub const SIZE: u16 = 2;

    /// A clock of a machine with that much RAM below and above 4 GiB; `line` is edge-triggered.
    pub fn new(low_bytes: u64, high_bytes: u64, line: Arc<dyn IrqLine>) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            state: Mutex::new(State::new(low_bytes, high_bytes)),
            timer: Timer::new()?,
            line,
        });
        let ticking = shared.clone();
        let thread = TimerThread::spawn("rtc", &shared.timer, move || ticking.expire())?;
        Ok(Self {
            shared,
            _thread: thread,
        })
    }

    /// No interrupt comes any more: the machine is held. The time goes on.
    pub fn pause(&self) {
        let mut state = self.shared.lock();
        state.held = true;
        self.shared.arm(&mut state);
    }

    /// The machine goes on. What it had not yet seen is told again: the controller may have been saved before.
    pub fn resume(&self) {
        let mut state = self.shared.lock();
        if !state.held {
            return;
        }
        state.held = false;
        if state.memory[REGISTER_C] & C_INTERRUPT != 0 {
            self.shared.line.pulse();
        }
        self.shared.arm(&mut state);
    }

    /// No interrupt is enabled or told, as at power-on. The time stays.
    pub fn reset(&self) {
        let mut state = self.shared.lock();
        state.memory[REGISTER_B] &= !CAUSES;
        state.memory[REGISTER_C] = 0;
        self.shared.arm(&mut state);
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the timer to what comes next, or stops it.
    fn arm(&self, state: &mut State) {
        self.timer.set(state.next(Instant::now()));
    }

    /// The timer fired.
    fn expire(&self) {
        let mut state = self.lock();
        if !state.held {
            state.pass_period(Instant::now());
            state.pass(host_seconds());
            if state.interrupts() {
                self.line.pulse();
            }
        }
        self.arm(&mut state);
    }
}

/// Seconds since 1970 by the host's clock.
fn host_seconds() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        i64::try_from(since.as_secs()).unwrap_or(i64::MAX / 2)
    })
}

/// From now to the host's next whole second, and a little more, so that it has begun.
fn to_next_second() -> Duration {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    let passed = since.map_or(0, |since| since.subsec_nanos());
    Duration::from_nanos(1_000_000_000 - u64::from(passed)) + Duration::from_micros(50)
}

impl State {
    fn new(low_bytes: u64, high_bytes: u64) -> Self {
        let mut memory = [0; SIZE];
        memory[REGISTER_A] = A_DIVIDER_ON | 6;
        memory[REGISTER_B] = B_24_HOURS;
        memory[REGISTER_D] = D_VALID;
        let blocks = |bytes: u64| (bytes >> 16).to_le_bytes();
        let low = blocks(low_bytes.saturating_sub(16 << 20));
        memory[MEMORY_ABOVE_16_MIB..][..2].copy_from_slice(&low[..2]);
        memory[MEMORY_ABOVE_4_GIB..][..3].copy_from_slice(&blocks(high_bytes)[..3]);
        Self {
            index: 0,
            memory,
            ahead: 0,
            seen: host_seconds(),
            period_end: None,
            held: true,
        }
    }

    /// How long a period is; `None` when the rate is 0.
    fn period(&self) -> Option<Duration> {
        let rate = match self.memory[REGISTER_A] & A_RATE {
            0 => return None,
            rate @ 1..=2 => rate + 7,
            rate => rate,
        };
        Some(Duration::from_nanos((1_000_000_000 << (rate - 1)) / 32_768))
    }

    /// When there is something to do; begins or ends the periods.
    fn next(&mut self, now: Instant) -> Option<Instant> {
        let enabled = match self.held {
            true => 0,
            false => self.memory[REGISTER_B] & CAUSES,
        };
        let period = self.period().filter(|_| enabled & PERIODIC != 0);
        self.period_end = period.map(|period| self.period_end.unwrap_or(now + period));
        let second = (enabled & (ALARMED | UPDATED) != 0).then(|| now + to_next_second());
        [self.period_end, second].into_iter().flatten().min()
    }

    /// Notes that a period has ended. Those that were missed are one.
    fn pass_period(&mut self, now: Instant) {
        if self.period_end.is_some_and(|end| end <= now) {
            self.memory[REGISTER_C] |= PERIODIC;
            self.period_end = None;
        }
    }

    /// Notes the seconds that have passed, and whether the alarm's time was among them.
    fn pass(&mut self, now: i64) {
        let now = now.saturating_add(self.ahead);
        let first = self.seen.saturating_add(1);
        if self.memory[REGISTER_B] & B_SET != 0 || now < first {
            // It stands still, or was put back.
            self.seen = self.seen.min(now);
            return;
        }
        self.memory[REGISTER_C] |= UPDATED;
        // An alarm is at the latest after a day.
        let first = first.max(now.saturating_sub(SECONDS_A_DAY - 1));
        if (first..=now).any(|second| self.is_alarm(second)) {
            self.memory[REGISTER_C] |= ALARMED;
        }
        self.seen = now;
    }

    fn is_alarm(&self, unix_seconds: i64) -> bool {
        let second = unix_seconds.rem_euclid(SECONDS_A_DAY);
        ALARM.iter().all(|&(register, unit)| {
            let field = if unit == 3600 {
                second / unit
            } else {
                second / unit % 60
            };
            self.memory[register] >= ALARM_ANY || self.decoded(register) == field
        })
    }

    /// Whether the line is to be raised: something enabled is told that was not before.
    fn interrupts(&mut self) -> bool {
        let told = self.memory[REGISTER_C];
        let new = told & self.memory[REGISTER_B] & CAUSES != 0 && told & C_INTERRUPT == 0;
        if new {
            self.memory[REGISTER_C] |= C_INTERRUPT;
        }
        new
    }

    fn read(&mut self, now: i64) -> u8 {
        match self.index {
            // Flags, cleared by reading.
            REGISTER_C => {
                self.pass(now);
                let told = self.memory[REGISTER_C];
                self.memory[REGISTER_C] = 0;
                told
            }
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY
                if self.memory[REGISTER_B] & B_SET == 0 =>
            {
                self.field(Moment::at(now.saturating_add(self.ahead)))
            }
            index => self.memory[index],
        }
    }

    fn field(&self, moment: Moment) -> u8 {
        let value = match self.index {
            SECONDS => moment.second % 60,
            MINUTES => moment.second / 60 % 60,
            HOURS => moment.second / 3600,
            WEEKDAY => moment.weekday,
            DAY => moment.day,
            MONTH => moment.month,
            YEAR => moment.year.rem_euclid(100),
            _ => moment.year.div_euclid(100).rem_euclid(100),
        };
        self.encoded(u8::try_from(value).expect("two digits"))
    }

    fn encoded(&self, value: u8) -> u8 {
        if self.memory[REGISTER_B] & B_BINARY != 0 {
            value
        } else {
            (value / 10) << 4 | (value % 10)
        }
    }

    fn decoded(&self, index: usize) -> i64 {
        let value = self.memory[index];
        i64::from(if self.memory[REGISTER_B] & B_BINARY != 0 {
            value
        } else {
            (value >> 4) * 10 + (value & 15)
        })
    }

    fn write(&mut self, value: u8, now: i64) {
        match self.index {
            REGISTER_A => self.memory[REGISTER_A] = value & A_WRITABLE,
            REGISTER_B => {
                let (was, is) = (self.memory[REGISTER_B] & B_SET, value & B_SET);
                if was == 0 && is != 0 {
                    self.freeze(now);
                }
                // 12-hour mode is not offered. Who sets the clock hears of no update.
                let stopped = if is != 0 { UPDATED } else { 0 };
                self.memory[REGISTER_B] = (value | B_24_HOURS) & !stopped;
                if was != 0 && is == 0 {
                    self.set_to(now);
                }
            }
            REGISTER_C | REGISTER_D => {}
            SECONDS | MINUTES | HOURS | WEEKDAY | DAY | MONTH | YEAR | CENTURY
                if self.memory[REGISTER_B] & B_SET == 0 =>
            {
                // One register while the clock runs: the others go on as they are.
                self.freeze(now);
                self.memory[self.index] = value;
                self.set_to(now);
            }
            index => self.memory[index] = value,
        }
    }

    /// The registers' time is the guest's from now on.
    fn set_to(&mut self, now: i64) {
        self.seen = self.frozen().unix_seconds();
        self.ahead = self.seen - now;
    }

    /// Puts the time into the registers, where it stays while the guest sets it.
    fn freeze(&mut self, now: i64) {
        let moment = Moment::at(now.saturating_add(self.ahead));
        let index = self.index;
        for register in [SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CENTURY] {
            self.index = register;
            self.memory[register] = self.field(moment);
        }
        self.index = index;
    }

    /// The time in the registers. Values that are none of a calendar's count on into the next unit.
    fn frozen(&self) -> Moment {
        Moment {
            year: self.decoded(CENTURY) * 100 + self.decoded(YEAR),
            month: self.decoded(MONTH),
            day: self.decoded(DAY),
            second: self.decoded(HOURS) * 3600 + self.decoded(MINUTES) * 60 + self.decoded(SECONDS),
            weekday: 0,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct RtcState {
    index: u8,
    memory: Vec<u8>,
    ahead_seconds: i64,
    /// The guest's second up to which C has its flags; absent in states of programs that did not save it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    seen_seconds: Option<i64>,
}

impl SavedState for RtcState {
    const KIND: &'static str = "rtc";
    const VERSION: u32 = 1;
}

impl DeviceState for Rtc {
    fn save(&self) -> Saved {
        let state = self.shared.lock();
        Saved::of(&RtcState {
            index: u8::try_from(state.index).expect("masked to seven bits"),
            memory: state.memory.to_vec(),
            ahead_seconds: state.ahead,
            seen_seconds: Some(state.seen),
        })
    }

    /// The clock shows the new host's time, as far ahead as it was. An alarm of the time between is told late, as after
    /// a pause.
    fn restore(&self, saved: &Saved) -> Result<(), StateError> {
        let saved: RtcState = saved.open()?;
        let memory = <[u8; SIZE]>::try_from(saved.memory);
        let memory = memory.map_err(|bytes| StateError::Differs {
            kind: RtcState::KIND,
            what: format!("{} bytes of memory, expected {SIZE}", bytes.len()),
        })?;
        let mut state = self.shared.lock();
        state.index = usize::from(saved.index & 0x7f);
        state.memory = memory;
        state.ahead = saved.ahead_seconds;
        let now = host_seconds().saturating_add(state.ahead);
        state.seen = saved.seen_seconds.unwrap_or(now);
        self.shared.arm(&mut state);
        Ok(())
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let (1, [value]) = (offset, data) {
            *value = self.shared.lock().read(host_seconds());
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            // Bit 7 masks NMIs, of which there are none.
            (0, [index, ..]) => {
                self.shared.lock().index = usize::from(index & 0x7f);
            }
            (1, [value]) => {
                let mut state = self.shared.lock();
                state.write(*value, host_seconds());
                if matches!(state.index, REGISTER_A | REGISTER_B) {
                    if !state.held && state.interrupts() {
                        self.shared.line.pulse();
                    }
                    self.shared.arm(&mut state);
                }
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::testing::Line;

    fn clock(low_bytes: u64, high_bytes: u64) -> Rtc {
        Rtc::new(low_bytes, high_bytes, Arc::new(Line::default())).unwrap()
    }

    fn get(rtc: &Rtc, index: usize, now: i64) -> u8 {
        let mut state = rtc.shared.lock();
        state.index = index;
        state.read(now)
    }

    fn set(rtc: &Rtc, index: usize, value: u8, now: i64) {
        let mut state = rtc.shared.lock();
        state.index = index;
        state.write(value, now);
    }

    #[test]
    fn the_calendar_goes_both_ways() {
        for (seconds, year, month, day, weekday) in [
            (0, 1970, 1, 1, 5),
            (951_782_400, 2000, 2, 29, 3),
            (1_709_164_800, 2024, 2, 29, 5),
            (1_795_305_600, 2026, 11, 22, 1),
            (4_107_542_400, 2100, 3, 1, 2),
        ] {
            let moment = Moment::at(seconds + 3661);
            assert_eq!(
                (moment.year, moment.month, moment.day, moment.weekday),
                (year, month, day, weekday)
            );
            assert_eq!(
                (moment.second, moment.unix_seconds()),
                (3661, seconds + 3661)
            );
        }
    }

    #[test]
    fn time_is_read_in_bcd_or_binary() {
        let rtc = clock(1 << 30, 0);
        // 2026-11-22 23:59:58 UTC.
        let now = 1_795_305_600 + SECONDS_A_DAY - 2;
        let all = [CENTURY, YEAR, MONTH, DAY, HOURS, MINUTES, SECONDS];
        let bcd = all.map(|index| get(&rtc, index, now));
        assert_eq!(bcd, [0x20, 0x26, 0x11, 0x22, 0x23, 0x59, 0x58]);
        set(&rtc, REGISTER_B, B_24_HOURS | B_BINARY, now);
        let binary = all.map(|index| get(&rtc, index, now));
        assert_eq!(binary, [20, 26, 11, 22, 23, 59, 58]);
        assert_eq!(
            (get(&rtc, REGISTER_D, now), get(&rtc, REGISTER_A, now) >> 7),
            (0x80, 0)
        );
    }

    #[test]
    fn a_guest_sets_the_clock_and_it_goes_on() {
        let rtc = clock(1 << 30, 0);
        set(&rtc, REGISTER_B, B_SET, 0);
        for (index, value) in [(YEAR, 0x30), (CENTURY, 0x20), (MONTH, 0x12), (DAY, 0x31)] {
            set(&rtc, index, value, 100);
        }
        set(&rtc, HOURS, 0x23, 200);
        set(&rtc, MINUTES, 0x59, 200);
        set(&rtc, SECONDS, 0x59, 200);
        assert_eq!(get(&rtc, SECONDS, 250), 0x59, "it stands still");
        set(&rtc, REGISTER_B, 0, 300);
        assert_eq!(get(&rtc, YEAR, 300), 0x30);
        assert_eq!((get(&rtc, YEAR, 301), get(&rtc, SECONDS, 301)), (0x31, 0));
    }

    #[test]
    fn memory_sizes_and_any_bytes() {
        let rtc = clock(2 << 30, 3 << 30);
        let at = |index| get(&rtc, index, 0);
        assert_eq!((at(0x34), at(0x35)), (0x00, 0x7f));
        assert_eq!((at(0x5b), at(0x5c), at(0x5d)), (0x00, 0xc0, 0));
        for index in 0..SIZE {
            for value in [0, 0x7f, 0xff] {
                set(&rtc, index, value, i64::MAX / 2);
                get(&rtc, index, i64::MAX / 2);
            }
        }
        let mut data = [0; 4];
        rtc.read(0, &mut data);
        rtc.read(1, &mut data);
        assert_eq!(data, [0xff; 4]);
    }

    #[test]
    fn seconds_and_the_alarm_are_told_once() {
        let rtc = clock(1 << 30, 0);
        let start = 1_795_305_600;
        let causes = |now: i64| get(&rtc, REGISTER_C, now) & CAUSES;
        rtc.shared.lock().seen = start;
        assert_eq!(causes(start), 0);
        // At 00:01:05 of any hour.
        for (register, value) in [(0x01, 0x05), (0x03, 0x01), (0x05, 0xff)] {
            set(&rtc, register, value, start);
        }
        assert_eq!((causes(start + 64), causes(start + 64)), (UPDATED, 0));
        assert_eq!(causes(start + 65), UPDATED | ALARMED);
        assert_eq!(causes(start + 3600), UPDATED);
        assert_eq!(causes(start + 3600 + 70), UPDATED | ALARMED, "seen late");
        // While the clock is set nothing passes, and what is jumped over is no alarm.
        set(&rtc, REGISTER_B, B_SET | UPDATED, start + 3700);
        assert_eq!(get(&rtc, REGISTER_B, start) & UPDATED, 0);
        assert_eq!(causes(start + 7200 + 65), 0);
        set(&rtc, REGISTER_B, 0, start + 7300);
        assert_eq!(causes(start + 7300), 0);
    }

    /// Waits until a line has been raised that often.
    fn until(line: &Line, edges: u32) {
        let deadline = Instant::now() + Duration::from_secs(30);
        while line.edges() < edges {
            assert!(Instant::now() < deadline, "{} of {edges}", line.edges());
            std::thread::yield_now();
        }
    }

    #[test]
    fn an_alarm_goes_on_in_a_copy() {
        let rtc = clock(1 << 30, 0);
        // Every second.
        for (register, _) in ALARM {
            set(&rtc, register, ALARM_ANY, host_seconds());
        }
        set(&rtc, REGISTER_B, ALARMED, host_seconds());
        let line = Arc::new(Line::default());
        let copy = Rtc::new(1 << 30, 0, line.clone()).unwrap();
        copy.restore(&rtc.save()).unwrap();
        assert_eq!(line.edges(), 0, "not before it runs");
        copy.resume();
        until(&line, 1);
        let told = get(&copy, REGISTER_C, host_seconds());
        assert_eq!(told & (C_INTERRUPT | ALARMED), C_INTERRUPT | ALARMED);
    }

    #[test]
    fn an_alarm_that_falls_into_an_absence_is_told_late() {
        for (minutes, told) in [(-30, ALARMED), (30, 0)] {
            let rtc = clock(1 << 30, 0);
            let now = host_seconds();
            rtc.shared.lock().seen = now - 3600;
            set(&rtc, REGISTER_B, B_BINARY, now);
            let alarm = Moment::at(now + minutes * 60).second;
            for (register, unit) in ALARM {
                let field = u8::try_from(alarm / unit % if unit == 3600 { 24 } else { 60 });
                set(&rtc, register, field.unwrap(), now);
            }
            let copy = clock(1 << 30, 0);
            copy.restore(&rtc.save()).unwrap();
            assert_eq!(get(&copy, REGISTER_C, now) & ALARMED, told, "{minutes}");
        }
        // What did not save how far it was has missed nothing.
        let rtc = clock(1 << 30, 0);
        let mut old = rtc.save();
        old.state.as_object_mut().unwrap().remove("seen_seconds");
        rtc.shared.lock().seen = 0;
        rtc.restore(&old).unwrap();
        assert!(rtc.shared.lock().seen > 0);
    }

    #[test]
    fn the_line_is_raised_once_until_the_guest_has_read_why() {
        let line = Arc::new(Line::default());
        let rtc = Rtc::new(1 << 30, 0, line.clone()).unwrap();
        let access = |index: usize, value: Option<u8>| {
            rtc.write(0, &[u8::try_from(index).unwrap()]);
            let mut data = [0];
            match value {
                Some(value) => rtc.write(1, &[value]),
                None => rtc.read(1, &mut data),
            }
            data[0]
        };
        // 1024 a second, but not before the machine runs.
        access(REGISTER_B, Some(PERIODIC));
        assert_eq!(line.edges(), 0);
        rtc.resume();
        until(&line, 1);
        assert_eq!(access(REGISTER_C, None) & !UPDATED, C_INTERRUPT | PERIODIC);
        until(&line, 2);
        rtc.pause();
        let told = rtc.save();
        // Saved with one that the guest has not read: another machine tells it again.
        let other_line = Arc::new(Line::default());
        let other = Rtc::new(1 << 30, 0, other_line.clone()).unwrap();
        other.restore(&told).unwrap();
        assert_eq!(other_line.edges(), 0);
        other.resume();
        assert_eq!(other_line.edges(), 1);
        rtc.resume();
        rtc.reset();
        let before = line.edges();
        access(REGISTER_B, Some(UPDATED));
        access(REGISTER_C, None);
        until(&line, before + 1);
        assert_eq!(access(REGISTER_C, None) & C_INTERRUPT, C_INTERRUPT);
    }
}
