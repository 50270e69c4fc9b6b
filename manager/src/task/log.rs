// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Log files of tasks: one line an event, the last one says how the task ended.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;

/// A part of a log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LogPage {
    /// Lines with their numbers; the first line of a log is number 1.
    pub lines: Vec<(usize, String)>,
    /// How many lines the whole log has.
    pub total: usize,
}

/// Reads lines `start` to `start + limit` (`limit` 0: to the end) and counts all.
pub(super) fn read_page(path: &Path, start: usize, limit: usize) -> io::Result<LogPage> {
    let mut reader = BufReader::new(File::open(path)?);
    let end = if limit == 0 {
        usize::MAX
    } else {
        start.saturating_add(limit)
    };
    let mut page = LogPage {
        lines: Vec::new(),
        total: 0,
    };
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        if (start..end).contains(&page.total) {
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end_matches(['\n', '\r']).to_owned();
            page.lines.push((page.total + 1, text));
        }
        page.total += 1;
        line.clear();
    }
    Ok(page)
}

/// Ends the log of a task whose daemon died.
pub(super) fn end_interrupted(path: &Path) -> io::Result<()> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    let mut file = File::options().create(true).append(true).open(path)?;
    writeln!(
        file,
        "TASK ERROR: unexpected status: atolld ended while this task was running; what it had done stays"
    )
}
