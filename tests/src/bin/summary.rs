// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! `atoll-test-summary JUNIT.xml… --output summary.tsv`: one row a suite, printed and written.
//!
//! A test that skipped says `ATOLL-SKIP: reason` in its output; it counts as skipped, not as passed. What failed before
//! it passed is printed with what it said, so that a retry hides nothing.
#![expect(
    clippy::print_stdout,
    reason = "a command line tool talks to its terminal"
)]

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser;
use quick_xml::Reader;
use quick_xml::escape::resolve_predefined_entity;
use quick_xml::events::{BytesStart, Event};

/// Sums up JUnit reports by suite.
#[derive(Parser)]
#[command(name = "atoll-test-summary")]
struct Arguments {
    /// Reports; a missing one counts as one failed test.
    reports: Vec<PathBuf>,
    /// Where the table goes.
    #[arg(long)]
    output: PathBuf,
}

#[derive(Default)]
struct Row {
    passed: u32,
    failed: u32,
    skipped: u32,
    seconds: f64,
}

#[derive(Default)]
struct Tables {
    rows: BTreeMap<String, Row>,
    skips: Vec<String>,
    /// Tests that passed at a later try, with the output of those before.
    retried: Vec<String>,
}

/// How much of a failed try is printed, from its panic on.
const RETRIED_LINES: usize = 24;

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let mut tables = Tables::default();
    for report in &arguments.reports {
        match std::fs::read_to_string(report) {
            Ok(text) => {
                add(&mut tables, &text).with_context(|| format!("read {}", report.display()))?;
            }
            Err(_) => {
                tables
                    .rows
                    .entry(report.display().to_string())
                    .or_default()
                    .failed += 1
            }
        }
    }
    let text = print(&tables);
    std::fs::write(&arguments.output, &text)?;
    for retried in &tables.retried {
        println!("passed after a failure  {retried}");
    }
    for skip in &tables.skips {
        println!("skipped  {skip}");
    }
    print!("{text}");
    let sum = |field: fn(&Row) -> u32| tables.rows.values().map(field).sum::<u32>();
    let (passed, failed, skipped) = (sum(|r| r.passed), sum(|r| r.failed), sum(|r| r.skipped));
    println!("{passed} passed, {failed} failed, {skipped} skipped");
    std::process::exit(i32::from(failed > 0));
}

fn print(tables: &Tables) -> String {
    let mut text = String::from("suite\tpassed\tfailed\tskipped\tseconds\n");
    for (suite, row) in &tables.rows {
        let Row {
            passed,
            failed,
            skipped,
            seconds,
        } = row;
        let _ = writeln!(text, "{suite}\t{passed}\t{failed}\t{skipped}\t{seconds:.1}");
    }
    text
}

/// One test case while it is read.
struct Case {
    suite: String,
    name: String,
    seconds: f64,
    failed: bool,
    skip: Option<String>,
    /// What tries before the last one wrote to their standard error.
    tries: Vec<String>,
}

/// What of a test case is being read.
#[derive(PartialEq)]
enum Reading {
    Nothing,
    Output,
    /// The standard error of a try that failed before another one passed.
    Retried,
}

fn add(tables: &mut Tables, xml: &str) -> Result<()> {
    let mut reader = Reader::from_str(xml);
    let mut case: Option<Case> = None;
    let mut retried = false;
    let mut reading = Reading::Nothing;
    loop {
        match reader.read_event()? {
            Event::Empty(tag) if tag.name().as_ref() == "testcase" => finish(tables, begin(&tag)?),
            Event::Start(tag) => match tag.name().as_ref() {
                "testcase" => case = Some(begin(&tag)?),
                "failure" | "error" => fail(&mut case),
                "flakyFailure" => retried = true,
                "system-out" => reading = Reading::Output,
                "system-err" if retried => {
                    reading = Reading::Retried;
                    case.iter_mut()
                        .for_each(|case| case.tries.push(String::new()));
                }
                _ => {}
            },
            Event::Empty(tag) if matches!(tag.name().as_ref(), "failure" | "error") => {
                fail(&mut case);
            }
            Event::End(tag) => match tag.name().as_ref() {
                "testcase" => case
                    .take()
                    .into_iter()
                    .for_each(|case| finish(tables, case)),
                "flakyFailure" => retried = false,
                "system-out" | "system-err" => reading = Reading::Nothing,
                _ => {}
            },
            Event::Text(text) => match (&mut case, &reading) {
                (Some(case), Reading::Output) => note_skip(case, &text),
                (Some(case), Reading::Retried) => say(case, &text),
                _ => {}
            },
            Event::GeneralRef(name) if reading == Reading::Retried => {
                let text = resolve_predefined_entity(&name).unwrap_or("?");
                case.iter_mut().for_each(|case| say(case, text));
            }
            Event::Eof => return Ok(()),
            _ => {}
        }
    }
}

