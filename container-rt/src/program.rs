// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The last step of every process that enters a container: finding its program and becoming it. Used by
//! libcontainer's init (as its `Executor`) and by `exec`. Unlike libcontainer's own executor it needs no PATH for
//! an absolute program, keeps the environment's order, unblocks signals, and words its errors as container
//! engines look for them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::convert::Infallible;
use std::ffi::CString;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use libcontainer::workload::{
    Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError,
};
use nix::errno::Errno;
use nix::sys::signal::{SigSet, SigmaskHow, sigprocmask};
use nix::unistd::{AccessFlags, access, execve};
use oci_spec::runtime::{Hook, Spec};
use serde_json::Value;

use crate::error::{Error, Result};
use crate::filter::Filter;
use crate::{hooks, starting, sys};

/// Where programs are looked for when the environment has no PATH; as login(1) sets it for root.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Finds a program as execvp(3) does, in the container's root and with its user's rights.
pub fn find(name: &str, environment: &[String]) -> Result<PathBuf> {
    if name.contains('/') {
        let path = PathBuf::from(name);
        return match executable(&path) {
            Ok(()) => Ok(path),
            Err(errno) => Err(not_executable(&format!("exec: `{name}`"), errno)),
        };
    }
    let path = environment
        .iter()
        .rev()
        .find_map(|e| e.strip_prefix("PATH="));
    let mut refused = None;
    for directory in path.unwrap_or(DEFAULT_PATH).split(':') {
        let candidate = Path::new(if directory.is_empty() { "." } else { directory }).join(name);
        match executable(&candidate) {
            Ok(()) => return Ok(candidate),
            Err(Errno::ENOENT | Errno::ENOTDIR) => {}
            Err(errno) => refused = Some((candidate, errno)),
        }
    }
    match refused {
        Some((candidate, errno)) => Err(not_executable(
            &format!("exec: `{}`", candidate.display()),
            errno,
        )),
        None => Err(not_executable(
            &format!("executable file `{name}` not found in $PATH"),
            Errno::ENOENT,
        )),
    }
}

/// Adds HOME when it is not given: from the container's passwd file, or the root directory.
pub fn add_home(environment: &mut Vec<String>, uid: u32) {
    if environment.iter().any(|e| e.starts_with("HOME=")) {
        return;
    }
    let passwd = std::fs::read_to_string("/etc/passwd").unwrap_or_default();
    // passwd(5): name:password:uid:gid:comment:home:shell
    let home = passwd.lines().find_map(|line| {
        let mut fields = line.split(':').skip(2);
        let is_user = fields.next()?.parse() == Ok(uid);
        is_user.then(|| fields.nth(2))?
    });
    let home = home.filter(|home| !home.is_empty()).unwrap_or("/");
    environment.push(format!("HOME={home}"));
}

fn executable(path: &Path) -> std::result::Result<(), Errno> {
    access(path, AccessFlags::X_OK)?;
    if path.is_dir() {
        return Err(Errno::EACCES);
    }
    Ok(())
}

fn not_executable(what: &str, errno: Errno) -> Error {
    let exit_code = if matches!(errno, Errno::ENOENT | Errno::ENOTDIR) {
        127
    } else {
        126
    };
    Error::Executable {
        message: format!("{what}: {}", errno.desc()),
        exit_code,
    }
}

fn c_strings(texts: &[String]) -> Result<Vec<CString>> {
    let convert = |text: &String| {
        CString::new(text.as_bytes())
            .map_err(|_| Error::Argument(format!("{text:?} has a NUL byte")))
    };
    texts.iter().map(convert).collect()
}

/// Becomes the program. Returns only when it cannot be executed.
pub fn become_program(
    path: &Path,
    arguments: &[String],
    environment: &[String],
) -> Result<Infallible> {
    let path_text = c_strings(&[path.display().to_string()])?.remove(0);
    let (arguments, environment) = (c_strings(arguments)?, c_strings(environment)?);
    // What we block while we wait for our children is no business of the container's.
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None).ok();
    sys::die_of_broken_pipes().ok();
    execve(&path_text, &arguments, &environment)
        .map_err(|errno| not_executable(&format!("exec: `{}`", path.display()), errno))
}

/// The container's own program, as libcontainer's init executes it, after the startContainer hooks.
#[derive(Clone)]
pub struct Init {
    /// Where `start` listens for what goes wrong.
    pub report: Rc<UnixListener>,
    /// What the hooks get to read.
    pub state: Value,
    /// Loaded when everything else is done to the process.
    pub filter: Option<Filter>,
    /// Runs in the container right before its program.
    pub hooks: Vec<Hook>,
    /// Set by `validate`.
    pub path: RefCell<PathBuf>,
    /// Set by `validate`, with more by `setup_envs`.
    pub environment: RefCell<Vec<String>>,
}

impl Init {
    /// Becomes the program. Returns only with the reason why not.
    fn go_on(&self, spec: &Spec) -> Error {
        let environment = self.environment.borrow();
        for hook in &self.hooks {
            if let Err(error) = hooks::run(hook, &self.state, &environment) {
                return error;
            }
        }
        let (arguments, _) = parts(spec);
        match become_program(&self.path.borrow(), &arguments, &environment) {
            Err(error) => error,
            Ok(never) => match never {},
        }
    }
}

fn parts(spec: &Spec) -> (Vec<String>, Vec<String>) {
    let process = spec.process().as_ref();
    let arguments = process.and_then(|p| p.args().clone()).unwrap_or_default();
    let environment = process.and_then(|p| p.env().clone()).unwrap_or_default();
    (arguments, environment)
}

impl Executor for Init {
    fn validate(&self, spec: &Spec) -> std::result::Result<(), ExecutorValidationError> {
        let (arguments, environment) = parts(spec);
        let name = arguments.first().map_or("", String::as_str);
        let filtered = self.filter.as_ref().map_or(Ok(()), Filter::load);
        match filtered.and_then(|()| find(name, &environment)) {
            Ok(path) => {
                self.path.replace(path);
                self.environment.replace(environment);
                Ok(())
            }
            Err(error) => {
                tracing::error!("{error}");
                Err(ExecutorValidationError::ArgValidationError(
                    error.to_string(),
                ))
            }
        }
    }

    fn setup_envs(
        &self,
        variables: HashMap<String, String>,
    ) -> std::result::Result<(), ExecutorSetEnvsError> {
        // libcontainer adds the variables of socket activation to config.json's, and a HOME that is empty for a
        // user without an entry.
        let mut environment = self.environment.borrow_mut();
        add_home(&mut environment, nix::unistd::getuid().as_raw());
        for (name, value) in variables {
            let start = format!("{name}=");
            if !environment.iter().any(|e| e.starts_with(&start)) {
                environment.push(start + &value);
            }
        }
        Ok(())
    }

    fn exec(&self, spec: &Spec) -> std::result::Result<(), ExecutorError> {
        let error = self.go_on(spec);
        starting::tell(&self.report, &error);
        Err(ExecutorError::Other(error.to_string()))
    }
}
