//! Every projector and adapter on one task: a recipe's first two stages (for the quickstart, projector pretraining and SFT)
//! run once for each entry of [`ZOO`], through the pipeline itself, and the figures stand in one table.
//!
//! An entry is a run of its own below the given folder: what was stopped goes on, what is done is not run again.

use super::Output;
use crate::bail;
use crate::error::{Context, Error, Result};
use crate::model::init::Place;
use crate::pipeline::check::{self, Aim};
use crate::pipeline::run_dir::RunDir;
use crate::pipeline::signals::{End, Signals};
use crate::pipeline::{self, Options as RunOptions, Outcome};
use crate::recipe;
use crate::report::{Reporter, human};
use crate::spec::{DType, Deliver, Metric, Recipe, Stage};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// One way to connect the backbones, in the words of a recipe.
pub struct Entry {
    /// What is new in it.
    pub name: &'static str,
    /// `model.projector`; none: the recipe's own.
    projector: Option<&'static str>,
    /// Adapters of the second stage; none: the recipe's own.
    adapters: Option<&'static str>,
    /// An adapter of the first stage that the second one trains on: then visual tokens stand beside the text.
    beside: Option<&'static str>,
}

const fn projector(name: &'static str, projector: &'static str) -> Entry {
    Entry { name, projector: Some(projector), adapters: None, beside: None }
}

const fn adapters(name: &'static str, adapters: &'static str) -> Entry {
    Entry { name, projector: None, adapters: Some(adapters), beside: None }
}

const fn beside(name: &'static str, projector: Option<&'static str>, block: &'static str) -> Entry {
    Entry { name, projector, adapters: None, beside: Some(block) }
}

/// Projectors first, each with the recipe's low-rank updates; then what takes the place of those; then what looks at visual
/// tokens beside the text. Sizes are for backbones as small as the quickstart's.
pub const ZOO: &[Entry] = &[
    projector("linear", "{linear={}}"),
    projector("mlp", "{mlp={depth=2}}"),
    projector("mlp, norm", "{mlp={depth=2,norm=true}}"),
    projector("bottleneck", "{bottleneck={dim=48}}"),
    projector("pixel_shuffle", "{pixel_shuffle={factor=2,then={mlp={depth=2}}}}"),
    projector("perceiver", "{perceiver={queries=16,depth=2,heads=4,kv_heads=2,head_dim=24}}"),
    projector("resampler", "{resampler={queries=16,depth=2,heads=4,head_dim=24}}"),
    projector("qformer", "{qformer={queries=16,width=96,layers=4,heads=4,intermediate=256,dropout=0.0}}"),
    projector("visual_prefix", "{visual_prefix={tokens=8}}"),
    adapters("no adapter", "[]"),
    adapters(
        "lora, rslora",
        "[{lora={rank=16,alpha=8,rslora=true,target=[\"language.layers.*.{self_attn,mlp}.*_proj\"]}}]",
    ),
    adapters(
        "lora, dora",
        "[{lora={rank=16,alpha=32,dora=true,target=[\"language.layers.*.{self_attn,mlp}.*_proj\"]}}]",
    ),
    adapters("bottleneck adapter", "[{bottleneck={dim=32,target=[\"language.layers.*.{self_attn,mlp}\"]}}]"),
    adapters("prefix", "[{prefix={tokens=16}}]"),
    adapters("prefix, picture", "[{prefix={tokens=16,before=\"picture\"}}]"),
    beside("cross_attention, gated", None, "{cross_attention={name=\"eyes\",every=1,heads=4,head_dim=24,ff_mult=2}}"),
    beside(
        "cross_attention, resampler",
        Some("{resampler={queries=16,depth=2,heads=4,head_dim=24}}"),
        "{cross_attention={name=\"eyes\",every=1,heads=4,head_dim=24,ff_mult=2}}",
    ),
    beside(
        "cross_attention, post_norm",
        None,
        "{cross_attention={name=\"eyes\",every=2,heads=4,head_dim=24,form=\"post_norm\"}}",
    ),
];

/// What to run.
pub struct Options {
    /// The recipe; its first two stages are run.
    pub recipe: PathBuf,
    /// Further settings of the recipe, for every entry.
    pub sets: Vec<String>,
    /// The folder of all runs.
    pub out: PathBuf,
    /// Only entries whose name holds this.
    pub only: Option<String>,
}

impl Entry {
    /// The recipe of two stages with what is this entry's.
    fn of(&self, base: &Recipe, [first, second]: [&str; 2]) -> Result<Recipe> {
        let mut recipe = base.clone();
        if let Some(text) = self.projector {
            recipe.model.projector = Some(parse(text)?);
        }
        if let Some(text) = self.adapters {
            stage(&mut recipe, second)?.adapters = parse(text)?;
        }
        if let Some(text) = self.beside {
            recipe.model.deliver = Deliver::CrossAttention;
            stage(&mut recipe, first)?.adapters.push(parse(text)?);
        }
        recipe::validate(&recipe)?;
        Ok(recipe)
    }

