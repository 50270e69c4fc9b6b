// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The record of tasks: one journal file `tasks/index`, and the same in memory.
//!
//! A line `UPID` says that the task began, a line `UPID ENDTIME STATUS` (time in hexadecimal) that it ended. At
//! most [`FINISHED_MAX`] ended tasks are kept; when half of the journal's lines no longer matter, it is written anew.

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{self, BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use super::{OK, Upid};

/// How many ended tasks a node keeps. Our choice: a month of 300 a day, some 3 MB of index.
pub(super) const FINISHED_MAX: usize = 10_000;

/// One task as listings show it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskRecord {
    /// Its name.
    pub upid: Upid,
    /// How it ended; `None` while it runs.
    pub end: Option<TaskEnd>,
}

/// How a task ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskEnd {
    /// When, seconds since 1970.
    pub time: u32,
    /// `OK`, `WARNINGS: n`, or the error.
    pub status: String,
}

/// Which tasks to list.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TaskSource {
    /// Ended ones.
    #[default]
    Archive,
    /// Running ones.
    Active,
    /// Both, running ones first.
    All,
}

/// Classes of exit statuses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StatusClass {
    /// Succeeded.
    Ok,
    /// Succeeded with warnings.
    Warning,
    /// Failed.
    Error,
    /// Nobody knows: the daemon died.
    Unknown,
}

impl StatusClass {
    /// The class of an exit status.
    pub fn of(status: &str) -> Self {
        match status {
            OK => Self::Ok,
            super::UNEXPECTED => Self::Unknown,
            _ if status.starts_with("WARNINGS: ") => Self::Warning,
            _ => Self::Error,
        }
    }
}

/// What to list. The default is all ended tasks.
#[derive(Debug, Clone, Default)]
pub struct TaskFilter {
    /// Running, ended, or both.
    pub source: TaskSource,
    /// Only tasks on this guest (or other id).
    pub id: Option<String>,
    /// Only tasks of this type.
    pub kind: Option<String>,
    /// Only tasks whose user contains this text.
    pub user: Option<String>,
    /// Only tasks of exactly this user, the tokens included: for callers who may see only their own.
    pub owner: Option<String>,
    /// Only tasks that started at this time or later.
    pub since: Option<u32>,
    /// Only tasks that started at this time or earlier.
    pub until: Option<u32>,
    /// Only tasks that ended in one of these classes; empty is any.
    pub classes: Vec<StatusClass>,
    /// How many to leave out at the beginning.
    pub start: usize,
    /// How many to return; 0 is all.
    pub limit: usize,
}

impl TaskRecord {
    pub(super) fn running(upid: Upid) -> Self {
        Self { upid, end: None }
    }

    /// `RUNNING`, or the exit status: the `status` member of listings.
    pub fn status(&self) -> &str {
        self.end.as_ref().map_or("RUNNING", |end| &end.status)
    }
}

impl TaskFilter {
    pub(super) fn apply(&self, active: Vec<TaskRecord>, index: &Index) -> (Vec<TaskRecord>, usize) {
        let active = active.iter().filter(|_| self.source != TaskSource::Archive);
        let archive = index
            .finished
            .iter()
            .rev()
            .filter(|_| self.source != TaskSource::Active);
        let limit = if self.limit == 0 {
            usize::MAX
        } else {
            self.limit
        };
        let mut total = 0;
        let mut page = Vec::new();
        for record in active.chain(archive).filter(|record| self.fits(record)) {
            if total >= self.start && page.len() < limit {
                page.push(record.clone());
            }
            total += 1;
        }
        (page, total)
    }

    fn fits(&self, record: &TaskRecord) -> bool {
        let upid = &record.upid;
        let class_fits = match &record.end {
            _ if self.classes.is_empty() => true,
            Some(end) => self.classes.contains(&StatusClass::of(&end.status)),
            None => false,
        };
        class_fits
            && self.id.as_ref().is_none_or(|id| upid.id == *id)
            && self.kind.as_ref().is_none_or(|kind| upid.kind == *kind)
            && self
                .user
                .as_ref()
                .is_none_or(|u| upid.user.contains(u.as_str()))
            && self.owner.as_ref().is_none_or(|o| owns(o, &upid.user))
            && self.since.is_none_or(|since| upid.starttime >= since)
            && self.until.is_none_or(|until| upid.starttime <= until)
    }
}

