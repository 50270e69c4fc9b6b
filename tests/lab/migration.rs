// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! A stock Debian guest moves between two hosts while it works (`working`): back and forth for as long as there is time,
//! 20 times with four vCPUs in `make soak`, where every other move ends with post-copy. Every part of its work checks
//! itself, and has to go on after each move.

use std::time::{Duration, Instant};

use crate::shell;
use crate::working::{end_work, moves_late_to, moves_to, start_hosts, start_work, works_on};

/// Time for moves where nobody asks for a number of them: on a busy machine a move takes minutes, and one is enough.
const MOVES_SECONDS: u64 = 90;

/// Moves that are asked for (`make soak`).
fn asked_for() -> Option<u32> {
    let asked = std::env::var("ATOLL_LAB_MOVES").ok();
    asked.map(|text| text.parse().unwrap())
}

#[test]
fn a_working_guest_moves_back_and_forth_between_hosts() {
    let (hosts, _guards) = start_hosts();
    let (mut from, mut to) = (&hosts[0], &hosts[1]);
    let cpu_count = if asked_for().is_some() { 4 } else { 2 };
    start_work(from, cpu_count);
    let mut number = 0;
    let began = Instant::now();
    let goes_on = |number: u32| match asked_for() {
        Some(asked) => number < asked,
        None => number == 0 || began.elapsed() < Duration::from_secs(MOVES_SECONDS),
    };
    while goes_on(number) {
        number += 1;
        let info = match asked_for() {
            Some(_) if number.is_multiple_of(2) => moves_late_to(from, to),
            _ => moves_to(from, to),
        };
        let report = works_on(to);
        println!("move {number}: {info}, {report:?}");
        (from, to) = (to, from);
    }
    end_work(from, &hosts[0]);
    shell::end(from);
}
