// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! How long a guest stands still while its host does something with it: the longest silence of one that writes a line
//! every 256 rounds, while its machine goes to a new process, or is saved. Its console is on standard streams, which
//! the new process has, too.

use std::io::Read as _;
use std::process::{ChildStdout, Command};
use std::thread::{Builder, scope, sleep};
use std::time::{Duration, Instant};

use crate::Bench;
use crate::migration::{ctl, folder};
use crate::monitor::{Programs, Running};
use crate::table::{Aim, Contestant, Figure, Row, compare};

/// Turns: each is a second or two.
const TURNS: usize = 9;
/// How long one listens after the work, too: a guest that stands still then has not gone on.
const AFTER: Duration = Duration::from_millis(200);

/// A machine, what its guest works on, and what is done with it.
#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    memory: &'static str,
    works_on_mib: u64,
    request: &'static [&'static str],
}

/// Rows: what it is called, ours, and what it is compared with.
const ROWS: [(&str, Aim, [Case; 2]); 2] = [
    (
        "upgrade_stands_still",
        Aim::AtMost("1.25"),
        [
            upgrade("ours, 4 GiB", "4096M,shared"),
            upgrade("ours, 128 MiB", "128M,shared"),
        ],
    ),
    (
        "snapshot_stands_still",
        Aim::AtMost("1.00"),
        [
            snapshot(
                "ours, live",
                &["snapshot", "--to", "saved", "--live", "true"],
            ),
            snapshot("ours, held", &["snapshot", "--to", "saved"]),
        ],
    ),
];

const fn upgrade(name: &'static str, memory: &'static str) -> Case {
    Case {
        name,
        memory,
        works_on_mib: 64,
        request: &["upgrade", "--to"],
    }
}

const fn snapshot(name: &'static str, request: &'static [&'static str]) -> Case {
    Case {
        name,
        memory: "1024",
        works_on_mib: 512,
        request,
    }
}

/// The suite.
pub fn rows(bench: &Bench) -> Vec<Row> {
    let programs = match Programs::find(bench) {
        Ok(programs) => programs,
        Err(error) => {
            let figure = Figure::cost("stands_still", "ms");
            return vec![Row::absent(&figure, "-", &error)];
        }
    };
    let turns = bench.runs.min(TURNS);
    let row = |(name, aim, [ours, other]): (&str, Aim, [Case; 2])| {
        let contestant = |case: Case| Contestant {
            name: case.name,
            turns_max: usize::MAX,
            take: Box::new({
                let programs = &programs;
                move || silence_ms(programs, case)
            }),
        };
        let figure = Figure {
            name: name.into(),
            unit: "ms",
            aim,
        };
        compare(&figure, turns, contestant(ours), vec![contestant(other)])
    };
    ROWS.into_iter().flat_map(row).collect()
}

fn silence_ms(programs: &Programs, case: Case) -> anyhow::Result<f64> {
    let folder = folder()?;
    let here = folder.path();
    let mut command = Command::new(programs.vmm());
    command.args(["run", "--kernel"]).arg(programs.kernel());
    command.args(["--cmdline", &format!("stay load=16,{}", case.works_on_mib)]);
    command.args(["--memory", case.memory, "--console", "stdio"]);
    command.args(["--api-socket", "api"]).current_dir(here);
    let mut running = Running::of(command)?;
    // Once over all that it works on.
    let rounds = case.works_on_mib * 256;
    running.wait_for(format!("load {rounds}\r\n").as_bytes())?;
    let output = running.take_output()?;
    let program = programs.vmm().display().to_string();
    let mut request = case.request.to_vec();
    if request.ends_with(&["--to"]) {
        request.push(&program);
    }
    scope(|threads| {
        let listener = Builder::new().spawn_scoped(threads, || listen(output))?;
        let done = ctl(programs, here, &request);
        let ended = Instant::now();
        sleep(AFTER);
        // Whichever process has it now; the listener hears the end of all of them.
        let shut = ctl(programs, here, &["shutdown"]);
        drop(running);
        let heard = listener.join().expect("it does not panic");
        done?;
        shut?;
        anyhow::ensure!(heard.last > ended, "the guest did not go on");
        Ok(heard.longest.as_secs_f64() * 1000.0)
    })
}

struct Heard {
    longest: Duration,
    last: Instant,
}

/// Reads until the end.
fn listen(mut output: ChildStdout) -> Heard {
    let mut heard = Heard {
        longest: Duration::ZERO,
        last: Instant::now(),
    };
    while let Ok(1..) = output.read(&mut [0; 4096]) {
        let now = Instant::now();
        heard.longest = heard.longest.max(now - heard.last);
        heard.last = now;
    }
    heard
}
