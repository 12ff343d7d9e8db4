//! A run: stages in order, hand-over between them, the run directory, resume.
//!
//! Every stage starts from what its parent stage left in the run directory, so that a resumed run and an unbroken one
//! compute the same bits.

pub mod align;
pub mod assemble;
pub mod check;
pub mod checkpoints;
pub mod components;
mod costs;
mod date;
pub mod doubts;
pub mod evaluation;
pub mod export;
pub mod freeze;
mod grids;
pub mod health;
pub mod memory;
pub mod merge;
pub mod newline;
pub mod pictures;
pub mod positions;
pub mod reference;
pub mod rescue;
pub mod run_dir;
pub mod selftest;
pub mod signals;
pub mod stage;
pub mod state;
pub mod steps;

use crate::bail;
use crate::checkpoint::sums;
use crate::data::{Sight, synth};
use crate::error::near::suggestion;
use crate::error::{Context, Result};
use crate::model::init::Place;
use crate::model::weights;
use crate::report::Reporter;
use crate::spec::{DType, HandOver, Recipe, SynthKind};
use assemble::{Assembly, assemble, sight};
use costs::Costs;
use evaluation::Evaluations;
use pictures::Pictures;
use run_dir::{Inputs, Read, RunDir, refuse_others};
use signals::Signals;
use stage::{Run, check_reachable, dataset, optimizer, run_stage, step_counts};
use state::{State, hand_over, lineage, parent};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// How a recipe is run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where to compute, and in which type.
    pub place: Place,
    /// Run only these stages.
    pub stages: Vec<String>,
    /// Go on although recipe or inputs differ from what the run directory says.
    pub allow_changes: bool,
    /// What may ask the run to stop.
    pub signals: Signals,
}

