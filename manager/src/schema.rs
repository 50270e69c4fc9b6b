// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The description of a parameter: one value of a config key, an API call or a CLI option.
//!
//! Config keys (`guest::keys`) and API routes (crate `atoll-api`) are tables of these; validation, API listing,
//! OpenAPI document, forms of the web page and manual pages are derived from them.

/// One named parameter.
#[derive(Debug, Clone, Copy)]
pub struct Param {
    /// Name; a numbered family such as `net0` to `net31` has the name `net[n]` and a `count`.
    pub name: &'static str,
    /// How many members a numbered family has; 0 for a single parameter.
    pub count: u16,
    /// What it is, in one sentence, for people.
    pub description: &'static str,
    /// What values fit.
    pub kind: Kind,
    /// Must be given.
    pub required: bool,
    /// Value taken when it is not given, as text.
    pub default: Option<&'static str>,
}

/// What values fit a parameter.
#[derive(Debug, Clone, Copy)]
pub enum Kind {
    /// `1|on|yes|true` or `0|off|no|false`; shown as 1 or 0.
    Boolean,
    /// A whole number in an inclusive range.
    Integer {
        /// Smallest.
        min: i64,
        /// Largest.
        max: i64,
    },
    /// A number, fractions allowed, in an inclusive range.
    Number {
        /// Smallest.
        min: f64,
        /// Largest.
        max: f64,
    },
    /// Free text.
    Text {
        /// Largest length in characters.
        length_max: usize,
    },
    /// Text of a known form.
    Format(Format),
    /// One of a few words.
    Choice(&'static [&'static str]),
    /// `key=value,key2=value2`; the first parameter's key may be left out when `default_key`.
    PropertyString {
        /// The keys.
        keys: &'static [Param],
        /// Name of the key that may be given as a bare value.
        default_key: Option<&'static str>,
    },
    /// A file sent in a multipart body.
    Upload,
}

/// A form of text: its name in the schema, and its check.
#[derive(Debug, Clone, Copy)]
pub struct Format {
    /// PVE's name of the format, such as `pve-vmid`.
    pub name: &'static str,
    /// What is wrong with the text, if anything.
    pub check: fn(&str) -> Result<(), String>,
}
