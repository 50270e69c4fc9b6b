// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Why the manager refused or failed, by what the caller can do about it.
//!
//! The API turns each variant into a status code; the texts are contract, since PVE clients match on them.

use crate::store::StoreError;

/// Text of a digest that no longer matches, or of a write that lost a race. PVE's words; clients match on them.
pub const MODIFIED: &str =
    "detected modified configuration - file changed by other user? Try again.";

/// What PVE says instead when the digest of a virtual machine's config no longer matches.
pub const MISMATCH: &str = "checksum mismatch (file change by other user?)";

/// Text of a task that was stopped on request. PVE's words.
pub const INTERRUPTED: &str = "interrupted by signal";

/// An answer other than success, ready to be shown to the user.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Parameters that do not fit: (parameter, what is wrong with it).
    #[error("Parameter verification failed.")]
    Invalid(Vec<(String, String)>),
    /// The caller lacks a privilege.
    #[error("{0}")]
    Denied(String),
    /// What was named does not exist, or exists already, or is in a state that does not allow it.
    #[error("{0}")]
    Refused(String),
    /// The store cannot take writes now.
    #[error("{0}")]
    Unavailable(String),
    /// The work was stopped on request.
    #[error("{INTERRUPTED}")]
    Interrupted,
    /// The host failed us; `text` is for the user, the source for the operator.
    #[error("{text}")]
    Failed {
        /// One line for the user.
        text: String,
        /// What went wrong underneath.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// One parameter that does not fit.
    pub fn invalid(parameter: impl Into<String>, text: impl Into<String>) -> Self {
        Self::Invalid(vec![(parameter.into(), text.into())])
    }

    /// A request that the present state does not allow.
    pub fn refused(text: impl Into<String>) -> Self {
        Self::Refused(text.into())
    }

    /// A failure of the host, with its cause.
    pub fn failed(
        text: impl Into<String>,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> Self {
        Self::Failed {
            text: text.into(),
            source: source.into(),
        }
    }

    /// The whole chain in one line: for task logs and exit statuses, where there is no second place for the cause.
    pub fn chain(&self) -> String {
        let mut text = match self {
            Self::Invalid(errors) => {
                let list: Vec<String> = errors.iter().map(|(p, e)| format!("{p}: {e}")).collect();
                format!("{self} {}", list.join("; "))
            }
            _ => self.to_string(),
        };
        let mut next = std::error::Error::source(self);
        while let Some(cause) = next {
            text.push_str(": ");
            text.push_str(&cause.to_string());
            next = cause.source();
        }
        text.replace('\n', " ").trim_end().to_owned()
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Conflict { .. } => Self::Refused(MODIFIED.to_owned()),
            StoreError::ReadOnly { .. } => Self::Unavailable(error.to_string()),
            StoreError::Invalid { .. } | StoreError::Engine(_) => {
                Self::failed("the store failed", error)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_chain_is_one_line() {
        let error = Error::failed("open disk", std::io::Error::other("no space\nleft"));
        assert_eq!(error.chain(), "open disk: no space left");
        let error = Error::invalid("vmid", "too small");
        assert_eq!(
            error.chain(),
            "Parameter verification failed. vmid: too small"
        );
    }
}
