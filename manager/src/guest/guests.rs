// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The handle on the guests of this node: every request of the API about guests ends here, most of them as a task.

use std::sync::{Arc, Mutex};

use atoll_vmm_protocol::api::Request;

use crate::cluster::{Cluster, GuestSummary, Inventory};
use crate::error::Error;
use crate::guest::bulk::{self, StartAll, StopAll};
use crate::guest::clone::{self, Cloning, Wish};
use crate::guest::config::{Applied, ConfigUpdate};
use crate::guest::container::health::Health;
use crate::guest::create::{Draft, Params};
use crate::guest::destroy::{self, Destroy};
use crate::guest::lock::Guard;
use crate::guest::move_disk::{self, Move};
use crate::guest::resize::{self, Resize};
use crate::guest::site::{Seat, Site};
use crate::guest::snapshot::roll_back::RollBack;
use crate::guest::snapshot::take::Take;
use crate::guest::status::{self, CpuMeter, RunningCache, RunningGuests, Status};
use crate::guest::vm::capabilities::{CpuModel, CpuModels};
use crate::guest::vm::suspend::Suspend;
use crate::guest::vm::{Vm, saved};
use crate::guest::{
    Ask, Console, Guest, Phase, container, guest, shutdown, snapshot, start, start_from, stop,
    stored, template, update, view, vm,
};
use crate::id::{GuestId, GuestKind};
use crate::network::interfaces::{self, Inner};
use crate::storage::name::StorageName;
use crate::task::{NewTask, TaskContext, Tasks, Upid, run_steps};

/// Parameters of a creation that are no config keys.
const CREATION_ONLY: &[&str] = &[
    "vmid",
    "ostemplate",
    "password",
    "ssh-public-keys",
    "start",
    "storage",
    "pool",
    "force",
    "restore",
    "unique",
    "bwlimit",
    "ignore-unpack-errors",
    "archive",
    "live-restore",
    "ha-managed",
    "node",
    container::import::PARAMETER,
];
/// Those of them that nothing here can do yet; asked for, they are refused rather than dropped.
const NOT_YET: &[&str] = &["archive", "restore", "live-restore", "pool", "ha-managed"];
/// Size of a container's root disk when none is given, in GiB: PVE's default.
const ROOT_GIB: u32 = 4;

/// What can be done with a guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Action {
    /// Start it.
    Start,
    /// End it at once.
    Stop,
    /// Ask it to shut down.
    Shutdown(Ask),
    /// Ask it to shut down, then start it.
    Reboot(Ask),
    /// Press the reset button; virtual machines only.
    Reset,
    /// Hold its CPUs.
    Suspend,
    /// Let it go on.
    Resume,
}

/// See the module. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Guests {
    site: Arc<Site>,
    tasks: Tasks,
    meter: Arc<CpuMeter>,
    cluster: Cluster,
    running: Arc<RunningCache>,
    cpu_models: Arc<CpuModels>,
    /// The last listing. Held for a comparison, or while one thread makes a new listing from what others wait for.
    listed: Arc<Mutex<Listed>>,
}

/// A listing, with what it was made of.
#[derive(Debug, Default)]
struct Listed {
    inventory: Arc<Inventory>,
    running: Arc<RunningGuests>,
    guests: Arc<[Status]>,
}

impl Guests {
    /// The guests of a site, with their work done as `tasks`.
    pub fn new(site: Arc<Site>, tasks: Tasks, cluster: Cluster) -> Self {
        Self {
            site,
            tasks,
            meter: Arc::default(),
            cluster,
            running: Arc::default(),
            cpu_models: Arc::default(),
            listed: Arc::default(),
        }
    }

    /// The tasks that their work is done as.
    pub fn tasks(&self) -> &Tasks {
        &self.tasks
    }

    /// What they stand on.
    pub fn site(&self) -> &Arc<Site> {
        &self.site
    }

