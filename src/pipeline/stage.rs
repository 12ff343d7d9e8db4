//! One stage: data, optimizer, steps, checkpoints, and what is written at its end.

use super::align;
use super::checkpoints::{self, Progress};
use super::components::{self, Training};
use super::evaluation::Evaluations;
use super::export::write_final;
use super::freeze::{self, ExplosionWatch, GradientWatch};
use super::memory;
use super::run_dir::{Done, RunDir, hex, sha256_file};
use super::signals::Signals;
use super::state::{State, TRAINED, is_adapter};
use crate::bail;
use crate::checkpoint::atomic::{recover, write_bytes};
use crate::checkpoint::safetensors;
use crate::data::{Dataset, ImageProcessor, Item, Loader, LoaderOptions, Plan, TextEncoder, load_pixels};
use crate::error::{Context, Result};
use crate::model::params::Module;
use crate::model::vision::Tower;
use crate::model::vlm::Vlm;
use crate::ops::random::Key;
use crate::ops::tensor;
use crate::optim::{AdamW, Depths};
use crate::recipe::schema::{Objective, Optimizer, Recipe, Reference, Stage};
use crate::report::{MetricsFile, PreferenceMetrics, Reporter, StepMetrics};
use crate::train::step::{Computed, ReferenceTable, StepConfig, Task, compute, pair_logps};
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

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
pub fn optimizer(stage: &Stage, name: &str, state: &mut State, total: usize) -> Result<AdamW> {
    let shapes = state.vlm.trainable().into_iter().map(|(n, t)| (n, t.dims().to_vec())).collect();
    let vision = state.vlm.vision.as_ref().map_or(0, Tower::depth);
    let depths = Depths { vision, language: state.vlm.language.layers.len() };
    AdamW::of_stage(stage, name, total, &shapes, depths, &state.lr_factors())
}

/// Trains one stage from the state it is given (already entered), or goes on from its newest checkpoint; `None` if a
/// signal asked it to stop on the way.
pub fn run_stage(run: &Run, state: &mut State, name: &str, evals: &Evaluations) -> Result<Option<Done>> {
    let _span = tracing::info_span!("stage", name).entered();
    let stage = &run.recipe.stage[name];
    let dir = run.dir.stage(run.recipe, name);
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    tidy(&dir)?;
    let data = Arc::new(dataset(run.recipe, stage, run.encoder)?);
    check_reachable(state, &data).with_context(|| format!("stage.{name}"))?;
    masters(stage, state)?;
    let frozen = freeze::frozen_checksums(state)?;

    let (total, epoch) = step_counts(stage, data.items.len());
    let mut optimizer = optimizer(stage, name, state, total).with_context(|| format!("stage.{name}"))?;
    let plan = Plan::new(&data, &stage.batch, stage.seed, name, total)?;
    tell_parts(run, state, name, &data, &plan, &optimizer, total)?;
    let path = dir.join("reference.safetensors");
    let reference = reference_table(run, state, stage, &data, &path).with_context(|| format!("stage.{name}"))?;
    let looked_at = align::samples(stage, state, &data).with_context(|| format!("stage.{name}"))?;
    let before = match looked_at.is_empty() {
        true => None,
        false => Some(align::look(run, stage, state, &looked_at).with_context(|| format!("stage.{name}"))?),
    };
    let from = checkpoints::resume(&dir, state, &mut optimizer)?;
    // The checkpoint may be from before `stochastic_rounding` was changed.
    masters(stage, state)?;
    let Some(loss) = steps(run, state, name, &data, plan, &mut optimizer, &reference, (from, total, epoch), &dir)?
    else {
        return Ok(None);
    };

    freeze::prove_finite(&state.vlm.trainable()).with_context(|| format!("{name}, after its last step"))?;
    let unchanged = freeze::prove_frozen(state, &frozen)?;
    // First, because a model that has broken gives no figures, and then leaves nothing that looks finished.
    let mut figures = evals
        .run(&state.vlm, run.encoder, run.images)
        .map_err(|e| freeze::name_broken(&mut state.vlm, e, |_| ()))
        .with_context(|| format!("{name}, after its last step"))?;
    if let (Some(before), Some(check)) = (before, &stage.align_check) {
        let after =
            align::look(run, stage, state, &looked_at).with_context(|| format!("{name}, after its last step"))?;
        figures.insert(align::NAME.to_string(), align::figures(&before, &after));
        run.reporter.table(&align::table(name, &before, &after));
        align::warning(name, check, &before, &after).iter().for_each(|w| run.reporter.warn(w));
    }
    let last = dir.join("final");
    write_final(state, &last, run.tokenizer, run.images, run.encoder)?;
    run.dir.add_results(name, serde_json::to_value(&figures)?)?;
    let trained_sha256 = sha256_file(&last.join(TRAINED))?;
    let done = Done { stage: name.to_string(), steps: total, loss, frozen_unchanged: unchanged, trained_sha256 };
    write_bytes(&dir.join("done.json"), serde_json::to_string_pretty(&done)?.as_bytes())?;
    Ok(Some(done))
}

