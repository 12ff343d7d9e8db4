//! What serde says about a recipe, in words that help: the key's whole path, the file it comes from, the nearest known
//! name.

use super::merge::{DEFAULTS, Setting, Step, lookup, show_path};
use crate::error::words::plain;
use crate::error::{Context, Error, Result, near};
use crate::spec::{Model, Recipe, Stage};
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
            None => elsewhere(&path, field, &known, recipe).unwrap_or_else(|| suggestion(field, &known)),
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
    if let [rest @ .., Step::Key(key), Step::Index(_)] = path.as_slice()
        && form(key).is_some_and(is_section)
    {
        return no_list(&[rest, &[Step::Key(key.clone())]].concat(), recipe, sources);
    }
    let shown = show_path(&path);
    let value = lookup(recipe, &path);
    let (said, hint) = match value {
        _ if shown == "stages" => (
            plain(message),
            "`stages` is the list of their names in order; a stage's own keys go under [stage.NAME]".to_string(),
        ),
        Some(Value::Table(t)) if t.len() != 1 && message.contains("element") => {
            let names: Vec<String> = t.keys().map(|k| format!("`{k}`")).collect();
            let found = if names.is_empty() { "none".to_string() } else { list(&names) };
            (
                "must be exactly one choice".to_string(),
                format!("exactly one choice goes in here, found {found}; set the whole value at once"),
            )
        }
        Some(Value::String(s)) if message.contains("variant") => (
            format!("`{s}` has settings of its own"),
            format!("this choice has settings: write {{ {s} = {{ … }} }}, or {{ {s} = {{}} }} for its defaults"),
        ),
        Some(v) => {
            let said = match plain(message) {
                said if said == message && !message.starts_with("is ") => format!("is {v}: {message}"),
                said => said,
            };
            let form = example(&path, v, &said);
            (said, form)
        }
        None => (plain(message), "see the recipes under recipes/ for the form of each key".to_string()),
    };
    Error::new(format!("{}: {said}", place(&path, sources))).hint(hint)
}

/// Refuses a list where a section of named keys should stand: the deserializer takes its values in the order in which the keys
/// happen to be declared.
pub fn section_as_list(table: &Table, recipe: &Recipe, sources: &Sources) -> Result<()> {
    let read = Table::try_from(recipe).map_err(|e| Error::new(e.to_string())).context("the recipe")?;
    match list_for_section(&Value::Table(table.clone()), &Value::Table(read)) {
        Some(mut path) => {
            path.reverse();
            Err(no_list(&path, table, sources))
        }
        None => Ok(()),
    }
}

/// Where `given` has a list and `read`, what was made of it, a section: the steps to it, the last one first.
fn list_for_section(given: &Value, read: &Value) -> Option<Vec<Step>> {
    let below = |step: Step, given: &Value, read: &Value| {
        let mut path = list_for_section(given, read)?;
        path.push(step);
        Some(path)
    };
    match (given, read) {
        (Value::Array(_), Value::Table(_)) => Some(Vec::new()),
        (Value::Table(given), Value::Table(read)) => {
            given.iter().find_map(|(k, v)| below(Step::Key(k.clone()), v, read.get(k)?))
        }
        (Value::Array(given), Value::Array(read)) => {
            given.iter().zip(read).enumerate().find_map(|(i, (given, read))| below(Step::Index(i), given, read))
        }
        _ => None,
    }
}

/// A list stands where a section should.
fn no_list(path: &[Step], recipe: &Table, sources: &Sources) -> Error {
    let said = "is a list, and must be a section of keys and values";
    let hint = lookup(recipe, path).map_or(String::new(), |value| example(path, value, said));
    Error::new(format!("{}: {said}", place(path, sources))).hint(hint)
}

/// The form of a key in [`EXAMPLES`].
fn form(key: &str) -> Option<&'static str> {
    EXAMPLES.iter().find(|(name, _)| *name == key).map(|(_, form)| *form)
}

fn is_section(form: &str) -> bool {
    form.starts_with('{')
}

