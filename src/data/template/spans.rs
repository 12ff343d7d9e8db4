//! Which parts of a rendered conversation are answers, where the template does not say so itself.
//!
//! An answer's span begins where the generation prompt ends and goes through the end token. The conversation is rendered once
//! more with a mark behind each turn's text: so a template may write earlier turns otherwise than later ones (Qwen3, Phi-3), or an
//! answer otherwise than the generation prompt announces it (DeepSeek-R1's distilled models), and it takes linear time.

use super::marks::Unmarked;
use crate::data::source::{Role, Turn};
use serde_json::Value;
use std::ops::Range;

/// A conversation whose turns' ends are known.
pub(super) struct Spans<'a> {
    pub turns: &'a [Turn],
    pub text: &'a str,
    /// Where the text of each turn ends, without its trailing white space; some templates leave out a system's.
    pub ends: &'a [Option<usize>],
    /// The texts of all special tokens.
    pub special: &'a [String],
    /// The end token's text.
    pub eos: &'a str,
}

impl Spans<'_> {
    /// `prompt`: the turns in front of the first answer, with the generation prompt; `through`: the turns through the last
    /// answer. `None` if the marks of questions and answers are not there.
    pub fn find(&self, prompt: &Unmarked, through: &Unmarked) -> Option<Vec<Range<usize>>> {
        let answers = || (1..self.turns.len()).filter(|&i| self.turns[i].role == Role::Assistant);
        let (first, last) = (answers().next()?, answers().next_back()?);
        let opening = after(&prompt.text, (*prompt.ends(first)?.last()?)?, &self.turns[first - 1]);
        let closing = after(&through.text, (*through.ends(last + 1)?.last()?)?, &self.turns[last]);
        answers().map(|i| Some(self.start(i, &opening)?..self.end(i, &closing)?)).collect()
    }

    /// Where the generation prompt ends in front of answer `i`, or where the answer parts from it.
    fn start(&self, i: usize, opening: &[&str]) -> Option<usize> {
        let (question, end) = (self.ends[i - 1]?, self.ends[i]?);
        let behind = after(self.text, question, &self.turns[i - 1]);
        let (mut whole, mut parted) = (None, 0);
        for here in &behind {
            let at = self.text.len() - here.len();
            for opening in opening {
                let n = common(opening, here);
                whole = whole.or((n == opening.len()).then_some(at + n));
                parted = parted.max(if n == 0 { 0 } else { at + n });
            }
        }
        // The answer's own first letters may be those of the prompt.
        let (answer, region) = (self.turns[i].text.as_str(), &self.text[question..end]);
        let its_own = [answer.trim_end(), answer.trim()].into_iter().find(|a| region.ends_with(a)).map(str::len);
        let parted = match (parted, its_own) {
            (0, _) => end - its_own.unwrap_or_else(|| common_end(answer.trim_end(), region)),
            (parted, own) => parted.min(end - own.unwrap_or(0)),
        };
        Some(whole.filter(|start| *start <= end).unwrap_or(parted))
    }

    /// Where answer `i` ends: behind the first special token of what the template adds to it.
    fn end(&self, i: usize, closing: &[&str]) -> Option<usize> {
        let next = self.ends[i + 1..].iter().flatten().next().copied().unwrap_or(self.text.len());
        let behind = after(self.text, self.ends[i]?, &self.turns[i]);
        let here = behind[0];
        let at = self.text.len() - here.len();
        let added = closing.iter().map(|c| common(c, here)).max().unwrap_or(0);
        let window = &here[..next.saturating_sub(at).min(here.len())];
        // The token that ends the last answer ends this one as well, if it is there.
        let usual = closing.iter().find_map(|c| self.token(c).map(|(begin, len)| &c[begin..begin + len]));
        let usual = usual.and_then(|t| Some((window.find(t)?, t.len())));
        let its_own = |&(begin, len): &(usize, usize)| begin < added || begin == 0 && window[..len] == *self.eos;
        let token = usual.or_else(|| self.token(window).filter(its_own));
        Some(at + token.map_or(added, |(begin, len)| begin + len))
    }

    /// The first special token: place and length. Of those that begin together the longest.
    fn token(&self, text: &str) -> Option<(usize, usize)> {
        let tokens = self.special.iter().filter_map(|s| Some((text.find(s.as_str())?, s.len())));
        tokens.min_by_key(|&(at, len)| (at, std::cmp::Reverse(len)))
    }
}

/// What stands behind a turn's text: behind its trailing white space if that is there (as it is, or as `tojson` writes it), and as
/// it is.
fn after<'a>(text: &'a str, at: usize, turn: &Turn) -> Vec<&'a str> {
    let own = &turn.text[turn.text.trim_end().len()..];
    let escaped = Value::from(own).to_string();
    let behind = &text[at..];
    let without = [own, escaped.trim_matches('"')].into_iter().find_map(|own| behind.strip_prefix(own));
    without.filter(|_| !own.is_empty()).into_iter().chain([behind]).collect()
}

/// Bytes that two texts begin with in common, whole characters.
fn common(a: &str, b: &str) -> usize {
    a.chars().zip(b.chars()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}

/// Bytes that two texts end with in common, whole characters.
fn common_end(a: &str, b: &str) -> usize {
    a.chars().rev().zip(b.chars().rev()).take_while(|(a, b)| a == b).map(|(a, _)| a.len_utf8()).sum()
}
