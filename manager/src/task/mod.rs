// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tasks: recorded units of work with a name, steps, a log and an end.
//!
//! ```text
//! spawn ──► waiting for a worker ──► running ──► OK | WARNINGS: n | error text
//!                     └── stop() ─────────┴────► interrupted by signal
//! daemon died in between ──────────────────────► unexpected status
//! ```
//!
//! Everything is in files below `tasks/` (see `index`), so that the record survives the daemon. Not here: who may
//! see or stop a task (crate `atoll-api`), and what tasks do (each table is beside what it works on).

mod context;
pub mod fault;
mod index;
mod log;
mod progress;
mod step;
#[cfg(test)]
mod tests;
mod upid;

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use tokio::sync::{Semaphore, watch};

pub use context::{Fault, Moment, TaskContext};
pub use index::{StatusClass, TaskFilter, TaskRecord, TaskSource};
pub use log::LogPage;
pub use progress::{PROGRESS_EVERY, Progress};
pub use step::{StepFn, StepFuture, TaskStep, run_steps};
pub use upid::{InvalidUpid, Upid};

use crate::error::Error;
use index::Index;

/// Exit status of a task that succeeded.
pub const OK: &str = "OK";

/// Exit status of a task that was running when the daemon died. PVE's words.
pub const UNEXPECTED: &str = "unexpected status";

/// A task to be started.
#[derive(Debug, Clone)]
pub struct NewTask {
    /// Type, one of PVE's words such as `qmstart`.
    pub kind: &'static str,
    /// What it works on, mostly a guest's number; may be empty.
    pub id: String,
    /// Who asked for it, as `Identity` prints: `user@realm` or `user@realm!token`.
    pub user: String,
    /// Whether it takes one of the bounded workers.
    pub worker: Worker,
}

/// Whether a task takes one of the bounded workers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Worker {
    /// It works, and waits until a worker is free.
    Bounded,
    /// It mostly waits (a console session) and starts at once.
    Free,
}

impl NewTask {
    /// A task that works, for `user`.
    pub fn new(kind: &'static str, id: impl ToString, user: impl ToString) -> Self {
        Self {
            kind,
            id: id.to_string(),
            user: user.to_string(),
            worker: Worker::Bounded,
        }
    }

    /// The same, but it takes no worker: for console sessions.
    pub fn free(mut self) -> Self {
        self.worker = Worker::Free;
        self
    }
}

/// The tasks of this node; cheap to clone.
#[derive(Debug, Clone)]
pub struct Tasks {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    node: String,
    directory: PathBuf,
    pstart: u64,
    next: AtomicU32,
    workers: Semaphore,
    ended: AtomicU64,
    /// What runs and what ran. Innermost lock; never held over `.await`.
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    running: HashMap<Upid, Running>,
    index: Index,
}

#[derive(Debug, Clone)]
struct Running {
    context: TaskContext,
    end: watch::Receiver<Option<String>>,
}

impl Tasks {
    /// Opens the record below `directory` (made if missing) and ends the tasks that a former daemon left running.
    /// `workers_max` bounds how many work at the same time. Reads files: call it at start only.
    pub fn open(node: &str, directory: &Path, workers_max: usize) -> Result<Self, Error> {
        let open = || -> std::io::Result<(Index, u64)> {
            std::fs::create_dir_all(directory)?;
            let mut index = Index::open(&directory.join("index"))?;
            for upid in index.unfinished() {
                log::end_interrupted(&log_path(directory, &upid))?;
                index.finish(&upid, now(), UNEXPECTED)?;
            }
            Ok((index, own_start_time()?))
        };
        let (index, pstart) =
            open().map_err(|e| Error::failed(format!("open {}", directory.display()), e))?;
        Ok(Self {
            shared: Arc::new(Shared {
                node: node.to_owned(),
                directory: directory.to_owned(),
                pstart,
                next: AtomicU32::new(1),
                workers: Semaphore::new(workers_max.max(1)),
                ended: AtomicU64::new(0),
                state: Mutex::new(State {
                    running: HashMap::new(),
                    index,
                }),
            }),
        })
    }

