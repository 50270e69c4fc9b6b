// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! How an error is told where there is one line for it: a log, an answer, a state that outlives it.

/// The error with its causes, outermost first.
pub fn chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}
