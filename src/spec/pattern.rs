//! Ordered patterns over names (parameters, linear layers): the freeze policy, adapter targets, parameter groups.
//!
//! A list of `"pattern"` or `"!pattern"`; the first one that matches a name decides, and a name that none matches is
//! not selected. In a pattern, `*` stands for any run of characters, dots included, `?` for one character, `{a,b}` for
//! either text, and a number in brackets selects by index: `layers[3]`, `layers[0..4]`, `layers[-2..]`. Negative
//! indices count from the end of that very list of layers among the known names; ranges are half-open and, as in
//! Python, may reach past the end.

use crate::bail;
use crate::error::Result;
use std::collections::{BTreeMap, BTreeSet};

/// Texts that one pattern may expand to through `{a,b}`.
const MAX_ALTERNATIVES: usize = 1000;
/// Characters of one pattern, and braces in it: far more than any list of names needs.
const MAX_LENGTH: usize = 10_000;
const MAX_BRACES: usize = 100;

/// A compiled list of patterns; see the module's text.
#[derive(Debug, Clone)]
pub struct Patterns {
    rules: Vec<Rule>,
    counts: Counts,
}

#[derive(Debug, Clone)]
struct Rule {
    text: String,
    selects: bool,
    /// The pattern without braces: one list of tokens for each alternative.
    alternatives: Vec<Vec<Token>>,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Token {
    Char(char),
    One,
    Run,
    /// `.N` with N in start..end; negative counts from the end, `None` is open.
    Index(i64, Option<i64>),
}

/// `a.layers` → 1 + the largest N of all names that start with `a.layers.N`.
type Counts = BTreeMap<String, i64>;

impl Patterns {
    /// Compiles `patterns` against the names that exist. Errors: bad syntax; a pattern that matches no known name (the
    /// hint has the nearest ones); a pattern whose names are all decided by earlier ones.
    pub fn new(patterns: &[String], known: &[String]) -> Result<Self> {
        let rules = patterns.iter().map(|p| parse(p)).collect::<Result<_>>()?;
        let this = Self { rules, counts: count(known) };
        this.check(known)?;
        Ok(this)
    }

    /// True if the first pattern that matches `name` selects it.
    pub fn matches(&self, name: &str) -> bool {
        self.first(name).is_some_and(|i| self.rules[i].selects)
    }

    /// Position of the pattern that decides about `name`, if any does.
    pub fn first(&self, name: &str) -> Option<usize> {
        self.rules.iter().position(|r| r.matches(name, &self.counts))
    }

