// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Task `vzupdate`: a container gets another image, mostly a newer one of the same name. Its mount points stay as they
//! are; what it has changed in the image's own files goes, as with every engine. A snapshot is taken first and stays;
//! when the container does not work afterwards, it is taken back to it and started again.

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::container::image::{self, Settings};
use crate::guest::container::{health, mount, unmount_below};
use crate::guest::site::Seat;
use crate::guest::snapshot::delete::{self, Delete};
use crate::guest::snapshot::roll_back::{self, RollBack};
use crate::guest::snapshot::take::{self, Take};
use crate::guest::{Ask, Phase, disks, guest, shutdown, start};
use crate::oci::image::Image;
use crate::oci::{Hold, ImageError};
use crate::step;
use crate::storage::name::VolumeId;
use crate::task::{TaskContext, TaskStep, run_steps};

/// Digits of the digest in the snapshot's name.
const DIGITS: usize = 12;
/// Keys that come from an image.
const KEYS: &[&str] = &["entrypoint", "env", "health-command", "health"];

/// What the steps hand on.
#[derive(Debug)]
pub struct Renew {
    seat: Seat,
    template: VolumeId,
    /// Keeps the new image until the config names it.
    hold: Option<Hold>,
    new: Option<(Image, Settings)>,
    /// What the present image said, to tell it from what the user said.
    old: Settings,
    snapshot: Option<String>,
    ran: bool,
    exchanged: bool,
}

impl Renew {
    /// An image from this archive for the container on this seat.
    pub fn new(seat: Seat, template: VolumeId) -> Self {
        Self {
            seat,
            template,
            hold: None,
            new: None,
            old: Settings::default(),
            snapshot: None,
            ran: false,
            exchanged: false,
        }
    }

    fn runs(&self) -> bool {
        matches!(guest(&self.seat).phase(), Phase::Running { .. })
    }
}

/// The table.
pub const STEPS: &[TaskStep<Renew>] = &[
    step!("take the image in", take_in),
    step!("take a snapshot", take_snapshot, undo remove_snapshot),
    step!("stop the container", stop, undo start_again),
    step!("exchange the image", exchange, undo go_back),
    step!("start the container", start_new),
    step!("wait until it works", wait),
];

async fn take_in(renew: &mut Renew, task: &TaskContext) -> Result<(), Error> {
    let site = &renew.seat.site;
    let config = renew.seat.unlocked()?.config;
    let title = renew.seat.title();
    let present = image::digest(&config)?;
    let present =
        present.ok_or_else(|| Error::refused(format!("{title} is not made from an image")))?;
    if !image::is_archive(&renew.template) {
        return Err(Error::invalid("ostemplate", "this volume is no OCI image"));
    }
    let archive = site.storage.path(&renew.template).await?;
    let images = site.images.clone();
    renew.hold = Some(images.hold().await);
    let (log, old) = (task.clone(), present.clone());
    let work = tokio::task::spawn_blocking(move || {
        let new = images.take_in(&archive, &|line| log.log(line))?;
        let settings = |image: &Image| image::settings(image, &images.layers(image));
        let (old, said) = (settings(&images.get(&old)?)?, settings(&new)?);
        Ok::<_, ImageError>((old, new, said))
    });
    let (old, new, said) = work
        .await
        .map_err(|e| Error::failed("take the image in", e))??;
    if new.digest == present {
        return Err(Error::refused(format!(
            "{title} has this image already: {present}"
        )));
    }
    task.log(&format!("from {present} to {}", new.digest));
    renew.old = old;
    renew.new = Some((new, said));
    Ok(())
}

async fn take_snapshot(renew: &mut Renew, task: &TaskContext) -> Result<(), Error> {
    let (new, _) = made(renew)?;
    let config = renew.seat.config()?;
    let first = format!("before-{}", &new.digest.hex()[..DIGITS]);
    let more = (2..).map(|number| format!("{first}-{number}"));
    let is_free = |name: &String| !config.sections.contains_key(name);
    let name = std::iter::once(first.clone()).chain(more).find(is_free);
    let name = name.ok_or_else(|| Error::refused("there is no name for a snapshot"))?;
    let take = Take::new(
        renew.seat.clone(),
        name.clone(),
        "before another image".to_owned(),
    );
    renew.snapshot = Some(name);
    sub(take::STEPS, take, &task.nested()).await
}

async fn remove_snapshot(renew: &mut Renew, task: &TaskContext) -> Result<(), Error> {
    let Some(name) = renew.snapshot.take() else {
        return Ok(());
    };
    if !renew.seat.config()?.sections.contains_key(&name) {
        return Ok(());
    }
    sub(
        delete::STEPS,
        Delete::new(renew.seat.clone(), name),
        &task.nested_undo(),
    )
    .await
}

async fn stop(renew: &mut Renew, task: &TaskContext) -> Result<(), Error> {
    renew.ran = renew.runs();
    if !renew.ran {
        return Ok(());
    }
    let ask = Ask {
        force: true,
        ..Ask::default()
    };
    shutdown(&renew.seat, ask, &task.nested()).await
}

