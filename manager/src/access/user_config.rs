// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `user.cfg`: users, tokens, groups, pools, roles and access rules, in PVE's lines of fields divided by colons.
//!
//! ```text
//! user:USER:ENABLE:EXPIRE:FIRSTNAME:LASTNAME:EMAIL:COMMENT:KEYS:
//! token:USER!TOKEN:EXPIRE:PRIVSEP:COMMENT:
//! group:GROUP:USERS:COMMENT:
//! pool:POOL:COMMENT:GUESTS:STORAGES:
//! role:ROLE:PRIVILEGES:
//! acl:PROPAGATE:PATH:USERS, @GROUPS, TOKENS:ROLES:
//! ```
//!
//! Free text is escaped (`%3A` for a colon). Lines that cannot be read are dropped with a warning in the log: one
//! broken line must not lock everyone out.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fmt::Write as _;

use super::identity::{Identity, UserId};
use super::privilege::{Privilege, PrivilegeSet};
use super::role;
use crate::percent;
use crate::schema::split_list;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct UserConfig {
    /// Users.
    pub users: BTreeMap<UserId, User>,
    /// Groups.
    pub groups: BTreeMap<String, Group>,
    /// Pools of guests and storages.
    pub pools: BTreeMap<String, Pool>,
    /// Roles that somebody made; the built-in ones are not in the file.
    pub roles: BTreeMap<String, PrivilegeSet>,
    /// Access rules by path.
    pub rules: HashMap<String, Vec<Rule>>,
}

/// A user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// May sign in.
    pub enabled: bool,
    /// When the account ends, seconds since 1970; 0 is never.
    pub expire: u64,
    /// First name.
    pub firstname: String,
    /// Last name.
    pub lastname: String,
    /// Mail address.
    pub email: String,
    /// Note.
    pub comment: String,
    /// Keys of second factors, PVE's text.
    pub keys: String,
    /// His tokens.
    pub tokens: BTreeMap<String, Token>,
}

impl Default for User {
    fn default() -> Self {
        Self {
            enabled: true,
            expire: 0,
            firstname: String::new(),
            lastname: String::new(),
            email: String::new(),
            comment: String::new(),
            keys: String::new(),
            tokens: BTreeMap::new(),
        }
    }
}

/// A user's token, without its secret.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Token {
    /// When it ends, seconds since 1970; 0 is never.
    pub expire: u64,
    /// It has rules of its own, which limit it further than its user.
    pub separate: bool,
    /// Note.
    pub comment: String,
}

/// A group of users.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Group {
    /// Its members.
    pub users: BTreeSet<UserId>,
    /// Note.
    pub comment: String,
}

/// A pool: rules on `/pool/NAME` hold for its members.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Pool {
    /// Note.
    pub comment: String,
    /// Numbers of guests.
    pub guests: BTreeSet<u32>,
    /// Names of storages.
    pub storages: BTreeSet<String>,
}

/// Whom a rule is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    /// A user.
    User(UserId),
    /// The members of a group.
    Group(String),
    /// A token.
    Token(Identity),
}

/// A role that a subject has on a path.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rule {
    /// Who.
    pub subject: Subject,
    /// Which role.
    pub role: String,
    /// Whether it holds below the path, too.
    pub propagate: bool,
}

impl Subject {
    fn parse(text: &str) -> Option<Self> {
        if let Some(group) = text.strip_prefix('@') {
            return Some(Self::Group(group.to_owned()));
        }
        let identity: Identity = text.parse().ok()?;
        Some(match identity.token {
            Some(_) => Self::Token(identity),
            None => Self::User(identity.user),
        })
    }

    /// PVE's word for the kind: `user`, `group` or `token`.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::User(_) => "user",
            Self::Group(_) => "group",
            Self::Token(_) => "token",
        }
    }

    /// The name without a mark for the kind.
    pub fn name(&self) -> String {
        match self {
            Self::User(user) => user.to_string(),
            Self::Group(group) => group.clone(),
            Self::Token(token) => token.to_string(),
        }
    }
}

