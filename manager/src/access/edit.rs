// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Changes to users, groups, roles, tokens and rules: read, change, write at the revision that was read.
//!
//! A write that loses a race is tried again on the new state, since each change says what it changes and nothing
//! else. Error texts are PVE's where clients match on them.

use std::collections::{BTreeMap, BTreeSet};

use super::identity::{Identity, UserId, is_word};
use super::privilege::{Privilege, PrivilegeSet};
use super::user_config::{Group, Rule, Subject, Token, User, UserConfig, normalize_path};
use super::{Access, role, secret};
use crate::error::{Error, MODIFIED};
use crate::store::{Expect, StoreError, Write};

/// Users, groups, roles, rules.
pub(super) const USER_CONFIG: &str = "user.cfg";
/// Hashes of passwords of realm pve.
pub(super) const SHADOW: &str = "priv/shadow.cfg";
/// Hashes of tokens' secrets.
pub(super) const TOKEN_SECRETS: &str = "priv/token.cfg";

/// How often a change is tried again when others write at the same time.
const TRIES_MAX: usize = 16;

/// Shortest password that is accepted, as in PVE.
const PASSWORD_LENGTH_MIN: usize = 8;

/// What to change of a user; `None` leaves it as it is.
#[derive(Debug, Clone, Default)]
pub struct UserChange {
    /// May sign in.
    pub enabled: Option<bool>,
    /// When the account ends, seconds since 1970; 0 is never.
    pub expire: Option<u64>,
    /// First name.
    pub firstname: Option<String>,
    /// Last name.
    pub lastname: Option<String>,
    /// Mail address.
    pub email: Option<String>,
    /// Note.
    pub comment: Option<String>,
    /// Keys of second factors.
    pub keys: Option<String>,
    /// Groups he is in.
    pub groups: Option<BTreeSet<String>>,
    /// Adds to the groups instead of replacing them.
    pub append: bool,
}

/// What to change of a token; `None` leaves it as it is.
#[derive(Debug, Clone, Default)]
pub struct TokenChange {
    /// When it ends, seconds since 1970; 0 is never.
    pub expire: Option<u64>,
    /// It has rules of its own.
    pub separate: Option<bool>,
    /// Note.
    pub comment: Option<String>,
}

/// Roles that some subjects get, or lose, on a path.
#[derive(Debug, Clone)]
pub struct RuleChange {
    /// Path of the object.
    pub path: String,
    /// Roles.
    pub roles: Vec<String>,
    /// Who.
    pub subjects: Vec<Subject>,
    /// Whether it holds below the path, too.
    pub propagate: bool,
    /// Takes the rules away.
    pub delete: bool,
}

/// The three files while they are changed.
struct Draft {
    config: UserConfig,
    shadow: BTreeMap<String, String>,
    tokens: BTreeMap<String, String>,
}

impl Access {
    /// Makes the first administrator, `user` (of realm pve) with role Administrator on everything, and returns his
    /// random password; `None` when the user exists already.
    pub async fn create_administrator(&self, user: &UserId) -> Result<Option<String>, Error> {
        if self.config()?.users.contains_key(user) {
            return Ok(None);
        }
        let password = secret::random_password()?;
        let hash = self.hash(&password).await?;
        self.edit(|draft| {
            let root = Identity::root().user;
            draft.config.users.entry(root).or_default();
            let comment = "first administrator".to_owned();
            let account = User {
                comment,
                ..User::default()
            };
            draft.config.users.insert(user.clone(), account);
            let rule = Rule {
                subject: Subject::User(user.clone()),
                role: "Administrator".to_owned(),
                propagate: true,
            };
            draft
                .config
                .rules
                .entry("/".to_owned())
                .or_default()
                .push(rule);
            draft.shadow.insert(user.name().to_owned(), hash.clone());
            Ok(())
        })
        .await?;
        Ok(Some(password))
    }

    /// Makes a user, with a password when he is of realm pve.
    pub async fn create_user(
        &self,
        user: &UserId,
        change: UserChange,
        password: Option<&str>,
    ) -> Result<(), Error> {
        let failed = |why: String| Error::refused(format!("create user failed: {why}"));
        if !super::REALMS
            .iter()
            .any(|(realm, _)| *realm == user.realm())
        {
            return Err(failed(format!("domain '{}' does not exist", user.realm())));
        }
        let hash = match password {
            Some(password) => Some(self.hash_new(user, password).await?),
            None => None,
        };
        self.edit(|draft| {
            if draft.config.users.contains_key(user) {
                return Err(failed(format!("user '{user}' already exists")));
            }
            draft.config.users.insert(user.clone(), User::default());
            if let Some(hash) = &hash {
                draft.shadow.insert(user.name().to_owned(), hash.clone());
            }
            draft.change_user(user, &change)
        })
        .await
    }

