// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll-vmm cpu-models`: which CPU models there are, and which of them this host can give. And models of a user's
//! own, as files in a directory.
//!
//! Not here: what a model is (`kvm::cpu::model`).

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use atoll_vmm_protocol::cpu::{CpuModel, CpuSpec, HOST};
use serde::Serialize;

use crate::check;
use crate::kvm::Kvm;
use crate::kvm::cpu::{HostCpu, Vendor, best_level, lacks, model};
use crate::terminal::print;

const HELP: &str = "\
A model is a name for a set of CPU features: what it does not name, the guest does not see. A guest with a named model
can move to every host of the same vendor that has its features; one with `host` only to hosts with all that this one
has. Choose the greatest model that all hosts of a cluster can give:

  atoll-vmm run --cpu x86-64-v3 …            a model
  atoll-vmm run --cpu x86-64-v3,+pcid,-aes … and what is changed about it

A model of your own is a JSON file in a directory, for --cpu-models DIR of this command and of run:

  {\"name\": \"office\", \"description\": \"our oldest hosts\", \"base\": \"x86-64-v2-AES\", \"flags\": [\"+pcid\", \"+spec-ctrl\"]}

Exit codes: 0, or 1 when a model was named that does not fit.";

/// Arguments of the sub-command.
#[derive(Debug, clap::Args)]
#[command(after_help = HELP)]
pub struct Arguments {
    /// Only this one, with its features
    #[arg(value_name = "MODEL")]
    pub model: Option<String>,
    /// Models of your own as well: every *.json in DIR
    #[arg(long, value_name = "DIR")]
    pub cpu_models: Option<PathBuf>,
    /// Print JSON: a list of objects with name, description, fits, lacks, features
    #[arg(long)]
    pub json: bool,
}

/// One model on this host.
#[derive(Debug, PartialEq, Eq, Serialize)]
struct Row {
    name: String,
    description: String,
    /// Absent when this host's KVM cannot be asked.
    fits: Option<bool>,
    /// Names of features that the host does not have.
    lacks: String,
    /// Names of its features.
    features: String,
}

/// Runs the sub-command.
pub fn run(arguments: &Arguments) -> anyhow::Result<ExitCode> {
    let own = match &arguments.cpu_models {
        Some(directory) => read(directory)?,
        None => Vec::new(),
    };
    let kvm = Kvm::open().and_then(|kvm| kvm.cpu().cloned());
    let host = kvm.as_ref().ok();
    let mut rows = rows(&own, host)?;
    if let Some(name) = &arguments.model {
        rows.retain(|row| row.name == *name);
        if rows.is_empty() {
            let spec = spec(name, &own);
            let unknown = model::wanted(&spec, Vendor::Intel).map(drop);
            unknown.map_err(|error| check::SpecError(error.to_string()))?;
        }
    }
    let text = match (arguments.json, &arguments.model) {
        (true, _) => serde_json::to_string_pretty(&rows)? + "\n",
        (false, Some(_)) => rows.iter().map(details).collect(),
        (false, None) => table(&rows, host),
    };
    print(&text).context("print")?;
    if let Err(error) = kvm {
        note(&error.to_string());
    }
    let refused = arguments.model.is_some() && rows.iter().any(|row| row.fits == Some(false));
    Ok(ExitCode::from(u8::from(refused)))
}

fn spec(name: &str, own: &[CpuModel]) -> CpuSpec {
    CpuSpec {
        model: name.to_owned(),
        models: own.to_vec(),
        ..CpuSpec::default()
    }
}

fn rows(own: &[CpuModel], host: Option<&HostCpu>) -> Result<Vec<Row>, check::SpecError> {
    let vendor = host.map_or(Vendor::Intel, HostCpu::vendor);
    let everything = CpuModel {
        name: HOST.to_owned(),
        description: "all that this host can give".to_owned(),
        ..CpuModel::default()
    };
    let models = [&everything].into_iter().chain(model::known()).chain(own);
    let row = |model: &CpuModel| {
        let spec = spec(&model.name, own);
        let wanted = model::wanted(&spec, vendor);
        let wanted = wanted.map_err(|error| check::SpecError(error.to_string()))?;
        let missing = host.and_then(|host| lacks(&spec, host));
        let features = match (wanted.from_host, host) {
            (true, Some(host)) => *host.features(),
            _ => wanted.added,
        };
        Ok(Row {
            name: model.name.clone(),
            description: model.description.clone(),
            fits: missing.map(|missing| missing.is_empty()),
            lacks: missing.map_or_else(String::new, |missing| missing.to_string()),
            features: features.to_string(),
        })
    };
    models.map(row).collect()
}

fn table(rows: &[Row], host: Option<&HostCpu>) -> String {
    let width = rows.iter().map(|row| row.name.len()).max().unwrap_or(0);
    let mut text = format!("{:width$}  fits here  what it is\n", "model");
    for row in rows {
        let fits = match row.fits {
            Some(true) => "yes",
            Some(false) => "no",
            None => "?",
        };
        let _ = write!(text, "{:width$}  {fits:9}  {}", row.name, row.description);
        if !row.lacks.is_empty() {
            let _ = write!(text, " (lacks {})", row.lacks);
        }
        text.push('\n');
    }
    if let Some(level) = host.and_then(best_level) {
        let _ = writeln!(text, "\nThe greatest level that fits here is {level}.");
    }
    text
}

fn details(row: &Row) -> String {
    let Row {
        name,
        description,
        lacks,
        features,
        ..
    } = row;
    let mut text = format!("{name}: {description}\nfeatures: {features}\n");
    if !lacks.is_empty() {
        let _ = writeln!(text, "this host lacks: {lacks}");
    }
    text
}

#[expect(
    clippy::print_stderr,
    reason = "a command answers on its standard streams"
)]
fn note(error: &str) {
    eprintln!("atoll-vmm: which models fit is not known: {error}");
}

