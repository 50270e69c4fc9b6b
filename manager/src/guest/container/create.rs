// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Task `vzcreate`: a root file system from a template, and a config.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::Error;
use crate::exec::Program;
use crate::guest::container::root::GuestRoot;
use crate::guest::container::{format, image, mount, setup, unmount_below};
use crate::guest::create::Draft;
use crate::guest::{crypt, disks};
use crate::oci::Hold;
use crate::step;
use crate::storage::name::{Content, VolumeId};
use crate::task::{TaskContext, TaskStep};

/// Longest time that a template's extraction may take.
const EXTRACT_MAX: Duration = Duration::from_secs(3600);
/// Time between two lines of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(2);

/// What the steps hand on.
#[derive(Debug)]
pub struct Create {
    draft: Draft,
    template: VolumeId,
    password: Option<String>,
    keys: Option<String>,
    image: PathBuf,
    /// Keeps the image that it is made from until the config names it.
    hold: Option<Hold>,
}

impl Create {
    /// A container from `template`, with root's password and SSH keys if they are given.
    pub fn new(
        draft: Draft,
        template: VolumeId,
        password: Option<String>,
        keys: Option<String>,
    ) -> Self {
        Self {
            draft,
            template,
            password,
            keys,
            image: PathBuf::new(),
            hold: None,
        }
    }

    fn rootfs(&self) -> PathBuf {
        self.draft.seat.run_folder().join("rootfs")
    }
}

/// The table.
pub const STEPS: &[TaskStep<Create>] = &[
    step!("reserve the number", reserve, undo unreserve),
    step!("allocate disks", allocate, undo free),
    step!("make file systems", make_file_systems),
    step!("mount the root file system", mount_root, undo unmount_root),
    step!("extract the template", extract),
    step!("set up root's account", set_up),
    step!("unmount the root file system", unmount_root),
    step!("write the configuration", write_config),
];

async fn reserve(create: &mut Create, _: &TaskContext) -> Result<(), Error> {
    if create.template.name.content() != Content::Vztmpl {
        return Err(Error::invalid(
            "ostemplate",
            "this volume is not a container template",
        ));
    }
    create.draft.reserve().await
}

async fn unreserve(create: &mut Create, _: &TaskContext) -> Result<(), Error> {
    create.draft.unreserve().await
}

async fn allocate(create: &mut Create, task: &TaskContext) -> Result<(), Error> {
    create.draft.allocate(task).await?;
    let draft = &create.draft;
    let value = draft.keys.get("rootfs").map_or("", String::as_str);
    let volume: VolumeId = disks::volume_of(value)
        .parse()
        .map_err(|e| Error::refused(format!("rootfs: {e}")))?;
    if !draft.new_volumes.contains(&volume) {
        return Err(Error::invalid(
            "rootfs",
            "a new container needs a new volume, such as local:8",
        ));
    }
    create.image = draft.seat.site.storage.path(&volume).await?;
    Ok(())
}

async fn free(create: &mut Create, _: &TaskContext) -> Result<(), Error> {
    create.draft.free().await
}

async fn make_file_systems(create: &mut Create, _: &TaskContext) -> Result<(), Error> {
    let draft = &create.draft;
    for volume in &draft.new_volumes {
        format(&draft.seat.site.storage.path(volume).await?).await?;
    }
    Ok(())
}

async fn mount_root(create: &mut Create, _: &TaskContext) -> Result<(), Error> {
    create.draft.seat.make_run_folder().await?;
    mount(&create.image, &create.rootfs()).await
}

async fn unmount_root(create: &mut Create, _: &TaskContext) -> Result<(), Error> {
    unmount_below(&create.draft.seat.run_folder()).await?;
    create.draft.seat.remove_run_folder().await
}