async fn start_again(renew: &mut Renew, task: &TaskContext) -> Result<(), Error> {
    if !renew.ran || renew.runs() {
        return Ok(());
    }
    task.log("starting it as it was");
    start(&renew.seat, &task.nested_undo()).await
}

async fn exchange(renew: &mut Renew, _: &TaskContext) -> Result<(), Error> {
    let seat = renew.seat.clone();
    let _guard = seat.lock().await?;
    let mut stored = seat.unlocked()?;
    guest(&seat).clean_up().await?;
    renew.exchanged = true;
    let (new, said) = made(renew)?;
    carry_over(&mut stored.config, &renew.old, said);
    stored.config.set(image::KEY, image::value(new));
    empty_upper(&seat, &stored.config).await?;
    stored.save(&seat.site.store).await
}

async fn go_back(renew: &mut Renew, task: &TaskContext) -> Result<(), Error> {
    let (true, Some(name)) = (renew.exchanged, renew.snapshot.clone()) else {
        return Ok(());
    };
    task.log(&format!("going back to snapshot {name}"));
    sub(
        roll_back::STEPS,
        RollBack::new(renew.seat.clone(), name),
        &task.nested_undo(),
    )
    .await
}

async fn start_new(renew: &mut Renew, task: &TaskContext) -> Result<(), Error> {
    match renew.ran {
        true => start(&renew.seat, &task.nested()).await,
        false => Ok(()),
    }
}

async fn wait(renew: &mut Renew, task: &TaskContext) -> Result<(), Error> {
    match renew.ran {
        true => health::wait(&renew.seat, &renew.seat.config()?, task).await,
        false => Ok(()),
    }
}

fn made(renew: &Renew) -> Result<&(Image, Settings), Error> {
    let new = renew.new.as_ref();
    new.ok_or_else(|| Error::refused("the image was not taken in"))
}

/// Another table as one step.
async fn sub<C>(steps: &[TaskStep<C>], mut context: C, task: &TaskContext) -> Result<(), Error> {
    run_steps(steps, &mut context, task).await
}

/// What the new image says instead of the old one. What the user has changed stays.
fn carry_over(config: &mut GuestConfig, old: &Settings, new: &Settings) {
    for key in KEYS {
        if config.get(key) != old.keys.get(*key).map(String::as_str) {
            continue;
        }
        match new.keys.get(*key) {
            Some(value) => config.set(*key, value),
            None => drop(config.unset(key)),
        }
    }
    let raw = &mut config.current.raw;
    raw.retain(|line| !old.raw.contains(line));
    let missing = new
        .raw
        .iter()
        .filter(|(key, _)| !raw.iter().any(|(known, _)| known == key));
    let missing: Vec<_> = missing.cloned().collect();
    raw.extend(missing);
}

/// Removes what the container has changed in the old image's files.
async fn empty_upper(seat: &Seat, config: &GuestConfig) -> Result<(), Error> {
    let value = config.get("rootfs").unwrap_or_default();
    let volume: VolumeId = disks::volume_of(value)
        .parse()
        .map_err(|e| Error::refused(format!("rootfs: {e}")))?;
    let file = seat.site.storage.path(&volume).await?;
    seat.make_run_folder().await?;
    let rootfs = seat.run_folder().join("rootfs");
    mount(&file, &rootfs).await?;
    let emptied = async {
        for name in [image::UPPER, "work"] {
            let folder = rootfs.join(name);
            // Does not follow links, and overlayfs's own mode 0 folders are no hindrance to root.
            tokio::fs::remove_dir_all(&folder)
                .await
                .map_err(|e| Error::failed(format!("remove {}", folder.display()), e))?;
        }
        image::make_upper(&rootfs).await
    };
    let emptied = emptied.await;
    unmount_below(&seat.run_folder()).await?;
    seat.remove_run_folder().await?;
    emptied
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::GuestKind;

    #[test]
    fn what_the_user_said_stays() {
        let settings = |entrypoint: &str, cwd: &str| Settings {
            keys: [("entrypoint", entrypoint), ("env", "A=1")]
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            raw: vec![("lxc.init.cwd".to_owned(), cwd.to_owned())],
            notes: Vec::new(),
        };
        let text = "entrypoint: /old\nenv: A=2\nlxc.init.cwd: /old\nlxc.cap.drop: chown\n";
        let mut config = GuestConfig::parse(GuestKind::Container, text);
        let mut new = settings("/new", "/new");
        new.keys.insert("health".to_owned(), "retries=1".to_owned());
        carry_over(&mut config, &settings("/old", "/old"), &new);
        assert_eq!(
            config.print(),
            "entrypoint: /new\nenv: A=2\nhealth: retries=1\nlxc.cap.drop: chown\nlxc.init.cwd: /new\n"
        );
        let mut own = GuestConfig::parse(GuestKind::Container, "lxc.init.cwd: /mine\n");
        carry_over(&mut own, &settings("/old", "/old"), &new);
        assert_eq!(
            own.current.raw,
            [("lxc.init.cwd".to_owned(), "/mine".to_owned())]
        );
    }
}
