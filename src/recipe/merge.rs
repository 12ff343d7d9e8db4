//! Recipes as TOML tables: one laid over another, defaults spread over the stages, a single value set from outside.
//!
//! A file replaces whole values below a section: `[stage.sft] optimizer = …` takes the place of the inherited one as it
//! is, because merging inside a value would leave two variants side by side (`{ mlp = …, linear = … }`).

use crate::bail;
use crate::error::{Error, Result};
use toml::{Table, Value};

/// Sections whose keys are merged one by one, and how deep they lie: `[model]`, `[stage.NAME]`.
const SECTIONS: [(&str, usize); 5] = [("model", 1), ("defaults", 1), ("stage", 2), ("eval", 2), ("synth", 2)];

/// The section that every stage inherits from.
pub const DEFAULTS: &str = "defaults";

/// Lays `over` on `base`.
pub fn merge(base: &mut Table, over: Table) {
    for (key, value) in over {
        let depth = SECTIONS.iter().find(|(name, _)| *name == key).map_or(0, |(_, depth)| *depth);
        merge_value(base, key, value, depth);
    }
}

fn merge_value(base: &mut Table, key: String, value: Value, depth: usize) {
    match (base.get_mut(&key), value) {
        (Some(Value::Table(below)), Value::Table(above)) if depth > 0 => {
            for (k, v) in above {
                merge_value(below, k, v, depth - 1);
            }
        }
        (_, value) => {
            base.insert(key, value);
        }
    }
}

/// Takes `[defaults]` out and gives every stage those of its keys that the stage does not state.
pub fn expand_defaults(recipe: &mut Table) -> Result<()> {
    let defaults = match recipe.remove(DEFAULTS) {
        None => return Ok(()),
        Some(Value::Table(t)) => t,
        Some(_) => bail!("`{DEFAULTS}` is not a section"; "write it as [{DEFAULTS}], with the keys of a stage"),
    };
    let Some(Value::Table(stages)) = recipe.get_mut("stage") else { return Ok(()) };
    for stage in stages.iter_mut().filter_map(|(_, s)| s.as_table_mut()) {
        for (key, value) in &defaults {
            stage.entry(key.clone()).or_insert_with(|| value.clone());
        }
    }
    Ok(())
}

/// One `--set KEY=VALUE`: a dotted path, with `[i]` for an entry of a list, and its value.
#[derive(Debug, Clone, PartialEq)]
pub struct Setting {
    /// As the user wrote it.
    pub text: String,
    pub path: Vec<Step>,
    pub value: Value,
}

/// One step of a path into a recipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    Key(String),
    Index(usize),
}

impl Setting {
    /// Splits at the first `=`. The value is TOML if it parses as one value, else the text itself.
    pub fn parse(text: &str) -> Result<Self> {
        let refuse = || {
            Error::new(format!("--set {text}: not KEY=VALUE")).hint(
                "name the key by its path, e.g. --set stage.sft.lr=1e-4 or --set 'stage.sft.adapters[0].lora.rank=8'",
            )
        };
        let (key, value) = text.split_once('=').ok_or_else(refuse)?;
        let path = parse_path(key.trim()).ok_or_else(refuse)?;
        Ok(Self { text: text.into(), path, value: parse_value(value) })
    }

    /// Whether this changes `[defaults]`, which happens before they are spread over the stages.
    pub fn is_default(&self) -> bool {
        self.path.first() == Some(&Step::Key(DEFAULTS.into()))
    }

    /// An error if this changes a default that no stage takes, because each states its own: it would change nothing.
    ///
    /// `recipe` is as the files say it, its defaults not yet spread.
    pub fn has_effect(&self, recipe: &Table) -> Result<()> {
        let (true, Some(Step::Key(key))) = (self.is_default(), self.path.get(1)) else { return Ok(()) };
        let Some(Value::Table(stages)) = recipe.get("stage") else { return Ok(()) };
        let own = |s: &Value| s.as_table().is_some_and(|s| s.contains_key(key));
        if stages.is_empty() || !stages.values().all(own) {
            return Ok(());
        }
        let rest = show_path(&self.path[1..]);
        let sets: Vec<String> = stages.keys().map(|s| format!("--set stage.{s}.{rest}=…")).collect();
        bail!("--set {}: it would change nothing, for every stage sets its own `{key}`", self.text; "set a stage's: {}", sets.join(" or "))
    }