async fn extract(create: &mut Create, task: &TaskContext) -> Result<(), Error> {
    let archive = create
        .draft
        .seat
        .site
        .storage
        .path(&create.template)
        .await?;
    task.log(&format!("extracting archive '{}'", archive.display()));
    if image::is_archive(&create.template) {
        return take_image_in(create, archive, task).await;
    }
    let rootfs = create.rootfs();
    // Devices are the runtime's matter, and an unprivileged container could not use those of the archive anyway.
    let tar = Program::new("tar")
        .args([
            "--extract",
            "--numeric-owner",
            "--preserve-permissions",
            "--same-owner",
            "--acls",
        ])
        .args([
            "--xattrs",
            "--xattrs-include=*",
            "--anchored",
            "--exclude=./dev/*",
            "--exclude=dev/*",
        ])
        .arg("--directory")
        .arg(&rootfs)
        .arg("--file")
        .arg(&archive)
        .deadline(EXTRACT_MAX);
    let work = task.until_cancelled(async { Ok(tar.run().await?) });
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => {
                done?;
                task.log(&format!("extracted {} MiB", used_mib(&rootfs)));
                return Ok(());
            }
            () = tokio::time::sleep(PROGRESS_EVERY) => {
                task.log(&format!("{} MiB so far", used_mib(&rootfs)));
            }
        }
    }
}

/// An OCI image is not extracted into the volume: its layers are shared, and the volume gets what is changed.
async fn take_image_in(
    create: &mut Create,
    archive: PathBuf,
    task: &TaskContext,
) -> Result<(), Error> {
    let images = create.draft.seat.site.images.clone();
    create.hold = Some(images.hold().await);
    let log = task.clone();
    let work = tokio::task::spawn_blocking(move || {
        let image = images.take_in(&archive, &|line| log.log(line))?;
        let settings = image::settings(&image, &images.layers(&image))?;
        Ok::<_, crate::oci::ImageError>((image, settings))
    });
    let (image, settings) = work
        .await
        .map_err(|e| Error::failed("take the image in", e))??;
    task.log(&format!("image {}", image.digest));
    image::make_upper(&create.rootfs()).await?;
    settings.notes.iter().for_each(|note| task.log(note));
    let draft = &mut create.draft;
    for (key, value) in settings.keys {
        draft.keys.entry(key).or_insert(value);
    }
    draft
        .keys
        .insert(image::KEY.to_owned(), image::value(&image));
    draft.raw.extend(settings.raw);
    Ok(())
}

fn used_mib(folder: &std::path::Path) -> u64 {
    let space = rustix::fs::statvfs(folder).ok();
    space.map_or(0, |s| {
        (s.f_frsize * s.f_blocks.saturating_sub(s.f_bfree)) >> 20
    })
}

async fn set_up(create: &mut Create, task: &TaskContext) -> Result<(), Error> {
    if create.hold.is_some() {
        if create.password.is_some() || create.keys.is_some() {
            task.warn("an OCI image has no accounts to set up: password and keys are not used");
        }
        return Ok(());
    }
    let (rootfs, keys) = (create.rootfs(), create.keys.take());
    let password = create.password.take();
    let has_init = create.draft.keys.contains_key("entrypoint");
    let work = tokio::task::spawn_blocking(move || {
        let root = GuestRoot::open(&rootfs)?;
        if let Some(password) = password {
            setup::set_root_password(&root, &crypt::hash(&password)?)?;
        }
        if let Some(keys) = keys {
            setup::add_root_keys(&root, &keys)?;
        }
        if !has_init && !root.exists("sbin/init") && !root.exists("usr/sbin/init") {
            return Err(std::io::Error::other("the template has no /sbin/init"));
        }
        Ok(setup::distribution::detect(&root).map(|found| found.word))
    });
    let ostype = work
        .await
        .map_err(|e| Error::failed("set up root's account", e))?
        .map_err(|e| Error::failed("set up root's account", e))?;
    if let Some(ostype) = ostype {
        let keys = &mut create.draft.keys;
        keys.entry("ostype".to_owned())
            .or_insert_with(|| ostype.to_owned());
    }
    Ok(())
}

async fn write_config(create: &mut Create, _: &TaskContext) -> Result<(), Error> {
    create.draft.write_config().await
}