impl Default for Options {
    fn default() -> Self {
        Self { place: Place::cpu(), stages: Vec::new(), allow_changes: false, signals: Signals::default() }
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Finished,
    /// A signal asked for it; a checkpoint is written, and the same command goes on.
    Stopped,
}

/// Runs the stages of a recipe in order; finished ones are skipped, a broken one goes on from its newest checkpoint.
pub fn train(recipe: &Recipe, options: &Options, reporter: &Reporter) -> Result<Outcome> {
    let wanted = chosen_stages(recipe, options)?;
    reading(reporter, OF_THE_RUN, || refuse_others(&recipe.output_dir, recipe))?;
    make_data(recipe, reporter)?;
    let mut assembly = loading(reporter, || assemble(recipe, &options.place))?;
    let recipe = &date::kept(recipe, &mut assembly)?;
    assembly.warnings.iter().chain(&assembly.begins).for_each(|w| reporter.warn(w));
    let Survey { inputs, shown, costs } = survey(recipe, &mut assembly, reporter)?;
    assembly.encoder.notices().iter().for_each(|w| reporter.warn(w));
    for name in &recipe.stages {
        newline::warnings(recipe, &mut assembly, name)?.iter().for_each(|w| reporter.warn(w));
    }
    let open = || RunDir::open(&recipe.output_dir, recipe, &inputs, options.allow_changes);
    let (dir, warnings) = reading(reporter, OF_THE_RUN, open)?;
    warnings.iter().for_each(|w| reporter.warn(w));
    let (mut coming, mut plan) = (BTreeSet::new(), Vec::new());
    for name in &wanted {
        if dir.done(recipe, name)?.is_none() {
            plan.extend(costs.of(recipe, name));
            coming.insert(format!("stage.{name}"));
            coming.extend(recipe.stage[*name].eval.iter().map(|e| format!("eval.{e}")));
        }
    }
    reporter.plan(plan);
    shown.prove(&coming, assembly.images.as_ref(), reporter)?;
    let mut at: Option<(String, State)> = None;
    let mut nothing_to_do = true;
    for name in wanted.iter().copied() {
        if let Some(done) = dir.done(recipe, name)? {
            reporter.info(&format!("{name}: done ({} steps, loss {:.4})", done.steps, done.loss));
            dir.outdated(recipe, name, &done)?.iter().for_each(|w| reporter.warn(w));
            continue;
        }
        nothing_to_do = false;
        let mut state = start(recipe, &dir, &mut assembly, at.take(), name, reporter)?;
        let encoder = assembly.encoder.seeing(sight(&state.vlm)?);
        let evals = Evaluations::load(recipe, &recipe.stage[name], &encoder)?;
        let run = Run {
            recipe,
            dir: &dir,
            encoder: &encoder,
            images: assembly.images.as_ref(),
            tokenizer: &assembly.tokenizer_dir,
            reporter,
            signals: &options.signals,
        };
        if run_stage(&run, &mut state, name, &evals)?.is_none() {
            return Ok(Outcome::Stopped);
        }
        for table in evaluation::tables(recipe, &dir.results()?)? {
            reporter.table(&table);
        }
        let mut later = wanted.iter().skip_while(|w| **w != name).skip(1);
        let more = later.any(|s| !matches!(dir.done(recipe, s), Ok(Some(_))));
        if more && options.signals.asked() {
            reporter.info(&format!("asked to stop, stopped behind {name}; the same command goes on from there"));
            return Ok(Outcome::Stopped);
        }
        at = Some((name.to_string(), state));
    }
    dir.settle()?;
    dir.prove_whole()?;
    let what = if nothing_to_do { "nothing to do: the run is finished and lies in" } else { "the run is in" };
    reporter.info(&format!("{what} {}", dir.root().display()));
    Ok(Outcome::Finished)
}

/// Name of the bar while the run's own files are proved.
const OF_THE_RUN: &str = "checksums of the run";

/// Loads weights and proves them by their checksums, with a bar.
pub fn loading<T>(reporter: &Reporter, load: impl FnOnce() -> T) -> T {
    reading(reporter, "loading weights", load)
}

/// Does `work` with a bar of the bytes that it loads or takes checksums of.
fn reading<T>(reporter: &Reporter, name: &str, work: impl FnOnce() -> T) -> T {
    let so_far = || {
        let (loaded, hashed) = (weights::progress::so_far(), sums::so_far());
        (loaded.0 + hashed.0, loaded.1 + hashed.1)
    };
    let before = so_far();
    let poll = || {
        let now = so_far();
        (now.0 - before.0, now.1 - before.1)
    };
    reporter.watch(name, poll, work)
}

/// The state in which stage `name` starts: that of its parent, from memory if it has just run, else from the run directory.
fn start(
    recipe: &Recipe,
    dir: &RunDir,
    assembly: &mut Assembly,
    at: Option<(String, State)>,
    name: &str,
    reporter: &Reporter,
) -> Result<State> {
    let before = parent(recipe, name)?;
    let mut state = match (before, at) {
        (Some(p), Some((done, state))) if p == done => state,
        (Some(p), _) => loading(reporter, || restore(recipe, dir, assembly, p))?,
        (None, _) => loading(reporter, || fresh_state(recipe, assembly))?,
    };
    merge::measured(recipe, &mut state, name, assembly, reporter, dir).with_context(|| format!("stage.{name}"))?;
    Ok(state)
}

/// The model as a finished stage left it: built by the recipe that the stage was trained with.
pub fn restore(recipe: &Recipe, dir: &RunDir, assembly: &mut Assembly, stage: &str) -> Result<State> {
    let folder = dir.finished(recipe, stage)?;
    let kept = dir.recipe_of(recipe, stage)?;
    let mut state = fresh_state(recipe, assembly)?;
    for ancestor in lineage(&kept, stage)? {
        state.enter(&kept.stage[ancestor], ancestor).with_context(|| format!("stage.{ancestor}"))?;
    }
    state.load(&folder)?;
    Ok(state)
}

/// The model as loaded, before any stage. The backbones in `assembly` are handed over once and read again after that.
fn fresh_state(recipe: &Recipe, assembly: &mut Assembly) -> Result<State> {
    if assembly.used {
        *assembly = assemble(recipe, &assembly.place)?;
    }
    assembly.used = true;
    Ok(State::new(assembly.vlm.clone(), assembly.start_adapter.clone()))
}

fn chosen_stages<'a>(recipe: &'a Recipe, options: &Options) -> Result<Vec<&'a str>> {
    if let Some(unknown) = options.stages.iter().find(|s| !recipe.stages.contains(s)) {
        bail!("--stages: the recipe has no stage `{unknown}`"; "{}", suggestion(unknown, &names(recipe)))
    }
    let all = recipe.stages.iter().map(String::as_str);
    Ok(all.filter(|s| options.stages.is_empty() || options.stages.iter().any(|o| o == s)).collect())
}

fn names(recipe: &Recipe) -> Vec<&str> {
    recipe.stages.iter().map(String::as_str).collect()
}

/// Makes the built-in data that the recipe asks for, unless it is there.
pub fn make_data(recipe: &Recipe, reporter: &Reporter) -> Result<()> {
    for (name, s) in &recipe.synth {
        let SynthKind::Shapes = s.kind;
        if synth::is_complete(&s.out, s.n, s.seed)? {
            continue;
        }
        reporter.info(&format!("making {} pictures of shapes in {}", s.n, s.out.display()));
        synth::shapes(&s.out, s.n, s.seed).with_context(|| format!("synth.{name}"))?;
    }
    Ok(())
}

/// What is known of a run before it begins.
struct Survey {
    /// Checksums of everything that it reads.
    inputs: Inputs,
    /// The pictures that it shows.
    shown: Pictures,
    costs: Costs,
}

