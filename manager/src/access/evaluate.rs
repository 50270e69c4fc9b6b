// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! What a caller may do on a path: pure functions of `user.cfg`.
//!
//! From `/` down to the path, the deepest level that says something about the caller decides. On one level, rules
//! for the user himself win over those of his groups, and the role `NoAccess` wins over other roles. Rules on the
//! pools that a guest or a storage is in are added. A token with rules of its own has what both it and its user
//! have. `root@pam` may do everything.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::check::{Check, fill_path};
use super::identity::{Identity, UserId};
use super::privilege::{Privilege, PrivilegeSet};
use super::role::NO_ACCESS;
use super::user_config::{Rule, Subject, UserConfig, normalize_path};
use crate::error::Error;

/// What somebody has on a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Granted {
    /// On the path itself.
    pub here: PrivilegeSet,
    /// Those of them that hold below the path, too.
    pub below: PrivilegeSet,
}

impl Granted {
    const ALL: Self = Self {
        here: PrivilegeSet::FULL,
        below: PrivilegeSet::FULL,
    };

    fn intersection(self, other: Self) -> Self {
        Self {
            here: self.here.intersection(other.here),
            below: self.below.intersection(other.below),
        }
    }

    fn union(self, other: Self) -> Self {
        Self {
            here: self.here.union(other.here),
            below: self.below.union(other.below),
        }
    }
}

/// One caller against one state of the rules: make it once for a request, ask it for many paths.
#[derive(Debug, Clone)]
pub struct Caller {
    config: Arc<UserConfig>,
    identity: Identity,
    groups: Vec<String>,
    /// The token has rules of its own.
    separate: bool,
    /// The account or the token has ended, or never was.
    shut: bool,
}

impl Caller {
    pub(super) fn new(config: Arc<UserConfig>, identity: Identity, now: u64) -> Self {
        let user = config.users.get(&identity.user);
        let token = identity.token.as_ref();
        let token = token.map(|name| user.and_then(|user| user.tokens.get(name)));
        let live = |enabled: bool, expire: u64| enabled && (expire == 0 || now < expire);
        let user_is_live = user.map_or(identity.user.is_root(), |u| live(u.enabled, u.expire));
        let token_is_live = match token {
            None => true,
            Some(None) => false,
            Some(Some(token)) => live(true, token.expire),
        };
        let member = |(_, group): &(&String, &super::Group)| group.users.contains(&identity.user);
        let groups = config.groups.iter().filter(member);
        Self {
            groups: groups.map(|(name, _)| name.clone()).collect(),
            separate: token.flatten().is_some_and(|token| token.separate),
            shut: !user_is_live || !token_is_live,
            identity,
            config,
        }
    }

    /// Who it is.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// What the caller may do on a path.
    pub fn privileges(&self, path: &str) -> PrivilegeSet {
        self.granted(path).here
    }

    /// Whether the caller has one privilege on a path.
    pub fn has(&self, path: &str, privilege: Privilege) -> bool {
        self.privileges(path).contains(privilege)
    }

    /// Whether the caller is known to have a privilege on everything below a path: it holds there, and no rule further
    /// down could say otherwise. Spares listings a question for each of thousands of rows.
    pub fn has_all_below(&self, path: &str, privilege: Privilege) -> bool {
        let below = format!("{path}/");
        let mut rules = self.config.rules.keys();
        !rules.any(|path| path.starts_with(&below)) && self.granted(path).below.contains(privilege)
    }

    /// What the caller has on a path, and what of it holds below.
    pub fn granted(&self, path: &str) -> Granted {
        if self.shut {
            return Granted::default();
        }
        let user = if self.identity.user.is_root() {
            Granted::ALL
        } else {
            let subject = Subject::User(self.identity.user.clone());
            self.granted_to(&subject, &self.groups, path)
        };
        if !self.separate {
            return user;
        }
        let own = self.granted_to(&Subject::Token(self.identity.clone()), &[], path);
        user.intersection(own)
    }

