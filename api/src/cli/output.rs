// Copyright the Atoll authors. SPDX-License-Identifier: Apache-2.0
//! Answers for people and for programs: a table, or JSON. Pure text; `cli` prints it.

use clap::ValueEnum;
use serde_json::{Map, Value};

/// How an answer is shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Output {
    /// Aligned columns.
    #[default]
    Table,
    /// The value as it came.
    Json,
}

/// Columns that come first, in this order; the others follow by name.
const FIRST: &[&str] = &[
    "id", "vmid", "upid", "node", "storage", "volid", "userid", "type", "name", "status", "key",
    "value", "n", "t",
];

/// Columns that are left out of tables: they repeat others or say nothing to people.
const HIDDEN: &[&str] = &["digest", "pstart", "ssl_fingerprint"];

/// Longest cell of a table, in characters.
const CELL_MAX: usize = 60;

/// The text of `value`, with a line end.
pub fn render(value: &Value, output: Output) -> String {
    let text = match (output, value) {
        (Output::Json, value) => {
            serde_json::to_string_pretty(value).expect("a JSON value always serialises to memory")
        }
        (Output::Table, Value::Null) => return String::new(),
        (Output::Table, Value::Array(rows)) if rows.iter().all(Value::is_object) => table(rows),
        (Output::Table, Value::Array(items)) => {
            items.iter().map(cell).collect::<Vec<_>>().join("\n")
        }
        (Output::Table, Value::Object(object)) => members(object),
        (Output::Table, scalar) => cell(scalar),
    };
    match text.is_empty() {
        true => text,
        false => text + "\n",
    }
}

fn table(rows: &[Value]) -> String {
    let mut names: Vec<&str> = Vec::new();
    let objects = || rows.iter().filter_map(Value::as_object);
    for name in objects().flat_map(Map::keys) {
        if !names.contains(&name.as_str()) && !HIDDEN.contains(&name.as_str()) {
            names.push(name);
        }
    }
    let rank = |name: &str| FIRST.iter().position(|first| *first == name);
    names.sort_by_key(|name| (rank(name).unwrap_or(FIRST.len()), *name));
    let short = |text: String| match text.chars().count() > CELL_MAX {
        true => text.chars().take(CELL_MAX - 1).chain(['…']).collect(),
        false => text,
    };
    let mut lines = vec![
        names
            .iter()
            .map(|name| name.to_uppercase())
            .collect::<Vec<_>>(),
    ];
    lines.extend(objects().map(|object| {
        let cells = names.iter().map(|name| object.get(*name).map(cell));
        cells.map(|cell| short(cell.unwrap_or_default())).collect()
    }));
    if lines.len() == 1 {
        return String::new();
    }
    columns(&lines)
}

fn members(object: &Map<String, Value>) -> String {
    let pair = |(name, value): (&String, &Value)| vec![name.clone(), cell(value)];
    columns(&object.iter().map(pair).collect::<Vec<_>>())
}

fn columns(lines: &[Vec<String>]) -> String {
    let count = lines.first().map_or(0, Vec::len);
    let width = |index: usize| lines.iter().map(|line| line[index].chars().count()).max();
    let widths: Vec<usize> = (0..count).map(|index| width(index).unwrap_or(0)).collect();
    let line = |cells: &Vec<String>| {
        let padded = cells
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:width$}"));
        padded.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    lines.iter().map(line).collect::<Vec<_>>().join("\n")
}

fn cell(value: &Value) -> String {
    match value {
        Value::Null => String::new(),
        // A text from a guest must not steer the terminal.
        Value::String(text) => text
            .chars()
            .map(|c| if c.is_control() { ' ' } else { c })
            .collect(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn check(value: &Value, expected: Expect) {
        expected.assert_eq(&render(value, Output::Table));
    }

    #[test]
    fn tables_align_and_begin_with_what_names_the_row() {
        let rows = json!([{"status": "running", "vmid": 100, "x": null}, {"vmid": 101, "status": "stopped", "a": "b\u{1b}[2J"}]);
        check(
            &rows,
            expect![[r#"
            VMID  STATUS   A      X
            100   running
            101   stopped  b [2J
        "#]],
        );
    }

    #[test]
    fn other_values() {
        check(
            &json!({"b": 1, "a": "x"}),
            expect![[r#"
            a  x
            b  1
        "#]],
        );
        check(
            &json!("UPID:x"),
            expect![[r#"
            UPID:x
        "#]],
        );
        check(&json!(null), expect![""]);
        check(&json!([]), expect![""]);
    }
}