impl UserConfig {
    /// Reads the file.
    pub fn parse(text: &str) -> Self {
        let mut config = Self::default();
        for line in text.lines().filter(|line| !line.trim().is_empty()) {
            let fields: Vec<&str> = line.trim().split(':').collect();
            let taken = match fields[0] {
                "user" => config.take_user(&fields),
                "token" => config.take_token(&fields),
                "group" => config.take_group(&fields),
                "pool" => config.take_pool(&fields),
                "role" => config.take_role(&fields),
                "acl" => config.take_rules(&fields),
                _ => None,
            };
            if taken.is_none() {
                tracing::warn!(line, "user.cfg: ignored a line that cannot be read");
            }
        }
        config
    }

    /// Writes the file.
    pub fn print(&self) -> String {
        let mut out = String::new();
        self.print_users(&mut out);
        self.print_sets(&mut out);
        let mut lines = BTreeSet::new();
        for (path, rules) in &self.rules {
            for rule in rules {
                let mark = if matches!(rule.subject, Subject::Group(_)) {
                    "@"
                } else {
                    ""
                };
                let (propagate, subject) = (u8::from(rule.propagate), rule.subject.name());
                lines.insert(format!(
                    "acl:{propagate}:{path}:{mark}{subject}:{}:\n",
                    rule.role
                ));
            }
        }
        out.extend(lines);
        out
    }

    /// A role's privileges, built-in or not.
    pub fn role(&self, name: &str) -> Option<PrivilegeSet> {
        role::built_in(name).or_else(|| self.roles.get(name).copied())
    }

    fn print_users(&self, out: &mut String) {
        for (id, user) in &self.users {
            let texts = [&user.firstname, &user.lastname, &user.email, &user.comment];
            let texts: Vec<String> = texts.iter().map(|text| percent::encode(text)).collect();
            let (enabled, expire) = (u8::from(user.enabled), user.expire);
            let (texts, keys) = (texts.join(":"), percent::encode(&user.keys));
            line(
                out,
                format_args!("user:{id}:{enabled}:{expire}:{texts}:{keys}:"),
            );
            for (name, token) in &user.tokens {
                let (expire, separate) = (token.expire, u8::from(token.separate));
                let comment = percent::encode(&token.comment);
                line(
                    out,
                    format_args!("token:{id}!{name}:{expire}:{separate}:{comment}:"),
                );
            }
        }
    }

    fn print_sets(&self, out: &mut String) {
        for (name, group) in &self.groups {
            let (users, comment) = (join(&group.users), percent::encode(&group.comment));
            line(out, format_args!("group:{name}:{users}:{comment}:"));
        }
        for (name, pool) in &self.pools {
            let (comment, guests) = (percent::encode(&pool.comment), join(&pool.guests));
            let storages = join(&pool.storages);
            line(
                out,
                format_args!("pool:{name}:{comment}:{guests}:{storages}:"),
            );
        }
        for (name, privileges) in &self.roles {
            let names = join(privileges.iter());
            line(out, format_args!("role:{name}:{names}:"));
        }
    }

    fn take_user(&mut self, fields: &[&str]) -> Option<()> {
        let text = |index: usize| {
            fields
                .get(index)
                .map_or(String::new(), |f| percent::decode(f))
        };
        let id = fields.get(1)?.parse().ok()?;
        let user = User {
            enabled: fields.get(2)? == &"1",
            expire: fields.get(3).and_then(|f| f.parse().ok()).unwrap_or(0),
            firstname: text(4),
            lastname: text(5),
            email: text(6),
            comment: text(7),
            keys: text(8),
            tokens: BTreeMap::new(),
        };
        self.users.insert(id, user);
        Some(())
    }

    fn take_token(&mut self, fields: &[&str]) -> Option<()> {
        let identity: Identity = fields.get(1)?.parse().ok()?;
        let user = self.users.get_mut(&identity.user)?;
        let token = Token {
            expire: fields.get(2)?.parse().ok()?,
            separate: fields.get(3)? == &"1",
            comment: percent::decode(fields.get(4)?),
        };
        user.tokens.insert(identity.token?, token);
        Some(())
    }

