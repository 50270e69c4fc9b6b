// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Who calls: a user of a realm, perhaps through one of his tokens.

use std::fmt;
use std::str::FromStr;

use crate::id::InvalidId;

/// Longest user id, realm included. PVE's limit.
const USER_ID_LENGTH_MAX: usize = 64;

/// `name@realm`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UserId {
    text: String,
    at: usize,
}

impl UserId {
    /// The administrator of the host, who may do everything.
    pub const ROOT: &str = "root@pam";

    /// The part before the last `@`.
    pub fn name(&self) -> &str {
        &self.text[..self.at]
    }

    /// The part after it.
    pub fn realm(&self) -> &str {
        &self.text[self.at + 1..]
    }

    /// Both.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether this is `root@pam`.
    pub fn is_root(&self) -> bool {
        self.text == Self::ROOT
    }
}

impl FromStr for UserId {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let invalid = || InvalidId {
            text: text.to_owned(),
            what: "user name",
        };
        let at = text.rfind('@').ok_or_else(invalid)?;
        let (name, realm) = (&text[..at], &text[at + 1..]);
        // The characters that user.cfg and UPIDs are divided by cannot be part of a name.
        let name_fits = (1..=60).contains(&name.len())
            && !name.contains(|c: char| c.is_whitespace() || c.is_control() || ":/!,".contains(c));
        if name_fits && is_word(realm) && text.len() <= USER_ID_LENGTH_MAX {
            let text = text.to_owned();
            Ok(Self { text, at })
        } else {
            Err(invalid())
        }
    }
}

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// A letter, then letters, digits, `.`, `-` and `_`: the form of realms, tokens, groups and roles.
pub(super) fn is_word(text: &str) -> bool {
    let rest = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
    text.len() <= 64
        && text.starts_with(|c: char| c.is_ascii_alphabetic())
        && text.chars().all(rest)
}

/// A caller whose identity has been verified.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Identity {
    /// The user.
    pub user: UserId,
    /// Name of the token that was used, if any.
    pub token: Option<String>,
}

impl Identity {
    /// `root@pam` itself.
    pub fn root() -> Self {
        Self {
            user: UserId {
                text: UserId::ROOT.to_owned(),
                at: 4,
            },
            token: None,
        }
    }

    /// Whether this is `root@pam` himself, not one of his tokens.
    pub fn is_root(&self) -> bool {
        self.token.is_none() && self.user.is_root()
    }
}

impl From<UserId> for Identity {
    fn from(user: UserId) -> Self {
        Self { user, token: None }
    }
}

impl FromStr for Identity {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let (user, token) = match text.split_once('!') {
            Some((user, token)) => (user, Some(token)),
            None => (text, None),
        };
        if let Some(token) = token
            && !is_word(token)
        {
            return Err(InvalidId {
                text: token.to_owned(),
                what: "token name",
            });
        }
        Ok(Self {
            user: user.parse()?,
            token: token.map(str::to_owned),
        })
    }
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.token {
            Some(token) => write!(f, "{}!{token}", self.user),
            None => self.user.fmt(f),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identities_read_back() {
        for text in ["root@pam", "a.b@x.org@ldap-1", "admin@pve!ci"] {
            assert_eq!(text.parse::<Identity>().unwrap().to_string(), text);
        }
        let user: UserId = "a@b@pve".parse().unwrap();
        assert_eq!((user.name(), user.realm()), ("a@b", "pve"));
        for bad in [
            "root",
            "@pam",
            "a b@pve",
            "a:b@pve",
            "a@",
            "a@pve!",
            "a@pve!x!y",
            "a\n@pve",
        ] {
            assert!(bad.parse::<Identity>().is_err(), "{bad}");
        }
    }
}
