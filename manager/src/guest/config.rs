// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A guest's config: PVE's file, parsed, changed and printed.
//!
//! ```text
//! #notes, a line each, escaped           current values
//! cores: 2
//! lxc.idmap: u 0 100000 65536            raw lines (containers)
//!
//! [PENDING]                              what a running guest gets at its next start
//! cores: 4
//! delete: net1,!unused0
//!
//! [before-upgrade]                       snapshots, and other sections, kept as they are
//! ...
//! ```
//!
//! Nothing that the file says is lost by reading and writing it. What values mean is in `keys`; what a change does to
//! a running guest is the business of its callers.

use std::collections::{BTreeMap, BTreeSet};

use aws_lc_rs::digest;

use super::keys::Plug;
use super::{crypt, keys};
use crate::error::{Error, MISMATCH, MODIFIED};
use crate::id::GuestKind;
use crate::percent;
use crate::schema::Properties;

/// One section of the file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Section {
    /// Keys and values. Notes are the key `description`, whose lines end in line feeds.
    pub values: BTreeMap<String, String>,
    /// `lxc.KEY: VALUE` lines, in their order.
    pub raw: Vec<(String, String)>,
    /// Lines that are neither, kept for whoever wrote them.
    pub unread: Vec<String>,
}

/// Changes that wait for the next start.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pending {
    /// New values.
    pub values: BTreeMap<String, String>,
    /// Keys that go.
    pub delete: BTreeSet<String>,
}

/// A guest's config.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GuestConfig {
    /// Which table its keys are in.
    pub kind: GuestKind,
    /// What the guest has now.
    pub current: Section,
    /// What it gets at its next start.
    pub pending: Pending,
    /// Snapshots and other sections by name.
    pub sections: BTreeMap<String, Section>,
    /// SHA-1 of the file that it was read from, in hexadecimal: what clients send back to say what they have seen.
    pub digest: String,
}

/// A change that a client asks for. The values have been checked and normalized by [`ConfigUpdate::new`].
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ConfigUpdate {
    /// New values.
    pub set: BTreeMap<String, String>,
    /// Keys to remove.
    pub delete: BTreeSet<String>,
    /// Keys whose pending change is dropped.
    pub revert: BTreeSet<String>,
    /// Digest of the config that the client has seen.
    pub digest: Option<String>,
    /// Volumes of disks that are removed are freed, not kept as unused.
    pub frees: bool,
}

/// What an update did: for hot-plugging, and for the volumes that are left over.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Applied {
    /// Keys that changed at once: (key, former value, new value).
    pub now: Vec<(String, Option<String>, Option<String>)>,
    /// Keys that are pending.
    pub pending: Vec<String>,
    /// Values that waited and will not come: (key, value).
    pub dropped: Vec<(String, String)>,
}

/// What of a change reaches a guest at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reach {
    /// It does not run: everything.
    Everything,
    /// It runs: what the keys' rows say, and devices that come and go.
    Live {
        /// Disks and drives do.
        disks: bool,
        /// Network cards do.
        cards: bool,
    },
}

impl Reach {
    /// A guest that runs, and whose devices stay.
    pub const FIXED: Self = Self::Live {
        disks: false,
        cards: false,
    };

    fn has(self, plug: Option<Plug>) -> bool {
        match (self, plug) {
            (Self::Live { disks, .. }, Some(Plug::Disk)) => disks,
            (Self::Live { cards, .. }, Some(Plug::Network)) => cards,
            _ => false,
        }
    }
}

/// One row of the listing of pending changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PendingRow {
    /// The key.
    pub key: String,
    /// What the guest has now.
    pub value: Option<String>,
    /// What it gets.
    pub pending: Option<String>,
    /// It goes.
    pub delete: bool,
}

impl GuestConfig {
    /// An empty config.
    pub fn new(kind: GuestKind) -> Self {
        Self::parse(kind, "")
    }

    /// Reads the file.
    pub fn parse(kind: GuestKind, text: &str) -> Self {
        let mut config = Self {
            kind,
            current: Section::default(),
            pending: Pending::default(),
            sections: BTreeMap::new(),
            digest: digest_of(text),
        };
        let mut name: Option<&str> = None;
        for line in text.lines() {
            if let Some(header) = section_header(line) {
                name = Some(header);
                if header != pending_name(kind) {
                    config.sections.entry(header.to_owned()).or_default();
                }
                continue;
            }
            match name {
                None => config.current.take(kind, line),
                Some(header) if header == pending_name(kind) => config.pending.take(line),
                Some(header) => {
                    let section = config.sections.entry(header.to_owned()).or_default();
                    section.take(kind, line);
                }
            }
        }
        config
    }

