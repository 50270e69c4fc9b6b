// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Tables of allowed calls as a program for the kernel (classic BPF, `linux/filter.h`), which searches them by halving.
//!
//! With every call of the process the kernel runs the program; and when it is installed, once for each number that a
//! call can have, to learn which are allowed whatever their arguments. A list that is walked from its head makes the
//! latter most of a machine's start: a hundred calls are two hundred steps for most numbers, and nine when halved.
//!
//! ```text
//! architecture ─► number ─► halve … ─► allow │ deny │ argument ─► and mask ─► halve … ─► allow │ next condition, or deny
//! ```

use seccompiler::{BpfProgram, sock_filter};

use super::filters::{Call, When};

/// `linux/bpf_common.h`: classes and modes of instructions, put together as they are used.
const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const AND: u16 = 0x54; // BPF_ALU | BPF_AND | BPF_K
const JUMP: u16 = 0x05; // BPF_JMP | BPF_JA
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const JUMP_NOT_BELOW: u16 = 0x35; // BPF_JMP | BPF_JGE | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// Offsets in `struct seccomp_data` of `linux/seccomp.h`. Of an argument, its low half: this is a little-endian format.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;
const ARGUMENT_BYTES: u32 = 8;

/// `linux/audit.h`: the only architecture whose numbers the tables have. Calls of another one's, such as those of 32-bit
/// programs, end the process.
#[cfg(target_arch = "x86_64")]
const AUDIT_ARCH: u32 = 0xc000_003e;

/// The program that allows what `calls` allow, and answers `denied` (`SECCOMP_RET_…`) to everything else.
pub(super) fn compile<'a>(calls: impl Iterator<Item = &'a Call>, denied: u32) -> BpfProgram {
    let mut calls: Vec<&Call> = calls.collect();
    // An unconditional entry first: the number needs no other.
    calls.sort_by_key(|call| (call.number, call.when.looks_at()));
    let mut ranges = Ranges::default();
    for same in calls.chunk_by(|one, other| one.number == other.number) {
        let number = u32::try_from(same[0].number).expect("numbers of calls are small");
        let outcome = match same[0].when {
            When::Always => Outcome::Allow,
            When::Argument { .. } => Outcome::If(conditions(same, denied)),
        };
        ranges.set(number, outcome);
    }
    let mut program = Backwards::default();
    program.halve(&ranges.0, Miss::Return(denied));
    let architecture = sock_filter {
        jt: 1,
        ..instruction(JUMP_EQUAL, AUDIT_ARCH)
    };
    program.put(&[
        instruction(LOAD, ARCHITECTURE),
        architecture,
        instruction(RETURN, libc::SECCOMP_RET_KILL_PROCESS),
        instruction(LOAD, NUMBER),
    ]);
    program.turned()
}

/// What a value comes to.
#[derive(PartialEq)]
enum Outcome {
    Allow,
    /// Whatever this program says.
    If(BpfProgram),
    Miss,
}

/// What a value comes to that no condition names.
#[derive(Clone, Copy)]
enum Miss {
    /// The answer to the call.
    Return(u32),
    /// The rest of the program, behind so many more instructions than those of the search itself.
    Skip(usize),
}

/// All values in order: where each range begins, and what it comes to.
struct Ranges(Vec<(u32, Outcome)>);

impl Default for Ranges {
    fn default() -> Self {
        Self(vec![(0, Outcome::Miss)])
    }
}

impl Ranges {
    /// Gives `value`, larger than all before it, its outcome. Neighbors that are allowed are one range.
    fn set(&mut self, value: u32, outcome: Outcome) {
        if self.0.last().is_some_and(|(start, _)| *start == value) {
            self.0.pop();
        }
        let joins = outcome == Outcome::Allow;
        if !(joins && self.0.last().is_some_and(|(_, last)| *last == outcome)) {
            self.0.push((value, outcome));
        }
        if let Some(next) = value.checked_add(1) {
            self.0.push((next, Outcome::Miss));
        }
    }
}

impl When {
    /// Which argument, and which bits of it.
    fn looks_at(&self) -> Option<(u8, u32)> {
        match *self {
            When::Always => None,
            When::Argument { index, mask, .. } => Some((index, mask)),
        }
    }

    fn values(&self) -> &'static [u32] {
        match *self {
            When::Always => &[],
            When::Argument { one_of, .. } => one_of,
        }
    }
}

