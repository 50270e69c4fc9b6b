// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Property strings: small records in one config value, such as `virtio=BC:24:11:00:00:01,bridge=vmbr0`.
//!
//! Which keys there are comes from a [`Kind::PropertyString`] of a table; nothing here knows a key by name.

use std::collections::BTreeMap;

use super::{Kind, MISSING, Param};

/// A property string, parsed and checked. Booleans are 1 or 0 in it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Properties {
    values: Vec<(&'static str, String)>,
}

/// The parts of a [`Kind::PropertyString`].
struct Keys {
    params: &'static [Param],
    default_key: Option<&'static str>,
    value_key: Option<&'static str>,
}

impl Properties {
    /// Parses the value of the parameter `name` by the keys of `kind`, which is a [`Kind::PropertyString`]; any other
    /// kind has no keys. The error is PVE's text, with every key that does not fit on a line of its own.
    pub fn parse(kind: &Kind, name: &str, text: &str) -> Result<Self, String> {
        let keys = Keys::of(kind);
        let mut properties = Self::default();
        // Sorted by key, as PVE's are.
        let mut wrong = BTreeMap::new();
        for item in text.split(',').map(str::trim).filter(|i| !i.is_empty()) {
            for (param, value) in keys.read(item).map_err(malformed)? {
                if properties.get(param.name).is_some() || wrong.contains_key(param.name) {
                    return Err(malformed(format!(
                        "duplicate key in comma-separated list property: {}",
                        param.name
                    )));
                }
                match param.check(param.name, value) {
                    Ok(()) => properties.set(param.name, param.kind.normalize(value)),
                    Err(text) => drop(wrong.insert(param.name, text)),
                }
            }
        }
        for param in keys.params.iter().filter(|param| param.required) {
            if properties.get(param.name).is_none() {
                wrong
                    .entry(param.name)
                    .or_insert_with(|| MISSING.to_owned());
            }
        }
        if wrong.is_empty() {
            return Ok(properties);
        }
        let lines = wrong
            .iter()
            .map(|(key, text)| format!("{name}.{key}: {text}\n"));
        Err(format!(
            "invalid format - format error\n{}",
            lines.collect::<String>()
        ))
    }

    /// The value of a key, if it was given.
    pub fn get(&self, key: &str) -> Option<&str> {
        let found = self.values.iter().find(|(name, _)| *name == key);
        found.map(|(_, value)| value.as_str())
    }

    /// A number that was given; the schema has checked it already.
    pub fn number<T: std::str::FromStr>(&self, key: &str) -> Option<T> {
        self.get(key)?.parse().ok()
    }

    /// A switch: `false` when it was not given.
    pub fn is_set(&self, key: &str) -> bool {
        self.get(key) == Some("1")
    }

    /// Sets a key. The key comes from the table, so its name lives as long as the program.
    pub fn set(&mut self, key: &'static str, value: impl Into<String>) {
        self.remove(key);
        self.values.push((key, value.into()));
    }

    /// Takes a key out.
    pub fn remove(&mut self, key: &str) {
        self.values.retain(|(name, _)| *name != key);
    }

    /// The text again, as PVE writes it: the default key first, then required keys, the others by name.
    pub fn print(&self, kind: &Kind) -> String {
        let keys = Keys::of(kind);
        let mut items = Vec::new();
        let mut done: Vec<&str> = Vec::new();
        if let Some(key) = keys.default_key
            && let Some(value) = self.get(key)
        {
            done.push(key);
            let paired = keys.value_key.and_then(|k| Some((k, self.get(k)?)));
            match paired {
                Some((value_key, other)) => {
                    done.push(value_key);
                    items.push(format!("{value}={other}"));
                }
                None => items.push(value.to_owned()),
            }
        }
        let mut rest: Vec<_> = self
            .values
            .iter()
            .filter(|(k, _)| !done.contains(k))
            .collect();
        let is_optional = |key: &str| !keys.find(key).is_some_and(|param| param.required);
        rest.sort_by_key(|(key, _)| (is_optional(key), *key));
        items.extend(rest.iter().map(|(key, value)| format!("{key}={value}")));
        items.join(",")
    }
}

/// A property string that cannot be taken apart.
fn malformed(text: String) -> String {
    format!("invalid format - {text}\n")
}

impl Keys {
    fn of(kind: &Kind) -> Self {
        match *kind {
            Kind::PropertyString {
                keys,
                default_key,
                value_key,
            } => Self {
                params: keys,
                default_key,
                value_key,
            },
            _ => Self {
                params: &[],
                default_key: None,
                value_key: None,
            },
        }
    }

    fn find(&self, name: &str) -> Option<&'static Param> {
        self.params.iter().find(|param| param.name == name)
    }

    /// The keys that one item gives a value to: mostly one, two for `virtio=BC:24:11:00:00:01`.
    fn read<'a>(&self, item: &'a str) -> Result<Vec<(&'static Param, &'a str)>, String> {
        let default = self.default_key.and_then(|key| self.find(key));
        let Some((key, value)) = item.split_once('=') else {
            let default =
                default.ok_or("value without key, but schema does not define a default key")?;
            return Ok(vec![(default, item)]);
        };
        let (key, value) = (key.trim(), value.trim());
        if let Some(param) = self.find(key) {
            return Ok(vec![(param, value)]);
        }
        let paired = self.value_key.and_then(|key| self.find(key));
        if let (Some(default), Some(paired)) = (default, paired)
            && default.check(default.name, key).is_ok()
        {
            return Ok(vec![(default, key), (paired, value)]);
        }
        Err(format!(
            "invalid key in comma-separated list property: {key}"
        ))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NET: Kind = Kind::PropertyString {
        keys: &[
            Param::new("model", Kind::Choice(&["virtio", "e1000"]), "").required(),
            Param::new("macaddr", Kind::Text { length_max: 17 }, ""),
            Param::new("bridge", Kind::Text { length_max: 15 }, ""),
            Param::new("firewall", Kind::Boolean, ""),
        ],
        default_key: Some("model"),
        value_key: Some("macaddr"),
    };

    #[track_caller]
    fn check(text: &str, expected: Result<&str, &str>) {
        let result = Properties::parse(&NET, "net0", text);
        let result = result.as_ref().map(|p| p.print(&NET));
        assert_eq!(
            result.as_ref().map(String::as_str).map_err(|e| e.as_str()),
            expected
        );
    }

    #[test]
    fn strings_are_parsed_and_printed() {
        check(
            "virtio=aa,firewall=yes,bridge=b0",
            Ok("virtio=aa,bridge=b0,firewall=1"),
        );
        check("model=e1000,bridge=b0", Ok("e1000,bridge=b0"));
        check("virtio", Ok("virtio"));
        check(
            "bridge=b0",
            Err(
                "invalid format - format error\nnet0.model: property is missing and it is not optional\n",
            ),
        );
        check(
            "virtio,virtio",
            Err("invalid format - duplicate key in comma-separated list property: model\n"),
        );
        check(
            "virtio,x=1",
            Err("invalid format - invalid key in comma-separated list property: x\n"),
        );
        check(
            "bridge=verylongbridgename,firewall=7",
            Err("invalid format - format error\n\
                 net0.bridge: value may only be 15 characters long\n\
                 net0.firewall: type check ('boolean') failed - got '7'\n\
                 net0.model: property is missing and it is not optional\n"),
        );
    }
}
