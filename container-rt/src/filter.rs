// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A container's seccomp filter. libcontainer has one, too, but of SCMP_CMP_MASKED_EQ it takes mask and value the wrong
//! way round, and system calls that the kernel has and the profile is too old for get the profile's default, mostly
//! EPERM, which programs take for a refusal; for ENOSYS they do it the older way (glibc and clone3, faccessat2). So, as
//! under runc, a stub in front of the filter answers ENOSYS for everything above the newest call that the profile names:
//!
//! ```text
//!  architecture known? -no-> filter      number > newest of its rules? -no-> filter
//!          `--------yes------------------------^        `--yes--> ENOSYS
//! ```
//!
//! Not here: how the listener of a filter that asks (SCMP_ACT_NOTIFY) gets to its agent (`notify`).

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::os::unix::net::UnixStream;
use std::rc::Rc;
use std::str::FromStr;

use libc::sock_filter;
use libcontainer::capabilities;
use libcontainer::syscall::syscall::create_syscall;
use libseccomp::{
    ScmpAction, ScmpArch, ScmpArgCompare, ScmpCompareOp, ScmpFilterContext, ScmpSyscall,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use oci_spec::runtime::{
    Capabilities, Capability, LinuxCapabilities, LinuxSeccomp, LinuxSeccompAction,
    LinuxSeccompFilterFlag, LinuxSyscall, Spec,
};
use serde::Serialize;

use crate::error::{Context, Error, Result, one_line};
use crate::{notify, sys};

/// Instructions of classic BPF: linux/bpf_common.h.
const LOAD: u16 = 0x20;
const JUMP_IF_EQUAL: u16 = 0x15;
const JUMP_IF_GREATER: u16 = 0x25;
const JUMP_IF_GREATER_OR_EQUAL: u16 = 0x35;
const RETURN: u16 = 0x06;

/// Where struct seccomp_data of linux/seccomp.h has the number of the call and the architecture.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;

/// What the stub answers.
const NO_SUCH_CALL: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned();

/// x32 has x86-64's architecture and this bit in every number: arch/x86/include/uapi/asm/unistd.h.
const X32: u32 = 0x4000_0000;

/// A number above every architecture's: x32's are compared for themselves.
const NO_LIMIT: u32 = u32::MAX;

fn failed(reason: impl std::fmt::Display) -> Error {
    Error::Argument(format!("seccomp: {reason}"))
}

/// Whether an agent decides about some calls.
pub(crate) fn asks(profile: &LinuxSeccomp) -> bool {
    let mut rules = profile.syscalls().iter().flatten();
    rules.any(|rule| rule.action() == LinuxSeccompAction::ScmpActNotify)
}

/// A container's filter that its init loads by itself, as the last but one of its steps.
#[derive(Debug, Clone)]
pub struct Filter {
    pub(crate) profile: LinuxSeccomp,
    /// Where the listener of one that asks is offered.
    pub(crate) offer: Option<Rc<UnixStream>>,
    /// What the init may do once the filter is loaded. Without `noNewPrivileges` loading takes more.
    capabilities: Option<LinuxCapabilities>,
}

/// Takes the filter out of the configuration that libcontainer sees.
pub(crate) fn take(spec: &mut Spec) -> Option<Filter> {
    let mut linux = spec.linux().clone()?;
    let profile = linux.seccomp().clone()?;
    linux.set_seccomp(None);
    spec.set_linux(Some(linux));
    let mut filter = Filter {
        profile,
        offer: None,
        capabilities: None,
    };
    let Some(mut process) = spec.process().clone() else {
        return Some(filter);
    };
    if process.no_new_privileges().is_none() {
        let own = process.capabilities().clone().unwrap_or_default();
        // seccomp(2), and prctl(2) to take both out of the bounding set again.
        let more = |set: &Option<Capabilities>| {
            let mut set = set.clone().unwrap_or_default();
            set.extend([Capability::SysAdmin, Capability::Setpcap]);
            Some(set)
        };
        let mut meanwhile = own.clone();
        meanwhile.set_bounding(more(own.bounding()));
        meanwhile.set_effective(more(own.effective()));
        meanwhile.set_permitted(more(own.permitted()));
        process.set_capabilities(Some(meanwhile));
        spec.set_process(Some(process));
        filter.capabilities = Some(own);
    }
    Some(filter)
}

impl Filter {
    /// Loads it, and gives up what only that has taken.
    pub(crate) fn load(&self) -> Result<()> {
        load(&self.profile, self.offer.as_deref())?;
        let Some(own) = &self.capabilities else {
            return Ok(());
        };
        capabilities::drop_privileges(own, create_syscall().as_ref())
            .map_err(|error| Error::Argument(format!("capabilities: {}", one_line(&error))))
    }
}

/// Loads a filter for this process and all that come of it. Of one that asks the listener is `offer`ed, and its agent
/// has it on return.
pub(crate) fn load(config: &LinuxSeccomp, offer: Option<&UnixStream>) -> Result<()> {
    // Nothing is left open that would be closed behind the filter: until there is an agent, who is asked waits.
    let program = compile(config)?;
    let loaded = sys::load_filter(&program, flags(config));
    match (
        loaded.context(|| "load the seccomp filter".to_owned())?,
        offer,
    ) {
        (Some(listener), Some(parent)) => notify::offer(parent, &listener),
        _ => Ok(()),
    }
}

/// The filter as the kernel takes it.
fn compile(config: &LinuxSeccomp) -> Result<Vec<sock_filter>> {
    let context = build(config)?;
    let file = memfd_create("seccomp", MFdFlags::MFD_CLOEXEC);
    let mut file = File::from(file.context(|| "create a file in memory".to_owned())?);
    context.export_bpf(&file).map_err(failed)?;
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))
        .and_then(|_| file.read_to_end(&mut bytes))
        .context(|| "read the seccomp filter".to_owned())?;
    let mut program = Vec::new();
    if refuses(config.default_action()) {
        program = stub(&newest(config)?);
    }
    program.extend(bytes.chunks_exact(8).map(instruction));
    Ok(program)
}