/// The conditions of one call, each tried when those before it do not hold. Those that look at the same bits are one:
/// the tables of several kinds of thread repeat them.
fn conditions(calls: &[&Call], denied: u32) -> BpfProgram {
    let mut program = Backwards::default();
    let same_bits = |one: &&Call, other: &&Call| one.when.looks_at() == other.when.looks_at();
    for (left, same) in calls.chunk_by(same_bits).rev().enumerate() {
        let (index, mask) = same[0]
            .when
            .looks_at()
            .expect("what is allowed unconditionally needs no look");
        let mut values: Vec<u32> = same
            .iter()
            .flat_map(|call| call.when.values())
            .copied()
            .collect();
        values.sort_unstable();
        values.dedup();
        let mut ranges = Ranges::default();
        for value in values {
            ranges.set(value, Outcome::Allow);
        }
        let miss = match left {
            0 => Miss::Return(denied),
            _ => Miss::Skip(0),
        };
        let argument = ARGUMENTS + ARGUMENT_BYTES * u32::from(index);
        program.halve(&ranges.0, miss);
        program.put(&[instruction(LOAD, argument), instruction(AND, mask)]);
    }
    program.turned()
}

/// A program as it grows, its last instruction first: a jump says over how many it leads, which are there by then. One
/// piece of memory, since each thread of each machine has this made, and what is freed stays with the thread.
#[derive(Default)]
struct Backwards(BpfProgram);

impl Backwards {
    /// Puts these before all that is there.
    fn put(&mut self, instructions: &[sock_filter]) {
        self.0.extend(instructions.iter().rev().cloned());
    }

    fn turned(mut self) -> BpfProgram {
        self.0.reverse();
        self.0.shrink_to_fit();
        self.0
    }

    /// Before all that is there: finds the range that the loaded value is in.
    fn halve(&mut self, ranges: &[(u32, Outcome)], miss: Miss) {
        let jump = |over: usize| {
            let over = u32::try_from(over).expect("a program has at most 4,096 instructions");
            instruction(JUMP, over)
        };
        if let [(_, outcome)] = ranges {
            return match (outcome, miss) {
                (Outcome::Allow, _) => self.put(&[instruction(RETURN, libc::SECCOMP_RET_ALLOW)]),
                (Outcome::If(program), _) => self.put(program),
                (Outcome::Miss, Miss::Return(answer)) => self.put(&[instruction(RETURN, answer)]),
                (Outcome::Miss, Miss::Skip(over)) => self.put(&[jump(over)]),
            };
        }
        let (below, above) = ranges.split_at(ranges.len() / 2);
        let bound = instruction(JUMP_NOT_BELOW, above[0].0);
        let end = self.0.len();
        self.halve(above, miss);
        let above_count = self.0.len() - end;
        let miss = match miss {
            Miss::Skip(over) => Miss::Skip(over + above_count),
            answer @ Miss::Return(_) => answer,
        };
        self.halve(below, miss);
        let below_count = self.0.len() - end - above_count;
        match u8::try_from(below_count) {
            Ok(jt) => self.put(&[sock_filter { jt, ..bound }]),
            // A conditional jump does not reach farther.
            Err(_) => self.put(&[sock_filter { jf: 1, ..bound }, jump(below_count)]),
        }
    }
}

fn instruction(code: u16, k: u32) -> sock_filter {
    let (jt, jf) = (0, 0);
    sock_filter { code, jt, jf, k }
}

#[cfg(test)]
mod tests {
    use atoll_thread::Kind;

    use super::super::filters::{LATE, tables};
    use super::*;

    const DENIED: u32 = libc::SECCOMP_RET_TRAP;

    /// What the kernel would do: `seccomp_data` as its 32-bit words. Also how many instructions that took.
    fn run(program: &[sock_filter], words: &[u32; 16]) -> (u32, usize) {
        let (mut at, mut value) = (0, 0);
        for steps in 1.. {
            let sock_filter { code, jt, jf, k } = program[at];
            at += 1;
            let mut jump = |holds: bool| at += usize::from(if holds { jt } else { jf });
            match code {
                LOAD => value = words[k as usize / 4],
                AND => value &= k,
                JUMP => at += k as usize,
                JUMP_EQUAL => jump(value == k),
                JUMP_NOT_BELOW => jump(value >= k),
                RETURN => return (k, steps),
                _ => panic!("instruction {code:#x}"),
            }
        }
        unreachable!("a program has no jumps back");
    }

    fn data(number: u32, arguments: [u32; 6]) -> [u32; 16] {
        let mut words = [0xffff_ffff; 16];
        (words[0], words[1]) = (number, AUDIT_ARCH);
        for (index, argument) in arguments.into_iter().enumerate() {
            words[4 + 2 * index] = argument;
        }
        words
    }

