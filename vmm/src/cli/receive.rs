// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Arguments of `receive`, and of the process beside it that talks to the network.

#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "comments on arguments are help texts, where brackets are what may be left out"
)]

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::HostArguments;

/// Arguments of `receive`.
#[derive(Debug, Args)]
pub struct ReceiveArguments {
    /// Unix socket that is created here, for the source to connect to
    #[arg(long, value_name = "PATH", required_unless_present = "listen")]
    pub socket: Option<PathBuf>,
    /// Wait on the network instead: tcp:HOST:PORT (port 0: one that is free; the log tells)
    #[arg(long, value_name = "ADDRESS", conflicts_with = "socket")]
    pub listen: Option<String>,
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
#[derive(Debug, Args)]
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

/// Arguments of `relay`.
#[derive(Debug, Args)]
pub struct RelayArguments {
    /// Where it listens already: for messages
    #[arg(long, value_name = "ADDRESS")]
    pub listen: String,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "each argument has its own, and clap takes none here"
    )]
    pub network: NetworkArguments,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "each argument has its own, and clap takes none here"
    )]
    pub host: HostArguments,
}

impl ReceiveArguments {
    /// Those of the relay's process, which is to be confined as this one will be.
    #[must_use]
    pub fn for_relay(&self, listen: &str) -> Vec<std::ffi::OsString> {
        let mut all: Vec<std::ffi::OsString> = vec!["relay".into(), "--listen".into()];
        all.push(listen.into());
        let network = &self.network;
        let host = &self.host;
        let files = [
            ("--tls-ca", &network.tls_ca),
            ("--tls-cert", &network.tls_cert),
            ("--tls-key", &network.tls_key),
            ("--log-file", &host.log_file),
        ];
        for (option, file) in files {
            if let Some(file) = file {
                all.extend([option.into(), file.into()]);
            }
        }
        if network.insecure {
            all.push("--insecure".into());
        }
        if let Some(limit) = network.silence_limit_ms {
            all.extend(["--silence-limit-ms".into(), limit.to_string().into()]);
        }
        let word = |value: Option<clap::builder::PossibleValue>| {
            value.map_or_else(String::new, |value| value.get_name().to_owned())
        };
        all.extend([
            "--sandbox".into(),
            word(host.sandbox.to_possible_value()).into(),
        ]);
        all.extend([
            "--seccomp".into(),
            word(host.seccomp.to_possible_value()).into(),
        ]);
        all
    }
}