    /// Changes a user.
    pub async fn update_user(&self, user: &UserId, change: UserChange) -> Result<(), Error> {
        self.edit(|draft| draft.change_user(user, &change)).await
    }

    /// Removes a user with his password, his tokens, his memberships and his rules.
    pub async fn delete_user(&self, user: &UserId) -> Result<(), Error> {
        self.edit(|draft| {
            if draft.config.users.remove(user).is_none() {
                return Err(no_such_user(user));
            }
            if user.realm() == "pve" {
                draft.shadow.remove(user.name());
            }
            for group in draft.config.groups.values_mut() {
                group.users.remove(user);
            }
            let prefix = format!("{user}!");
            draft.tokens.retain(|token, _| !token.starts_with(&prefix));
            draft.drop_rules(|subject| match subject {
                Subject::User(of) => of == user,
                Subject::Token(of) => of.user == *user,
                Subject::Group(_) => false,
            });
            Ok(())
        })
        .await
    }

    /// Sets the password of a user of realm pve.
    pub async fn set_password(&self, user: &UserId, password: &str) -> Result<(), Error> {
        let hash = self.hash_new(user, password).await?;
        self.edit(|draft| {
            if !draft.config.users.contains_key(user) {
                return Err(no_such_user(user));
            }
            draft.shadow.insert(user.name().to_owned(), hash.clone());
            Ok(())
        })
        .await
    }

    /// Makes a token and returns its secret, which is not kept and cannot be shown again.
    pub async fn create_token(
        &self,
        user: &UserId,
        name: &str,
        change: TokenChange,
    ) -> Result<String, Error> {
        if !is_word(name) {
            return Err(Error::invalid(
                "tokenid",
                "value does not look like a valid token ID",
            ));
        }
        self.write_token(user, name, |token| match token {
            Some(_) => Err(Error::invalid("tokenid", "Token already exists.")),
            None => {
                let mut token = Token {
                    separate: true,
                    ..Token::default()
                };
                change.apply(&mut token);
                Ok(token)
            }
        })
        .await
    }

    /// Gives a token a new secret.
    pub async fn regenerate_token(&self, user: &UserId, name: &str) -> Result<String, Error> {
        self.write_token(user, name, |token| {
            token.ok_or_else(|| no_such_token(user, name))
        })
        .await
    }

    /// Changes a token; its secret stays.
    pub async fn update_token(
        &self,
        user: &UserId,
        name: &str,
        change: TokenChange,
    ) -> Result<(), Error> {
        self.edit(|draft| {
            let token = draft.user(user)?.tokens.get_mut(name);
            change.apply(token.ok_or_else(|| no_such_token(user, name))?);
            Ok(())
        })
        .await
    }

    /// Removes a token and its rules.
    pub async fn delete_token(&self, user: &UserId, name: &str) -> Result<(), Error> {
        let identity = Identity {
            user: user.clone(),
            token: Some(name.to_owned()),
        };
        self.edit(|draft| {
            if draft.user(user)?.tokens.remove(name).is_none() {
                return Err(no_such_token(user, name));
            }
            draft.tokens.remove(&identity.to_string());
            draft.drop_rules(|subject| *subject == Subject::Token(identity.clone()));
            Ok(())
        })
        .await
    }

    /// Makes a group.
    pub async fn create_group(&self, name: &str, comment: &str) -> Result<(), Error> {
        check_word("groupid", name)?;
        self.edit(|draft| {
            if draft.config.groups.contains_key(name) {
                let text = format!("create group failed: group '{name}' already exists");
                return Err(Error::refused(text));
            }
            let group = Group {
                comment: comment.to_owned(),
                ..Group::default()
            };
            draft.config.groups.insert(name.to_owned(), group);
            Ok(())
        })
        .await
    }

    /// Changes a group's note.
    pub async fn update_group(&self, name: &str, comment: &str) -> Result<(), Error> {
        self.edit(|draft| {
            let group = draft.config.groups.get_mut(name);
            let group = group.ok_or_else(|| no_such_group(name))?;
            group.comment = comment.to_owned();
            Ok(())
        })
        .await
    }

    /// Removes a group and its rules.
    pub async fn delete_group(&self, name: &str) -> Result<(), Error> {
        self.edit(|draft| {
            if draft.config.groups.remove(name).is_none() {
                return Err(Error::refused(format!(
                    "delete group failed: {}",
                    no_such_group(name)
                )));
            }
            draft.drop_rules(|subject| *subject == Subject::Group(name.to_owned()));
            Ok(())
        })
        .await
    }