    /// Writes the value into `recipe`; sections on the way that do not exist are made.
    pub fn apply(&self, recipe: &mut Table) -> Result<()> {
        let Some((Step::Key(first), rest)) = self.path.split_first() else {
            bail!("--set {}: no key", self.text);
        };
        let mut at = recipe.entry(first.clone()).or_insert_with(|| self.empty(rest));
        for (i, step) in rest.iter().enumerate() {
            at = match (step, at) {
                (Step::Key(k), Value::Table(t)) => t.entry(k.clone()).or_insert_with(|| self.empty(&rest[i + 1..])),
                (Step::Index(n), Value::Array(list)) => {
                    let len = list.len();
                    match list.get_mut(*n) {
                        Some(v) => v,
                        None => {
                            bail!("--set {}: `{}` is a list of length {len}", self.text, self.prefix(i + 1); "count from 0")
                        }
                    }
                }
                (_, other) => bail!(
                    "--set {}: `{}` is {}: nothing can be set inside it", self.text, self.prefix(i + 1), kind(other);
                    "set the whole value, e.g. --set '{}={{ … }}'", self.prefix(i + 1)
                ),
            };
        }
        *at = self.value.clone();
        Ok(())
    }

    fn empty(&self, rest: &[Step]) -> Value {
        if rest.is_empty() { self.value.clone() } else { Value::Table(Table::new()) }
    }

    fn prefix(&self, len: usize) -> String {
        show_path(&self.path[..len])
    }
}

/// What a value is, for a message.
pub fn kind(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "text",
        Value::Integer(_) | Value::Float(_) => "a number",
        Value::Boolean(_) => "true or false",
        Value::Datetime(_) => "a date",
        Value::Array(_) => "a list",
        Value::Table(_) => "a section of keys and values",
    }
}

/// `stage.sft.adapters[0].lora`
pub fn show_path(path: &[Step]) -> String {
    let mut out = String::new();
    for step in path {
        match step {
            Step::Key(k) if out.is_empty() => out.push_str(k),
            Step::Key(k) => out.push_str(&format!(".{k}")),
            Step::Index(i) => out.push_str(&format!("[{i}]")),
        }
    }
    out
}

/// The inverse of [`show_path`]; `None` if a key is empty or a bracket holds no number.
pub fn parse_path(text: &str) -> Option<Vec<Step>> {
    let mut path = Vec::new();
    for part in text.split('.') {
        let (key, mut brackets) = match part.find('[') {
            Some(i) => (&part[..i], &part[i..]),
            None => (part, ""),
        };
        if key.is_empty() {
            return None;
        }
        path.push(Step::Key(key.into()));
        while !brackets.is_empty() {
            let (index, rest) = brackets.strip_prefix('[')?.split_once(']')?;
            path.push(Step::Index(index.parse().ok()?));
            brackets = rest;
        }
    }
    Some(path)
}

/// What stands at `path`, if anything does.
pub fn lookup<'a>(recipe: &'a Table, path: &[Step]) -> Option<&'a Value> {
    let (Step::Key(first), rest) = path.split_first()? else { return None };
    rest.iter().try_fold(recipe.get(first)?, |at, step| match step {
        Step::Key(k) => at.get(k.as_str()),
        Step::Index(i) => at.get(*i),
    })
}