    /// The CPU models that VMs can be given on this node, `host` first. Runs `atoll-vmm`, unless it has told them before.
    pub async fn cpu_models(&self) -> Result<Arc<[CpuModel]>, Error> {
        self.cpu_models.get(&self.site.program("atoll-vmm")).await
    }

    /// Creates a guest: task `qmcreate` or `vzcreate`.
    pub fn create(
        &self,
        kind: GuestKind,
        id: GuestId,
        params: Params,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let seat = self.site.seat(kind, id);
        stored::refuse_taken(self.site.store.as_ref(), id)?;
        if let Some(key) = NOT_YET.iter().find(|key| params.contains_key(**key)) {
            return Err(Error::invalid(*key, "is not supported yet"));
        }
        let starts = params.get("start").is_some_and(|value| value == "1");
        let new = NewTask::new(word(kind, "qmcreate", "vzcreate"), id, user);
        match kind {
            GuestKind::Vm => {
                let mut keys = config_keys(&params);
                let firmware = &self.site.settings.firmware_dir;
                let completed = vm::boot::complete(&mut keys, firmware);
                let mut draft = Draft::new(seat.clone(), keys)?;
                self.tasks.spawn(new, async move |task: TaskContext| {
                    if let Some(said) = completed {
                        task.log(&said);
                    }
                    run_steps(vm::create::STEPS, &mut draft, &task).await?;
                    if let Err(error) = vm::boot::way(id, &seat.config()?) {
                        task.warn(&error.to_string());
                    }
                    // The lock is free again before the start asks for it.
                    drop(draft);
                    if starts {
                        start(&seat, &task).await
                    } else {
                        Ok(())
                    }
                })
            }
            GuestKind::Container => {
                let mut create = container_draft(seat.clone(), &params)?;
                self.tasks.spawn(new, async move |task: TaskContext| {
                    run_steps(container::create::STEPS, &mut create, &task).await?;
                    drop(create);
                    if starts {
                        start(&seat, &task).await
                    } else {
                        Ok(())
                    }
                })
            }
        }
    }

    /// Does something with a guest, as a task.
    pub fn act(
        &self,
        kind: GuestKind,
        id: GuestId,
        action: Action,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let seat = self.site.seat(kind, id);
        seat.config()?;
        if kind == GuestKind::Container && action == Action::Reset {
            return Err(Error::refused(
                "a container has no reset button, use reboot",
            ));
        }
        let name = match action {
            Action::Start => word(kind, "qmstart", "vzstart"),
            Action::Stop => word(kind, "qmstop", "vzstop"),
            Action::Shutdown(_) => word(kind, "qmshutdown", "vzshutdown"),
            Action::Reboot(_) => word(kind, "qmreboot", "vzreboot"),
            Action::Reset => "qmreset",
            Action::Suspend => word(kind, "qmpause", "vzsuspend"),
            Action::Resume => word(kind, "qmresume", "vzresume"),
        };
        self.tasks.spawn(
            NewTask::new(name, id, user),
            async move |task: TaskContext| match action {
                Action::Start => start(&seat, &task).await,
                Action::Stop => stop(&seat, Ask::default(), &task).await,
                Action::Shutdown(ask) => shutdown(&seat, ask, &task).await,
                Action::Reboot(ask) => {
                    shutdown(&seat, ask, &task).await?;
                    start(&seat, &task).await
                }
                Action::Reset => {
                    let _held = hold_running(&seat).await?;
                    Vm::new(seat).act(Request::Reset).await
                }
                Action::Suspend => {
                    let (_guard, guest) = hold_running(&seat).await?;
                    guest.pause().await
                }
                Action::Resume if is_suspended(&seat)? => start(&seat, &task).await,
                Action::Resume => {
                    let (_guard, guest) = hold_running(&seat).await?;
                    guest.resume().await
                }
            },
        )
    }