/// What trains in bf16 gets an f32 master; under stochastic rounding the backbones' parameters have none, while adapters and
/// projector, which are small, keep theirs.
fn masters(stage: &Stage, state: &mut State) -> Result<()> {
    let Optimizer::Adamw(adamw) = &stage.optimizer;
    if adamw.stochastic_rounding {
        return state.vlm.drop_masters(|name| !is_adapter(name) && !name.starts_with("projector."));
    }
    state.vlm.make_masters()
}

/// Removes what a killed process had begun to write.
fn tidy(dir: &Path) -> Result<()> {
    let folders = [dir.to_path_buf(), dir.join("checkpoints")];
    folders.iter().filter(|d| d.is_dir()).try_for_each(|d| recover(d).map(drop))
}

/// Pictures must be seen, and every trained parameter must be one that a gradient of these samples can reach.
pub fn check_reachable(state: &mut State, data: &Dataset) -> Result<()> {
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
    write_bytes(&run.dir.stage(run.recipe, name).join("params.json"), serde_json::to_string_pretty(&rows)?.as_bytes())?;
    let (kept, _) = memory::of_stage(stage, state, &loads, optimizer, None)?;
    run.reporter.table(&components::table(&format!("{name}: parameters"), &rows, kept));
    run.reporter.info(&components::notes(&state.vlm, &rows, &loads, kept)?);
    Ok(())
}

/// Samples of a forward pass.
pub fn micro(stage: &Stage) -> usize {
    stage.batch.micro.unwrap_or(stage.batch.global)
}

#[allow(clippy::too_many_arguments, reason = "all that a stage consists of")]
fn steps(
    run: &Run,
    state: &mut State,
    name: &str,
    data: &Arc<Dataset>,
    plan: Plan,
    optimizer: &mut AdamW,
    reference: &ReferenceTable,
    (from, total, epoch): (Progress, usize, usize),
    dir: &Path,
) -> Result<Option<f64>> {
    let first = from.steps;
    let stage = &run.recipe.stage[name];
    let micro = micro(stage);
    let (params, weights) = (state.vlm.trainable(), state.vlm.weights());
    let loads = memory::loads(data, &plan, first..total, micro, state.vlm.prefix_rows());
    let (kept, told) = memory::of_stage(stage, state, &loads, optimizer, None)?;
    let device = state.vlm.language.device().clone();
    told.iter().for_each(|line| run.reporter.info(line));
    let batches = (first..total).map(move |s| (s, plan.step(s)));
    let images = run.images.cloned().map(Arc::new);
    let loader = Loader::new(data.clone(), images, batches, LoaderOptions::default())?;
    let mut metrics = MetricsFile::resume(&run.dir.root().join("metrics.jsonl"), name, first)?;
    let mut explosions = ExplosionWatch::default();
    let mut watch = GradientWatch::new(params.keys().cloned(), first, epoch);
    let task = match &stage.objective {
        Objective::Sft => Task::Sft,
        Objective::Dpo(settings) => Task::Dpo { settings, reference },
    };
    let dropout = Key::new(stage.seed, &format!("dropout/{name}"));
    let mut last_loss = from.loss;
    let _deferred = run.signals.defer();
    run.reporter.stage_start(name, first, total);
    for step in loader {
        let step = step?;
        let _span = tracing::debug_span!("step", step = step.step).entered();
        let started = Instant::now();
        let cfg = StepConfig { micro, kept, dropout: dropout.index(step.step as u64) };
        let items: Vec<_> = step.indices.iter().map(|i| (*i, &data.items[*i])).collect();
        let at = || format!("{name}, step {}", step.step + 1);
        let pass = |vlm: &Vlm| compute(vlm, &task, &items, &step.pixels, cfg);
        let done = pass(&state.vlm).map_err(|e| freeze::name_broken(&mut state.vlm, e, pass)).with_context(at)?;
        let report = optimizer.step(&weights, done.grads.by_name()).with_context(at)?;
        watch.see(step.step, &report.squares).with_context(at)?;
        last_loss = done.loss;
        let peak = memory::peak(&device)?;
        let line = metrics_line(name, step.step, &done, &report, started.elapsed().as_secs_f64(), peak);
        metrics.append(&line)?;
        run.reporter.step(&line);
        explosions.see(&report, stage.max_grad_norm).iter().for_each(|w| run.reporter.warn(&format!("{}: {w}", at())));
        let n = step.step + 1;
        let every = stage.checkpoint.every_steps;
        // The last step needs one only if evaluations follow, which may take long.
        let due = every > 0 && if n < total { n % every == 0 } else { !stage.eval.is_empty() };
        let stop = run.signals.asked();
        if due || stop {
            freeze::prove_finite(&params).with_context(at)?;
            metrics.sync()?;
            checkpoints::save(dir, Progress { steps: n, loss: done.loss }, &params, optimizer, stage.checkpoint.keep)?;
        }
        if stop {
            run.reporter.stage_stopped(n);
            return Ok(None);
        }
    }
    run.reporter.stage_end();
    Ok(Some(last_loss))
}