    fn check(&self, known: &[String]) -> Result<()> {
        let decided: BTreeSet<usize> = known.iter().filter_map(|n| self.first(n)).collect();
        let Some(idle) = (0..self.rules.len()).find(|i| !decided.contains(i)) else { return Ok(()) };
        let rule = &self.rules[idle];
        if known.iter().any(|n| rule.matches(n, &self.counts)) {
            bail!(
                "pattern `{}` decides nothing: earlier patterns match all of its names", rule.text;
                "the first match wins; put the narrower pattern first, or drop this one"
            );
        }
        bail!("pattern `{}` matches nothing", rule.text; "{}", nearest(&rule.text, known, &self.counts))
    }
}

impl Rule {
    fn matches(&self, name: &str, counts: &Counts) -> bool {
        self.alternatives.iter().any(|tokens| fits(tokens, name, counts))
    }
}

/// Whether `tokens` describe all of `name`. Time is bounded by the product of their lengths: what is kept is not one way through the
/// name but all places that the tokens so far can reach.
fn fits(tokens: &[Token], name: &str, counts: &Counts) -> bool {
    let mut places = vec![0];
    for token in tokens {
        places = match (token, places.first()) {
            (_, None) => return false,
            (Token::Run, Some(&first)) => (first..=name.len()).filter(|at| name.is_char_boundary(*at)).collect(),
            _ => places.iter().filter_map(|at| Some(at + one(token, name, *at, counts)?)).collect(),
        };
    }
    places.contains(&name.len())
}

/// The length of what a token that is no [`Token::Run`] describes at `at`.
fn one(token: &Token, name: &str, at: usize, counts: &Counts) -> Option<usize> {
    let rest = &name[at..];
    match token {
        Token::Run => None,
        Token::One => rest.chars().next().map(char::len_utf8),
        Token::Char(c) => rest.starts_with(*c).then(|| c.len_utf8()),
        Token::Index(start, end) => {
            let (index, len) = leading_index(rest)?;
            let n = counts.get(&name[..at])?;
            let from_end = |i: i64| if i < 0 { i.saturating_add(*n) } else { i };
            (index >= from_end(*start) && end.is_none_or(|e| index < from_end(e))).then_some(len)
        }
    }
}

/// `.12.rest` → (12, 3): the number and the length of `.12`.
fn leading_index(rest: &str) -> Option<(i64, usize)> {
    let digits = rest.strip_prefix('.')?;
    let len = digits.find('.').unwrap_or(digits.len());
    let digits = &digits[..len];
    if !digits.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some((digits.parse().ok()?, len + 1))
}

fn count(known: &[String]) -> Counts {
    let mut counts = Counts::new();
    for name in known {
        for (at, _) in name.match_indices('.') {
            if let Some((index, _)) = leading_index(&name[at..]) {
                let n = counts.entry(name[..at].to_string()).or_insert(0);
                *n = (*n).max(index.saturating_add(1));
            }
        }
    }
    counts
}

fn parse(text: &str) -> Result<Rule> {
    let (selects, pattern) = match text.strip_prefix('!') {
        Some(p) => (false, p),
        None => (true, text),
    };
    if pattern.trim().is_empty() {
        bail!("pattern `{text}` is empty"; "write a name with wildcards, e.g. `projector.*`");
    }
    let (length, braces) = (text.chars().count(), text.matches('{').count());
    if length > MAX_LENGTH || braces > MAX_BRACES {
        let begin: String = text.chars().take(60).collect();
        bail!("pattern `{begin}…` has {length} characters and {braces} braces";
            "at most {MAX_LENGTH} and {MAX_BRACES}: use `*`, or several patterns");
    }
    let plain = expand(text, pattern)?;
    let alternatives = plain.iter().map(|p| tokens(text, p)).collect::<Result<_>>()?;
    Ok(Rule { text: text.into(), selects, alternatives })
}

/// Every text that the braces of `pattern` allow: `a.{b,c}` → `a.b`, `a.c`. Braces may be nested.
fn expand(text: &str, pattern: &str) -> Result<Vec<String>> {
    let Some(open) = pattern.find('{') else {
        if pattern.contains('}') {
            bail!("pattern `{text}` closes a brace that was never opened"; "write alternatives as `{{a,b}}`");
        }
        return Ok(vec![pattern.into()]);
    };
    let (mut depth, mut cuts) = (0, vec![open]);
    let mut close = None;
    for (i, c) in pattern.char_indices().skip_while(|(i, _)| *i < open) {
        match c {
            '{' => depth += 1,
            '}' => depth -= 1,
            ',' if depth == 1 => cuts.push(i),
            _ => {}
        }
        if depth == 0 {
            cuts.push(i);
            close = Some(i);
            break;
        }
    }
    let Some(close) = close else {
        bail!("pattern `{text}` has an open brace"; "close it: alternatives are written `{{a,b}}`");
    };
    let (head, tail) = (&pattern[..open], &pattern[close + 1..]);
    let mut out = Vec::new();
    for pair in cuts.windows(2) {
        out.extend(expand(text, &format!("{head}{}{tail}", &pattern[pair[0] + 1..pair[1]]))?);
        if out.len() > MAX_ALTERNATIVES {
            bail!("pattern `{text}` stands for more than {MAX_ALTERNATIVES} texts"; "use `*` or several patterns");
        }
    }
    Ok(out)
}

fn tokens(text: &str, pattern: &str) -> Result<Vec<Token>> {
    let mut out = Vec::new();
    let mut rest = pattern;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        out.push(match c {
            '*' => Token::Run,
            '?' => Token::One,
            '[' => match rest.split_once(']').and_then(|(range, after)| Some((index(range)?, after))) {
                Some((token, after)) => {
                    rest = after;
                    token
                }
                None => bail!(
                    "pattern `{text}` has a bracket that is no index";
                    "brackets select layers by number: `layers[3]`, `layers[0..4]`, `layers[-2..]`"
                ),
            },
            c => Token::Char(c),
        });
    }
    Ok(out)
}

