//! AdamW with decoupled weight decay (Loshchilov & Hutter 2019), element for element as `torch.optim.AdamW` computes it
//! (`ops::adamw` has the arithmetic): which parameter gets which learning rate and decay, and the state between steps.
//!
//! Gradients are clipped by their global norm. Updates of a parameter are counted by themselves: like torch, one that got
//! no gradient in a step (the projector in a step of text only) is left alone, moments and decay included. Updates
//! are in place, so every clone of a parameter tensor sees them.

use super::groups::{Group, Groups, Member};
use super::schedule::Schedule;
use crate::bail;
use crate::error::{Context, Error, Result};
use crate::ops::Weight;
use crate::ops::adamw::{BLOCK, Codes, Gradient, Moments, Norms, Parameter, Plan, Rate, Step, step};
use crate::ops::random::Key;
use crate::spec::{self, MomentType};
use candle_core::{DType, Device, Tensor};
use std::collections::BTreeMap;

const STEP: &str = "step";
const EXP_AVG: &str = "exp_avg";
const EXP_AVG_SQ: &str = "exp_avg_sq";
/// Scales of 8-bit moments.
const SCALE: &str = "_scale";

/// Smaller parameters (norms, biases) keep f32 moments, as in Dettmers et al. 2022.
const SMALLEST_EIGHT: usize = 4096;

/// The optimizer of one stage: groups, schedule and state.
#[derive(Debug)]
pub struct AdamW {
    groups: Groups,
    /// Of each group.
    schedules: Vec<Schedule>,
    hyper: spec::AdamW,
    max_grad_norm: f64,
    /// Stream of the noise that rounds bf16 parameters and 8-bit moments.
    noise: Key,
    step: usize,
    state: BTreeMap<String, State>,
    /// The kernels' tables.
    plan: Option<Plan>,
}

/// State of one parameter.
#[derive(Debug, Clone)]
struct State {
    moments: Moments,
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
    /// Sum of squares of each parameter's gradient, before clipping.
    pub squares: BTreeMap<String, f64>,
}

/// One group's share of a [`StepReport`].
#[derive(Debug, Clone, PartialEq)]
pub struct GroupReport {
    /// The group's name.
    pub name: String,
    /// Highest learning rate used in the step.
    pub lr: f64,
    /// Lowest one, where it decays layer by layer.
    pub lr_lowest: Option<f64>,
    /// Highest learning rate that its schedule reaches.
    pub peak: f64,
    /// Norm of the group's gradients, before clipping.
    pub grad_norm: f64,
}

impl AdamW {
    /// A fresh optimizer at step 0. `schedule` is that of the groups that have none of their own. `max_grad_norm` 0 switches
    /// clipping off. `noise` rounds what is rounded stochastically.
    pub fn new(hyper: spec::AdamW, groups: Groups, schedule: Schedule, max_grad_norm: f64, noise: Key) -> Self {
        let own = |g: &Group| g.scheduler.as_ref().map_or_else(|| schedule.clone(), |own| schedule.like(own));
        let schedules = groups.list().iter().map(own).collect();
        Self { groups, schedules, hyper, max_grad_norm, noise, step: 0, state: BTreeMap::new(), plan: None }
    }

    /// The optimizer of the stage `name` of `total_steps` steps, for its trained parameters (name → shape) of layers at
    /// these `distances` from the top, of which some have a multiple of their group's learning rate (name → factor).
    pub fn of_stage(
        stage: &spec::Stage,
        name: &str,
        total_steps: usize,
        trained: &BTreeMap<String, Vec<usize>>,
        distances: &BTreeMap<String, usize>,
        factors: &BTreeMap<String, f64>,
    ) -> Result<Self> {
        let spec::Optimizer::Adamw(hyper) = &stage.optimizer;
        let groups = Groups::resolve(&stage.param_groups, stage.lr, hyper.weight_decay, trained)?
            .multiplied(factors)?
            .decay_layers(stage.layer_decay, distances)?;
        let schedule = Schedule::new(&stage.lr_scheduler, total_steps);
        let noise = Key::new(stage.seed, &format!("rounding/{name}"));
        let own = Self::new(hyper.clone(), groups, schedule, stage.max_grad_norm, noise);
        own.moves()?;
        Ok(own)
    }