/// Goes through all stages without training, so that a mistake in the last one is found before the first one runs.
fn survey(recipe: &Recipe, assembly: &mut Assembly, reporter: &Reporter) -> Result<Survey> {
    let mut read = Read { files: assembly.files.iter().cloned().collect(), ..Read::default() };
    let mut evaluated = Read::default();
    let mut evals: BTreeSet<(&String, usize)> = BTreeSet::new();
    let mut sights: Vec<Option<Sight>> = Vec::new();
    let mut ends: BTreeMap<&str, State> = BTreeMap::new();
    let (mut shown, mut costs) = (Pictures::default(), Costs::default());
    for name in &recipe.stages {
        let stage = &recipe.stage[name];
        let mut visit = || -> Result<()> {
            let before = parent(recipe, name)?.and_then(|p| ends.get(p)).cloned();
            let mut state = before.unwrap_or_else(|| State::new(assembly.vlm.clone(), assembly.start_adapter.clone()));
            state.enter(stage, name)?;
            let see = sight(&state.vlm)?;
            let data = dataset(recipe, stage, &assembly.encoder.seeing(see))?;
            check_reachable(&state, &data)?;
            align::samples(stage, &state, &data)?;
            let at = sights.iter().position(|s| *s == see).unwrap_or_else(|| {
                sights.push(see);
                sights.len() - 1
            });
            evals.extend(stage.eval.iter().map(|e| (e, at)));
            let steps = step_counts(stage, data.items.len()).0;
            let optimizer = optimizer(stage, name, &state, steps)?;
            let doubts = doubts::of_stage(&data, &assembly.encoder, &optimizer)?;
            doubts.iter().for_each(|w| reporter.warn(&format!("stage.{name}: {w}")));
            costs.add_stage(stage, name, &data, steps);
            shown.add(&format!("stage.{name}"), &data, pictures::shown(&data, stage, name, steps)?);
            read.pictures.extend(data.images().into_iter().map(|i| i.path.clone()));
            ends.insert(name, state);
            Ok(())
        };
        visit().with_context(|| format!("stage.{name}"))?;
        // A merge works in place, on weights that all copies of the model share: they are read again.
        assembly.used |= hand_over(stage) == HandOver::Merge;
        read.files.extend(stage.data.iter().map(|d| d.path.clone()));
    }
    let mut told = BTreeSet::new();
    for (name, at) in evals {
        let (eval, encoder) = (&recipe.eval[name], assembly.encoder.seeing(sights[at]));
        let data = evaluation::dataset(recipe, eval, &encoder).with_context(|| format!("eval.{name}"))?;
        for w in doubts::of_evaluation(eval, &data, &encoder).with_context(|| format!("eval.{name}"))? {
            let w = format!("eval.{name}: {w}");
            if told.insert(w.clone()) {
                reporter.warn(&w);
            }
        }
        evaluated.pictures.extend(data.images().into_iter().map(|i| i.path.clone()));
        shown.add_all(&format!("eval.{name}"), &data);
        costs.add_eval(eval, name, &data);
        evaluated.files.extend(eval.data.iter().map(|d| d.path.clone()));
    }
    let mut inputs = Inputs::new(&assembly.sources, &read, &evaluated, reporter)?;
    if assembly.place.dtype != candle_core::DType::F32 {
        inputs.sums.insert("model.dtype".to_string(), assembly.place.dtype.as_str().to_string());
    }
    Ok(Survey { inputs, shown, costs })
}

/// A finished stage of a run, for `generate` and `score`.
pub struct Opened {
    /// With which the stage was trained.
    pub recipe: Recipe,
    /// The stage's name.
    pub stage: String,
    pub assembly: Assembly,
    /// The model as the stage left it.
    pub state: State,
}

/// Opens the last finished stage of a run, or the one named; `place` says where it computes, given the recipe's type.
pub fn open_run(root: &Path, stage: Option<&str>, place: impl FnOnce(DType) -> Place) -> Result<Opened> {
    let dir = RunDir::existing(root)?;
    let now = dir.recipe()?;
    let mut found = None;
    for s in &now.stages {
        if let (None, Some(path)) = (stage, dir.done_is_missing(&now, s)?) {
            bail!("{} is missing, though stage `{s}` has been finished", path.display();
                "copy it back; or run `adfreeze train` again, which finishes the stage; or name another with --stage")
        }
        if dir.done(&now, s)?.is_some() && stage.is_none_or(|wanted| wanted == s) {
            found = Some(s.clone());
        }
    }
    let Some(name) = found else {
        match stage.filter(|s| !now.stages.iter().any(|r| r == s)) {
            Some(unknown) => {
                bail!("the run {} has no stage `{unknown}`", root.display(); "{}", suggestion(unknown, &names(&now)))
            }
            None => {
                bail!("{} has no finished stage{}", root.display(), stage.map_or(String::new(), |s| format!(" `{s}`")); "train it first")
            }
        }
    };
    let recipe = dir.recipe_of(&now, &name)?;
    let mut assembly = assemble(&recipe, &place(recipe.model.dtype))?;
    let state = restore(&now, &dir, &mut assembly, &name)?;
    Ok(Opened { recipe, stage: name, assembly, state })
}
