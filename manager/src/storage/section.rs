// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `storage.cfg`: parsing and printing PVE's section format (keys are indented by a tab). What the keys mean is the plugins' matter.
//!
//! ```text
//! dir: local
//!     path /var/lib/atoll/storage
//!     content images,rootdir
//! ```

use std::collections::BTreeMap;

use crate::storage::name::StorageName;

/// One section: a storage as configured.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Section {
    /// Name of the plugin.
    pub kind: String,
    /// Name of the storage.
    pub name: StorageName,
    /// Its keys.
    pub keys: BTreeMap<String, String>,
}

/// A line that does not fit the format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unable to parse storage.cfg, line {number}: {reason}")]
pub struct ParseError {
    /// Counted from 1.
    pub number: usize,
    /// What is wrong with it.
    pub reason: String,
}

/// Reads a whole file. Comments (`#`) and empty lines are dropped.
pub fn parse(text: &str) -> Result<Vec<Section>, ParseError> {
    let mut sections: Vec<Section> = Vec::new();
    for (index, line) in text.lines().enumerate() {
        let wrong = |reason: String| ParseError {
            number: index + 1,
            reason,
        };
        if line.trim().is_empty() || line.trim_start().starts_with('#') {
            continue;
        }
        if line.starts_with([' ', '\t']) {
            let section = sections
                .last_mut()
                .ok_or_else(|| wrong("a key before the first section".to_owned()))?;
            let line = line.trim();
            // A flag such as "disable" may stand alone; it means 1.
            let (key, value) = line
                .split_once(char::is_whitespace)
                .map_or((line, "1"), |(key, value)| (key, value.trim()));
            let former = section.keys.insert(key.to_owned(), value.to_owned());
            if former.is_some() {
                return Err(wrong(format!("key '{key}' is given twice")));
            }
            continue;
        }
        let (kind, name) = line
            .split_once(':')
            .ok_or_else(|| wrong("expected 'TYPE: NAME'".to_owned()))?;
        let name: StorageName = name.trim().parse().map_err(|e| wrong(format!("{e}")))?;
        if sections.iter().any(|section| section.name == name) {
            return Err(wrong(format!("storage '{name}' is defined twice")));
        }
        sections.push(Section {
            kind: kind.trim().to_owned(),
            name,
            keys: BTreeMap::new(),
        });
    }
    Ok(sections)
}

/// Writes a whole file; reading it gives the same sections.
pub fn print(sections: &[Section]) -> String {
    let mut text = String::new();
    for section in sections {
        text.push_str(&format!("{}: {}\n", section.kind, section.name));
        for (key, value) in &section.keys {
            text.push_str(&format!("\t{key} {value}\n"));
        }
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn round_trip() {
        let text = "dir: local\n\tcontent images,iso\n\tpath /srv/x y\n\ndir: other\n\tpath /o\n\n";
        assert_eq!(print(&parse(text).unwrap()), text);
    }

    #[test]
    fn flags_and_comments() {
        let sections = parse("# hello\ndir:  a1\n  path /x\n\tdisable\n").unwrap();
        assert_eq!(sections[0].keys["disable"], "1");
    }

    #[test]
    fn errors_name_the_line() {
        let check = |text: &str, expected: &str| {
            assert_eq!(parse(text).unwrap_err().to_string(), expected);
        };
        check(
            "\tpath /x",
            "unable to parse storage.cfg, line 1: a key before the first section",
        );
        check(
            "dir: a1\n\npath",
            "unable to parse storage.cfg, line 3: expected 'TYPE: NAME'",
        );
        check(
            "dir: ../a",
            "unable to parse storage.cfg, line 1: '../a' is not a valid storage ID",
        );
        check(
            "dir: a1\ndir: a1",
            "unable to parse storage.cfg, line 2: storage 'a1' is defined twice",
        );
    }
}
