//! A run's held-out evaluations: their data, and the tables of the figures so far.

use super::reference::{KEEP_EVERY, fingerprint};
use super::run_dir::hex;
use super::stage::Run;
use crate::bail;
use crate::checkpoint::atomic::write_bytes;
use crate::data::{Dataset, Item, TextEncoder};
use crate::error::{Context, Result};
use crate::model::vlm::Vlm;
use crate::report::Table;
use crate::report::human::percent;
use crate::spec::{Eval, Metric, Recipe, Stage};
use crate::train::evaluate::{Evaluation, Figures, Outcomes, evaluate, samples_done, samples_of_all_passes};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// The samples of an evaluation, as its metric takes them, and those alone of which it can tell something. An error if the metric can tell nothing from them.
pub fn dataset(recipe: &Recipe, eval: &Eval, encoder: &TextEncoder) -> Result<Dataset> {
    if eval.metric == Metric::Preference {
        return Dataset::preferences(&eval.data, encoder, recipe.model.template);
    }
    let mut set = Dataset::conversations(&eval.data, encoder, recipe.model.template)?;
    let absent = set.items.iter().flat_map(Item::samples).any(|s| !s.absent.is_empty());
    if eval.metric == Metric::Hallucination && !absent {
        bail!("no sample names anything `absent`, so the hallucination rate is 0 whatever the model answers";
            "give the samples `absent`, a list of phrases that a truthful answer does not contain, or use another metric")
    }
    if eval.metric == Metric::Hallucination {
        set.items.retain(|i| i.samples().any(|s| !s.absent.is_empty()));
    }
    Ok(set)
}

/// What a stage evaluates, encoded as its model sees pictures; these are decoded as they are needed.
pub struct Evaluations<'a> {
    recipe: &'a Recipe,
    data: BTreeMap<&'a String, Dataset>,
}

impl<'a> Evaluations<'a> {
    /// The evaluations of `stage`; `encoder` sees pictures as it does.
    pub fn load(recipe: &'a Recipe, stage: &Stage, encoder: &TextEncoder) -> Result<Self> {
        let mut data = BTreeMap::new();
        for (name, eval) in recipe.eval.iter().filter(|(name, _)| stage.eval.contains(name)) {
            data.insert(name, dataset(recipe, eval, encoder).with_context(|| format!("eval.{name}"))?);
        }
        Ok(Self { recipe, data })
    }

    /// Is there none?
    pub fn is_empty(&self) -> bool {
        self.data.is_empty()
    }

    /// Runs them all, from where `kept` ends; `None` if a signal asked to stop on the way.
    pub fn run(&self, run: &Run, vlm: &Vlm, mut kept: Kept) -> Result<Option<BTreeMap<String, Figures>>> {
        let mut out = BTreeMap::new();
        let _deferred = run.signals.defer("finishing the batch; the evaluations so far are kept");
        for (name, set) in &self.data {
            let e = &self.recipe.eval[*name];
            let (items, pictures) = (&set.items[..], &e.pictures[..]);
            let eval = Evaluation {
                metric: e.metric,
                items,
                images: run.images,
                pictures,
                micro: e.micro,
                max_new_tokens: e.max_new_tokens,
            };
            let key = format!("{} {}", serde_json::to_string(e)?, fingerprint(set));
            let mut so_far = kept.take(name, &key);
            let progress = run.reporter.progress(format!("evaluation {name}"), samples_of_all_passes(&eval));
            let (before, all) = (samples_done(&eval, &so_far), samples_of_all_passes(&eval));
            if before > 0 && before < all {
                run.reporter.info(&format!("evaluation {name}: goes on after {before} of {all} samples"));
            }
            progress.skip(before);
            let started = Instant::now();
            let mut saved = started;
            let mut on = |n: usize, so_far: &Outcomes| {
                progress.inc(n);
                if saved.elapsed() > KEEP_EVERY {
                    kept.put(name, &key, so_far)?;
                    saved = Instant::now();
                }
                Ok(!run.signals.asked())
            };
            let figures = evaluate(vlm, run.encoder, &eval, &mut so_far, &mut on);
            let ended = matches!(figures, Ok(Some(_)));
            // What is computed fast is as fast computed again.
            if !ended || started.elapsed() > WORTH {
                kept.put(name, &key, &so_far)?;
            }
            match figures.with_context(|| format!("eval.{name}"))? {
                Some(figures) => out.insert((*name).clone(), figures),
                None => {
                    run.reporter
                        .info(&format!("asked to stop in evaluation {name}; the same command goes on from there"));
                    return Ok(None);
                }
            };
        }
        Ok(Some(out))
    }
}