    /// Removes a guest with its disks: task `qmdestroy` or `vzdestroy`. A running one is refused unless `force`.
    pub fn destroy(
        &self,
        kind: GuestKind,
        id: GuestId,
        force: bool,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let seat = self.site.seat(kind, id);
        seat.config()?;
        let new = NewTask::new(word(kind, "qmdestroy", "vzdestroy"), id, user);
        self.tasks
            .spawn_steps(new, destroy::STEPS, Destroy::new(seat, force))
    }

    /// Changes a guest's config and answers when that is done.
    pub async fn update(
        &self,
        kind: GuestKind,
        id: GuestId,
        update: ConfigUpdate,
    ) -> Result<Applied, Error> {
        update::update(&self.site.seat(kind, id), update, None).await
    }

    /// The same as a task, `qmconfig` or `vzconfig`.
    pub fn update_as_task(
        &self,
        kind: GuestKind,
        id: GuestId,
        update: ConfigUpdate,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let seat = self.site.seat(kind, id);
        seat.config()?.check_digest(update.digest.as_deref())?;
        let new = NewTask::new(word(kind, "qmconfig", "vzconfig"), id, user);
        self.tasks.spawn(new, async move |task: TaskContext| {
            let applied = update::update(&seat, update, Some(&task)).await?;
            for (key, _, value) in &applied.now {
                let value = value.as_ref().map(|value| match key.as_str() {
                    view::SECRET => view::HIDDEN,
                    _ => value.as_str(),
                });
                task.log(&format!(
                    "update {}: {key}: {}",
                    seat.title(),
                    value.unwrap_or("(removed)")
                ));
            }
            for key in &applied.pending {
                task.log(&format!("{key} changes at the next start"));
            }
            Ok(())
        })
    }

    /// Grows a disk: task `resize`.
    pub fn resize(
        &self,
        kind: GuestKind,
        id: GuestId,
        disk: &str,
        size: &str,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let seat = self.site.seat(kind, id);
        seat.config()?;
        let resize = Resize::new(seat, disk.to_owned(), size.to_owned());
        self.tasks
            .spawn_steps(NewTask::new("resize", id, user), resize::STEPS, resize)
    }

    /// Moves a disk to another storage or format: task `qmmove` or `move_volume`.
    pub fn move_disk(
        &self,
        kind: GuestKind,
        id: GuestId,
        wish: move_disk::Wish,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let seat = self.site.seat(kind, id);
        seat.config()?;
        let new = NewTask::new(word(kind, "qmmove", "move_volume"), id, user);
        let deletes = wish.deletes;
        let mut moving = Move::new(seat.clone(), wish);
        self.tasks.spawn(new, async move |task: TaskContext| {
            run_steps(move_disk::STEPS, &mut moving, &task).await?;
            moving.let_go().await?;
            if deletes && let Err(error) = moving.delete_former().await {
                task.warn(&format!("the former volume is kept: {}", error.chain()));
            }
            Ok(())
        })
    }

    /// Takes a snapshot: task `qmsnapshot` or `vzsnapshot`.
    pub fn snapshot(
        &self,
        kind: GuestKind,
        id: GuestId,
        name: &str,
        description: &str,
        with_memory: bool,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let seat = self.site.seat(kind, id);
        snapshot::check_name(name)?;
        if seat.config()?.sections.contains_key(name) {
            return Err(Error::refused(format!(
                "snapshot name '{name}' already used"
            )));
        }
        let new = NewTask::new(word(kind, "qmsnapshot", "vzsnapshot"), id, user);
        let mut take = Take::new(seat, name.to_owned(), description.to_owned());
        if with_memory {
            take = take.with_memory();
        }
        self.tasks.spawn_steps(new, snapshot::take::STEPS, take)
    }

