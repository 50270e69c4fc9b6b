// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Users, groups, tokens, roles and the rules that give them.

use std::collections::BTreeSet;

use atoll_manager::access::{
    BUILT_IN_ROLES, Check, Identity, Privilege, PrivilegeSet, RuleChange, Subject, TokenChange,
    User, UserChange, UserId, parse_privileges,
};
use atoll_manager::error::Error;
use atoll_manager::schema::{Kind, Param, format};
use serde_json::{Map, Value, json};

use super::parameters::{COMMENT, EXPIRE, text};
use super::{bit, object, serve};
use crate::answer::{Answer, Refusal};
use crate::route::{Call, Returns, Route};

const MODIFIES_USERS: Check = Check::All {
    path: "/access/groups",
    privileges: &[Privilege::UserModify],
};
const ALLOCATES_USERS: Check = Check::And(&[
    Check::All {
        path: "/access/realm",
        privileges: &[Privilege::RealmAllocateUser],
    },
    MODIFIES_USERS,
]);
const ALLOCATES_GROUPS: Check = Check::All {
    path: "/access/groups",
    privileges: &[Privilege::GroupAllocate],
};
const SEES_GROUP: Check = Check::Any {
    path: "/access/groups",
    privileges: &[Privilege::SysAudit, Privilege::GroupAllocate],
};
const SEES_USER: Check = Check::Or(&[
    Check::SelfUser,
    Check::Any {
        path: "/access/groups",
        privileges: &[Privilege::UserModify, Privilege::SysAudit],
    },
]);
const SELF_OR_MODIFIES: Check = Check::Or(&[Check::SelfUser, MODIFIES_USERS]);
const MODIFIES_ROLES: Check = Check::All {
    path: "/access",
    privileges: &[Privilege::SysModify],
};

const USERID: Param = Param::new(
    "userid",
    Kind::Format(format::USER_ID),
    "The user, name@realm.",
)
.required();
const ENABLE: Param = Param::new("enable", Kind::Boolean, "The user may sign in.").default("1");
const EMAIL: Param = Param::new("email", text(254), "Mail address.");
const FIRSTNAME: Param = Param::new("firstname", text(1024), "First name.");
const LASTNAME: Param = Param::new("lastname", text(1024), "Last name.");
const KEYS: Param = Param::new("keys", text(1024), "Keys of second factors.");
const GROUPS: Param = Param::new("groups", text(4096), "Groups that the user is in.");
const PRIVSEP: Param = Param::new(
    "privsep",
    Kind::Boolean,
    "The token has only what rules give to it by name.",
)
.default("1");
const PRIVS: Param = Param::new(
    "privs",
    Kind::Format(format::PRIVILEGE_LIST),
    "Its privileges.",
);
const GROUPID: Param = Param::new(
    "groupid",
    Kind::Format(format::GROUP_ID),
    "Name of the group.",
)
.required();

const USER: &[&str] = &[
    "userid",
    "enable",
    "expire",
    "firstname",
    "lastname",
    "email",
    "comment",
    "groups",
    "tokens",
    "realm-type",
];
const TOKEN: &[&str] = &["tokenid", "comment", "expire", "privsep"];

