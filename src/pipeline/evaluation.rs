//! A run's held-out evaluations: their data, encoded and decoded once, and the table of all figures so far.

use crate::data::{Dataset, ImageProcessor, Pixels, TextEncoder, load_pixels};
use crate::error::{Context, Result};
use crate::model::vlm::Vlm;
use crate::recipe::schema::{Eval, Metric, Recipe};
use crate::report::Table;
use crate::train::evaluate::{Evaluation, Figures, evaluate};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

/// The samples of an evaluation, as its metric takes them.
pub fn dataset(recipe: &Recipe, eval: &Eval, encoder: &TextEncoder) -> Result<Dataset> {
    match eval.metric {
        Metric::Preference => Dataset::preferences(&eval.data, encoder, recipe.model.template),
        _ => Dataset::conversations(&eval.data, encoder, recipe.model.template),
    }
}

/// Evaluations by name, ready to run.
pub struct Evaluations<'a> {
    recipe: &'a Recipe,
    data: BTreeMap<String, (Dataset, Pixels)>,
}

impl<'a> Evaluations<'a> {
    /// Loads the data of every evaluation that the named stages run.
    pub fn load(
        recipe: &'a Recipe,
        stages: &[&str],
        encoder: &TextEncoder,
        images: Option<&ImageProcessor>,
    ) -> Result<Self> {
        let wanted: BTreeSet<&String> =
            stages.iter().filter_map(|s| recipe.stage.get(*s)).flat_map(|s| &s.eval).collect();
        let mut data = BTreeMap::new();
        for name in wanted {
            let e = &recipe.eval[name];
            let load = || -> Result<(Dataset, Pixels)> {
                let set = dataset(recipe, e, encoder)?;
                let pixels = load_pixels(&set.items, images)?;
                Ok((set, pixels))
            };
            data.insert(name.clone(), load().with_context(|| format!("eval.{name}"))?);
        }
        Ok(Self { recipe, data })
    }

    /// Runs the named evaluations.
    pub fn run(&self, vlm: &Vlm, encoder: &TextEncoder, names: &[String]) -> Result<BTreeMap<String, Figures>> {
        let mut out = BTreeMap::new();
        for name in names {
            let (e, (set, pixels)) = (&self.recipe.eval[name], &self.data[name]);
            let eval =
                Evaluation { metric: e.metric, items: &set.items, pixels, pictures: &e.pictures, micro: e.micro };
            out.insert(name.clone(), evaluate(vlm, encoder, &eval).with_context(|| format!("eval.{name}"))?);
        }
        Ok(out)
    }
}

/// All figures of all stages so far, one row a figure, one column a stage.
pub fn table(recipe: &Recipe, results: &BTreeMap<String, Value>) -> Result<Option<Table>> {
    let mut columns = vec!["held out".to_string(), "n".to_string()];
    let mut rows: BTreeMap<(String, String), (usize, BTreeMap<usize, f64>)> = BTreeMap::new();
    let stages: Vec<&String> = recipe.stages.iter().filter(|s| results.contains_key(*s)).collect();
    for (i, stage) in stages.iter().enumerate() {
        columns.push(format!("after {stage}"));
        let figures: BTreeMap<String, Figures> = serde_json::from_value(results[*stage].clone())?;
        for (eval, f) in figures {
            for (name, v) in f.values {
                rows.entry((eval.clone(), name)).or_insert((f.n, BTreeMap::new())).1.insert(i, v);
            }
        }
    }
    if rows.is_empty() {
        return Ok(None);
    }
    let mut t = Table::new("held-out figures", columns);
    for ((eval, name), (n, values)) in rows {
        let mut row = vec![format!("{eval}: {name}"), n.to_string()];
        row.extend((0..stages.len()).map(|i| values.get(&i).map_or("-".to_string(), |v| show(&name, *v))));
        t.row(row);
    }
    Ok(Some(t))
}

/// Shares in percent, losses as they are.
fn show(name: &str, v: f64) -> String {
    if name.starts_with("loss") { format!("{v:.4}") } else { format!("{:.1} %", 100.0 * v) }
}