    /// Writes a machine's memory to a volume and ends it; its next start goes on from there. Task `qmsuspend`.
    pub fn suspend_to_disk(
        &self,
        id: GuestId,
        storage: Option<StorageName>,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let seat = self.site.seat(GuestKind::Vm, id);
        seat.config()?;
        let suspend = Suspend::new(seat, storage);
        let new = NewTask::new("qmsuspend", id, user);
        self.tasks.spawn(new, async move |task: TaskContext| {
            vm::suspend::run(suspend, &task).await
        })
    }

    /// Takes a guest back to a snapshot, and starts it then if `starts`, or if the snapshot has its memory: task `qmrollback` or `vzrollback`.
    pub fn roll_back(
        &self,
        kind: GuestKind,
        id: GuestId,
        name: &str,
        starts: bool,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let seat = self.site.seat(kind, id);
        snapshot::find(&seat.config()?, name)?;
        let new = NewTask::new(word(kind, "qmrollback", "vzrollback"), id, user);
        let mut back = RollBack::new(seat.clone(), name.to_owned());
        self.tasks.spawn(new, async move |task: TaskContext| {
            run_steps(snapshot::roll_back::STEPS, &mut back, &task).await?;
            let memory = back.memory();
            // The lock is free again before the start asks for it.
            drop(back);
            match starts || memory.is_some() {
                true => start_from(&seat, memory, &task).await,
                false => Ok(()),
            }
        })
    }

    /// Removes a snapshot: task `qmdelsnapshot` or `vzdelsnapshot`.
    pub fn delete_snapshot(
        &self,
        kind: GuestKind,
        id: GuestId,
        name: &str,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let seat = self.site.seat(kind, id);
        snapshot::find(&seat.config()?, name)?;
        let new = NewTask::new(word(kind, "qmdelsnapshot", "vzdelsnapshot"), id, user);
        let delete = snapshot::delete::Delete::new(seat, name.to_owned());
        self.tasks.spawn_steps(new, snapshot::delete::STEPS, delete)
    }

    /// Removes what a killed daemon has left of snapshots: task `qmdelsnapshot` or `vzdelsnapshot`.
    pub fn abandon_snapshots(
        &self,
        kind: GuestKind,
        id: GuestId,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let seat = self.site.seat(kind, id);
        let new = NewTask::new(word(kind, "qmdelsnapshot", "vzdelsnapshot"), id, user);
        let abandon = snapshot::abandon::Abandon::new(seat);
        self.tasks
            .spawn_steps(new, snapshot::abandon::STEPS, abandon)
    }

    /// Changes the notes of a snapshot.
    pub async fn describe_snapshot(
        &self,
        kind: GuestKind,
        id: GuestId,
        name: &str,
        description: &str,
    ) -> Result<(), Error> {
        snapshot::describe(&self.site.seat(kind, id), name, description).await
    }

    /// Makes a guest of its own from another one: task `qmclone` or `vzclone`.
    pub fn clone_guest(
        &self,
        kind: GuestKind,
        id: GuestId,
        new_id: GuestId,
        wish: Wish,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let source = self.site.seat(kind, id);
        let config = source.config()?;
        if let Some(name) = &wish.snapshot {
            snapshot::find(&config, name)?;
        }
        if stored::find(self.site.store.as_ref(), new_id)?.is_some() {
            return Err(Error::refused(format!(
                "unable to create {} {new_id}: config file already exists",
                kind.title()
            )));
        }
        let clone = Cloning::new(source, self.site.seat(kind, new_id), wish)?;
        let new = NewTask::new(word(kind, "qmclone", "vzclone"), id, user);
        self.tasks.spawn_steps(new, clone::STEPS, clone)
    }

    /// Gives a container another image, from a template that is an OCI archive: task `vzupdate`. Atoll's own.
    pub fn update_image(
        &self,
        id: GuestId,
        template: &str,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let seat = self.site.seat(GuestKind::Container, id);
        seat.config()?;
        let template = template
            .parse()
            .map_err(|e| Error::invalid("ostemplate", format!("{e}")))?;
        let renew = container::renew::Renew::new(seat, template);
        let new = NewTask::new("vzupdate", id, user);
        self.tasks.spawn_steps(new, container::renew::STEPS, renew)
    }