/// `3`, `-1`, `0..4`, `-2..`, `..4`, `..`
fn index(range: &str) -> Option<Token> {
    let number = |s: &str| s.trim().parse::<i64>().ok();
    let Some((start, end)) = range.split_once("..") else {
        let i = number(range)?;
        // The last one, −1, has no end: −1 + 1 would count from the start.
        return Some(Token::Index(i, (i != -1).then_some(i.saturating_add(1))));
    };
    let start = if start.trim().is_empty() { 0 } else { number(start)? };
    let end = if end.trim().is_empty() { None } else { Some(number(end)?) };
    Some(Token::Index(start, end))
}

/// The known names that look most like `pattern`, layer numbers folded into `*`; and how many layers there are, if the
/// pattern asks for some by number.
fn nearest(pattern: &str, known: &[String], counts: &Counts) -> String {
    let pattern = pattern.trim_start_matches('!');
    let wanted = fold_brackets(pattern);
    let folded: BTreeSet<String> = known.iter().map(|n| fold_indices(n)).collect();
    let mut scored: Vec<(f64, &String)> = folded.iter().map(|n| (strsim::jaro_winkler(&wanted, n), n)).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    let names: Vec<String> = scored.iter().take(3).map(|(_, n)| format!("`{n}`")).collect();
    let mut hint = match names.as_slice() {
        [] => "there is nothing to choose from".to_string(),
        names => format!("the nearest names are {}", names.join(", ")),
    };
    if pattern.contains('[') {
        let lists: Vec<String> = counts.iter().map(|(list, n)| format!("{list}[0..{n}]")).collect();
        hint.push_str(&format!("; numbered: {}", lists.join(", ")));
    }
    hint
}

fn fold_brackets(pattern: &str) -> String {
    let mut out = String::new();
    let mut rest = pattern;
    while let Some((before, after)) = rest.split_once('[') {
        out.push_str(before);
        out.push_str(".*");
        rest = after.split_once(']').map_or("", |(_, after)| after);
    }
    out + rest
}

