// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll-vmm serve-disk`: a disk for another process, over NBD, to be read and written. What a mirror copies to from
//! another host, through whatever connects the two sockets.
//!
//! It is confined as a machine is: whoever connects speaks to a process that has the disk, the socket, and nothing else.

#![allow(
    rustdoc::broken_intra_doc_links,
    reason = "comments on arguments are help texts, where brackets are what may be left out"
)]

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use atoll_disk::nbd::{Content, Export, NbdServer};
use atoll_thread::Kind;
use atoll_vmm_protocol::spec::DiskSpec;
use clap::Args;
use nix::sys::signal::{SigSet, Signal};

use crate::cli::{self, ConfinementArguments};
use crate::sandbox::Identity;
use crate::{log, resources, sandbox, socket};

/// Arguments of `serve-disk`.
#[derive(Debug, Args)]
pub struct Arguments {
    /// Unix socket that is created here, for this user only; the disk is its default export. In its sandbox the process
    /// cannot remove it: the next one at its place does
    #[arg(long, value_name = "PATH")]
    pub socket: PathBuf,
    /// The disk: path=FILE,format=raw|qcow2[,backing=FORMAT:FILE][,cache=MODE][,discard][,readonly]
    #[arg(long, value_name = "KEYS", value_parser = cli::disk)]
    pub disk: DiskSpec,
    #[command(flatten)]
    #[expect(
        missing_docs,
        reason = "each argument has its own, and clap takes none here"
    )]
    pub confinement: ConfinementArguments,
}

/// Serves the disk until SIGTERM or SIGINT. Its image is locked meanwhile.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    arguments.confinement.check(Identity::current())?;
    let disk = &arguments.disk;
    let served = DiskSpec {
        path: disk.path.clone(),
        format: disk.format,
        backing: disk.backing.clone(),
        cache: disk.cache,
        discard: disk.discard,
        readonly: disk.readonly,
        ..DiskSpec::default()
    };
    anyhow::ensure!(
        *disk == served,
        "a disk that is served has a path, a format, backing images, a cache, discard and readonly"
    );
    log::to(None).context("open the log")?;
    // Before there are threads, which would have the signals' own end otherwise.
    let mut ending = SigSet::empty();
    ending.add(Signal::SIGTERM);
    ending.add(Signal::SIGINT);
    ending.thread_block().context("block signals")?;
    let content = Content::Disk(resources::bare_disk(disk)?);
    let path = &arguments.socket;
    let listener = socket::listen(path).with_context(|| format!("socket {}", path.display()))?;
    let export = Export {
        name: "disk".to_owned(),
        content,
        changed: None,
    };
    sandbox::enter(&arguments.confinement.to_confinement(), &[])?;
    let server = NbdServer::start(listener, vec![export]).context("serve the disk")?;
    sandbox::seal(Kind::Server);
    ending.wait().context("wait for a signal")?;
    // Out of reach in the sandbox.
    let _ = std::fs::remove_file(path);
    drop(server);
    Ok(ExitCode::SUCCESS)
}
