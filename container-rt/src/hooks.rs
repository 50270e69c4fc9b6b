// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Hooks that run after creation: startContainer in the container (called by its init), poststart and poststop in the
//! host. The others run inside libcontainer, which has the namespaces at hand. Its way of running one says neither
//! which hook it was nor how it ended, and waits for a time limit in a second thread; so this one is ours.

use std::io::{self, Write};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Command, ExitStatus, Stdio};
use std::time::Duration;

use oci_spec::runtime::{Hook, Spec};
use serde_json::{Value, json};

use crate::error::{Context, Error, Result, one_line};
use crate::process::ProcessFd;
use crate::state::{Saved, Status};

/// Whether anything is to run at start or delete; if not, config.json need not be read then.
pub fn any_after_create(spec: &Spec) -> bool {
    spec.hooks().as_ref().is_some_and(|hooks| {
        let given = |list: &Option<Vec<_>>| list.as_ref().is_some_and(|l| !l.is_empty());
        given(hooks.poststart()) || given(hooks.poststop())
    })
}

/// The state that a hook reads. The runtime-spec, "State". `pid` is what the hook's own namespace calls the init.
pub(crate) fn state(saved: &Saved, status: Status, pid: Option<i32>) -> Value {
    let mut state = json!({
        "ociVersion": saved.oci_version,
        "id": saved.id,
        "status": status,
        "bundle": saved.bundle,
        "annotations": saved.annotations,
    });
    if let Some(pid) = pid {
        state["pid"] = json!(pid);
    }
    state
}

/// Runs one hook to its end, with `environment` when it names none.
pub(crate) fn run(hook: &Hook, state: &Value, environment: &[String]) -> Result<()> {
    let failed = |reason: String| {
        let path = hook.path().display();
        Error::Argument(format!("error running hook {path}: {reason}"))
    };
    let ended = wait_for(hook, state, environment).map_err(|e| failed(one_line(&e)))?;
    match ended {
        None => Err(failed("it did not end within its time limit".to_owned())),
        Some(status) if status.success() => Ok(()),
        Some(status) => Err(failed(how(status))),
    }
}

/// How a hook ended, in the words of signal(7).
fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit status {code}"),
        (None, Some(libc::SIGSYS)) => "signal: bad system call".to_owned(),
        (None, signal) => format!("signal {}", signal.unwrap_or_default()),
    }
}

/// Nothing when the time limit came first.
fn wait_for(hook: &Hook, state: &Value, environment: &[String]) -> Result<Option<ExitStatus>> {
    let mut command = Command::new(hook.path());
    // runtime-spec, "POSIX-platform Hooks": args has the program's name first, as execv(3).
    match hook.args().as_deref() {
        Some([name, arguments @ ..]) => command.arg0(name).args(arguments),
        _ => &mut command,
    };
    let environment = hook.env().as_deref().unwrap_or(environment);
    let variables = environment.iter().filter_map(|entry| entry.split_once('='));
    command.env_clear().envs(variables);
    command.stdin(Stdio::piped()).stdout(Stdio::null());
    let mut child = command.spawn().at("execute", hook.path())?;
    if let Some(mut input) = child.stdin.take() {
        match input.write_all(state.to_string().as_bytes()) {
            // It need not read.
            Err(error) if error.kind() != io::ErrorKind::BrokenPipe => {
                return Err(error).context(|| "write the state".to_owned());
            }
            _ => {}
        }
    }
    if let Some(seconds) = hook.timeout() {
        let limit = Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
        let process = ProcessFd::of_child(child.id().cast_signed())?;
        if !process.wait_end(limit) {
            child.kill().ok();
            child.wait().ok();
            return Ok(None);
        }
    }
    child.wait().map(Some).context(|| "wait for it".to_owned())
}

/// Our own environment, for hooks of the host that name none.
fn own_environment() -> Vec<String> {
    std::env::vars()
        .map(|(name, value)| format!("{name}={value}"))
        .collect()
}

/// Runs the prestart and createRuntime hooks of a container that libcontainer does not create.
pub(crate) fn before_mounts(spec: &Spec, saved: &Saved, init: i32) -> Result<()> {
    let Some(hooks) = spec.hooks() else {
        return Ok(());
    };
    let lists = [hooks.prestart(), hooks.create_runtime()];
    let mut hooks = lists.into_iter().flatten().flatten();
    let state = state(saved, Status::Creating, Some(init));
    let own = own_environment();
    hooks.try_for_each(|hook| in_bundle(&saved.bundle, || run(hook, &state, &own)))
}

/// Runs the poststart hooks. The runtime-spec: a failure stops the container and is the operation's error.
pub fn after_start(spec: &Spec, saved: &Saved) -> Result<()> {
    let hooks = spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.poststart().as_deref());
    let state = state(saved, Status::Running, saved.init.map(|init| init.pid));
    let own = own_environment();
    let mut hooks = hooks.unwrap_or_default().iter();
    hooks.try_for_each(|hook| in_bundle(&saved.bundle, || run(hook, &state, &own)))
}

/// Runs the poststop hooks. The runtime-spec: a failure is a warning, and the next hook runs.
pub fn after_delete(spec: &Spec, saved: &Saved) -> Vec<String> {
    let hooks = spec
        .hooks()
        .as_ref()
        .and_then(|hooks| hooks.poststop().as_deref());
    let state = state(saved, Status::Stopped, None);
    let own = own_environment();
    let one = |hook: &Hook| in_bundle(&saved.bundle, || run(hook, &state, &own)).err();
    let failures = hooks.unwrap_or_default().iter().filter_map(one);
    failures.map(|error| one_line(&error)).collect()
}

/// Hooks of the host begin in the bundle, when it is still there.
fn in_bundle<T>(bundle: &Path, work: impl FnOnce() -> T) -> T {
    let before = std::env::current_dir();
    std::env::set_current_dir(bundle).ok();
    let result = work();
    if let Ok(before) = before {
        std::env::set_current_dir(before).ok();
    }
    result
}
