// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! The report: sections of named values, each printed as a line of words when it ends, and all of them as one
//! line of JSON at the end:
//!
//! ```json
//! {"atoll_probe":1,"sections":[{"section":"cpu",…},{"section":"exits",…},{"section":"blk","slot":2,…}],"failures":[],"ok":true}
//! ```
//!
//! Names carry their unit. Read by `vmm/src/probe.rs`, by tests and benchmarks.

use alloc::string::String;
use core::fmt::Write;

use crate::acpi::Platform;
use crate::clock::Clock;
use crate::devices::Devices;
use crate::measure;
use crate::options::Options;
use crate::serial::Serial;

/// A report in the making.
pub struct Report {
    json: String,
    failures: String,
    section_name: &'static str,
}

impl Report {
    /// Begins a section; `end` ends it.
    pub fn begin(&mut self, name: &'static str) {
        if !self.json.is_empty() {
            self.json.push(',');
        }
        self.section_name = name;
        let _ = write!(self.json, "{{\"section\":\"{name}\"");
        let _ = write!(Serial, "{name}:");
    }

    /// Ends the section.
    pub fn end(&mut self) {
        self.json.push('}');
        let _ = writeln!(Serial);
    }

    /// A number; the name ends with the unit.
    pub fn number(&mut self, name: &str, value: u64) {
        let _ = write!(self.json, ",\"{name}\":{value}");
        let _ = write!(Serial, " {name}={value}");
    }

    /// Something that is or is not.
    pub fn flag(&mut self, name: &str, value: bool) {
        let _ = write!(self.json, ",\"{name}\":{value}");
        let _ = write!(Serial, " {name}={value}");
    }

    /// Words without quotes or backslashes.
    pub fn text(&mut self, name: &str, value: impl core::fmt::Display) {
        let _ = write!(self.json, ",\"{name}\":\"{value}\"");
        let _ = write!(Serial, " {name}={value}");
    }

    /// A check that failed: the report is not ok.
    pub fn fail(&mut self, what: impl core::fmt::Display) {
        if !self.failures.is_empty() {
            self.failures.push(',');
        }
        let _ = write!(self.failures, "\"{}: {what}\"", self.section_name);
        let _ = write!(Serial, " FAILED({what})");
    }
}

/// Measures, tries every device, and prints.
pub fn make(devices: &mut Devices, platform: &Platform, clock: &Clock, options: &Options) {
    let mut report = Report {
        json: String::new(),
        failures: String::new(),
        section_name: "",
    };
    measure::cpu(&mut report, clock);
    measure::exits(&mut report, clock, devices.taps());
    report.begin("platform");
    report.flag("ecam", platform.ecam.is_some());
    report.flag("power_off", platform.can_power_off());
    report.end();
    devices.check(&mut report, clock, options);
    let Report { json, failures, .. } = report;
    let ok = failures.is_empty();
    let _ = writeln!(
        Serial,
        "{{\"atoll_probe\":1,\"sections\":[{json}],\"failures\":[{failures}],\"ok\":{ok}}}"
    );
    let _ = writeln!(
        Serial,
        "atoll probe: {}",
        if ok {
            "everything works"
        } else {
            "something failed"
        }
    );
}
