//! One stage: data, optimizer, steps, checkpoints, and what is written at its end.

use super::align::{self, Alignment};
use super::checkpoints::{self, Progress};
use super::components::{self, Training};
use super::evaluation::{Evaluations, Kept, cut_answers};
use super::export::{base_model, only_here, write_final};
use super::freeze;
use super::health::{self, Sizes};
use super::loading;
use super::memory;
use super::positions;
use super::reference;
use super::rescue;
use super::run_dir::{Done, RunDir, tidy};
use super::signals::Signals;
use super::state::State;
use super::steps::{Steps, also};
use crate::bail;
use crate::data::{Dataset, ImageProcessor, Item, Plan, TextEncoder};
use crate::error::{Context, Result};
use crate::model::params::Module;
use crate::optim::AdamW;
use crate::report::Reporter;
use crate::spec::{Objective, Optimizer, Recipe, Stage};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

/// What all stages of a run share.
pub struct Run<'a> {
    pub recipe: &'a Recipe,
    pub dir: &'a RunDir,
    /// Sees pictures as the stage does.
    pub encoder: &'a TextEncoder,
    pub images: Option<&'a ImageProcessor>,
    /// Folder or file of the tokenizer, whose files go with an exported language model.
    pub tokenizer: &'a Path,
    pub reporter: &'a Reporter,
    pub signals: &'a Signals,
}

/// The samples of a stage, as its objective takes them.
pub fn dataset(recipe: &Recipe, stage: &Stage, encoder: &TextEncoder) -> Result<Dataset> {
    match stage.objective {
        Objective::Sft => Dataset::conversations(&stage.data, encoder, recipe.model.template),
        Objective::Dpo(_) => Dataset::preferences(&stage.data, encoder, recipe.model.template),
    }
}

/// Optimizer steps of a stage, and of one epoch of it.
pub fn step_counts(stage: &Stage, items: usize) -> (usize, usize) {
    let epoch = items.div_ceil(stage.batch.global.max(1));
    let total = stage.max_steps.unwrap_or_else(|| Plan::steps_for(items, stage.epochs, stage.batch.global));
    (total, epoch)
}

/// A fresh optimizer for what trains in an entered stage.
pub fn optimizer(stage: &Stage, name: &str, state: &State, total: usize) -> Result<AdamW> {
    let shapes = state.vlm.trainable().into_iter().map(|(n, t)| (n, t.dims().to_vec())).collect();
    AdamW::of_stage(stage, name, total, &shapes, &state.vlm.distances(), &state.lr_factors())
}

/// Trains one stage from the state it is given (already entered), or goes on from its newest checkpoint; `None` if a
/// signal asked it to stop on the way.
pub fn run_stage(run: &Run, state: &mut State, name: &str, evals: &Evaluations) -> Result<Option<Done>> {
    let _span = tracing::info_span!("stage", name).entered();
    let stage = &run.recipe.stage[name];
    let dir = run.dir.stage(run.recipe, name);
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    let folders = [dir.clone(), checkpoints::folder(&dir)];
    folders.iter().filter(|d| d.is_dir()).try_for_each(|d| tidy(d))?;
    let data = Arc::new(dataset(run.recipe, stage, run.encoder)?);
    check_reachable(state, &data).with_context(|| format!("stage.{name}"))?;
    positions::warning(&format!("stage.{name}"), &state.vlm, &data.items).iter().for_each(|w| run.reporter.warn(w));
    masters(stage, state)?;
    let frozen = freeze::frozen_checksums(state)?;

    let (total, epoch) = step_counts(stage, data.items.len());
    let mut optimizer = optimizer(stage, name, state, total).with_context(|| format!("stage.{name}"))?;
    let plan = Plan::new(&data, &stage.batch, stage.seed, name, total)?;
    tell_parts(run, state, name, &data, &plan, &optimizer, total)?;
    let start = health::sizes(&state.vlm.trainable())?;
    let path = dir.join("reference.safetensors");
    let weights = |state: &mut State| freeze::digest(state, &frozen);
    let Some(reference) =
        reference::table(run, state, stage, &data, &path, weights).with_context(|| format!("stage.{name}"))?
    else {
        return Ok(None);
    };
    let looked_at = align::samples(stage, state, &data).with_context(|| format!("stage.{name}"))?;
    let before = match looked_at.is_empty() {
        true => None,
        false => Some(align::look(run, stage, state, &looked_at).with_context(|| format!("stage.{name}"))?),
    };
    let from = loading(run.reporter, || checkpoints::resume(&dir, state, &mut optimizer, |w| run.reporter.warn(w)))?;
    prove_resumable(run, name, &from, total)?;
    // The checkpoint may be from before `stochastic_rounding` was changed.
    masters(stage, state)?;
    let steps = Steps { run, name, dir: &dir, data: &data, reference: &reference, start: &start, total, epoch };
    let advise = |e| rescue::advise(e, run.dir.root(), name, &dir, &start);
    // Until the stage is done, the newest checkpoint may be far behind what has been trained.
    let _deferred = run.signals.defer("finishing the stage; what it has trained is saved");
    let Some(loss) = steps.make(state, plan, &mut optimizer, from).map_err(advise)? else {
        return Ok(None);
    };

    let ended = Ended { run, stage, name, dir: &dir, start: &start, frozen, loss, total };
    match ended.finish(state, evals, &looked_at, before) {
        Ok(Some(done)) => Ok(Some(done)),
        Ok(None) => steps.save_last(state, &optimizer, loss).map(|()| None),
        Err(e) if e.has_diverged() => Err(advise(e)),
        // What was trained is not lost with what could not be evaluated or written.
        Err(e) => Err(match steps.save_last(state, &optimizer, loss) {
            Ok(()) => also(e, "all steps are saved; the same command goes on behind them".to_string()),
            Err(why) => also(e, format!("the last steps could not be saved ({why})")),
        }),
    }
}

