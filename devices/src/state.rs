// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Versioned state of devices: what a snapshot or a migration takes out of one and puts into its copy.
//!
//! A payload says what it is before its content is looked at: `{"kind":"virtio-blk","version":1,"state":{…}}`.
//! The live type is not the saved type: a device converts. Saved types only grow, by fields with
//! `#[serde(default)]`; the version goes up when a program that knows only the old one must not read the new one.
//!
//! Not here: guest memory ([`crate::memory`]), vCPUs (the VMM's), and what belongs to the host: open files,
//! taps, what was typed and not yet read by the guest.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// The saved form of one kind of device.
pub trait SavedState: Serialize + DeserializeOwned {
    /// Name of the kind, for ever.
    const KIND: &'static str;
    /// Newest version that this program writes and reads; from 1.
    const VERSION: u32;
}

/// A device whose state can be taken out and put back. The VMM's build table takes no device without it.
pub trait DeviceState: Send + Sync {
    /// Takes the state out. The device is paused: no queue runs, no vCPU either.
    fn save(&self) -> Saved;

    /// Puts the state into a device that was just built from the same spec and has not run. After an error the
    /// device must not be used.
    fn restore(&self, saved: &Saved) -> Result<(), StateError>;
}

/// State of one device, as it is written.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Saved {
    /// [`SavedState::KIND`] of the device that wrote it; a device of another kind refuses it.
    pub kind: String,
    /// Version of `state`, from 1; one above [`SavedState::VERSION`] of the reading program is refused.
    pub version: u32,
    /// The payload, in the form of that kind and version; looked at only when both have been checked.
    pub state: serde_json::Value,
}

/// Why a state does not go into a device.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// The state of something else.
    #[error("state of {found:?} for a {expected:?}")]
    Kind {
        /// What the state says.
        found: String,
        /// What the device is.
        expected: &'static str,
    },
    /// Written by a newer program.
    #[error("{kind}: state version {found}, this program knows versions up to {known}")]
    Newer {
        /// What the device is.
        kind: &'static str,
        /// What the state says.
        found: u32,
        /// The newest that can be read.
        known: u32,
    },
    /// Not what that version is made of.
    #[error("{kind}: malformed state")]
    Malformed {
        /// What the device is.
        kind: &'static str,
        /// Where and why.
        source: serde_json::Error,
    },
    /// The device is not the one whose state was taken.
    #[error("{kind}: {what}")]
    Differs {
        /// What the device is.
        kind: &'static str,
        /// What is different.
        what: String,
    },
    /// A part of the device refused its part of the state.
    #[error("{part}")]
    Part {
        /// Its name.
        part: String,
        /// Why.
        source: Box<StateError>,
    },
}

impl StateError {
    /// For `map_err`: names the part that refused.
    pub fn part(part: impl Into<String>) -> impl FnOnce(StateError) -> Self {
        let part = part.into();
        move |source| Self::Part {
            part,
            source: Box::new(source),
        }
    }
}

impl Saved {
    /// Wraps a state with its kind and version, for whoever writes it. The state's type has string keys only, so that it
    /// always has a text.
    pub fn of<S: SavedState>(state: &S) -> Self {
        Self {
            kind: S::KIND.to_owned(),
            version: S::VERSION,
            state: serde_json::to_value(state)
                .expect("saved types have string keys and no failing parts"),
        }
    }

    /// Takes the state out, if it is of the wanted kind and of a version that is known.
    pub fn open<S: SavedState>(&self) -> Result<S, StateError> {
        if self.kind != S::KIND {
            return Err(StateError::Kind {
                found: self.kind.clone(),
                expected: S::KIND,
            });
        }
        if self.version > S::VERSION {
            return Err(StateError::Newer {
                kind: S::KIND,
                found: self.version,
                known: S::VERSION,
            });
        }
        S::deserialize(&self.state).map_err(|source| StateError::Malformed {
            kind: S::KIND,
            source,
        })
    }
}

/// Refuses unless the rebuilt device has what the guest has seen; `what` is a noun phrase.
pub fn same<S: SavedState, T: PartialEq + std::fmt::Display>(
    what: &str,
    saved: T,
    now: T,
) -> Result<(), StateError> {
    if saved == now {
        return Ok(());
    }
    Err(StateError::Differs {
        kind: S::KIND,
        what: format!("{what} was {saved} and is now {now}"),
    })
}

/// Bytes as one hexadecimal string: `#[serde(with = "hex")]`.
pub mod hex {
    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serializer};

    /// Writes the bytes as one string of lower-case digits, two a byte; called by serde.
    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&encode(bytes))
    }

    /// Reads such a string, of either case; anything but pairs of digits is an error of the document.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        decode(&text).ok_or_else(|| D::Error::custom("expected pairs of hexadecimal digits"))
    }

    /// The same as text: two lower-case digits a byte, the high one first.
    pub fn encode(bytes: &[u8]) -> String {
        let digit = |value: u8| char::from_digit(value.into(), 16).expect("below 16");
        bytes
            .iter()
            .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])
            .collect()
    }

    /// `None` if it is anything but pairs of digits.
    pub fn decode(text: &str) -> Option<Vec<u8>> {
        let digits: Vec<u8> = text
            .chars()
            .map(|digit| u8::try_from(digit.to_digit(16)?).ok())
            .collect::<Option<_>>()?;
        let (pairs, rest) = digits.as_chunks::<2>();
        rest.is_empty()
            .then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Two {
        first: u32,
        #[serde(default)]
        second: Option<u32>,
    }

    impl SavedState for Two {
        const KIND: &'static str = "two";
        const VERSION: u32 = 2;
    }

    #[track_caller]
    fn check(text: &str, expected: &str) {
        let saved: Saved = serde_json::from_str(text).unwrap();
        let said = match saved.open::<Two>() {
            Ok(two) => format!("{two:?}"),
            Err(error) => error.to_string(),
        };
        assert_eq!(said, expected);
    }

    #[test]
    fn a_payload_is_known_by_its_header() {
        check(
            r#"{"kind":"two","version":1,"state":{"first":7}}"#,
            "Two { first: 7, second: None }",
        );
        check(
            r#"{"kind":"two","version":3,"state":"whatever a later program writes"}"#,
            "two: state version 3, this program knows versions up to 2",
        );
        check(
            r#"{"kind":"three","version":1,"state":{}}"#,
            "state of \"three\" for a \"two\"",
        );
        check(
            r#"{"kind":"two","version":2,"state":{"first":-1}}"#,
            "two: malformed state",
        );
    }

    #[test]
    fn hexadecimal_is_read_as_it_is_written() {
        assert_eq!(hex::encode(&[0, 0x7f, 0xff]), "007fff");
        assert_eq!(hex::decode("007FfF"), Some(vec![0, 0x7f, 0xff]));
        assert_eq!(hex::decode("abc"), None);
        assert_eq!(hex::decode("ä0"), None);
    }
}
