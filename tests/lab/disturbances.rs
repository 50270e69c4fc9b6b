// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A guest at work (`working`) whose move is called off, or loses one of its two processes or the network between its
//! hosts, at a random moment: one host runs it afterwards, and its work goes on there; no host does where it has died with
//! its process; never both.
//!
//! A seed is one such move. Two in every run, from ATOLL_SEED on or from a random one, and ATOLL_LAB_SEEDS (`make soak`:
//! 10). All seeds four apart have the same disturbance. `vmm/tests` has the same with more seeds, and the probe guest.

use atoll_tests::lab::Host;
use atoll_tests::strain::Numbers;

use crate::shell::{self, control, on_host, wait_for};
use crate::working::{
    MOVE_SECONDS, ask_to_move, end_work, moves_to, receive, start_hosts, start_work, works_on,
};

/// Silence after which either side gives the network up. Long for a busy machine; a disk's server is waited for longer.
const SILENCE_LIMIT_MS: u64 = 5000;

#[derive(Debug, Clone, Copy)]
enum Disturbance {
    Cancel,
    KillTarget,
    KillSource,
    /// Nothing comes through for so long, then everything does.
    Cut {
        milliseconds: u64,
    },
}

/// When it happens.
#[derive(Debug, Clone, Copy)]
enum Moment {
    /// So many milliseconds after the move was asked for.
    Asked(u64),
    /// So many milliseconds after the guest was held for it.
    Held(u64),
}

#[derive(Debug, Clone, Copy)]
struct Scenario {
    disturbance: Disturbance,
    moment: Moment,
}

impl Scenario {
    /// Of a move that takes about `whole_ms`, and holds the guest for about `held_ms`.
    fn of(seed: u64, whole_ms: u64, held_ms: u64) -> Self {
        let mut numbers = Numbers::new(seed);
        let mut below = |end: u64| numbers.below(end.max(1));
        Self {
            disturbance: match seed % 4 {
                0 => Disturbance::Cancel,
                1 => Disturbance::Cut {
                    milliseconds: 1000 + below(8000),
                },
                2 => Disturbance::KillTarget,
                _ => Disturbance::KillSource,
            },
            moment: match below(2) {
                0 => Moment::Asked(below(whole_ms)),
                _ => Moment::Held(below(held_ms)),
            },
        }
    }
}

const CTL: &str = "/payload/bin/atoll-vmm ctl --api-socket api.sock";

/// All of the host's traffic with other hosts is lost; those with the machine outside are not cut off.
const CUT: &str = r#"nft -f - <<'.'
table inet cut {
    chain in { type filter hook input priority 0; iifname eth1 drop; }
    chain out { type filter hook output priority 0; oifname eth1 drop; }
}
.
"#;

/// Whether the host's machine runs.
#[track_caller]
fn runs(host: &Host) -> bool {
    let ask = format!("{CTL} info 2>&1 || true");
    on_host(host, &ask, 60).contains("\"running\"")
}

/// One move that is disturbed. The host that runs the guest afterwards; none, if it died with the process that had it.
#[track_caller]
fn disturbed([from, to]: [&Host; 2], scenario: Scenario) -> Option<&Host> {
    let place = receive(to);
    let options = format!("--silence-limit-ms {SILENCE_LIMIT_MS}");
    let ask = ask_to_move(from, &place, &options);
    let begin = format!(
        "rm -f asked; (code=0; {ask} >moved 2>&1 || code=$?; echo $code > asked) </dev/null >/dev/null 2>&1 &"
    );
    on_host(from, &begin, 60);
    strike([from, to], scenario);
    wait_for(from, "[ -e asked ]", MOVE_SECONDS);
    let said = on_host(from, "cat asked moved", 30);
    println!("{said}");
    if said.contains("greet ") || said.contains("connect to ") {
        // Nothing has come: it waits for another source.
        on_host(to, "kill -9 $(cat pid) || true", 30);
    }
    settles(to);
    if said.contains("and nobody answers at") {
        // Somebody who can reach both decides: here the test.
        let decision = if runs(to) { "shutdown" } else { "resume" };
        println!("in doubt: {decision}");
        control(from, decision);
    }
    settles(from);
    let running = [from, to].map(runs);
    let moved = said.starts_with("0\n");
    let expected: &[[bool; 2]] = match scenario.disturbance {
        Disturbance::Cancel | Disturbance::Cut { .. } => &[[true, false], [false, true]],
        Disturbance::KillTarget if moved => &[[false, false]],
        Disturbance::KillTarget => &[[true, false]],
        Disturbance::KillSource => &[[false, true], [false, false]],
    };
    let logs = || [from, to].map(|host| on_host(host, "cat vmm.log", 30));
    assert!(
        expected.contains(&running),
        "{running:?}: {said}\n{}",
        logs().join("\n\n")
    );
    let mut hosts = running.into_iter().zip([from, to]);
    hosts.find_map(|(runs, host)| runs.then_some(host))
}

