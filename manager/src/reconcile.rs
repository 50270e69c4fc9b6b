// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The reconciler drives what is on this node towards what the store says. It takes no input and can run at any
//! time: a lost wake-up costs one tick.
//!
//! ```text
//! look (World) ──► decide (pure) ──► [Remedy] ──► apply, each under its guest's lock
//! ```
//!
//! Guests that run are adopted by looking: their processes, sockets and folders tell everything, so a daemon that
//! was killed has lost nothing. Not here: starting what a user asked for, which is a task.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use crate::cluster::GuestSummary;
use crate::error::Error;
use crate::guest::bulk::StartAll;
use crate::guest::container::Container;
use crate::guest::container::lxcfs;
use crate::guest::container::restart::{self, Row, Verdict};
use crate::guest::hold::Hold;
use crate::guest::site::Seat;
use crate::guest::snapshot::take;
use crate::guest::vm::{Vm, mirror, saved, suspend};
use crate::guest::{Action, Guests, Phase, disks, guest};
use crate::id::{GuestId, GuestKind};
use crate::network::Network;
use crate::storage::name::VolumeId;
use crate::task;

/// Time between two looks.
const TICK: Duration = Duration::from_secs(2);
/// Time between two looks at the network and at lxcfs, which nothing of ours changes meanwhile.
const NETWORK_EVERY: Duration = Duration::from_secs(30);
/// Who starts guests with the node.
const USER: &str = "root@pam";
/// Number of the host's present run; changes with every start of its kernel.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// What there is, as far as decisions need it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct World {
    /// Guests that have a config, or a folder of a run, on this node.
    pub guests: Vec<View>,
    /// The host has started since the last look, so guests with `onboot` are to be started.
    pub host_started: bool,
    /// This is the first look of this daemon: no task of it can have left anything half done.
    pub first: bool,
}

/// One guest of the world.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    /// VM or container.
    pub kind: GuestKind,
    /// Its number.
    pub id: GuestId,
    /// It has a config here.
    pub configured: bool,
    /// Its config says that it is to be started with the node.
    pub onboot: bool,
    /// Its config's key `lock`.
    pub lock: Option<String>,
    /// A task is at work on it.
    pub busy: bool,
    /// Where it is in its life.
    pub phase: Phase,
    /// It ended because it was rebooted from inside, or its config wants it started again when it ends.
    pub rebooted: bool,
    /// It is to be started again, but not yet; nothing is done with it meanwhile.
    pub waits: bool,
    /// It is held by a task, of this daemon or of one that is gone.
    pub held: bool,
}

impl View {
    fn is_startable(&self) -> bool {
        let is_down = !matches!(self.phase, Phase::Running { .. });
        is_down && self.configured && self.lock.is_none()
    }
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Remedy {
    /// Remove what an ended run left.
    CleanUp(GuestKind, GuestId),
    /// Start it.
    Start(GuestKind, GuestId),
    /// Start every guest that is to start with the node, in order.
    StartAll,
    /// Remove a guest whose creation was cut short by the end of the daemon.
    Discard(GuestKind, GuestId),
    /// Let a guest go on that a daemon was holding when it ended.
    LetGo(GuestKind, GuestId),
    /// Remove snapshots that a daemon was taking when it ended, or what there is of a suspension.
    Abandon(GuestKind, GuestId),
    /// End a machine that is suspended to disk, or keep it that goes on from there.
    Settle(GuestKind, GuestId),
}

/// The decision. Pure: the same world gives the same remedies, and a world without fault none.
pub fn decide(world: &World) -> Vec<Remedy> {
    let mut remedies = Vec::new();
    for view in world.guests.iter().filter(|view| !view.busy && !view.waits) {
        let (kind, id) = (view.kind, view.id);
        if view.phase == Phase::Ended {
            remedies.push(Remedy::CleanUp(kind, id));
        }
        if world.first && view.lock.as_deref() == Some("create") {
            remedies.push(Remedy::Discard(kind, id));
            continue;
        }
        let lock = view.lock.as_deref();
        let is_cut_off = lock == Some(take::LOCK) || lock == Some(suspend::LOCK);
        if lock == Some(saved::SUSPENDED) {
            if matches!(view.phase, Phase::Running { .. }) {
                remedies.push(Remedy::Settle(kind, id));
            }
        } else if world.first && is_cut_off {
            remedies.push(Remedy::Abandon(kind, id));
        } else if world.first && view.held {
            remedies.push(Remedy::LetGo(kind, id));
        }
        if view.is_startable() && view.rebooted {
            remedies.push(Remedy::Start(kind, id));
        }
    }
    if world.host_started
        && world
            .guests
            .iter()
            .any(|view| view.is_startable() && view.onboot)
    {
        remedies.push(Remedy::StartAll);
    }
    remedies
}

/// The node's reconciler: what it looks at and acts on.
#[derive(Debug)]
pub struct Reconciler {
    guests: Guests,
    network: Network,
    first: bool,
    network_at: Option<Instant>,
    /// Containers that were started again because their config wants that.
    restarts: HashMap<GuestId, Row>,
}

impl Reconciler {
    /// A reconciler that has not looked yet.
    pub fn new(guests: Guests, network: Network) -> Self {
        Self {
            guests,
            network,
            first: true,
            network_at: None,
            restarts: HashMap::new(),
        }
    }