fn fold_indices(name: &str) -> String {
    let part = |p| if str::parse::<u64>(p).is_ok() { "*" } else { p };
    name.split('.').map(part).collect::<Vec<_>>().join(".")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known() -> Vec<String> {
        let mut out = vec!["projector.linear_1.weight".to_string(), "projector.linear_1.bias".into()];
        for n in 0..12 {
            out.push(format!("language.layers.{n}.self_attn.q_proj.weight"));
            out.push(format!("language.layers.{n}.mlp.up_proj.weight"));
        }
        for n in 0..3 {
            out.push(format!("vision.encoder.layers.{n}.mlp.fc1.weight"));
        }
        out
    }

    fn list(patterns: &[&str]) -> Vec<String> {
        patterns.iter().map(|s| s.to_string()).collect()
    }

    fn selected(patterns: &[&str]) -> Vec<String> {
        let known = known();
        let p = Patterns::new(&list(patterns), &known).unwrap();
        known.into_iter().filter(|n| p.matches(n)).collect()
    }

    fn refused(patterns: &[&str]) -> crate::error::Error {
        Patterns::new(&list(patterns), &known()).unwrap_err()
    }

    #[test]
    fn the_first_match_wins() {
        assert_eq!(selected(&["!*.bias", "projector.*"]), ["projector.linear_1.weight"]);
        assert_eq!(selected(&["projector.*", "!*"]).len(), 2);
        assert_eq!(selected(&[]).len(), 0);
        let p = Patterns::new(&list(&["!*.bias", "projector.*"]), &known()).unwrap();
        assert_eq!(p.first("projector.linear_1.weight"), Some(1));
        assert_eq!(p.first("vision.encoder.layers.0.mlp.fc1.weight"), None);
    }

    #[test]
    fn wildcards() {
        assert_eq!(selected(&["*"]).len(), known().len());
        assert_eq!(selected(&["language.layers.*.{self_attn,mlp}.*_proj.weight"]).len(), 24);
        assert_eq!(selected(&["language.*.{self_attn.{q,k}_proj,mlp.down_proj}.weight"]).len(), 12);
        assert_eq!(selected(&["language.layers.?.mlp.*"]).len(), 10, "one character is one digit");
        assert_eq!(selected(&["*mlp*"]).len(), 15);
        assert_eq!(selected(&["projector.linear_1.bias"]), ["projector.linear_1.bias"]);
    }

    #[test]
    fn indices_count_from_the_end_of_their_own_list() {
        let at = |p| selected(&[p]).iter().map(|n| n.split('.').find_map(|p| p.parse().ok()).unwrap()).collect();
        let numbers: Vec<u32> = at("language.layers[-2..].mlp.*");
        assert_eq!(numbers, [10, 11]);
        let numbers: Vec<u32> = at("*layers[-1].mlp.*");
        assert_eq!(numbers, [11, 2], "last of the language model, last of the tower");
        let numbers: Vec<u32> = at("language.layers[..3].mlp.*");
        assert_eq!(numbers, [0, 1, 2]);
        let numbers: Vec<u32> = at("language.layers[1..-9].mlp.*");
        assert_eq!(numbers, [1, 2]);
        let numbers: Vec<u32> = at("language.layers[{1,-3}].mlp.*");
        assert_eq!(numbers, [1, 9]);
        let numbers: Vec<u32> = at("vision.encoder.layers[1..99]*");
        assert_eq!(numbers, [1, 2]);
    }

    #[test]
    fn a_pattern_that_matches_nothing_names_the_nearest() {
        let e = refused(&["projectr.*"]);
        assert_eq!(e.cause(), "pattern `projectr.*` matches nothing");
        let nearest = "the nearest names are `projector.linear_1.bias`, `projector.linear_1.weight`, ";
        assert!(e.hint_text().unwrap().starts_with(nearest), "{}", e.report());
        let e = refused(&["language.layers.*.self_attn.qproj.weight"]);
        assert!(e.hint_text().unwrap().contains("are `language.layers.*.self_attn.q_proj.weight`"), "{}", e.report());
        let e = refused(&["projector.*", "!language.layers[12].*"]);
        assert!(e.cause().contains("`!language.layers[12].*`"), "{e}");
        assert!(
            e.hint_text().unwrap().contains("language.layers[0..12], vision.encoder.layers[0..3]"),
            "{}",
            e.report()
        );
    }

    #[test]
    fn a_pattern_that_decides_nothing_is_refused() {
        let e = refused(&["projector.*", "!projector.linear_1.bias"]);
        assert!(e.cause().contains("`!projector.linear_1.bias` decides nothing"), "{e}");
        assert!(e.hint_text().unwrap().contains("first match wins"));
    }

    #[test]
    fn bad_syntax() {
        assert!(refused(&["{a,b"]).cause().contains("open brace"));
        assert!(refused(&["a,b}"]).cause().contains("never opened"));
        assert!(refused(&["layers[a-z]"]).cause().contains("no index"));
        assert!(refused(&["layers[1"]).hint_text().unwrap().contains("layers[-2..]"));
        assert!(refused(&["!"]).cause().contains("empty"));
        let bomb = "{a,b,c,d,e,f,g,h}".repeat(12);
        assert!(refused(&[bomb.as_str()]).cause().contains("more than 1000"));
        for long in ["{a}".repeat(50_000), format!("{}{}", "{".repeat(50_000), "}".repeat(50_000)), "a".repeat(20_000)]
        {
            let e = refused(&[long.as_str()]);
            assert!(e.cause().contains("characters and") && e.cause().len() < 200, "{}", e.cause());
        }
    }

    /// Ways through a name that a search would try one by one.
    #[test]
    fn stars_cost_no_more_than_their_number() {
        let known = vec!["a".repeat(100)];
        for (pattern, fits) in [("*".repeat(200) + "b", false), ("*a".repeat(60) + "b", false), ("*a".repeat(60), true)]
        {
            assert_eq!(Patterns::new(&[pattern], &known).is_ok(), fits);
        }
    }
}
