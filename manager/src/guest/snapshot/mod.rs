// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Snapshots of guests: what the disks held and the config said at one moment.
//!
//! ```text
//! scsi0: local:100/vm-100-disk-0.raw,size=8G
//! parent: before-upgrade                          the snapshot that the present state descends from
//!
//! [before-upgrade]
//! #what for
//! scsi0: local:100/vm-100-disk-0.raw,size=8G      the config of that moment
//! snaptime: 1764201600
//! ```
//!
//! A running guest is held while its disks are copied, so that all of them are of the same moment; where the storage
//! can share extents that is short. A machine's memory is part of it on request (`vmstate` names its volume, see
//! `vm::saved`): then it is held for as long as that takes to be written, and goes on from there after going back.
//! Tables: `take`, `roll_back`, `delete`, and `abandon` for what a killed daemon was taking.

pub mod abandon;
pub mod delete;
pub mod roll_back;
pub mod take;

use crate::error::Error;
use crate::guest::config::{GuestConfig, Section};
use crate::guest::site::Seat;
use crate::guest::stored::Stored;
use crate::guest::vm::saved;

/// Names that mean something else where snapshots are named.
const RESERVED: &[&str] = &["current", "pending"];
/// Keys of a snapshot that are not the guest's.
const OWN_KEYS: &[&str] = &["snaptime", "snapstate", saved::KEY];
/// Keys of a guest that say how it is now, and that no snapshot keeps.
const PRESENT_KEYS: &[&str] = &["lock", "description"];

/// One row of the listing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its name.
    pub name: String,
    /// Notes.
    pub description: String,
    /// The snapshot that it descends from.
    pub parent: Option<String>,
    /// When it was taken, in seconds since 1970.
    pub time: Option<i64>,
    /// What is being done with it, when it is not done yet.
    pub state: Option<String>,
    /// The memory is part of it.
    pub has_memory: bool,
}

/// All snapshots, the oldest first.
pub fn list(config: &GuestConfig) -> Vec<Row> {
    let row = |(name, section): (&String, &Section)| {
        let value = |key: &str| section.values.get(key).cloned();
        // Sections of other kinds have no time and no state.
        let is_snapshot = value("snaptime").is_some() || value("snapstate").is_some();
        is_snapshot.then(|| Row {
            name: name.clone(),
            description: value("description").unwrap_or_default(),
            parent: value("parent"),
            time: value("snaptime").and_then(|time| time.parse().ok()),
            state: value("snapstate"),
            has_memory: value(saved::KEY).is_some(),
        })
    };
    let mut rows: Vec<Row> = config.sections.iter().filter_map(row).collect();
    rows.sort_by(|a, b| (a.time, &a.name).cmp(&(b.time, &b.name)));
    rows
}

/// Refuses names that no snapshot may have.
pub fn check_name(name: &str) -> Result<(), Error> {
    if RESERVED.contains(&name) {
        return Err(Error::refused(format!(
            "unable to use snapshot name '{name}' (reserved name)"
        )));
    }
    Ok(())
}

/// A snapshot's section; PVE's text when there is none, which clients match on.
pub fn find<'a>(config: &'a GuestConfig, name: &str) -> Result<&'a Section, Error> {
    let section = config.sections.get(name);
    section.ok_or_else(|| Error::refused(format!("snapshot '{name}' does not exist")))
}

/// Changes the notes of a snapshot.
pub async fn describe(seat: &Seat, name: &str, description: &str) -> Result<(), Error> {
    let _guard = seat.lock().await?;
    let mut stored = seat.unlocked()?;
    find(&stored.config, name)?;
    let section = stored.config.sections.entry(name.to_owned()).or_default();
    set_description(section, description);
    stored.save(&seat.site.store).await
}

fn set_description(section: &mut Section, description: &str) {
    match description.trim_end() {
        "" => drop(section.values.remove("description")),
        text => drop(
            section
                .values
                .insert("description".to_owned(), format!("{text}\n")),
        ),
    }
}

/// The config of a guest that this snapshot task may work on: nobody else's lock is on it.
fn locked_by(seat: &Seat, lock: &str) -> Result<Stored, Error> {
    let stored = seat.stored()?;
    match stored.config.get("lock") {
        Some(mine) if mine == lock => Ok(stored),
        _ => seat.unlocked(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::GuestKind;

    #[test]
    fn snapshots_are_listed_by_their_time() {
        let text = "cores: 1\n\n[b]\n#note\nsnaptime: 20\nparent: a\n\n[a]\nsnaptime: 10\n\n[special:cloudinit]\nx: y\n";
        let rows = list(&GuestConfig::parse(GuestKind::Vm, text));
        let names: Vec<_> = rows.iter().map(|row| row.name.as_str()).collect();
        assert_eq!(names, ["a", "b"]);
        assert_eq!(
            (rows[1].parent.as_deref(), rows[1].description.as_str()),
            (Some("a"), "note\n")
        );
        assert!(check_name("current").is_err() && check_name("now").is_ok());
    }
}