    /// Runs until it is told to stop. Everything that it started stays.
    pub async fn run(mut self, stop: CancellationToken) {
        while !stop.is_cancelled() {
            self.tick().await;
            tokio::select! {
                () = tokio::time::sleep(TICK) => {}
                () = stop.cancelled() => {}
            }
        }
    }

    /// One look with its remedies. What fails is logged and tried again with the next tick.
    pub async fn tick(&mut self) {
        if self
            .network_at
            .is_none_or(|at| at.elapsed() >= NETWORK_EVERY)
        {
            self.network_at = Some(Instant::now());
            self.mend_views().await;
            if let Err(error) = self.network.ensure().await {
                tracing::warn!(error = error.chain(), "the guests' network is not complete");
            }
        }
        let world = match self.look() {
            Ok(world) => world,
            Err(error) => {
                return tracing::warn!(error = error.chain(), "cannot look at the guests");
            }
        };
        let remedies = decide(&world);
        for remedy in remedies.iter().copied() {
            if let Err(error) = self.apply(remedy).await {
                tracing::warn!(?remedy, error = error.chain(), "a remedy failed");
            }
        }
        if world.first && !remedies.contains(&Remedy::StartAll) {
            remember_boot(&self.boot_file());
        }
        self.first = false;
    }

    /// Looks whether lxcfs was restarted under containers that nobody works on.
    async fn mend_views(&self) {
        let site = self.guests.site();
        for (kind, id) in site.run_folders() {
            let Some(_guard) = site.locks.try_acquire(id) else {
                continue;
            };
            if kind == GuestKind::Container
                && let Err(error) = lxcfs::mend(&site.seat(kind, id)).await
            {
                tracing::warn!(guest = %id, error = error.chain(), "files of lxcfs");
            }
        }
    }

    /// Guests without a folder of a run have nothing to look at: a tick costs what runs, not what is configured.
    fn look(&mut self) -> Result<World, Error> {
        let site = self.guests.site().clone();
        let mut started = site.run_folders();
        let mut views = Vec::new();
        for summary in self.guests.summaries()? {
            let seat = site.seat(summary.kind, summary.id);
            let has_run = started.remove(&(summary.kind, summary.id));
            let mut view = view(&seat, Some(&summary), has_run);
            self.consider_restart(&seat, &mut view);
            views.push(view);
        }
        let left_over = started.into_iter();
        views.extend(left_over.map(|(kind, id)| view(&site.seat(kind, id), None, true)));
        Ok(World {
            guests: views,
            host_started: self.first && boot_id() != std::fs::read_to_string(self.boot_file()).ok(),
            first: self.first,
        })
    }

    /// Looks whether a container that has ended by itself is to be started again.
    fn consider_restart(&mut self, seat: &Seat, view: &mut View) {
        if view.phase != Phase::Ended
            || view.busy
            || view.rebooted
            || view.kind != GuestKind::Container
        {
            return;
        }
        let Some(ended) = Container::new(seat.clone()).ended_by_itself() else {
            return;
        };
        let (row, now) = (self.restarts.get(&view.id).copied(), Instant::now());
        let verdict = seat
            .config()
            .and_then(|config| restart::verdict(&config, ended, row, now));
        match verdict {
            Ok(Verdict::Start) => {
                view.rebooted = true;
                self.restarts.insert(view.id, restart::counted(row, now));
            }
            Ok(Verdict::Wait) => view.waits = true,
            Ok(Verdict::Stay) => drop(self.restarts.remove(&view.id)),
            Err(error) => tracing::warn!(guest = seat.title(), error = error.chain(), "restart"),
        }
    }

