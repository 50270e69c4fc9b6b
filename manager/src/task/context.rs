// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a running task holds: its log, its warnings, and the word that it should stop.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use tokio_util::sync::CancellationToken;

use super::step::TaskStep;
use super::upid::Upid;
use crate::error::Error;

/// A fault to inject: which step fails, and whether it did its work first. Only tests make one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// Index of the step in its table.
    pub step: usize,
    /// When it fails.
    pub moment: Moment,
}

/// When an injected fault strikes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// The step fails without having done anything.
    Before,
    /// The step does all its work and fails then.
    After,
}

/// Given to every step of a running task; cheap to clone.
#[derive(Debug, Clone)]
pub struct TaskContext {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    upid: Upid,
    token: CancellationToken,
    warnings: AtomicU32,
    fault: Option<Fault>,
    /// Protects the order of lines in the log file. Innermost: nothing else is locked under it.
    log: Mutex<Option<File>>,
}

impl TaskContext {
    /// Opens the task's log at `path` (the directory exists).
    pub(super) fn create(upid: Upid, path: &Path) -> std::io::Result<Self> {
        let log = File::options().create(true).append(true).open(path)?;
        Ok(Self::with(upid, Some(log), None))
    }

    /// A context without a log file, for tests of step tables and for direct calls outside a task.
    pub fn detached(upid: Upid, fault: Option<Fault>) -> Self {
        Self::with(upid, None, fault)
    }

    /// The same task for a table that runs as one step of another: injected faults strike the outer table alone.
    pub fn nested(&self) -> Self {
        self.inner(self.shared.token.clone())
    }

    /// The same for an undo, which runs to its end when the task was stopped, too.
    pub fn nested_undo(&self) -> Self {
        self.inner(CancellationToken::new())
    }

    fn inner(&self, token: CancellationToken) -> Self {
        let log = self.shared.log.lock().unwrap_or_else(|e| e.into_inner());
        // It is only appended to, so the order of lines is that of the writes.
        let log = log.as_ref().and_then(|file| file.try_clone().ok());
        Self {
            shared: Arc::new(Shared {
                upid: self.shared.upid.clone(),
                token,
                warnings: AtomicU32::new(0),
                fault: None,
                log: Mutex::new(log),
            }),
        }
    }

    fn with(upid: Upid, log: Option<File>, fault: Option<Fault>) -> Self {
        Self {
            shared: Arc::new(Shared {
                upid,
                token: CancellationToken::new(),
                warnings: AtomicU32::new(0),
                fault,
                log: Mutex::new(log),
            }),
        }
    }

    /// The task's name.
    pub fn upid(&self) -> &Upid {
        &self.shared.upid
    }

    /// Adds a line to the task's log. Line ends inside become lines of their own.
    pub fn log(&self, line: &str) {
        let mut log = self.shared.log.lock().unwrap_or_else(|e| e.into_inner());
        let Some(file) = log.as_mut() else {
            tracing::debug!(upid = %self.shared.upid, "{line}");
            return;
        };
        let mut text = line.trim_end_matches('\n').to_owned();
        text.push('\n');
        // One write, so that a reader never sees half a line. A full disk must not fail the task itself.
        if let Err(error) = file.write_all(text.as_bytes()) {
            tracing::warn!(upid = %self.shared.upid, %error, "task log");
        }
    }

    /// Adds a warning: the task still succeeds, and ends as `WARNINGS: n`.
    pub fn warn(&self, line: &str) {
        self.shared.warnings.fetch_add(1, Ordering::Relaxed);
        self.log(&format!("WARN: {line}"));
    }

    /// How many warnings there were.
    pub fn warnings(&self) -> u32 {
        self.shared.warnings.load(Ordering::Relaxed)
    }

    /// Somebody asked the task to stop. Checked before every step; long steps watch [`token`](Self::token).
    pub fn is_cancelled(&self) -> bool {
        self.shared.token.is_cancelled()
    }

    /// Becomes cancelled when somebody stops the task.
    pub fn token(&self) -> &CancellationToken {
        &self.shared.token
    }

    /// Runs `work` unless the task is stopped first; the work is dropped then.
    pub async fn until_cancelled<T>(
        &self,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        tokio::select! {
            result = work => result,
            () = self.shared.token.cancelled() => Err(Error::Interrupted),
        }
    }

    pub(super) async fn run_step<C>(
        &self,
        index: usize,
        step: &TaskStep<C>,
        context: &mut C,
    ) -> Result<(), Error> {
        let strikes = |moment| {
            self.shared.fault
                == Some(Fault {
                    step: index,
                    moment,
                })
        };
        if strikes(Moment::Before) {
            return Err(injected(step.name));
        }
        (step.run)(context, self).await?;
        if strikes(Moment::After) {
            return Err(injected(step.name));
        }
        Ok(())
    }
}

fn injected(step: &str) -> Error {
    Error::Refused(format!("injected fault in step '{step}'"))
}