    /// Makes a role.
    pub async fn create_role(&self, name: &str, privileges: PrivilegeSet) -> Result<(), Error> {
        check_word("roleid", name)?;
        self.edit(|draft| {
            if draft.config.role(name).is_some() {
                let text = format!("create role failed: role '{name}' already exists");
                return Err(Error::refused(text));
            }
            draft.config.roles.insert(name.to_owned(), privileges);
            Ok(())
        })
        .await
    }

    /// Sets a role's privileges.
    pub async fn update_role(&self, name: &str, privileges: PrivilegeSet) -> Result<(), Error> {
        refuse_built_in(name, "modified")?;
        self.edit(|draft| {
            let role = draft.config.roles.get_mut(name);
            *role.ok_or_else(|| no_such_role(name))? = privileges;
            Ok(())
        })
        .await
    }

    /// Removes a role and the rules that give it.
    pub async fn delete_role(&self, name: &str) -> Result<(), Error> {
        refuse_built_in(name, "deleted")?;
        self.edit(|draft| {
            if draft.config.roles.remove(name).is_none() {
                return Err(no_such_role(name));
            }
            for rules in draft.config.rules.values_mut() {
                rules.retain(|rule| rule.role != name);
            }
            Ok(())
        })
        .await
    }

    /// Gives roles on a path, or takes them away.
    pub async fn update_rules(&self, change: &RuleChange) -> Result<(), Error> {
        let path = normalize_path(&change.path)
            .ok_or_else(|| Error::invalid("path", format!("invalid ACL path '{}'", change.path)))?;
        self.edit(|draft| draft.change_rules(&path, change)).await
    }

    async fn hash(&self, password: &str) -> Result<String, Error> {
        let password = password.to_owned();
        self.hashing(move || secret::hash_password(&password)).await
    }

    async fn hash_new(&self, user: &UserId, password: &str) -> Result<String, Error> {
        if user.realm() != "pve" {
            let text = format!(
                "passwords of realm '{}' are the host's: set it with passwd",
                user.realm()
            );
            return Err(Error::invalid("password", text));
        }
        if password.chars().count() < PASSWORD_LENGTH_MIN {
            let text = format!("value must be at least {PASSWORD_LENGTH_MIN} characters long");
            return Err(Error::invalid("password", text));
        }
        if password.len() > secret::PASSWORD_LENGTH_MAX {
            return Err(Error::invalid(
                "password",
                "value may only be 1024 characters long",
            ));
        }
        self.hash(password).await
    }

    async fn write_token(
        &self,
        user: &UserId,
        name: &str,
        make: impl Fn(Option<Token>) -> Result<Token, Error>,
    ) -> Result<String, Error> {
        let secret = secret::random_secret()?;
        self.edit(|draft| {
            let tokens = &mut draft.user(user)?.tokens;
            let token = make(tokens.get(name).cloned())?;
            tokens.insert(name.to_owned(), token);
            let full = format!("{user}!{name}");
            draft.tokens.insert(full, secret::hash_secret(&secret));
            Ok(())
        })
        .await?;
        Ok(secret)
    }

    async fn edit(&self, change: impl Fn(&mut Draft) -> Result<(), Error>) -> Result<(), Error> {
        let store = &self.shared.store;
        for _ in 0..TRIES_MAX {
            let keys = [USER_CONFIG, SHADOW, TOKEN_SECRETS];
            let mut texts = Vec::new();
            let mut demands = Vec::new();
            for key in keys {
                let entry = store.get(key)?;
                demands.push(
                    entry
                        .as_ref()
                        .map_or(Expect::Absent, |e| Expect::At(e.revision)),
                );
                let value = entry.map(|entry| entry.value).unwrap_or_default();
                texts.push(String::from_utf8_lossy(&value).into_owned());
            }
            let mut draft = Draft {
                config: UserConfig::parse(&texts[0]),
                shadow: secret::parse(&texts[1], ':'),
                tokens: secret::parse(&texts[2], ' '),
            };
            change(&mut draft)?;
            let fresh = [
                draft.config.print(),
                secret::print_shadow(&draft.shadow),
                secret::print_tokens(&draft.tokens),
            ];
            let rows = keys.into_iter().zip(fresh).zip(texts).zip(demands);
            let writes: Vec<Write> = rows
                .filter(|(((_, fresh), text), _)| fresh != text)
                .map(|(((key, fresh), _), demand)| Write::put(key, fresh).expecting(demand))
                .collect();
            match store.transaction(writes).await {
                Err(StoreError::Conflict { .. }) => {}
                result => return Ok(result.map(drop)?),
            }
        }
        Err(Error::refused(MODIFIED))
    }
}