/// Waits until the host's process has ended, or its machine runs.
#[track_caller]
fn settles(host: &Host) {
    let settled = format!("{{ [ -e exit ] || {CTL} info | grep -q running; }}");
    wait_for(host, &settled, 90);
}

/// Waits for the moment, and disturbs.
#[track_caller]
fn strike([from, to]: [&Host; 2], scenario: Scenario) {
    let seconds = |milliseconds: u64| format!("{}.{:03}", milliseconds / 1000, milliseconds % 1000);
    let wait = match scenario.moment {
        Moment::Asked(milliseconds) => format!("sleep {}", seconds(milliseconds)),
        Moment::Held(milliseconds) => format!(
            "until [ -e asked ] || {CTL} migration 2>&1 | grep -q switching; do sleep 0.2; done; sleep {}",
            seconds(milliseconds)
        ),
    };
    // Whoever has ended cannot be killed.
    let kill = "kill -9 $(cat pid) || true";
    match scenario.disturbance {
        // Refused when it is too late.
        Disturbance::Cancel => on_host(
            from,
            &format!("{wait}; {CTL} cancel-migration 2>&1 || true"),
            MOVE_SECONDS,
        ),
        Disturbance::KillTarget => {
            on_host(from, &wait, MOVE_SECONDS);
            on_host(to, kill, 30)
        }
        Disturbance::KillSource => on_host(from, &format!("{wait}; {kill}"), MOVE_SECONDS),
        Disturbance::Cut { milliseconds } => {
            let heal = format!("sleep {}; nft delete table inet cut", seconds(milliseconds));
            on_host(from, &format!("{wait}; {CUT}{heal}"), MOVE_SECONDS)
        }
    };
}

fn number(name: &str) -> Option<u64> {
    let asked = std::env::var(name).ok();
    asked.map(|text| text.parse().unwrap())
}

#[test]
fn one_host_at_most_runs_a_guest_whose_move_is_disturbed() {
    let (hosts, _guards) = start_hosts();
    let (mut from, mut to) = (&hosts[0], &hosts[1]);
    start_work(from, 2);
    // How long it takes when nothing happens.
    let info = moves_to(from, to);
    println!("undisturbed: {info}");
    let whole_ms = info["elapsed_ms"].as_u64().unwrap();
    let held_ms = info["downtime_us"].as_u64().unwrap() / 1000;
    works_on(to);
    (from, to) = (to, from);
    let first = number("ATOLL_SEED").unwrap_or(std::process::id().into());
    for seed in first..first + number("ATOLL_LAB_SEEDS").unwrap_or(2) {
        let scenario = Scenario::of(seed, whole_ms, held_ms);
        println!(
            "ATOLL_SEED={seed}: {scenario:?}, from node{}",
            from.number()
        );
        let survivor = disturbed([from, to], scenario);
        match survivor {
            Some(host) => _ = works_on(host),
            None => start_work(&hosts[0], 2),
        }
        let has_it = survivor.unwrap_or(&hosts[0]);
        if has_it.number() != from.number() {
            (from, to) = (to, from);
        }
    }
    end_work(from, &hosts[0]);
    shell::end(from);
}
