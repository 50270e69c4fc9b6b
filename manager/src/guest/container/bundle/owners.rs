// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Which ids of the host stand for those of a container, and the maps of single mount points, `mp0: …,idmap=…`.
//!
//! ```text
//! id inside ──Maps──► id of the host                 u:1000:33:1 of a mount point: what is inside 1000's
//!     └──idmap of the mount point──► id on the disk                                is 33's on the disk
//! the runtime wants: id on the disk ► id of the host
//! ```

use std::ops::Range;

use serde_json::{Value, json};

/// Value of the key for a mount point whose ids on the disk are those inside.
pub const PASSTHROUGH: &str = "passthrough";

/// Ids next to each other that are mapped to others next to each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    /// First one inside; for a mount point's own map as the runtime wants it, on the disk.
    pub from: u32,
    /// What it is mapped to.
    pub to: u32,
    /// How many.
    pub count: u32,
}

/// Maps of user and group ids.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Maps {
    /// Of users.
    pub users: Vec<Span>,
    /// Of groups.
    pub groups: Vec<Span>,
}

impl Maps {
    /// `uidMappings` of config.json.
    pub fn uids(&self) -> Value {
        mappings(&self.users)
    }

    /// `gidMappings` of config.json.
    pub fn gids(&self) -> Value {
        mappings(&self.groups)
    }

    /// What the runtime maps a mount by, given the entries of its key. An id without one is where it would be without
    /// the key: on a volume, which `holds_own` ids, at the same number, else at the host's; unless an entry has taken that.
    pub fn with(&self, entries: &Self, holds_own: bool) -> Self {
        Self {
            users: on_disk(&self.users, &entries.users, holds_own),
            groups: on_disk(&self.groups, &entries.groups, holds_own),
        }
    }
}

fn mappings(spans: &[Span]) -> Value {
    let mapping =
        |span: &Span| json!({ "containerID": span.from, "hostID": span.to, "size": span.count });
    spans.iter().map(mapping).collect()
}

/// The entries of a mount point's key, `u:INSIDE:DISK:COUNT` or `g:…` divided by semicolons.
pub fn entries(text: &str) -> Result<Maps, String> {
    let mut maps = Maps::default();
    for entry in text.split(';') {
        let wrong = |reason: &str| Err(format!("'{entry}' {reason}"));
        let parts: Vec<&str> = entry.split(':').collect();
        let number = |text: &str| text.parse::<u32>().ok();
        let (kind, span) = match parts.as_slice() {
            [kind, inside, disk, count] => match (number(inside), number(disk), number(count)) {
                (Some(from), Some(to), Some(count)) => (*kind, Span { from, to, count }),
                _ => return wrong("is not u or g and three numbers"),
            },
            _ => return wrong("is not u or g and three numbers"),
        };
        let list = match kind {
            "u" => &mut maps.users,
            "g" => &mut maps.groups,
            _ => return wrong("is not u or g and three numbers"),
        };
        if span.count == 0 || span.from.max(span.to).checked_add(span.count).is_none() {
            return wrong("is empty or too long");
        }
        let meets = |a: Range<u64>, b: Range<u64>| a.start < b.end && b.start < a.end;
        let is_taken = |other: &Span| {
            meets(inside(other), inside(&span)) || meets(outside(other), outside(&span))
        };
        if list.iter().any(is_taken) {
            return wrong("has an id that another entry has");
        }
        list.push(span);
    }
    Ok(maps)
}

fn inside(span: &Span) -> Range<u64> {
    u64::from(span.from)..u64::from(span.from) + u64::from(span.count)
}

fn outside(span: &Span) -> Range<u64> {
    u64::from(span.to)..u64::from(span.to) + u64::from(span.count)
}

fn on_disk(maps: &[Span], entries: &[Span], holds_own: bool) -> Vec<Span> {
    let (taken_inside, taken_on_disk): (Vec<_>, Vec<_>) = entries
        .iter()
        .map(|entry| (inside(entry), outside(entry)))
        .unzip();
    let mut result = Vec::new();
    for map in maps {
        for entry in entries {
            let start = inside(entry).start.max(inside(map).start);
            let end = inside(entry).end.min(inside(map).end);
            result.extend(span(
                outside(entry).start + start.saturating_sub(inside(entry).start),
                outside(map).start + start.saturating_sub(inside(map).start),
                end.saturating_sub(start),
            ));
        }
        for rest in without(inside(map), &taken_inside) {
            let host = outside(map).start + (rest.start - inside(map).start);
            let disk = if holds_own { rest.start } else { host };
            for free in without(disk..disk + (rest.end - rest.start), &taken_on_disk) {
                let length = free.end - free.start;
                result.extend(span(free.start, host + (free.start - disk), length));
            }
        }
    }
    result.sort_by_key(|span| span.from);
    result
}