    /// Starts `work` as a task and returns its name at once. Must be called inside the tokio runtime.
    pub fn spawn<F, W>(&self, new: NewTask, work: W) -> Result<Upid, Error>
    where
        W: FnOnce(TaskContext) -> F + Send + 'static,
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let upid = self.name(&new);
        let (context, end) = self
            .register(&upid)
            .map_err(|e| Error::failed("create the task's log", e))?;
        let tasks = self.clone();
        tokio::spawn(async move {
            let result = tasks.work(new.worker, context.clone(), work).await;
            let status = tasks.finish(&context, result);
            end.send_replace(Some(status));
        });
        Ok(upid)
    }

    /// Starts a table of steps as a task; see [`run_steps`].
    pub fn spawn_steps<C: Send + 'static>(
        &self,
        new: NewTask,
        steps: &'static [TaskStep<C>],
        mut context: C,
    ) -> Result<Upid, Error> {
        self.spawn(new, async move |task: TaskContext| {
            run_steps(steps, &mut context, &task).await
        })
    }

    /// Asks a running task to stop: it ends at its next step, or at once where a step watches its token. Stopping
    /// a task that has ended does nothing.
    pub fn stop(&self, upid: &Upid) -> Result<(), Error> {
        let state = self.state();
        match state.running.get(upid) {
            Some(running) => running.context.token().cancel(),
            None => drop(state.index.find(upid).ok_or_else(no_such_task)?),
        }
        Ok(())
    }

    /// Asks all running tasks to stop and waits until they have; called when the daemon ends.
    pub async fn stop_all(&self) {
        let running: Vec<Running> = self.state().running.values().cloned().collect();
        for task in &running {
            task.context.token().cancel();
        }
        for mut task in running {
            // An error here means that the sender is gone, so the task has ended.
            drop(task.end.wait_for(Option::is_some).await);
        }
    }

    /// Waits until a task has ended; returns its exit status.
    pub async fn wait(&self, upid: &Upid) -> Result<String, Error> {
        let running = self.state().running.get(upid).cloned();
        if let Some(mut running) = running
            && let Ok(status) = running.end.wait_for(Option::is_some).await
        {
            return Ok(status.clone().unwrap_or_else(|| UNEXPECTED.to_owned()));
        }
        let record = self.status(upid)?;
        Ok(record.end.map_or(UNEXPECTED.to_owned(), |end| end.status))
    }

    /// One task, running or ended.
    pub fn status(&self, upid: &Upid) -> Result<TaskRecord, Error> {
        let state = self.state();
        if state.running.contains_key(upid) {
            return Ok(TaskRecord::running(upid.clone()));
        }
        state.index.find(upid).ok_or_else(no_such_task)
    }

    /// Tasks that pass the filter, newest first, with their number before `start` and `limit` were applied.
    pub fn list(&self, filter: &TaskFilter) -> (Vec<TaskRecord>, usize) {
        let state = self.state();
        let mut active: Vec<TaskRecord> = state
            .running
            .keys()
            .map(|upid| TaskRecord::running(upid.clone()))
            .collect();
        active.sort_by_key(|record| std::cmp::Reverse((record.upid.starttime, record.upid.pid)));
        filter.apply(active, &state.index)
    }

    /// How many tasks run or wait for a worker.
    pub fn running_count(&self) -> usize {
        self.state().running.len()
    }

    /// How many tasks have ended since the daemon started: when it is another number than before, what was known about
    /// guests may be old.
    pub fn ended_count(&self) -> u64 {
        self.shared.ended.load(Ordering::Relaxed)
    }

    /// A page of a task's log: from line `start` (0 is the first), at most `limit` lines (0 is all). Blocks on a
    /// file; use it in `spawn_blocking` for logs that may be long.
    pub fn log(&self, upid: &Upid, start: usize, limit: usize) -> Result<LogPage, Error> {
        drop(self.status(upid)?);
        log::read_page(&self.log_file(upid), start, limit)
            .map_err(|e| Error::failed("read the task's log", e))
    }

    /// Where a task's log is, for a download.
    pub fn log_file(&self, upid: &Upid) -> PathBuf {
        log_path(&self.shared.directory, upid)
    }

    fn name(&self, new: &NewTask) -> Upid {
        Upid {
            node: self.shared.node.clone(),
            pid: self.shared.next.fetch_add(1, Ordering::Relaxed),
            pstart: self.shared.pstart,
            starttime: now(),
            kind: new.kind.to_owned(),
            id: new.id.clone(),
            user: new.user.clone(),
        }
        .fitted()
    }

    fn register(
        &self,
        upid: &Upid,
    ) -> std::io::Result<(TaskContext, watch::Sender<Option<String>>)> {
        let path = self.log_file(upid);
        if let Some(parent) = path.parent() {
            std::fs::create_dir_all(parent)?;
        }
        let context = TaskContext::create(upid.clone(), &path)?;
        let (sender, end) = watch::channel(None);
        let mut state = self.state();
        state.index.begin(upid)?;
        let running = Running {
            context: context.clone(),
            end,
        };
        state.running.insert(upid.clone(), running);
        Ok((context, sender))
    }

    async fn work<F, W>(&self, worker: Worker, task: TaskContext, work: W) -> Result<(), Error>
    where
        W: FnOnce(TaskContext) -> F + Send + 'static,
        F: Future<Output = Result<(), Error>> + Send + 'static,
    {
        let _slot = match worker {
            Worker::Free => None,
            Worker::Bounded => Some(self.slot(&task).await?),
        };
        let done = tokio::spawn(work(task)).await;
        done.unwrap_or_else(|e| Err(Error::failed("the task broke off, which is a bug", e)))
    }

    async fn slot(&self, task: &TaskContext) -> Result<tokio::sync::SemaphorePermit<'_>, Error> {
        if let Ok(permit) = self.shared.workers.try_acquire() {
            return Ok(permit);
        }
        task.log("waiting for a free worker");
        let acquire = async {
            let permit = self.shared.workers.acquire().await;
            permit.map_err(|e| Error::failed("wait for a worker", e))
        };
        task.until_cancelled(acquire).await
    }

    fn finish(&self, context: &TaskContext, result: Result<(), Error>) -> String {
        let status = match (&result, context.warnings()) {
            (Ok(()), 0) => OK.to_owned(),
            (Ok(()), count) => format!("WARNINGS: {count}"),
            (Err(error), _) => error.chain(),
        };
        context.log(&match result {
            Ok(()) => format!("TASK {status}"),
            Err(_) => format!("TASK ERROR: {status}"),
        });
        self.shared.ended.fetch_add(1, Ordering::Relaxed);
        let upid = context.upid();
        let mut state = self.state();
        state.running.remove(upid);
        match state.index.finish(upid, now(), &status) {
            Ok(dropped) => {
                for old in dropped {
                    // The archive is bounded; a log that is gone already is as good as removed.
                    drop(std::fs::remove_file(self.log_file(&old)));
                }
            }
            Err(error) => tracing::error!(%upid, %error, "record the end of a task"),
        }
        status
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.shared.state.lock().unwrap_or_else(|e| e.into_inner())
    }
}

fn no_such_task() -> Error {
    Error::invalid("upid", "no such task")
}

fn log_path(directory: &Path, upid: &Upid) -> PathBuf {
    directory.join(upid.directory()).join(upid.to_string())
}

fn now() -> u32 {
    let seconds = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| d.as_secs());
    u32::try_from(seconds).unwrap_or(u32::MAX)
}

/// When this process started, in clock ticks since boot: field 22 of `/proc/self/stat`, proc(5).
fn own_start_time() -> std::io::Result<u64> {
    let stat = std::fs::read_to_string("/proc/self/stat")?;
    let after_name = stat.rsplit(')').next().unwrap_or_default();
    after_name
        .split_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| std::io::Error::other("/proc/self/stat has no start time"))
}
