// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The route table for machines: JSON schemas of parameters for the page's forms, and the OpenAPI document that
//! is checked in as `api/openapi.json`.
//!
//! The words of a parameter's schema are those of PVE's own listing, which are JSON Schema's; what is ours alone
//! has the mark `atoll`. Pure functions of the tables.

use atoll_manager::access::{Check, Privilege};
use atoll_manager::guest::keys::{self, Effect};
use atoll_manager::id::GuestKind;
use atoll_manager::schema::{Kind, Param};
use serde_json::{Map, Value, json};

use crate::route::{Method, Returns, Route};
use crate::routes::TABLES;

/// The whole document, OpenAPI 3.1.
pub fn document() -> Value {
    let mut paths = Map::new();
    for route in TABLES.iter().copied().flatten() {
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method.name().to_lowercase()] = operation(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Atoll",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "The REST API of Atoll, which follows that of PVE. Operations marked x-atoll are Atoll's own.",
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "/api2/json" }],
        "security": [{ "ticket": [] }, { "token": [] }],
        "components": { "securitySchemes": {
            "ticket": { "type": "apiKey", "in": "cookie", "name": "PVEAuthCookie" },
            "token": { "type": "apiKey", "in": "header", "name": "Authorization" },
        }},
        "paths": paths,
    })
}

/// One method of one path as the page's forms read it.
pub fn form(route: &Route) -> Value {
    let own_keys = route.keys.map_or(&[][..], keys::table);
    let member = |param: &'static Param| {
        let mut schema = schema(param);
        let key = own_keys.iter().find(|key| key.param.name == param.name);
        if let Some((effect, why)) = key.and_then(|key| effect(key.effect)) {
            schema["effect"] = json!(effect);
            schema["why"] = json!(why);
        }
        (param.name.to_owned(), schema)
    };
    let parameters: Map<String, Value> = route.parameters().map(member).collect();
    json!({
        "method": route.method.name(),
        "path": route.path,
        "description": route.summary,
        "parameters": parameters,
        "permissions": check(&route.check),
        "atoll": u8::from(route.own),
    })
}

/// What a config key does here, when it is less than its description says, and why.
fn effect(effect: Effect) -> Option<(&'static str, &'static str)> {
    match effect {
        Effect::Full => None,
        Effect::None(why) => Some(("none", why)),
        Effect::Server => Some(("server", "set by the server")),
        Effect::Unavailable(why) => Some(("unavailable", why)),
    }
}

/// One parameter in PVE's words.
fn schema(param: &Param) -> Value {
    let mut schema = kind(&param.kind);
    schema["description"] = json!(param.description);
    if !param.required {
        schema["optional"] = json!(1);
    }
    if let Some(default) = param.default {
        schema["default"] = json!(default);
    }
    if param.count > 0 {
        schema["count"] = json!(param.count);
    }
    if is_own(param) {
        schema["atoll"] = json!(1);
    }
    if let Kind::Format(format) | Kind::NumberFormat(format) = param.kind
        && format.name == keys::UNAVAILABLE
    {
        schema["effect"] = json!("unavailable");
        schema["why"] = json!((format.check)("").err());
    }
    schema
}

/// Config keys that PVE does not have.
fn is_own(param: &Param) -> bool {
    let mut keys = GuestKind::ALL.into_iter().flat_map(keys::table);
    keys.any(|key| key.own && key.param.name == param.name)
}

/// Name of a kind in schemas and in `atoll usage`.
pub fn type_name(kind: &Kind) -> &'static str {
    match kind {
        Kind::Boolean => "boolean",
        Kind::Integer { .. } | Kind::NumberFormat(_) => "integer",
        Kind::Number { .. } => "number",
        _ => "string",
    }
}

fn kind(kind: &Kind) -> Value {
    let mut schema = json!({ "type": type_name(kind) });
    match kind {
        Kind::Boolean => {}
        Kind::Integer { min, max } => {
            schema["minimum"] = json!(min);
            schema["maximum"] = json!(max);
        }
        Kind::Number { min, max } => {
            schema["minimum"] = json!(min);
            schema["maximum"] = json!(max);
        }
        Kind::Text { length_max } => schema["maxLength"] = json!(length_max),
        Kind::List { length_max } => {
            schema["type"] = json!("array");
            schema["items"] = json!({ "type": "string", "maxLength": length_max });
        }
        Kind::Format(format) | Kind::NumberFormat(format) => {
            schema["format"] = json!(format.name);
        }
        Kind::Choice(words) => schema["enum"] = json!(words),
        Kind::PropertyString {
            keys, default_key, ..
        } => {
            let keys = keys
                .iter()
                .map(|key| (key.name.to_owned(), self::schema(key)));
            schema["format"] = Value::Object(keys.collect());
            if let Some(key) = default_key {
                schema["default_key"] = json!(key);
            }
        }
        Kind::Upload => schema["format"] = json!("binary"),
    }
    schema
}

/// A permission check as PVE lists it.
fn check(check: &Check) -> Value {
    let names = |privileges: &[Privilege]| -> Value {
        privileges
            .iter()
            .map(|privilege| privilege.name())
            .collect()
    };
    match check {
        Check::World => json!({ "user": "world" }),
        Check::AnyUser => json!({ "user": "all" }),
        Check::Root => json!({ "user": "root@pam" }),
        other => json!({ "check": expression(other, &names) }),
    }
}

