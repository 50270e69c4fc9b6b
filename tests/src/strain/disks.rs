// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! fio, which writes disks at random, reads all of it back and compares, over and over again: sums find what was changed,
//! and numbers of writes what is old. One process from begin to end, so that a move has it at every stage; it tells now
//! and then how far it is.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::Ordering;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use super::Shared;

/// Bytes that it writes on each disk before it reads them back, a block at a time.
const BYTES: u64 = 128 << 10;
const BLOCK_BYTES: u64 = 4096;
/// Writes in a second, of each: several emulated machines share two cores.
const WRITES_PER_SECOND: u64 = 25;
/// What it calls the end by SIGINT.
const INTERRUPTED: i32 = 128;

/// Runs it until the end.
pub(super) fn verify(shared: &Shared) -> Result<()> {
    let mut fio = command(shared).spawn().context("run fio")?;
    let heard = hear(shared, &mut fio);
    // It has ended, unless nobody hears it any more.
    let _ = fio.kill();
    let status = fio.wait()?;
    heard?;
    ensure!(shared.is_over(), "fio ended: {status}");
    ensure!(status.code() == Some(INTERRUPTED), "fio: {status}");
    Ok(())
}

fn command(shared: &Shared) -> Command {
    let mut fio = Command::new("fio");
    fio.args(["--output-format=json", "--status-interval=1"])
        .args(["--thread", "--ioengine=libaio", "--iodepth=4", "--direct=1"])
        .args(["--rw=randwrite", "--fsync=16"])
        .args(["--verify=crc32c", "--verify_fatal=1", "--exitall_on_error"])
        .args(["--verify_state_save=0", "--loops=1000000000"])
        .arg(format!("--size={BYTES}"))
        .arg(format!("--bs={BLOCK_BYTES}"))
        .arg(format!("--rate_iops={WRITES_PER_SECOND}"))
        .stdout(Stdio::piped());
    for file in &shared.files {
        let path = file.display();
        fio.args([format!("--name={path}"), format!("--filename={path}")]);
    }
    fio
}

/// Follows what it tells, to the last word.
fn hear(shared: &Shared, fio: &mut Child) -> Result<()> {
    let mut said = BufReader::new(fio.stdout.take().context("its output")?);
    let mut told_to_end = false;
    while let Some(status) = next(&mut said)? {
        let jobs = status["jobs"].as_array().context("jobs")?;
        ensure!(jobs.len() == shared.files.len(), "not all: {status}");
        for job in jobs {
            ensure!(job["error"] == 0, "it has failed: {job}");
        }
        // What it reads it compares.
        let verified = jobs
            .iter()
            .filter_map(|job| job["read"]["io_bytes"].as_u64());
        let least = verified.clone().min().unwrap_or(0);
        shared.count_to("disks", least / BLOCK_BYTES);
        shared
            .verified_bytes
            .store(verified.sum(), Ordering::Relaxed);
        if shared.is_over() && !told_to_end {
            kill_process(Pid::from_child(fio), Signal::INT)?;
            told_to_end = true;
        }
    }
    Ok(())
}

/// The next status: an object, whose braces are the only lines that begin with one.
fn next(said: &mut BufReader<ChildStdout>) -> Result<Option<Value>> {
    let mut object = String::new();
    let mut line = String::new();
    while said.read_line(&mut line)? > 0 {
        if !object.is_empty() || line == "{\n" {
            object += &line;
        }
        if line == "}\n" {
            return Ok(Some(serde_json::from_str(&object)?));
        }
        line.clear();
    }
    Ok(None)
}
