//! AdamW with decoupled weight decay (Loshchilov & Hutter 2019), element for element as `torch.optim.AdamW` computes it:
//!
//! ```text
//! p ← p · (1 − lr·λ)        m ← m + (1 − β₁)(g − m)        v ← β₂·v + (1 − β₂)·g²
//! p ← p − lr/(1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
//! ```
//!
//! `g` is already clipped by the global norm. t counts the updates of the one parameter: like torch, a parameter that
//! got no gradient in a step (the projector in a step of text only) is left alone, moments and decay included. Updates
//! are in place, so every clone of a parameter tensor sees them.

use super::clip;
use super::groups::{Group, Groups, Member};
use super::inplace::{Mean, Square, Update};
use super::schedule::Schedule;
use crate::bail;
use crate::error::{Context, Result};
use crate::ops::{Weight, overwrite};
use crate::recipe::schema;
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

const STEP: &str = "step";
const EXP_AVG: &str = "exp_avg";
const EXP_AVG_SQ: &str = "exp_avg_sq";

/// The optimizer of one stage: groups, schedule and state.
#[derive(Debug)]
pub struct AdamW {
    groups: Groups,
    schedule: Schedule,
    hyper: schema::AdamW,
    max_grad_norm: f64,
    step: usize,
    state: BTreeMap<String, Moments>,
}

/// State of one parameter, in the parameter's dtype and shape.
#[derive(Debug, Clone)]
struct Moments {
    mean: Tensor,
    square: Tensor,
    updates: u32,
}

/// What a step did, for the metrics.
#[derive(Debug, Clone, PartialEq)]
pub struct StepReport {
    /// Index of the step, counted from 0.
    pub step: usize,
    /// Norm of all gradients together, before clipping.
    pub grad_norm: f64,
    /// What the gradients were multiplied by.
    pub clip: f64,
    /// By group, in the order of [`Groups::list`].
    pub groups: Vec<GroupReport>,
}

/// One group's share of a [`StepReport`].
#[derive(Debug, Clone, PartialEq)]
pub struct GroupReport {
    /// The group's name.
    pub name: String,
    /// Learning rate used in the step.
    pub lr: f64,
    /// Norm of the group's gradients, before clipping.
    pub grad_norm: f64,
}

impl AdamW {
    /// A fresh optimizer at step 0. `max_grad_norm` 0 switches clipping off.
    pub fn new(hyper: schema::AdamW, groups: Groups, schedule: Schedule, max_grad_norm: f64) -> Self {
        Self { groups, schedule, hyper, max_grad_norm, step: 0, state: BTreeMap::new() }
    }

    /// The optimizer of a stage of `total_steps` steps, for its trained parameters (name → shape).
    pub fn of_stage(stage: &schema::Stage, total_steps: usize, trained: &BTreeMap<String, Vec<usize>>) -> Result<Self> {
        let schema::Optimizer::Adamw(hyper) = &stage.optimizer;
        let groups = Groups::resolve(&stage.param_groups, stage.lr, hyper.weight_decay, trained)?;
        let schedule = Schedule::new(&stage.lr_scheduler, total_steps);
        Ok(Self::new(hyper.clone(), groups, schedule, stage.max_grad_norm))
    }

    /// Steps made so far; also the index of the next one.
    pub fn steps_done(&self) -> usize {
        self.step
    }

    /// Which parameter belongs to which group.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Learning rate of every group in step `step` (from 0), in the order of [`Groups::list`].
    pub fn lrs(&self, step: usize) -> Vec<f64> {
        self.groups.list().iter().map(|g| g.lr * self.schedule.factor(step)).collect()
    }