    /// Writes the file.
    pub fn print(&self) -> String {
        let mut out = self.current.print();
        if !self.pending.is_empty() {
            out.push_str(&format!("\n[{}]\n", pending_name(self.kind)));
            if !self.pending.delete.is_empty() {
                let keys: Vec<&str> = self.pending.delete.iter().map(String::as_str).collect();
                out.push_str(&format!("delete: {}\n", keys.join(",")));
            }
            for (key, value) in &self.pending.values {
                out.push_str(&value_line(key, value));
            }
        }
        for (name, section) in &self.sections {
            out.push_str(&format!("\n[{name}]\n{}", section.print()));
        }
        out
    }

    /// A key's value, if it is set.
    pub fn get(&self, key: &str) -> Option<&str> {
        self.current.values.get(key).map(String::as_str)
    }

    /// A key's value, or the default of its row.
    pub fn value(&self, key: &str) -> Option<&str> {
        let default = || keys::find(self.kind, key)?.param.default;
        self.get(key).or_else(default)
    }

    /// Whether a switch is on; its row's default counts.
    pub fn is_set(&self, key: &str) -> bool {
        self.value(key) == Some("1")
    }

    /// A number; its row's default counts.
    pub fn number<T: std::str::FromStr>(&self, key: &str) -> Option<T> {
        self.value(key)?.parse().ok()
    }

    /// A property string, parsed. `None` when it is not set; a value that somebody broke by hand is an error.
    pub fn properties(&self, key: &str) -> Result<Option<Properties>, Error> {
        let value = self.get(key);
        value
            .map(|v| keys::properties(self.kind, key, v))
            .transpose()
    }

    /// The members of a numbered family that are set: (key, value), in the order of their numbers.
    pub fn family<'a>(&'a self, family: &str) -> Vec<(&'a str, &'a str)> {
        let row = keys::table(self.kind)
            .iter()
            .find(|key| key.param.name == family);
        let Some(row) = row else { return Vec::new() };
        let values = self.current.values.iter();
        let mut members: Vec<_> = values
            .filter_map(|(key, value)| Some((row.param.family_index(key)?, key, value)))
            .collect();
        members.sort();
        members
            .into_iter()
            .map(|(_, key, value)| (key.as_str(), value.as_str()))
            .collect()
    }

    /// Sets a key. The value is not checked: for values that the server makes.
    pub fn set(&mut self, key: impl Into<String>, value: impl Into<String>) {
        self.current.values.insert(key.into(), value.into());
    }

    /// Removes a key.
    pub fn unset(&mut self, key: &str) -> Option<String> {
        self.current.values.remove(key)
    }

    /// Refuses when the client has seen another config than this one.
    pub fn check_digest(&self, seen: Option<&str>) -> Result<(), Error> {
        match seen {
            Some(seen) if !seen.is_empty() && seen != self.digest => {
                Err(Error::refused(match self.kind {
                    GuestKind::Vm => MISMATCH,
                    GuestKind::Container => MODIFIED,
                }))
            }
            _ => Ok(()),
        }
    }

    /// Applies an update: at once as far as it reaches the guest, else it is kept as pending.
    pub fn apply(&mut self, update: &ConfigUpdate, reach: Reach) -> Result<Applied, Error> {
        self.check_digest(update.digest.as_deref())?;
        let mut applied = Applied::default();
        for key in &update.revert {
            applied.dropped.extend(self.pending.drop_key(key));
        }
        for key in &update.delete {
            self.change(key, None, reach, &mut applied);
        }
        for (key, value) in &update.set {
            self.change(key, Some(value), reach, &mut applied);
        }
        Ok(applied)
    }

    /// Makes the pending changes current; called before a start. Returns what changed.
    pub fn apply_pending(&mut self) -> Applied {
        let pending = std::mem::take(&mut self.pending);
        let mut applied = Applied::default();
        for key in &pending.delete {
            self.change(key, None, Reach::Everything, &mut applied);
        }
        for (key, value) in &pending.values {
            self.change(key, Some(value), Reach::Everything, &mut applied);
        }
        applied
    }

    /// The values as the next start will see them.
    pub fn next_values(&self) -> BTreeMap<String, String> {
        let mut values = self.current.values.clone();
        values.retain(|key, _| !self.pending.delete.contains(key));
        values.extend(self.pending.values.clone());
        values
    }

    /// Every key with its present and its coming value.
    pub fn pending_rows(&self) -> Vec<PendingRow> {
        let current = self.current.values.keys();
        let keys: BTreeSet<&String> = current.chain(self.pending.values.keys()).collect();
        let row = |key: &String| PendingRow {
            key: key.clone(),
            value: self.current.values.get(key).cloned(),
            pending: self.pending.values.get(key).cloned(),
            delete: self.pending.delete.contains(key),
        };
        keys.into_iter().map(row).collect()
    }

    /// Makes a change pending that was applied and did not reach the guest after all.
    pub fn postpone(&mut self, key: &str, applied: &mut Applied) {
        let Some(at) = applied.now.iter().position(|(name, ..)| name == key) else {
            return;
        };
        let (key, former, value) = applied.now.remove(at);
        match former {
            Some(former) => self.set(&key, former),
            None => drop(self.unset(&key)),
        }
        self.wait(&key, value.as_ref(), applied);
    }

    /// What of a change reaches the guest at once when it runs: of a machine what its `hotplug` says.
    pub fn reach(&self) -> Reach {
        if self.kind == GuestKind::Container {
            return Reach::Live {
                disks: true,
                cards: true,
            };
        }
        let list = self.value("hotplug").unwrap_or_default();
        let has = |plug: Plug| {
            list == "1" || crate::schema::split_list(list).any(|word| word == plug.as_str())
        };
        Reach::Live {
            disks: has(Plug::Disk),
            cards: has(Plug::Network),
        }
    }

    fn wait(&mut self, key: &str, value: Option<&String>, applied: &mut Applied) {
        match value {
            Some(value) => drop(self.pending.values.insert(key.to_owned(), value.clone())),
            None => drop(self.pending.delete.insert(key.to_owned())),
        }
        applied.pending.push(key.to_owned());
    }

    fn change(&mut self, key: &str, value: Option<&String>, reach: Reach, applied: &mut Applied) {
        let dropped = self.pending.drop_key(key);
        applied
            .dropped
            .extend(dropped.filter(|(_, waited)| Some(waited) != value));
        let former = self.current.values.get(key).cloned();
        if former.as_ref() == value {
            return;
        }
        let row = keys::find(self.kind, key);
        let is_new_or_gone = former.is_some() != value.is_some();
        let is_live = |row: &keys::Key| {
            (is_new_or_gone && reach.has(row.plug))
                || row.is_live(former.as_deref(), value.map(String::as_str))
        };
        if reach != Reach::Everything && !row.is_some_and(is_live) {
            self.wait(key, value, applied);
            return;
        }
        match value {
            Some(value) => self.set(key, value.clone()),
            None => drop(self.unset(key)),
        }
        applied.now.push((key.to_owned(), former, value.cloned()));
    }
}

