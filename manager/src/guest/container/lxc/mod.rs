// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Raw `lxc.KEY: VALUE` lines of a container's config: liblxc's own settings, for which PVE has no key. Each changes
//! the bundle, in the order of the lines and after everything else; one that means nothing here is noted, one that
//! cannot be followed and one that nobody knows are refused by name. What each key does is one row of [`keys::KEYS`];
//! lxc.container.conf(5) is what they mean.

mod capabilities;
mod keys;
mod mounts;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::Error;
use crate::guest::container::bundle::owners::{Maps, Span};
use crate::guest::container::bundle::{Bundle, Facts};
use crate::id::GuestId;
use keys::Effect;

/// A bundle while raw lines change it.
struct Draft<'a> {
    id: GuestId,
    facts: &'a Facts,
    bundle: Bundle,
    /// `lxc.cap.keep` has begun the list of capabilities anew.
    keeps: bool,
}

/// One line: the key, what a family's name leaves of it (`nofile` of `lxc.prlimit.nofile`), the value.
struct Line<'a> {
    rest: &'a str,
    value: &'a str,
}

/// Lets the raw lines change a bundle.
pub(super) fn apply(
    lines: &[(String, String)],
    id: GuestId,
    config: Value,
    facts: &Facts,
) -> Result<Bundle, Error> {
    let mut draft = Draft {
        id,
        facts,
        bundle: Bundle {
            config,
            notes: Vec::new(),
            halt_signal: None,
        },
        keeps: false,
    };
    for (key, value) in lines {
        let (effect, rest) = find(key)?;
        let line = Line { rest, value };
        match effect {
            Effect::Sets(set) => set(&mut draft, &line).map_err(|text| wrong(key, value, &text))?,
            Effect::None(why) => draft.bundle.notes.push(format!("{key}: no effect: {why}")),
            Effect::Refused(why) => return Err(wrong(key, value, why)),
            // Read by `id_maps`.
            Effect::Maps => {}
        }
    }
    Ok(draft.bundle)
}

/// Refuses lines that a start would refuse because of their keys: for configs that come from elsewhere.
pub fn check(lines: &[(String, String)]) -> Result<(), Error> {
    for (key, value) in lines {
        if let (Effect::Refused(why), _) = find(key)? {
            return Err(wrong(key, value, why));
        }
    }
    id_maps(lines).map(drop)
}

fn find(key: &str) -> Result<(&'static Effect, &str), Error> {
    let row = keys::KEYS.iter().find_map(|(name, effect)| {
        let rest = match name.strip_suffix('*') {
            Some(family) => key.strip_prefix(family).filter(|rest| !rest.is_empty())?,
            None => key.strip_prefix(name).filter(|rest| rest.is_empty())?,
        };
        Some((effect, rest))
    });
    row.ok_or_else(|| Error::refused(format!("{key}: no such setting of liblxc is known here")))
}

fn wrong(key: &str, value: &str, text: &str) -> Error {
    Error::refused(format!("{key}: {value}: {text}"))
}

/// Whether the lines give the container a user namespace.
pub(super) fn maps_ids(lines: &[(String, String)]) -> bool {
    lines.iter().any(|(key, _)| is_map(key))
}

fn is_map(key: &str) -> bool {
    matches!(find(key), Ok((Effect::Maps, _)))
}

/// The id maps of `lxc.idmap` lines, users then groups; `None` without such a line. Only the last empty line counts,
/// and what follows it.
pub(super) fn id_maps(lines: &[(String, String)]) -> Result<Option<Maps>, Error> {
    let mut maps = Maps::default();
    for (key, value) in lines.iter().filter(|(key, _)| is_map(key)) {
        if value.is_empty() {
            maps = Maps::default();
            continue;
        }
        let words: Vec<&str> = value.split_whitespace().collect();
        let number = |text: &str| text.parse::<u32>().ok();
        let range = match words.as_slice() {
            [kind, inside, outside, size] => number(inside)
                .zip(number(outside))
                .zip(number(size))
                .map(|range| (*kind, range)),
            _ => None,
        };
        let list = match range.map(|(kind, _)| kind) {
            Some("u") => vec![&mut maps.users],
            Some("g") => vec![&mut maps.groups],
            Some("b") => vec![&mut maps.users, &mut maps.groups],
            _ => Vec::new(),
        };
        let Some((_, ((from, to), count))) = range.filter(|_| !list.is_empty()) else {
            return Err(wrong(key, value, "expected u, g or b, then three numbers"));
        };
        if count == 0 || from.max(to).checked_add(count).is_none() {
            return Err(wrong(key, value, "the range is empty or too long"));
        }
        for list in list {
            list.push(Span { from, to, count });
        }
    }
    match (maps.users.is_empty(), maps.groups.is_empty()) {
        (true, true) => Ok(None),
        (false, false) => Ok(Some(maps)),
        _ => Err(Error::refused(
            "lxc.idmap: users and groups need a range each",
        )),
    }
}

/// Paths of the host that lines name and that need not exist.
pub(super) fn named_paths(lines: &[(String, String)]) -> Vec<PathBuf> {
    let entries = lines.iter().filter(|(key, _)| key == mounts::ENTRY);
    let sources = entries.filter_map(|(_, value)| mounts::source(value));
    sources.filter(|path| path.is_absolute()).collect()
}

/// Splits a command line at blanks, where no quotation marks hold it together.
pub(super) fn words(text: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), None::<String>, None);
    for c in text.chars() {
        match quote {
            Some(mark) if c == mark => quote = None,
            None if c == '"' || c == '\'' => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            None if c.is_whitespace() => words.extend(word.take()),
            _ => word.get_or_insert_default().push(c),
        }
    }
    words.extend(word);
    words
}

impl Draft<'_> {
    /// A member of config.json by its path: `linux/sysctl`.
    fn at(&mut self, path: &str) -> &mut Value {
        path.split('/')
            .fold(&mut self.bundle.config, |value, name| &mut value[name])
    }

    /// Adds to a list of config.json.
    fn push(&mut self, path: &str, value: Value) {
        let list = self.at(path);
        match list.as_array_mut() {
            Some(list) => list.push(value),
            None => *list = json!([value]),
        }
    }

    fn exists(&self, path: &Path) -> bool {
        self.facts.present.contains(path)
    }
}
