// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Containers from OCI images: what an image's configuration becomes in a container's, as PVE translates it (keys
//! `entrypoint` and `env`, raw lines for user, working directory and stop signal), and the folders of its volume.
//!
//! ```text
//! root volume:  upper/  what the container has changed    work/  overlayfs's own    merged/  mount point, empty
//! ```

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::Error;
use crate::guest::config::GuestConfig;
use crate::guest::container::root::GuestRoot;
use crate::guest::create::Params;
use crate::guest::keys;
use crate::guest::site::Site;
use crate::id::GuestKind;
use crate::oci::ImageError;
use crate::oci::digest::Digest;
use crate::oci::image::{Healthcheck, Image};
use crate::storage::name::VolumeId;

/// The key that names a container's image.
pub const KEY: &str = "image";
/// Folder of the volume with what the container has changed.
pub const UPPER: &str = "upper";
/// Path of the root file system in the bundle.
pub const MERGED: &str = "rootfs/merged";
/// What asks a program to end that an image says nothing else of: image-spec, "StopSignal".
pub const HALT_SIGNAL: &str = "SIGTERM";

/// What an image's configuration says about a container.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settings {
    /// Keys, where the creation names none.
    pub keys: Params,
    /// Raw lines.
    pub raw: Vec<(String, String)>,
    /// What the user should know.
    pub notes: Vec<String>,
}

/// Whether a template is an OCI image: a tar that is not packed; templates are.
pub fn is_archive(template: &VolumeId) -> bool {
    template.to_string().ends_with(".tar")
}

/// The image of a container.
pub fn digest(config: &GuestConfig) -> Result<Option<Digest>, Error> {
    let Some(image) = config.properties(KEY)? else {
        return Ok(None);
    };
    Ok(Some(image.get("digest").unwrap_or_default().parse()?))
}

/// The key's value for an image.
pub fn value(image: &Image) -> String {
    let mut items = vec![image.digest.to_string()];
    // Names and ports of registries have no commas; one that has is left out.
    let fits = |text: &String| !text.is_empty() && !text.contains(',');
    items.extend(
        image
            .name
            .iter()
            .filter(|name| fits(name))
            .map(|name| format!("name={name}")),
    );
    let ports = ports(image).join(";");
    items.extend(
        Some(ports)
            .filter(fits)
            .map(|ports| format!("ports={ports}")),
    );
    let value = items.join(",");
    keys::find(GuestKind::Container, KEY).map_or(value.clone(), |row| row.normalize(&value))
}

/// What an image is meant to be reached at, `80/tcp`.
fn ports(image: &Image) -> Vec<&str> {
    let ports = image.run.exposed_ports.iter().flatten();
    ports.map(|(port, _)| port.as_str()).collect()
}

/// Removes the images that no container of this node has any more, now or in a snapshot.
pub async fn prune(site: &Arc<Site>) -> Result<(), Error> {
    let mut kept = BTreeSet::new();
    for (kind, id) in site.guests()? {
        if kind != GuestKind::Container {
            continue;
        }
        let config = site.seat(kind, id).config()?;
        let values = config.sections.values().map(|section| &section.values);
        let values = values.chain([&config.current.values]);
        for value in values.filter_map(|values| values.get(KEY)) {
            let image = keys::properties(kind, KEY, value)?;
            kept.insert(image.get("digest").unwrap_or_default().parse()?);
        }
    }
    let images = site.images.clone();
    let work = tokio::task::spawn_blocking(move || images.prune(&kept));
    work.await
        .map_err(|e| Error::failed("remove images", e))??;
    Ok(())
}

/// Makes the folders in a new root volume. Blocks shortly.
pub async fn make_upper(rootfs: &Path) -> Result<(), Error> {
    for name in [UPPER, "work", "merged"] {
        let folder = rootfs.join(name);
        tokio::fs::create_dir_all(&folder)
            .await
            .map_err(|e| Error::failed(format!("make {}", folder.display()), e))?;
    }
    Ok(())
}

