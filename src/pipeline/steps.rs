//! The steps of a stage. Whatever ends them early (a signal, a broken picture, a full disk), the last whole step is saved first,
//! unless its weights are not worth it: weights move at the update only, so that nothing else is lost.

use super::checkpoints::{self, Progress};
use super::freeze::{self, ExplosionWatch, GradientWatch};
use super::health::{self, Health, Sizes};
use super::memory;
use super::stage::{Run, micro};
use super::state::State;
use crate::data::{Dataset, Loader, LoaderOptions, Plan, StepData};
use crate::error::{Context, Error, Result};
use crate::model::params::Module;
use crate::model::segment::Kept;
use crate::model::vlm::Vlm;
use crate::ops::Weight;
use crate::ops::random::Key;
use crate::optim::AdamW;
use crate::report::{MetricsFile, PreferenceMetrics, StepMetrics};
use crate::spec::{Objective, Stage};
use crate::train::step::{Computed, ReferenceTable, StepConfig, Task, compute_unless};
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

/// What the steps of a stage work on.
pub struct Steps<'a> {
    pub run: &'a Run<'a>,
    /// The stage's name and folder.
    pub name: &'a str,
    pub dir: &'a Path,
    pub data: &'a Arc<Dataset>,
    pub reference: &'a ReferenceTable,
    /// Sizes of what trains at the stage's start.
    pub start: &'a Sizes,
    /// Steps of the stage, and of one epoch of it.
    pub total: usize,
    pub epoch: usize,
}

/// Where the steps are.
struct Course<'a> {
    of: &'a Steps<'a>,
    stage: &'a Stage,
    params: BTreeMap<String, Tensor>,
    weights: BTreeMap<String, Weight>,
    kept: Kept,
    optimizer: &'a mut AdamW,
    metrics: MetricsFile,
    explosions: ExplosionWatch,
    gradients: GradientWatch,
    health: Health,
    /// The last whole step: its weights are those of the model, its line is in the metrics.
    done: Progress,
    /// Of the newest checkpoint.
    saved: usize,
    /// The line of an update that has been made, until it is written.
    unwritten: Option<StepMetrics>,
}

impl Steps<'_> {
    /// Makes the steps behind `from`; the loss of the last one, or `None` if a signal asked to stop on the way.
    ///
    /// # Errors
    /// Those of a step; what was done before it is saved, and the error says where the same command goes on.
    pub fn make(&self, state: &mut State, plan: Plan, optimizer: &mut AdamW, from: Progress) -> Result<Option<f64>> {
        let (run, name, first, total) = (self.run, self.name, from.steps, self.total);
        let stage = &run.recipe.stage[name];
        let (params, weights) = (state.vlm.trainable(), state.vlm.weights());
        let loads = memory::loads(self.data, &plan, first..total, micro(stage), state.vlm.prefix_rows());
        let (kept, told) = memory::of_stage(stage, state, &loads, optimizer, None)?;
        told.iter().for_each(|line| run.reporter.info(line));
        let batches = (first..total).map(move |s| (s, plan.step(s)));
        let images = run.images.cloned().map(Arc::new);
        let loader = Loader::new(self.data.clone(), images, batches, LoaderOptions::default())?;
        let path = run.dir.root().join("metrics.jsonl");
        let metrics = MetricsFile::resume(&path, name, first)?;
        let mut health = Health::default();
        for (loss, gradient) in MetricsFile::history(&path, name)? {
            // It has been said.
            let _ = health.see(loss, gradient);
        }
        let gradients = GradientWatch::new(params.keys().cloned(), first, self.epoch);
        let mut course = Course {
            of: self,
            stage,
            params,
            weights,
            kept,
            optimizer,
            metrics,
            explosions: ExplosionWatch::default(),
            gradients,
            health,
            done: from,
            saved: first,
            unwritten: None,
        };
        let _deferred = run.signals.defer("finishing the step, then a checkpoint");
        run.reporter.stage_start(name, first, total);
        for step in loader {
            match step.and_then(|step| course.step(state, &step)) {
                Ok(true) => {}
                Ok(false) => {
                    run.reporter.stage_stopped(course.done.steps);
                    return Ok(None);
                }
                Err(e) => return Err(course.failed(e)),
            }
        }
        run.reporter.stage_end();
        Ok(Some(course.done.loss))
    }

    /// A checkpoint of the stage's end, unless there is one.
    pub fn save_last(&self, state: &State, optimizer: &AdamW, loss: f64) -> Result<()> {
        if checkpoints::newest(self.dir)?.is_some_and(|(steps, _)| steps >= self.total) {
            return Ok(());
        }
        let (params, keep) = (state.vlm.trainable(), self.run.recipe.stage[self.name].checkpoint.keep);
        freeze::prove_finite(&health::sizes(&params)?)?;
        let metrics_sha256 = Some(self.run.dir.metrics_sha256(self.name, self.total)?);
        let at = Progress { steps: self.total, loss, metrics_sha256 };
        let told = checkpoints::save(self.run.dir, self.dir, &at, &params, optimizer, keep)?;
        told.iter().for_each(|w| self.run.reporter.warn(w));
        Ok(())
    }
}

