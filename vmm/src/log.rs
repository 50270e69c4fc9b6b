// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The log of a machine's processes: one line an event, with the time in UTC, the level, what happened, and with which
//! values. Installed by their `main`, once.
//!
//! ```text
//! 2026-11-26T19:21:00.123456Z  INFO waits for a machine at="tcp:127.0.0.1:6000"
//! ```
//! Not a general subscriber: it knows no spans, which nobody makes here, and no filters. What those would cost is
//! memory of every machine (160 KiB of tables).

use std::fmt::{Debug, Write as _};
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use atoll_devices::platform::Moment;
use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};

use crate::terminal::one_line;

/// Events that are told.
const LEVEL_MAX: LevelFilter = LevelFilter::INFO;

/// Sends events to standard error, or to the end of a file, whose descriptor is the answer.
pub fn to(path: Option<&Path>) -> io::Result<Option<RawFd>> {
    let open = |path| OpenOptions::new().append(true).create(true).open(path);
    let file = path.map(open).transpose()?;
    let fd = file.as_ref().map(File::as_raw_fd);
    tracing::subscriber::set_global_default(Lines(file)).map_err(io::Error::other)?;
    Ok(fd)
}

/// Where lines go; to standard error without a file.
struct Lines(Option<File>);

impl Subscriber for Lines {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        LEVEL_MAX >= *metadata.level()
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LEVEL_MAX)
    }

    fn event(&self, event: &Event<'_>) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let mut line = Line::begin(now.unwrap_or_default(), *event.metadata().level());
        event.record(&mut line);
        let bytes = line.end();
        // One write each, so that lines of threads do not mix. Nobody is left to hear that the log is full.
        let _ = match &self.0 {
            Some(file) => (&*file).write_all(&bytes),
            None => io::stderr().lock().write_all(&bytes),
        };
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }

    fn record(&self, _: &Id, _: &Record<'_>) {}

    fn record_follows_from(&self, _: &Id, _: &Id) {}

    fn enter(&self, _: &Id) {}

    fn exit(&self, _: &Id) {}
}

/// A line as it grows: what happened comes before the values, wherever its field is.
struct Line {
    head: String,
    values: String,
}

impl Line {
    fn begin(now: Duration, level: Level) -> Self {
        let seconds = i64::try_from(now.as_secs()).unwrap_or_default();
        let Moment {
            year,
            month,
            day,
            second,
            ..
        } = Moment::at(seconds);
        let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
        let micros = now.subsec_micros();
        let head = format!(
            "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z {level:>5} "
        );
        Self {
            head,
            values: String::new(),
        }
    }

    fn end(mut self) -> Vec<u8> {
        self.head.push_str(&self.values);
        (one_line(&self.head) + "\n").into_bytes()
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let written = match field.name() {
            "message" => write!(self.head, "{value:?}"),
            name => write!(self.values, " {name}={value:?}"),
        };
        written.expect("a string takes everything");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_event_is_one_line() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        let lines = Lines(Some(file.reopen().unwrap()));
        tracing::subscriber::with_default(lines, || {
            tracing::warn!(at = "a\nb", count = 3, error = %io::Error::other("no"), "it {}", "happened");
            tracing::debug!("not told");
            tracing::info!(fast = true);
        });
        let mut text = String::new();
        io::Read::read_to_string(file.as_file_mut(), &mut text).unwrap();
        let said: Vec<_> = text.lines().map(|line| line.split_at(27)).collect();
        let [(first, rest), (_, second)] = said[..] else {
            panic!("{text}");
        };
        assert!(first.starts_with("20") && first.ends_with('Z'), "{first}");
        assert_eq!(rest, r#"  WARN it happened at="a\nb" count=3 error=no"#);
        assert_eq!(second, "  INFO  fast=true");
    }

    #[test]
    fn the_time_is_that_of_a_calendar() {
        let line = Line::begin(Duration::from_micros(951_827_696_000_007), Level::ERROR);
        assert_eq!(line.head, "2000-02-29T12:34:56.000007Z ERROR ");
    }
}