/// What an image says. `layers` are its folders, the topmost first, for the names of users. Blocks.
pub fn settings(image: &Image, layers: &[PathBuf]) -> Result<Settings, ImageError> {
    let (run, mut settings) = (&image.run, Settings::default());
    let command = run.command();
    if command.is_empty() {
        settings
            .notes
            .push("the image names no program: the key entrypoint has to".to_owned());
    } else {
        settings
            .keys
            .insert("entrypoint".to_owned(), quoted(&command));
    }
    let env = run.env.as_deref().unwrap_or_default();
    if !env.is_empty() {
        settings.keys.insert("env".to_owned(), env.join("\0"));
    }
    for text in run
        .working_dir
        .iter()
        .chain(&run.user)
        .chain(&run.stop_signal)
    {
        // They become lines of a config, which say more than an image may.
        if text.chars().any(char::is_control) {
            return Err(ImageError::Invalid(format!(
                "{text:?} of the image is more than a line"
            )));
        }
    }
    let several = command.iter().chain(env).any(|text| text.contains('\n'));
    if several {
        let note = "line feeds in the image's command or environment became blanks: see the keys entrypoint and env";
        settings.notes.push(note.to_owned());
    }
    let mut raw = |key: &str, value: String| settings.raw.push((key.to_owned(), value));
    if let Some(folder) = run.working_dir.as_ref().filter(|folder| !folder.is_empty()) {
        raw("lxc.init.cwd", folder.clone());
    }
    if let Some(user) = run.user.as_ref().filter(|user| !user.is_empty()) {
        let (uid, gid) = user_ids(user, layers)?;
        raw("lxc.init.uid", uid.to_string());
        raw("lxc.init.gid", gid.to_string());
    }
    if let Some(signal) = run.stop_signal.as_ref().filter(|signal| !signal.is_empty()) {
        raw("lxc.signal.halt", signal.clone());
    }
    for path in run.volumes.iter().flatten().map(|(path, _)| path) {
        settings.notes.push(format!(
            "{path} is meant to outlive the container: a mount point there (mp0, …) survives updates of the image"
        ));
    }
    let ports = ports(image);
    if !ports.is_empty() {
        settings.notes.push(format!(
            "it listens on {}, at the container's own address",
            ports.join(", ")
        ));
    }
    if let Some(health) = &run.healthcheck {
        add_health(&mut settings, health);
    }
    Ok(settings)
}

/// Docker's health check as our two keys.
fn add_health(settings: &mut Settings, health: &Healthcheck) {
    let command: Vec<&str> = match health
        .test
        .iter()
        .map(String::as_str)
        .collect::<Vec<_>>()
        .as_slice()
    {
        ["CMD", command @ ..] => command.to_vec(),
        ["CMD-SHELL", line] => vec!["/bin/sh", "-c", line],
        _ => return,
    };
    settings
        .keys
        .insert("health-command".to_owned(), command.join("\0"));
    // In nanoseconds, rounded up.
    let seconds = |time: u64| time.div_ceil(1_000_000_000);
    let retries = u64::from(health.retries);
    let items = [
        ("interval", seconds(health.interval)),
        ("retries", retries),
        ("start", seconds(health.start_period)),
        ("timeout", seconds(health.timeout)),
    ];
    let items = items.iter().filter(|(_, number)| *number > 0);
    let items: Vec<String> = items
        .map(|(name, number)| format!("{name}={number}"))
        .collect();
    if !items.is_empty() {
        settings.keys.insert("health".to_owned(), items.join(","));
    }
}

/// A command line that `lxc::words` takes apart again.
fn quoted(words: &[String]) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/_.,:=@%+-".contains(c);
    let quote = |word: &String| match !word.is_empty() && word.chars().all(plain) {
        true => word.clone(),
        // A quotation mark of one kind is held by two of the other.
        false => format!("'{}'", word.replace('\'', "'\"'\"'")),
    };
    words.iter().map(quote).collect::<Vec<_>>().join(" ")
}

/// The numbers of `user`, `user:group`, each a number or a name of the image's own accounts. Without a group it is the
/// user's own, and root's for a number that has no account.
fn user_ids(user: &str, layers: &[PathBuf]) -> Result<(u32, u32), ImageError> {
    let (user, group) = user.split_once(':').unwrap_or((user, ""));
    let passwd = uppermost(layers, "etc/passwd");
    let account = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [name, _, uid, gid, ..] = fields.as_slice() else {
            return None;
        };
        (*name == user || *uid == user).then_some((uid.parse().ok()?, gid.parse().ok()?))
    });
    let unknown = |name: &str| {
        ImageError::Invalid(format!("the image runs as {name}, whom it does not have"))
    };
    let (uid, own_group): (u32, u32) = match account {
        Some(ids) => ids,
        None => (user.parse().map_err(|_| unknown(user))?, 0),
    };
    if group.is_empty() {
        return Ok((uid, own_group));
    }
    let groups = uppermost(layers, "etc/group");
    let named = groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next()? == group).then(|| fields.nth(1)?.parse().ok())?
    });
    match named.or_else(|| group.parse().ok()) {
        Some(gid) => Ok((uid, gid)),
        None => Err(unknown(group)),
    }
}