    fn calls(kind: Kind) -> Vec<&'static Call> {
        let late: &[Kind] = if kind == Kind::Starter { LATE } else { &[] };
        let kinds = [kind].into_iter().chain(late.iter().copied());
        kinds.flat_map(tables).copied().flatten().collect()
    }

    /// Straight from the tables.
    fn is_allowed(calls: &[&Call], number: u32, arguments: [u32; 6]) -> bool {
        let same = calls.iter().filter(|call| call.number == i64::from(number));
        same.into_iter().any(|call| match call.when {
            When::Always => true,
            When::Argument {
                index,
                mask,
                one_of,
            } => one_of.contains(&(arguments[usize::from(index)] & mask)),
        })
    }

    #[test]
    fn every_kinds_program_is_its_table() {
        // Of x32, whose numbers have this bit, nothing is allowed.
        const X32: u32 = 1 << 30;
        for kind in Kind::ALL {
            let calls = calls(*kind);
            let program = compile(calls.iter().copied(), DENIED);
            let named: Vec<u32> = calls
                .iter()
                .filter_map(|call| match call.when {
                    When::Argument { one_of, .. } => Some(one_of),
                    When::Always => None,
                })
                .flat_map(|one_of| one_of.iter().copied())
                .collect();
            let near = named.iter().flat_map(|value| {
                let (over, under) = (value.wrapping_add(1), value.wrapping_sub(1));
                [*value, over, under, value ^ 0x8000_0000, value ^ 0x100]
            });
            let arguments: Vec<u32> = near.chain([0, u32::MAX]).collect();
            for number in (0..600).chain((0..600).map(|number| number | X32)) {
                let same = |call: &&&Call| call.number == i64::from(number);
                let always = |call: &Call| matches!(call.when, When::Always);
                let tried = match calls.iter().filter(same).all(|call| always(call)) {
                    true => &[0, u32::MAX][..],
                    false => &arguments,
                };
                for argument in tried {
                    let arguments = [*argument; 6];
                    let expected = match is_allowed(&calls, number, arguments) {
                        true => libc::SECCOMP_RET_ALLOW,
                        false => DENIED,
                    };
                    let (answer, _) = run(&program, &data(number, arguments));
                    assert_eq!(answer, expected, "{kind:?}: {number} {argument:#x}");
                }
            }
        }
    }

    #[test]
    fn each_condition_looks_at_its_own_argument() {
        let only = |index, one_of| Call {
            number: 7,
            when: When::Argument {
                index,
                mask: 0xff,
                one_of,
            },
        };
        let calls = [only(0, &[1, 2, 9]), only(5, &[3])];
        let program = compile(calls.iter(), DENIED);
        for (arguments, allowed) in [
            ([0x101, 0, 0, 0, 0, 0], true),
            ([9, 0, 0, 0, 0, 0], true),
            ([3, 3, 3, 3, 3, 0], false),
            ([0, 0, 0, 0, 0, 3], true),
            ([3, 1, 1, 1, 1, 1], false),
        ] {
            let (answer, _) = run(&program, &data(7, arguments));
            assert_eq!(answer == libc::SECCOMP_RET_ALLOW, allowed, "{arguments:?}");
        }
    }

    #[test]
    fn what_tables_repeat_is_there_once() {
        let only = |one_of| Call {
            number: 7,
            when: When::Argument {
                index: 0,
                mask: 0xff,
                one_of,
            },
        };
        let once = compile([only(&[1, 2, 9])].iter(), DENIED);
        let repeated = [only(&[1, 9]), only(&[2, 9]), only(&[1, 9])];
        assert_eq!(compile(repeated.iter(), DENIED), once);
    }

    #[test]
    fn numbers_of_another_architecture_end_the_process() {
        let program = compile([].iter(), DENIED);
        let mut words = data(0, [0; 6]);
        words[1] = 0x4000_0003; // AUDIT_ARCH_I386
        let (answer, _) = run(&program, &words);
        assert_eq!(answer, libc::SECCOMP_RET_KILL_PROCESS);
    }

    #[test]
    fn long_jumps_and_few_steps() {
        let all: Vec<Call> = (0..1200)
            .map(|number| Call {
                number: 2 * number,
                when: When::Always,
            })
            .collect();
        let program = compile(all.iter(), DENIED);
        for number in 0..2400 {
            let (answer, steps) = run(&program, &data(number, [0; 6]));
            let allowed = answer == libc::SECCOMP_RET_ALLOW;
            assert_eq!(allowed, number % 2 == 0, "{number}");
            assert!(steps < 24, "{number}: {steps} steps");
        }
    }
}
