//! A small table as aligned text.

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
        let columns = self.rows.iter().map(Vec::len).chain([self.columns.len()]).max().unwrap_or(0);
        let cell = |row: &[String], i: usize| row.get(i).cloned().unwrap_or_default();
        let lines = || std::iter::once(&self.columns).chain(&self.rows);
        let widths: Vec<usize> = (0..columns).map(|i| lines().map(|r| width(&cell(r, i))).max().unwrap_or(0)).collect();
        let right: Vec<bool> = (0..columns).map(|i| self.rows.iter().all(|r| numeric(&cell(r, i)))).collect();
        let mut out = String::new();
        if !self.title.is_empty() {
            let _ = writeln!(out, "{}", self.title);
        }
        let mut line = |cells: &[String]| {
            let mut text = String::new();
            for i in 0..columns {
                let (gap, c) = (if i == 0 { "" } else { "  " }, cell(cells, i));
                let fill = " ".repeat(widths[i] - width(&c));
                let _ = if right[i] { write!(text, "{gap}{fill}{c}") } else { write!(text, "{gap}{c}{fill}") };
            }
            let _ = writeln!(out, "{}", text.trim_end());
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

fn width(text: &str) -> usize {
    text.chars().count()
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
}
