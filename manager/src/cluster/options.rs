// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Options of the datacenter: `datacenter.cfg`, lines of `key: value`, through a table as guests' configs.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::{Map, Value, json};

use super::Cluster;
use crate::error::{Error, MODIFIED};
use crate::guest::config::{self, GuestConfig};
use crate::id::GuestKind;
use crate::schema::format::VMID;
use crate::schema::{Format, Kind, Param, Properties, UNKNOWN};
use crate::store::Expect;

const FILE: &str = "datacenter.cfg";

/// Numbers that are given out when nobody says otherwise: (first, one past the last). PVE's defaults.
const ID_RANGE: (u32, u32) = (100, 1_000_000);

/// The options. Those of parts that are not there yet are kept for PVE's clients and have no effect.
pub const OPTIONS: &[Param] = &[
    Param::new(
        "description",
        Kind::Text { length_max: 65_536 },
        "Notes of the datacenter, in Markdown.",
    ),
    Param::new(
        "keyboard",
        Kind::Text { length_max: 8 },
        "Keyboard layout of displays.",
    ),
    Param::new(
        "language",
        Kind::Text { length_max: 8 },
        "Language of the web page.",
    ),
    Param::new(
        "console",
        Kind::Choice(&["applet", "vv", "html5", "xtermjs"]),
        "Console that the web page opens.",
    ),
    Param::new("next-id", NEXT_ID, "Range of numbers for new guests."),
    Param::new(
        "mac_prefix",
        Kind::Format(MAC_PREFIX),
        "First bytes of addresses that are made up.",
    )
    .default("BC:24:11"),
    Param::new(
        "migration",
        Kind::Text { length_max: 256 },
        "How guests move between nodes.",
    ),
    Param::new(
        "ha",
        Kind::Text { length_max: 256 },
        "What happens to guests when a node shuts down.",
    ),
    Param::new(
        "crs",
        Kind::Text { length_max: 512 },
        "How guests are spread over nodes.",
    ),
    Param::new(
        "replication",
        Kind::Text { length_max: 256 },
        "Replication.",
    ),
    Param::new(
        "bwlimit",
        Kind::Text { length_max: 256 },
        "Limits of bandwidth.",
    ),
    Param::new(
        "max_workers",
        Kind::Integer { min: 1, max: 64 },
        "Guests that bulk actions work on at a time.",
    ),
    Param::new(
        "email_from",
        Kind::Text { length_max: 254 },
        "Sender of mails.",
    ),
    Param::new(
        "http_proxy",
        Kind::Text { length_max: 1024 },
        "Proxy for downloads.",
    ),
    Param::new("notify", Kind::Text { length_max: 512 }, "Notifications."),
    Param::new(
        "tag-style",
        Kind::Text { length_max: 1024 },
        "Colors and order of tags.",
    ),
    Param::new(
        "registered-tags",
        Kind::Text { length_max: 4096 },
        "Tags that only administrators give.",
    ),
    Param::new(
        "user-tag-access",
        Kind::Text { length_max: 1024 },
        "Tags that users may give.",
    ),
    Param::new("webauthn", Kind::Text { length_max: 512 }, "WebAuthn."),
    Param::new("u2f", Kind::Text { length_max: 512 }, "U2F."),
    Param::new(
        "consent-text",
        Kind::Text { length_max: 65_536 },
        "Text to agree to before signing in.",
    ),
    Param::new("location", Kind::Text { length_max: 256 }, "Where it is."),
    Param::new(
        "fencing",
        Kind::Choice(&["watchdog", "hardware", "both"]),
        "How a lost node is stopped.",
    ),
];

const NEXT_ID: Kind = Kind::PropertyString {
    keys: &[
        Param::new("lower", Kind::NumberFormat(VMID), "First number."),
        Param::new(
            "upper",
            Kind::NumberFormat(VMID),
            "One past the last number.",
        ),
    ],
    default_key: None,
    value_key: None,
};

const MAC_PREFIX: Format = Format {
    name: "mac-prefix",
    check: |text| {
        let parts: Vec<&str> = text.split(':').collect();
        let hex = |part: &&str| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit());
        let unicast = u8::from_str_radix(parts[0], 16).is_ok_and(|byte| byte & 1 == 0);
        if (1..=5).contains(&parts.len()) && parts.iter().all(hex) && unicast {
            return Ok(());
        }
        Err("value is not a valid unicast MAC address prefix".to_owned())
    },
};

impl Cluster {
    /// The options that are set, with the digest of the file. Records are objects, as in PVE.
    pub fn options(&self) -> Result<Map<String, Value>, Error> {
        let file = self.options_file()?.0;
        let typed = |(key, text): (&String, &String)| (key.clone(), option(key, text));
        let mut options: Map<String, Value> = file.current.values.iter().map(typed).collect();
        options.insert("digest".to_owned(), json!(file.digest));
        Ok(options)
    }

