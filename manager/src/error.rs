// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Why the manager refused or failed, by what the caller can do about it.
//!
//! The API turns each variant into a status code; the texts are contract, since PVE clients match on them.

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
    /// The host failed us; `text` is for the user, the source for the operator.
    #[error("{text}")]
    Failed {
        /// One line for the user.
        text: String,
        /// What went wrong underneath.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}
