// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Whether what a container runs works: keys `health-command` and `health`. Asked after an update of its image; one
//! without a command works as long as it runs.

use std::time::{Duration, Instant};

use crate::error::Error;
use crate::exec::Program;
use crate::guest::Guest as _;
use crate::guest::config::GuestConfig;
use crate::guest::container::Container;
use crate::guest::site::Seat;
use crate::task::TaskContext;

/// How long a container without a command has to run.
const GRACE: Duration = Duration::from_secs(3);
/// Time between two looks at a container without a command.
const LOOK_EVERY: Duration = Duration::from_millis(200);

/// When the command is run, in the words of `health`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Pace {
    interval: Duration,
    timeout: Duration,
    start: Duration,
    retries: u32,
}

impl Pace {
    fn of(config: &GuestConfig) -> Result<Self, Error> {
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

/// Waits until a container that has just been started works; an error when it does not.
pub async fn wait(seat: &Seat, config: &GuestConfig, task: &TaskContext) -> Result<(), Error> {
    let pace = Pace::of(config)?;
    let command = config.get("health-command").unwrap_or_default().split('\0');
    let command: Vec<&str> = command.filter(|word| !word.is_empty()).collect();
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

/// Runs the command once.
async fn probe(seat: &Seat, command: &[&str], timeout: Duration) -> Result<(), Error> {
    Program::new(seat.site.program("atoll-ct"))
        .arg("--root")
        .arg(seat.site.containers_folder())
        .args(["exec", &seat.name()])
        .args(command)
        .deadline(timeout)
        .run()
        .await?;
    Ok(())
}
