// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The PC's clock and CMOS memory (MC146818), ports 0x70 and 0x71. UTC, BCD, 24 hours; read by guests at boot.
//!
//! It always shows the host's time: what a guest writes to the time registers is not kept. No alarm, no periodic
//! interrupt.

use std::sync::{Mutex, PoisonError};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::bus::BusDevice;

/// Register A: 32.768 kHz divider, no update in progress.
const STATUS_A: u8 = 0x26;
/// Register B: 24-hour mode, BCD.
const STATUS_B: u8 = 0x02;
/// Register D: the battery is good.
const STATUS_D: u8 = 0x80;

struct State {
    index: u8,
    memory: [u8; 128],
}

/// Index and data port.
pub struct Rtc {
    /// Leaf lock.
    state: Mutex<State>,
    now: fn() -> u64,
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

impl Rtc {
    /// First port.
    pub const BASE: u64 = 0x70;
    /// Ports.
    pub const SIZE: u64 = 2;

    /// Shows the host's clock.
    pub fn new() -> Self {
        Self::with_clock(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            now.map_or(0, |now| now.as_secs())
        })
    }

    fn with_clock(now: fn() -> u64) -> Self {
        let memory = [0; 128];
        Self {
            state: Mutex::new(State { index: 0, memory }),
            now,
        }
    }

    fn register(&self, state: &State) -> u8 {
        let date = Date::from_unix((self.now)());
        match state.index {
            0x00 => bcd(date.second),
            0x02 => bcd(date.minute),
            0x04 => bcd(date.hour),
            0x06 => bcd(date.weekday),
            0x07 => bcd(date.day),
            0x08 => bcd(date.month),
            0x09 => bcd(date.year % 100),
            0x32 => bcd(date.year / 100),
            0x0a => STATUS_A,
            0x0b => STATUS_B,
            0x0c => 0,
            0x0d => STATUS_D,
            other => state.memory[usize::from(other)],
        }
    }
}

impl BusDevice for Rtc {
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if let (1, [value]) = (offset, data) {
            *value = self.register(&state);
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match (offset, data) {
            // Bit 7 masks NMIs, which we do not have.
            (0, &[index]) => state.index = index & 0x7f,
            (1, &[value]) => {
                let index = usize::from(state.index);
                state.memory[index] = value;
            }
            _ => {}
        }
    }
}

fn bcd(value: u64) -> u8 {
    u8::try_from(value / 10 * 16 + value % 10).unwrap_or(0)
}

#[derive(Debug, PartialEq, Eq)]
struct Date {
    year: u64,
    month: u64,
    day: u64,
    /// 1 is Sunday.
    weekday: u64,
    hour: u64,
    minute: u64,
    second: u64,
}

impl Date {
    /// Gregorian calendar, by years and months: at most some hundred steps, and no table to get wrong.
    fn from_unix(seconds: u64) -> Self {
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        let leap = |year: u64| {
            year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400))
        };
        let (mut year, mut left) = (1970, days);
        while left >= 365 + u64::from(leap(year)) {
            left -= 365 + u64::from(leap(year));
            year += 1;
        }
        let length = |month: u64| match month {
            2 => 28 + u64::from(leap(year)),
            4 | 6 | 9 | 11 => 30,
            _ => 31,
        };
        let mut month = 1;
        while left >= length(month) {
            left -= length(month);
            month += 1;
        }
        Self {
            year,
            month,
            day: left + 1,
            weekday: (days + 4) % 7 + 1, // 1970-01-01 was a Thursday.
            hour: rest / 3600,
            minute: rest / 60 % 60,
            second: rest % 60,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        let date = |seconds| {
            let d = Date::from_unix(seconds);
            (
                d.year, d.month, d.day, d.weekday, d.hour, d.minute, d.second,
            )
        };
        assert_eq!(date(0), (1970, 1, 1, 5, 0, 0, 0));
        assert_eq!(date(951_782_399), (2000, 2, 28, 2, 23, 59, 59));
        assert_eq!(date(951_868_799), (2000, 2, 29, 3, 23, 59, 59));
        assert_eq!(date(1_795_323_600), (2026, 11, 22, 1, 5, 0, 0));
        assert_eq!(date(4_107_542_399), (2100, 2, 28, 1, 23, 59, 59));
        assert_eq!(date(4_107_542_400), (2100, 3, 1, 2, 0, 0, 0));
    }

    #[test]
    fn registers_in_bcd() {
        let rtc = Rtc::with_clock(|| 1_795_323_659);
        let read = |index: u8| {
            rtc.write(0, &[index]);
            let mut data = [0];
            rtc.read(1, &mut data);
            data[0]
        };
        let shown = [0x32, 0x09, 0x08, 0x07, 0x04, 0x02, 0x00].map(read);
        assert_eq!(shown, [0x20, 0x26, 0x11, 0x22, 0x05, 0x00, 0x59]);
        assert_eq!([0x0a, 0x0b, 0x0d].map(read), [0x26, 0x02, 0x80]);
        rtc.write(0, &[0x7f]);
        rtc.write(1, &[0x55]);
        assert_eq!(read(0xff), 0x55);
    }
}