/// A file as the topmost layer that has it.
fn uppermost(layers: &[PathBuf], path: &str) -> String {
    let read = |layer: &PathBuf| GuestRoot::open(layer).ok()?.read(path).ok()?;
    layers.iter().find_map(read).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::container::lxc;

    #[test]
    fn command_lines_are_taken_apart_again() {
        for words in [
            vec!["/bin/app", "-x", "a b", "it's", "say \"x\"", "", "$HOME;"],
            vec!["'", "\"", "'\"'"],
        ] {
            let words: Vec<String> = words.into_iter().map(str::to_owned).collect();
            assert_eq!(lxc::words(&quoted(&words)), words);
        }
    }

    #[test]
    fn users_are_numbers_or_names() {
        let layers: Vec<_> = (0..2).map(|_| tempfile::tempdir().unwrap()).collect();
        let paths: Vec<PathBuf> = layers.iter().map(|layer| layer.path().to_owned()).collect();
        for path in &paths {
            std::fs::create_dir(path.join("etc")).unwrap();
        }
        std::fs::write(paths[1].join("etc/passwd"), "app:x:7:8::/:/bin/sh\n").unwrap();
        std::fs::write(paths[1].join("etc/group"), "staff:x:50:\n").unwrap();
        let ids = |user: &str| user_ids(user, &paths).ok();
        assert_eq!(ids("app"), Some((7, 8)));
        assert_eq!(ids("7"), Some((7, 8)));
        assert_eq!(ids("1000"), Some((1000, 0)));
        assert_eq!(ids("app:staff"), Some((7, 50)));
        assert_eq!(ids("1:2"), Some((1, 2)));
        assert_eq!((ids("none"), ids("app:none")), (None, None));
        std::fs::write(paths[0].join("etc/passwd"), "app:x:9:9::/:/bin/sh\n").unwrap();
        assert_eq!(ids("app"), Some((9, 9)), "the topmost layer counts");
    }

    #[test]
    fn an_images_configuration_becomes_the_containers() {
        let text = br#"{ "architecture": "amd64", "os": "linux",
            "config": {
                "Entrypoint": ["/bin/app", "two words"], "Cmd": ["-x"], "Env": ["A=1", "PATH=/bin"],
                "User": "3:4", "WorkingDir": "/srv", "StopSignal": "SIGINT", "Volumes": { "/data": {} },
                "ExposedPorts": { "80/tcp": {}, "443/tcp": {} },
                "Healthcheck": { "Test": ["CMD-SHELL", "check me"], "Interval": 1500000000, "Retries": 2 }
            },
            "rootfs": { "type": "layers", "diff_ids": [
                "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" ] } }"#;
        let image =
            Image::parse(Digest::of(text), Some("example.org/app:1".to_owned()), text).unwrap();
        let settings = settings(&image, &[]).unwrap();
        let get = |key: &str| settings.keys.get(key).map(String::as_str);
        assert_eq!(get("entrypoint"), Some("/bin/app 'two words' -x"));
        assert_eq!(get("env"), Some("A=1\0PATH=/bin"));
        assert_eq!(get("health-command"), Some("/bin/sh\0-c\0check me"));
        assert_eq!(get("health"), Some("interval=2,retries=2"));
        let raw: Vec<String> = settings
            .raw
            .iter()
            .map(|(key, value)| format!("{key} {value}"))
            .collect();
        assert_eq!(
            raw,
            [
                "lxc.init.cwd /srv",
                "lxc.init.uid 3",
                "lxc.init.gid 4",
                "lxc.signal.halt SIGINT"
            ]
        );
        assert!(settings.notes[0].contains("/data"));
        let listens = "it listens on 443/tcp, 80/tcp, at the container's own address";
        assert_eq!(settings.notes[1], listens);
        for member in ["WorkingDir", "User", "StopSignal"] {
            let text = String::from_utf8(text.to_vec()).unwrap();
            let text = text.replace(
                &format!("\"{member}\": \""),
                &format!("\"{member}\": \"/\\nlxc.hook.pre-start: "),
            );
            let hostile = Image::parse(Digest::of(b""), None, text.as_bytes()).unwrap();
            let error = super::settings(&hostile, &[]).unwrap_err().to_string();
            assert!(error.contains("more than a line"), "{member}: {error}");
        }
        keys::check(GuestKind::Container, &settings.keys).unwrap();
        assert_eq!(
            value(&image),
            format!(
                "{},name=example.org/app:1,ports=443/tcp;80/tcp",
                image.digest
            )
        );
    }
}