pub const ROUTES: &[Route] = &[
    Route::get("/access/users", "List the users.", serve!(users))
        .params(&[
            Param::new(
                "enabled",
                Kind::Boolean,
                "Only users who may, or may not, sign in.",
            ),
            Param::new("full", Kind::Boolean, "With their groups and tokens."),
        ])
        .returns(Returns::List(USER))
        .check(Check::AnyUser),
    Route::post("/access/users", "Create a user.", serve!(create_user))
        .params(&[
            USERID,
            Param::new("password", text(1024), "First password, for realm pve."),
            ENABLE,
            EXPIRE,
            FIRSTNAME,
            LASTNAME,
            EMAIL,
            COMMENT,
            KEYS,
            GROUPS,
        ])
        .check(ALLOCATES_USERS),
    Route::get("/access/users/{userid}", "Show a user.", serve!(user))
        .returns(Returns::Object(USER))
        .check(SEES_USER),
    Route::put(
        "/access/users/{userid}",
        "Change a user.",
        serve!(update_user),
    )
    .params(&[
        ENABLE,
        EXPIRE,
        FIRSTNAME,
        LASTNAME,
        EMAIL,
        COMMENT,
        KEYS,
        GROUPS,
        Param::new(
            "append",
            Kind::Boolean,
            "Add to the groups instead of replacing them.",
        ),
    ])
    .check(MODIFIES_USERS),
    Route::delete(
        "/access/users/{userid}",
        "Remove a user with his tokens and rules.",
        serve!(delete_user),
    )
    .check(ALLOCATES_USERS),
    Route::get(
        "/access/users/{userid}/token",
        "List a user's tokens.",
        serve!(tokens),
    )
    .returns(Returns::List(TOKEN))
    .check(SELF_OR_MODIFIES),
    Route::get(
        "/access/users/{userid}/token/{tokenid}",
        "Show a token.",
        serve!(token),
    )
    .returns(Returns::Object(TOKEN))
    .check(SELF_OR_MODIFIES),
    Route::post(
        "/access/users/{userid}/token/{tokenid}",
        "Create a token; its secret is shown this once.",
        serve!(create_token),
    )
    .params(&[COMMENT, EXPIRE, PRIVSEP])
    .returns(Returns::Object(&["full-tokenid", "info", "value"]))
    .check(SELF_OR_MODIFIES),
    Route::put(
        "/access/users/{userid}/token/{tokenid}",
        "Change a token, or give it a new secret.",
        serve!(update_token),
    )
    .params(&[
        COMMENT,
        EXPIRE,
        Param::new(
            "privsep",
            Kind::Boolean,
            "The token has only what rules give to it by name.",
        ),
        Param::new("regenerate", Kind::Boolean, "Give it a new secret."),
    ])
    .returns(Returns::Object(TOKEN))
    .check(SELF_OR_MODIFIES),
    Route::delete(
        "/access/users/{userid}/token/{tokenid}",
        "Remove a token.",
        serve!(delete_token),
    )
    .check(SELF_OR_MODIFIES),
    Route::put(
        "/access/password",
        "Set a user's password.",
        serve!(set_password),
    )
    .params(&[
        USERID,
        Param::new("password", text(1024), "The new password.").required(),
        Param::new(
            "confirmation-password",
            text(1024),
            "The caller's present password; accepted for PVE's clients.",
        ),
    ])
    .check(Check::Or(&[Check::SelfUser, ALLOCATES_USERS])),
    Route::get(
        "/access/permissions",
        "What a user may do, by path.",
        serve!(permissions),
    )
    .params(&[
        Param::new("path", text(256), "Only this path."),
        Param::new(
            "userid",
            text(130),
            "The user or token; the caller when not given.",
        ),
    ])
    .returns(Returns::Object(&[]))
    .check(Check::AnyUser),
    Route::get("/access/roles", "List the roles.", serve!(roles))
        .returns(Returns::List(&["roleid", "privs", "special"]))
        .check(Check::AnyUser),
    Route::post("/access/roles", "Create a role.", serve!(create_role))
        .params(&[
            Param::new("roleid", Kind::Format(format::ROLE_ID), "Name of the role.").required(),
            PRIVS,
        ])
        .check(MODIFIES_ROLES),
    Route::get(
        "/access/roles/{roleid}",
        "Show a role's privileges.",
        serve!(role),
    )
    .returns(Returns::Object(&[]))
    .check(Check::AnyUser),
    Route::put(
        "/access/roles/{roleid}",
        "Set a role's privileges.",
        serve!(update_role),
    )
    .params(&[
        PRIVS,
        Param::new(
            "append",
            Kind::Boolean,
            "Add to the privileges instead of replacing them.",
        ),
    ])
    .check(MODIFIES_ROLES),
    Route::delete(
        "/access/roles/{roleid}",
        "Remove a role and the rules that give it.",
        serve!(delete_role),
    )
    .check(MODIFIES_ROLES),
    Route::get("/access/groups", "List the groups.", serve!(groups))
        .returns(Returns::List(&["groupid", "comment", "users"]))
        .check(Check::AnyUser),
    Route::post("/access/groups", "Create a group.", serve!(create_group))
        .params(&[GROUPID, COMMENT])
        .check(ALLOCATES_GROUPS),
    Route::get("/access/groups/{groupid}", "Show a group.", serve!(group))
        .returns(Returns::Object(&["comment", "members"]))
        .check(SEES_GROUP),
    Route::put(
        "/access/groups/{groupid}",
        "Change a group.",
        serve!(update_group),
    )
    .params(&[COMMENT])
    .check(ALLOCATES_GROUPS),
    Route::delete(
        "/access/groups/{groupid}",
        "Remove a group and its rules.",
        serve!(delete_group),
    )
    .check(ALLOCATES_GROUPS),
    Route::get(
        "/access/acl",
        "List the rules: who has which role on which path.",
        serve!(rules),
    )
    .returns(Returns::List(&[
        "path",
        "type",
        "ugid",
        "roleid",
        "propagate",
    ]))
    .check(Check::AnyUser),
    Route::put(
        "/access/acl",
        "Give roles on a path, or take them away.",
        serve!(update_rules),
    )
    .params(&[
        Param::new("path", text(256), "Path of the object.").required(),
        Param::new("roles", Kind::Format(format::ROLE_ID_LIST), "The roles.").required(),
        Param::new("users", text(4096), "Users who get them."),
        Param::new("groups", text(4096), "Groups whose members get them."),
        Param::new("tokens", text(4096), "Tokens that get them."),
        Param::new("propagate", Kind::Boolean, "They hold below the path, too.").default("1"),
        Param::new("delete", Kind::Boolean, "Take them away instead."),
    ])
    .check(Check::ModifyPermissions { path: "{path}" }),
];