/// What a key looks like whose value has a form that is not its own.
fn example(path: &[Step], value: &Value, said: &str) -> String {
    let n = value.as_integer().filter(|n| *n > 0);
    let key = path.iter().rev().find_map(|s| match s {
        Step::Key(k) => Some(k.as_str()),
        Step::Index(_) => None,
    });
    let of_list = matches!(path.last(), Some(Step::Index(_)));
    let of_projector = path.iter().any(|s| matches!(s, Step::Key(k) if k == "projector"));
    match (key.unwrap_or_default(), n) {
        ("linear", _) if of_projector => "e.g. linear = { input_norm = true }, or linear = {}".to_string(),
        ("batch", Some(n)) => format!(
            "samples of an optimizer step and of a forward pass: batch = {{ global = {n}, micro = {} }}",
            if n % 2 == 0 { n / 2 } else { 1 }
        ),
        ("checkpoint", Some(n)) => format!("e.g. checkpoint = {{ every_steps = {n}, keep = 3 }}"),
        (key, _) => match form(key) {
            Some(form) if of_list => format!("e.g. {key} = {form}; this is an entry of it"),
            Some(form) => format!("e.g. {key} = {form}"),
            None => match value {
                Value::String(s) if s.parse::<f64>().is_ok() => "a number stands without quotes".to_string(),
                _ if !of_list && (said.ends_with("must be text") || said.ends_with("must be a path")) => {
                    format!(
                        "text stands in quotes, e.g. {key} = \"{value}\"; see the recipes under recipes/ for the form of each key"
                    )
                }
                _ => "see the recipes under recipes/ for the form of each key".to_string(),
            },
        },
    }
}

/// Forms of keys that are no plain number or text.
const EXAMPLES: [(&str, &str); 31] = [
    ("batch", "{ global = 4, micro = 2 }"),
    ("checkpoint", "{ every_steps = 500, keep = 3 }"),
    ("lr_scheduler", "{ cosine = { warmup_ratio = 0.03 } }"),
    ("optimizer", "{ adamw = { weight_decay = 0.1 } }"),
    ("objective", "{ dpo = { beta = 0.1 } }, or \"sft\""),
    ("adapters", "[{ lora = { rank = 16, alpha = 32, target = [\"language.layers.*_proj\"] } }]"),
    ("data", "[{ path = \"captions.json\", images = \"images\" }]"),
    ("param_groups", "[{ match = [\"projector.*\"], lr = 2e-5 }]"),
    ("from", "{ stage = \"sft\", adapters = \"continue\" }"),
    ("align_check", "{ threshold = 0.3, samples = 256 }"),
    ("vision", "{ source = \"openai/clip-vit-large-patch14-336\" }"),
    ("projector", "{ mlp = { depth = 2 } }"),
    ("language", "{ source = \"lmsys/vicuna-7b-v1.5\" }"),
    ("train", "[\"projector.*\"]"),
    ("target", "[\"language.layers.*_proj\"]"),
    ("match", "[\"projector.*\"]"),
    ("eval", "[\"questions\"], with a section [eval.questions]"),
    ("pictures", "[\"blank\", \"shuffled\"]"),
    ("grid_pinpoints", "[[336, 672], [672, 336]]"),
    ("betas", "[0.9, 0.999]"),
    ("cosine", "{ warmup_ratio = 0.03 }"),
    ("linear", "{ warmup_steps = 100 }"),
    ("constant", "{ warmup_steps = 100 }"),
    ("adamw", "{ betas = [0.9, 0.999], weight_decay = 0.1 }"),
    ("lora", "{ rank = 16, alpha = 32, target = [\"language.layers.*_proj\"] }"),
    ("dpo", "{ beta = 0.1, loss = \"sigmoid\" }"),
    ("mlp", "{ depth = 2, act = \"gelu\" }"),
    ("lr", "1e-4"),
    ("epochs", "1.0"),
    ("max_steps", "1000"),
    ("seed", "42"),
];