/// A stage whose steps are made.
struct Ended<'a> {
    run: &'a Run<'a>,
    stage: &'a Stage,
    name: &'a str,
    dir: &'a Path,
    /// Sizes of what trains, at the stage's start.
    start: &'a Sizes,
    /// Checksums of the frozen parameters at the stage's start.
    frozen: BTreeMap<String, String>,
    loss: f64,
    total: usize,
}

impl Ended<'_> {
    /// Proves, evaluates and writes what the stage leaves; `None` if a signal asked to stop on the way.
    fn finish(
        self,
        state: &mut State,
        evals: &Evaluations,
        looked_at: &[&Item],
        before: Option<Alignment>,
    ) -> Result<Option<Done>> {
        let Self { run, stage, name, dir, start, frozen, loss, total } = self;
        let last = || format!("{name}, after its last step");
        let sizes = health::sizes(&state.vlm.trainable())?;
        freeze::prove_finite(&sizes).with_context(last)?;
        let unchanged = freeze::prove_frozen(state, &frozen)?;
        // First, because a model that has broken gives no figures, and then leaves nothing that looks finished.
        let kept = Kept::open(dir, if evals.is_empty() { String::new() } else { freeze::digest(state, &frozen)? });
        let figures = evals
            .run(run, &state.vlm, kept)
            .map_err(|e| freeze::name_broken(&state.vlm, e, |_| ()))
            .with_context(last)?;
        let Some(mut figures) = figures else { return Ok(None) };
        cut_answers(run.recipe, &figures).iter().for_each(|w| run.reporter.warn(&format!("{}: {w}", last())));
        if let (Some(before), Some(check)) = (before, &stage.align_check) {
            let after = align::look(run, stage, state, looked_at).with_context(last)?;
            figures.insert(align::NAME.to_string(), align::figures(&before, &after));
            run.reporter.table(&align::table(name, &before, &after));
            align::warning(name, check, &before, &after).iter().for_each(|w| run.reporter.warn(w));
        }
        if let Some(grown) = health::exploded(start, &sizes) {
            run.reporter.warn(&format!("{}: {}", last(), health::told(&grown)));
        }
        run.dir.prove_there(dir)?;
        let base_model = base_model(run.recipe);
        let trained_sha256 =
            write_final(state, &dir.join("final"), base_model, run.tokenizer, run.images, run.encoder)?;
        if run.recipe.stages.last().is_some_and(|last| last == name) {
            only_here(base_model, state).iter().for_each(|w| run.reporter.warn(w));
        }
        run.dir.prove_whole()?;
        let done = Done {
            stage: name.to_string(),
            steps: total,
            loss,
            frozen_unchanged: unchanged,
            trained_sha256,
            started_from: run.dir.before(run.recipe, name)?,
            metrics_sha256: Some(run.dir.metrics_sha256(name, total)?),
        };
        Kept::remove(dir)?;
        run.dir.finish(run.recipe, &done, serde_json::to_value(&figures)?)?;
        Ok(Some(done))
    }
}

