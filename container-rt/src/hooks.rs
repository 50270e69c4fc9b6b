// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Hooks that run in the host after creation: poststart and poststop. The others run inside libcontainer, which
//! has the namespaces at hand; running one (state on standard input, timeout) is libcontainer's, too.

use libcontainer::container::{ContainerStatus, State};
use libcontainer::hooks::run_hooks;
use oci_spec::runtime::Spec;

use crate::error::{Error, Result, one_line};
use crate::state::{Saved, Status};

/// Whether anything is to run at start or delete; if not, config.json need not be read then.
pub fn any_after_create(spec: &Spec) -> bool {
    spec.hooks().as_ref().is_some_and(|hooks| {
        let given = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|l| !l.is_empty());
        given(hooks.poststart()) || given(hooks.poststop())
    })
}

fn state(saved: &Saved, status: Status) -> State {
    let status = match status {
        Status::Creating => ContainerStatus::Creating,
        Status::Created => ContainerStatus::Created,
        Status::Running => ContainerStatus::Running,
        Status::Paused => ContainerStatus::Paused,
        Status::Stopped => ContainerStatus::Stopped,
    };
    let pid = saved
        .init
        .filter(|_| status != ContainerStatus::Stopped)
        .map(|init| init.pid);
    let mut state = State::new(&saved.id, status, pid, saved.bundle.clone());
    state.oci_version.clone_from(&saved.oci_version);
    state.annotations = Some(saved.annotations.clone().into_iter().collect());
    state
}

/// Runs the poststart hooks. The runtime-spec: a failure stops the container and is the operation's error.
pub fn after_start(spec: &Spec, saved: &Saved) -> Result<()> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    let state = state(saved, Status::Running);
    let own = std::env::vars().collect();
    run_hooks(
        hooks.poststart().as_ref(),
        Some(&state),
        None,
        None,
        Some(&own),
    )
    .map_err(|e| Error::Argument(format!("poststart hook: {}", one_line(&e))))
}

/// Runs the poststop hooks. The runtime-spec: a failure is a warning, and the next hook runs.
pub fn after_delete(spec: &Spec, saved: &Saved) -> Vec<String> {
    let hooks = spec
        .hooks()
        .as_ref()
        .and_then(|h| h.poststop().clone())
        .unwrap_or_default();
    let state = state(saved, Status::Stopped);
    let own = std::env::vars().collect();
    let run = |hook| run_hooks(Some(&vec![hook]), Some(&state), None, None, Some(&own));
    hooks
        .into_iter()
        .filter_map(|hook| {
            run(hook)
                .err()
                .map(|e| format!("poststop hook: {}", one_line(&e)))
        })
        .collect()
}