fn metrics_line(
    stage: &str,
    step: usize,
    done: &Computed,
    report: &crate::optim::StepReport,
    seconds: f64,
    peak_memory_bytes: Option<u64>,
) -> StepMetrics {
    StepMetrics {
        step: step + 1,
        stage: stage.to_string(),
        loss: done.loss,
        lr: report.groups.iter().map(|g| (g.name.clone(), g.lr)).collect(),
        lr_lowest: report.groups.iter().filter_map(|g| Some((g.name.clone(), g.lr_lowest?))).collect(),
        grad_norm: report.groups.iter().map(|g| (g.name.clone(), g.grad_norm)).collect(),
        grad_norm_total: report.grad_norm,
        label_tokens: done.label_tokens,
        tokens_per_s: done.tokens as f64 / seconds,
        samples_per_s: done.samples as f64 / seconds,
        peak_memory_bytes,
        preference: done.dpo.map(|m| PreferenceMetrics {
            reward_chosen: m.reward_chosen,
            reward_rejected: m.reward_rejected,
            margin: m.margin,
            accuracy: m.accuracy,
            logp_chosen: m.chosen,
            logp_rejected: m.rejected,
        }),
    }
}

/// The reference's log-probabilities of every pair, computed once before step 1 and kept in the run.
fn reference_table(run: &Run, state: &mut State, stage: &Stage, data: &Dataset, path: &Path) -> Result<ReferenceTable> {
    let Objective::Dpo(settings) = &stage.objective else { return Ok(ReferenceTable::new()) };
    let whose = settings.reference;
    let fingerprint = fingerprint(data, whose);
    // Before the first checkpoint, the start itself may have changed.
    let begun = path.exists() && checkpoints::newest(path.parent().unwrap_or(path))?.is_some();
    if begun && safetensors::metadata(path)?.get(BELONGS_TO) == Some(&fingerprint) {
        let all = safetensors::load(path)?;
        let column = |k: &str| -> Result<Vec<f64>> {
            let Some(t) = all.get(k) else {
                bail!("{} lacks `{k}`", path.display(); "delete the file: it will be computed again")
            };
            Ok(t.to_vec1()?)
        };
        let rows = column("chosen")?.into_iter().zip(column("rejected")?);
        return Ok(rows.enumerate().collect());
    }
    run.reporter.info(&format!("log-probabilities of {} pairs under the reference", data.items.len()));
    let micro = stage.batch.micro.unwrap_or(stage.batch.global);
    let items: Vec<_> = data.items.iter().enumerate().collect();
    let mut table = ReferenceTable::new();
    for part in items.chunks(micro) {
        let pixels = load_pixels(part.iter().map(|(_, i)| *i), run.images)?;
        let rows = |vlm: &Vlm| pair_logps(vlm, part, &pixels, whose == Reference::Base);
        let rows = rows(&state.vlm)
            .map_err(|e| freeze::name_broken(&mut state.vlm, e, rows))
            .context("the log-probabilities under the reference")?;
        table.extend(rows);
    }
    let (chosen, rejected): (Vec<f64>, Vec<f64>) = table.values().copied().unzip();
    let n = table.len();
    let columns =
        BTreeMap::from([("chosen".to_string(), tensor(chosen, n)?), ("rejected".to_string(), tensor(rejected, n)?)]);
    safetensors::save(path, &columns, &BTreeMap::from([(BELONGS_TO.to_string(), fingerprint)]))?;
    Ok(table)
}

/// What the reference's log-probabilities belong to.
const BELONGS_TO: &str = "reference_sha256";

/// SHA-256 of which model the reference is, and of all tokens and pictures, in order.
fn fingerprint(data: &Dataset, reference: Reference) -> String {
    let mut h = Sha256::new();
    h.update(format!("{reference:?}"));
    for sample in data.items.iter().flat_map(Item::samples) {
        h.update((sample.ids.len() as u64).to_le_bytes());
        sample.ids.iter().for_each(|id| h.update(id.to_le_bytes()));
        sample.labels.iter().for_each(|l| h.update(l.to_le_bytes()));
        sample.images.iter().for_each(|i| h.update(format!("{i:?}")));
    }
    hex(&h.finalize())
}
