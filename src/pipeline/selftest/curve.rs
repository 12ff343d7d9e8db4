//! What a training leaves to be compared: figures of every step, and the sizes of what it has changed.

use crate::bail;
use crate::checkpoint::safetensors;
use crate::error::{Context, Result};
use crate::ops::adamw::sum_of_squares;
use crate::pipeline::run_dir::RunDir;
use crate::pipeline::state::TRAINED;
use crate::spec::Recipe;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Curves by stage.
pub type Curves = BTreeMap<String, Curve>;

/// One stage's figures.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Curve {
    /// By step.
    pub loss: Vec<f64>,
    /// By step, over all that trains, before clipping.
    pub gradient_norm: Vec<f64>,
    /// DPO: by step, the reward of chosen less that of rejected answers.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub margin: Vec<f64>,
    /// Frobenius norms, at the end, of all tensors that differ from the backbones, by name.
    pub weights: BTreeMap<String, f64>,
}

/// As much of a line of `metrics.jsonl` as is compared.
#[derive(Deserialize)]
struct Line {
    stage: String,
    loss: f64,
    grad_norm_total: f64,
    #[serde(rename = "rewards/margins")]
    margin: Option<f64>,
}

/// The curves of a finished run.
pub fn read(recipe: &Recipe) -> Result<Curves> {
    let dir = RunDir::existing(&recipe.output_dir)?;
    let mut curves = Curves::new();
    for line in std::fs::read_to_string(dir.root().join("metrics.jsonl"))?.lines() {
        let line: Line = serde_json::from_str(line).context("metrics.jsonl")?;
        let curve = curves.entry(line.stage).or_default();
        curve.loss.push(line.loss);
        curve.gradient_norm.push(line.grad_norm_total);
        curve.margin.extend(line.margin);
    }
    for (stage, curve) in &mut curves {
        let all = safetensors::load(&dir.stage(recipe, stage).join("final").join(TRAINED))?;
        for (name, t) in all {
            curve.weights.insert(name, sum_of_squares(&t)?.sqrt());
        }
    }
    Ok(curves)
}

/// One kind of figure: the largest may be off by so much.
pub const KINDS: [&str; 4] = ["loss", "gradient norm", "margin", "weights"];

/// A figure beside what it should be.
struct Pair<'a> {
    kind: &'static str,
    /// Step (from 1) or tensor.
    place: Place<'a>,
    found: f64,
    want: f64,
    /// What a deviation is relative to.
    scale: f64,
}

enum Place<'a> {
    Step(usize),
    Tensor(&'a str),
}

impl std::fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Step(n) => write!(f, "step {n}"),
            Self::Tensor(name) => write!(f, "{name}"),
        }
    }
}

/// How far a curve is from another at its worst, for one kind of figure.
#[derive(Debug, Clone, PartialEq)]
pub struct Deviation {
    /// One of [`KINDS`].
    pub kind: &'static str,
    /// Relative: of the largest loss, gradient norm or margin of the stage, of the tensor's own norm. Infinite for NaN.
    pub off: f64,
    /// Where, and the two figures.
    pub told: String,
}

impl Curve {
    /// The worst deviation of each kind from `want`. An error if the two have not the same figures.
    pub fn deviations(&self, want: &Self) -> Result<Vec<Deviation>> {
        let mut worst: Vec<Deviation> = Vec::new();
        for p in self.pairs(want)? {
            let off = (p.found - p.want).abs() / p.scale;
            let off = if off.is_nan() { f64::INFINITY } else { off };
            let told = || format!("{} {} ({}) instead of {}", p.kind, p.found, p.place, p.want);
            match worst.iter_mut().find(|w| w.kind == p.kind) {
                None => worst.push(Deviation { kind: p.kind, off, told: told() }),
                Some(w) if off > w.off => (w.off, w.told) = (off, told()),
                Some(_) => {}
            }
        }
        Ok(worst)
    }

    fn pairs<'a>(&'a self, want: &'a Self) -> Result<Vec<Pair<'a>>> {
        let series =
            [(&self.loss, &want.loss), (&self.gradient_norm, &want.gradient_norm), (&self.margin, &want.margin)];
        let [.., weights] = KINDS;
        let mut pairs = Vec::new();
        for (kind, (found, want)) in KINDS.into_iter().zip(series) {
            if found.len() != want.len() {
                bail!("{} steps with a {kind} instead of {}", found.len(), want.len())
            }
            let scale = want.iter().fold(0.0, |m, x| x.abs().max(m));
            for (i, (found, want)) in found.iter().zip(want).enumerate() {
                pairs.push(Pair { kind, place: Place::Step(i + 1), found: *found, want: *want, scale });
            }
        }
        if !self.weights.keys().eq(want.weights.keys()) {
            bail!("other tensors were trained than in the reference")
        }
        for ((name, found), want) in self.weights.iter().zip(want.weights.values()) {
            pairs.push(Pair { kind: weights, place: Place::Tensor(name), found: *found, want: *want, scale: *want });
        }
        Ok(pairs)
    }
}