/// A stage cannot end before the step that its checkpoint is of, and its metrics must be those that led there.
fn prove_resumable(run: &Run, name: &str, from: &Progress, total: usize) -> Result<()> {
    if from.steps > total {
        let key = if run.recipe.stage[name].max_steps.is_some() { "max_steps" } else { "epochs" };
        bail!("stage.{name}: {key} ends the stage after {total} steps, but its checkpoint is of step {}: {} steps lie behind it already",
            from.steps, from.steps;
            "set max_steps = {} or more; or delete {} to begin the stage again",
            from.steps, run.dir.stage(run.recipe, name).display())
    }
    if let Some(sum) = &from.metrics_sha256 {
        run.dir.prove_metrics(name, from.steps, sum)?.iter().for_each(|w| run.reporter.warn(w));
    }
    Ok(())
}

/// What trains in bf16 gets an f32 master; under stochastic rounding the backbones' parameters have none, while adapters and
/// projector, which are small, keep theirs.
fn masters(stage: &Stage, state: &mut State) -> Result<()> {
    let Optimizer::Adamw(adamw) = &stage.optimizer;
    if adamw.stochastic_rounding {
        return state.vlm.drop_masters(|p| p.role.is_backbone());
    }
    state.vlm.make_masters()
}

/// Pictures must be seen, and every trained parameter must be one that a gradient of these samples can reach.
pub fn check_reachable(state: &State, data: &Dataset) -> Result<()> {
    let images = data.images();
    if !images.is_empty() && state.vlm.is_blind() {
        bail!("the data has pictures, but no cross_attention adapter reads the visual tokens";
            "declare one under `adapters` here or in a stage that this one starts from, or set model.deliver = \"splice\"")
    }
    let mut lost = state.vlm.unreachable(!images.is_empty());
    let newline = state.vlm.newline.as_ref().filter(|p| p.trainable && images.iter().all(|i| i.tiles.is_none()));
    if let (Some(p), false) = (newline, images.is_empty()) {
        lost.push((p.name.clone(), "no picture of this stage is in tiles (resize = \"anyres\")".to_string()));
    }
    if lost.is_empty() {
        return Ok(());
    }
    let lines: Vec<String> = lost.iter().take(6).map(|(n, why)| format!("{n}: {why}")).collect();
    let more =
        if lost.len() > lines.len() { format!("\n  … and {} more", lost.len() - lines.len()) } else { String::new() };
    bail!("it trains parameters that no gradient can reach:\n  {}{more}", lines.join("\n  ");
        "exclude them in `train` with a `!pattern` in front, or in the adapter's `target`; an adapter as a whole is kept as it is by freeze = true, or by from = {{ stage = …, adapters = \"stack\" }}")
}

/// Prints what the stage consists of and costs, and writes it down.
fn tell_parts(
    run: &Run,
    state: &mut State,
    name: &str,
    data: &Dataset,
    plan: &Plan,
    optimizer: &AdamW,
    total: usize,
) -> Result<()> {
    let stage = &run.recipe.stage[name];
    let loads = memory::loads(data, plan, 0..total, micro(stage), state.vlm.prefix_rows());
    // Masters have been made, so that every one stands in the model.
    let rows = components::rows(state, &Training { stage, optimizer, loads: &loads, masters: &BTreeSet::new() })?;
    let (dir, rows_json) = (run.dir.stage(run.recipe, name), serde_json::to_string_pretty(&rows)?);
    let recipe = crate::recipe::to_toml(run.recipe)?;
    run.dir
        .write(&[(&dir.join("recipe.toml"), recipe.as_bytes()), (&dir.join("params.json"), rows_json.as_bytes())])?;
    let (kept, _) = memory::of_stage(stage, state, &loads, optimizer, None)?;
    run.reporter.table(&components::table(&format!("stage {name}: parameters"), &rows, kept));
    run.reporter.info(&components::notes(&state.vlm, &rows, &loads, kept)?);
    Ok(())
}

/// Samples of a forward pass.
pub fn micro(stage: &Stage) -> usize {
    stage.batch.micro.unwrap_or(stage.batch.global)
}
