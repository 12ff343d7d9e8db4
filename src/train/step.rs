//! One optimizer step: micro-batches forward and backward, coefficients from the objective, one update.
//!
//! The loss of a step is normalised over its whole global batch: SFT by the label tokens of all micro-batches, DPO by
//! the pairs, so that the split into micro-batches changes nothing but the dropout masks, which are drawn for each
//! micro-batch.

use super::collate::{collate, pair, single, sum_by_owner, targets_by_owner};
use super::objective::{DpoMetrics, Pair, PairLoss, dpo, sft_coefficient};
use crate::bail;
use crate::data::{Item, Pixels, Sample};
use crate::error::{Context, Error, Result};
use crate::model::params::Grads;
use crate::model::segment::Kept;
use crate::model::vlm::{Mode, Vlm};
use crate::ops::random::Key;
use crate::spec::Dpo;
use std::collections::BTreeMap;

/// Summed log-probabilities of chosen and rejected under the reference, by the index of the pair in the data.
pub type ReferenceTable = BTreeMap<usize, (f64, f64)>;

/// What a step minimises.
pub enum Task<'a> {
    Sft,
    Dpo { settings: &'a Dpo, reference: &'a ReferenceTable },
}

/// How a step runs.
#[derive(Debug, Clone, Copy)]
pub struct StepConfig {
    /// Items a micro-batch.
    pub micro: usize,
    pub kept: Kept,
    /// Key of this step's dropout masks.
    pub dropout: Key,
}

/// What a step computed, before the update.
pub struct Computed {
    pub loss: f64,
    pub grads: Grads,
    /// Tokens that went through the language model.
    pub tokens: usize,
    pub label_tokens: usize,
    /// Samples, or pairs.
    pub samples: usize,
    pub dpo: Option<DpoMetrics>,
}

/// Forward and backward over a global batch: `items` with their indices in the data.
pub fn compute(vlm: &Vlm, task: &Task, items: &[(usize, &Item)], pixels: &Pixels, cfg: StepConfig) -> Result<Computed> {
    compute_unless(vlm, task, items, pixels, cfg, &|| false)?.ok_or_else(|| Error::new("the step was left"))
}

/// As [`compute`], but asks before every micro-batch whether the step is to be left; `None` if it was. Weights move at the
/// update only, so that nothing but this step's own work is lost.
pub fn compute_unless(
    vlm: &Vlm,
    task: &Task,
    items: &[(usize, &Item)],
    pixels: &Pixels,
    cfg: StepConfig,
    leave: &dyn Fn() -> bool,
) -> Result<Option<Computed>> {
    match task {
        Task::Sft => sft(vlm, items, pixels, cfg, leave),
        Task::Dpo { settings, reference } => preference(vlm, (settings, reference), items, pixels, cfg, leave),
    }
}

fn mode(cfg: StepConfig, micro: usize) -> Mode {
    Mode { record: true, kept: cfg.kept, dropout: Some(cfg.dropout.index(micro as u64)), adapters_off: false }
}

fn sft(
    vlm: &Vlm,
    items: &[(usize, &Item)],
    pixels: &Pixels,
    cfg: StepConfig,
    leave: &dyn Fn() -> bool,
) -> Result<Option<Computed>> {
    let samples: Vec<&Sample> = items.iter().map(|(_, i)| single(i)).collect::<Result<_>>()?;
    let label_tokens = samples.iter().map(|s| s.targets()).sum();
    let coef = sft_coefficient(label_tokens)?;
    let mut out =
        Computed { loss: 0.0, grads: Grads::new(), tokens: 0, label_tokens, samples: samples.len(), dpo: None };
    // The loss is read once all work of the step is on its way, so that a GPU need not wait for the host in between.
    let mut logps = Vec::new();
    for (i, micro) in samples.chunks(cfg.micro).enumerate() {
        if leave() {
            return Ok(None);
        }
        let batch = collate(micro, pixels)?;
        let (lp, saved) = vlm.forward(&batch, mode(cfg, i)).with_context(|| ids(micro))?;
        out.tokens += batch.ids.len();
        if let Some(saved) = saved {
            vlm.backward(saved, &vec![coef; lp.rows()], &mut out.grads)?;
        }
        logps.push(lp);
    }
    for (lp, micro) in logps.iter().zip(samples.chunks(cfg.micro)) {
        out.loss += lp.logps()?.iter().map(|p| coef * p).sum::<f64>();
        finite(out.loss, micro)?;
    }
    Ok(Some(out))
}

