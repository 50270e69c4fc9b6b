// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atolld`: what the daemon is made of, and its life from options to the end.
//!
//! ```text
//! open the node ─► first administrator ─► certificates ─► listen ─► run/atolld.json ─► serve … SIGTERM ─► finish
//! ```
//!
//! Guests are processes of their own: they neither notice the daemon's end nor its return.

use std::net::{IpAddr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::Context as _;
use atoll_manager::host::HostMeter;
use atoll_manager::{Node, Settings};
use clap::Parser;
use serde_json::json;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use crate::auth::HostUsers;
use crate::auth::gate::Gate;
use crate::auth::keys::Keyring;
use crate::cli::login::{InitialLogin, STATE_DEFAULT};
use crate::console::Consoles;
use crate::route::Tree;
use crate::routes::GuestRows;
use crate::routes::TABLES;
use crate::{pki, serve};

/// The first administrator of a fresh node.
const ADMINISTRATOR: &str = "admin@pve";

/// The node daemon of Atoll: API and web page over HTTPS, tasks, storage, network and guests of this host.
#[derive(Debug, Parser)]
#[command(name = "atolld", version, max_term_width = 100)]
pub struct Options {
    /// Directory of everything that the node keeps.
    #[arg(long, default_value = STATE_DEFAULT, value_name = "DIR")]
    pub state: PathBuf,
    /// Address to listen on.
    #[arg(long, default_value = "127.0.0.1", value_name = "ADDRESS")]
    pub listen: IpAddr,
    /// Port to listen on; 0 takes any free one, which run/atolld.json then names.
    #[arg(long, default_value_t = 8006)]
    pub port: u16,
    /// Name of this node; the host's when not given.
    #[arg(long, value_name = "NAME")]
    pub node: Option<String>,
    /// Directory of atoll-vmm and atoll-ct; that of atolld when not given.
    #[arg(long, value_name = "DIR")]
    pub bin_dir: Option<PathBuf>,
    /// Address of the guests' bridge, with the prefix length of their network.
    #[arg(long, default_value = "10.64.0.1/24", value_name = "CIDR")]
    pub bridge_address: String,
}

/// The running daemon: what handlers reach.
pub struct Daemon {
    /// The node that is managed.
    pub node: Node,
    /// Measures the host.
    pub host: HostMeter,
    /// Address that clients reach it at.
    pub address: IpAddr,
    /// The API's routes.
    pub routes: Tree,
    /// What signs tickets.
    pub keyring: Keyring,
    /// What slows guessing down.
    pub gate: Gate,
    /// Consoles that wait for their browser.
    pub consoles: Consoles,
    /// The guests' rows of the list of resources.
    pub guest_rows: GuestRows,
}

/// Runs the daemon until it is told to end.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let settings = settings(&options)?;
    let run_dir = settings.run_dir();
    let node = Node::open(settings).await?;
    node.access().set_verifier(Arc::new(HostUsers));
    let daemon = Arc::new(Daemon {
        host: HostMeter::default(),
        address: options.listen,
        routes: Tree::new(TABLES),
        keyring: Keyring::open(Arc::clone(node.store())).await?,
        gate: Gate::default(),
        consoles: Consoles::default(),
        guest_rows: GuestRows::default(),
        node,
    });

    let address = SocketAddr::new(options.listen, options.port);
    let listener = TcpListener::bind(address).await;
    let listener = listener.with_context(|| format!("listen on {address}"))?;
    let address = listener.local_addr().context("listen")?;
    let pki_dir = options.state.join("pki");
    let names = names(daemon.node.name(), options.listen);
    let tls = pki::server_config(&pki_dir, &names)?;
    let url = format!("https://{}:{}", host_of(options.listen), address.port());
    first_administrator(&daemon, &options.state, &url, &pki_dir).await?;

    let storage_dir = daemon.node.settings().storage_dir();
    daemon.node.storage().ensure_local(&storage_dir).await?;
    let follower = tokio::spawn({
        let daemon = Arc::clone(&daemon);
        async move { daemon.keyring.follow().await }
    });
    let stop = CancellationToken::new();
    let manager = tokio::spawn({
        let (node, stop) = (daemon.node.clone(), stop.clone());
        async move {
            if let Err(error) = node.run(stop).await {
                tracing::error!(error = error.chain(), "the node is not kept in order");
            }
        }
    });
    tokio::spawn(end_on_signal(stop.clone())?);
    let ready = json!({
        "pid": std::process::id(), "node": daemon.node.name(), "port": address.port(), "url": url,
    });
    let ready_file = run_dir.join("atolld.json");
    write_private(&ready_file, &format!("{ready}\n"))?;
    tracing::info!(url, node = daemon.node.name(), "serving");
    notify("READY=1");

    serve::serve(Arc::clone(&daemon), listener, Arc::new(tls), stop).await;
    notify("STOPPING=1");
    follower.abort();
    drop(std::fs::remove_file(&ready_file));
    daemon.node.tasks().stop_all().await;
    manager.await.context("keep the node in order")?;
    if let Err(error) = daemon.node.leave().await {
        tracing::warn!(error = error.chain(), "take the guests' network down");
    }
    tracing::info!("ended; guests go on");
    Ok(())
}

