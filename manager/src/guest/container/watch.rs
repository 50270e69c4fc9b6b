// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The watch over containers that have a health command: runs it at the pace of the config as long as the container
//! runs, notes what it finds for the API, and gives up on one that does not work when its key `restart` would start it
//! again: that is then ended, and the reconciler does with it what it does with any that has failed.
//!
//! ```text
//! look (every second) ──► runs that are due ──► a task of its own each: atoll-ct exec ──► results ──► Health::take
//!                                                                     given up ─► task vzunhealthy ─► reconciler
//! ```
//!
//! Nothing of it is kept over the daemon's end: a container is `starting` for a new daemon until it has been asked.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::container::Container;
use crate::guest::container::health::{self, Health, Pace};
use crate::guest::container::restart::{self, Ended, Verdict};
use crate::guest::site::Seat;
use crate::guest::{Guest as _, Guests};
use crate::id::{GuestId, GuestKind};
use crate::process::age_seconds;
use crate::task::{NewTask, TaskContext};

/// Between two looks at what is due: the shortest interval.
const TICK: Duration = Duration::from_secs(1);
/// Commands that are run at a time; what is due beyond that waits for the next look.
const RUNS_MAX: usize = 32;
/// Who ends what does not work.
const USER: &str = "root@pam";
/// How long a container that is given up has for ending in good order.
const END_MAX: Duration = Duration::from_secs(10);

/// See the module.
#[derive(Debug)]
pub struct Watch {
    guests: Guests,
    runs: HashMap<GuestId, Run>,
    results: (mpsc::Sender<Outcome>, mpsc::Receiver<Outcome>),
}

/// One run of a container.
#[derive(Debug)]
struct Run {
    pid: u32,
    health: Health,
    next: Instant,
    asked: bool,
}

/// What one run of a health command has come to.
#[derive(Debug)]
struct Outcome {
    id: GuestId,
    pid: u32,
    /// `None`: it could not be asked, since its processes are held.
    result: Option<Result<(), String>>,
}

impl Watch {
    /// A watch that has not looked yet.
    pub fn new(guests: Guests) -> Self {
        Self {
            guests,
            runs: HashMap::new(),
            results: mpsc::channel(RUNS_MAX),
        }
    }

    /// Watches until it is told to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = tick.tick() => self.look(),
                Some(outcome) = self.results.1.recv() => {
                    let id = outcome.id;
                    if let Err(error) = self.take(outcome) {
                        tracing::warn!(guest = %id, error = error.chain(), "health");
                    }
                }
                () = stop.cancelled() => break,
            }
        }
    }

    /// Begins what is due.
    fn look(&mut self) {
        let site = self.guests.site().clone();
        let mut found = HashMap::new();
        for (kind, id) in site.run_folders() {
            if kind != GuestKind::Container {
                continue;
            }
            let seat = site.seat(kind, id);
            let Ok(config) = seat.config() else { continue };
            let (command, Ok(pace)) = (health::command(&config), Pace::of(&config)) else {
                continue;
            };
            if command.is_empty() {
                continue;
            }
            let Some(process) = Container::new(seat.clone()).process() else {
                continue;
            };
            let pid = process.pid();
            let known = self.runs.remove(&id).filter(|run| run.pid == pid);
            let mut run = known.unwrap_or_else(|| begin(pid, &pace));
            let free = self.results.0.capacity() > 0;
            if !run.asked && free && Instant::now() >= run.next {
                run.asked = self.ask(seat, pid, command, pace);
            }
            site.health.set(id, pid, run.health.clone());
            found.insert(id, run);
        }
        self.runs = found;
        site.health.retain(|id| self.runs.contains_key(&id));
    }

    /// Runs the command aside. False when too many run.
    fn ask(&self, seat: Seat, pid: u32, command: Vec<String>, pace: Pace) -> bool {
        // The place for its result is taken now, which bounds how many run.
        let Ok(place) = self.results.0.clone().try_reserve_owned() else {
            return false;
        };
        tokio::spawn(async move {
            let asked = health::probe(&seat, &command, pace.timeout).await;
            let result = match asked {
                Ok(()) => Some(Ok(())),
                Err(_) if Container::new(seat.clone()).is_paused().await => None,
                Err(error) => Some(Err(error.chain())),
            };
            let id = seat.id;
            place.send(Outcome { id, pid, result });
        });
        true
    }

    fn take(&mut self, outcome: Outcome) -> Result<(), Error> {
        let Outcome { id, pid, result } = outcome;
        let seat = self.guests.site().seat(GuestKind::Container, id);
        // Of a run that has ended meanwhile nobody wants to know.
        let Some(run) = self.runs.get_mut(&id).filter(|run| run.pid == pid) else {
            return Ok(());
        };
        let config = seat.config()?;
        let pace = Pace::of(&config)?;
        run.asked = false;
        run.next = Instant::now() + pace.interval;
        let Some(result) = result else { return Ok(()) };
        let up = Duration::from_secs(age_seconds(pid));
        let is_given_up = run.health.take(result, &pace, up);
        let health = run.health.clone();
        seat.site.health.set(id, pid, health.clone());
        if is_given_up && would_restart(&config)? {
            self.guests.tasks().spawn(
                NewTask::new("vzunhealthy", id, USER),
                async move |task: TaskContext| end(&seat, pid, &health, &task).await,
            )?;
        }
        Ok(())
    }
}

/// A run that is new, or new to this daemon.
fn begin(pid: u32, pace: &Pace) -> Run {
    let up = Duration::from_secs(age_seconds(pid));
    Run {
        pid,
        health: Health::default(),
        next: Instant::now() + pace.interval.saturating_sub(up),
        asked: false,
    }
}

/// Whether the config has a failed container started again at all; how often is the reconciler's matter.
fn would_restart(config: &GuestConfig) -> Result<bool, Error> {
    let ended = Ended { failed: true };
    Ok(restart::verdict(config, ended, None, Instant::now())? == Verdict::Start)
}

/// Ends a container that does not work: in good order, if it can.
async fn end(seat: &Seat, pid: u32, health: &Health, task: &TaskContext) -> Result<(), Error> {
    let _guard = seat.lock().await?;
    let container = Container::new(seat.clone());
    let Some(process) = container.process().filter(|process| process.pid() == pid) else {
        return Ok(());
    };
    let message = health.message.as_deref().unwrap_or_default();
    task.log(&format!(
        "not healthy {} times in a row: {message}",
        health.failures
    ));
    container.give_up(task).await?;
    if !process.ended_before(Instant::now() + END_MAX).await {
        task.log("it does not end, killing it");
        container.command(&["kill"], &["KILL"]).await?;
    }
    Ok(())
}
