//! Whether a stage still learns: a run whose weights an update has thrown far away goes on with a dead gradient and a loss that
//! says little, and would end as if all were well.

use crate::error::Result;
use crate::ops::adamw::sum_of_squares;
use candle_core::Tensor;
use std::collections::{BTreeMap, VecDeque};

/// Steps that must agree before anything is said.
const STEPS: usize = 5;

/// The gradient has collapsed below this share of what it was at the start …
const COLLAPSED: f64 = 1e-4;
/// … while the loss is above this share of what it was: a loss that is learnt takes its gradient with it.
const UNLEARNT: f64 = 0.5;

/// A loss this many times that of the start, and by this much more, is far above it.
const TIMES: f64 = 2.0;
const MORE: f64 = 1.0;

/// A tensor's root mean square has exploded above this, and this many times above that of the start.
const LARGE: f64 = 100.0;
const GROWN: f64 = 1000.0;

/// Root mean square of every tensor.
pub type Sizes = BTreeMap<String, f64>;

/// The sizes of `params`.
pub fn sizes(params: &BTreeMap<String, Tensor>) -> Result<Sizes> {
    let size =
        |(name, t): (&String, &Tensor)| Ok((name.clone(), (sum_of_squares(t)? / t.elem_count().max(1) as f64).sqrt()));
    params.iter().map(size).collect()
}

/// What has exploded the most since the start: its name, its size then and now. What is no number counts as such.
pub fn exploded(start: &Sizes, now: &Sizes) -> Option<(String, f64, f64)> {
    let grown = now.iter().filter_map(|(name, now)| {
        let before = start.get(name).copied().unwrap_or(0.0);
        (!now.is_finite() || (*now > LARGE && *now > GROWN * before)).then(|| (name.clone(), before, *now))
    });
    grown.max_by(|a, b| a.2.total_cmp(&b.2))
}

/// Watches the losses and gradients of a stage's steps.
#[derive(Debug, Default)]
pub struct Health {
    /// Loss and norm of the gradient of the first two steps at most, the largest of each.
    start: Option<(f64, f64)>,
    seen: usize,
    recent: VecDeque<(f64, f64)>,
    told: BTreeMap<&'static str, usize>,
}

impl Health {
    /// Notes a step; what to say of it. Each finding is told the 1st, 10th, 100th, … time.
    pub fn see(&mut self, loss: f64, gradient: f64) -> Option<String> {
        self.seen += 1;
        if self.seen <= 2 {
            let (l, g) = self.start.unwrap_or((loss, gradient));
            self.start = Some((l.max(loss), g.max(gradient)));
        }
        self.recent.push_back((loss, gradient));
        if self.recent.len() > STEPS {
            self.recent.pop_front();
        }
        let (kind, text) = self.finding()?;
        let n = self.again(kind)?;
        let count = if n > 1 { format!(" (so it was in {n} steps)") } else { String::new() };
        Some(format!("{text}{count}: lower the learning rate or lengthen the warm-up, and begin the stage again"))
    }

    /// Notes the sizes of a checkpoint's parameters; what to say of them, as seldom.
    pub fn see_sizes(&mut self, start: &Sizes, now: &Sizes) -> Option<String> {
        let grown = exploded(start, now)?;
        self.again("exploded").map(|_| told(&grown))
    }

    /// How often there was such a finding, if it is to be told.
    fn again(&mut self, kind: &'static str) -> Option<usize> {
        let n = self.told.entry(kind).or_default();
        *n += 1;
        let n = *n;
        std::iter::successors(Some(1usize), |t| t.checked_mul(10)).any(|t| t == n).then_some(n)
    }

    /// Do the last steps look as if the weights were worth keeping?
    pub fn is_sound(&self) -> bool {
        self.finding().is_none()
            && self.start.zip(self.recent.back()).is_none_or(|((l, _), now)| now.0 <= TIMES * l + MORE)
    }

    fn finding(&self) -> Option<(&'static str, String)> {
        let (loss, gradient) = self.start?;
        if self.recent.len() < STEPS || self.seen < STEPS + 2 {
            return None;
        }
        let mean = self.recent.iter().map(|(l, _)| l).sum::<f64>() / self.recent.len() as f64;
        let largest = self.recent.iter().map(|(_, g)| *g).fold(0.0, f64::max);
        if largest < COLLAPSED * gradient && mean > UNLEARNT * loss {
            let text = format!(
                "the gradients' norm has collapsed from {gradient:.1e} to {largest:.1e} while the loss is {mean:.4} (at the start: {loss:.4}): the weights have been thrown to where nothing is learnt"
            );
            return Some(("collapsed", text));
        }
        (mean > TIMES * loss + MORE).then(|| {
            ("above", format!("the loss, {mean:.4} over {STEPS} steps, is far above that of the start, {loss:.4}: the training has diverged"))
        })
    }
}

/// What to say of parameters that have exploded.
pub fn told((name, before, now): &(String, f64, f64)) -> String {
    format!(
        "`{name}` has grown from a root mean square of {before:.1e} to {now:.1e}: the learning rate (or the weight decay) is far too high; lower it, and begin the stage again"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told_at(steps: impl IntoIterator<Item = (f64, f64)>) -> Vec<(usize, String)> {
        let mut health = Health::default();
        steps.into_iter().enumerate().filter_map(|(i, (l, g))| Some((i + 1, health.see(l, g)?))).collect()
    }

    #[test]
    fn a_collapsed_gradient_is_told_and_a_learnt_loss_is_not() {
        let dead = [(5.9, 2.0); 3].into_iter().chain([(6.79, 4e-7); 60]);
        let said = told_at(dead);
        assert_eq!(said.iter().map(|(step, _)| *step).collect::<Vec<_>>(), [8, 17]);
        assert!(said[0].1.contains("from 2.0e0 to 4.0e-7") && said[0].1.contains("6.7900"), "{}", said[0].1);
        // Learnt by heart: the gradient is gone with the loss.
        assert!(told_at([(5.9, 2.0); 3].into_iter().chain([(1e-5, 4e-7); 60])).is_empty());
        // A stage that begins with an exploded gradient and settles.
        assert!(told_at([(5.9, 1e3), (5.9, 1e3)].into_iter().chain([(4.0, 0.5); 60])).is_empty());
    }

    #[test]
    fn a_loss_far_above_its_start_is_told() {
        let said = told_at([(2.0, 1.0); 2].into_iter().chain([(9.0, 1.0); 6]));
        assert!(said.len() == 1 && said[0].0 == 7 && said[0].1.contains("9.0000 over 5 steps"), "{said:?}");
        assert!(told_at([(2.0, 1.0); 2].into_iter().chain([(4.9, 1.0); 60])).is_empty());
        let mut health = Health::default();
        assert!(health.is_sound());
        health.see(0.7, 1.0);
        assert!(health.is_sound());
        health.see(0.7, 1.0);
        health.see(90.0, 1.0);
        assert!(!health.is_sound());
    }

    #[test]
    fn tensors_explode_against_their_own_start() {
        let start = Sizes::from([("a".into(), 0.02), ("b".into(), 0.0), ("norm".into(), 300.0)]);
        let now = |a: f64, b: f64| Sizes::from([("a".into(), a), ("b".into(), b), ("norm".into(), 400.0)]);
        assert_eq!(exploded(&start, &now(2.0, 5.0)), None);
        assert_eq!(exploded(&start, &now(2.0, 1e5)), Some(("b".into(), 0.0, 1e5)));
        assert!(exploded(&start, &now(f64::NAN, 0.1)).is_some_and(|e| e.0 == "a"));
    }
}