    /// Whether a demand holds; the error is PVE's text for what is missing. `lookup` gives the values of the request's
    /// parameters, for paths and for `userid`.
    pub fn check<'a>(
        &self,
        check: &Check,
        lookup: &dyn Fn(&str) -> Option<&'a str>,
    ) -> Result<(), Error> {
        let denied = |what: String| Err(Error::Denied(format!("Permission check failed{what}")));
        if self.shut {
            return denied(" (the account is not active)".to_owned());
        }
        match check {
            Check::World | Check::AnyUser => Ok(()),
            Check::Root if self.identity.is_root() => Ok(()),
            Check::Root => denied(" (user != root@pam)".to_owned()),
            Check::All { path, privileges } => {
                let path = fill_path(path, lookup);
                let held = self.privileges(&path);
                match privileges.iter().find(|p| !held.contains(**p)) {
                    None => Ok(()),
                    Some(missing) => denied(format!(" ({path}, {missing})")),
                }
            }
            Check::Any { path, privileges } => {
                let path = fill_path(path, lookup);
                let held = self.privileges(&path);
                if privileges.iter().any(|p| held.contains(*p)) {
                    return Ok(());
                }
                let names: Vec<&str> = privileges.iter().map(|p| p.name()).collect();
                denied(format!(" ({path}, {})", names.join("|")))
            }
            Check::ModifyPermissions { path } => self.check_modify(&fill_path(path, lookup)),
            Check::SelfUser => match lookup("userid") {
                Some(user) if user == self.identity.user.as_str() => Ok(()),
                _ => denied(String::new()),
            },
            Check::And(checks) => checks
                .iter()
                .try_for_each(|check| self.check(check, lookup)),
            Check::Or(checks) => {
                let mut first = None;
                for check in *checks {
                    match self.check(check, lookup) {
                        Ok(()) => return Ok(()),
                        Err(error) => first = first.or(Some(error)),
                    }
                }
                first.map_or_else(|| denied(String::new()), Err)
            }
        }
    }

    /// Everything the caller may do, by path: the paths of rules, and the roots of the kinds of objects.
    pub fn permissions(&self, path: Option<&str>) -> BTreeMap<String, BTreeMap<Privilege, bool>> {
        let mut paths: BTreeSet<&str> = self.config.rules.keys().map(String::as_str).collect();
        paths.extend([
            "/",
            "/access",
            "/access/groups",
            "/access/realm",
            "/mapping",
            "/nodes",
            "/pool",
            "/sdn",
            "/storage",
            "/vms",
        ]);
        if let Some(path) = path {
            paths = BTreeSet::from([path]);
        }
        let mut all = BTreeMap::new();
        for path in paths {
            let granted = self.granted(path);
            let row = granted.here.iter().map(|p| (p, granted.below.contains(p)));
            let row: BTreeMap<Privilege, bool> = row.collect();
            if !row.is_empty() {
                all.insert(path.to_owned(), row);
            }
        }
        all
    }

    /// Who may allocate a kind of object may hand out rights on it, PVE's `perm-modify`.
    fn check_modify(&self, path: &str) -> Result<(), Error> {
        let held = self.privileges(path);
        let by_kind = match path.split('/').nth(1) {
            Some("storage") => Some(Privilege::DatastoreAllocate),
            Some("vms") => Some(Privilege::VmAllocate),
            Some("pool") => Some(Privilege::PoolAllocate),
            _ => None,
        };
        let enough = |p: Privilege| held.contains(p);
        if enough(Privilege::PermissionsModify) || by_kind.is_some_and(enough) {
            return Ok(());
        }
        Err(Error::Denied(format!(
            "Permission check failed ({path}, {})",
            by_kind.unwrap_or(Privilege::PermissionsModify)
        )))
    }

    fn granted_to(&self, subject: &Subject, groups: &[String], path: &str) -> Granted {
        let Some(path) = normalize_path(path) else {
            return Granted::default();
        };
        let mut granted = Granted::default();
        let mut barred = false;
        for level in levels(&path) {
            let here = level.len() == path.len();
            if let Some(found) = self.on_level(subject, groups, level, here) {
                barred = found.is_none();
                granted = found.unwrap_or_default();
            }
        }
        if barred {
            return granted;
        }
        let pools = self.pools_of(&path);
        pools.fold(granted, |sum, pool| {
            let path = format!("/pool/{pool}");
            sum.union(self.granted_to(subject, groups, &path))
        })
    }

    /// What the rules of one level say: nothing, no access, or some privileges.
    #[expect(
        clippy::option_option,
        reason = "silence and refusal are different answers"
    )]
    fn on_level(
        &self,
        subject: &Subject,
        groups: &[String],
        level: &str,
        here: bool,
    ) -> Option<Option<Granted>> {
        let rules = self.config.rules.get(level)?;
        let holds = |rule: &&Rule| here || rule.propagate;
        let own: Vec<&Rule> = rules
            .iter()
            .filter(holds)
            .filter(|r| r.subject == *subject)
            .collect();
        let chosen: Vec<&Rule> = if own.is_empty() {
            let of_group =
                |rule: &&Rule| matches!(&rule.subject, Subject::Group(g) if groups.contains(g));
            rules.iter().filter(holds).filter(of_group).collect()
        } else {
            own
        };
        if chosen.is_empty() {
            return None;
        }
        if chosen.iter().any(|rule| rule.role == NO_ACCESS) {
            return Some(None);
        }
        let mut granted = Granted::default();
        for rule in chosen {
            let privileges = self.config.role(&rule.role).unwrap_or_default();
            granted.here = granted.here.union(privileges);
            if rule.propagate {
                granted.below = granted.below.union(privileges);
            }
        }
        Some(Some(granted))
    }

    fn pools_of<'a>(&'a self, path: &str) -> impl Iterator<Item = &'a String> {
        let guest: Option<u32> = path.strip_prefix("/vms/").and_then(|id| id.parse().ok());
        let storage = path.strip_prefix("/storage/").map(str::to_owned);
        let member = move |pool: &super::Pool| {
            guest.is_some_and(|id| pool.guests.contains(&id))
                || storage
                    .as_ref()
                    .is_some_and(|name| pool.storages.contains(name))
        };
        let pools = self.config.pools.iter();
        pools
            .filter(move |(_, pool)| member(pool))
            .map(|(name, _)| name)
    }
}

