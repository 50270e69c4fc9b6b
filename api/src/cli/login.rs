// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Where the command finds its server and who it is: options, environment, `atoll login`, or, for root on the node
//! itself, the first administrator of `STATE/initial-login.json`. The first that is there counts.

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::client::ClientError;

/// Where a node keeps its state when nothing else is said.
pub const STATE_DEFAULT: &str = "/var/lib/atoll";

/// How to reach the API.
#[derive(Debug, Args)]
pub struct Connection {
    /// URL of the API, such as https://localhost:8006.
    #[arg(long, global = true, env = "ATOLL_URL")]
    pub url: Option<String>,
    /// Certificate of the authority that vouches for the server.
    #[arg(long, global = true, env = "ATOLL_CA_FILE", value_name = "FILE")]
    pub ca_file: Option<PathBuf>,
    /// API token to use: USER@REALM!NAME=SECRET.
    #[arg(long, global = true, env = "ATOLL_TOKEN", hide_env_values = true)]
    pub token: Option<String>,
    /// State directory of the node on this host, for its administrator's login.
    #[arg(long, global = true, env = "STATE", default_value = STATE_DEFAULT, value_name = "DIR")]
    pub state: PathBuf,
}

/// A server and who to be there.
#[derive(Debug, Clone)]
pub struct Login {
    /// `https://HOST:PORT`.
    pub url: String,
    /// Authority to trust.
    pub ca_file: Option<PathBuf>,
    /// Who to be.
    pub secret: Secret,
}

/// What proves who one is.
#[derive(Debug, Clone)]
pub enum Secret {
    /// An API token with its secret.
    Token(String),
    /// A ticket from an earlier sign-in.
    Ticket {
        /// The ticket.
        ticket: String,
        /// Its CSRF token.
        csrf: String,
    },
    /// A password.
    Password {
        /// `name@realm`.
        username: String,
        /// The password.
        password: String,
    },
}

/// What `atoll login` keeps.
#[derive(Debug, Serialize, Deserialize)]
pub struct Saved {
    /// `https://HOST:PORT`.
    pub url: String,
    /// Authority to trust.
    pub ca_file: PathBuf,
    /// The ticket.
    pub ticket: String,
    /// Its CSRF token.
    pub csrf: String,
}

/// What a node writes for its first administrator.
#[derive(Debug, Serialize, Deserialize)]
pub struct InitialLogin {
    /// `https://HOST:PORT`.
    pub url: String,
    /// `name@realm`.
    pub username: String,
    /// The password.
    pub password: String,
    /// Authority that vouches for the node.
    pub ca_file: PathBuf,
}

/// The login that the options, the environment and the files lead to.
pub fn find(connection: &Connection) -> Result<Login, ClientError> {
    let initial = read::<InitialLogin>(&connection.state.join("initial-login.json"));
    if let Some(token) = &connection.token {
        let known = initial.as_ref();
        let url = connection
            .url
            .clone()
            .or_else(|| known.map(|initial| initial.url.clone()));
        let ca_file = connection.ca_file.clone();
        return Ok(Login {
            url: url.ok_or_else(|| settings("give --url with --token"))?,
            ca_file: ca_file.or_else(|| known.map(|initial| initial.ca_file.clone())),
            secret: Secret::Token(token.clone()),
        });
    }
    let saved = saved_file().and_then(|file| read::<Saved>(&file));
    let (url, ca_file, secret) = match (saved, initial) {
        (Some(saved), _) => {
            let Saved {
                url,
                ca_file,
                ticket,
                csrf,
            } = saved;
            (url, ca_file, Secret::Ticket { ticket, csrf })
        }
        (None, Some(initial)) => {
            let InitialLogin {
                url,
                username,
                password,
                ca_file,
            } = initial;
            (url, ca_file, Secret::Password { username, password })
        }
        (None, None) => {
            let text = format!(
                "not signed in: run `atoll login URL`, give --token, or run as root where {} is readable",
                connection.state.join("initial-login.json").display()
            );
            return Err(ClientError::Settings(text));
        }
    };
    Ok(Login {
        url: connection.url.clone().unwrap_or(url),
        ca_file: connection.ca_file.clone().or(Some(ca_file)),
        secret,
    })
}

/// Keeps a sign-in for later commands, readable by its owner alone.
pub fn save(saved: &Saved) -> Result<PathBuf, ClientError> {
    let file = saved_file().ok_or_else(|| settings("neither XDG_CONFIG_HOME nor HOME is set"))?;
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(file.parent().unwrap_or(Path::new("/")))?;
        let mut options = fs::OpenOptions::new();
        let options = options.write(true).create(true).truncate(true).mode(0o600);
        options
            .open(&file)?
            .write_all(&serde_json::to_vec_pretty(saved)?)
    };
    write().map_err(|error| ClientError::Settings(format!("{}: {error}", file.display())))?;
    Ok(file)
}

/// Forgets a sign-in that was kept; says whether there was one.
pub fn forget() -> bool {
    saved_file().is_some_and(|file| fs::remove_file(file).is_ok())
}

fn saved_file() -> Option<PathBuf> {
    let directory = std::env::var_os("XDG_CONFIG_HOME")
        .map(PathBuf::from)
        .or_else(|| {
            let home = std::env::var_os("HOME")?;
            Some(PathBuf::from(home).join(".config"))
        });
    Some(directory?.join("atoll/login.json"))
}

fn read<T: for<'a> Deserialize<'a>>(file: &Path) -> Option<T> {
    serde_json::from_slice(&fs::read(file).ok()?).ok()
}

fn settings(text: &str) -> ClientError {
    ClientError::Settings(text.to_owned())
}