/// struct sock_filter of linux/filter.h, from its bytes.
fn instruction(bytes: &[u8]) -> sock_filter {
    let byte = |index: usize| bytes.get(index).copied().unwrap_or_default();
    sock_filter {
        code: u16::from_ne_bytes([byte(0), byte(1)]),
        jt: byte(2),
        jf: byte(3),
        k: u32::from_ne_bytes([byte(4), byte(5), byte(6), byte(7)]),
    }
}

/// Whether a call without a rule does not reach the kernel. One that does, or a tracer, knows of newer calls itself.
fn refuses(action: LinuxSeccompAction) -> bool {
    use LinuxSeccompAction as Action;
    !matches!(
        action,
        Action::ScmpActAllow | Action::ScmpActLog | Action::ScmpActTrace
    )
}

/// The kernel's flags: those of config.json, and what those of filters that ask bring along. seccomp(2).
fn flags(config: &LinuxSeccomp) -> libc::c_ulong {
    use LinuxSeccompFilterFlag as Flag;
    let asks = asks(config);
    let listener = match asks {
        true => libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
        false => 0,
    };
    let all = config.flags().iter().flatten();
    all.fold(listener, |flags, flag| {
        flags
            | match flag {
                Flag::SeccompFilterFlagLog => libc::SECCOMP_FILTER_FLAG_LOG,
                // Both answer by a number: a thread's, or the listener's.
                Flag::SeccompFilterFlagTsync if asks => {
                    libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_TSYNC_ESRCH
                }
                Flag::SeccompFilterFlagTsync => libc::SECCOMP_FILTER_FLAG_TSYNC,
                Flag::SeccompFilterFlagSpecAllow => libc::SECCOMP_FILTER_FLAG_SPEC_ALLOW,
                Flag::SeccompFilterFlagWaitKillableRecv if asks => {
                    libc::SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV
                }
                Flag::SeccompFilterFlagWaitKillableRecv => 0,
            }
    })
}

/// The runtime-spec's name of something, by which libseccomp knows it, too.
fn name(value: &impl Serialize) -> Result<String> {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(name)) => Ok(name),
        _ => Err(failed("a name is expected")),
    }
}

/// libseccomp's filter, from config.json's.
fn build(config: &LinuxSeccomp) -> Result<ScmpFilterContext> {
    let default = action(config.default_action(), config.default_errno_ret())?;
    let mut context = ScmpFilterContext::new(default).map_err(failed)?;
    for architecture in architectures(config)? {
        context.add_arch(architecture).map_err(failed)?;
    }
    for rule in config.syscalls().iter().flatten() {
        let action = action(rule.action(), rule.errno_ret())?;
        if action == default {
            // libseccomp refuses what says nothing.
            continue;
        }
        let conditions = conditions(rule)?;
        for name in rule.names() {
            // Those that libseccomp does not know are newer than it, or of other architectures.
            let Ok(call) = ScmpSyscall::from_name(name) else {
                continue;
            };
            for conditions in &conditions {
                context
                    .add_rule_conditional(action, call, conditions)
                    .map_err(|error| failed(format!("rule for {name}: {error}")))?;
            }
        }
    }
    Ok(context)
}

fn action(action: LinuxSeccompAction, errno: Option<u32>) -> Result<ScmpAction> {
    let errno = errno
        .map_or(Ok(libc::EPERM), i32::try_from)
        .map_err(failed)?;
    ScmpAction::from_str(&name(&action)?, Some(errno)).map_err(failed)
}

