// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The form of `aplinfo.dat`, that of Debian's control files: stanzas of `Key: value` lines with empty lines between
//! them. A line that begins with a space or a tab goes on with the value above it; `#` begins a comment.

use std::collections::BTreeMap;

/// One stanza: values by their keys in lower case. The lines of a value are separated by line ends.
pub type Stanza = BTreeMap<String, String>;

/// A line that does not fit the form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("line {number}: {reason}")]
pub struct ParseError {
    /// Counted from 1.
    number: usize,
    reason: &'static str,
}

/// Reads a whole file.
pub fn parse(text: &str) -> Result<Vec<Stanza>, ParseError> {
    let mut stanzas = Vec::new();
    let mut stanza = Stanza::new();
    // Key of the last line, which the next one may go on with.
    let mut last: Option<String> = None;
    for (index, line) in text.lines().enumerate() {
        let wrong = |reason| ParseError {
            number: index + 1,
            reason,
        };
        if line.starts_with('#') {
            continue;
        }
        if line.trim().is_empty() {
            last = None;
            if !stanza.is_empty() {
                stanzas.push(std::mem::take(&mut stanza));
            }
            continue;
        }
        if line.starts_with([' ', '\t']) {
            let value = last.as_ref().and_then(|key| stanza.get_mut(key));
            let value = value.ok_or_else(|| wrong("nothing is there to go on with"))?;
            value.push('\n');
            value.push_str(line.trim());
            continue;
        }
        let (key, value) = line
            .split_once(':')
            .ok_or_else(|| wrong("expected 'Key: value'"))?;
        let key = key.trim().to_ascii_lowercase();
        let former = stanza.insert(key.clone(), value.trim().to_owned());
        if former.is_some() {
            return Err(wrong("a key is given twice"));
        }
        last = Some(key);
    }
    if !stanza.is_empty() {
        stanzas.push(stanza);
    }
    Ok(stanzas)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stanzas_end_at_empty_lines() {
        let stanzas = parse("# x\nA: 1\nB:2:3\n 4\n\t5\n\n \n\nA: 6\n").unwrap();
        let values = |stanza: &Stanza| -> Vec<String> {
            stanza.iter().map(|(k, v)| format!("{k}={v}")).collect()
        };
        assert_eq!(values(&stanzas[0]), ["a=1", "b=2:3\n4\n5"]);
        assert_eq!(values(&stanzas[1]), ["a=6"]);
        assert_eq!(stanzas.len(), 2);
    }

    #[test]
    fn errors_name_the_line() {
        let check = |text: &str, expected: &str| {
            assert_eq!(parse(text).unwrap_err().to_string(), expected);
        };
        check("A: 1\n\n 2", "line 3: nothing is there to go on with");
        check("A: 1\nB", "line 2: expected 'Key: value'");
        check("A: 1\na: 2", "line 2: a key is given twice");
    }
}
