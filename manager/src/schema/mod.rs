// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The description of a parameter: one value of a config key, an API call or a CLI option.
//!
//! Config keys (`guest::keys`) and API routes (crate `atoll-api`) are tables of these; validation, API listing,
//! OpenAPI document, forms of the web page and manual pages are derived from them. The error texts are PVE's.
//! Property strings (`model=virtio,bridge=vmbr0`) are in [`property`].

pub mod format;
pub mod property;

pub use property::Properties;

/// Text for a parameter that the schema does not know.
pub const UNKNOWN: &str =
    "property is not defined in schema and the schema does not allow additional properties";

/// Text for a required parameter that was not given.
pub const MISSING: &str = "property is missing and it is not optional";

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
    /// A whole number of a known form, such as a guest's.
    NumberFormat(Format),
    /// One of a few words.
    Choice(&'static [&'static str]),
    /// `key=value,key2=value2`; see [`property`].
    PropertyString {
        /// The keys.
        keys: &'static [Param],
        /// Name of the key that may be given as a bare value.
        default_key: Option<&'static str>,
        /// When set, `X=Y` with `X` one of the default key's words means default key `X` and this key `Y`: so
        /// `virtio=BC:24:11:00:00:01` is a network card's model and its address.
        value_key: Option<&'static str>,
    },
    /// Several texts: the parameter is given several times, or once with NULs between them.
    List {
        /// Largest length of all in characters.
        length_max: usize,
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

impl Param {
    /// An optional single parameter without a default; the tables change what differs.
    pub const fn new(name: &'static str, kind: Kind, description: &'static str) -> Self {
        Self {
            name,
            count: 0,
            description,
            kind,
            required: false,
            default: None,
        }
    }

    /// The same, but it must be given.
    pub const fn required(mut self) -> Self {
        self.required = true;
        self
    }

    /// The same with a default.
    pub const fn default(mut self, value: &'static str) -> Self {
        self.default = Some(value);
        self
    }

    /// The same as a numbered family; the name ends in `[n]`.
    pub const fn family(mut self, count: u16) -> Self {
        self.count = count;
        self
    }

    /// Whether `name` is this parameter: itself, or a member of the numbered family.
    pub fn covers(&self, name: &str) -> bool {
        if self.count == 0 {
            return self.name == name;
        }
        self.family_index(name).is_some()
    }

    /// The number of `name` in this family: 3 for `net3`.
    pub fn family_index(&self, name: &str) -> Option<u16> {
        let digits = name.strip_prefix(self.name.strip_suffix("[n]")?)?;
        let canonical = digits == "0" || !digits.starts_with('0');
        if !canonical || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return None;
        }
        digits.parse().ok().filter(|index| *index < self.count)
    }

    /// What is wrong with a value given for it, in PVE's words. `name` is its own or that of a member of the family.
    pub fn check(&self, name: &str, value: &str) -> Result<(), String> {
        self.kind.check(name, value)
    }
}

impl Kind {
    /// What is wrong with a value of the parameter `name`, in PVE's words, line ends included.
    pub fn check(&self, name: &str, value: &str) -> Result<(), String> {
        match self {
            Self::Boolean => match parse_boolean(value) {
                Some(_) => Ok(()),
                None => Err(type_check("boolean", value)),
            },
            Self::Integer { min, max } => {
                let number: i64 = value.parse().map_err(|_| type_check("integer", value))?;
                check_range(number, *min, *max)
            }
            Self::Number { min, max } => {
                let number: f64 = value.parse().map_err(|_| type_check("number", value))?;
                if !number.is_finite() {
                    return Err(type_check("number", value));
                }
                check_range(number, *min, *max)
            }
            Self::Text { length_max } | Self::List { length_max } => {
                if value.chars().count() > *length_max {
                    return Err(format!("value may only be {length_max} characters long"));
                }
                Ok(())
            }
            Self::Format(format) => format.verify(value),
            Self::NumberFormat(format) => {
                let _: i64 = value.parse().map_err(|_| type_check("integer", value))?;
                format.verify(value)
            }
            Self::Choice(words) => {
                if words.contains(&value) {
                    return Ok(());
                }
                let words = words.join(", ");
                Err(format!(
                    "value '{value}' does not have a value in the enumeration '{words}'"
                ))
            }
            Self::PropertyString { .. } => Properties::parse(self, name, value).map(drop),
            Self::Upload => Ok(()),
        }
    }

