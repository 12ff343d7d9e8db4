//! Where something stands in a rendered text: marks that a template carries along, and that are taken out again.
//!
//! They are noncharacters of Unicode, which are not for interchange: no template and no text has any.

use std::ops::Range;

/// Begins the number of a turn …
const TURN: char = '\u{FDD0}';
/// … and ends it.
const TURN_END: char = '\u{FDD1}';
/// Begins what a `{% generation %}` block holds …
const GENERATION: char = '\u{FDD2}';
/// … and ends it.
const GENERATION_END: char = '\u{FDD3}';

/// Is this one of the characters that marks are made of?
pub(super) fn is_mark(c: char) -> bool {
    (TURN..=GENERATION_END).contains(&c)
}

/// Marks the end of a turn's text, in front of the white space there, which a template may trim.
pub(super) fn turn(text: &str, number: usize) -> String {
    let (text, space) = text.split_at(text.trim_end().len());
    format!("{text}{TURN}{number}{TURN_END}{space}")
}

/// Marks the text of a `{% generation %}` block.
pub(super) fn generation(text: &str) -> String {
    format!("{GENERATION}{text}{GENERATION_END}")
}

/// A rendered text without its marks.
#[derive(Debug, Default)]
pub(super) struct Unmarked {
    pub text: String,
    /// Turn and place, in the order of the text.
    pub turns: Vec<(usize, usize)>,
    /// What `{% generation %}` blocks have written; of blocks within each other the outer one.
    pub generated: Vec<Range<usize>>,
}

impl Unmarked {
    /// Takes the marks out.
    pub fn new(marked: &str) -> Self {
        let mut out = Self { text: String::with_capacity(marked.len()), ..Self::default() };
        let (mut rest, mut open) = (marked, Vec::new());
        while let Some(at) = rest.find(is_mark) {
            out.text.push_str(&rest[..at]);
            let here = out.text.len();
            let mut behind = rest[at..].chars();
            let mark = behind.next();
            rest = behind.as_str();
            match mark {
                Some(TURN) => {
                    let digits = rest.find(|c: char| !c.is_ascii_digit()).unwrap_or(rest.len());
                    if let Ok(turn) = rest[..digits].parse() {
                        out.turns.push((turn, here));
                    }
                    rest = &rest[digits..];
                }
                Some(GENERATION) => open.push(here),
                Some(GENERATION_END) => {
                    let start = open.pop().filter(|&start| open.is_empty() && start < here);
                    out.generated.extend(start.map(|start| start..here));
                }
                _ => {}
            }
        }
        out.text.push_str(rest);
        out
    }

    /// Where the text of each of `n` turns ends, if it is there; `None` if one is there twice, or they come in another order.
    pub fn ends(&self, n: usize) -> Option<Vec<Option<usize>>> {
        let mut ends = vec![None; n];
        let in_order = self.turns.windows(2).all(|pair| pair[0].0 < pair[1].0);
        for (turn, at) in &self.turns {
            *ends.get_mut(*turn)? = Some(*at);
        }
        in_order.then_some(ends)
    }
}
