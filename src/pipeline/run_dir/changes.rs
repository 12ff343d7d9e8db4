//! How a recipe differs from the one that a run, or one of its finished stages, was trained with.

use crate::error::{Error, Result};
use crate::pipeline::state::lineage;
use crate::spec::Recipe;
use std::collections::{BTreeMap, BTreeSet};

/// Values of a recipe by their dotted keys, without those that may change freely.
pub fn flatten_toml(text: &str) -> Result<BTreeMap<String, String>> {
    let value: toml::Value = toml::from_str(text).map_err(|e| Error::new(format!("the run's recipe.toml: {e}")))?;
    let mut out = BTreeMap::new();
    flatten(&value, String::new(), &mut out);
    out.retain(|key, _| !free(key));
    Ok(out)
}

/// Where a run lies, what its passes keep, how often it is saved, and what is measured do not change what it computes.
fn free(key: &str) -> bool {
    let of_stage = key.strip_prefix("stage.").and_then(|rest| Some(rest.split_once('.')?.1));
    let of_stage = of_stage.is_some_and(|k| {
        ["activations", "recompute", "eval"].contains(&k) || k.starts_with("checkpoint.") || k.starts_with("recompute[")
    });
    key == "output_dir" || key.starts_with("eval.") || of_stage
}

fn flatten(value: &toml::Value, path: String, out: &mut BTreeMap<String, String>) {
    let join = |k: &str| if path.is_empty() { k.to_string() } else { format!("{path}.{k}") };
    match value {
        toml::Value::Table(t) => t.iter().for_each(|(k, v)| flatten(v, join(k), out)),
        toml::Value::Array(a) if a.iter().any(|v| v.is_table()) => {
            a.iter().enumerate().for_each(|(i, v)| flatten(v, format!("{path}[{i}]"), out));
        }
        other => {
            out.insert(path, other.to_string());
        }
    }
}

/// The keys whose values differ, each with both.
pub fn changes(old: &BTreeMap<String, String>, new: &BTreeMap<String, String>) -> Vec<String> {
    keys(old, new).map(|k| told(old, new, k)).collect()
}

/// `KEY: was OLD, is NEW`.
pub fn told(old: &BTreeMap<String, String>, new: &BTreeMap<String, String>, key: &str) -> String {
    let show = |m: &BTreeMap<String, String>| m.get(key).cloned().unwrap_or_else(|| "(absent)".into());
    format!("{key}: was {}, is {}", show(old), show(new))
}

fn keys<'a>(old: &'a BTreeMap<String, String>, new: &'a BTreeMap<String, String>) -> impl Iterator<Item = &'a String> {
    let keys: BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    keys.into_iter().filter(|k| old.get(*k) != new.get(*k))
}

/// How a recipe differs from the one that a finished stage was trained with.
#[derive(Debug, Default)]
pub struct OfFinished {
    /// It would build another model than the stage's weights are of.
    pub model: Vec<String>,
    /// It would train otherwise.
    pub training: Vec<String>,
}

/// Compares for the finished `stage`: `old` is the recipe that it keeps.
pub fn of_finished(old: &Recipe, new: &Recipe, stage: &str) -> Result<OfFinished> {
    let flat = |r: &Recipe| flatten_toml(&crate::recipe::to_toml(r)?);
    let (before, after) = (flat(old)?, flat(new)?);
    let (from, to) = (lineage(old, stage)?, lineage(new, stage)?);
    let mut out = OfFinished::default();
    if from != to {
        out.model.push(format!("stage.{stage} comes after: was {}, is {}", from.join(", "), to.join(", ")));
    }
    for key in keys(&before, &after) {
        let of = |name: &str| key.strip_prefix(&format!("stage.{name}.")[..]);
        let part = from.iter().find_map(|name| of(name));
        let line = || told(&before, &after, key);
        if part.is_some_and(of_model) || key.strip_prefix("model.").is_some_and(of_backbones) {
            out.model.push(line());
        } else if of(stage).is_some() || key.starts_with("model.") {
            out.training.push(line());
        }
    }
    Ok(out)
}

/// Does a stage's key decide which parameters there are, or what they compute?
fn of_model(key: &str) -> bool {
    let word = key.split(['.', '[']).next().unwrap_or(key);
    ["from", "train", "reset", "adapters", "image_size"].contains(&word)
}

/// The same of a key of the model.
fn of_backbones(key: &str) -> bool {
    let word = key.split(['.', '[']).next().unwrap_or(key);
    ["source", "vision", "projector", "deliver", "language", "adapter"].contains(&word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_name_the_key_and_both_values() {
        let old =
            flatten_toml("output_dir = 'a'\n[stage.sft]\nlr = 1e-3\nadapters = [{ lora = { rank = 8 } }]").unwrap();
        let new = flatten_toml(
            "output_dir = 'b'\n[stage.sft]\nlr = 2e-3\nadapters = [{ lora = { rank = 8 } }]\nmax_steps = 3\n\
             activations = 'recompute'\nrecompute = ['language.*']\neval = ['x']\n\
             checkpoint = { every_steps = 5, keep = 1 }\n[eval.x]\nmetric = 'loss'",
        )
        .unwrap();
        assert_eq!(
            changes(&old, &new),
            ["stage.sft.lr: was 0.001, is 0.002", "stage.sft.max_steps: was (absent), is 3"]
        );
        assert!(changes(&old, &old).is_empty());
    }

    #[test]
    fn of_a_finished_stage_the_model_is_told_from_the_training() {
        let recipe = |more: &str| -> Recipe {
            let text = format!(
                "stages = ['a', 'b']\noutput_dir = 'run'\n[model]\nsource = 'm'\n[stage.a]\ntrain = ['projector.*']\n\
                 data = [{{ path = 'x' }}]\nbatch = {{ global = 2 }}\nlr = 1e-3\n[stage.b]\ndata = [{{ path = 'x' }}]\nbatch = {{ global = 2 }}\nlr = 1e-3\n{more}"
            );
            toml::from_str(&text).unwrap()
        };
        let lora = |alpha: &str| {
            recipe(&format!("adapters = [{{ lora = {{ rank = 4, alpha = {alpha}, target = ['language.*'] }} }}]"))
        };
        let (old, new) = (lora("8"), lora("16"));
        let a = of_finished(&old, &new, "a").unwrap();
        assert!(a.model.is_empty() && a.training.is_empty(), "{a:?}");
        let b = of_finished(&old, &new, "b").unwrap();
        assert_eq!(b.model, ["stage.b.adapters[0].lora.alpha: was 8.0, is 16.0"]);
        let mut new = old.clone();
        new.stage.get_mut("a").unwrap().lr = 1.0;
        new.model.source = Some("n".into());
        let a = of_finished(&old, &new, "a").unwrap();
        assert_eq!((a.model.len(), a.training), (1, vec!["stage.a.lr: was 0.001, is 1.0".to_string()]));
        assert!(of_finished(&old, &new, "b").unwrap().training.is_empty());
    }
}