fn user_id(call: &Call) -> UserId {
    let checked = call.values.required("userid").parse();
    checked.expect("the schema's format is a user's")
}

fn user_change(call: &Call) -> UserChange {
    let values = &call.values;
    let text = |name: &str| values.text(name).map(str::to_owned);
    UserChange {
        enabled: values.flag_if_given("enable"),
        expire: values.number("expire"),
        firstname: text("firstname"),
        lastname: text("lastname"),
        email: text("email"),
        comment: text("comment"),
        keys: text("keys"),
        groups: values
            .text("groups")
            .map(|_| values.list("groups").into_iter().collect()),
        append: values.flag("append"),
    }
}

fn token_change(call: &Call) -> TokenChange {
    TokenChange {
        expire: call.values.number("expire"),
        separate: call.values.flag_if_given("privsep"),
        comment: call.values.text("comment").map(str::to_owned),
    }
}

/// A text, unless it is empty.
fn filled(text: &str) -> Option<Value> {
    (!text.is_empty()).then(|| json!(text))
}

fn user_members(user: &User) -> Value {
    object([
        ("enable", Some(bit(user.enabled))),
        ("expire", Some(json!(user.expire))),
        ("firstname", filled(&user.firstname)),
        ("lastname", filled(&user.lastname)),
        ("email", filled(&user.email)),
        ("comment", filled(&user.comment)),
        ("keys", filled(&user.keys)),
    ])
}

fn token_members(token: &atoll_manager::access::Token) -> Value {
    object([
        ("expire", Some(json!(token.expire))),
        ("privsep", Some(bit(token.separate))),
        ("comment", filled(&token.comment)),
    ])
}