    /// Its recipe, as it will run, of which all is known that can be known beforehand. What has run already is not looked at again.
    fn planned(&self, base: &Recipe, stages: [&str; 2], out: &Path, place: &Place) -> Result<Recipe> {
        let mut recipe = self.of(base, stages)?;
        recipe.output_dir = out.join(self.folder());
        let begun = recipe.output_dir.join("recipe.toml").exists();
        if !begun || RunDir::existing(&recipe.output_dir)?.done(&recipe, stages[1])?.is_none() {
            let dtype = if place.dtype == candle_core::DType::BF16 { DType::Bf16 } else { DType::F32 };
            let aim = Aim { dtype: Some(dtype), memory: None };
            check::check(&recipe, aim, &Reporter::silent(), &mut std::io::sink())?;
        }
        Ok(recipe)
    }

    /// Name of its folder.
    fn folder(&self) -> String {
        self.name.replace(", ", "-").replace(' ', "-")
    }
}

/// A value in the words of a recipe.
fn parse<T: DeserializeOwned>(text: &str) -> Result<T> {
    let broken = |e: toml::de::Error| Error::new(format!("`{text}` is not what a recipe says")).source(e);
    let mut table: toml::Table = toml::from_str(&format!("value = {text}")).map_err(broken)?;
    let value = table.remove("value").ok_or_else(|| Error::new("no value"))?;
    value.try_into().map_err(broken)
}

fn stage<'a>(recipe: &'a mut Recipe, name: &str) -> Result<&'a mut Stage> {
    recipe.stage.get_mut(name).ok_or_else(|| Error::new(format!("the recipe has no stage `{name}`")))
}

/// The recipe's first two stages alone, the second one's end with those of its evaluations that count exact matches.
fn first_two(mut recipe: Recipe) -> Result<Recipe> {
    let [first, second, ..] = recipe.stages.as_slice() else {
        bail!("the zoo needs a recipe of two stages"; "e.g. recipes/quickstart.toml")
    };
    let [first, second] = [first.clone(), second.clone()];
    recipe.stages.truncate(2);
    recipe.stage.retain(|name, _| *name == first || *name == second);
    stage(&mut recipe, &first)?.eval.clear();
    // Beside the text visual tokens need not resemble it: not every entry could be looked at.
    for name in [&first, &second] {
        stage(&mut recipe, name)?.align_check = None;
    }
    let evals = std::mem::take(&mut recipe.eval);
    let last = stage(&mut recipe, &second)?;
    last.eval.retain(|name| evals.get(name).is_some_and(|e| e.metric == Metric::ExactMatch));
    if last.eval.is_empty() {
        bail!("no exact matches are counted at the end of `{second}`"; "list an evaluation with metric = \"exact_match\" in its `eval`")
    }
    recipe.eval = evals;
    Ok(recipe)
}

/// What an entry came to.
#[derive(Debug, Serialize)]
struct Record<'a> {
    what: &'static str,
    entry: &'a str,
    /// Trained in the second stage.
    parameters: usize,
    /// Of one picture, seen at once, in the second stage.
    visual_tokens: usize,
    /// Medians.
    first_stage_step_s: f64,
    second_stage_step_s: f64,
    /// After the second stage, by evaluation.
    exact_match: Vec<(String, f64)>,
}

/// An entry that this recipe cannot have, e.g. pictures in tiles before a projector that keeps no places.
#[derive(Debug, Serialize)]
struct Cannot<'a> {
    what: &'static str,
    entry: &'a str,
    /// First line of the cause that is more than a count of problems.
    cannot: String,
}

impl<'a> Cannot<'a> {
    fn of(entry: &'a Entry, e: &Error) -> Self {
        let cause = e.to_string();
        let counts = |line: &str| line.contains(" problems") && line.ends_with(':');
        let mut lines = cause.lines().map(str::trim).filter(|l| !l.is_empty() && !counts(l));
        Self { what: "zoo", entry: entry.name, cannot: lines.next().unwrap_or_default().to_string() }
    }
}

