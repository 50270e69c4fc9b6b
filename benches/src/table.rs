// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Rows of the table, how contestants take turns, and the arithmetic: medians, and ratios pair by pair with their
//! spread.

use std::fmt::Write as _;
use std::io::Write as _;
use std::path::Path;

use anyhow::Context as _;

use crate::host;

const HEADER: &str =
    "name\tunit\tours\tpeer\tpeer_value\tratio\tratio_min\tratio_max\taim\thost\tnote";
const CELLS: usize = 9;

/// What one row is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Figure {
    /// First column.
    pub name: String,
    /// Of the values.
    pub unit: &'static str,
    /// What the ratio ours/peer shall be.
    pub aim: Aim,
}

/// What a ratio ours/peer shall be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Aim {
    /// Of times and sizes.
    AtMost(&'static str),
    /// Of rates.
    AtLeast(&'static str),
}

/// One that takes part: ours, or a peer.
pub struct Contestant<'a> {
    /// In the table.
    pub name: &'static str,
    /// Takes part in so many turns only.
    pub turns_max: usize,
    /// One measurement.
    pub take: Box<dyn FnMut() -> anyhow::Result<f64> + 'a>,
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    cells: [String; CELLS],
    /// The kind of host that it was measured on.
    host: String,
    note: String,
}

/// Measurements of one peer, beside ours of the same turns.
struct Entry<'a> {
    peer: Contestant<'a>,
    pairs: Vec<(f64, f64)>,
    failures: Vec<anyhow::Error>,
}

/// A contestant that failed so often leaves.
const FAILURES_MAX: usize = 2;

/// Lets all measure in turns, `turns` times after one that is not counted: it reads programs from disk. A turn that
/// fails is left out, and told in the row.
pub fn compare(
    figure: &Figure,
    turns: usize,
    mut ours: Contestant<'_>,
    peers: Vec<Contestant<'_>>,
) -> Vec<Row> {
    let entry = |peer| Entry {
        peer,
        pairs: Vec::new(),
        failures: Vec::new(),
    };
    let mut entries: Vec<Entry<'_>> = peers.into_iter().map(entry).collect();
    let mut our_failures = Vec::new();
    for turn in 0..=turns {
        let our_value = match (ours.take)() {
            Ok(value) => value,
            Err(error) => {
                our_failures.push(error.context("ours"));
                if our_failures.len() >= FAILURES_MAX {
                    break;
                }
                continue;
            }
        };
        for entry in &mut entries {
            if entry.failures.len() >= FAILURES_MAX || turn > entry.peer.turns_max {
                continue;
            }
            match (entry.peer.take)() {
                Ok(_) if turn == 0 => {}
                Ok(value) => entry.pairs.push((our_value, value)),
                Err(error) => entry.failures.push(error),
            }
        }
    }
    let row = |entry: &Entry<'_>| {
        let failures: Vec<_> = our_failures.iter().chain(&entry.failures).collect();
        match (entry.pairs.is_empty(), failures.last()) {
            (true, Some(error)) => Row::absent(figure, entry.peer.name, error),
            (_, last) => {
                let mut row = Row::pairs(figure, entry.peer.name, &entry.pairs);
                if let Some(error) = last {
                    let text = format!(", {} turns failed: {error:#}", failures.len());
                    row.note.push_str(&text.replace(['\n', '\t'], " "));
                }
                row
            }
        }
    };
    let rows: Vec<Row> = entries.iter().map(row).collect();
    for row in &rows {
        // For who waits; the table comes at the end.
        let _ = writeln!(std::io::stderr(), "{}", row.line().replace('\t', "  "));
    }
    rows
}

impl Figure {
    /// A time or a size that shall be at most the peer's.
    pub fn cost(name: &str, unit: &'static str) -> Figure {
        Figure {
            name: name.into(),
            unit,
            aim: Aim::AtMost("1.00"),
        }
    }
}

impl Aim {
    fn text(self) -> String {
        match self {
            Aim::AtMost(bound) => format!("<= {bound}"),
            Aim::AtLeast(bound) => format!(">= {bound}"),
        }
    }
}

impl Row {
    /// A row of pairs (ours, peer's): medians of both, median, minimum and maximum of the ratios ours/peer.
    pub fn pairs(figure: &Figure, peer: &str, pairs: &[(f64, f64)]) -> Row {
        let ratios: Vec<f64> = pairs.iter().map(|(ours, peer)| ours / peer).collect();
        let number = |value: f64| format!("{value:.2}");
        let ours = median(&pairs.iter().map(|pair| pair.0).collect::<Vec<_>>());
        let theirs = median(&pairs.iter().map(|pair| pair.1).collect::<Vec<_>>());
        Row {
            cells: [
                figure.name.clone(),
                figure.unit.into(),
                number(ours),
                peer.into(),
                number(theirs),
                number(median(&ratios)),
                number(ratios.iter().copied().fold(f64::INFINITY, f64::min)),
                number(ratios.iter().copied().fold(0.0, f64::max)),
                figure.aim.text(),
            ],
            host: host::kind().into(),
            note: format!("{} pairs", pairs.len()),
        }
    }