    fn take_group(&mut self, fields: &[&str]) -> Option<()> {
        let name = fields
            .get(1)
            .filter(|name| super::identity::is_word(name))?;
        let users = split_list(fields.get(2)?).filter_map(|user| user.parse().ok());
        let group = Group {
            users: users.collect(),
            comment: percent::decode(fields.get(3).unwrap_or(&"")),
        };
        self.groups.insert((*name).to_owned(), group);
        Some(())
    }

    fn take_pool(&mut self, fields: &[&str]) -> Option<()> {
        let pool = Pool {
            comment: percent::decode(fields.get(2)?),
            guests: split_list(fields.get(3)?)
                .filter_map(|id| id.parse().ok())
                .collect(),
            storages: split_list(fields.get(4)?).map(str::to_owned).collect(),
        };
        self.pools.insert((*fields.get(1)?).to_owned(), pool);
        Some(())
    }

    fn take_role(&mut self, fields: &[&str]) -> Option<()> {
        let name = fields
            .get(1)
            .filter(|name| super::identity::is_word(name))?;
        // A privilege that a newer version knows is left out rather than refused.
        let privileges = split_list(fields.get(2)?).filter_map(Privilege::from_name);
        self.roles.insert((*name).to_owned(), privileges.collect());
        Some(())
    }

    fn take_rules(&mut self, fields: &[&str]) -> Option<()> {
        let [_, propagate, path, subjects, roles, ..] = fields else {
            return None;
        };
        let path = normalize_path(path)?;
        for subject in split_list(subjects) {
            for role in split_list(roles) {
                let rule = Rule {
                    subject: Subject::parse(subject)?,
                    role: role.to_owned(),
                    propagate: *propagate == "1",
                };
                self.rules.entry(path.clone()).or_default().push(rule);
            }
        }
        Some(())
    }
}

/// The one spelling of a path: no slash at the end, none doubled. `None` when it does not begin with one.
pub fn normalize_path(path: &str) -> Option<String> {
    let rest = path.strip_prefix('/')?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-@/!".contains(c);
    if !rest.chars().all(allowed) {
        return None;
    }
    let parts: Vec<&str> = rest.split('/').filter(|part| !part.is_empty()).collect();
    Some(format!("/{}", parts.join("/")))
}

fn line(out: &mut String, text: std::fmt::Arguments<'_>) {
    writeln!(out, "{text}").expect("writing to a String cannot fail");
}

fn join<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    items.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TEXT: &str = "\
user:admin@pve:1:0:Ada:L%3A:a@x.org:100%25 ok::
token:admin@pve!ci:1700000000:1:pipeline:
user:root@pam:1:0::::::
group:ops:admin@pve:operators:
pool:web:front:100,101:local:
role:Starter:VM.Audit,VM.PowerMgmt:
acl:0:/vms/100:admin@pve!ci:Starter:
acl:1:/:@ops:PVEAuditor:
";

    #[test]
    fn a_file_reads_back() {
        let config = UserConfig::parse(TEXT);
        assert_eq!(config.print(), TEXT);
        let ada = &config.users[&"admin@pve".parse().unwrap()];
        assert_eq!(
            (ada.lastname.as_str(), ada.comment.as_str()),
            ("L:", "100% ok")
        );
        assert!(ada.tokens["ci"].separate);
    }

    #[test]
    fn broken_lines_are_left_out() {
        let text = "user:root@pam:1:0::::::\nuser:\nnonsense\nacl:1:vms:x:y:\ntoken:a@b!c:0:1::\n";
        let config = UserConfig::parse(text);
        assert_eq!(config.print(), "user:root@pam:1:0::::::\n");
    }

    #[test]
    fn several_subjects_and_roles_of_one_line() {
        let config = UserConfig::parse("acl:1:/vms/:@g,a@pve:PVEAdmin,PVEAuditor:\n");
        assert_eq!(config.rules["/vms"].len(), 4);
    }

    proptest! {
        #[test]
        fn any_text_survives(comment in "\\PC*|[:%\\n]*", name in "[a-zA-Z0-9äö@.-]{1,10}") {
            let mut config = UserConfig::default();
            let user = User { comment, ..User::default() };
            config.users.insert(format!("{name}@pve").parse().unwrap(), user);
            prop_assert_eq!(UserConfig::parse(&config.print()), config);
        }
    }
}