    /// Updates, in place, every parameter that has a gradient; rounded copies follow. `params` and `grads` by name, f32 (or
    /// f64), each gradient of its parameter's shape and dtype; what a GPU holds is updated on the host and written back.
    /// Nothing is changed when a gradient is missing its parameter, misshaped, NaN or infinite: the error names it.
    pub fn step(&mut self, params: &BTreeMap<String, Weight>, grads: &BTreeMap<String, Tensor>) -> Result<StepReport> {
        let mut squares = vec![0.0; self.groups.list().len()];
        for (name, grad) in grads {
            let member = self.groups.member(name)?;
            check(name, member, params.get(name).map(|w| &w.value), grad)?;
            squares[member.group] += clip::finite_sum_of_squares(name, grad)?;
        }
        let grad_norm = squares.iter().sum::<f64>().sqrt();
        let clip = clip::factor(grad_norm, self.max_grad_norm);
        let lrs = self.lrs(self.step);
        for (name, grad) in grads {
            let (member, param) = (self.groups.member(name)?, &on_host(&params[name])?);
            let grad = &grad.to_device(&Device::Cpu)?;
            let moments = match self.state.get_mut(name) {
                Some(m) => m,
                None => self.state.entry(name.clone()).or_insert(Moments::zeros(grad)?),
            };
            moments.updates += 1;
            let lr = lrs[member.group];
            moments.update(&param.value, grad, &self.hyper, lr, member.weight_decay, clip).with_context(|| name)?;
            param.round()?;
            write_back(&params[name], param)?;
        }
        let report = |((g, lr), s): ((&Group, &f64), &f64)| GroupReport {
            name: g.name.clone(),
            lr: *lr,
            grad_norm: f64::sqrt(*s),
        };
        let groups = self.groups.list().iter().zip(&lrs).zip(&squares).map(report).collect();
        let report = StepReport { step: self.step, grad_norm, clip, groups };
        self.step += 1;
        Ok(report)
    }

    /// Everything a resumed run needs: `step` (number of steps made) and, by parameter, `NAME.exp_avg`,
    /// `NAME.exp_avg_sq` and `NAME.step` (its number of updates). The moments share storage with the optimizer:
    /// write them out before the next step.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut out = BTreeMap::from([(STEP.to_string(), counter(self.step as u32)?)]);
        for (name, m) in &self.state {
            out.insert(format!("{name}.{EXP_AVG}"), m.mean.clone());
            out.insert(format!("{name}.{EXP_AVG_SQ}"), m.square.clone());
            out.insert(format!("{name}.{STEP}"), counter(m.updates)?);
        }
        Ok(out)
    }

    /// Continues from a [`AdamW::state`] of the same parameters. Errors name a tensor that is unknown, missing or
    /// misshaped; the optimizer is then as before.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let get = |key: String| match state.get(&key) {
            Some(t) => Ok(t),
            None => {
                bail!("the optimizer state has no `{key}`"; "the checkpoint is incomplete; resume from an earlier one")
            }
        };
        let step = count(STEP, get(STEP.into())?)?;
        let mut loaded = BTreeMap::new();
        for key in state.keys().filter(|k| k.as_str() != STEP) {
            let Some((name, _)) = key.rsplit_once('.') else { bail!("the optimizer state has an unknown `{key}`") };
            let Some(member) = self.groups.members().get(name) else {
                bail!(
                    "the optimizer state has `{key}`, but `{name}` is not trained now";
                    "the stage trained other parameters when the checkpoint was written; start the stage again or undo the change"
                );
            };
            match &key[name.len() + 1..] {
                EXP_AVG => {
                    let moment = |what| own_copy(name, what, member, get(format!("{name}.{what}"))?);
                    let updates_key = format!("{name}.{STEP}");
                    let updates = count(&updates_key, get(updates_key.clone())?)?;
                    let moments = Moments { mean: moment(EXP_AVG)?, square: moment(EXP_AVG_SQ)?, updates };
                    loaded.insert(name.to_string(), moments);
                }
                EXP_AVG_SQ | STEP => {
                    get(format!("{name}.{EXP_AVG}"))?;
                }
                _ => bail!("the optimizer state has an unknown `{key}`"),
            }
        }
        self.step = step as usize;
        self.state = loaded;
        Ok(())
    }
}