    async fn apply(&self, remedy: Remedy) -> Result<(), Error> {
        let (Remedy::CleanUp(kind, id)
        | Remedy::Start(kind, id)
        | Remedy::Discard(kind, id)
        | Remedy::LetGo(kind, id)
        | Remedy::Settle(kind, id)
        | Remedy::Abandon(kind, id)) = remedy
        else {
            return self.start_all();
        };
        let seat = self.guests.site().seat(kind, id);
        if let Remedy::Start(..) = remedy {
            let upid = self.guests.act(kind, id, Action::Start, USER)?;
            tracing::info!(%upid, "started with the node, or after a reboot from inside");
            return Ok(());
        }
        if let Remedy::Abandon(..) = remedy {
            let upid = self.guests.abandon_snapshots(kind, id, USER)?;
            tracing::info!(%upid, "a snapshot was cut off by the end of the daemon");
            return Ok(());
        }
        // Whoever has the lock now sees to the guest himself.
        let Some(_guard) = seat.site.locks.try_acquire(id) else {
            return Ok(());
        };
        let guest = guest(&seat);
        if !matches!(guest.phase(), Phase::Running { .. }) {
            guest.clean_up().await?;
        }
        match remedy {
            Remedy::Discard(..) => discard(&seat).await?,
            Remedy::Settle(..) => saved::settle(&Vm::new(seat.clone())).await?,
            Remedy::LetGo(..) => {
                if kind == GuestKind::Vm && guest.process().is_some() {
                    mirror::settle(&Vm::new(seat.clone()), &seat.config()?).await?;
                }
                Hold::left(&seat).release(&seat).await?;
            }
            _ => {}
        }
        tracing::info!(guest = seat.title(), ?remedy, "done");
        Ok(())
    }

    fn boot_file(&self) -> PathBuf {
        self.guests.site().settings.run_dir().join("boot-id")
    }