impl ConfigUpdate {
    /// Checks and normalizes a client's wishes; every one that does not fit is named in the error.
    pub fn new(
        kind: GuestKind,
        set: BTreeMap<String, String>,
        delete: BTreeSet<String>,
        revert: BTreeSet<String>,
        digest: Option<String>,
    ) -> Result<Self, Error> {
        keys::check(kind, &set)?;
        let mut errors = Vec::new();
        for key in &delete {
            if set.contains_key(key) {
                let text = format!("you can't use '-{key}' and -delete {key}' at the same time");
                errors.push(("delete".to_owned(), text));
            } else if revert.contains(key) {
                let text =
                    format!("you can't use '-delete {key}' and -revert {key}' at the same time");
                errors.push(("revert".to_owned(), text));
            } else if keys::find(kind, key).is_none() {
                errors.push(("delete".to_owned(), format!("unknown option '{key}'")));
            } else if key == "rootfs" {
                errors.push((
                    "delete".to_owned(),
                    format!("unable to delete required option '{key}'"),
                ));
            }
        }
        for key in &revert {
            if set.contains_key(key) {
                let text = format!("you can't use '-{key}' and -revert {key}' at the same time");
                errors.push(("revert".to_owned(), text));
            } else if keys::find(kind, key).is_none() {
                errors.push(("revert".to_owned(), format!("unknown option '{key}'")));
            }
        }
        if !errors.is_empty() {
            return Err(Error::Invalid(errors));
        }
        let normal = |key: String, value: String| {
            let value = keys::find(kind, &key).map_or(value.clone(), |row| row.normalize(&value));
            (key, value)
        };
        let mut set: BTreeMap<_, _> = set.into_iter().map(|(k, v)| normal(k, v)).collect();
        if let Some(password) = set.remove("cipassword") {
            let hash = kept_password(password)?;
            set.insert("cipassword".to_owned(), hash);
        }
        if let Some(text) = set.remove("description") {
            set.insert("description".to_owned(), with_line_feed(text));
        }
        Ok(Self {
            set,
            delete,
            revert,
            digest,
            frees: false,
        })
    }
}