async fn users(call: Call) -> Result<Answer, Refusal> {
    let config = call.daemon.node.access().config()?;
    let caller = call.caller();
    let sees_all = {
        let has = caller.privileges("/access/groups");
        has.contains(Privilege::UserModify) || has.contains(Privilege::SysAudit)
    };
    let enabled = call.values.flag_if_given("enabled");
    let full = call.values.flag("full");
    let shown = config.users.iter().filter(|(id, user)| {
        let is_own = **id == caller.identity().user;
        (sees_all || is_own) && enabled.is_none_or(|enabled| user.enabled == enabled)
    });
    let rows = shown.map(|(id, user)| {
        let mut row = user_members(user);
        row["userid"] = json!(id.as_str());
        row["realm-type"] = json!(id.realm());
        if full {
            let groups = config
                .groups
                .iter()
                .filter(|(_, group)| group.users.contains(id));
            let names: Vec<&str> = groups.map(|(name, _)| name.as_str()).collect();
            row["groups"] = json!(names.join(","));
            let tokens = user.tokens.iter().map(|(name, token)| {
                let mut members = token_members(token);
                members["tokenid"] = json!(name);
                members
            });
            row["tokens"] = tokens.collect();
        }
        row
    });
    Ok(Answer::Data(rows.collect()))
}

async fn user(call: Call) -> Result<Answer, Refusal> {
    let config = call.daemon.node.access().config()?;
    let id = user_id(&call);
    let user = config.users.get(&id).ok_or_else(|| no_such_user(&id))?;
    let mut data = user_members(user);
    let groups = config
        .groups
        .iter()
        .filter(|(_, group)| group.users.contains(&id));
    data["groups"] = groups.map(|(name, _)| json!(name)).collect();
    let tokens = user
        .tokens
        .iter()
        .map(|(name, token)| (name.clone(), token_members(token)));
    data["tokens"] = Value::Object(tokens.collect());
    Ok(Answer::Data(data))
}

fn no_such_user(id: &UserId) -> Error {
    Error::refused(format!("no such user ('{id}')"))
}

async fn create_user(call: Call) -> Result<Answer, Refusal> {
    let access = call.daemon.node.access();
    let password = call.values.text("password");
    access
        .create_user(&user_id(&call), user_change(&call), password)
        .await?;
    Ok(Answer::NULL)
}

async fn update_user(call: Call) -> Result<Answer, Refusal> {
    let access = call.daemon.node.access();
    access
        .update_user(&user_id(&call), user_change(&call))
        .await?;
    Ok(Answer::NULL)
}

async fn delete_user(call: Call) -> Result<Answer, Refusal> {
    call.daemon
        .node
        .access()
        .delete_user(&user_id(&call))
        .await?;
    Ok(Answer::NULL)
}

async fn set_password(call: Call) -> Result<Answer, Refusal> {
    if call.caller().identity().token.is_some() {
        let text = "Permission check failed (API tokens may not change passwords)";
        return Err(Error::Denied(text.to_owned()).into());
    }
    let password = call.values.required("password");
    call.daemon
        .node
        .access()
        .set_password(&user_id(&call), password)
        .await?;
    Ok(Answer::NULL)
}

async fn tokens(call: Call) -> Result<Answer, Refusal> {
    let config = call.daemon.node.access().config()?;
    let id = user_id(&call);
    let user = config.users.get(&id).ok_or_else(|| no_such_user(&id))?;
    let rows = user.tokens.iter().map(|(name, token)| {
        let mut row = token_members(token);
        row["tokenid"] = json!(name);
        row
    });
    Ok(Answer::Data(rows.collect()))
}

async fn token(call: Call) -> Result<Answer, Refusal> {
    let config = call.daemon.node.access().config()?;
    let id = user_id(&call);
    let user = config.users.get(&id).ok_or_else(|| no_such_user(&id))?;
    let name = call.values.required("tokenid");
    let missing = || Error::refused(format!("no such token '{name}' for user '{id}'"));
    let token = user.tokens.get(name).ok_or_else(missing)?;
    Ok(Answer::Data(token_members(token)))
}

async fn create_token(call: Call) -> Result<Answer, Refusal> {
    let (user, name) = (user_id(&call), call.values.required("tokenid"));
    let mut change = token_change(&call);
    change.separate = change.separate.or(Some(true));
    let info = json!({
        "privsep": bit(change.separate == Some(true)).to_string(),
        "expire": change.expire.unwrap_or(0).to_string(),
        "comment": change.comment.clone().unwrap_or_default(),
    });
    let secret = call
        .daemon
        .node
        .access()
        .create_token(&user, name, change)
        .await?;
    Ok(Answer::Data(
        json!({ "full-tokenid": format!("{user}!{name}"), "info": info, "value": secret }),
    ))
}