/// A user owns his own tasks and those of his tokens.
fn owns(owner: &str, user: &str) -> bool {
    user.strip_prefix(owner)
        .is_some_and(|rest| rest.is_empty() || rest.starts_with('!'))
}

/// The journal and what it says.
#[derive(Debug)]
pub(super) struct Index {
    path: PathBuf,
    file: File,
    lines: usize,
    /// Begun and not ended, for a restart.
    begun: Vec<Upid>,
    /// Ended, oldest first.
    finished: VecDeque<TaskRecord>,
}

impl Index {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .read(true)
            .open(path)?;
        let (begun, finished, lines) = read(&file)?;
        let mut index = Self {
            path: path.to_owned(),
            file,
            lines,
            begun,
            finished,
        };
        index.compact()?;
        Ok(index)
    }

    /// Tasks that began under a former daemon and have no end.
    pub(super) fn unfinished(&self) -> Vec<Upid> {
        self.begun.clone()
    }

    pub(super) fn find(&self, upid: &Upid) -> Option<TaskRecord> {
        self.finished
            .iter()
            .rev()
            .find(|record| record.upid == *upid)
            .cloned()
    }

    pub(super) fn begin(&mut self, upid: &Upid) -> io::Result<()> {
        self.append(&format!("{upid}\n"))?;
        self.begun.push(upid.clone());
        Ok(())
    }

    /// Records an end; returns the tasks that fell out of the bound, whose logs can go.
    pub(super) fn finish(&mut self, upid: &Upid, time: u32, status: &str) -> io::Result<Vec<Upid>> {
        self.begun.retain(|begun| begun != upid);
        let end = TaskEnd {
            time,
            status: status.replace('\n', " "),
        };
        let line = format!("{upid} {time:08X} {}\n", end.status);
        self.finished.push_back(TaskRecord {
            upid: upid.clone(),
            end: Some(end),
        });
        let excess = self.finished.len().saturating_sub(FINISHED_MAX);
        let dropped = self.finished.drain(..excess).map(|r| r.upid).collect();
        self.append(&line)?;
        self.compact()?;
        Ok(dropped)
    }

    fn append(&mut self, line: &str) -> io::Result<()> {
        self.lines += 1;
        self.file.write_all(line.as_bytes())
    }

    /// Writes the journal anew when most of its lines no longer matter.
    fn compact(&mut self) -> io::Result<()> {
        if self.lines < 4 * FINISHED_MAX {
            return Ok(());
        }
        let fresh = self.path.with_extension("new");
        let mut writer = BufWriter::new(File::create(&fresh)?);
        for record in &self.finished {
            if let Some(end) = &record.end {
                writeln!(writer, "{} {:08X} {}", record.upid, end.time, end.status)?;
            }
        }
        for upid in &self.begun {
            writeln!(writer, "{upid}")?;
        }
        writer.into_inner()?.sync_all()?;
        std::fs::rename(&fresh, &self.path)?;
        self.file = File::options().append(true).open(&self.path)?;
        self.lines = self.finished.len() + self.begun.len();
        Ok(())
    }
}

type Journal = (Vec<Upid>, VecDeque<TaskRecord>, usize);

fn read(file: &File) -> io::Result<Journal> {
    let mut begun: HashMap<Upid, usize> = HashMap::new();
    let mut finished = VecDeque::new();
    let mut lines = 0;
    for line in BufReader::new(file).lines() {
        let line = line?;
        lines += 1;
        let mut fields = line.splitn(3, ' ');
        // A line that was cut off by a crash is skipped: its task has no end and is ended as unexpected.
        let Some(Ok(upid)) = fields.next().map(str::parse::<Upid>) else {
            continue;
        };
        match (fields.next(), fields.next()) {
            (Some(time), Some(status)) => {
                let Ok(time) = u32::from_str_radix(time, 16) else {
                    continue;
                };
                begun.remove(&upid);
                let status = status.to_owned();
                finished.push_back(TaskRecord {
                    upid,
                    end: Some(TaskEnd { time, status }),
                });
            }
            _ => drop(begun.insert(upid, lines)),
        }
    }
    let excess = finished.len().saturating_sub(FINISHED_MAX);
    drop(finished.drain(..excess));
    let mut begun: Vec<(usize, Upid)> = begun.into_iter().map(|(u, line)| (line, u)).collect();
    begun.sort();
    Ok((
        begun.into_iter().map(|(_, upid)| upid).collect(),
        finished,
        lines,
    ))
}