fn fail(case: &mut Option<Case>) {
    if let Some(case) = case {
        case.failed = true;
    }
}

fn say(case: &mut Case, text: &str) {
    if let Some(said) = case.tries.last_mut() {
        said.push_str(text);
    }
}

fn begin(tag: &BytesStart) -> Result<Case> {
    let value = |name: &str| -> Result<String> {
        let attribute = tag
            .try_get_attribute(name)?
            .with_context(|| format!("no {name}"))?;
        Ok(attribute.value.into_owned())
    };
    Ok(Case {
        suite: value("classname")?,
        name: value("name")?,
        seconds: value("time")?.parse()?,
        failed: false,
        skip: None,
        tries: Vec::new(),
    })
}

fn note_skip(case: &mut Case, output: &str) {
    if let Some((_, rest)) = output.split_once("ATOLL-SKIP: ") {
        case.skip = Some(rest.lines().next().unwrap_or_default().to_owned());
    }
}

fn finish(tables: &mut Tables, case: Case) {
    let row = tables.rows.entry(case.suite.clone()).or_default();
    row.seconds += case.seconds;
    for said in case.tries.iter().filter(|_| !case.failed) {
        let panic = said.find("panicked at").unwrap_or(0);
        let lines = said[panic..].lines().take(RETRIED_LINES);
        let lines: String = lines.map(|line| format!("\n    {line}")).collect();
        let retried = format!("{} {}{lines}", case.suite, case.name);
        tables.retried.push(retried);
    }
    match (case.failed, case.skip) {
        (true, _) => row.failed += 1,
        (false, None) => row.passed += 1,
        (false, Some(reason)) => {
            row.skipped += 1;
            tables
                .skips
                .push(format!("{} {}: {reason}", case.suite, case.name));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_passes_failures_and_skips() {
        let mut tables = Tables::default();
        let xml = r#"<testsuites><testsuite name="a"><testcase name="x" classname="a" time="1.5"/>
            <testcase name="y" classname="a" time="1"><failure/></testcase>
            <testcase name="z" classname="a" time="0"><system-out>
ATOLL-SKIP: no /dev/kvm
            </system-out></testcase></testsuite></testsuites>"#;
        add(&mut tables, xml).unwrap();
        assert_eq!(
            print(&tables),
            "suite\tpassed\tfailed\tskipped\tseconds\na\t1\t1\t1\t2.5\n"
        );
        assert_eq!(tables.skips, ["a z: no /dev/kvm"]);
    }

    #[test]
    fn a_retry_tells_what_failed_before_it() {
        let mut tables = Tables::default();
        let xml = r#"<testsuites><testsuite name="a"><testcase name="x" classname="a" time="1"><flakyFailure>
            <system-out>nothing</system-out><system-err>noise
thread &apos;x&apos; panicked at a.rs:1:
left</system-err></flakyFailure></testcase></testsuite></testsuites>"#;
        add(&mut tables, xml).unwrap();
        assert_eq!(tables.retried, ["a x\n    panicked at a.rs:1:\n    left"]);
        assert_eq!(
            print(&tables),
            "suite\tpassed\tfailed\tskipped\tseconds\na\t1\t0\t0\t1.0\n"
        );
    }
}