    /// Every trained parameter must have a learning rate above 0 in some step, also in f32, in which rates are applied.
    fn moves(&self) -> Result<()> {
        for (group, schedule) in self.groups.list().iter().zip(&self.schedules) {
            let (name, warmup, total) = (&group.name, schedule.warmup(), schedule.total());
            if schedule.highest() == 0.0 {
                bail!("no step has a learning rate above 0: group `{name}` warms up for {warmup} steps, from 0 on, and the stage has {total}";
                    "set lr_scheduler = {{ cosine = {{ warmup_steps = 0 }} }}, or train for more steps (epochs, max_steps, a smaller batch.global)")
            }
            for peak in group.peaks().map(|p| p * schedule.highest()) {
                if !(f64::from(f32::MIN_POSITIVE)..=f64::from(f32::MAX)).contains(&peak) {
                    bail!("a parameter of group `{name}` has a learning rate of {peak:.1e} at most, which f32 cannot hold";
                        "choose another lr{}", if group.factors[0] < 1.0 { ", or a layer_decay closer to 1" } else { "" })
                }
            }
        }
        Ok(())
    }

    /// The groups, each with its schedule.
    pub fn schedules(&self) -> impl Iterator<Item = (&Group, &Schedule)> {
        self.groups.list().iter().zip(&self.schedules)
    }

    /// Steps made so far; also the index of the next one.
    pub fn steps_done(&self) -> usize {
        self.step
    }

    /// Which parameter belongs to which group.
    pub fn groups(&self) -> &Groups {
        &self.groups
    }

    /// Learning rate of every group in step `step` (from 0), in the order of [`Groups::list`]; a parameter's own is that by its
    /// [`Member::factor`].
    pub fn lrs(&self, step: usize) -> Vec<f64> {
        self.groups.list().iter().zip(&self.schedules).map(|(g, s)| g.lr * s.factor(step)).collect()
    }

    /// Bytes of one parameter's moments.
    pub fn moment_bytes(&self, member: &Member) -> u64 {
        let n = elements(member);
        let bytes = if self.eight(member) { 2 * (n + 4 * n.div_ceil(BLOCK)) } else { 8 * n };
        bytes as u64
    }

    /// Bytes of the moments that steps will still allocate on `device`, where the parameters are.
    pub fn bytes_to_come(&self, device: &Device) -> u64 {
        let there = |name: &String| self.state.get(name).is_some_and(|s| s.moments.is_on(device));
        let fresh = self.groups.members().iter().filter(|(name, _)| !there(name));
        fresh.map(|(_, m)| self.moment_bytes(m)).sum()
    }

    /// Updates, in place, every parameter that has a gradient; rounded copies follow. `params` (all that train) and `grads` by
    /// name; each gradient has its parameter's shape, and its dtype, or f32 beside a bf16 parameter, which is rounded
    /// stochastically. Nothing is changed when a gradient is misshaped, NaN or infinite: the error names it.
    pub fn step(&mut self, params: &BTreeMap<String, Weight>, grads: &BTreeMap<String, Tensor>) -> Result<StepReport> {
        for (name, grad) in grads {
            check(name, self.groups.member(name)?, &find(name, params)?.value, grad)?;
        }
        let lrs = self.lrs(self.step);
        let norms = self.update(params, grads, &lrs);
        // What was never updated has no state.
        self.state.retain(|_, s| s.updates > 0);
        let norms = norms?;
        let report = |((g, lr), norm): ((&Group, &f64), &f64)| {
            let [low, high] = g.factors;
            let (lr, lr_lowest) = (high * lr, (low < high).then_some(low * lr));
            GroupReport { name: g.name.clone(), lr, lr_lowest, peak: g.peaks()[1], grad_norm: *norm }
        };
        let groups = self.groups.list().iter().zip(&lrs).zip(&norms.groups).map(report).collect();
        let squares = self.groups.members().keys().cloned().zip(norms.squares).collect();
        let report = StepReport { step: self.step, grad_norm: norms.total, clip: norms.clip, groups, squares };
        self.step += 1;
        Ok(report)
    }