/// Whether a user exists and may sign in now.
pub(super) fn may_sign_in(config: &UserConfig, user: &UserId, now: u64) -> bool {
    match config.users.get(user) {
        Some(found) => found.enabled && (found.expire == 0 || now < found.expire),
        None => user.is_root(),
    }
}

/// `/`, `/vms`, `/vms/100` for `/vms/100`.
fn levels(path: &str) -> impl Iterator<Item = &str> {
    let inner = path.match_indices('/').skip(1).map(|(at, _)| &path[..at]);
    let last = (path.len() > 1).then_some(path);
    std::iter::once("/").chain(inner).chain(last)
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: &str = "\
user:admin@pve:1:0::::::
user:eve@pve:1:0::::::
user:late@pve:1:1000::::::
token:admin@pve!full:0:0::
token:admin@pve!part:0:1::
token:admin@pve!old:5:0::
group:ops:eve@pve,admin@pve::
pool:web::100:local:
acl:1:/:admin@pve:Administrator:
acl:1:/:late@pve:Administrator:
acl:1:/vms:@ops:PVEVMUser:
acl:0:/nodes:eve@pve:PVEAuditor:
acl:1:/vms/200:@ops:PVEVMAdmin:
acl:1:/vms/200:eve@pve:PVEAuditor:
acl:1:/vms/300:eve@pve:NoAccess:
acl:1:/vms/300:eve@pve:PVEVMAdmin:
acl:1:/pool/web:eve@pve:PVEVMAdmin:
acl:1:/vms/100:admin@pve!part:PVEVMUser:
";

    fn caller(identity: &str) -> Caller {
        let config = Arc::new(UserConfig::parse(RULES));
        Caller::new(config, identity.parse().unwrap(), 2000)
    }

    #[track_caller]
    fn check(identity: &str, path: &str, privilege: Privilege, expected: bool) {
        let has = caller(identity).has(path, privilege);
        assert_eq!(has, expected, "{identity} {path} {privilege}");
    }

    #[test]
    fn the_deepest_level_decides() {
        use Privilege::*;
        check("admin@pve", "/", SysModify, true);
        // The rule for his group on /vms is deeper than the one for himself on /.
        check("admin@pve", "/vms/150", VmAllocate, false);
        check("admin@pve", "/vms/150", VmPowerMgmt, true);
        check("eve@pve", "/vms/150", VmPowerMgmt, true);
        check("eve@pve", "/vms/200", VmPowerMgmt, false);
        check("eve@pve", "/vms/200", VmAudit, true);
        check("eve@pve", "/nodes", SysAudit, true);
        check("eve@pve", "/nodes/n1", SysAudit, false);
        check("eve@pve", "/vms/300", VmAudit, false);
        check("eve@pve", "/vms/100", VmAllocate, true);
        check("eve@pve", "/vms/", VmAudit, true);
        check("root@pam", "/anything", SysModify, true);
        check("late@pve", "/", SysAudit, false);
        check("nobody@pve", "/vms", VmAudit, false);
    }

    #[test]
    fn tokens_never_have_more_than_their_user() {
        use Privilege::*;
        check("admin@pve!full", "/", SysModify, true);
        check("admin@pve!part", "/", SysModify, false);
        check("admin@pve!part", "/vms/100", VmPowerMgmt, true);
        check("admin@pve!part", "/vms/100", VmAllocate, false);
        check("admin@pve!old", "/", SysAudit, false);
        check("admin@pve!gone", "/", SysAudit, false);
        check("root@pam!gone", "/", SysAudit, false);
    }

    #[test]
    fn demands_and_their_texts() {
        const POWER: Check = Check::All {
            path: "/vms/{vmid}",
            privileges: &[Privilege::VmPowerMgmt],
        };
        const EITHER: Check = Check::Any {
            path: "/storage/{storage}",
            privileges: &[Privilege::DatastoreAudit, Privilege::DatastoreAllocateSpace],
        };
        let lookup = |name: &str| match name {
            "vmid" => Some("200"),
            "storage" => Some("zfs"),
            "userid" => Some("eve@pve"),
            _ => None,
        };
        let text = |check: Check| {
            let result = caller("eve@pve").check(&check, &lookup);
            result.err().map(|e| e.to_string()).unwrap_or_default()
        };
        assert_eq!(
            text(POWER),
            "Permission check failed (/vms/200, VM.PowerMgmt)"
        );
        assert_eq!(
            text(EITHER),
            "Permission check failed (/storage/zfs, Datastore.Audit|Datastore.AllocateSpace)"
        );
        assert_eq!(
            text(Check::Root),
            "Permission check failed (user != root@pam)"
        );
        assert_eq!(text(Check::Or(&[POWER, Check::SelfUser])), "");
        assert_eq!(text(Check::And(&[Check::AnyUser, POWER])), text(POWER));
        assert!(caller("root@pam").check(&Check::Root, &lookup).is_ok());
        let modify = Check::ModifyPermissions { path: "/vms/100" };
        assert_eq!(text(modify), "");
    }

    #[test]
    fn permissions_are_listed_with_their_reach() {
        let all = caller("eve@pve").permissions(None);
        assert!(!all["/nodes"][&Privilege::SysAudit]);
        assert!(all["/vms"][&Privilege::VmPowerMgmt]);
        assert!(!all.contains_key("/vms/300"));
        assert_eq!(caller("eve@pve").permissions(Some("/vms/5")).len(), 1);
    }
}