/// What the filter has besides the machine's own architecture, which libseccomp adds.
fn architectures(config: &LinuxSeccomp) -> Result<HashSet<ScmpArch>> {
    let all = config.architectures().iter().flatten();
    all.map(|one| ScmpArch::from_str(&name(one)?).map_err(failed))
        .collect()
}

/// The lists of conditions of a rule, of which one must hold. Several on one argument are alternatives: libseccomp takes
/// one a rule, seccomp_rule_add(3), and runc reads profiles so.
fn conditions(rule: &LinuxSyscall) -> Result<Vec<Vec<ScmpArgCompare>>> {
    let mut all = Vec::new();
    let mut arguments = BTreeSet::new();
    for argument in rule.args().iter().flatten() {
        let index = u32::try_from(argument.index()).map_err(failed)?;
        arguments.insert(index);
        let (operator, value) = match name(&argument.op())?.as_str() {
            // The runtime-spec has the mask first.
            "SCMP_CMP_MASKED_EQ" => (
                ScmpCompareOp::MaskedEqual(argument.value()),
                argument.value_two().unwrap_or_default(),
            ),
            other => (
                ScmpCompareOp::from_str(other).map_err(failed)?,
                argument.value(),
            ),
        };
        all.push(ScmpArgCompare::new(index, operator, value));
    }
    if arguments.len() < all.len() {
        return Ok(all.into_iter().map(|one| vec![one]).collect());
    }
    Ok(vec![all])
}

/// The newest call that the profile names, by the kernel's name of an architecture (AUDIT_ARCH_*, linux/audit.h) and
/// whether it is x32.
fn newest(config: &LinuxSeccomp) -> Result<BTreeMap<(u32, bool), u32>> {
    let mut found = BTreeMap::new();
    let mut all = architectures(config)?;
    all.remove(&ScmpArch::Native);
    all.insert(ScmpArch::native());
    for architecture in all {
        let Some(kernels) = kernels_name(architecture) else {
            continue;
        };
        let numbers = config
            .syscalls()
            .iter()
            .flatten()
            .flat_map(LinuxSyscall::names);
        let number = |name: &String| {
            let call = ScmpSyscall::from_name_by_arch(name, architecture).ok()?;
            // Negative: of another architecture.
            u32::try_from(i32::from(call)).ok()
        };
        if let Some(newest) = numbers.filter_map(number).max() {
            let is_x32 = architecture == ScmpArch::X32;
            found.insert((kernels, is_x32), newest);
        }
    }
    Ok(found)
}

/// The architectures that have a stub. Others, as s390 with one number for calls of any age, have the filter alone.
fn kernels_name(architecture: ScmpArch) -> Option<u32> {
    Some(match architecture {
        ScmpArch::X86 => libseccomp_sys::SCMP_ARCH_X86,
        ScmpArch::X8664 | ScmpArch::X32 => libseccomp_sys::SCMP_ARCH_X86_64,
        ScmpArch::Arm => libseccomp_sys::SCMP_ARCH_ARM,
        ScmpArch::Aarch64 => libseccomp_sys::SCMP_ARCH_AARCH64,
        ScmpArch::Riscv64 => libseccomp_sys::SCMP_ARCH_RISCV64,
        ScmpArch::Ppc64Le => libseccomp_sys::SCMP_ARCH_PPC64LE,
        ScmpArch::Loongarch64 => libseccomp_sys::SCMP_ARCH_LOONGARCH64,
        _ => return None,
    })
}

/// What answers ENOSYS for newer calls, and goes on with the filter behind it for all others.
fn stub(newest: &BTreeMap<(u32, bool), u32>) -> Vec<sock_filter> {
    let step = |code, jt, jf, k| sock_filter { code, jt, jf, k };
    let architectures: BTreeSet<u32> = newest.keys().map(|(name, _)| *name).collect();
    let part = |name: u32| {
        let limit = |x32| newest.get(&(name, x32)).copied().unwrap_or(NO_LIMIT);
        // Jumps count from the next instruction; the last one is followed by the next part, or by the filter.
        [
            step(LOAD, 0, 0, ARCHITECTURE),
            step(JUMP_IF_EQUAL, 0, 5, name),
            step(LOAD, 0, 0, NUMBER),
            step(JUMP_IF_GREATER_OR_EQUAL, 1, 0, X32),
            step(JUMP_IF_GREATER, 1, 2, limit(false)),
            step(JUMP_IF_GREATER, 0, 1, limit(true)),
            step(RETURN, 0, 0, NO_SUCH_CALL),
        ]
    };
    architectures.into_iter().flat_map(part).collect()
}