    /// Writes an image to an archive in a storage: task `ociexport`.
    pub fn export_image(
        &self,
        export: container::export::Export,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let site = self.site.clone();
        let new = NewTask::new("ociexport", export.to.to_string(), user);
        self.tasks.spawn(new, async move |task: TaskContext| {
            container::export::export(&site, export, &task).await
        })
    }

    /// Makes a guest a template: task `qmtemplate` or `vztemplate`.
    pub fn make_template(
        &self,
        kind: GuestKind,
        id: GuestId,
        user: impl ToString,
    ) -> Result<Upid, Error> {
        let seat = self.site.seat(kind, id);
        seat.config()?;
        let new = NewTask::new(word(kind, "qmtemplate", "vztemplate"), id, user);
        self.tasks
            .spawn(new, async move |_| template::convert(&seat).await)
    }

    /// Starts guests of this node in their order: task `startall`, and one for each.
    pub fn start_all(&self, wish: StartAll, user: impl ToString) -> Result<Upid, Error> {
        let (guests, user) = (self.clone(), user.to_string());
        // It takes no worker: it waits for tasks that need one.
        let new = NewTask::new("startall", "", &user).free();
        self.tasks.spawn(new, async move |task: TaskContext| {
            bulk::start_all(&guests, &wish, &user, &task).await
        })
    }

    /// Shuts guests of this node down, the last to start first: task `stopall`, and one for each.
    pub fn stop_all(&self, wish: StopAll, user: impl ToString) -> Result<Upid, Error> {
        let (guests, user) = (self.clone(), user.to_string());
        let new = NewTask::new("stopall", "", &user).free();
        self.tasks.spawn(new, async move |task: TaskContext| {
            bulk::stop_all(&guests, &wish, &user, &task).await
        })
    }

    /// One guest.
    pub async fn status(&self, kind: GuestKind, id: GuestId) -> Result<Status, Error> {
        status::read(&self.site.seat(kind, id), &self.meter).await
    }

    /// All guests of this node, by number. Cheap: configs are those of the cluster's inventory, what runs is looked for
    /// at most every few seconds, or after a task has ended, and when neither is new, the answer is the former one.
    pub async fn list(&self) -> Result<Arc<[Status]>, Error> {
        let inventory = self.cluster.guests()?;
        let ended = self.tasks.ended_count();
        let running = self.running.get(&self.site, &self.meter, ended).await;
        let mut listed = self.listed.lock().unwrap_or_else(|e| e.into_inner());
        let is_new =
            !Arc::ptr_eq(&listed.inventory, &inventory) || !Arc::ptr_eq(&listed.running, &running);
        if is_new {
            let node = &self.site.settings.node;
            let here = inventory.guests.iter().filter(|guest| guest.node == *node);
            let status = |guest: &Arc<GuestSummary>| {
                Status::new(guest, running.get(&(guest.kind, guest.id)))
            };
            let guests = here.map(status).collect();
            *listed = Listed {
                inventory,
                running,
                guests,
            };
        }
        Ok(Arc::clone(&listed.guests))
    }

    /// What the configs of this node's guests say, by number.
    pub fn summaries(&self) -> Result<Vec<Arc<GuestSummary>>, Error> {
        let inventory = self.cluster.guests()?;
        let node = &self.site.settings.node;
        let here = inventory.guests.iter().filter(|guest| guest.node == *node);
        Ok(here.cloned().collect())
    }

    /// Whether a running guest's CPUs are held. Asks the guest's process.
    pub async fn is_paused(&self, kind: GuestKind, id: GuestId) -> bool {
        guest(&self.site.seat(kind, id)).is_paused().await
    }

