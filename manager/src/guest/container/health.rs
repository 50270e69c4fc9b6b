// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Whether what a container runs works: keys `health-command` and `health`. Asked again and again while it runs
//! (`watch`), and after an update of its image; one without a command works as long as it runs.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use crate::error::Error;
use crate::exec::Program;
use crate::guest::Guest as _;
use crate::guest::config::GuestConfig;
use crate::guest::container::Container;
use crate::guest::site::Seat;
use crate::id::GuestId;
use crate::task::TaskContext;

/// How long a container without a command has to run.
const GRACE: Duration = Duration::from_secs(3);
/// Time between two looks at a container without a command.
const LOOK_EVERY: Duration = Duration::from_millis(200);
/// What the runtime has beyond the command's own time, to enter the container and to kill what is late.
const ENTRY_MAX: Duration = Duration::from_secs(10);

/// When the command is run, in the words of `health`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Pace {
    /// Between the end of a run and the next.
    pub interval: Duration,
    /// Longest run.
    pub timeout: Duration,
    /// After a start, failures do not count for so long, or until the first success.
    pub start: Duration,
    /// Failures in a row that count.
    pub retries: u32,
}

impl Pace {
    /// What a config says.
    pub fn of(config: &GuestConfig) -> Result<Self, Error> {
        let value = config.properties("health")?.unwrap_or_default();
        let seconds =
            |name: &str, usual: u64| Duration::from_secs(value.number(name).unwrap_or(usual));
        Ok(Self {
            interval: seconds("interval", 30),
            timeout: seconds("timeout", 30),
            start: seconds("start", 0),
            retries: value.number("retries").unwrap_or(3),
        })
    }
}

/// The command's words; none when there is no command.
pub fn command(config: &GuestConfig) -> Vec<String> {
    let words = config.get("health-command").unwrap_or_default().split('\0');
    words
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// What is known of a running container. Docker's three states.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It has not been found working since its start.
    Starting,
    /// It works.
    Healthy,
    /// It has failed as often in a row as its config allows.
    Unhealthy,
}

impl State {
    /// Docker's word for it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Starting => "starting",
            Self::Healthy => "healthy",
            Self::Unhealthy => "unhealthy",
        }
    }
}

/// The health of one run of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// See there.
    pub state: State,
    /// Failures in a row that count.
    pub failures: u32,
    /// Why the command failed the last time; none when it succeeded.
    pub message: Option<String>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            state: State::Starting,
            failures: 0,
            message: None,
        }
    }
}

impl Health {
    /// Takes the result of one run of the command, `up` after the container's start. Whether this is the moment to give
    /// the container up: the first failure too many, and as many again should it go on running.
    pub fn take(&mut self, result: Result<(), String>, pace: &Pace, up: Duration) -> bool {
        self.message = result.err();
        if self.message.is_none() {
            (self.state, self.failures) = (State::Healthy, 0);
            return false;
        }
        if self.state == State::Starting && up < pace.start {
            return false;
        }
        self.failures += 1;
        if self.failures < pace.retries {
            return false;
        }
        self.state = State::Unhealthy;
        self.failures.is_multiple_of(pace.retries)
    }
}

/// The health of this node's containers, as the watch has found it.
#[derive(Debug, Default)]
pub struct Healths {
    /// By container, with the process of the run that it is of. Innermost lock, held for a look-up.
    known: Mutex<HashMap<GuestId, (u32, Health)>>,
}

impl Healths {
    fn known(&self) -> MutexGuard<'_, HashMap<GuestId, (u32, Health)>> {
        self.known.lock().unwrap_or_else(|e| e.into_inner())
    }

    /// Of the run whose init is `pid`.
    pub fn get(&self, id: GuestId, pid: u32) -> Option<Health> {
        let known = self.known();
        let (of, health) = known.get(&id)?;
        (*of == pid).then(|| health.clone())
    }

    /// Notes it.
    pub fn set(&self, id: GuestId, pid: u32, health: Health) {
        self.known().insert(id, (pid, health));
    }

    /// Forgets containers that do not run, or are not asked, any more.
    pub fn retain(&self, keep: impl Fn(GuestId) -> bool) {
        self.known().retain(|id, _| keep(*id));
    }
}

/// Waits until a container that has just been started works; an error when it does not.
pub async fn wait(seat: &Seat, config: &GuestConfig, task: &TaskContext) -> Result<(), Error> {
    let pace = Pace::of(config)?;
    let command = command(config);
    let container = Container::new(seat.clone());
    let (begun, mut failures) = (Instant::now(), 0);
    loop {
        if container.process().is_none() {
            return Err(Error::refused(format!(
                "{} has ended by itself",
                seat.title()
            )));
        }
        if command.is_empty() {
            if begun.elapsed() >= GRACE {
                return Ok(());
            }
            tokio::time::sleep(LOOK_EVERY).await;
            continue;
        }
        let asked = task.until_cancelled(async { probe(seat, &command, pace.timeout).await });
        match asked.await {
            Ok(()) => {
                task.log("the health command succeeds");
                return Ok(());
            }
            Err(Error::Interrupted) => return Err(Error::Interrupted),
            Err(error) if begun.elapsed() < pace.start => {
                task.log(&format!("not healthy yet: {}", error.chain()));
            }
            Err(error) => {
                failures += 1;
                task.log(&format!("not healthy: {}", error.chain()));
                if failures >= pace.retries {
                    return Err(Error::refused(format!("{} is not healthy", seat.title())));
                }
            }
        }
        task.until_cancelled(async {
            tokio::time::sleep(pace.interval).await;
            Ok(())
        })
        .await?;
    }
}

/// Runs the command once. What is late is ended by the runtime, in the container: ended itself, it would leave it there.
pub(super) async fn probe(seat: &Seat, command: &[String], timeout: Duration) -> Result<(), Error> {
    let time_max = format!("{}s", timeout.as_secs());
    Program::new(seat.site.program("atoll-ct"))
        .arg("--root")
        .arg(seat.site.containers_folder())
        .args(["exec", "--time-max", &time_max, &seat.name()])
        .args(command)
        .deadline(timeout + ENTRY_MAX)
        .run()
        .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::GuestKind;

    #[test]
    fn failures_count_after_the_start_and_in_a_row() {
        let line = "health: interval=1,retries=2,start=10\n";
        let config = GuestConfig::parse(GuestKind::Container, line);
        let pace = Pace::of(&config).unwrap();
        let mut health = Health::default();
        let mut take = |works: bool, up: u64| {
            let result = if works { Ok(()) } else { Err("no".to_owned()) };
            let given_up = health.take(result, &pace, Duration::from_secs(up));
            (health.state, health.failures, given_up)
        };
        assert_eq!(take(false, 9), (State::Starting, 0, false));
        assert_eq!(take(false, 10), (State::Starting, 1, false));
        assert_eq!(take(false, 11), (State::Unhealthy, 2, true));
        assert_eq!(take(false, 12), (State::Unhealthy, 3, false));
        assert_eq!(take(false, 13), (State::Unhealthy, 4, true));
        assert_eq!(take(true, 14), (State::Healthy, 0, false));
        assert_eq!(take(false, 15), (State::Healthy, 1, false));
        assert_eq!(take(true, 16), (State::Healthy, 0, false));
        let mut early = Health::default();
        let second = Duration::from_secs(1);
        early.take(Ok(()), &pace, second);
        early.take(Err("no".to_owned()), &pace, second);
        assert_eq!(early.failures, 1, "the first success ends the start");
    }
}
