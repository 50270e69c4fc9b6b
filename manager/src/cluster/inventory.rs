// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The inventory: a short row for each guest's config, kept while the config stays as it is.
//!
//! Listings of thousands of guests are asked for every few seconds; this way each config is parsed once a change, not
//! once a listing, and a listing that finds the store unchanged is one comparison.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::error::Error;
use crate::guest::GuestConfig;
use crate::id::{GuestId, GuestKind, parse_config_key};
use crate::schema::format::parse_size;
use crate::store::{ConfigStore, Entry, Revision};

/// What listings say about a guest, as far as its config knows.
#[derive(Debug, Clone, PartialEq)]
pub struct GuestSummary {
    /// Its number.
    pub id: GuestId,
    /// VM or container.
    pub kind: GuestKind,
    /// Node that it is on.
    pub node: String,
    /// Name of a VM, host name of a container; `VM 100` or `CT100` when it has none, as in PVE.
    pub name: String,
    /// Tags, divided by semicolons.
    pub tags: Option<String>,
    /// It is a template.
    pub template: bool,
    /// What holds it.
    pub lock: Option<String>,
    /// CPUs that it may use.
    pub cpus: f64,
    /// Memory that it may use.
    pub memory_bytes: u64,
    /// Size of its first disk.
    pub disk_bytes: u64,
    /// It starts with the node.
    pub onboot: bool,
    /// When its config was written last.
    pub revision: Revision,
}

/// All guests at one revision of the store.
#[derive(Debug, Default)]
pub struct Inventory {
    /// Sorted by number.
    pub guests: Vec<Arc<GuestSummary>>,
    revision: Revision,
}

impl Inventory {
    /// The guest of that number.
    pub fn find(&self, id: GuestId) -> Option<&Arc<GuestSummary>> {
        let found = self.guests.binary_search_by_key(&id, |guest| guest.id);
        found.ok().and_then(|index| self.guests.get(index))
    }
}

/// The inventory as it was made last.
#[derive(Debug, Default)]
pub(super) struct Cache {
    /// Held while the inventory is brought up to date, so that many callers at a time do the work once.
    last: Mutex<Arc<Inventory>>,
}

impl Cache {
    pub(super) fn refresh(&self, store: &dyn ConfigStore) -> Result<Arc<Inventory>, Error> {
        let mut last = self.last.lock().unwrap_or_else(|e| e.into_inner());
        // Taken before the entries: a write in between is seen now, and looked for once more next time.
        let revision = store.revision();
        if last.revision == revision {
            return Ok(Arc::clone(&last));
        }
        let known: HashMap<(GuestId, &str), &Arc<GuestSummary>> = last
            .guests
            .iter()
            .map(|g| ((g.id, g.node.as_str()), g))
            .collect();
        let mut guests = Vec::with_capacity(known.len());
        for entry in store.list("nodes/")? {
            let Some((node, kind, id)) = parse_config_key(&entry.key) else {
                continue;
            };
            let former = known.get(&(id, node)).copied();
            let unchanged = former.filter(|g| g.revision == entry.revision && g.kind == kind);
            guests.push(match unchanged {
                Some(summary) => Arc::clone(summary),
                None => Arc::new(summarize(&entry, node, kind, id)),
            });
        }
        guests.sort_by_key(|guest| guest.id);
        *last = Arc::new(Inventory { guests, revision });
        Ok(Arc::clone(&last))
    }
}

fn summarize(entry: &Entry, node: &str, kind: GuestKind, id: GuestId) -> GuestSummary {
    let config = GuestConfig::parse(kind, &String::from_utf8_lossy(&entry.value));
    let text = |key: &str| config.get(key).map(str::to_owned);
    let name = match kind {
        GuestKind::Vm => text("name").unwrap_or_else(|| format!("VM {id}")),
        GuestKind::Container => text("hostname").unwrap_or_else(|| format!("CT{id}")),
    };
    GuestSummary {
        id,
        kind,
        node: node.to_owned(),
        name,
        tags: text("tags"),
        template: config.is_set("template"),
        lock: text("lock"),
        cpus: cpus(&config),
        memory_bytes: memory_mib(&config) << 20,
        disk_bytes: disk_bytes(&config),
        onboot: config.is_set("onboot"),
        revision: entry.revision,
    }
}

fn cpus(config: &GuestConfig) -> f64 {
    let cores: f64 = config.number("cores").unwrap_or(0.0);
    let sockets: f64 = match config.kind {
        GuestKind::Vm => config.number("sockets").unwrap_or(1.0),
        GuestKind::Container => 1.0,
    };
    cores * sockets
}

fn memory_mib(config: &GuestConfig) -> u64 {
    let bare = config.number("memory");
    let current = || {
        config
            .properties("memory")
            .ok()
            .flatten()?
            .number("current")
    };
    bare.or_else(current).unwrap_or(0)
}

/// The disk that PVE shows: a container's root, a VM's first in the order of buses.
fn disk_bytes(config: &GuestConfig) -> u64 {
    let families: &[&str] = match config.kind {
        GuestKind::Vm => &["scsi[n]", "virtio[n]", "sata[n]", "ide[n]"],
        GuestKind::Container => &[],
    };
    let members = families.iter().flat_map(|family| config.family(family));
    let root = config.get("rootfs").map(|value| ("rootfs", value));
    let size = |(key, _): (&str, &str)| {
        let properties = config.properties(key).ok().flatten()?;
        parse_size(properties.get("size")?)
    };
    root.into_iter().chain(members).find_map(size).unwrap_or(0)
}