    /// What the watch knows of a running container that has a health command.
    pub fn health(&self, id: GuestId) -> Option<Health> {
        let seat = self.site.seat(GuestKind::Container, id);
        let process = guest(&seat).process()?;
        self.site.health.get(id, process.pid())
    }

    /// Where a running guest's console is.
    pub fn console(&self, kind: GuestKind, id: GuestId) -> Result<Console, Error> {
        let seat = self.site.seat(kind, id);
        seat.config()?;
        let guest = guest(&seat);
        match guest.phase() {
            Phase::Running { .. } => guest.console(),
            _ => Err(Error::refused(format!("{} not running", seat.title()))),
        }
    }

    /// A running container's interfaces, as they are inside.
    pub async fn interfaces(&self, id: GuestId) -> Result<Vec<Inner>, Error> {
        let seat = self.site.seat(GuestKind::Container, id);
        seat.config()?;
        match guest(&seat).phase() {
            Phase::Running { pid } => interfaces::of_process(pid).await,
            _ => Err(Error::refused(format!("{} not running", seat.title()))),
        }
    }

    /// Whether any guest of this node runs.
    pub fn any_running(&self) -> Result<bool, Error> {
        let mut guests = self.site.guests()?.into_iter();
        Ok(guests.any(|(kind, id)| {
            let seat = self.site.seat(kind, id);
            matches!(guest(&seat).phase(), Phase::Running { .. })
        }))
    }

    /// Tells a line of a guest's console the size of the terminal.
    pub async fn resize_console(
        &self,
        kind: GuestKind,
        id: GuestId,
        tty: Option<u8>,
        (columns, rows): (u16, u16),
    ) -> Result<(), Error> {
        guest(&self.site.seat(kind, id))
            .resize_console(tty, columns, rows)
            .await
    }
}

fn is_suspended(seat: &Seat) -> Result<bool, Error> {
    Ok(seat.config()?.get("lock") == Some(saved::SUSPENDED))
}

/// A running guest, which nobody else works on while the guard lives.
async fn hold_running(seat: &Seat) -> Result<(Guard, Box<dyn Guest>), Error> {
    let guard = seat.lock().await?;
    seat.unlocked()?;
    let guest = guest(seat);
    if guest.process().is_none() {
        return Err(Error::refused(format!("{} not running", seat.title())));
    }
    Ok((guard, guest))
}

fn word(kind: GuestKind, vm: &'static str, container: &'static str) -> &'static str {
    match kind {
        GuestKind::Vm => vm,
        GuestKind::Container => container,
    }
}

fn config_keys(params: &Params) -> Params {
    let keys = params
        .iter()
        .filter(|(key, _)| !CREATION_ONLY.contains(&key.as_str()));
    keys.map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

fn container_draft(seat: Seat, params: &Params) -> Result<container::create::Create, Error> {
    let given = |key: &str| params.get(key).cloned();
    let template = given("ostemplate").unwrap_or_default();
    let template = template
        .parse()
        .map_err(|e| Error::invalid("ostemplate", format!("{e}")))?;
    let storage = given("storage").unwrap_or_else(|| "local".to_owned());
    let (mut keys, mut raw) = (Params::new(), Vec::new());
    if let Some(text) = given(container::import::PARAMETER) {
        let imported = container::import::import(&text, &storage)?;
        (keys, raw) = (imported.keys, imported.raw);
    }
    keys.extend(config_keys(params));
    keys.entry("rootfs".to_owned())
        .or_insert_with(|| format!("{storage}:{ROOT_GIB}"));
    // Unprivileged unless somebody asks otherwise, and written down, since an old config without the key is not.
    keys.entry("unprivileged".to_owned())
        .or_insert_with(|| "1".to_owned());
    let mut draft = Draft::new(seat, keys)?;
    draft.raw = raw;
    Ok(container::create::Create::new(
        draft,
        template,
        given("password"),
        given("ssh-public-keys"),
    ))
}
