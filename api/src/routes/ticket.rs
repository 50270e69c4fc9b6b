// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Signing in: tickets for users, realms to choose from, tickets for consoles.

use atoll_manager::access::{Caller, Check, Privilege, UserId};
use atoll_manager::error::Error;
use atoll_manager::schema::{Kind, Param, format, split_list};
use hyper::StatusCode;
use jiff::Timestamp;
use serde_json::{Map, Value, json};

use super::parameters::text;
use super::{object, serve};
use crate::answer::{Answer, Refusal};
use crate::auth::ticket::ConsoleClaim;
use crate::auth::unauthorized;
use crate::daemon::Daemon;
use crate::route::{Call, Returns, Route};

const PASSWORD: Param = Param::new(
    "password",
    text(4096),
    "The password, or a ticket that is still good.",
)
.required();

pub const ROUTES: &[Route] = &[
    Route::get(
        "/access/ticket",
        "Nothing; here for pages that look whether the path is there.",
        serve!(nothing),
    )
    .check(Check::World),
    Route::post(
        "/access/ticket",
        "Sign in: get a ticket, which is good for two hours.",
        serve!(sign_in),
    )
    .params(&[
        Param::new(
            "username",
            text(64),
            "The user, name@realm or, with realm, the name.",
        )
        .required(),
        PASSWORD,
        Param::new(
            "realm",
            Kind::Format(format::REALM),
            "Realm of the user, unless the username has it.",
        ),
        Param::new(
            "otp",
            text(64),
            "One-time password; no realm takes one yet.",
        ),
        Param::new(
            "path",
            text(256),
            "Check that the user has privileges on this path instead of signing in.",
        ),
        Param::new(
            "privs",
            Kind::Format(format::PRIVILEGE_LIST),
            "The privileges to check for.",
        ),
        Param::new(
            "new-format",
            Kind::Boolean,
            "Accepted for PVE's clients; there is only one format.",
        ),
    ])
    .returns(Returns::Object(&[
        "username",
        "ticket",
        "CSRFPreventionToken",
        "cap",
    ]))
    .check(Check::World),
    Route::post(
        "/access/vncticket",
        "Check a console ticket.",
        serve!(check_console),
    )
    .params(&[
        Param::new("authid", text(130), "The user or token it was made for.").required(),
        Param::new("vncticket", text(512), "The ticket.").required(),
        Param::new(
            "path",
            text(256),
            "Path of what it is for, such as /vms/100.",
        )
        .required(),
        Param::new(
            "privs",
            Kind::Format(format::PRIVILEGE_LIST),
            "Privileges that the user must have there.",
        )
        .required(),
        Param::new(
            "port",
            Kind::Integer { min: 1, max: 65535 },
            "Port it was made for.",
        ),
    ])
    .check(Check::World),
    Route::get("/access/domains", "List the realms.", serve!(realms))
        .returns(Returns::List(&["realm", "type", "comment", "default"]))
        .check(Check::World),
];

async fn nothing(_: Call) -> Result<Answer, Refusal> {
    Ok(Answer::NULL)
}

async fn realms(_: Call) -> Result<Answer, Refusal> {
    let rows = atoll_manager::access::REALMS
        .iter()
        .map(|(realm, comment)| {
            let default = (*realm == "pam").then(|| json!(1));
            object([
                ("realm", Some(json!(realm))),
                ("type", Some(json!(realm))),
                ("comment", Some(json!(comment))),
                ("default", default),
            ])
        });
    Ok(Answer::Data(rows.collect()))
}

/// The user that was named, one way or the other.
fn user(call: &Call) -> Option<UserId> {
    let name = call.values.required("username");
    match call.values.text("realm") {
        Some(realm) => format!("{name}@{realm}").parse().ok(),
        None => name.parse().ok(),
    }
}