    /// Sets and removes options.
    pub async fn set_options(
        &self,
        set: BTreeMap<String, String>,
        delete: &[String],
        digest: Option<&str>,
    ) -> Result<(), Error> {
        let mut errors = Vec::new();
        for (name, value) in &set {
            let result = match OPTIONS.iter().find(|param| param.name == name) {
                Some(param) => param.check(name, value),
                None => Err(UNKNOWN.to_owned()),
            };
            errors.extend(result.err().map(|text| (name.clone(), text)));
        }
        if !errors.is_empty() {
            return Err(Error::Invalid(errors));
        }
        let (mut file, expect) = self.options_file()?;
        if digest.is_some_and(|seen| !seen.is_empty() && seen != file.digest) {
            return Err(Error::refused(MODIFIED));
        }
        for key in delete.iter().collect::<BTreeSet<_>>() {
            file.unset(key);
        }
        for (key, value) in set {
            let value = match key.as_str() {
                "description" => config::with_line_feed(value),
                _ => value,
            };
            file.set(key, value);
        }
        match self.store.put(FILE, file.print().into(), expect).await {
            Err(crate::store::StoreError::Conflict { .. }) => Err(Error::refused(MODIFIED)),
            result => Ok(result.map(drop)?),
        }
    }

    /// Prefix of addresses that are made up for network cards.
    pub fn mac_prefix(&self) -> Result<String, Error> {
        let file = self.options_file()?.0;
        Ok(file.get("mac_prefix").unwrap_or("BC:24:11").to_owned())
    }

    pub(super) fn id_range(&self) -> Result<(u32, u32), Error> {
        let file = self.options_file()?.0;
        let given = file
            .get("next-id")
            .and_then(|text| Properties::parse(&NEXT_ID, "next-id", text).ok());
        let given = given.unwrap_or_default();
        let (lower, upper) = ID_RANGE;
        let lower = given.number("lower").unwrap_or(lower);
        Ok((lower, given.number("upper").unwrap_or(upper.max(lower + 1))))
    }

    /// The file has the form of a guest's config, down to the notes.
    fn options_file(&self) -> Result<(GuestConfig, Expect), Error> {
        let entry = self.store.get(FILE)?;
        let expect = entry
            .as_ref()
            .map_or(Expect::Absent, |e| Expect::At(e.revision));
        let value = entry.map(|entry| entry.value).unwrap_or_default();
        let file = GuestConfig::parse(GuestKind::Vm, &String::from_utf8_lossy(&value));
        Ok((file, expect))
    }
}

/// An option with its JSON type: PVE answers records as objects and keeps texts as texts.
fn option(key: &str, text: &str) -> Value {
    const RECORDS: &[&str] = &[
        "crs",
        "ha",
        "migration",
        "next-id",
        "notify",
        "replication",
        "tag-style",
        "u2f",
        "user-tag-access",
        "webauthn",
    ];
    if RECORDS.contains(&key) {
        let pairs = text.split(',').filter_map(|item| item.split_once('='));
        return pairs
            .map(|(name, value)| (name.to_owned(), json!(value)))
            .collect::<Map<_, _>>()
            .into();
    }
    match (key, text.parse::<i64>()) {
        ("max_workers", Ok(number)) => json!(number),
        ("registered-tags", _) => json!(text.split(';').collect::<Vec<_>>()),
        _ => json!(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::MemoryStore;
    use std::sync::Arc;

    fn set(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect()
    }

    #[tokio::test]
    async fn options_are_set_shown_and_removed() {
        let cluster = Cluster::new(Arc::new(MemoryStore::new()));
        let wish = set(&[
            ("migration", "type=secure,network=10.0.0.0/24"),
            ("max_workers", "4"),
            ("description", "two\nlines"),
        ]);
        cluster.set_options(wish, &[], None).await.unwrap();
        let options = cluster.options().unwrap();
        assert_eq!(options["migration"]["type"], json!("secure"));
        assert_eq!(options["max_workers"], json!(4));
        assert_eq!(options["description"], json!("two\nlines\n"));
        let delete = ["migration".to_owned()];
        let digest = options["digest"].as_str();
        cluster
            .set_options(BTreeMap::new(), &delete, digest)
            .await
            .unwrap();
        assert!(!cluster.options().unwrap().contains_key("migration"));
        let stale = cluster
            .set_options(BTreeMap::new(), &delete, digest)
            .await
            .unwrap_err();
        assert_eq!(stale.to_string(), MODIFIED);
    }

    #[tokio::test]
    async fn wrong_options_are_refused() {
        let cluster = Cluster::new(Arc::new(MemoryStore::new()));
        let wish = set(&[("bogus", "1"), ("mac_prefix", "01"), ("max_workers", "0")]);
        let Err(Error::Invalid(errors)) = cluster.set_options(wish, &[], None).await else {
            panic!("expected errors");
        };
        assert_eq!(errors.len(), 3);
        assert_eq!(cluster.mac_prefix().unwrap(), "BC:24:11");
    }
}
