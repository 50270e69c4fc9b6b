// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Property strings: small records in one config value, such as `virtio=BC:24:11:00:00:01,bridge=vmbr0`.
//!
//! Which keys there are comes from a [`Kind::PropertyString`] of a table; nothing here knows a key by name.

use super::{Kind, MISSING, Param, UNKNOWN};

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
    /// Parses by the keys of `kind`, which is a [`Kind::PropertyString`]; any other kind has no keys. The error is
    /// `KEY: TEXT`, or the text alone when no key can be named.
    pub fn parse(kind: &Kind, text: &str) -> Result<Self, String> {
        let keys = Keys::of(kind);
        let mut properties = Self::default();
        for item in text.split(',').map(str::trim).filter(|i| !i.is_empty()) {
            match item.split_once('=') {
                Some((key, value)) => properties.take(&keys, key.trim(), value.trim())?,
                None => match keys.default_key {
                    Some(key) => properties.insert(&keys, key, item)?,
                    None => {
                        return Err(
                            "value without key, but schema does not define a default key".into(),
                        );
                    }
                },
            }
        }
        let missing = |param: &&Param| param.required && properties.get(param.name).is_none();
        match keys.params.iter().find(missing) {
            Some(param) => Err(format!("{}: {MISSING}", param.name)),
            None => Ok(properties),
        }
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

    fn take(&mut self, keys: &Keys, key: &str, value: &str) -> Result<(), String> {
        if let Some(param) = keys.find(key) {
            return self.insert(keys, param.name, value);
        }
        if let (Some(default_key), Some(value_key)) = (keys.default_key, keys.value_key)
            && keys.find(default_key).is_some_and(|p| p.check(key).is_ok())
        {
            self.insert(keys, default_key, key)?;
            return self.insert(keys, value_key, value);
        }
        // A default value may hold `=` itself, as file names do; then what stands before it is no key's name.
        Err(format!("{key}: {UNKNOWN}"))
    }

    fn insert(&mut self, keys: &Keys, key: &'static str, value: &str) -> Result<(), String> {
        let param = keys.find(key).ok_or_else(|| format!("{key}: {UNKNOWN}"))?;
        if self.get(key).is_some() {
            return Err(format!(
                "duplicate key in comma-separated list property: {key}"
            ));
        }
        param
            .check(value)
            .map_err(|text| format!("{key}: {text}"))?;
        self.values.push((param.name, param.kind.normalize(value)));
        Ok(())
    }
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
        let result = Properties::parse(&NET, text);
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
            Err("model: property is missing and it is not optional"),
        );
        check(
            "virtio,virtio",
            Err("duplicate key in comma-separated list property: model"),
        );
        check(
            "virtio,x=1",
            Err(
                "x: property is not defined in schema and the schema does not allow additional properties",
            ),
        );
        check(
            "virtio,firewall=7",
            Err("firewall: type check ('boolean') failed - got '7'"),
        );
    }
}
