// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Arguments of `receive`, and those of `atoll-relay` beside it, which talks to the network.

#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "comments on arguments are help texts, where brackets are what may be left out"
)]

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::PossibleValue;
use clap::{Args, ValueEnum};

use super::HostArguments;

/// Arguments of `receive`.
#[derive(Debug, Args)]
pub struct ReceiveArguments {
    /// Unix socket that is created here, for the source to connect to
    #[arg(long, value_name = "PATH", required_unless_present_any = ["listen", "upgrade"])]
    pub socket: Option<PathBuf>,
    /// Wait on the network instead: tcp:HOST:PORT (port 0: one that is free; the log tells)
    #[arg(long, value_name = "ADDRESS", conflicts_with = "socket")]
    pub listen: Option<String>,
    /// Standard input is a connection with the process that has the machine, on this host: go on with what it has open
    /// (`ctl upgrade` starts this)
    #[arg(long, conflicts_with_all = ["socket", "listen", "spec"])]
    pub upgrade: bool,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "each argument has its own, and clap takes none here"
    )]
    pub network: NetworkArguments,
    /// The same machine with this host's files and taps; those of the source when absent
    #[arg(long, value_name = "FILE")]
    pub spec: Option<PathBuf>,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "each argument has its own, and clap takes none here"
    )]
    pub host: HostArguments,
}

/// How a machine that comes over a network is protected.
#[derive(Debug, Clone, Default, Args)]
pub struct NetworkArguments {
    /// PEM file: the authorities that sign the source's certificate
    #[arg(long, value_name = "FILE")]
    pub tls_ca: Option<PathBuf>,
    /// PEM file: this side's certificate, for the name that the source connects to
    #[arg(long, value_name = "FILE")]
    pub tls_cert: Option<PathBuf>,
    /// PEM file: its key
    #[arg(long, value_name = "FILE")]
    pub tls_key: Option<PathBuf>,
    /// Memory may come over the network without TLS
    #[arg(long)]
    pub insecure: bool,
    /// For how long nothing may be heard from the source over the network [default: 20000]
    #[arg(long, value_name = "N")]
    pub silence_limit_ms: Option<u64>,
}

impl NetworkArguments {
    /// The same for `atoll-relay`.
    #[must_use]
    pub fn for_relay(&self) -> Vec<OsString> {
        let files = [
            ("--tls-ca", &self.tls_ca),
            ("--tls-cert", &self.tls_cert),
            ("--tls-key", &self.tls_key),
        ];
        let files = files
            .into_iter()
            .filter_map(|(option, file)| Some((option, file.as_ref()?)));
        let mut all: Vec<OsString> = files
            .flat_map(|(option, file)| [option.into(), file.into()])
            .collect();
        if self.insecure {
            all.push("--insecure".into());
        }
        if let Some(limit) = self.silence_limit_ms {
            all.extend(["--silence-limit-ms".into(), limit.to_string().into()]);
        }
        all
    }
}

impl ReceiveArguments {
    /// What `atoll-relay` is to do, confined as this process will be.
    #[must_use]
    pub fn for_relay(&self, listen: &str) -> Vec<OsString> {
        let mut all: Vec<OsString> = vec!["serve".into(), "--listen".into(), listen.into()];
        all.extend(self.network.for_relay());
        if let Some(file) = &self.host.log_file {
            all.extend(["--log-file".into(), file.into()]);
        }
        let confinement = &self.host.confinement;
        let word = |value: Option<PossibleValue>| {
            value.map_or_else(String::new, |value| value.get_name().to_owned())
        };
        let (sandbox, seccomp) = (&confinement.sandbox, &confinement.seccomp);
        all.extend(["--sandbox".into(), word(sandbox.to_possible_value()).into()]);
        all.extend(["--seccomp".into(), word(seccomp.to_possible_value()).into()]);
        all
    }
}
