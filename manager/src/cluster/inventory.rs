// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The inventory: a short row for each guest's config, kept while the config stays as it is.
//!
//! Listings of thousands of guests are asked for every few seconds; this way each config is parsed once a change, not
//! once a listing, and a listing that finds the store unchanged is one comparison.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use crate::error::Error;
use crate::guest::GuestConfig;
use crate::guest::bulk::Order;
use crate::guest::container::bundle;
use crate::guest::vm::{drives, resolve};
use crate::id::{GuestId, GuestKind, parse_config_key};
use crate::schema::format::parse_size;
use crate::store::{ConfigStore, Revision};

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
    /// Swap that it may use.
    pub swap_bytes: u64,
    /// Size of its first disk.
    pub disk_bytes: u64,
    /// It starts with the node.
    pub onboot: bool,
    /// When it starts and stops with the node.
    pub startup: Order,
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

impl GuestSummary {
    /// The summary of a config.
    #[expect(clippy::cast_precision_loss, reason = "at most some thousand CPUs")]
    pub fn new(config: &GuestConfig, node: &str, id: GuestId, revision: Revision) -> Self {
        let text = |key: &str| config.get(key).map(str::to_owned);
        let (name, cpus, memory_mib, swap_mib, disk) = match config.kind {
            GuestKind::Vm => (
                text("name").unwrap_or_else(|| format!("VM {id}")),
                resolve::cpu_count(config) as f64,
                resolve::memory_mib(config),
                0,
                drives::drives(config)
                    .ok()
                    .and_then(|drives| drives.into_iter().find(|drive| !drive.is_cdrom()))
                    .map(|drive| drive.key),
            ),
            GuestKind::Container => (
                text("hostname").unwrap_or_else(|| format!("CT{id}")),
                bundle::cpu_limit(config).unwrap_or_else(host_cpus),
                bundle::memory_mib(config),
                bundle::swap_mib(config),
                Some("rootfs".to_owned()),
            ),
        };
        let disk = disk.and_then(|key| config.properties(&key).ok().flatten());
        let size = disk.and_then(|disk| parse_size(disk.get("size")?));
        Self {
            id,
            kind: config.kind,
            node: node.to_owned(),
            name,
            tags: text("tags"),
            template: config.is_set("template"),
            lock: text("lock"),
            cpus,
            memory_bytes: memory_mib << 20,
            swap_bytes: swap_mib << 20,
            disk_bytes: size.unwrap_or(0),
            onboot: config.is_set("onboot"),
            startup: Order::of(config),
            revision,
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "at most some thousand CPUs")]
fn host_cpus() -> f64 {
    std::thread::available_parallelism().map_or(1.0, |count| count.get() as f64)
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
                None => {
                    let config = GuestConfig::parse(kind, &String::from_utf8_lossy(&entry.value));
                    Arc::new(GuestSummary::new(&config, node, id, entry.revision))
                }
            });
        }
        guests.sort_by_key(|guest| guest.id);
        *last = Arc::new(Inventory { guests, revision });
        Ok(Arc::clone(&last))
    }
}