fn span(from: u64, to: u64, count: u64) -> Option<Span> {
    let number = |number: u64| u32::try_from(number).ok();
    let span = Span {
        from: number(from)?,
        to: number(to)?,
        count: number(count)?,
    };
    (count > 0).then_some(span)
}

/// What is left of a range without others.
fn without(range: Range<u64>, others: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = vec![range];
    for other in others {
        let parts = left.into_iter().flat_map(|range| {
            [
                range.start..other.start.clamp(range.start, range.end),
                other.end.clamp(range.start, range.end)..range.end,
            ]
        });
        left = parts.filter(|range| !range.is_empty()).collect();
    }
    left
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spans(list: &[(u32, u32, u32)]) -> Vec<Span> {
        let span = |&(from, to, count): &(u32, u32, u32)| Span { from, to, count };
        list.iter().map(span).collect()
    }

    #[test]
    fn entries_are_read_or_refused_by_name() {
        let maps = entries("u:123:456:1;g:100:50:5;u:0:1000:2").unwrap();
        assert_eq!(maps.users, spans(&[(123, 456, 1), (0, 1000, 2)]));
        assert_eq!(maps.groups, spans(&[(100, 50, 5)]));
        for (text, reason) in [
            ("", "'' is not u or g and three numbers"),
            ("u:1:2", "'u:1:2' is not u or g and three numbers"),
            ("b:1:2:3", "'b:1:2:3' is not u or g and three numbers"),
            ("u:1:2:-3", "'u:1:2:-3' is not u or g and three numbers"),
            ("u:1:2:0", "'u:1:2:0' is empty or too long"),
            (
                "u:1:4294967295:1",
                "'u:1:4294967295:1' is empty or too long",
            ),
            (
                "u:1:2:3;u:3:9:1",
                "'u:3:9:1' has an id that another entry has",
            ),
            (
                "g:1:2:3;g:9:4:1",
                "'g:9:4:1' has an id that another entry has",
            ),
        ] {
            assert_eq!(entries(text), Err(reason.to_owned()));
        }
        assert!(entries("u:1:2:3;g:1:2:3").is_ok());
    }

    #[track_caller]
    fn check(maps: &[(u32, u32, u32)], text: &str, holds_own: bool, expected: &[(u32, u32, u32)]) {
        let maps = Maps {
            users: spans(maps),
            groups: Vec::new(),
        };
        let found = maps.with(&entries(text).unwrap(), holds_own).users;
        assert_eq!(found, spans(expected));
    }

    #[test]
    fn ids_without_an_entry_stay_where_they_are() {
        let maps = &[(0, 100_000, 65_536)];
        let volume = &[
            (0, 100_000, 123),
            (124, 100_124, 332),
            (456, 100_123, 1),
            (457, 100_457, 65_079),
        ];
        check(maps, "u:123:456:1", true, volume);
        let folder = &[
            (456, 100_123, 1),
            (100_000, 100_000, 123),
            (100_124, 100_124, 65_412),
        ];
        check(maps, "u:123:456:1", false, folder);
        check(maps, "g:1:2:3", true, &[(0, 100_000, 65_536)]);
        check(maps, "u:0:0:65536", true, &[(0, 100_000, 65_536)]);
    }

    #[test]
    fn an_entry_reaches_over_several_ranges_and_no_further() {
        let maps = &[(0, 100_000, 10), (10, 7, 1), (11, 100_011, 9)];
        let found = &[
            (0, 100_000, 8),
            (13, 100_013, 7),
            (1000, 100_008, 2),
            (1002, 7, 1),
            (1003, 100_011, 2),
        ];
        check(maps, "u:8:1000:5;u:5000:6000:10", true, found);
        check(
            maps,
            "u:30:40:5",
            true,
            &[(0, 100_000, 10), (10, 7, 1), (11, 100_011, 9)],
        );
    }
}
