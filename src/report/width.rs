//! How wide a line may be, and how it is kept so.

use console::Term;

/// Columns of a terminal that does not say how many it has.
pub const USUAL: usize = 80;

/// Columns of the terminal behind stderr; none if it is no terminal.
pub fn of_stderr() -> Option<usize> {
    columns(&Term::stderr())
}

/// Columns of the terminal behind stdout; none if it is no terminal.
pub fn of_stdout() -> Option<usize> {
    columns(&Term::stdout())
}

fn columns(term: &Term) -> Option<usize> {
    // A terminal that says 0 does not know.
    let told = |(_, columns): (u16, u16)| if columns == 0 { USUAL } else { columns.max(20).into() };
    term.is_term().then(|| term.size_checked().map_or(USUAL, told))
}

/// Columns that `COLUMNS` asks for, where there is no terminal.
pub fn of_environment() -> Option<usize> {
    std::env::var("COLUMNS").ok()?.parse().ok().filter(|n| *n >= 20)
}

/// Columns of a text.
pub fn width(text: &str) -> usize {
    text.chars().count()
}

/// As many of `parts` as go into `columns`, two spaces between them; those of the highest rank are left out first.
pub fn fit(parts: &[(u8, String)], columns: usize) -> String {
    let mut kept: Vec<&(u8, String)> = parts.iter().collect();
    loop {
        let text = kept.iter().map(|(_, text)| text.as_str()).collect::<Vec<_>>().join("  ");
        let least = kept.iter().enumerate().max_by_key(|(_, (rank, _))| *rank).map(|(i, _)| i);
        match least {
            Some(i) if width(&text) > columns && kept.len() > 1 => kept.remove(i),
            _ => return text,
        };
    }
}

/// Breaks lines that are wider than `columns` at spaces; what begins with a space (a command to copy) or holds a table's
/// lines stays as it is, as does a word without spaces.
pub fn wrap(text: &str, columns: usize) -> String {
    let lines = text.split('\n').map(|line| match width(line) > columns && !line.starts_with(' ') {
        true => fold(line, columns).join("\n"),
        false => line.to_string(),
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// The lines of a command's help within `columns`: what is broken goes on below where its text began.
pub fn wrap_help(text: &str, columns: usize) -> String {
    let lines = text.split('\n').map(|line| {
        if width(line) <= columns {
            return line.to_string();
        }
        let first = line.len() - line.trim_start().len();
        // `  --flag VALUE   what it says`
        let column = line[first..].rfind("  ").map_or(first, |at| first + at + 2);
        let column = if width(&line[..column]) > columns / 2 { first } else { column };
        let (head, rest) = line.split_at(column);
        let pad = " ".repeat(width(head));
        let folded = fold(rest, columns.saturating_sub(width(head)).max(20));
        head.to_string() + &folded.join(&format!("\n{pad}"))
    });
    lines.collect::<Vec<_>>().join("\n")
}

/// One line as several, each of at most `columns` unless a single word is longer.
pub fn fold(line: &str, columns: usize) -> Vec<String> {
    let mut lines = vec![String::new()];
    for word in line.split(' ') {
        let (n, last) = (lines.len() - 1, &lines[lines.len() - 1]);
        if last.is_empty() && n == 0 && word.is_empty() {
            continue;
        }
        match last.is_empty() {
            true => lines[n] = word.to_string(),
            false if width(last) + 1 + width(word) <= columns => lines[n] = format!("{last} {word}"),
            false => lines.push(word.to_string()),
        }
    }
    lines
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fit_is_left_out() {
        let parts = [(0, "loss 1".to_string()), (2, "a long part".to_string()), (1, "x 2".to_string())];
        assert_eq!(fit(&parts, 80), "loss 1  a long part  x 2");
        assert_eq!(fit(&parts, 12), "loss 1  x 2");
        assert_eq!(fit(&parts, 3), "loss 1");
    }

    #[test]
    fn help_goes_on_below_its_text() {
        assert_eq!(
            wrap_help(
                "Usage: x\n  train   Train the stages of a recipe in order\n      a long text of an argument",
                30
            ),
            "Usage: x\n  train   Train the stages of\n          a recipe in order\n      a long text of an\n      argument"
        );
    }

    #[test]
    fn lines_are_broken_at_spaces() {
        let text = "error: one two three four\n\nhint: five\n    adfreeze generate --run runs/x\na/very/long/path/of/a/file is here\n";
        assert_eq!(
            wrap(text, 14),
            "error: one two\nthree four\n\nhint: five\n    adfreeze generate --run runs/x\na/very/long/path/of/a/file\nis here\n"
        );
    }
}
