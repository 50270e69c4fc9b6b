// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The watch over containers whose addresses the host asks for: applies what has come since the start, and starts a
//! client again that has died. A container that somebody works on is left to him.

use std::collections::HashMap;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::{apply, cards, is_running, start};
use crate::error::Error;
use crate::guest::container::Container;
use crate::guest::site::Seat;
use crate::guest::{Guest as _, Guests};
use crate::id::{GuestId, GuestKind};

/// Between two looks.
const TICK: Duration = Duration::from_secs(1);
/// Of which one in so many looks for the clients themselves.
const LOOKS_PER_SEARCH: u32 = 5;

/// See the module.
#[derive(Debug)]
pub struct Keep {
    guests: Guests,
    /// What has failed was said once.
    said: HashMap<GuestId, String>,
}

impl Keep {
    /// A watch that has not looked yet.
    pub fn new(guests: Guests) -> Self {
        Self {
            guests,
            said: HashMap::new(),
        }
    }

    /// Watches until it is told to stop.
    pub async fn run(mut self, stop: CancellationToken) {
        for look in 0_u32.. {
            self.look(look % LOOKS_PER_SEARCH == 0).await;
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                () = stop.cancelled() => break,
            }
        }
    }

    async fn look(&mut self, searches: bool) {
        let site = self.guests.site().clone();
        let folders = site.run_folders();
        self.said
            .retain(|id, _| folders.contains(&(GuestKind::Container, *id)));
        for (kind, id) in folders {
            if kind != GuestKind::Container {
                continue;
            }
            let seat = site.seat(kind, id);
            let asks = |config| cards(&config).is_ok_and(|cards| !cards.is_empty());
            if !seat.config().is_ok_and(asks) {
                continue;
            }
            let Some(_guard) = site.locks.try_acquire(id) else {
                continue;
            };
            match tend(&seat, searches).await {
                Ok(()) => drop(self.said.remove(&id)),
                Err(error) => {
                    let text = error.chain();
                    if self.said.get(&id) != Some(&text) {
                        tracing::warn!(guest = seat.title(), error = text, "DHCP");
                        self.said.insert(id, text);
                    }
                }
            }
        }
    }
}

async fn tend(seat: &Seat, searches: bool) -> Result<(), Error> {
    let config = seat.config()?;
    let Some(process) = Container::new(seat.clone()).process() else {
        return Ok(());
    };
    if searches {
        for card in cards(&config)? {
            if !is_running(seat, card.index) {
                start(seat, &card, process.pid()).await?;
            }
        }
    }
    apply(seat, &config, process.pid()).await?;
    Ok(())
}
