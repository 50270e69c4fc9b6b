// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A config as JSON, with the types that PVE's clients expect.
//!
//! Switches and whole numbers are JSON numbers; everything else is a string, as in PVE: `memory` of a VM is a property
//! string and so `"2048"`, of a container it is a number. Strict clients broke when these changed.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::config::{GuestConfig, Section};
use super::keys;
use crate::id::GuestKind;
use crate::schema::{Kind, parse_boolean};

/// The key that is a secret, a password's hash, and what is shown of it.
pub const SECRET: &str = "cipassword";
/// See [`SECRET`]. PVE's text.
pub const HIDDEN: &str = "**********";

/// Which values to show.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum View {
    /// What the guest gets at its next start: pending changes included.
    Next,
    /// What it has now.
    Current,
}

/// A config with its digest.
pub fn config(config: &GuestConfig, view: View) -> Map<String, Value> {
    let values = match view {
        View::Next => config.next_values(),
        View::Current => config.current.values.clone(),
    };
    object(config, &values, &config.current)
}

/// A snapshot's values; `None` when there is no such snapshot.
pub fn snapshot(config: &GuestConfig, name: &str) -> Option<Map<String, Value>> {
    let section = config.sections.get(name)?;
    Some(object(config, &section.values, section))
}

/// The listing of pending changes.
pub fn pending(config: &GuestConfig) -> Vec<Value> {
    let kind = config.kind;
    let row = |row: super::config::PendingRow| {
        let mut object = Map::new();
        if let Some(text) = &row.value {
            object.insert("value".to_owned(), value(kind, &row.key, text));
        }
        if let Some(text) = &row.pending {
            object.insert("pending".to_owned(), value(kind, &row.key, text));
        }
        if row.delete {
            object.insert("delete".to_owned(), json!(1));
        }
        object.insert("key".to_owned(), json!(row.key));
        Value::Object(object)
    };
    let mut rows: Vec<Value> = config.pending_rows().into_iter().map(row).collect();
    rows.push(json!({ "key": "digest", "value": config.digest }));
    rows
}

/// One value with its JSON type. Keys that no table knows are strings.
pub fn value(kind: GuestKind, key: &str, text: &str) -> Value {
    if key == SECRET {
        return json!(HIDDEN);
    }
    match keys::find(kind, key).map(|row| row.param.kind) {
        Some(Kind::Boolean) => {
            parse_boolean(text).map_or_else(|| json!(text), |b| json!(u8::from(b)))
        }
        Some(Kind::Integer { .. }) => text
            .parse::<i64>()
            .map_or_else(|_| json!(text), |number| json!(number)),
        _ => json!(text),
    }
}

fn object(
    config: &GuestConfig,
    values: &BTreeMap<String, String>,
    section: &Section,
) -> Map<String, Value> {
    let typed = |(key, text): (&String, &String)| (key.clone(), value(config.kind, key, text));
    let mut object: Map<String, Value> = values.iter().map(typed).collect();
    if !section.raw.is_empty() {
        let rows = section.raw.iter().map(|(key, value)| json!([key, value]));
        object.insert("lxc".to_owned(), rows.collect());
    }
    object.insert("digest".to_owned(), json!(config.digest));
    object
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn types_are_those_of_pve() {
        let text = "cores: 2\nmemory: 2048\nonboot: 1\nname: 123\ncpulimit: 1.5\n\n[PENDING]\ncores: 4\ndelete: name\n";
        let vm = GuestConfig::parse(GuestKind::Vm, text);
        let now = config(&vm, View::Current);
        assert_eq!(now["cores"], json!(2));
        assert_eq!(now["memory"], json!("2048"));
        assert_eq!(now["onboot"], json!(1));
        assert_eq!(now["name"], json!("123"));
        assert_eq!(now["cpulimit"], json!("1.5"));
        assert_eq!(now["digest"], json!(vm.digest));
        let next = config(&vm, View::Next);
        assert_eq!((next["cores"].clone(), next.get("name")), (json!(4), None));
        let rows = pending(&vm);
        assert!(rows.contains(&json!({"key": "cores", "value": 2, "pending": 4})));
        assert!(rows.contains(&json!({"key": "name", "value": "123", "delete": 1})));
    }

    #[test]
    fn raw_lines_are_pairs() {
        let text = "memory: 512\nlxc.idmap: u 0 100000 65536\n";
        let container = GuestConfig::parse(GuestKind::Container, text);
        let now = config(&container, View::Next);
        assert_eq!(now["memory"], json!(512));
        assert_eq!(now["lxc"], json!([["lxc.idmap", "u 0 100000 65536"]]));
    }
}