fn expression(check: &Check, names: &dyn Fn(&[Privilege]) -> Value) -> Value {
    let each = |word: &str, checks: &[Check]| {
        let checks = checks.iter().map(|check| expression(check, names));
        Value::Array([json!(word)].into_iter().chain(checks).collect())
    };
    match check {
        Check::World => json!(["user", "world"]),
        Check::AnyUser => json!(["user", "all"]),
        Check::Root => json!(["user", "root@pam"]),
        Check::All { path, privileges } => json!(["perm", path, names(privileges)]),
        Check::Any { path, privileges } => json!(["perm", path, names(privileges), "any", 1]),
        Check::ModifyPermissions { path } => json!(["perm-modify", path]),
        Check::SelfUser => json!(["userid-param", "self"]),
        Check::And(checks) => each("and", checks),
        Check::Or(checks) => each("or", checks),
    }
}

fn operation(route: &Route) -> Value {
    let is_in_path = |param: &&Param| route.path.contains(&format!("{{{}}}", param.name));
    let (in_path, others): (Vec<&Param>, Vec<&Param>) = route.parameters().partition(is_in_path);
    let parameter = |place: &str, param: &Param| {
        json!({
            "name": param.name,
            "in": place,
            "required": place == "path" || param.required,
            "description": param.description,
            "schema": plain(&param.kind),
        })
    };
    let has_body = matches!(route.method, Method::Post | Method::Put);
    let mut parameters: Vec<Value> = in_path
        .iter()
        .map(|param| parameter("path", param))
        .collect();
    if !has_body {
        parameters.extend(others.iter().map(|param| parameter("query", param)));
    }
    let mut operation = json!({
        "summary": route.summary,
        "parameters": parameters,
        "responses": { "200": {
            "description": "Done.",
            "content": { "application/json;charset=UTF-8": { "schema": returns(route.returns) } },
        }},
        "x-permissions": check(&route.check),
    });
    if has_body && !others.is_empty() {
        let media = match route.has_upload() {
            true => "multipart/form-data",
            false => "application/x-www-form-urlencoded",
        };
        operation["requestBody"] = json!({ "content": { media: { "schema": object(&others) } } });
    }
    if matches!(route.check, Check::World) {
        operation["security"] = json!([]);
    }
    if route.own {
        operation["x-atoll"] = json!(true);
    }
    operation
}

/// The schema of a body with these members, none else.
fn object(params: &[&'static Param]) -> Value {
    let (families, single): (Vec<&Param>, Vec<&Param>) =
        params.iter().copied().partition(|param| param.count > 0);
    let described = |param: &Param| {
        let mut schema = plain(&param.kind);
        schema["description"] = json!(param.description);
        schema
    };
    let properties = single
        .iter()
        .map(|param| (param.name.to_owned(), described(param)));
    let mut schema = json!({
        "type": "object",
        "additionalProperties": false,
        "properties": properties.collect::<Map<_, _>>(),
    });
    let required: Vec<&str> = single
        .iter()
        .filter(|p| p.required)
        .map(|p| p.name)
        .collect();
    if !required.is_empty() {
        schema["required"] = json!(required);
    }
    if !families.is_empty() {
        let pattern = |param: &&Param| {
            let stem = param.name.trim_end_matches("[n]");
            (format!("^{stem}[0-9]+$"), described(param))
        };
        let patterns: Map<_, _> = families.iter().map(pattern).collect();
        schema["patternProperties"] = Value::Object(patterns);
    }
    schema
}

/// A kind in JSON Schema alone: a property string is a string here.
fn plain(kind: &Kind) -> Value {
    let mut schema = self::kind(kind);
    if schema["format"].is_object() {
        let object = schema.as_object_mut().expect("made as an object");
        object.remove("format");
        object.remove("default_key");
    }
    schema
}

fn returns(returns: Returns) -> Value {
    let object = |names: &[&str]| {
        let members: Map<String, Value> =
            names.iter().map(|n| ((*n).to_owned(), json!({}))).collect();
        json!({ "type": "object", "properties": members })
    };
    let data = match returns {
        Returns::Null => json!({ "type": "null" }),
        Returns::Upid => {
            json!({ "type": "string", "description": "UPID of the task that does the work." })
        }
        Returns::Text | Returns::Stream => json!({ "type": "string" }),
        Returns::Integer => json!({ "type": "integer" }),
        Returns::Object(names) => object(names),
        Returns::List(names) => json!({ "type": "array", "items": object(names) }),
        Returns::Texts => json!({ "type": "array", "items": { "type": "string" } }),
    };
    json!({ "type": "object", "properties": { "data": data }, "required": ["data"] })
}

#[cfg(test)]
mod tests {
    /// `ATOLL_UPDATE=1` writes the file anew instead of comparing.
    #[test]
    fn the_document_that_is_checked_in_is_the_present_one() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");
        let present = serde_json::to_string_pretty(&super::document()).unwrap() + "\n";
        if std::env::var_os("ATOLL_UPDATE").is_some() {
            std::fs::write(file, &present).unwrap();
        }
        let checked_in = std::fs::read_to_string(file).unwrap_or_default();
        let differs = present
            .lines()
            .zip(checked_in.lines())
            .find(|(a, b)| a != b);
        assert!(
            present == checked_in,
            "api/openapi.json is out of date (first difference {differs:?}); write it by \
             `ATOLL_UPDATE=1 cargo nextest run -p atoll-api openapi`"
        );
    }
}