async fn update_token(call: Call) -> Result<Answer, Refusal> {
    let (user, name) = (user_id(&call), call.values.required("tokenid").to_owned());
    let access = call.daemon.node.access();
    access
        .update_token(&user, &name, token_change(&call))
        .await?;
    let secret = match call.values.flag("regenerate") {
        true => Some(access.regenerate_token(&user, &name).await?),
        false => None,
    };
    let Answer::Data(mut data) = token(call).await? else {
        unreachable!("a token is shown as data");
    };
    if let Some(secret) = secret {
        data["value"] = json!(secret);
        data["full-tokenid"] = json!(format!("{user}!{name}"));
    }
    Ok(Answer::Data(data))
}

async fn delete_token(call: Call) -> Result<Answer, Refusal> {
    let name = call.values.required("tokenid");
    call.daemon
        .node
        .access()
        .delete_token(&user_id(&call), name)
        .await?;
    Ok(Answer::NULL)
}

async fn permissions(call: Call) -> Result<Answer, Refusal> {
    let access = call.daemon.node.access();
    let mut caller = call.caller().clone();
    if let Some(userid) = call.values.text("userid") {
        let other: Identity = userid
            .parse()
            .map_err(|_| Error::invalid("userid", "value does not look like a valid user name"))?;
        let is_own = caller.identity().user == other.user && caller.identity().token.is_none();
        if !is_own && *caller.identity() != other && !caller.has("/access", Privilege::SysAudit) {
            return Err(
                Error::Denied("Permission check failed (/access, Sys.Audit)".to_owned()).into(),
            );
        }
        caller = access.caller(&other)?;
    }
    let held = caller.permissions(call.values.text("path"));
    let by_path = held.into_iter().map(|(path, privileges)| {
        let propagates = privileges
            .into_iter()
            .map(|(privilege, below)| (privilege.name().to_owned(), bit(below)));
        (path, Value::Object(propagates.collect()))
    });
    Ok(Answer::Data(Value::Object(by_path.collect())))
}

fn names(privileges: PrivilegeSet) -> String {
    privileges
        .iter()
        .map(|privilege| privilege.name())
        .collect::<Vec<_>>()
        .join(",")
}

async fn roles(call: Call) -> Result<Answer, Refusal> {
    let config = call.daemon.node.access().config()?;
    let row = |name: &str, privileges: PrivilegeSet, special: bool| json!({ "roleid": name, "privs": names(privileges), "special": bit(special) });
    let built_in = BUILT_IN_ROLES
        .iter()
        .map(|(name, privileges)| row(name, *privileges, true));
    let own = config
        .roles
        .iter()
        .map(|(name, privileges)| row(name, *privileges, false));
    Ok(Answer::Data(built_in.chain(own).collect()))
}

async fn role(call: Call) -> Result<Answer, Refusal> {
    let config = call.daemon.node.access().config()?;
    let name = call.values.required("roleid");
    let role = config
        .role(name)
        .ok_or_else(|| Error::refused(format!("role '{name}' does not exist")))?;
    let members = role
        .iter()
        .map(|privilege| (privilege.name().to_owned(), json!(1)));
    Ok(Answer::Data(Value::Object(members.collect::<Map<_, _>>())))
}

fn privileges(call: &Call) -> Result<PrivilegeSet, Error> {
    parse_privileges(call.values.text("privs").unwrap_or_default())
}

async fn create_role(call: Call) -> Result<Answer, Refusal> {
    let name = call.values.required("roleid");
    call.daemon
        .node
        .access()
        .create_role(name, privileges(&call)?)
        .await?;
    Ok(Answer::NULL)
}

async fn update_role(call: Call) -> Result<Answer, Refusal> {
    let access = call.daemon.node.access();
    let name = call.values.required("roleid");
    let mut set = privileges(&call)?;
    if call.values.flag("append") {
        set = set.union(access.config()?.role(name).unwrap_or_default());
    }
    access.update_role(name, set).await?;
    Ok(Answer::NULL)
}