impl Draft {
    fn user(&mut self, id: &UserId) -> Result<&mut User, Error> {
        self.config
            .users
            .get_mut(id)
            .ok_or_else(|| no_such_user(id))
    }

    fn change_user(&mut self, id: &UserId, change: &UserChange) -> Result<(), Error> {
        let user = self.user(id)?;
        user.enabled = change.enabled.unwrap_or(user.enabled);
        user.expire = change.expire.unwrap_or(user.expire);
        for (field, text) in [
            (&mut user.firstname, &change.firstname),
            (&mut user.lastname, &change.lastname),
            (&mut user.email, &change.email),
            (&mut user.comment, &change.comment),
            (&mut user.keys, &change.keys),
        ] {
            if let Some(text) = text {
                field.clone_from(text);
            }
        }
        let Some(groups) = &change.groups else {
            return Ok(());
        };
        if let Some(unknown) = groups.iter().find(|g| !self.config.groups.contains_key(*g)) {
            return Err(no_such_group(unknown));
        }
        for (name, group) in &mut self.config.groups {
            if groups.contains(name) {
                group.users.insert(id.clone());
            } else if !change.append {
                group.users.remove(id);
            }
        }
        Ok(())
    }

    fn change_rules(&mut self, path: &str, change: &RuleChange) -> Result<(), Error> {
        let config = &mut self.config;
        for subject in &change.subjects {
            check_subject(config, subject, change.delete)?;
        }
        for role in &change.roles {
            if config.role(role).is_none() {
                return Err(no_such_role(role));
            }
        }
        let rules = config.rules.entry(path.to_owned()).or_default();
        for subject in &change.subjects {
            for role in &change.roles {
                rules.retain(|rule| rule.subject != *subject || rule.role != *role);
                if !change.delete {
                    rules.push(Rule {
                        subject: subject.clone(),
                        role: role.clone(),
                        propagate: change.propagate,
                    });
                }
            }
        }
        Ok(())
    }

    fn drop_rules(&mut self, drops: impl Fn(&Subject) -> bool) {
        for rules in self.config.rules.values_mut() {
            rules.retain(|rule| !drops(&rule.subject));
        }
    }
}

impl TokenChange {
    fn apply(&self, token: &mut Token) {
        token.expire = self.expire.unwrap_or(token.expire);
        token.separate = self.separate.unwrap_or(token.separate);
        if let Some(comment) = &self.comment {
            token.comment.clone_from(comment);
        }
    }
}

/// Only somebody who exists can get a role; rules of somebody who does not can still be taken away.
fn check_subject(config: &UserConfig, subject: &Subject, delete: bool) -> Result<(), Error> {
    match subject {
        _ if delete => Ok(()),
        Subject::User(user) if config.users.contains_key(user) => Ok(()),
        Subject::User(user) => Err(Error::refused(format!("user '{user}' does not exist"))),
        Subject::Group(name) if config.groups.contains_key(name) => Ok(()),
        Subject::Group(name) => Err(no_such_group(name)),
        Subject::Token(identity) => {
            let name = identity.token.as_deref().unwrap_or_default();
            let user = config.users.get(&identity.user);
            match user.is_some_and(|user| user.tokens.contains_key(name)) {
                true => Ok(()),
                false => Err(no_such_token(&identity.user, name)),
            }
        }
    }
}

fn check_word(parameter: &str, name: &str) -> Result<(), Error> {
    if is_word(name) {
        return Ok(());
    }
    Err(Error::invalid(
        parameter,
        format!("'{name}' contains invalid characters"),
    ))
}

fn refuse_built_in(name: &str, what: &str) -> Result<(), Error> {
    if role::built_in(name).is_none() {
        return Ok(());
    }
    Err(Error::refused(format!(
        "auto-generated role '{name}' cannot be {what}"
    )))
}

fn no_such_user(user: &UserId) -> Error {
    Error::refused(format!("no such user ('{user}')"))
}

fn no_such_token(user: &UserId, name: &str) -> Error {
    Error::refused(format!("no such token '{name}' for user '{user}'"))
}

fn no_such_group(name: &str) -> Error {
    Error::refused(format!("group '{name}' does not exist"))
}

fn no_such_role(name: &str) -> Error {
    Error::refused(format!("role '{name}' does not exist"))
}

/// The privileges of a list, or the first word that names none.
pub fn parse_privileges(list: &str) -> Result<PrivilegeSet, Error> {
    let parse = |word: &str| {
        Privilege::from_name(word)
            .ok_or_else(|| Error::invalid("privs", format!("invalid privilege '{word}'")))
    };
    crate::schema::split_list(list).map(parse).collect()
}