/// Checks all entries, tells of those that cannot be, runs the others in order and tells of each as it ends.
///
/// # Errors
/// No entry that can be; a recipe of fewer than two stages or without an evaluation of exact matches at the second one's end;
/// `only` that names no entry; whatever stops a run.
pub fn run(options: &Options, place: &Place, reporter: &Reporter, out: &mut Output) -> Result<()> {
    let base = recipe::load(&options.recipe, &options.sets)?;
    let base = first_two(base).with_context(|| options.recipe.display())?;
    let [first, second] = [0, 1].map(|i| base.stages[i].as_str());
    let chosen: Vec<&Entry> =
        ZOO.iter().filter(|e| options.only.as_deref().is_none_or(|o| e.name.contains(o))).collect();
    if chosen.is_empty() {
        let names: Vec<&str> = ZOO.iter().map(|e| e.name).collect();
        bail!("--only: no entry's name holds `{}`", options.only.as_deref().unwrap_or_default(); "there are: {}", names.join("; "))
    }
    let (mut planned, mut refused) = (Vec::new(), None);
    for entry in chosen {
        match entry.planned(&base, [first, second], &options.out, place) {
            Ok(recipe) => planned.push((entry, recipe)),
            Err(e) => {
                let cannot = Cannot::of(entry, &e);
                out.record(&cannot, || format!("{:<26} cannot be: {}", cannot.entry, cannot.cannot))?;
                refused.get_or_insert(e.context(entry.name));
            }
        }
    }
    if let (true, Some(e)) = (planned.is_empty(), refused) {
        return Err(e);
    }
    let (signals, mut told) = (Signals::listen(End::GoesOn, |_| ())?, false);
    for (entry, recipe) in planned {
        reporter.info(&format!("{}: {}", entry.name, recipe.output_dir.display()));
        let run = RunOptions { place: place.clone(), signals: signals.clone(), ..RunOptions::default() };
        if pipeline::train(&recipe, &run, &Reporter::silent()).with_context(|| entry.name)? == Outcome::Stopped {
            bail!("stopped in entry `{}`", entry.name; "the same command goes on from there")
        }
        let record = record(entry, &recipe, [first, second]).with_context(|| entry.name)?;
        out.record(&record, || lines(&record, !std::mem::replace(&mut told, true)))?;
    }
    Ok(())
}

/// Reads the figures out of a finished run.
fn record<'a>(entry: &'a Entry, recipe: &Recipe, [first, second]: [&str; 2]) -> Result<Record<'a>> {
    let dir = RunDir::existing(&recipe.output_dir)?;
    #[derive(Deserialize)]
    struct Row {
        state: String,
        parameters: usize,
    }
    let rows = std::fs::read_to_string(dir.stage(recipe, second).join("params.json"))?;
    let rows: Vec<Row> = serde_json::from_str(&rows)?;
    let metrics = std::fs::read_to_string(dir.root().join("metrics.jsonl"))?;
    #[derive(Deserialize)]
    struct Step {
        stage: String,
        samples_per_s: f64,
    }
    let metrics: Vec<Step> = metrics.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
    let global = |stage: &str| recipe.stage[stage].batch.global as f64;
    let step = |stage: &str| {
        let mut all: Vec<f64> =
            metrics.iter().filter(|m| m.stage == stage).map(|m| global(stage) / m.samples_per_s).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied().ok_or_else(|| Error::new(format!("no step of `{stage}` was measured")))
    };
    let results = dir.results()?;
    let figures = results.get(second).and_then(|v| v.as_object()).into_iter().flatten();
    let exact = figures.filter_map(|(name, v)| Some((name.clone(), v.get("values")?.get("exact_match")?.as_f64()?)));
    Ok(Record {
        what: "zoo",
        entry: entry.name,
        parameters: rows.iter().filter(|r| r.state == "trains").map(|r| r.parameters).sum(),
        visual_tokens: visual_tokens(recipe, [first, second])?,
        first_stage_step_s: step(first)?,
        second_stage_step_s: step(second)?,
        exact_match: exact.collect(),
    })
}

/// Visual tokens of a picture seen at once, at the size of the second stage.
fn visual_tokens(recipe: &Recipe, stages: [&str; 2]) -> Result<usize> {
    let mut vlm = pipeline::assemble::assemble(recipe, &Place::cpu())?.vlm;
    for size in stages.iter().filter_map(|s| recipe.stage[*s].image_size) {
        vlm.set_image_size(size)?;
    }
    vlm.visual_tokens_per_image()
}

fn lines(r: &Record, head: bool) -> String {
    let mut text = String::new();
    if head {
        let names: Vec<String> = r.exact_match.iter().map(|(name, _)| format!("{name:>8}")).collect();
        text += &format!(
            "{:<26} {:>10} {:>7} {:>9} {:>9} {}\n",
            "",
            "parameters",
            "visual",
            "step 1",
            "step 2",
            names.join(" ")
        );
    }
    let exact: Vec<String> = r
        .exact_match
        .iter()
        .map(|(name, v)| format!("{:>width$}", human::percent(*v), width = name.len().max(8)))
        .collect();
    text + &format!(
        "{:<26} {:>10} {:>7} {:>9} {:>9} {}",
        r.entry,
        human::thousands(r.parameters as u64),
        r.visual_tokens,
        super::time(r.first_stage_step_s),
        super::time(r.second_stage_step_s),
        exact.join(" ")
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;

    #[test]
    fn every_entry_is_a_recipe_of_its_own() {
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes/quickstart.toml");
        let base = first_two(recipe::load(&file, &[]).unwrap()).unwrap();
        assert_eq!(
            (base.stages.len(), &base.stage["sft"].eval[..]),
            (2, &["seen".to_string(), "unseen".to_string()][..])
        );
        let mut seen = BTreeSet::new();
        for entry in ZOO {
            let recipe = entry.of(&base, ["align", "sft"]).unwrap_or_else(|e| panic!("{}: {}", entry.name, e.report()));
            assert!(seen.insert(recipe::to_toml(&recipe).unwrap()), "{}: there is the same already", entry.name);
            assert!(seen.insert(entry.folder()), "{}: there is the same folder already", entry.name);
        }
    }
}
