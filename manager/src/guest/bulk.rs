// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Many guests in one task, in the order that their key `startup` says: `startall` with the node, `stopall` before it
//! ends. Each guest has a task of its own within, as if somebody had asked for it. One that fails is told in the log
//! and holds nobody else up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use crate::cluster::GuestSummary;
use crate::error::Error;
use crate::guest::site::Seat;
use crate::guest::{Action, Ask, GuestConfig, Guests, Phase, guest};
use crate::id::GuestId;
use crate::task::{self, TaskContext, Upid};

/// When a guest starts and stops with the node: its key `startup`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Order {
    /// Place among the starts; who has none comes last.
    pub place: Option<u32>,
    /// Wait after its start, before the next one's.
    pub up: Duration,
    /// Longest wait for its end, when it differs from that of others.
    pub down: Option<Duration>,
}

impl Order {
    /// What a config says. A value that no update would have let pass counts as none.
    pub fn of(config: &GuestConfig) -> Self {
        let Ok(Some(properties)) = config.properties("startup") else {
            return Self::default();
        };
        let number = |key: &str| properties.get(key)?.parse::<u32>().ok();
        let seconds = |key: &str| number(key).map(|count| Duration::from_secs(count.into()));
        Self {
            place: number("order"),
            up: seconds("up").unwrap_or_default(),
            down: seconds("down"),
        }
    }

    /// Sorts starts.
    fn key(self) -> u64 {
        self.place.map_or(u64::MAX, u64::from)
    }
}

/// Which guests are started.
#[derive(Debug, Clone, Default)]
pub struct StartAll {
    /// Only these.
    pub only: Option<Vec<GuestId>>,
    /// Also those without `onboot`.
    pub force: bool,
}

/// Which guests are stopped, and how.
#[derive(Debug, Clone)]
pub struct StopAll {
    /// Only these.
    pub only: Option<Vec<GuestId>>,
    /// What each is asked, unless its `startup` has a time of its own.
    pub ask: Ask,
}

impl Default for StopAll {
    /// Everyone, within PVE's three minutes, then by force.
    fn default() -> Self {
        let ask = Ask::default();
        Self {
            only: None,
            ask: Ask { force: true, ..ask },
        }
    }
}

/// Starts them one after the other. Returns when all that can run do.
pub async fn start_all(
    guests: &Guests,
    wish: &StartAll,
    user: &str,
    task: &TaskContext,
) -> Result<(), Error> {
    let rows = chosen(guests, wish.only.as_deref())?;
    let rows = rows
        .into_iter()
        .filter(|row| !row.template && (wish.force || row.onboot));
    for row in in_order(rows.collect()).into_values().flatten() {
        let seat = guests.site().seat(row.kind, row.id);
        if matches!(guest(&seat).phase(), Phase::Running { .. }) {
            continue;
        }
        task.log(&format!("Starting {}", seat.title()));
        let started = guests.act(row.kind, row.id, Action::Start, user);
        if ended_well(guests, started, &seat, task).await? && !row.startup.up.is_zero() {
            let seconds = row.startup.up.as_secs();
            task.log(&format!("Waiting for {seconds} seconds (startup delay)"));
            let pause = async {
                tokio::time::sleep(row.startup.up).await;
                Ok(())
            };
            task.until_cancelled(pause).await?;
        }
    }
    Ok(())
}

/// Shuts them down, the last to start first; those with the same place together.
pub async fn stop_all(
    guests: &Guests,
    wish: &StopAll,
    user: &str,
    task: &TaskContext,
) -> Result<(), Error> {
    let rows = chosen(guests, wish.only.as_deref())?;
    for group in in_order(rows).into_values().rev() {
        let mut stops = Vec::new();
        for row in group {
            let seat = guests.site().seat(row.kind, row.id);
            if !matches!(guest(&seat).phase(), Phase::Running { .. }) {
                continue;
            }
            let ask = Ask {
                timeout: row.startup.down.unwrap_or(wish.ask.timeout),
                ..wish.ask
            };
            let seconds = ask.timeout.as_secs();
            task.log(&format!(
                "Stopping {} (timeout = {seconds} seconds)",
                seat.title()
            ));
            let asked = guests.act(row.kind, row.id, Action::Shutdown(ask), user);
            stops.push((asked, seat));
        }
        for (asked, seat) in stops {
            ended_well(guests, asked, &seat, task).await?;
        }
    }
    Ok(())
}

fn chosen(guests: &Guests, only: Option<&[GuestId]>) -> Result<Vec<Arc<GuestSummary>>, Error> {
    let mut rows = guests.summaries()?;
    rows.retain(|row| only.is_none_or(|only| only.contains(&row.id)));
    Ok(rows)
}

/// Groups of the same place, first to start first; within one by number.
fn in_order(rows: Vec<Arc<GuestSummary>>) -> BTreeMap<u64, Vec<Arc<GuestSummary>>> {
    let mut groups = BTreeMap::<u64, Vec<_>>::new();
    for row in rows {
        groups.entry(row.startup.key()).or_default().push(row);
    }
    for group in groups.values_mut() {
        group.sort_by_key(|row| row.id);
    }
    groups
}

/// Waits for a guest's task. An error only when this one was stopped meanwhile.
async fn ended_well(
    guests: &Guests,
    started: Result<Upid, Error>,
    seat: &Seat,
    task: &TaskContext,
) -> Result<bool, Error> {
    let status = match started {
        Ok(upid) => task.until_cancelled(guests.tasks().wait(&upid)).await?,
        Err(error) => error.chain(),
    };
    let is_well = status == task::OK || status.starts_with("WARNINGS");
    if !is_well {
        task.warn(&format!("{}: {status}", seat.title()));
    }
    Ok(is_well)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::GuestKind;
    use crate::store::Revision;

    #[test]
    fn places_come_first_and_numbers_break_ties() {
        let row = |id: &str, startup: &str| {
            let text = format!("onboot: 1\n{startup}\n");
            let config = GuestConfig::parse(GuestKind::Vm, &text);
            let summary = GuestSummary::new(&config, "n1", id.parse().unwrap(), Revision(1));
            Arc::new(summary)
        };
        let rows = vec![
            row("103", ""),
            row("102", "startup: order=2,up=30"),
            row("101", ""),
            row("105", "startup: 1"),
            row("104", "startup: up=5,down=9"),
            row("100", "startup: order=2"),
        ];
        let order = in_order(rows);
        let groups: Vec<Vec<String>> = order
            .values()
            .map(|group| group.iter().map(|row| row.id.to_string()).collect())
            .collect();
        let expected = [vec!["105"], vec!["100", "102"], vec!["101", "103", "104"]];
        assert_eq!(groups, expected);
        let last = &order[&u64::MAX][2].startup;
        assert_eq!(
            (last.up.as_secs(), last.down.map(|d| d.as_secs())),
            (5, Some(9))
        );
    }
}
