//! What serde says about a recipe, in words that help: the key's whole path, the file it comes from, the nearest known
//! name.

use super::merge::{DEFAULTS, Setting, Step, lookup, show_path};
use crate::error::Error;
use serde_path_to_error::Segment;
use toml::{Table, Value};

/// A recipe file as it was written, without what it extends.
#[derive(Debug, Clone)]
pub struct File {
    pub name: String,
    pub table: Table,
}

/// What a recipe was made of: the files from the deepest base to the one that was asked for, and the `--set`s.
#[derive(Debug)]
pub struct Sources {
    pub files: Vec<File>,
    pub settings: Vec<Setting>,
}

/// Turns an error of the deserializer into ours. `recipe` is the resolved table, `sources` what it was made of.
pub fn explain(e: &serde_path_to_error::Error<toml::de::Error>, recipe: &Table, sources: &Sources) -> Error {
    let mut path = steps(e.path());
    let message = e.inner().message().trim();
    if let Some((field, known)) = named(message, "unknown field ") {
        if path.last() != Some(&Step::Key(field.into())) {
            path.push(Step::Key(field.into()));
        }
        let shown = show_path(&path);
        let hint = match MOVED.iter().find(|(old, _)| *old == shown) {
            Some((_, new)) => format!("it is `{new}` now"),
            None => suggestion(field, &known),
        };
        return Error::new(format!("{}: unknown key", place(&path, sources))).hint(hint);
    }
    if let Some((value, known)) = named(message, "unknown variant ") {
        drop_variant(&mut path, recipe);
        return Error::new(format!("{}: unknown value `{value}`", place(&path, sources)))
            .hint(suggestion(value, &known));
    }
    if let Some((field, _)) = named(message, "missing field ") {
        return missing(&path, field, sources);
    }
    drop_variant(&mut path, recipe);
    let error = Error::new(format!("{}: {message}", place(&path, sources)));
    let shown = show_path(&path);
    match lookup(recipe, &path) {
        _ if shown == "stages" => {
            error.hint("`stages` is the list of their names in order; a stage's own keys go under [stage.NAME]")
        }
        Some(Value::Table(t)) if t.len() != 1 && message.contains("element") => {
            let names: Vec<String> = t.keys().map(|k| format!("`{k}`")).collect();
            error.hint(format!("exactly one choice goes in here, found {}; set the whole value at once", list(&names)))
        }
        Some(Value::String(s)) if message.contains("variant") => error
            .hint(format!("this choice has settings: write {{ {s} = {{ … }} }}, or {{ {s} = {{}} }} for its defaults")),
        Some(v) if message.starts_with("invalid") => error.hint(format!("it is set to {v}")),
        _ => error.hint("see the recipes under recipes/ for the form of each key"),
    }
}

/// Keys that have another place than they had.
const MOVED: [(&str, &str); 1] = [("model.language.dtype", "model.dtype")];

/// What other trainers call a key of ours.
const ALIASES: [(&str, &str); 5] = [
    ("learning_rate", "lr"),
    ("num_train_epochs", "epochs"),
    ("lora_alpha", "alpha"),
    ("lora_dropout", "dropout"),
    ("target_modules", "target"),
];

/// Likeness (Jaro–Winkler, 0 to 1) from which on two names that differ in more letters are still taken for one.
const ALIKE: f64 = 0.8;

/// The known name that `word` was probably meant to be, by our names and those of [`ALIASES`]: one that is at most a third
/// of the word's letters away, else one that begins and goes on alike.
fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let alias = |(other, ours): &(&'static str, &str)| Some((*other, *known.iter().find(|k| *k == ours)?));
    let names: Vec<(&str, &'a str)> = known.iter().map(|k| (*k, *k)).chain(ALIASES.iter().filter_map(alias)).collect();
    let distance = |name: &str| strsim::damerau_levenshtein(word, name);
    let likeness = |name: &str| strsim::jaro_winkler(word, name);
    let near = names.iter().min_by_key(|(name, _)| distance(name));
    let alike = names.iter().max_by(|(a, _), (b, _)| likeness(a).total_cmp(&likeness(b)));
    near.filter(|(name, _)| distance(name) <= (word.chars().count() / 3).max(1))
        .or(alike.filter(|(name, _)| likeness(name) >= ALIKE))
        .map(|(_, ours)| *ours)
}

/// `did you mean …? known: …`.
pub fn suggestion(word: &str, known: &[&str]) -> String {
    let names: Vec<String> = known.iter().map(|k| format!("`{k}`")).collect();
    match (nearest(word, known), names.len()) {
        (_, 0) => "there is nothing to choose from".into(),
        (Some(near), 1) => format!("did you mean `{near}`?"),
        (Some(near), _) => format!("did you mean `{near}`? known: {}", list(&names)),
        (None, _) => format!("known: {}", list(&names)),
    }
}

/// A choice written as a bare string ends the path with its own name, which is no key.
fn drop_variant(path: &mut Vec<Step>, recipe: &Table) {
    if lookup(recipe, path).is_none() {
        path.pop();
    }
}

fn list(names: &[String]) -> String {
    names.join(", ")
}

fn missing(path: &[Step], field: &str, sources: &Sources) -> Error {
    let mut whole = path.to_vec();
    whole.push(Step::Key(field.into()));
    let file = sources.files.last().map_or("", |f| &f.name);
    let hint = match path {
        [] => format!("add `{field}` at the top of the file"),
        [Step::Key(s), Step::Key(name)] if s == "stage" => {
            format!("add `{field} = …` to [stage.{name}], or to [{DEFAULTS}] for every stage")
        }
        _ => format!("add `{field} = …` to `{}`", show_path(path)),
    };
    Error::new(format!("{file}: {} is missing", show_path(&whole))).hint(hint)
}

fn steps(path: &serde_path_to_error::Path) -> Vec<Step> {
    let step = |s: &Segment| match s {
        Segment::Seq { index } => Some(Step::Index(*index)),
        Segment::Map { key } => Some(Step::Key(key.clone())),
        Segment::Enum { variant } => Some(Step::Key(variant.clone())),
        Segment::Unknown => None,
    };
    path.iter().filter_map(step).collect()
}

/// `unknown field \`x\`, expected one of \`a\`, \`b\`` → (x, [a, b])
fn named<'a>(message: &'a str, start: &str) -> Option<(&'a str, Vec<&'a str>)> {
    let mut quoted = message.strip_prefix(start)?.split('`').skip(1).step_by(2);
    Some((quoted.next()?, quoted.collect()))
}

/// `FILE: stage.sft.lr`, with the last source that has it; a value that a stage inherits is shown where it was written.
fn place(path: &[Step], sources: &Sources) -> String {
    let inherited: Vec<Step> = match path {
        [Step::Key(s), Step::Key(_), rest @ ..] if s == "stage" && !rest.is_empty() => {
            [&[Step::Key(DEFAULTS.into())], rest].concat()
        }
        _ => Vec::new(),
    };
    for path in [path, inherited.as_slice()].into_iter().filter(|p| !p.is_empty()) {
        let shown = show_path(path);
        let reaches = |s: &&Setting| s.path.starts_with(path) || path.starts_with(&s.path);
        if let Some(s) = sources.settings.iter().rev().find(reaches) {
            return format!("--set {}: {shown}", s.text);
        }
        if let Some(f) = sources.files.iter().rev().find(|f| lookup(&f.table, path).is_some()) {
            return format!("{}: {shown}", f.name);
        }
    }
    let file = sources.files.last().map_or("", |f| &f.name);
    format!("{file}: {}", show_path(path))
}