    /// The value in the one form in which it is stored: booleans become 1 or 0, the rest stays.
    pub fn normalize(&self, value: &str) -> String {
        match (self, parse_boolean(value)) {
            (Self::Boolean, Some(true)) => "1".to_owned(),
            (Self::Boolean, Some(false)) => "0".to_owned(),
            _ => value.to_owned(),
        }
    }
}

impl Format {
    /// What is wrong with the text, in PVE's words.
    fn verify(&self, text: &str) -> Result<(), String> {
        (self.check)(text).map_err(|text| format!("invalid format - {text}\n"))
    }
}

/// The booleans of forms, options and property strings.
pub fn parse_boolean(text: &str) -> Option<bool> {
    let is = |word: &&str| text.eq_ignore_ascii_case(word);
    if ["1", "on", "yes", "true"].iter().any(is) {
        Some(true)
    } else if ["0", "off", "no", "false"].iter().any(is) {
        Some(false)
    } else {
        None
    }
}

/// Splits PVE's `-list` formats, which commas, semicolons, blanks and NULs divide.
pub fn split_list(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| c == ',' || c == ';' || c == '\0' || c.is_whitespace())
        .filter(|item| !item.is_empty())
}

fn type_check(kind: &str, value: &str) -> String {
    format!("type check ('{kind}') failed - got '{value}'")
}

fn check_range<T: PartialOrd + std::fmt::Display>(value: T, min: T, max: T) -> Result<(), String> {
    if value < min {
        return Err(format!("value must have a minimum value of {min}"));
    }
    if value > max {
        return Err(format!("value must have a maximum value of {max}"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn families_cover_their_members() {
        let net = Param::new("net[n]", Kind::Boolean, "").family(32);
        assert_eq!(net.family_index("net31"), Some(31));
        for not in [
            "net32", "net", "net01", "net-1", "network0", "net[n]", "net+1",
        ] {
            assert!(!net.covers(not), "{not}");
        }
        assert!(Param::new("cores", Kind::Boolean, "").covers("cores"));
    }

    #[test]
    fn texts_are_those_of_pve() {
        let check = |kind: Kind, value: &str| kind.check("x", value).unwrap_err();
        let port = Kind::Integer { min: 1, max: 9 };
        assert_eq!(check(port, "x"), "type check ('integer') failed - got 'x'");
        assert_eq!(check(port, "0"), "value must have a minimum value of 1");
        assert_eq!(check(port, "10"), "value must have a maximum value of 9");
        assert_eq!(
            check(Kind::Choice(&["a", "b"]), "c"),
            "value 'c' does not have a value in the enumeration 'a, b'"
        );
        assert_eq!(
            check(Kind::Text { length_max: 2 }, "abc"),
            "value may only be 2 characters long"
        );
        let guest = Kind::NumberFormat(format::VMID);
        assert_eq!(check(guest, "x"), "type check ('integer') failed - got 'x'");
        assert_eq!(
            check(guest, "99"),
            "invalid format - value does not look like a valid VM ID\n"
        );
        assert_eq!(
            check(Kind::Number { min: 0.0, max: 1.0 }, "nan"),
            "type check ('number') failed - got 'nan'"
        );
    }

    #[test]
    fn lists_split_on_every_separator() {
        let items: Vec<_> = split_list("a, b;c\0d  e").collect();
        assert_eq!(items, ["a", "b", "c", "d", "e"]);
    }
}