fn preference(
    vlm: &Vlm,
    (settings, reference): (&Dpo, &ReferenceTable),
    items: &[(usize, &Item)],
    pixels: &Pixels,
    cfg: StepConfig,
    leave: &dyn Fn() -> bool,
) -> Result<Option<Computed>> {
    let n = items.len() as f64;
    let mut out =
        Computed { loss: 0.0, grads: Grads::new(), tokens: 0, label_tokens: 0, samples: items.len(), dpo: None };
    let mut results: Vec<(Pair, PairLoss)> = Vec::with_capacity(items.len());
    for (i, micro) in items.chunks(cfg.micro).enumerate() {
        if leave() {
            return Ok(None);
        }
        let samples = both_sides(micro)?;
        let batch = collate(&samples, pixels)?;
        let (lp, saved) = vlm.forward(&batch, mode(cfg, i)).with_context(|| ids(&samples))?;
        let (sums, tokens) = (sum_by_owner(&batch, &lp.logps()?), targets_by_owner(&batch));
        let mut by_sequence = vec![0.0; samples.len()];
        for (k, (index, _)) in micro.iter().enumerate() {
            let Some((ref_chosen, ref_rejected)) = reference.get(index).copied() else {
                bail!("pair {} has no reference log-probabilities", samples[k].id)
            };
            let r = k + micro.len();
            let pair = Pair {
                chosen: sums[k],
                rejected: sums[r],
                ref_chosen,
                ref_rejected,
                chosen_tokens: tokens[k],
                rejected_tokens: tokens[r],
            };
            let loss = dpo(settings, &pair).with_context(|| &samples[k].id)?;
            (by_sequence[k], by_sequence[r]) = (loss.d_chosen / n, loss.d_rejected / n);
            out.loss += loss.loss / n;
            results.push((pair, loss));
        }
        finite(out.loss, &samples)?;
        let coefs: Vec<f64> = batch.owners.iter().map(|o| by_sequence[*o]).collect();
        (out.tokens, out.label_tokens) = (out.tokens + batch.ids.len(), out.label_tokens + coefs.len());
        if let Some(saved) = saved {
            vlm.backward(saved, &coefs, &mut out.grads)?;
        }
    }
    out.dpo = Some(DpoMetrics::mean(&results));
    Ok(Some(out))
}

/// All chosen answers, then all rejected ones: one batch, so that a picture goes through the tower once.
fn both_sides<'a>(items: &[(usize, &'a Item)]) -> Result<Vec<&'a Sample>> {
    let pairs: Vec<(&Sample, &Sample)> = items.iter().map(|(_, i)| pair(i)).collect::<Result<_>>()?;
    Ok(pairs.iter().map(|p| p.0).chain(pairs.iter().map(|p| p.1)).collect())
}

/// Summed log-probabilities of (chosen, rejected) for each pair, without gradient and without dropout.
pub fn pair_logps(vlm: &Vlm, items: &[(usize, &Item)], pixels: &Pixels, adapters_off: bool) -> Result<ReferenceTable> {
    let samples = both_sides(items)?;
    let batch = collate(&samples, pixels)?;
    let (lp, _) = vlm.forward(&batch, Mode { adapters_off, ..Mode::default() })?;
    let logps = lp.logps()?;
    finite_logps(&logps, &samples)?;
    let sums = sum_by_owner(&batch, &logps);
    Ok(items.iter().enumerate().map(|(k, (index, _))| (*index, (sums[k], sums[k + items.len()]))).collect())
}

fn ids(samples: &[&Sample]) -> String {
    let names: Vec<&str> = samples.iter().take(4).map(|s| s.id.as_str()).collect();
    format!("samples {}{}", names.join(", "), if samples.len() > 4 { ", …" } else { "" })
}

/// The log-probabilities of a pass without training must be numbers; the error names the samples.
pub fn finite_logps(logps: &[f64], samples: &[&Sample]) -> Result<()> {
    let Some(p) = logps.iter().find(|p| !p.is_finite()) else { return Ok(()) };
    let hint = "the weights are damaged, or training broke them: lower the learning rate or lengthen the warm-up, delete the stage's folder in the run directory, and train it again";
    Err(Error::new(format!("a label's log-probability is {p} among {}", ids(samples))).hint(hint).diverged())
}

/// The first micro-batch whose loss is not a number stops the run.
fn finite(loss: f64, samples: &[&Sample]) -> Result<()> {
    if loss.is_finite() {
        return Ok(());
    }
    let hint = "lower the learning rate or lengthen the warm-up; if it happens at step 1, the weights hold NaN: look at `adfreeze check`";
    Err(Error::new(format!("the loss is {loss} in a micro-batch with {}", ids(samples))).hint(hint).diverged())
}
