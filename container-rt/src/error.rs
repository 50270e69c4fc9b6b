// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Why an operation on a container failed. One type for the crate, since every caller is a command line that
//! prints one line; variants are what a caller can act on. The chain of sources is printed once, by `main`.

use std::io;
use std::path::Path;

use crate::state::Status;

/// Result of this crate's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such container below the runtime's root.
    #[error("container {id} does not exist")]
    NotFound {
        /// As the caller gave it.
        id: String,
    },
    /// The id is taken.
    #[error("container {id} exists already")]
    Exists {
        /// As the caller gave it.
        id: String,
    },
    /// The id cannot name a directory.
    #[error(
        "invalid container id {id:?}: letters, digits and _+-. only, at most 1024, not . or .."
    )]
    Id {
        /// As the caller gave it.
        id: String,
    },
    /// The bundle asks for what cannot be.
    #[error("invalid configuration: {field}: {reason}")]
    Config {
        /// Path of the setting, such as `linux.cgroupsPath`.
        field: String,
        /// What is wrong with it, and what would be right.
        reason: String,
    },
    /// An argument of the command line or of the library call is wrong.
    #[error("{0}")]
    Argument(String),
    /// The container is in a state in which the operation makes no sense.
    #[error("container {id} is {status}: {needed}")]
    Status {
        /// The container.
        id: String,
        /// What it is now.
        status: Status,
        /// What the operation needs.
        needed: &'static str,
    },
    /// The program to execute cannot be: the shell's exit codes 126 and 127.
    #[error("{message}")]
    Executable {
        /// In the wording that container engines look for.
        message: String,
        /// 127 when it is not there, 126 when it cannot be executed.
        exit_code: u8,
    },
    /// libcontainer's own account of a container that could not be built.
    #[error("create container: {0}")]
    Init(String),
    /// The host refused.
    #[error("{what}")]
    Io {
        /// What was tried, with its operand.
        what: String,
        /// The host's answer.
        source: io::Error,
    },
    /// A file of ours or of the caller's does not parse.
    #[error("parse {what}")]
    Json {
        /// The file.
        what: String,
        /// Where and why.
        source: serde_json::Error,
    },
}

/// Adds what was tried to a host error.
pub(crate) trait Context<T> {
    /// `what` is a verb and its operand: "open /etc/passwd".
    fn context(self, what: impl FnOnce() -> String) -> Result<T>;
    /// The same for the commonest form: a verb and a path.
    fn at(self, verb: &str, path: &Path) -> Result<T>;
}

impl<T, E: Into<io::Error>> Context<T> for std::result::Result<T, E> {
    fn context(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|source| Error::Io {
            what: what(),
            source: source.into(),
        })
    }

    fn at(self, verb: &str, path: &Path) -> Result<T> {
        self.context(|| format!("{verb} {}", path.display()))
    }
}

/// The chain of an error on one line, as `main` prints and logs it.
pub fn one_line(error: &dyn std::error::Error) -> String {
    let mut line = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        line.push_str(": ");
        line.push_str(&cause.to_string());
        source = cause.source();
    }
    line.replace('\n', " ")
}