fn settings(options: &Options) -> anyhow::Result<Settings> {
    std::fs::create_dir_all(&options.state)
        .with_context(|| format!("create {}", options.state.display()))?;
    // Absolute, since guests and their helpers are started elsewhere.
    let state = std::fs::canonicalize(&options.state)
        .with_context(|| options.state.display().to_string())?;
    let node = match &options.node {
        Some(node) => node.clone(),
        None => rustix::system::uname()
            .nodename()
            .to_string_lossy()
            .into_owned(),
    };
    // A host name may be a whole domain name; a node's is its first part, as in PVE.
    let node = node.split('.').next().unwrap_or_default().to_owned();
    let mut settings = Settings::new(node, state);
    settings.bin_dir = match &options.bin_dir {
        Some(directory) => directory.clone(),
        None => {
            let own = std::env::current_exe().context("find atolld's own file")?;
            own.parent().unwrap_or(Path::new("/")).to_owned()
        }
    };
    settings.bridge_address.clone_from(&options.bridge_address);
    Ok(settings)
}

/// By what names and addresses clients reach this node.
fn names(node: &str, listen: IpAddr) -> Vec<String> {
    let mut names = vec![
        node.to_owned(),
        "localhost".to_owned(),
        "127.0.0.1".to_owned(),
    ];
    let host = rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned();
    let listen = (!listen.is_unspecified()).then(|| listen.to_string());
    for name in [Some(host), listen, Some("::1".to_owned())]
        .into_iter()
        .flatten()
    {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    names
}

/// The host part of the URL that is shown to people.
fn host_of(listen: IpAddr) -> String {
    match listen {
        address if address.is_loopback() || address.is_unspecified() => "localhost".to_owned(),
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}

/// Makes `admin@pve` on a fresh node and writes down how to sign in; on a known one keeps what was written, with
/// the URL of today.
async fn first_administrator(
    daemon: &Daemon,
    state: &Path,
    url: &str,
    pki_dir: &Path,
) -> anyhow::Result<()> {
    let file = state.join("initial-login.json");
    let kept = std::fs::read(&file).ok();
    let kept = kept.and_then(|bytes| serde_json::from_slice::<InitialLogin>(&bytes).ok());
    let administrator = ADMINISTRATOR.parse().context("name the administrator")?;
    let created = daemon
        .node
        .access()
        .create_administrator(&administrator)
        .await?;
    let (username, password) = match (created, kept) {
        (Some(password), _) => (ADMINISTRATOR.to_owned(), password),
        (None, Some(kept)) => (kept.username, kept.password),
        (None, None) => return Ok(()),
    };
    let ca_file =
        std::path::absolute(pki::ca_file(pki_dir)).context("find the authority's file")?;
    let login = InitialLogin {
        url: url.to_owned(),
        username,
        password,
        ca_file,
    };
    write_private(
        &file,
        &format!("{}\n", serde_json::to_string_pretty(&login)?),
    )
}

/// Writes a file for its owner alone, whole or not at all.
fn write_private(file: &Path, text: &str) -> anyhow::Result<()> {
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(file.parent().unwrap_or(Path::new("/")))?;
        let fresh = file.with_extension("new");
        let mut options = std::fs::OpenOptions::new();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        std::io::Write::write_all(&mut options.open(&fresh)?, text.as_bytes())?;
        std::fs::rename(&fresh, file)
    };
    write().with_context(|| format!("write {}", file.display()))
}

/// Cancels `stop` at the first SIGTERM or SIGINT.
fn end_on_signal(stop: CancellationToken) -> anyhow::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate()).context("listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("listen for SIGINT")?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        stop.cancel();
    })
}

/// Tells systemd, when it started us, how we are. sd_notify(3).
fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else {
        return;
    };
    let send = || -> std::io::Result<()> {
        let socket = std::os::unix::net::UnixDatagram::unbound()?;
        match path.to_string_lossy().strip_prefix('@') {
            Some(name) => {
                use std::os::linux::net::SocketAddrExt as _;
                let address = std::os::unix::net::SocketAddr::from_abstract_name(name)?;
                socket.send_to_addr(state.as_bytes(), &address)?;
            }
            None => drop(socket.send_to(state.as_bytes(), &path)?),
        }
        Ok(())
    };
    if let Err(error) = send() {
        tracing::warn!(%error, "notify systemd");
    }
}
