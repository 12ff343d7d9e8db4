//! A small table as aligned text.

use super::width::{fold, width};
use serde::{Deserialize, Serialize};
use std::fmt::Write;

/// A title, column heads, and rows of cells. A row may be shorter than the heads.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Table {
    /// Stands above the table; none if empty.
    pub title: String,
    /// Column heads.
    pub columns: Vec<String>,
    /// Cells, row by row.
    pub rows: Vec<Vec<String>>,
}

impl Table {
    /// A table without rows.
    pub fn new<C: Into<String>>(title: impl Into<String>, columns: impl IntoIterator<Item = C>) -> Self {
        Self { title: title.into(), columns: columns.into_iter().map(Into::into).collect(), rows: Vec::new() }
    }

    /// Adds a row.
    pub fn row<C: Into<String>>(&mut self, cells: impl IntoIterator<Item = C>) {
        self.rows.push(cells.into_iter().map(Into::into).collect());
    }

    /// Title, heads (unless all are empty), a rule, and the rows; two spaces between columns; ends in a newline.
    ///
    /// A column whose cells all read as numbers (`12`, `0.5`, `84 %`, `1,024`, `3.1 MB`, `-`) is aligned to the right.
    pub fn render(&self) -> String {
        self.render_within(None)
    }

    /// The same for stdout, within the terminal if it is one (or `COLUMNS`).
    pub fn for_stdout(&self) -> String {
        self.render_within(super::width::of_stdout().or_else(super::width::of_environment))
    }

    /// The same, at most so many columns wide: the widest columns of words are broken into lines at spaces, as far as they can be;
    /// what then is still too wide is told in parts below each other, each with the first column in front.
    pub fn render_within(&self, columns: Option<usize>) -> String {
        let n = self.rows.iter().map(Vec::len).chain([self.columns.len()]).max().unwrap_or(0);
        let cell = |row: &[String], i: usize| row.get(i).cloned().unwrap_or_default();
        let lines = || std::iter::once(&self.columns).chain(&self.rows);
        let mut widths: Vec<usize> = (0..n).map(|i| lines().map(|r| width(&cell(r, i))).max().unwrap_or(0)).collect();
        let right: Vec<bool> = (0..n).map(|i| self.rows.iter().all(|r| numeric(&cell(r, i)))).collect();
        // No column can be narrower than its longest word, and a number is one with its unit.
        let words = |text: &str| text.split(' ').map(width).max().unwrap_or(0);
        let least = |i: usize| {
            let word = |r: &Vec<String>| if right[i] { width(&cell(r, i)) } else { words(&cell(r, i)) };
            lines().map(word).max().unwrap_or(0)
        };
        let least: Vec<usize> = (0..n).map(least).collect();
        let room = columns.unwrap_or(usize::MAX).saturating_sub(2 * n.saturating_sub(1));
        while widths.iter().sum::<usize>() > room {
            let widest = (0..n).filter(|i| widths[*i] > least[*i]).max_by_key(|i| widths[*i]);
            let Some(i) = widest else { break };
            widths[i] -= 1;
        }
        let fits = |k: usize| least[..k].iter().sum::<usize>() + 2 * (k - 1) <= columns.unwrap_or(usize::MAX);
        let whole = (1..=n).rev().find(|k| fits(*k)).unwrap_or(n);
        if whole < n && whole > 1 {
            let part = |title: &str, kept: &dyn Fn(usize) -> bool| {
                let of = |r: &Vec<String>| (0..n).filter(|i| kept(*i)).map(|i| cell(r, i)).collect();
                let rows = self.rows.iter().map(of).collect();
                Self { title: title.into(), columns: of(&self.columns), rows }.render_within(columns)
            };
            return part(&self.title, &|i| i < whole) + "\n" + &part("", &|i| i == 0 || i >= whole);
        }
        let mut out = String::new();
        if !self.title.is_empty() {
            let _ = writeln!(out, "{}", self.title);
        }
        let mut line = |cells: &[String]| {
            let folded: Vec<Vec<String>> = (0..n)
                .map(|i| match cell(cells, i) {
                    c if width(&c) > widths[i] => fold(&c, widths[i]),
                    c => vec![c],
                })
                .collect();
            for k in 0..folded.iter().map(Vec::len).max().unwrap_or(1) {
                let mut text = String::new();
                for (i, lines) in folded.iter().enumerate() {
                    let (gap, c) = (if i == 0 { "" } else { "  " }, lines.get(k).map_or("", String::as_str));
                    let fill = " ".repeat(widths[i].saturating_sub(width(c)));
                    let _ = if right[i] { write!(text, "{gap}{fill}{c}") } else { write!(text, "{gap}{c}{fill}") };
                }
                let _ = writeln!(out, "{}", text.trim_end());
            }
        };
        if self.columns.iter().any(|c| !c.is_empty()) {
            line(&self.columns);
        }
        line(&widths.iter().map(|w| "─".repeat(*w)).collect::<Vec<_>>());
        for row in &self.rows {
            line(row);
        }
        out
    }
}

/// Empty, a dash, or a number with an optional unit behind it.
fn numeric(cell: &str) -> bool {
    let number = cell.split(' ').next().unwrap_or_default().trim_end_matches('%');
    let number = number.replace(',', "").replace('−', "-");
    matches!(number.as_str(), "" | "-" | "–" | "—") || number.parse::<f64>().is_ok()
}

#[cfg(test)]
mod tests {
    use super::Table;

    #[test]
    fn aligns_words_left_and_numbers_right() {
        let mut table = Table::new("frozen and trained", ["pattern", "parameters", "share"]);
        table.row(["projector.*", "27,936", "2.9 %"]);
        table.row(["vision.*", "490,000", "52.1 %"]);
        table.row(["größer", "–"]);
        assert_eq!(
            table.render(),
            "frozen and trained\n\
             pattern      parameters   share\n\
             ───────────  ──────────  ──────\n\
             projector.*      27,936   2.9 %\n\
             vision.*        490,000  52.1 %\n\
             größer                –\n"
        );
    }

    #[test]
    fn an_empty_table_and_a_longer_row_are_fine() {
        assert_eq!(Table::default().render(), "\n");
        let mut table = Table::new("", ["a"]);
        table.row(["x", "y"]);
        assert_eq!(table.render(), "a\n─  ─\nx  y\n");
    }
    #[test]
    fn a_wide_table_is_broken_at_spaces() {
        let mut table = Table::new("", ["group", "what it is", "n"]);
        table.row(["projector.*", "a few words that are rather long", "27,936"]);
        table.row(["x", "short", "1"]);
        assert_eq!(
            table.render_within(Some(38)),
            "group        what it is              n\n\
             ───────────  ─────────────────  ──────\n\
             projector.*  a few words that   27,936\n\
             \x20            are rather long\n\
             x            short                   1\n"
        );
        assert_eq!(table.render_within(Some(80)), table.render());
    }

    #[test]
    fn a_table_of_too_many_columns_is_told_in_parts() {
        let mut table = Table::new("t", ["part", "bytes", "share", "more"]);
        table.row(["projector", "1.5 MB", "12.5 %", "330 kB"]);
        assert_eq!(
            table.render_within(Some(26)),
            "t\npart        bytes   share\n─────────  ──────  ──────\nprojector  1.5 MB  12.5 %\n\n\
             part         more\n─────────  ──────\nprojector  330 kB\n"
        );
    }
}