/// Every model in a directory, by name.
pub fn read(directory: &Path) -> anyhow::Result<Vec<CpuModel>> {
    let context = || format!("CPU models in {}", directory.display());
    let mut models = Vec::new();
    for entry in std::fs::read_dir(directory).with_context(context)? {
        let path = entry.with_context(context)?.path();
        if path.extension().is_none_or(|extension| extension != "json") {
            continue;
        }
        let context = || format!("CPU model {}", path.display());
        let text = std::fs::read_to_string(&path).with_context(context)?;
        let model: CpuModel = serde_json::from_str(&text).with_context(context)?;
        models.push(model);
    }
    models.sort_by(|one, other| one.name.cmp(&other.name));
    Ok(models)
}

/// Gives a spec those of `models` that its model begins with.
pub fn bring(spec: &mut CpuSpec, models: &[CpuModel]) {
    let mut name = Some(spec.model.clone());
    while let Some(model) = models
        .iter()
        .find(|model| Some(&model.name) == name.as_ref())
    {
        if spec.models.contains(model) {
            break;
        }
        spec.models.push(model.clone());
        name.clone_from(&model.base);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spec_brings_what_it_needs() {
        let folder = tempfile::tempdir().unwrap();
        for (file, text) in [
            (
                "a.json",
                r#"{"name": "a", "base": "x86-64-v2", "flags": ["+aes"]}"#,
            ),
            ("b.json", r#"{"name": "b", "base": "a"}"#),
            ("c.json", r#"{"name": "c"}"#),
            ("notes.txt", "not a model"),
        ] {
            std::fs::write(folder.path().join(file), text).unwrap();
        }
        let models = read(folder.path()).unwrap();
        assert_eq!(models.len(), 3);
        let mut spec = spec("b", &[]);
        bring(&mut spec, &models);
        let names: Vec<_> = spec.models.iter().map(|model| &*model.name).collect();
        assert_eq!(names, ["b", "a"]);
        let wanted = model::wanted(&spec, Vendor::Amd).unwrap();
        assert!(wanted.added.to_string().contains("popcnt"));
        std::fs::write(folder.path().join("d.json"), "{").unwrap();
        let error = format!("{:#}", read(folder.path()).unwrap_err());
        assert!(error.contains("d.json: EOF"), "{error}");
    }

    #[test]
    fn without_a_host_everything_but_fits_is_told() {
        let rows = rows(&[], None).unwrap();
        assert_eq!(rows[0].name, HOST);
        assert!(rows.iter().all(|row| row.fits.is_none()));
        let text = table(&rows, None);
        assert!(text.contains("x86-64-v4"), "{text}");
        assert!(details(&rows[1]).contains("sse2"));
    }
}