    /// The host's start is noted when all have started: a daemon that is killed meanwhile begins again.
    fn start_all(&self) -> Result<(), Error> {
        let upid = self.guests.start_all(StartAll::default(), USER)?;
        tracing::info!(%upid, "the host has started, and guests start with it");
        let (tasks, file) = (self.guests.tasks().clone(), self.boot_file());
        tokio::spawn(async move {
            let ended = tasks.wait(&upid).await;
            if ended.is_ok_and(|status| status != task::UNEXPECTED) {
                remember_boot(&file);
            }
        });
        Ok(())
    }
}

fn remember_boot(file: &Path) {
    let folder = file.parent().unwrap_or(file);
    let written = std::fs::create_dir_all(folder)
        .and_then(|()| std::fs::write(file, boot_id().unwrap_or_default()));
    if let Err(error) = written {
        tracing::warn!(%error, "cannot note the host's start: guests with 'onboot' may be started again");
    }
}

fn boot_id() -> Option<String> {
    std::fs::read_to_string(BOOT_ID).ok()
}

fn view(seat: &Seat, summary: Option<&GuestSummary>, has_run: bool) -> View {
    let phase = match has_run {
        true => guest(seat).phase(),
        false => Phase::Stopped,
    };
    let rebooted = seat.kind == GuestKind::Container
        && phase == Phase::Ended
        && Container::new(seat.clone()).wants_reboot();
    let held = has_run && Hold::left(seat).is_taken();
    View {
        kind: seat.kind,
        id: seat.id,
        configured: summary.is_some(),
        onboot: summary.is_some_and(|summary| summary.onboot),
        lock: summary.and_then(|summary| summary.lock.clone()),
        busy: seat.site.locks.is_held(seat.id),
        phase,
        rebooted,
        waits: false,
        held,
    }
}

/// Removes a guest that was never finished: every volume with its number, then the reservation.
async fn discard(seat: &Seat) -> Result<(), Error> {
    for section in seat.site.storage.sections()? {
        let Ok(storage) = seat.site.storage.open(&section.name) else {
            continue;
        };
        for volume in storage.list().await? {
            let volume = VolumeId {
                storage: section.name.clone(),
                name: volume.name,
            };
            disks::free_own(seat, &volume).await?;
        }
    }
    seat.delete_config().await
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view(id: &str) -> View {
        View {
            kind: GuestKind::Vm,
            id: id.parse().unwrap(),
            configured: true,
            onboot: false,
            lock: None,
            busy: false,
            phase: Phase::Stopped,
            rebooted: false,
            waits: false,
            held: false,
        }
    }

    #[track_caller]
    fn check(world: &World, expected: &[Remedy]) {
        assert_eq!(decide(world), expected);
    }

    fn world(guests: Vec<View>) -> World {
        World {
            guests,
            ..World::default()
        }
    }

    #[test]
    fn a_world_without_fault_is_left_alone() {
        let running = View {
            phase: Phase::Running { pid: 1 },
            onboot: true,
            ..view("101")
        };
        check(&world(vec![view("100"), running.clone()]), &[]);
        let started = World {
            host_started: true,
            first: true,
            ..world(vec![view("100"), running])
        };
        check(&started, &[]);
    }

    #[test]
    fn ended_guests_are_cleaned_up_unless_a_task_does() {
        let ended = View {
            phase: Phase::Ended,
            configured: false,
            ..view("100")
        };
        let busy = View {
            busy: true,
            ..ended.clone()
        };
        check(&world(vec![busy]), &[]);
        check(
            &world(vec![ended.clone()]),
            &[Remedy::CleanUp(GuestKind::Vm, ended.id)],
        );
    }

    #[test]
    fn guests_start_with_the_host_but_not_with_the_daemon() {
        let onboot = View {
            onboot: true,
            ..view("100")
        };
        let locked = View {
            lock: Some("backup".to_owned()),
            ..onboot.clone()
        };
        let world = |guest: &View, host_started| World {
            guests: vec![guest.clone()],
            host_started,
            first: true,
        };
        check(&world(&onboot, true), &[Remedy::StartAll]);
        check(&world(&onboot, false), &[]);
        check(&world(&locked, true), &[]);
    }

    #[test]
    fn a_reboot_from_inside_starts_again() {
        let rebooted = View {
            kind: GuestKind::Container,
            phase: Phase::Ended,
            rebooted: true,
            ..view("101")
        };
        let (kind, id) = (rebooted.kind, rebooted.id);
        check(
            &world(vec![rebooted]),
            &[Remedy::CleanUp(kind, id), Remedy::Start(kind, id)],
        );
    }

    #[test]
    fn what_waits_is_left_alone() {
        let waits = View {
            phase: Phase::Ended,
            waits: true,
            ..view("101")
        };
        check(&world(vec![waits]), &[]);
    }

    #[test]
    fn unfinished_creations_go_when_the_daemon_comes_back() {
        let draft = View {
            lock: Some("create".to_owned()),
            ..view("100")
        };
        let id = draft.id;
        check(&world(vec![draft.clone()]), &[]);
        let first = World {
            first: true,
            ..world(vec![draft])
        };
        check(&first, &[Remedy::Discard(GuestKind::Vm, id)]);
    }

    #[test]
    fn a_suspension_is_brought_to_its_end() {
        let suspended = View {
            phase: Phase::Running { pid: 1 },
            held: true,
            lock: Some("suspended".to_owned()),
            ..view("100")
        };
        let (kind, id) = (suspended.kind, suspended.id);
        for first in [false, true] {
            let world = |view: &View| World {
                first,
                ..world(vec![view.clone()])
            };
            check(&world(&suspended), &[Remedy::Settle(kind, id)]);
            let ended = View {
                phase: Phase::Ended,
                ..suspended.clone()
            };
            check(&world(&ended), &[Remedy::CleanUp(kind, id)]);
            let unfinished = View {
                lock: Some("suspending".to_owned()),
                ..suspended.clone()
            };
            let abandoned = [Remedy::Abandon(kind, id)];
            check(&world(&unfinished), if first { &abandoned } else { &[] });
        }
    }

    #[test]
    fn what_a_killed_daemon_held_goes_on() {
        let held = View {
            phase: Phase::Running { pid: 1 },
            held: true,
            ..view("100")
        };
        let (kind, id) = (held.kind, held.id);
        let snapshot = View {
            lock: Some("snapshot".to_owned()),
            ..held.clone()
        };
        let busy = View {
            busy: true,
            ..snapshot.clone()
        };
        let first = |guest: &View| World {
            first: true,
            ..world(vec![guest.clone()])
        };
        check(&first(&held), &[Remedy::LetGo(kind, id)]);
        check(&first(&snapshot), &[Remedy::Abandon(kind, id)]);
        check(&first(&busy), &[]);
        check(&world(vec![held, snapshot]), &[]);
    }
}