/// How many answers had not ended where generation stops, of each evaluation that had some.
pub fn cut_answers(recipe: &Recipe, figures: &BTreeMap<String, Figures>) -> Vec<String> {
    let told = |(name, f): (&String, &Figures)| {
        let cut = f.values.iter().filter(|(k, _)| k.ends_with("/cut")).map(|(_, v)| *v).fold(0.0, f64::max);
        let (cut, limit) = ((cut * f.n as f64).round() as usize, recipe.eval.get(name)?.max_new_tokens);
        (cut > 0).then(|| {
            format!(
                "eval.{name}: {cut} of {} answers had not ended after max_new_tokens = {limit} (or at the model's last position), and what would come later is not counted: raise eval.{name}.max_new_tokens, unless they never end",
                f.n
            )
        })
    };
    figures.iter().filter_map(told).collect()
}

/// What evaluations have come to before they are all done, in a file of the stage's folder.
#[derive(Debug)]
pub struct Kept {
    path: PathBuf,
    /// Which weights are evaluated.
    weights: String,
    all: BTreeMap<String, Begun>,
}

/// An evaluation that has begun.
#[derive(Debug, Serialize, Deserialize)]
struct Begun {
    /// SHA-256 of the weights, the evaluation and its data, and of the outcomes.
    sha256: String,
    outcomes: Outcomes,
}

impl Kept {
    /// What was kept in `dir`; what cannot be read is computed again.
    pub fn open(dir: &Path, weights: String) -> Self {
        let path = dir.join(KEPT);
        let all = std::fs::read(&path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default();
        Self { path, weights, all }
    }

    /// Removes it.
    pub fn remove(dir: &Path) -> Result<()> {
        match std::fs::remove_file(dir.join(KEPT)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(e).with_context(|| dir.join(KEPT).display().to_string())
            }
            _ => Ok(()),
        }
    }

    fn take(&mut self, name: &str, key: &str) -> Outcomes {
        let found = self.all.remove(name);
        found.filter(|b| b.sha256 == self.sum(key, &b.outcomes)).map(|b| b.outcomes).unwrap_or_default()
    }

    fn put(&mut self, name: &str, key: &str, outcomes: &Outcomes) -> Result<()> {
        let sha256 = self.sum(key, outcomes);
        self.all.insert(name.to_string(), Begun { sha256, outcomes: outcomes.clone() });
        write_bytes(&self.path, serde_json::to_string(&self.all)?.as_bytes())
    }

    fn sum(&self, key: &str, outcomes: &Outcomes) -> String {
        let mut h = Sha256::new();
        h.update(format!("{} {key}", self.weights));
        for (pass, numbers) in outcomes {
            h.update(format!("{pass} {}", numbers.len()));
            numbers.iter().for_each(|x| h.update(x.to_le_bytes()));
        }
        hex(&h.finalize())
    }
}

/// See [`Kept`]; gone when the stage is done. Beside the checkpoint of the weights that are evaluated.
const KEPT: &str = "checkpoints/evaluations.json";

/// An evaluation that took longer is kept for a run that ends before its stage is done.
const WORTH: Duration = Duration::from_secs(5);

/// What a figure is called in the table; the order is that of the rows.
const ROWS: [(&str, &str); 15] = [
    ("loss", "loss"),
    ("loss/blank", "  every picture blank"),
    ("loss/shuffled", "  pictures shuffled"),
    ("exact_match", "exact match"),
    ("chance/uniform", "  chance: any answer of its kind"),
    ("chance/most_frequent", "  chance: the commonest of its kind"),
    ("exact_match/blank", "  every picture blank"),
    ("exact_match/shuffled", "  pictures shuffled"),
    ("hallucination", "hallucination rate"),
    ("hallucination/cut", "  answers that did not end in time"),
    ("hallucination/blank", "  every picture blank"),
    ("hallucination/shuffled", "  pictures shuffled"),
    ("preference", "preference accuracy"),
    ("preference/blank", "  every picture blank"),
    ("preference/shuffled", "  pictures shuffled"),
];

/// The headline figures of all stages so far (a row a figure, a column a stage), then the exact match of the newest stage by
/// kind of question. `results.json` holds every figure of every stage.
pub fn tables(recipe: &Recipe, results: &BTreeMap<String, Value>) -> Result<Vec<Table>> {
    let mut stages: Vec<(&String, BTreeMap<String, Figures>)> = Vec::new();
    for stage in recipe.stages.iter() {
        if let Some(figures) = results.get(stage) {
            stages.push((stage, serde_json::from_value(figures.clone())?));
        }
    }
    let mut names: Vec<&String> = Vec::new();
    for eval in recipe.stages.iter().flat_map(|s| &recipe.stage[s].eval) {
        if !names.contains(&eval) && stages.iter().any(|(_, f)| f.contains_key(eval)) {
            names.push(eval);
        }
    }
    let all = [headline(&stages, &names), by_category(&stages, &names)];
    Ok(all.into_iter().flatten().filter(|t| !t.rows.is_empty()).collect())
}

