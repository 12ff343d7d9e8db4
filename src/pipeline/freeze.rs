//! The proof that frozen stayed frozen, and that what trains gets gradients and stays a number.

use super::health::Sizes;
use super::run_dir::hex;
use super::state::State;
use crate::bail;
use crate::error::{Error, Result};
use crate::model::params::Module;
use crate::model::vlm::Vlm;
use crate::model::watch;
use crate::ops::adamw::sum_of_squares;
use crate::ops::launch::host;
use crate::optim::StepReport;
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};

/// 1234567 → 1,234,567.
pub fn thousands(n: usize) -> String {
    let s = n.to_string();
    let mut out = String::new();
    for (i, c) in s.chars().enumerate() {
        if i > 0 && (s.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Checksums of the frozen parameters.
pub fn frozen_checksums(state: &State) -> Result<BTreeMap<String, String>> {
    let trainable = state.vlm.trainable();
    let frozen: Vec<(String, Tensor)> =
        state.vlm.params().into_iter().filter(|(n, _)| !trainable.contains_key(n)).collect();
    frozen.into_par_iter().map(|(n, t)| Ok((n, checksum(&t)?))).collect()
}

/// SHA-256 of all weights, of which the frozen ones have been summed.
pub fn digest(state: &State, frozen: &BTreeMap<String, String>) -> Result<String> {
    let trained = state.vlm.trainable();
    state.vlm.language.device().synchronize()?;
    let sum = |(n, t): (String, Tensor)| Ok((n, checksum(&t)?));
    let mut all: BTreeMap<String, String> = trained.into_par_iter().map(sum).collect::<Result<_>>()?;
    all.extend(frozen.clone());
    let mut h = Sha256::new();
    all.iter().for_each(|(name, sum)| h.update(format!("{name} {sum}\n")));
    Ok(hex(&h.finalize()))
}

/// Checks the frozen parameters against their checksums at the stage's start; returns how many there are.
pub fn prove_frozen(state: &State, before: &BTreeMap<String, String>) -> Result<usize> {
    let after = frozen_checksums(state)?;
    let moved: Vec<&String> = before.keys().filter(|n| before.get(*n) != after.get(*n)).collect();
    if !moved.is_empty() {
        bail!("frozen parameters have changed: {moved:?}"; "this is a fault of adfreeze; please report it with the recipe")
    }
    Ok(before.len())
}

/// The trained parameters, of these sizes, must be numbers: what a broken update left is neither saved nor called done. The
/// error names the tensors.
pub fn prove_finite(trained: &Sizes) -> Result<()> {
    let broken: Vec<&str> = trained.iter().filter(|(_, size)| !size.is_finite()).map(|(n, _)| n.as_str()).collect();
    if broken.is_empty() {
        return Ok(());
    }
    let more = if broken.len() > 8 { ", …" } else { "" };
    let names = broken[..broken.len().min(8)].join(", ");
    let cause = format!("{} trained parameters are NaN or infinite after the update: {names}{more}", broken.len());
    Err(Error::new(cause).hint("lower the learning rate or lengthen the warm-up").diverged())
}

/// Puts the first parameter, in the order of a pass, that is not a number in front of an error that it may have led to; if all
/// are numbers, the first module that gives others when the pass runs `again`.
pub fn name_broken<T>(vlm: &Vlm, e: Error, again: impl FnOnce(&Vlm) -> T) -> Error {
    let mut first = None;
    vlm.visit(&mut |p| {
        if first.is_none() && sum_of_squares(&p.value).is_ok_and(|s| !s.is_finite()) {
            first = Some((p.name.clone(), p.trainable));
        }
    });
    if let Some((name, trains)) = first {
        let e = e.context(format!("`{name}` holds NaN or infinite values"));
        // Training has no part in what is frozen.
        let loaded = "the weights hold NaN as they were loaded: get the model's files again";
        return if trains { e } else { e.not_diverged().hint(loaded) };
    }
    match watch::first_broken(|| again(vlm)) {
        Some(module) => e.context(format!("all weights are finite, but what `{module}` makes of them is not")),
        None => e,
    }
}

/// Norm of all gradients above which training is about to break.
const EXPLODED: f64 = 100.0;

/// Watches for gradients that explode.
#[derive(Debug, Default)]
pub struct ExplosionWatch {
    seen: usize,
    /// Is what trains as the stage found it? Gradients of its first step are, and while the rates are 0, of the next.
    untouched: bool,
}

impl ExplosionWatch {
    /// What to say of a step's gradients; of exploded ones the 1st, 10th, 100th, … is told.
    pub fn see(&mut self, report: &StepReport, max_grad_norm: f64) -> Option<String> {
        let untouched = report.step == 0 || self.untouched;
        self.untouched = untouched && report.groups.iter().all(|g| g.lr == 0.0);
        if report.grad_norm <= EXPLODED {
            return None;
        }
        self.seen += 1;
        let told = std::iter::successors(Some(1usize), |n| n.checked_mul(10)).take_while(|n| *n <= self.seen);
        if told.last() != Some(self.seen) {
            return None;
        }
        let worst = report.groups.iter().max_by(|a, b| a.grad_norm.total_cmp(&b.grad_norm))?;
        let count = if self.seen > 1 { format!(" (so it was in {} steps)", self.seen) } else { String::new() };
        let clipping = if max_grad_norm == 0.0 { "set max_grad_norm = 1.0, or " } else { "" };
        let advice = match untouched {
            true => format!(
                "this stage has updated nothing yet, so look at its data, the weights that it starts from and the scale of their features first; then {clipping}lower its lr (at most {:.1e})",
                worst.peak
            ),
            false => format!("{clipping}lower its lr (at most {:.1e}), or lengthen its warm-up", worst.peak),
        };
        let (norm, name) = (report.grad_norm, &worst.name);
        Some(format!(
            "the gradients' norm is {norm:.3e}, above {EXPLODED}{count}; most of it is in group `{name}`: {advice}"
        ))
    }
}

/// SHA-256 of a tensor's elements.
pub fn checksum(t: &Tensor) -> Result<String> {
    let t = host(t)?;
    let bytes: Vec<u8> = match t.dtype() {
        DType::F64 => t.flatten_all()?.to_vec1::<f64>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        _ => t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
    Ok(hex(&Sha256::digest(&bytes)))
}

/// Watches that every trained parameter gets a gradient within an epoch.
pub struct GradientWatch {
    missing: BTreeSet<String>,
    /// Step (from 0) by which all must have had one.
    deadline: usize,
}

/// Steps that pass before a gradient has found its way through parts that begin at zero. A warm-up's first step has learning
/// rate 0 and moves nothing; each such part then takes one step to move before what lies behind it gets a gradient. At most two
/// follow each other: the gates of cross-attention, which reads the visual tokens, and `up` of a bottleneck projector or B of a
/// LoRA on the tower. The gates move in step 2, `up` or B in step 3, and `down` or A sees its first gradient in step 4.
const GRACE: usize = 4;

impl GradientWatch {
    /// For a stage that begins (or goes on) at step `first` and whose epoch has `epoch` steps.
    pub fn new(trainable: impl IntoIterator<Item = String>, first: usize, epoch: usize) -> Self {
        Self { missing: trainable.into_iter().collect(), deadline: first + epoch.max(GRACE) }
    }

    /// Notes the squares of the gradients of step `step` (from 0); an error names parameters that got none in a whole epoch.
    pub fn see(&mut self, step: usize, squares: &BTreeMap<String, f64>) -> Result<()> {
        self.missing.retain(|name| squares.get(name).is_none_or(|s| *s == 0.0));
        if step + 1 >= self.deadline && !self.missing.is_empty() {
            let names: Vec<&str> = self.missing.iter().take(8).map(String::as_str).collect();
            bail!("{} trained parameters got no gradient in a whole epoch: {}", self.missing.len(), names.join(", ");
                "freeze them (`!pattern` before the one that trains them), or give the stage data that reaches them")
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::optim::GroupReport;

    #[test]
    fn explosions_are_told_more_and_more_rarely() {
        let group = |name: &str, lr: f64, grad_norm: f64| {
            let name = name.into();
            GroupReport { name, lr, lr_lowest: None, peak: 2e-3, grad_norm }
        };
        let at = |step: usize, lr: f64, norm: f64| StepReport {
            step,
            grad_norm: norm,
            clip: 1.0,
            groups: vec![group("calm", lr, 1.0), group("wild", lr, norm)],
            squares: BTreeMap::new(),
        };
        let report = |norm: f64| at(7, 1e-3, norm);
        let mut watch = ExplosionWatch::default();
        let told: Vec<usize> = (1..=250).filter(|_| watch.see(&report(101.0), 1.0).is_some()).collect();
        assert_eq!(told, [1, 10, 100]);
        let mut watch = ExplosionWatch::default();
        assert_eq!(watch.see(&report(100.0), 1.0), None);
        let text = watch.see(&report(12_345.0), 0.0).unwrap();
        for part in
            ["1.234e4", "above 100", "`wild`", "set max_grad_norm = 1.0", "lower its lr (at most 2.0e-3)", "warm-up"]
        {
            assert!(text.contains(part), "`{part}` is not in: {text}");
        }
        let clipped = ExplosionWatch::default().see(&report(f64::INFINITY), 1.0).unwrap();
        assert!(!clipped.contains("max_grad_norm"), "{clipped}");
        assert!(!clipped.contains("updated nothing"), "{clipped}");
        // What no update has touched is told at once, and not by a rate of 0.
        let mut watch = ExplosionWatch::default();
        let first = watch.see(&at(0, 0.0, 500.0), 1.0).unwrap();
        for part in ["updated nothing yet", "data", "weights that it starts from", "features", "at most 2.0e-3"] {
            assert!(first.contains(part), "`{part}` is not in: {first}");
        }
        assert!(!first.contains("0.0e0") && !first.contains("warm-up"), "{first}");
        // The first rate is 0, so that the second step's gradients are those of the start as well, and the third's are not.
        for (step, untouched) in [(1, true), (2, false)] {
            watch.seen = 0;
            let text = watch.see(&at(step, 1e-3, 500.0), 1.0).unwrap();
            assert_eq!(text.contains("updated nothing yet"), untouched, "{step}: {text}");
        }
    }
}