impl Course<'_> {
    /// Makes one step and saves what is due; false if a signal has asked to stop, after a checkpoint of the last whole step.
    fn step(&mut self, state: &mut State, step: &StepData) -> Result<bool> {
        let _span = tracing::debug_span!("step", step = step.step).entered();
        let (run, name, data) = (self.of.run, self.of.name, self.of.data);
        let started = Instant::now();
        let key = Key::new(self.stage.seed, &format!("dropout/{name}"));
        let cfg = StepConfig { micro: micro(self.stage), kept: self.kept, dropout: key.index(step.step as u64) };
        let items: Vec<_> = step.indices.iter().map(|i| (*i, &data.items[*i])).collect();
        let task = match &self.stage.objective {
            Objective::Sft => Task::Sft,
            Objective::Dpo(settings) => Task::Dpo { settings, reference: self.of.reference },
        };
        let at = || format!("{name}, step {}", step.step + 1);
        let pass = |vlm: &Vlm| compute_unless(vlm, &task, &items, &step.pixels, cfg, &|| run.signals.leave());
        let done = pass(&state.vlm).map_err(|e| freeze::name_broken(&state.vlm, e, pass)).with_context(at)?;
        let Some(done) = done else {
            self.save()?;
            return Ok(false);
        };
        let report = self.optimizer.step(&self.weights, done.grads.by_name()).with_context(at)?;
        // Weights have moved: nothing may fail before their step counts as made.
        let peak = memory::peak(state.vlm.language.device());
        let known = peak.as_ref().ok().copied().flatten();
        let line = metrics_line(name, step.step, &done, &report, started.elapsed().as_secs_f64(), known);
        self.unwritten = Some(line.clone());
        self.write()?;
        peak.with_context(at)?;
        run.reporter.step(&line);
        let warnings =
            [self.explosions.see(&report, self.stage.max_grad_norm), self.health.see(line.loss, line.grad_norm_total)];
        warnings.iter().flatten().for_each(|w| run.reporter.warn(&format!("{}: {w}", at())));
        self.gradients.see(step.step, &report.squares).with_context(at)?;
        let n = self.done.steps;
        let every = self.stage.checkpoint.every_steps;
        // The last step needs one only if something follows that may take long.
        let follows = !self.stage.eval.is_empty() || self.stage.align_check.is_some();
        let due = every > 0 && if n < self.of.total { n.is_multiple_of(every) } else { follows };
        let stop = run.signals.asked();
        if due || stop {
            self.save().with_context(at)?;
        }
        Ok(!stop)
    }

    /// Writes the line of the last update, which makes its step a whole one.
    fn write(&mut self) -> Result<()> {
        if let Some(line) = &self.unwritten {
            self.metrics.append(line)?;
            self.done = Progress { steps: line.step, loss: line.loss, metrics_sha256: Some(self.metrics.sha256()) };
            self.unwritten = None;
        }
        Ok(())
    }

    /// A checkpoint of the last whole step, unless there is one.
    fn save(&mut self) -> Result<()> {
        if self.done.steps <= self.saved {
            return Ok(());
        }
        let sizes = health::sizes(&self.params)?;
        freeze::prove_finite(&sizes)?;
        if let Some(grown) = self.health.see_sizes(self.of.start, &sizes) {
            self.of.run.reporter.warn(&format!("{}: {grown}", self.of.name));
        }
        self.metrics.sync()?;
        let (run, keep) = (self.of.run, self.stage.checkpoint.keep);
        let told = checkpoints::save(run.dir, self.of.dir, &self.done, &self.params, self.optimizer, keep)?;
        told.iter().for_each(|w| run.reporter.warn(w));
        self.saved = self.done.steps;
        run.dir.prove_whole()
    }

    /// Saves what can be saved before an error is told; the error then says where the same command goes on.
    fn failed(&mut self, e: Error) -> Error {
        let worth = || -> Result<bool> {
            Ok(!e.has_diverged()
                || self.health.is_sound() && health::exploded(self.of.start, &health::sizes(&self.params)?).is_none())
        };
        if !worth().unwrap_or(false) {
            return e;
        }
        match self.write().and_then(|()| self.save()) {
            Ok(()) if self.saved == 0 => e,
            Ok(()) => {
                let next = self.saved + 1;
                also(e, format!("{} steps are saved; the same command goes on at step {next}", self.saved))
            }
            Err(why) => also(
                e,
                format!(
                    "the steps behind step {} could not be saved ({why}); the same command goes on there",
                    self.saved
                ),
            ),
        }
    }
}

/// The error with more of a hint.
pub fn also(e: Error, more: String) -> Error {
    let hint = e.hint_text().map_or(more.clone(), |hint| format!("{hint}; {more}"));
    e.hint(hint)
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