async fn sign_in(call: Call) -> Result<Answer, Refusal> {
    let daemon = &call.daemon;
    let Some(_place) = daemon.gate.place(call.arrival.peer) else {
        let text = "too many sign-ins at once: try again in a few seconds";
        return Err(Refusal::new(StatusCode::TOO_MANY_REQUESTS, text));
    };
    let user = match user(&call) {
        Some(user) if is_proven(daemon, &user, call.values.required("password")).await => user,
        _ => {
            // The place is held until the answer leaves, so that an address guesses slowly.
            daemon.gate.delay(call.arrival.at).await;
            return Err(unauthorized(atoll_manager::access::AUTHENTICATION_FAILURE));
        }
    };
    let caller = daemon.node.access().caller(&user.clone().into())?;
    if let Some(path) = call.values.text("path") {
        let names = call.values.text("privs").unwrap_or_default();
        demand(&caller, path, names)?;
        return Ok(Answer::Data(
            json!({ "username": user.as_str(), "cap": capabilities(&caller) }),
        ));
    }
    let keys = daemon.keyring.keys();
    let now = Timestamp::now().as_second();
    Ok(Answer::Data(json!({
        "username": user.as_str(),
        "ticket": keys.login(user.as_str(), now),
        "CSRFPreventionToken": keys.csrf(user.as_str(), now),
        "cap": capabilities(&caller),
    })))
}

/// By a ticket of his own (or root's), or by his password.
async fn is_proven(daemon: &Daemon, user: &UserId, password: &str) -> bool {
    let now = Timestamp::now().as_second();
    if let Some(signed) = daemon.keyring.keys().login_user(password, now) {
        let fits = signed == user.as_str() || signed == UserId::ROOT;
        return fits && daemon.node.access().may_sign_in(user).unwrap_or(false);
    }
    let _permit = daemon.gate.check().await;
    match daemon.node.access().verify_password(user, password).await {
        Ok(()) => true,
        Err(Error::Denied(_)) => false,
        Err(error) => {
            tracing::warn!(%user, error = error.chain(), "check a password");
            false
        }
    }
}

fn demand(caller: &Caller, path: &str, names: &str) -> Result<(), Error> {
    let held = caller.privileges(path);
    let lacks =
        |name: &&str| Privilege::from_name(name).is_none_or(|privilege| !held.contains(privilege));
    match split_list(names).find(lacks) {
        None => Ok(()),
        Some(name) => Err(Error::Denied(format!(
            "Permission check failed ({path}, {name})"
        ))),
    }
}

async fn check_console(call: Call) -> Result<Answer, Refusal> {
    let values = &call.values;
    let claim = ConsoleClaim {
        user: values.required("authid"),
        path: values.required("path"),
        port: values.number("port").unwrap_or(0),
    };
    let keys = call.daemon.keyring.keys();
    let now = Timestamp::now().as_second();
    let identity = claim.user.parse().ok();
    let (true, Some(identity)) = (
        keys.console_fits(values.required("vncticket"), &claim, now),
        identity,
    ) else {
        return Err(unauthorized("permission denied - invalid PVEVNC ticket"));
    };
    let caller = call.daemon.node.access().caller(&identity)?;
    demand(&caller, claim.path, values.required("privs"))?;
    Ok(Answer::NULL)
}

/// The groups of `cap`: which privileges each is about, and on which paths.
const CAPABILITIES: &[(&str, &str, &[&str])] = &[
    ("vms", "/vms", &["VM.", "Permissions."]),
    ("storage", "/storage", &["Datastore.", "Permissions."]),
    ("nodes", "/nodes", &["Sys.", "Permissions."]),
    (
        "access",
        "/access",
        &["User.", "Group.", "Realm.", "Permissions."],
    ),
    ("dc", "/", &["Sys.", "SDN.", "Mapping."]),
    ("sdn", "/sdn", &["SDN.", "Permissions."]),
    ("mapping", "/mapping", &["Mapping.", "Permissions."]),
];

/// What the page may offer: privileges that the user has anywhere in each group. Rights are checked elsewhere.
fn capabilities(caller: &Caller) -> Value {
    let held = caller.permissions(None);
    let group = |(name, root, prefixes): &(&str, &str, &[&str])| {
        let below = |path: &str| path == *root || path.starts_with(&format!("{root}/"));
        let pools = |path: &str| path.starts_with("/pool/") && matches!(*name, "vms" | "storage");
        let privileges = held
            .iter()
            .filter(|(path, _)| below(path) || pools(path))
            .flat_map(|(_, privileges)| privileges.keys())
            .map(|privilege| privilege.name())
            .filter(|privilege| prefixes.iter().any(|prefix| privilege.starts_with(prefix)));
        let set: Map<String, Value> = privileges.map(|name| (name.to_owned(), json!(1))).collect();
        ((*name).to_owned(), Value::Object(set))
    };
    CAPABILITIES.iter().map(group).collect::<Map<_, _>>().into()
}