/// For a key of a stage, the model or a stage's name that stands a section too high, where it belongs.
fn elsewhere(path: &[Step], field: &str, known: &[&str], recipe: &Table) -> Option<String> {
    let stages: Vec<&String> = recipe.get("stage").and_then(Value::as_table).map_or(Vec::new(), |t| t.keys().collect());
    let all = |key: &str| {
        let places: Vec<String> = stages.iter().map(|s| format!("`stage.{s}.{key}`")).collect();
        format!(
            "`{key}` belongs to a stage: {}",
            if places.is_empty() { "`stage.NAME.…`".into() } else { places.join(" or ") }
        )
    };
    if path.len() == 1 {
        if stages.iter().any(|s| *s == field) {
            return Some(format!("a stage's section is [stage.{field}], its keys are `stage.{field}.…`"));
        }
        // What is a letter or two beside a section's name is that section.
        if nearest(field, known).is_some() {
            return None;
        }
        if let Some(key) = own(field, &keys::<Stage>()) {
            return Some(all(&key));
        }
        return own(field, &keys::<Model>()).map(|key| format!("it is `model.{key}`"));
    }
    if let ([Step::Key(s), Step::Key(_), ..], 3) = (path, path.len())
        && s == "stage"
        && let Some(key) = own(field, &keys::<Model>()).filter(|_| nearest(field, known).is_none())
    {
        return Some(format!("it is `model.{key}`, the same for all stages"));
    }
    None
}

/// The key of ours that `field` is, by its own name or another trainer's.
fn own(field: &str, keys: &[String]) -> Option<String> {
    let field = ALIASES.iter().find(|(other, _)| *other == field).map_or(field, |(_, ours)| *ours);
    keys.iter().find(|k| *k == field).cloned()
}

/// The keys of a section, as its type names them.
pub fn keys<T: serde::de::DeserializeOwned>() -> Vec<String> {
    let unknown = Table::from_iter([("?".to_string(), Value::Boolean(true))]);
    let e = T::deserialize(Value::Table(unknown)).err();
    let message = e.map(|e: toml::de::Error| e.message().to_string()).unwrap_or_default();
    named(&message, "unknown field ").map_or(Vec::new(), |(_, keys)| keys.iter().map(|k| k.to_string()).collect())
}

/// The key of a stage that a command-line flag such as `--lr` or `--learning-rate` means, if one does.
pub fn stage_key(flag: &str) -> Option<String> {
    let name = flag.trim_start_matches('-').replace('-', "_");
    own(&name, &keys::<Stage>())
}

/// As [`stage_key`], for a key of the model.
pub fn model_key(flag: &str) -> Option<String> {
    let name = flag.trim_start_matches('-').replace('-', "_");
    own(&name, &keys::<Model>())
}

/// Keys that have another place than they had.
const MOVED: [(&str, &str); 1] = [("model.language.dtype", "model.dtype")];

/// What other trainers call a key of ours.
const ALIASES: [(&str, &str); 17] = [
    ("learning_rate", "lr"),
    ("num_train_epochs", "epochs"),
    ("num_epochs", "epochs"),
    ("lora_alpha", "alpha"),
    ("lora_dropout", "dropout"),
    ("lora_r", "rank"),
    ("r", "rank"),
    ("target_modules", "target"),
    ("lr_scheduler_type", "lr_scheduler"),
    ("per_device_train_batch_size", "batch"),
    ("train_batch_size", "batch"),
    ("batch_size", "batch"),
    ("gradient_accumulation_steps", "batch"),
    ("save_steps", "checkpoint"),
    ("gradient_checkpointing", "activations"),
    ("model_max_length", "max_seq_len"),
    ("optim", "optimizer"),
];

/// The known name that `word` was probably meant to be, by our names and those of [`ALIASES`].
fn nearest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    let alias = |(other, ours): &(&'static str, &str)| Some((*other, *known.iter().find(|k| *k == ours)?));
    let names: Vec<(&str, &'a str)> = known.iter().map(|k| (*k, *k)).chain(ALIASES.iter().filter_map(alias)).collect();
    let words: Vec<&str> = names.iter().map(|(name, _)| *name).collect();
    near::nearest(word, &words).map(|i| names[i].1)
}

/// `did you mean …? known: …`.
pub fn suggestion(word: &str, known: &[&str]) -> String {
    near::told(nearest(word, known), known)
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
