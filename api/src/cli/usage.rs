// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll usage PATH`: what is below a path and what its methods take, from the route table.

use std::fmt::Write as _;

use atoll_manager::schema::Param;

use super::CliError;
use crate::openapi::type_name;
use crate::route::{Method, Route};
use crate::routes::TABLES;

/// The help text of a path; parts in braces match themselves or any value.
pub fn of(path: &str) -> Result<String, CliError> {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty()).collect();
    let begins = |route: &&Route| {
        let own: Vec<&str> = route
            .path
            .split('/')
            .filter(|part| !part.is_empty())
            .collect();
        let same = |(own, part): (&&str, &&str)| own == part || own.starts_with('{');
        own.len() >= parts.len() && own.iter().zip(&parts).all(same)
    };
    let routes: Vec<&Route> = TABLES.iter().copied().flatten().filter(begins).collect();
    if routes.is_empty() {
        return Err(CliError::Usage(format!("there is no {path} in this API")));
    }
    let depth = |route: &Route| {
        route
            .path
            .split('/')
            .filter(|part| !part.is_empty())
            .count()
    };
    let mut text = String::new();
    for route in routes.iter().filter(|route| depth(route) == parts.len()) {
        describe(route, &mut text);
    }
    for route in routes.iter().filter(|route| depth(route) > parts.len()) {
        let _ = writeln!(
            text,
            "{:7} {}  {}",
            command(route.method),
            route.path,
            route.summary
        );
    }
    Ok(text)
}

fn command(method: Method) -> &'static str {
    match method {
        Method::Get => "get",
        Method::Post => "create",
        Method::Put => "set",
        Method::Delete => "delete",
    }
}

fn describe(route: &Route, text: &mut String) {
    let _ = writeln!(
        text,
        "atoll {} {}\n  {}",
        command(route.method),
        route.path,
        route.summary
    );
    let in_path = |param: &&Param| route.path.contains(&format!("{{{}}}", param.name));
    for param in route.parameters().filter(|param| !in_path(param)) {
        let required = if param.required { ", required" } else { "" };
        let kind = type_name(&param.kind);
        let _ = writeln!(
            text,
            "  --{} <{kind}>{required}\n      {}",
            param.name, param.description
        );
    }
    text.push('\n');
}