async fn delete_role(call: Call) -> Result<Answer, Refusal> {
    call.daemon
        .node
        .access()
        .delete_role(call.values.required("roleid"))
        .await?;
    Ok(Answer::NULL)
}

fn members(users: &BTreeSet<UserId>) -> Vec<&str> {
    users.iter().map(UserId::as_str).collect()
}

async fn groups(call: Call) -> Result<Answer, Refusal> {
    let config = call.daemon.node.access().config()?;
    let caller = call.caller();
    let has = caller.privileges("/access/groups");
    let sees_all = has.contains(Privilege::SysAudit)
        || has.contains(Privilege::UserModify)
        || has.contains(Privilege::GroupAllocate);
    let shown = config
        .groups
        .iter()
        .filter(|(_, group)| sees_all || group.users.contains(&caller.identity().user));
    let rows = shown.map(|(name, group)| {
        object([
            ("groupid", Some(json!(name))),
            ("users", Some(json!(members(&group.users).join(",")))),
            ("comment", filled(&group.comment)),
        ])
    });
    Ok(Answer::Data(rows.collect()))
}

async fn group(call: Call) -> Result<Answer, Refusal> {
    let config = call.daemon.node.access().config()?;
    let name = call.values.required("groupid");
    let group = config.groups.get(name);
    let group = group.ok_or_else(|| Error::refused(format!("group '{name}' does not exist")))?;
    Ok(Answer::Data(
        json!({ "members": members(&group.users), "comment": group.comment }),
    ))
}

async fn create_group(call: Call) -> Result<Answer, Refusal> {
    let comment = call.values.text("comment").unwrap_or_default();
    call.daemon
        .node
        .access()
        .create_group(call.values.required("groupid"), comment)
        .await?;
    Ok(Answer::NULL)
}

async fn update_group(call: Call) -> Result<Answer, Refusal> {
    let comment = call.values.text("comment").unwrap_or_default();
    call.daemon
        .node
        .access()
        .update_group(call.values.required("groupid"), comment)
        .await?;
    Ok(Answer::NULL)
}

async fn delete_group(call: Call) -> Result<Answer, Refusal> {
    call.daemon
        .node
        .access()
        .delete_group(call.values.required("groupid"))
        .await?;
    Ok(Answer::NULL)
}

async fn rules(call: Call) -> Result<Answer, Refusal> {
    let config = call.daemon.node.access().config()?;
    let caller = call.caller();
    let shown = config.rules.iter().filter(|(path, _)| {
        caller.has("/access", Privilege::SysAudit) || caller.has(path, Privilege::PermissionsModify)
    });
    let mut rows: Vec<_> = shown
        .flat_map(|(path, rules)| rules.iter().map(move |rule| (path, rule)))
        .collect();
    rows.sort();
    let rows = rows.into_iter().map(|(path, rule)| {
        json!({
            "path": path, "type": rule.subject.kind(), "ugid": rule.subject.name(),
            "roleid": rule.role, "propagate": bit(rule.propagate),
        })
    });
    Ok(Answer::Data(rows.collect()))
}

async fn update_rules(call: Call) -> Result<Answer, Refusal> {
    let values = &call.values;
    let mut subjects = Vec::new();
    for user in values.list("users") {
        let user = user
            .parse()
            .map_err(|_| Error::invalid("users", format!("'{user}' is no user")))?;
        subjects.push(Subject::User(user));
    }
    subjects.extend(values.list("groups").into_iter().map(Subject::Group));
    for token in values.list("tokens") {
        let token = token
            .parse()
            .map_err(|_| Error::invalid("tokens", format!("'{token}' is no token")))?;
        subjects.push(Subject::Token(token));
    }
    let change = RuleChange {
        path: values.required("path").to_owned(),
        roles: values.list("roles"),
        subjects,
        propagate: values.flag_if_given("propagate").unwrap_or(true),
        delete: values.flag("delete"),
    };
    call.daemon.node.access().update_rules(&change).await?;
    Ok(Answer::NULL)
}
