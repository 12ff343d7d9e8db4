//! How long the parts of a run take beside each other: for the time that is left.

use crate::data::{Dataset, Item};
use crate::spec::{Eval, Objective, Recipe, Stage};
use std::collections::BTreeMap;

/// What the parts of a run cost, in tokens through the model, a pass without gradients being a third of one with them: by it the
/// time is told that the run has left.
#[derive(Default)]
pub struct Costs {
    /// All steps of a stage, and its reference's pass over the data.
    stages: BTreeMap<String, (f64, f64)>,
    evals: BTreeMap<String, f64>,
}

impl Costs {
    const FORWARD: f64 = 1.0 / 3.0;

    /// A stage that makes so many steps on `data`.
    pub fn add_stage(&mut self, stage: &Stage, name: &str, data: &Dataset, steps: usize) {
        let tokens = tokens(data);
        let sample = tokens / data.items.len().max(1) as f64;
        let reference = if matches!(stage.objective, Objective::Dpo(_)) { tokens * Self::FORWARD } else { 0.0 };
        self.stages.insert(name.to_string(), (sample * (stage.batch.global * steps) as f64, reference));
    }

    /// An evaluation on `data`.
    pub fn add_eval(&mut self, eval: &Eval, name: &str, data: &Dataset) {
        let passes = 1.0 + eval.pictures.len() as f64;
        self.evals.insert(name.to_string(), tokens(data) * passes * Self::FORWARD);
    }

    /// The parts of a stage in their order.
    pub fn of(&self, recipe: &Recipe, name: &str) -> [(String, f64); 3] {
        let (steps, reference) = self.stages.get(name).copied().unwrap_or_default();
        let evals = recipe.stage[name].eval.iter().filter_map(|e| self.evals.get(e)).sum();
        [(format!("{name}: reference"), reference), (name.to_string(), steps), (format!("{name}: evaluations"), evals)]
    }
}

fn tokens(data: &Dataset) -> f64 {
    data.items.iter().flat_map(Item::samples).map(|s| s.ids.len() as f64).sum()
}