    /// The update itself, at one learning rate a group; gradients have been checked.
    fn update(
        &mut self,
        params: &BTreeMap<String, Weight>,
        grads: &BTreeMap<String, Tensor>,
        lrs: &[f64],
    ) -> Result<Norms> {
        for (name, grad) in grads {
            let (eight, device) = (self.eight(self.groups.member(name)?), find(name, params)?.value.device());
            match self.state.get_mut(name) {
                Some(s) => s.moments.to_device(device)?,
                None => {
                    let moments = Moments::zeros(grad, eight).with_context(|| name)?;
                    self.state.insert(name.clone(), State { moments, updates: 0 });
                }
            }
        }
        let mut rows = Vec::with_capacity(params.len());
        for (name, member) in self.groups.members() {
            let update = grads.get(name).zip(self.state.get(name)).map(|(grad, s)| Gradient {
                grad,
                moments: &s.moments,
                rate: self.rate(member, lrs[member.group] * member.factor, s.updates + 1),
            });
            let (weight, eight) = (find(name, params)?, self.eight(member));
            rows.push(Parameter { weight, update, eight, group: member.group });
        }
        let hyper = Step {
            betas: self.hyper.betas,
            eps: self.hyper.eps,
            max_norm: self.max_grad_norm,
            groups: self.groups.list().len(),
            noise: self.noise,
            index: self.step as u32,
        };
        let norms = step(&rows, &hyper, &mut self.plan)?;
        if norms.skipped {
            return Err(self.not_finite(&norms));
        }
        self.state.iter_mut().filter(|(name, _)| grads.contains_key(*name)).for_each(|(_, s)| s.updates += 1);
        Ok(norms)
    }

    /// Are this parameter's moments stored in 8 bits?
    fn eight(&self, member: &Member) -> bool {
        self.hyper.moments == MomentType::Eight && elements(member) >= SMALLEST_EIGHT
    }

    /// The factors of a parameter's `t`-th update. Powers of a whole number of updates; torch computes them in f64 as well.
    fn rate(&self, member: &Member, lr: f64, t: u32) -> Rate {
        let [c1, c2] = self.hyper.betas.map(|beta| 1.0 - beta.powf(f64::from(t)));
        Rate { keep: 1.0 - lr * member.weight_decay, size: lr / c1, correction: c2.sqrt() }
    }

    /// The error that names the first gradient that is not finite.
    fn not_finite(&self, norms: &Norms) -> Error {
        let bad = self.groups.members().keys().zip(&norms.squares).find(|(_, s)| !s.is_finite());
        let (what, kind) = match bad {
            Some((name, s)) => (format!("the gradient of `{name}`"), if s.is_nan() { "NaN" } else { "infinite" }),
            None => ("the norm of all gradients".to_string(), "infinite"),
        };
        Error::new(format!("{what} is {kind}")).hint(
            "lower `lr`, lengthen the warm-up, set `max_grad_norm = 1.0`; if it happens in the first steps, check the data and the weights",
        ).diverged()
    }

    /// Everything a resumed run needs: `step` (number of steps made) and, by parameter, `NAME.exp_avg`,
    /// `NAME.exp_avg_sq` and `NAME.step` (its number of updates); for 8-bit moments `NAME.exp_avg_scale` and
    /// `NAME.exp_avg_sq_scale` too. The moments share storage with the optimizer: write them out before the next step.
    pub fn state(&self) -> Result<BTreeMap<String, Tensor>> {
        let mut out = BTreeMap::from([(STEP.to_string(), counter(self.step as u32)?)]);
        for (name, s) in &self.state {
            let mut put = |what: &str, t: &Tensor| out.insert(format!("{name}.{what}"), t.clone());
            match &s.moments {
                Moments::Full { mean, square } => {
                    put(EXP_AVG, mean);
                    put(EXP_AVG_SQ, square);
                }
                Moments::Eight { mean, square } => {
                    for (what, m) in [(EXP_AVG, mean), (EXP_AVG_SQ, square)] {
                        put(what, &m.codes);
                        put(&format!("{what}{SCALE}"), &m.scales);
                    }
                }
            }
            out.insert(format!("{name}.{STEP}"), counter(s.updates)?);
        }
        Ok(out)
    }

