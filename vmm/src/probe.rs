// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll-vmm probe`: can this host run guests, and how fast? Starts the probe guest (`firmware/probe`) in a
//! process of its own with every kind of device, reads its report, and judges. Not a benchmark: one run, one answer.
//!
//! Called by `main`, by `make run` (which reads the JSON) and by tests, which also take the guest itself from
//! [`PROBE_ELF`].

mod guest;

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;
use std::thread;

use atoll_disk::chain;
use serde::Serialize;
use serde_json::Value;

pub use guest::ProbeError;
use guest::{Run, host};

use crate::terminal::print;

/// The probe guest: a static ELF with a PVH note.
pub const PROBE_ELF: &[u8] = include_bytes!(env!("ATOLL_PROBE_ELF"));

/// Supervisor instructions a second from which on a stock Linux kernel boots in bearable time. Its boot takes
/// some 10⁹ of them; hardware and emulated hardware run more than 10⁸ a second, a KVM that interprets them 10⁶.
const LINUX_RING0_PER_S_MIN: u64 = 20_000_000;

/// Arguments of the sub-command.
#[derive(Debug, clap::Args)]
pub struct Arguments {
    /// Print the answer as one JSON object: kvm, linux, reason, and the numbers
    #[arg(long)]
    pub json: bool,
    /// Write the probe guest's ELF file to PATH, and do nothing else
    #[arg(long, value_name = "PATH")]
    pub extract: Option<PathBuf>,
}

/// The answer. Exit code 0 when `kvm`, else 1.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Verdict {
    /// Guests run here: /dev/kvm works and the probe guest ran.
    pub kvm: bool,
    /// Stock Linux kernels run here in bearable time.
    pub linux: bool,
    /// Why, in one sentence without a full stop.
    pub reason: String,
    /// Checks of devices that failed, and what could not be tried.
    pub failures: Vec<String>,
    /// Milliseconds from the start of the VMM's process to the end of the guest's report.
    pub report_ms: Option<u64>,
    /// The guest's report: `sections` is a list of objects, see `firmware/probe/src/report.rs`.
    pub report: Option<Value>,
}

/// Runs the sub-command.
pub fn run(arguments: &Arguments) -> Result<ExitCode, ProbeError> {
    if let Some(path) = &arguments.extract {
        fs::write(path, PROBE_ELF).map_err(host(format!("write {}", path.display())))?;
        return Ok(ExitCode::SUCCESS);
    }
    let verdict = verdict();
    let text = if arguments.json {
        serde_json::json!(verdict).to_string() + "\n"
    } else {
        words(&verdict)
    };
    print(&text).map_err(host("print"))?;
    Ok(if verdict.kvm {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn no(reason: String) -> Verdict {
    Verdict {
        kvm: false,
        linux: false,
        reason,
        failures: vec![],
        report_ms: None,
        report: None,
    }
}

fn verdict() -> Verdict {
    if let Err(error) = fs::File::options().read(true).write(true).open("/dev/kvm") {
        return no(format!(
            "/dev/kvm: {error}; no virtual machine can run here, containers can"
        ));
    }
    // A thread, since a network namespace belongs to a thread and ends with the last one that is in it.
    let outcome = thread::Builder::new()
        .name("probe".into())
        .spawn(guest::run)
        .map(thread::JoinHandle::join);
    match outcome {
        Ok(Ok(Ok(run))) => judge(run),
        Ok(Ok(Err(error))) => no(format!(
            "/dev/kvm is there, but the probe guest did not run: {}",
            chain(&error)
        )),
        Ok(Err(_)) => no("the probe's thread panicked".into()),
        Err(error) => no(format!("no thread for the probe: {error}")),
    }
}

/// The first section of a name.
fn section<'a>(report: &'a Value, name: &str) -> Option<&'a Value> {
    let mut sections = report["sections"].as_array()?.iter();
    sections.find(|section| section["section"] == name)
}

fn judge(run: Run) -> Verdict {
    let Run {
        report,
        notes,
        elapsed,
    } = run;
    let ring0 = section(&report, "cpu")
        .and_then(|cpu| cpu["ring0_per_s"].as_u64())
        .unwrap_or(0);
    let linux = ring0 >= LINUX_RING0_PER_S_MIN;
    let reason = if linux {
        format!(
            "stock Linux kernels run: supervisor code at {} million instructions/s",
            ring0 / 1_000_000
        )
    } else {
        format!(
            "stock Linux kernels would take hours to boot: this host's KVM emulates supervisor code at {:.1} million \
             instructions/s; use `make lab` for them",
            f64::from(u32::try_from(ring0).unwrap_or(u32::MAX)) / 1e6
        )
    };
    let failed = report["failures"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .map(str::to_owned);
    Verdict {
        kvm: true,
        linux,
        reason,
        failures: failed.chain(notes).collect(),
        report_ms: u64::try_from(elapsed.as_millis()).ok(),
        report: Some(report),
    }
}

fn words(verdict: &Verdict) -> String {
    let yes = |value: bool| if value { "yes" } else { "no" };
    let mut lines = vec![
        format!("guests run on this host: {}", yes(verdict.kvm)),
        format!("stock Linux kernels:     {}", yes(verdict.linux)),
        format!("reason:                  {}", verdict.reason),
    ];
    if let Some(ms) = verdict.report_ms {
        lines.push(format!("start to report:         {ms} ms"));
    }
    for section in verdict
        .report
        .iter()
        .flat_map(|report| report["sections"].as_array())
        .flatten()
    {
        let values = section
            .as_object()
            .into_iter()
            .flatten()
            .filter(|(name, _)| *name != "section");
        let values: Vec<String> = values
            .map(|(name, value)| {
                format!(
                    "{name}={}",
                    value.as_str().map_or(value.to_string(), str::to_owned)
                )
            })
            .collect();
        lines.push(format!(
            "{:<24} {}",
            format!("{}:", section["section"].as_str().unwrap_or("?")),
            values.join(" ")
        ));
    }
    lines.extend(
        verdict
            .failures
            .iter()
            .map(|failure| format!("FAILED                   {failure}")),
    );
    lines.join("\n") + "\n"
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn run(ring0: u64) -> Run {
        let report = serde_json::json!({
            "atoll_probe": 1,
            "sections": [{"section": "cpu", "ring0_per_s": ring0}],
            "failures": ["net: no answer"],
        });
        Run {
            report,
            notes: vec![],
            elapsed: Duration::from_millis(30),
        }
    }

    #[test]
    fn slow_supervisor_code_means_no_linux_and_names_the_lab() {
        let verdict = judge(run(500_000));
        assert!(verdict.kvm && !verdict.linux);
        assert!(verdict.reason.contains("0.5 million") && verdict.reason.contains("make lab"));
        assert_eq!(verdict.failures, ["net: no answer"]);
    }

    #[test]
    fn fast_supervisor_code_means_linux() {
        assert!(judge(run(1_000_000_000)).linux);
    }

    #[test]
    fn the_embedded_guest_is_an_elf_file() {
        assert_eq!(&PROBE_ELF[..4], b"\x7fELF");
    }
}