type OfStages<'a> = [(&'a String, BTreeMap<String, Figures>)];

fn headline(stages: &OfStages, evals: &[&String]) -> Option<Table> {
    let heads = ["held out".to_string(), "n".to_string()];
    let mut table =
        Table::new("held-out figures", heads.into_iter().chain(stages.iter().map(|(s, _)| format!("after {s}"))));
    for eval in evals {
        let of = |f: &BTreeMap<String, Figures>, figure: &str| f.get(*eval)?.values.get(figure).copied();
        let n = stages.iter().find_map(|(_, f)| f.get(*eval)).map_or(0, |f| f.n);
        for (figure, label) in ROWS {
            let values: Vec<Option<f64>> = stages.iter().map(|(_, f)| of(f, figure)).collect();
            if values.iter().all(Option::is_none) {
                continue;
            }
            let head = !label.starts_with(' ');
            let label = if head { format!("{eval}: {label}") } else { label.to_string() };
            let n = if head { n.to_string() } else { String::new() };
            let cells = values.iter().map(|v| v.map_or("-".to_string(), |v| show(figure, v)));
            table.row([label, n].into_iter().chain(cells));
        }
    }
    Some(table)
}

fn by_category(stages: &OfStages, evals: &[&String]) -> Option<Table> {
    let (stage, figures) = stages.last()?;
    let mut columns = vec!["kind"];
    let mut rows: BTreeMap<&str, BTreeMap<usize, f64>> = BTreeMap::new();
    for eval in evals {
        let Some(f) = figures.get(*eval) else { continue };
        let kinds = f.values.iter().filter_map(|(k, v)| Some((k.strip_prefix("exact_match/category/")?, *v)));
        let kinds: Vec<_> = kinds.collect();
        if !kinds.is_empty() {
            columns.push(eval);
            kinds.into_iter().for_each(|(k, v)| _ = rows.entry(k).or_default().insert(columns.len() - 2, v));
        }
    }
    let width = columns.len() - 1;
    let mut table = Table::new(format!("exact match after {stage}, by kind"), columns);
    for (kind, values) in rows {
        let cell = |i: usize| values.get(&i).map_or("-".to_string(), |v| show("exact_match", *v));
        table.row(std::iter::once(kind.to_string()).chain((0..width).map(cell)));
    }
    Some(table)
}

/// Shares in percent, losses as they are.
fn show(figure: &str, v: f64) -> String {
    if figure.starts_with("loss") { format!("{v:.4}") } else { percent(v) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn tables_put_the_headline_first_and_the_kinds_of_the_newest_stage_last() {
        let recipe = "stages = ['align', 'sft']\noutput_dir = 'x'\n[model]\n[model.language]\nsource = 'l'\n\
            [stage.align]\ntrain = ['*']\ndata = [{ path = 'a' }]\nbatch = { global = 1 }\nlr = 1e-3\neval = ['words', 'seen']\n\
            [stage.sft]\ntrain = ['*']\ndata = [{ path = 'a' }]\nbatch = { global = 1 }\nlr = 1e-3\neval = ['seen']\n\
            [eval.words]\nmetric = 'loss'\ndata = [{ path = 'a' }]\n[eval.seen]\nmetric = 'exact_match'\ndata = [{ path = 'a' }]\n";
        let recipe: Recipe = toml::from_str(recipe).unwrap();
        let seen = |hit: f64| {
            json!({ "n": 8, "values": { "exact_match": hit, "exact_match/blank": 0.25, "chance/uniform": 0.125,
                                        "exact_match/category/color": hit, "exact_match/category/where": 0.5 } })
        };
        assert!(tables(&recipe, &BTreeMap::new()).unwrap().is_empty());
        let results = BTreeMap::from([
            ("align".to_string(), json!({ "words": { "n": 4, "values": { "loss": 0.5 } }, "seen": seen(0.5) })),
            ("sft".to_string(), json!({ "seen": seen(0.875) })),
        ]);
        let text: Vec<String> = tables(&recipe, &results).unwrap().iter().map(Table::render).collect();
        assert_eq!(
            text[0].lines().map(|l| l.split_whitespace().collect::<Vec<_>>().join(" ")).collect::<Vec<_>>()[3..],
            [
                "words: loss 4 0.5000 -",
                "seen: exact match 8 50.0 % 87.5 %",
                "chance: any answer of its kind 12.5 % 12.5 %",
                "every picture blank 25.0 % 25.0 %"
            ]
        );
        assert!(text[1].starts_with("exact match after sft, by kind\nkind     seen\n"), "{}", text[1]);
        assert!(text[1].ends_with("color  87.5 %\nwhere  50.0 %\n"), "{}", text[1]);
    }
}
