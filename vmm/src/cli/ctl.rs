// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Arguments of `ctl`: a sub-command for each row of the control API's table, an option for each parameter.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::LazyLock;

use atoll_vmm_protocol::api::{Parameter, ParameterKind, ROUTES, Route};
use atoll_vmm_protocol::spec::{DiskSpec, NetSpec};
use clap::{ArgMatches, Args, FromArgMatches, Subcommand};
use serde_json::Value;

use super::{disk, net};

/// Arguments of `ctl`.
#[derive(Debug, Args)]
#[command(after_help = "The answer is printed as JSON.")]
pub struct CtlArguments {
    /// The machine's control socket, as given to `run`
    #[arg(long, value_name = "PATH", global = true)]
    pub api_socket: Option<PathBuf>,
    /// What is asked
    #[command(subcommand)]
    pub request: CtlRequest,
}

/// A request of the control API with its body. The sub-commands and their options are made from [`ROUTES`].
#[derive(Debug)]
pub struct CtlRequest {
    /// Its row in the API's table.
    pub route: &'static Route,
    /// Its body: parameters by name, those that were given.
    pub body: serde_json::Map<String, Value>,
}

impl Subcommand for CtlRequest {
    /// Deferred: a process that starts a machine parses its own arguments, and needs not make these.
    fn augment_subcommands(command: clap::Command) -> clap::Command {
        command
            .subcommand_required(true)
            .subcommand_value_name("REQUEST")
            .subcommand_help_heading("Requests")
            .defer(|command| command.subcommands(ROUTES.iter().map(request)))
    }

    fn augment_subcommands_for_update(command: clap::Command) -> clap::Command {
        Self::augment_subcommands(command)
    }

    fn has_subcommand(name: &str) -> bool {
        ROUTES.iter().any(|route| &route.path[1..] == name)
    }
}

impl FromArgMatches for CtlRequest {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let (name, values) = matches
            .subcommand()
            .ok_or_else(|| clap::Error::new(clap::error::ErrorKind::MissingSubcommand))?;
        let route = ROUTES.iter().find(|route| &route.path[1..] == name);
        let route = route.expect("the parser takes only paths of ROUTES");
        let value = |parameter: &Parameter| {
            let name = parameter.name;
            let value = match parameter.kind {
                ParameterKind::Integer => values.get_one::<u64>(name).map(|one| (*one).into()),
                ParameterKind::Switch => values.get_one::<bool>(name).map(|one| (*one).into()),
                ParameterKind::Text => values.get_one::<String>(name).map(|one| one.clone().into()),
                ParameterKind::Texts => values
                    .get_many::<String>(name)
                    .map(|all| all.cloned().collect::<Vec<_>>().into()),
                ParameterKind::Disk => values.get_one::<DiskSpec>(name).map(spec_value),
                ParameterKind::Net => values.get_one::<NetSpec>(name).map(spec_value),
            };
            value.map(|value: Value| (name.to_owned(), value))
        };
        let body = route.parameters.iter().filter_map(value).collect();
        Ok(Self { route, body })
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

/// The sub-command of one row.
fn request(route: &'static Route) -> clap::Command {
    clap::Command::new(&route.path[1..])
        .about(route.summary)
        .args(route.parameters.iter().map(option))
}

fn spec_value(spec: &impl serde::Serialize) -> Value {
    serde_json::to_value(spec).expect("a spec has string keys only")
}

/// Names of all options, by their parameters: the parser wants some that live as long as it.
static OPTIONS: LazyLock<HashMap<&str, String>> = LazyLock::new(|| {
    let parameters = ROUTES.iter().flat_map(|route| route.parameters);
    let name = |parameter: &Parameter| (parameter.name, parameter.name.replace('_', "-"));
    parameters.map(name).collect()
});

/// The option of one parameter.
fn option(parameter: &'static Parameter) -> clap::Arg {
    let arg = clap::Arg::new(parameter.name)
        .long(&*OPTIONS[parameter.name])
        .help(parameter.summary)
        .required(parameter.required);
    match parameter.kind {
        ParameterKind::Integer => arg.value_name("N").value_parser(clap::value_parser!(u64)),
        ParameterKind::Switch => arg
            .value_name("true|false")
            .value_parser(clap::value_parser!(bool)),
        ParameterKind::Text => arg.value_name("TEXT"),
        ParameterKind::Texts => arg
            .value_name("NAME,…")
            .value_delimiter(',')
            .action(clap::ArgAction::Append),
        ParameterKind::Disk => arg.value_name("KEYS").value_parser(disk),
        ParameterKind::Net => arg.value_name("KEYS").value_parser(net),
    }
}