/// A gradient must fit its parameter, and both must be what the update can work on.
fn check(name: &str, member: &Member, param: Option<&Tensor>, grad: &Tensor) -> Result<()> {
    let Some(param) = param else { bail!("`{name}` has a gradient but is not among the parameters") };
    if param.dims() != member.shape || grad.dims() != member.shape {
        bail!(
            "`{name}`: the optimizer knows shape {:?}, the parameter has {:?}, its gradient {:?}",
            member.shape,
            param.dims(),
            grad.dims()
        );
    }
    if param.dtype() != grad.dtype() || !clip::is_supported(param.dtype()) {
        bail!(
            "`{name}`: parameter {:?} and gradient {:?} on {:?}; both must be f32 (or f64)",
            param.dtype(),
            grad.dtype(),
            param.device()
        );
    }
    if !param.is_contiguous() {
        bail!("`{name}` is not contiguous in memory: {:?}", param.layout());
    }
    Ok(())
}

/// The weight itself, or a copy of one that a GPU holds: the update is computed on the host.
fn on_host(w: &Weight) -> Result<Weight> {
    let host = |t: &Tensor| t.to_device(&Device::Cpu);
    Ok(Weight { value: host(&w.value)?, rounded: w.rounded.as_ref().map(host).transpose()? })
}

/// Writes an updated copy back to the GPU.
fn write_back(w: &Weight, updated: &Weight) -> Result<()> {
    if w.value.device().is_cpu() {
        return Ok(());
    }
    overwrite(&w.value, &updated.value)?;
    w.rounded.iter().zip(&updated.rounded).try_for_each(|(old, new)| overwrite(old, new))
}

impl Moments {
    fn zeros(like: &Tensor) -> Result<Self> {
        let zeros = || Tensor::zeros(like.dims(), like.dtype(), like.device());
        Ok(Self { mean: zeros()?, square: zeros()?, updates: 0 })
    }

    /// One update of `param`; `self.updates` is t, already counting this one.
    fn update(
        &self,
        param: &Tensor,
        grad: &Tensor,
        hyper: &schema::AdamW,
        lr: f64,
        decay: f64,
        clip: f64,
    ) -> Result<()> {
        let [beta1, beta2] = hyper.betas;
        // A power of a whole number of updates; torch computes it in f64 as well.
        let correction = |beta: f64| 1.0 - beta.powf(f64::from(self.updates));
        let grad = grad.contiguous()?;
        self.mean.inplace_op2(&grad, &Mean { beta: beta1, clip })?;
        self.square.inplace_op2(&grad, &Square { beta: beta2, clip })?;
        let update = Update {
            keep: 1.0 - lr * decay,
            size: lr / correction(beta1),
            correction: correction(beta2).sqrt(),
            eps: hyper.eps,
        };
        Ok(param.inplace_op3(&self.mean, &self.square, &update)?)
    }
}

fn counter(n: u32) -> Result<Tensor> {
    Ok(Tensor::new(&[n], &Device::Cpu)?)
}

fn count(key: &str, t: &Tensor) -> Result<u32> {
    let n = t.to_dtype(DType::U32).and_then(|t| t.flatten_all()?.to_vec1::<u32>()).with_context(|| key)?;
    match n.as_slice() {
        [n] => Ok(*n),
        _ => bail!("the optimizer state's `{key}` has shape {:?}, not one number", t.dims()),
    }
}

fn own_copy(name: &str, what: &str, member: &Member, t: &Tensor) -> Result<Tensor> {
    if t.dims() != member.shape || !clip::is_supported(t.dtype()) {
        bail!(
            "the optimizer state's `{name}.{what}` is {:?} {:?}, but the parameter has shape {:?}",
            t.dtype(),
            t.dims(),
            member.shape
        );
    }
    Ok(t.copy()?)
}

#[cfg(test)]
mod tests;