fn parse_value(text: &str) -> Value {
    let parsed = toml::from_str::<Table>(&format!("v = {text}")).ok().filter(|t| t.len() == 1);
    parsed.and_then(|mut t| t.remove("v")).unwrap_or_else(|| Value::String(text.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table(text: &str) -> Table {
        toml::from_str(text).unwrap()
    }

    fn set(recipe: &str, text: &str) -> Result<Table> {
        let mut t = table(recipe);
        Setting::parse(text)?.apply(&mut t)?;
        Ok(t)
    }

    #[test]
    fn a_file_replaces_whole_values_below_a_section() {
        let mut base = table(
            "a = 1\n[model]\nprojector = { mlp = { depth = 2 } }\ntemplate = 'plain'\n[stage.x]\nlr = 1\nbatch = { global = 8, micro = 4 }",
        );
        merge(
            &mut base,
            table("[model]\nprojector = { linear = {} }\n[stage.x]\nbatch = { global = 2 }\n[stage.y]\nlr = 2"),
        );
        let want = table(
            "a = 1\n[model]\nprojector = { linear = {} }\ntemplate = 'plain'\n[stage.x]\nlr = 1\nbatch = { global = 2 }\n[stage.y]\nlr = 2",
        );
        assert_eq!(base, want);
    }

    #[test]
    fn stages_inherit_the_defaults_they_do_not_state() {
        let mut t = table("[defaults]\nlr = 1\nbatch = { global = 8 }\n[stage.x]\nlr = 2\n[stage.y]");
        expand_defaults(&mut t).unwrap();
        assert_eq!(t, table("[stage.x]\nlr = 2\nbatch = { global = 8 }\n[stage.y]\nlr = 1\nbatch = { global = 8 }"));
        assert!(expand_defaults(&mut table("defaults = 3")).is_err());
    }

    #[test]
    fn values_are_toml_or_else_text() {
        let value = |text: &str| Setting::parse(&format!("k={text}")).unwrap().value;
        assert_eq!(value("2e-5"), Value::Float(2e-5));
        assert_eq!(value("[1, 2]"), table("v = [1, 2]")["v"]);
        assert_eq!(value("{ cosine = {} }"), table("v = { cosine = {} }")["v"]);
        assert_eq!(value("/scratch/a=b"), Value::String("/scratch/a=b".into()));
        assert_eq!(value("bf16"), Value::String("bf16".into()));
        assert_eq!(value("\"7\""), Value::String("7".into()));
        assert_eq!(value("1\nw = 2"), Value::String("1\nw = 2".into()));
        assert_eq!(value(""), Value::String("".into()));
    }

    #[test]
    fn a_setting_reaches_into_tables_and_lists() {
        let recipe = "[stage.x]\nadapters = [{ lora = { rank = 4 } }]\nlr = 1";
        let t = set(recipe, "stage.x.adapters[0].lora.rank=8").unwrap();
        assert_eq!(lookup(&t, &parse_path("stage.x.adapters[0].lora.rank").unwrap()), Some(&Value::Integer(8)));
        let t = set(recipe, "stage.y.optimizer.adamw.eps=1e-6").unwrap();
        assert_eq!(t["stage"]["y"]["optimizer"]["adamw"]["eps"], Value::Float(1e-6));
        assert_eq!(set("", "a=1").unwrap(), table("a = 1"));
    }

    #[test]
    fn a_default_that_every_stage_states_itself_cannot_be_set() {
        let effect = |recipe: &str, text: &str| Setting::parse(text).unwrap().has_effect(&table(recipe));
        let both = "[stage.x]\nlr = 1\n[stage.y]\nlr = 2";
        let e = effect(both, "defaults.lr=3").unwrap_err();
        assert_eq!(e.cause(), "--set defaults.lr=3: it would change nothing, for every stage sets its own `lr`");
        assert_eq!(e.hint_text(), Some("set a stage's: --set stage.x.lr=… or --set stage.y.lr=…"));
        for (recipe, text) in
            [(both, "defaults.seed=3"), ("[stage.x]\nlr = 1\n[stage.y]", "defaults.lr=3"), (both, "stage.x.lr=3")]
        {
            assert!(effect(recipe, text).is_ok(), "{text}");
        }
    }

    #[test]
    fn settings_that_cannot_be_applied() {
        let recipe = "[stage.x]\nadapters = [{}]\nlr = 1";
        let e = set(recipe, "stage.x.adapters[3].lora.rank=8").unwrap_err();
        assert_eq!(e.cause(), "--set stage.x.adapters[3].lora.rank=8: `stage.x.adapters` is a list of length 1");
        let e = set(recipe, "stage.x.lr.peak=8").unwrap_err();
        assert_eq!(e.cause(), "--set stage.x.lr.peak=8: `stage.x.lr` is a number: nothing can be set inside it");
        for bad in ["lr", "=3", "a..b=1", "a[x]=1", "a[1=1", "[0]=1"] {
            assert!(set(recipe, bad).unwrap_err().cause().contains("not KEY=VALUE"), "{bad}");
        }
    }
}
