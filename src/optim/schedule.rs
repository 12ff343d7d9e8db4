//! The learning rate over the steps, as a factor of its peak.
//!
//! Formulas of transformers' `get_{cosine,linear,constant}_schedule_with_warmup`: the warm-up is linear from 0, so the
//! first step has factor 0 when there is one; cosine and linear then fall to 0 at `total` steps.

use crate::spec::Scheduler;
use std::f64::consts::PI;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shape {
    Cosine,
    Linear,
    Constant,
}

/// A schedule with its warm-up resolved to a number of steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    shape: Shape,
    warmup: usize,
    total: usize,
}

impl Schedule {
    /// Resolves the warm-up against the number of optimizer steps of the stage; a ratio is rounded up, and a number of
    /// steps wins over a ratio (a recipe may have only one of them).
    pub fn new(scheduler: &Scheduler, total: usize) -> Self {
        let (shape, warmup) = match scheduler {
            Scheduler::Cosine(w) => (Shape::Cosine, w),
            Scheduler::Linear(w) => (Shape::Linear, w),
            Scheduler::Constant(w) => (Shape::Constant, w),
        };
        let ratio = (warmup.warmup_ratio.unwrap_or(0.0) * total as f64).ceil() as usize;
        Self { shape, warmup: warmup.warmup_steps.unwrap_or(ratio), total }
    }

    /// Another scheduler over the same steps.
    pub fn like(&self, scheduler: &Scheduler) -> Self {
        Self::new(scheduler, self.total)
    }

    /// Steps whose learning rate is still rising.
    pub fn warmup(&self) -> usize {
        self.warmup
    }

    /// The steps that it is laid out for.
    pub fn total(&self) -> usize {
        self.total
    }

    /// Highest factor of its steps: 1 where the warm-up ends among them.
    pub fn highest(&self) -> f64 {
        self.factor(self.warmup.min(self.total.saturating_sub(1)))
    }

    /// Factor of the peak learning rate in optimizer step `step`, counted from 0.
    pub fn factor(&self, step: usize) -> f64 {
        if step < self.warmup {
            return step as f64 / self.warmup as f64;
        }
        let span = self.total.saturating_sub(self.warmup).max(1) as f64;
        match self.shape {
            Shape::Cosine => (0.5 * (1.0 + (PI * (step - self.warmup) as f64 / span).cos())).max(0.0),
            Shape::Linear => self.total.saturating_sub(step) as f64 / span,
            Shape::Constant => 1.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Warmup;

    fn steps(n: usize) -> Warmup {
        Warmup { warmup_steps: Some(n), ..Warmup::default() }
    }

    #[test]
    fn agrees_with_the_golden_learning_rates() {
        for (file, peak) in [("train_projector", vec![5e-3, 5e-3]), ("train_sft_lora", vec![4e-3, 1e-3, 1e-3])] {
            let path = format!("{}/tests/golden/a/{file}.json", env!("CARGO_MANIFEST_DIR"));
            let json: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
            let schedule = Schedule::new(&Scheduler::Cosine(steps(3)), 20);
            let rows = json["steps"].as_array().unwrap();
            assert_eq!(rows.len(), 20);
            for (s, row) in rows.iter().enumerate() {
                for (i, p) in peak.iter().enumerate() {
                    let want = row["lrs"][i].as_f64().unwrap();
                    assert!((schedule.factor(s) * p - want).abs() < 1e-11, "{file} step {s}");
                }
            }
        }
    }

    #[test]
    fn linear_and_constant() {
        let linear = Schedule::new(&Scheduler::Linear(steps(2)), 6);
        let got: Vec<f64> = (0..7).map(|s| linear.factor(s)).collect();
        assert_eq!(got, [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]);
        let constant = Schedule::new(&Scheduler::Constant(steps(2)), 6);
        let got: Vec<f64> = (0..4).map(|s| constant.factor(s)).collect();
        assert_eq!(got, [0.0, 0.5, 1.0, 1.0]);
        assert_eq!(Schedule::new(&Scheduler::Linear(Warmup::default()), 6).factor(0), 1.0);
    }

    #[test]
    fn the_highest_factor_is_that_of_the_best_step() {
        for (warmup, total) in [(0, 1), (0, 6), (2, 6), (5, 6), (6, 6), (100, 6), (1, 1), (7, 1)] {
            for scheduler in [Scheduler::Cosine, Scheduler::Linear, Scheduler::Constant] {
                let s = Schedule::new(&scheduler(steps(warmup)), total);
                let best = (0..total).map(|i| s.factor(i)).fold(0.0, f64::max);
                assert_eq!(s.highest(), best, "{s:?}");
            }
        }
    }

    #[test]
    fn a_ratio_is_rounded_up() {
        let ratio = |r| Scheduler::Cosine(Warmup { warmup_ratio: Some(r), warmup_steps: None });
        assert_eq!(Schedule::new(&ratio(0.03), 5198).warmup(), 156);
        assert_eq!(Schedule::new(&ratio(0.0), 10).warmup(), 0);
    }
}