    /// A row without a peer.
    pub fn alone(name: &str, unit: &str, ours: f64, note: String) -> Row {
        let mut cells: [String; CELLS] = std::array::from_fn(|_| "-".to_owned());
        cells[..3].clone_from_slice(&[name.into(), unit.into(), format!("{ours:.2}")]);
        let host = host::kind().into();
        Row { cells, host, note }
    }

    /// A row that could not run.
    pub fn absent(figure: &Figure, peer: &str, why: &anyhow::Error) -> Row {
        let mut cells: [String; CELLS] = std::array::from_fn(|_| "-".to_owned());
        cells[0].clone_from(&figure.name);
        cells[1] = figure.unit.into();
        cells[3] = peer.into();
        cells[8] = figure.aim.text();
        Row {
            cells,
            host: host::kind().into(),
            note: format!("not run: {why:#}").replace(['\n', '\t'], " "),
        }
    }

    /// Adds to what it says at its end.
    pub fn add_note(&mut self, text: &str) {
        self.note.push_str(", ");
        self.note.push_str(text);
    }

    fn line(&self) -> String {
        format!("{}\t{}\t{}", self.cells.join("\t"), self.host, self.note)
    }

    /// A row from its line: how a suite in a process of its own hands its rows over.
    pub fn parse(line: &str) -> Option<Row> {
        let mut fields = line.split('\t').map(str::to_owned);
        let cells: Vec<String> = fields.by_ref().take(CELLS).collect();
        Some(Row {
            cells: cells.try_into().ok()?,
            host: fields.next()?,
            note: fields.next()?,
        })
    }
}

/// The middle value; of an even number the mean of the middle two.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

/// The value that a share of all values does not exceed (nearest rank).
pub fn quantile(values: &[f64], permille: usize) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let rank = (sorted.len() * permille).div_ceil(1000).max(1);
    sorted.get(rank - 1).copied().unwrap_or(f64::NAN)
}

/// Prints rows for the process that started this one.
pub fn send(rows: &[Row]) -> anyhow::Result<()> {
    let mut out = std::io::stdout().lock();
    for row in rows {
        writeln!(out, "{}", row.line())?;
    }
    Ok(())
}

/// Writes the table to its file, and aligned to standard output.
pub fn write(path: &Path, rows: &[Row]) -> anyhow::Result<()> {
    let mut text = format!("{HEADER}\n");
    for row in rows {
        writeln!(text, "{}", row.line())?;
    }
    std::fs::write(path, &text).with_context(|| format!("write {}", path.display()))?;
    let lines: Vec<Vec<&str>> = text
        .lines()
        .map(|line| line.split('\t').collect())
        .collect();
    let width = |column: usize| {
        lines
            .iter()
            .filter_map(|line| line.get(column))
            .map(|cell| cell.len())
            .max()
    };
    let widths: Vec<usize> = (0..).map_while(width).collect();
    let mut out = std::io::stdout().lock();
    for line in &lines {
        let cells: Vec<String> = line
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        writeln!(out, "{}", cells.join("  ").trim_end())?;
    }
    writeln!(out, "\n{}", path.display())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_are_taken_pair_by_pair() {
        let row = Row::pairs(
            &Figure::cost("n", "ms"),
            "peer",
            &[(1.0, 2.0), (2.0, 2.0), (9.0, 3.0)],
        );
        assert_eq!(
            row.line(),
            format!(
                "n\tms\t2.00\tpeer\t2.00\t1.00\t0.50\t3.00\t<= 1.00\t{}\t3 pairs",
                host::kind()
            )
        );
    }

    #[test]
    fn a_turn_that_fails_is_left_out_and_told() {
        let contestant = |name, mut values: Vec<anyhow::Result<f64>>| Contestant {
            name,
            turns_max: usize::MAX,
            take: Box::new(move || values.remove(0)),
        };
        let failed = || Err(anyhow::anyhow!("no"));
        let rows = compare(
            &Figure::cost("n", "ms"),
            2,
            contestant("ours", vec![Ok(9.0), Ok(1.0), Ok(2.0)]),
            vec![
                contestant("a", vec![Ok(9.0), failed(), Ok(4.0)]),
                contestant("b", vec![failed(), failed()]),
            ],
        );
        let lines: Vec<_> = rows.iter().map(Row::line).collect();
        let host = host::kind();
        assert_eq!(
            lines,
            [
                format!(
                    "n\tms\t2.00\ta\t4.00\t0.50\t0.50\t0.50\t<= 1.00\t{host}\t1 pairs, 1 turns failed: no"
                ),
                format!("n\tms\t-\tb\t-\t-\t-\t-\t<= 1.00\t{host}\tnot run: no")
            ]
        );
    }

    #[test]
    fn a_row_survives_being_sent() {
        let row = Row::pairs(&Figure::cost("n", "ms"), "peer", &[(1.0, 2.0)]);
        assert_eq!(Row::parse(&row.line()), Some(row));
    }

    #[test]
    fn quantiles_are_nearest_ranks() {
        let values: Vec<f64> = (1..=100).map(f64::from).collect();
        assert_eq!(
            (quantile(&values, 500), quantile(&values, 990)),
            (50.0, 99.0)
        );
    }
}
