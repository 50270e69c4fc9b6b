// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The request `upgrade`: the owner's part of a move to another process of this host that goes on with everything as it
//! is open (`crate::migration::local`, `belongings`). Otherwise it is a move like others (`handover`).
//!
//! Two processes have the same sockets then, and what one accepts or reads the other does not get. So the old one takes
//! nothing more of them from the moment in which the guest is held, until it is known whose the machine is.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use atoll_devices::virtio::Act;
use atoll_disk::chain;
use atoll_thread::Kind;
use atoll_vmm_protocol::api::{MachineState, MigrationInfo, Upgrade, WhenLate};
use atoll_vmm_protocol::spec::ConsoleSpec;
use rustix::termios::isatty;

use super::belongings::{self, Belongings};
use super::handover::{Migration, MigrationEvent};
use super::owner::Machine;
use crate::api::{self, Answer, Asked};
use crate::memory;
use crate::migration::Hello;
use crate::migration::converge::Convergence;
use crate::migration::local::{self, Frame};
use crate::migration::source::{Plan, Progress};

impl Machine {
    /// Begins to hand the machine on.
    pub(super) fn upgrade(&mut self, asked: Asked) -> Answer {
        match self.begin_upgrade(asked) {
            Ok(info) => api::json(200, &info),
            Err(refused) => refused,
        }
    }

    fn begin_upgrade(&mut self, mut asked: Asked) -> Result<MigrationInfo, Answer> {
        if let Some(text) = self.upgrade_obstacle() {
            return Err(api::refusal(409, text));
        }
        self.refuse_while_exporting()?;
        let failed = |error: &dyn std::error::Error| api::refusal(500, chain(error));
        let control = asked.file("the connection with the new process")?;
        let report = asked.file("the connection for the report")?;
        let [control, report] = [control, report].map(|file| UnixStream::from(OwnedFd::from(file)));
        let body: Upgrade = api::body(asked.body)?;
        let belongings = self.all_belongings().map_err(|error| failed(&error))?;
        let hello = Hello::new(
            self.spec.clone(),
            &self.parts.first_cpu(),
            0,
            Vec::new(),
            None,
        );
        let slots = self.parts.backplane.places();
        let slots = slots.map(|(name, slot)| (name.to_owned(), slot));
        let frame = Frame::new(
            slots.collect(),
            &self.parts.cpuid,
            hello.feature_msrs.clone(),
        );
        let plan = Plan {
            control: control.try_clone().map_err(|error| failed(&error))?,
            data: Vec::new(),
            lines: Vec::new(),
            disks: Vec::new(),
            // Nothing is copied that would have to converge.
            convergence: Convergence {
                downtime_limit: Duration::ZERO,
                max_bytes_per_second: None,
                throttle: false,
                when_late: WhenLate::default(),
            },
            relayed: false,
        };
        let progress = Arc::new(Progress::new(&plan).map_err(|error| failed(&error))?);
        drop(plan);
        self.tracked = None;
        let (shared, owner) = (progress.clone(), self.voice());
        let work = move || {
            let done = local::run(control, (hello, frame), &belongings, &shared, &owner);
            drop(belongings);
            owner.tell(MigrationEvent::Done(done));
        };
        let thread = atoll_thread::spawn(Kind::Migration, "migrate", work);
        thread.map_err(|error| failed(&error))?;
        tracing::info!(name = self.spec.name, to = body.to, "upgrade begins");
        let info = progress.info();
        self.migration = Some(Migration::of_upgrade(progress, report));
        Ok(info)
    }

    /// Why the machine cannot go on in another process, before anything is done about it.
    fn upgrade_obstacle(&self) -> Option<String> {
        if self.state != MachineState::Running {
            return Some("the machine does not run: resume it first".to_owned());
        }
        if let Some(text) = belongings::obstacle(&self.spec) {
            return Some(text);
        }
        if let Some(text) = self.parts.obstacle(Act::Snapshot) {
            return Some(text);
        }
        let stdio = [Some(&self.spec.serial), self.spec.console.as_ref()];
        if stdio.contains(&Some(&ConsoleSpec::Stdio)) && isatty(io::stdin()) {
            let text = "its console is a terminal whose shell waits for this process: start it with --console pty or socket=PATH";
            return Some(text.to_owned());
        }
        let kept = self.parts.kept.as_ref()?;
        let missing = kept.missing(&belongings::expected(&self.spec))?;
        Some(format!(
            "{missing} cannot go along: it is not what the machine was started with, or there is none"
        ))
    }

    /// Other handles of all that the machine has.
    fn all_belongings(&self) -> io::Result<Belongings> {
        let kept = self.parts.kept.as_ref().map(Belongings::try_clone);
        let mut all = kept.transpose()?.unwrap_or_default();
        let copy = |stream: &dyn AsFd| stream.as_fd().try_clone_to_owned();
        let streams = [
            copy(&io::stdin())?,
            copy(&io::stdout())?,
            copy(&io::stderr())?,
        ];
        all.insert(belongings::STREAMS, streams.into());
        if let Some(file) = memory::file_of(&self.parts.memory) {
            all.insert(belongings::MEMORY, vec![file.try_clone()?.into()]);
        }
        Ok(all)
    }

    /// Whether the machine is on its way to a process that has all that this one has open.
    pub(super) fn is_upgrading(&self) -> bool {
        let migration = self.migration.as_ref();
        migration.is_some_and(Migration::is_upgrade)
    }

    /// Whether it is there.
    pub(super) fn is_handed_on(&self) -> bool {
        self.is_upgrading() && self.migration.as_ref().is_some_and(Migration::has_moved)
    }

    /// Takes nothing more of those who talk to the machine.
    pub(super) fn leave_clients(&self) {
        if let Some(gate) = &self.gate {
            gate.shut();
        }
        let consoles = self.parts.consoles.iter();
        consoles.for_each(|console| console.set_deaf(true));
    }

    /// Does so again, if the machine has stayed.
    pub(super) fn end_upgrade(&self) {
        if !self.is_upgrading() || self.is_handed_on() {
            return;
        }
        self.hear_clients();
    }

    /// Ends what is left here of a machine that has been handed on: what the guest had written is shown to whoever looks;
    /// nothing is closed, removed or set back that is the other process's now. The caller's process ends.
    pub(super) fn leave(mut self) {
        drop(std::mem::take(&mut self.parts.consoles));
        std::mem::forget(self);
    }
}
