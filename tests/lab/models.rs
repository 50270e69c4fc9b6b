// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! CPU models: which the host can give, and what a Linux guest sees of its own.

use std::time::Duration;

use atoll_tests::lab::Host;

const SECOND: Duration = Duration::from_secs(1);

/// A row of `cpu-models --json`.
#[derive(serde::Deserialize)]
pub struct Model {
    pub name: String,
    fits: bool,
    features: String,
    lacks: String,
}

impl Model {
    /// The names of its features as Linux writes them.
    fn features(&self) -> Vec<String> {
        let names = self.features.split(", ");
        names.map(|name| name.replace(['-', '.'], "_")).collect()
    }

    /// Features of this one that the other has not.
    pub fn beyond(&self, other: &Model) -> Vec<String> {
        let common = other.features();
        let mut more = self.features();
        more.retain(|name| !common.contains(name));
        more
    }

    /// What a guest says of its CPU (lines `model name` and `flags` of `/proc/cpuinfo`) is this model, with these flags and
    /// without those.
    pub fn is_seen(&self, cpu: &str, with: &[String], without: &[String]) {
        let name = format!("Atoll virtual CPU {}\n", self.name);
        assert!(cpu.contains(&name), "{cpu}");
        let flags: Vec<_> = cpu.split_whitespace().collect();
        let has = |name: &String| flags.contains(&name.as_str());
        assert!(with.iter().all(has), "{with:?} of {cpu}");
        assert!(!without.iter().any(has), "{without:?} of {cpu}");
    }
}

/// The levels of the psABI, ascending: those that the host can give, and those that it cannot.
pub fn levels(host: &Host) -> (Vec<Model>, Vec<Model>) {
    let listed = "/payload/bin/atoll-vmm cpu-models --json";
    let listed = host.check(listed, SECOND * 60).unwrap();
    let rows: Vec<Model> = serde_json::from_str(&listed).unwrap();
    let levels = rows
        .into_iter()
        .filter(|row| row.name.starts_with("x86-64"));
    levels.partition(|row| row.fits)
}

/// A machine of a model with features that the host has not is refused by what is missing and what would do.
pub fn is_refused(host: &Host, model: &Model, fitting: &Model) {
    let run = format!(
        "! /payload/bin/atoll-vmm run --kernel /payload/full/vmlinux --cpu {} 2>&1 </dev/null",
        model.name
    );
    let said = host.check(&run, SECOND * 60).unwrap();
    println!("{said}");
    assert!(!model.lacks.is_empty());
    for part in [&format!("lack {}: ", model.lacks), &fitting.name] {
        assert!(said.contains(part), "no {part:?} in {said}");
    }
}
