// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Seconds as dates, in UTC. The C library's way would read the host's time zone from a file, which a sandbox has not.

/// Seconds of each day.
pub(super) const SECONDS_A_DAY: i64 = 86_400;

/// A moment in the proleptic Gregorian calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moment {
    /// Of our era.
    pub year: i64,
    /// From 1.
    pub month: i64,
    /// Of the month, from 1.
    pub day: i64,
    /// Seconds since midnight.
    pub second: i64,
    /// 1 is Sunday.
    pub weekday: i64,
}

impl Moment {
    /// That many seconds after 1970 began.
    #[must_use]
    pub fn at(unix_seconds: i64) -> Self {
        let days = unix_seconds.div_euclid(SECONDS_A_DAY);
        // Years begin in March here, so that the leap day is a year's last.
        let shifted = days + 719_468;
        let era = shifted.div_euclid(146_097);
        let day_of_era = shifted.rem_euclid(146_097);
        let year_of_era =
            (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
        let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
        let march_month = (5 * day_of_year + 2) / 153;
        let month = if march_month < 10 {
            march_month + 3
        } else {
            march_month - 9
        };
        Self {
            year: era * 400 + year_of_era + i64::from(month <= 2),
            month,
            day: day_of_year - (153 * march_month + 2) / 5 + 1,
            second: unix_seconds.rem_euclid(SECONDS_A_DAY),
            weekday: (days + 4).rem_euclid(7) + 1,
        }
    }

    /// The inverse. Values that are none of a calendar's count on into the next unit.
    #[must_use]
    pub fn unix_seconds(self) -> i64 {
        let year = self.year - i64::from(self.month <= 2);
        let era = year.div_euclid(400);
        let year_of_era = year.rem_euclid(400);
        let march_month = (self.month + 9).rem_euclid(12);
        let day_of_year = (153 * march_month + 2) / 5 + self.day - 1;
        let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
        (era * 146_097 + day_of_era - 719_468) * SECONDS_A_DAY + self.second
    }
}