    /// Continues from a [`AdamW::state`] of the same parameters. Errors name a tensor that is unknown, missing or
    /// misshaped; the optimizer is then as before.
    pub fn load_state(&mut self, state: &BTreeMap<String, Tensor>) -> Result<()> {
        let get = |key: &str| match state.get(key) {
            Some(t) => Ok(t),
            None => {
                bail!("the optimizer state has no `{key}`"; "the checkpoint is incomplete; resume from an earlier one")
            }
        };
        let done = count(STEP, get(STEP)?)?;
        let mut loaded = BTreeMap::new();
        for key in state.keys().filter(|k| k.as_str() != STEP) {
            let Some((name, what)) = key.rsplit_once('.') else { bail!("the optimizer state has an unknown `{key}`") };
            let Some(member) = self.groups.members().get(name) else {
                bail!(
                    "the optimizer state has `{key}`, but `{name}` is not trained now";
                    "the stage trained other parameters when the checkpoint was written; start the stage again or undo the change"
                );
            };
            let of = |what: &str| format!("{name}.{what}");
            match what.strip_suffix(SCALE).unwrap_or(what) {
                EXP_AVG if what == EXP_AVG => {
                    let eight = self.eight(member);
                    let moments = moments(member, eight, |what| {
                        let key = of(what);
                        get(&key).map(|t| (key, t))
                    })?;
                    let updates = count(&of(STEP), get(&of(STEP))?)?;
                    loaded.insert(name.to_string(), State { moments, updates });
                }
                EXP_AVG | EXP_AVG_SQ => drop(get(&of(EXP_AVG))?),
                _ if what == STEP => drop(get(&of(EXP_AVG))?),
                _ => bail!("the optimizer state has an unknown `{key}`"),
            }
        }
        self.step = done as usize;
        self.state = loaded;
        Ok(())
    }
}

fn elements(member: &Member) -> usize {
    member.shape.iter().product()
}

fn find<'a>(name: &str, params: &'a BTreeMap<String, Weight>) -> Result<&'a Weight> {
    match params.get(name) {
        Some(w) => Ok(w),
        None => bail!("`{name}` is trained but not among the parameters"),
    }
}

/// A gradient must fit its parameter, and both must be what the update can work on.
fn check(name: &str, member: &Member, param: &Tensor, grad: &Tensor) -> Result<()> {
    if param.dims() != member.shape || grad.dims() != member.shape {
        bail!(
            "`{name}`: the optimizer knows shape {:?}, the parameter has {:?}, its gradient {:?}",
            member.shape,
            param.dims(),
            grad.dims()
        );
    }
    if !matches!((param.dtype(), grad.dtype()), (DType::F32 | DType::BF16, DType::F32) | (DType::F64, DType::F64)) {
        bail!(
            "`{name}`: parameter {:?} and gradient {:?}; a gradient is f32 (or f64 for an f64 parameter)",
            param.dtype(),
            grad.dtype()
        );
    }
    if !param.is_contiguous() {
        bail!("`{name}` is not contiguous in memory: {:?}", param.layout());
    }
    Ok(())
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

/// Copies of a parameter's moments as they were saved; `get` gives a tensor and its key.
fn moments<'a>(member: &Member, eight: bool, get: impl Fn(&str) -> Result<(String, &'a Tensor)>) -> Result<Moments> {
    let own = |what: &str, shape: &[usize], types: &[DType]| {
        let (key, t) = get(what)?;
        if (t.dtype() == DType::U8) != types.contains(&DType::U8) {
            let (found, wanted) = if eight { ("f32", "8bit") } else { ("8bit", "f32") };
            bail!("the optimizer state's `{key}` is {:?}: its moments are {found}, the recipe says {wanted}", t.dtype();
                "set `moments = \"{found}\"` again, or start the stage again")
        }
        if t.dims() != shape || !types.contains(&t.dtype()) {
            bail!("the optimizer state's `{key}` is {:?} {:?}, not {:?} {shape:?}", t.dtype(), t.dims(), types[0]);
        }
        Ok(t.copy()?)
    };
    if !eight {
        let moment = |what| own(what, &member.shape, &[DType::F32, DType::F64]);
        return Ok(Moments::Full { mean: moment(EXP_AVG)?, square: moment(EXP_AVG_SQ)? });
    }
    let moment = |what: &str| -> Result<Codes> {
        let codes = own(what, &member.shape, &[DType::U8])?;
        Ok(Codes { codes, scales: own(&format!("{what}{SCALE}"), &[elements(member).div_ceil(BLOCK)], &[DType::F32])? })
    };
    Ok(Moments::Eight { mean: moment(EXP_AVG)?, square: moment(EXP_AVG_SQ)? })
}

#[cfg(test)]
mod tests;