/// A password as configs keep it: hashed, unless it was already.
fn kept_password(password: String) -> Result<String, Error> {
    if password.starts_with('$') {
        return Ok(password);
    }
    crypt::hash(&password).map_err(|e| Error::failed("hash the password", e))
}

impl Pending {
    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty() && self.delete.is_empty()
    }

    /// Takes a key's change out; returns the value that waited.
    fn drop_key(&mut self, key: &str) -> Option<(String, String)> {
        self.delete.remove(key);
        self.values.remove_entry(key)
    }

    fn take(&mut self, line: &str) {
        match split_line(line) {
            // PVE marks a removal that also frees the volume with `!`; here the volume becomes unused either way.
            Some(("delete", list)) => {
                let keys = crate::schema::split_list(list);
                self.delete
                    .extend(keys.map(|key| key.trim_start_matches('!').to_owned()));
            }
            Some((key, value)) => drop(self.values.insert(key.to_owned(), read_value(key, value))),
            None => {}
        }
    }
}

impl Section {
    fn take(&mut self, kind: GuestKind, line: &str) {
        if line.trim().is_empty() {
            return;
        }
        if let Some(note) = line.strip_prefix('#') {
            let description = self.values.entry("description".to_owned()).or_default();
            description.push_str(&percent::decode(note));
            description.push('\n');
            return;
        }
        if kind == GuestKind::Container
            && let Some((key, value)) = raw_line(line)
        {
            self.raw.push((key.to_owned(), value.to_owned()));
            return;
        }
        match split_line(line) {
            Some((key, value)) => drop(self.values.insert(key.to_owned(), read_value(key, value))),
            None => self.unread.push(line.trim_end().to_owned()),
        }
    }

    fn print(&self) -> String {
        let mut out = String::new();
        if let Some(notes) = self.values.get("description") {
            for line in notes.split_terminator('\n') {
                out.push_str(&format!("#{}\n", percent::encode(line)));
            }
        }
        let others = self.values.iter().filter(|(key, _)| *key != "description");
        for (key, value) in others {
            out.push_str(&value_line(key, value));
        }
        for (key, value) in &self.raw {
            // A line is a line, wherever the value comes from.
            out.push_str(&format!("{key}: {}\n", value.replace(['\n', '\r'], " ")));
        }
        for line in &self.unread {
            out.push_str(line);
            out.push('\n');
        }
        out
    }
}

/// Notes as they are kept: every line ends in a line feed, the last one, too.
pub(crate) fn with_line_feed(mut notes: String) -> String {
    if !notes.is_empty() && !notes.ends_with('\n') {
        notes.push('\n');
    }
    notes
}

fn pending_name(kind: GuestKind) -> &'static str {
    match kind {
        GuestKind::Vm => "PENDING",
        GuestKind::Container => "pve:pending",
    }
}

/// SHA-1, in hexadecimal: not a protection, but the word that PVE and its clients use for a version of a file.
fn digest_of(text: &str) -> String {
    let hash = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, text.as_bytes());
    hash.as_ref()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn section_header(line: &str) -> Option<&str> {
    let name = line.trim_end().strip_prefix('[')?.strip_suffix(']')?;
    let fits = |c: char| c.is_ascii_alphanumeric() || "_-:.".contains(c);
    (!name.is_empty() && name.chars().all(fits)).then_some(name)
}

/// `key: value`; a key is lower-case letters, digits, `-` and `_`.
fn split_line(line: &str) -> Option<(&str, &str)> {
    let (key, value) = line.split_once(':')?;
    let fits = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_';
    let value = value.trim();
    (!key.is_empty() && key.bytes().all(fits) && !value.is_empty()).then_some((key, value))
}

fn raw_line(line: &str) -> Option<(&str, &str)> {
    let at = line.find([':', '='])?;
    let (key, value) = (line[..at].trim(), line[at + 1..].trim());
    let fits = |b: u8| b.is_ascii_alphanumeric() || b"._-".contains(&b);
    (key.starts_with("lxc.") && key.bytes().all(fits)).then_some((key, value))
}

/// Values are one line. Only notes may hold more, and those are escaped where they are pending.
fn value_line(key: &str, value: &str) -> String {
    match key {
        "description" => format!("{key}: {}\n", percent::encode(value)),
        _ => format!("{key}: {}\n", value.replace('\n', " ")),
    }
}

fn read_value(key: &str, value: &str) -> String {
    match key {
        "description" => percent::decode(value),
        _ => value.to_owned(),
    }
}

#[cfg(test)]
mod tests;
