// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What is said when something fails: runc's log lines for container engines, and the cause that libcontainer
//! drops. Its processes hand only the outermost error to each other ("failed to prepare rootfs"), and report
//! the cause as an event of the `tracing` crate; [`Causes`] keeps the first such event in a file that the
//! forked processes share, and the error line is made of both.

use std::fmt;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::fd::AsFd;
use std::path::Path;
use std::sync::Arc;

use serde_json::json;
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::subscriber::DefaultGuard;
use tracing::{Event, Level, Metadata, Subscriber};

use crate::error::{Context, Result};

/// Where errors go besides standard error.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// `time="…" level=error msg="…"`, as runc's text.
    Text,
    /// One JSON object a line.
    Json,
}

/// Appends an error to an engine's log file.
pub fn append_error(path: &Path, format: Format, message: &str) -> Result<()> {
    let time = crate::state::now();
    let line = match format {
        Format::Json => json!({ "level": "error", "msg": message, "time": time }).to_string(),
        Format::Text => format!("time={time:?} level=error msg={message:?}"),
    };
    let mut file = File::options()
        .append(true)
        .create(true)
        .open(path)
        .at("open", path)?;
    writeln!(file, "{line}").at("write", path)
}

/// Collects the errors that libcontainer reports, in this process and those it forks.
pub struct Causes {
    file: Arc<File>,
    _guard: DefaultGuard,
}

impl Causes {
    /// Starts to collect, until dropped.
    pub fn collect() -> Result<Self> {
        let name = c"atoll-ct-causes";
        let file = nix::sys::memfd::memfd_create(name, nix::sys::memfd::MFdFlags::MFD_CLOEXEC)
            .context(|| "create a memory file".to_owned())?;
        let file = Arc::new(File::from(file));
        let collector = Collector(Arc::clone(&file));
        Ok(Self {
            file,
            _guard: tracing::subscriber::set_default(collector),
        })
    }

    /// The first error reported: nearest to the cause, since each caller of a failed function reports again.
    pub fn first(&self) -> Option<String> {
        let mut file = self
            .file
            .as_fd()
            .try_clone_to_owned()
            .map(File::from)
            .ok()?;
        file.seek(SeekFrom::Start(0)).ok()?;
        let mut text = String::new();
        file.read_to_string(&mut text).ok()?;
        text.lines().next().map(str::to_owned)
    }
}

struct Collector(Arc<File>);

impl Subscriber for Collector {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        *metadata.level() == Level::ERROR && metadata.is_event()
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(tracing::level_filters::LevelFilter::ERROR)
    }

    fn event(&self, event: &Event<'_>) {
        let mut line = Line::default();
        event.record(&mut line);
        // A cause that cannot be kept is a shorter error line, no failure.
        writeln!(&*self.0, "{}", line.text().replace('\n', " ")).ok();
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }
    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}
    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}
    fn enter(&self, _: &span::Id) {}
    fn exit(&self, _: &span::Id) {}
}

/// Message and fields of one event.
#[derive(Default)]
struct Line {
    message: String,
    fields: Vec<String>,
}

impl Line {
    fn text(&self) -> String {
        if self.fields.is_empty() {
            self.message.clone()
        } else {
            format!("{} ({})", self.message, self.fields.join(", "))
        }
    }
}

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        match field.name() {
            "message" => self.message = format!("{value:?}"),
            "err" | "error" | "source" => self.fields.push(format!("{value:?}")),
            name => self.fields.push(format!("{name} {value:?}")),
        }
    }
}
