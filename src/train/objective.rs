//! What a stage minimises, as coefficients on log-probabilities.
//!
//! The model's head returns the log-probability of every label token; an objective turns them into a loss and into
//! dL/dlogp, one number a token, which the backward pass applies. SFT: mean negative log-likelihood over the label
//! tokens of the whole global batch. DPO (Rafailov et al. 2023) and its variants IPO (Azar et al. 2023), hinge (SLiC,
//! Zhao et al. 2023) and robust (Chowdhury et al. 2024), with TRL's conventions:
//!
//! ```text
//! c = logπ(chosen) − logπ_ref(chosen)      r = logπ(rejected) − logπ_ref(rejected)      d = c − r
//! sigmoid  −log σ(βd)                      hinge   max(0, 1 − βd)
//! ipo      (c/|c| − r/|r| − 1/(2β))²       robust  [−(1−ε) log σ(βd) + ε log σ(−βd)] / (1 − 2ε)
//! ```
//!
//! with |c|, |r| the number of label tokens. Rewards are βc and βr.

use crate::bail;
use crate::error::Result;
use crate::spec::{Dpo, DpoLoss};
use serde::Serialize;

/// dL/dlogp of every label token of a global batch under the SFT loss −Σ logp / `targets`.
/// An error when the batch has no label token.
pub fn sft_coefficient(targets: usize) -> Result<f64> {
    if targets == 0 {
        bail!("the batch has no label token, so its loss is undefined"; "check the data with `adfreeze check`");
    }
    Ok(-1.0 / targets as f64)
}

/// Summed log-probabilities of one preference pair and the numbers of label tokens they were summed over.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Pair {
    pub chosen: f64,
    pub rejected: f64,
    pub ref_chosen: f64,
    pub ref_rejected: f64,
    pub chosen_tokens: usize,
    pub rejected_tokens: usize,
}

/// Loss of one pair and its derivatives by the policy's two summed log-probabilities. In a batch of n pairs each
/// label token of the pair's answers gets `d_chosen / n` and `d_rejected / n`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairLoss {
    pub loss: f64,
    pub d_chosen: f64,
    pub d_rejected: f64,
    pub reward_chosen: f64,
    pub reward_rejected: f64,
}

impl PairLoss {
    /// Reward of the chosen answer minus that of the rejected one.
    pub fn margin(&self) -> f64 {
        self.reward_chosen - self.reward_rejected
    }

    /// Whether the chosen answer has the higher reward.
    pub fn correct(&self) -> bool {
        self.margin() > 0.0
    }
}

/// The preference loss of one pair. An error when an answer has no label token or β, ε are out of range.
pub fn dpo(settings: &Dpo, pair: &Pair) -> Result<PairLoss> {
    let Dpo { beta, label_smoothing: eps, .. } = *settings;
    if !(beta > 0.0 && beta.is_finite() && (0.0..0.5).contains(&eps)) {
        bail!("dpo: beta = {beta}, label_smoothing = {eps}"; "beta is above 0, label_smoothing in 0..0.5");
    }
    if pair.chosen_tokens == 0 || pair.rejected_tokens == 0 {
        bail!("a preference pair has an answer without label tokens"; "check the data with `adfreeze check`");
    }
    let (c, r) = (pair.chosen - pair.ref_chosen, pair.rejected - pair.ref_rejected);
    let d = beta * (c - r);
    // (loss, dL/dc, dL/dr)
    let (loss, d_chosen, d_rejected) = match settings.loss {
        DpoLoss::Sigmoid => both(-log_sigmoid(d), -beta * sigmoid(-d)),
        DpoLoss::Hinge => both((1.0 - d).max(0.0), if d < 1.0 { -beta } else { 0.0 }),
        DpoLoss::Robust => {
            let loss = -(1.0 - eps) * log_sigmoid(d) + eps * log_sigmoid(-d);
            let slope = -(1.0 - eps) * sigmoid(-d) - eps * sigmoid(d);
            both(loss / (1.0 - 2.0 * eps), beta * slope / (1.0 - 2.0 * eps))
        }
        DpoLoss::Ipo => {
            let (nc, nr) = (pair.chosen_tokens as f64, pair.rejected_tokens as f64);
            let gap = c / nc - r / nr - 0.5 / beta;
            (gap * gap, 2.0 * gap / nc, -2.0 * gap / nr)
        }
    };
    Ok(PairLoss { loss, d_chosen, d_rejected, reward_chosen: beta * c, reward_rejected: beta * r })
}

/// A loss of c − r alone pulls on both answers equally.
fn both(loss: f64, slope: f64) -> (f64, f64, f64) {
    (loss, slope, -slope)
}

fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 { 1.0 / (1.0 + (-x).exp()) } else { x.exp() / (1.0 + x.exp()) }
}

fn log_sigmoid(x: f64) -> f64 {
    x.min(0.0) - (-x.abs()).exp().ln_1p()
}

/// Means over the pairs of a step, under TRL's names.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct DpoMetrics {
    #[serde(skip)]
    pub loss: f64,
    #[serde(rename = "rewards/chosen")]
    pub reward_chosen: f64,
    #[serde(rename = "rewards/rejected")]
    pub reward_rejected: f64,
    #[serde(rename = "rewards/margins")]
    pub margin: f64,
    #[serde(rename = "rewards/accuracies")]
    pub accuracy: f64,
    #[serde(rename = "logps/chosen")]
    pub chosen: f64,
    #[serde(rename = "logps/rejected")]
    pub rejected: f64,
    #[serde(rename = "ref_logps/chosen")]
    pub ref_chosen: f64,
    #[serde(rename = "ref_logps/rejected")]
    pub ref_rejected: f64,
}

impl DpoMetrics {
    /// Means in the order of `pairs`; zeros when there are none.
    pub fn mean(pairs: &[(Pair, PairLoss)]) -> Self {
        let n = pairs.len().max(1) as f64;
        let mean = |f: &dyn Fn(&Pair, &PairLoss) -> f64| pairs.iter().map(|(p, l)| f(p, l)).sum::<f64>() / n;
        Self {
            loss: mean(&|_, l| l.loss),
            reward_chosen: mean(&|_, l| l.reward_chosen),
            reward_rejected: mean(&|_, l| l.reward_rejected),
            margin: mean(&|_, l| l.margin()),
            accuracy: mean(&|_, l| f64::from(l.correct())),
            chosen: mean(&|p, _| p.chosen),
            rejected: mean(&|p, _| p.rejected),
            ref_chosen: mean(&|p, _| p.ref_chosen),
            ref_rejected: mean(&|p, _| p.ref_rejected),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::Reference;
    use serde_json::Value;

    const LOSSES: [(DpoLoss, &str); 4] =
        [(DpoLoss::Sigmoid, "sigmoid"), (DpoLoss::Ipo, "ipo"), (DpoLoss::Hinge, "hinge"), (DpoLoss::Robust, "robust")];

    fn settings(beta: f64, loss: DpoLoss, label_smoothing: f64) -> Dpo {
        Dpo { beta, loss, reference: Reference::Start, label_smoothing }
    }

    fn golden(file: &str) -> Value {
        let path = format!("{}/tests/golden/a/{file}", env!("CARGO_MANIFEST_DIR"));
        serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
    }

    fn number(v: &Value, key: &str) -> f64 {
        v[key].as_f64().unwrap_or_else(|| panic!("{key} in {v}"))
    }

    fn cases() -> Vec<Pair> {
        let rows = golden("dpo_losses.json")["rows"].as_array().unwrap().clone();
        rows.iter().map(|r| pair(&r["case"])).collect()
    }

    fn pair(c: &Value) -> Pair {
        Pair {
            chosen: number(c, "chosen"),
            rejected: number(c, "rejected"),
            ref_chosen: number(c, "ref_chosen"),
            ref_rejected: number(c, "ref_rejected"),
            chosen_tokens: number(c, "chosen_len") as usize,
            rejected_tokens: number(c, "rejected_len") as usize,
        }
    }

    #[test]
    fn losses_agree_with_trl() {
        let mut checked = 0;
        for row in golden("dpo_losses.json")["rows"].as_array().unwrap() {
            for l in row["losses"].as_array().unwrap().iter().filter(|l| l["source"] == "trl") {
                let Some((loss, _)) = LOSSES.iter().find(|(_, name)| l["loss_type"] == *name) else { continue };
                let s = settings(number(row, "beta"), *loss, number(l, "label_smoothing"));
                let got = dpo(&s, &pair(&row["case"])).unwrap().loss;
                let want = number(l, "loss");
                assert!((got - want).abs() <= 2e-6 * want.abs().max(1.0), "{l}: {got}");
                checked += 1;
            }
        }
        assert_eq!(checked, 8 * 5);
    }

    #[test]
    fn derivatives_agree_with_finite_differences() {
        for pair in cases() {
            for (loss, name) in LOSSES {
                let s = settings(0.1, loss, if loss == DpoLoss::Robust { 0.2 } else { 0.0 });
                let h = 1e-5;
                let at = |dc: f64, dr: f64| {
                    let moved = Pair { chosen: pair.chosen + dc, rejected: pair.rejected + dr, ..pair };
                    dpo(&s, &moved).unwrap().loss
                };
                let got = dpo(&s, &pair).unwrap();
                let (c, r) = ((at(h, 0.0) - at(-h, 0.0)) / (2.0 * h), (at(0.0, h) - at(0.0, -h)) / (2.0 * h));
                assert!((got.d_chosen - c).abs() < 1e-7, "{name} {pair:?}: {} {c}", got.d_chosen);
                assert!((got.d_rejected - r).abs() < 1e-7, "{name} {pair:?}: {} {r}", got.d_rejected);
            }
        }
    }

    #[test]
    fn rewards_agree_with_trl_at_the_start_of_training() {
        let all = golden("train_dpo.json");
        let pairs: Vec<(Pair, PairLoss)> = all["order"][0]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|micro| micro.as_array().unwrap())
            .map(|i| {
                let p = &all["initial_pairs"][i.as_u64().unwrap() as usize];
                let pair = Pair {
                    chosen: number(p, "policy_chosen"),
                    rejected: number(p, "policy_rejected"),
                    ref_chosen: number(p, "ref_chosen"),
                    ref_rejected: number(p, "ref_rejected"),
                    chosen_tokens: number(p, "chosen_targets") as usize,
                    rejected_tokens: number(p, "rejected_targets") as usize,
                };
                (pair, dpo(&settings(0.1, DpoLoss::Sigmoid, 0.0), &pair).unwrap())
            })
            .collect();
        let got = DpoMetrics::mean(&pairs);
        let step = &all["steps"][0];
        assert!((got.loss - number(step, "loss")).abs() < 3e-6);
        for (key, value) in serde_json::to_value(got).unwrap().as_object().unwrap() {
            let (got, want) = (value.as_f64().unwrap(), number(step, key));
            assert!((got - want).abs() < 1e-5 * want.abs().max(1.0), "{key}: {got} {want}");
        }
    }

    #[test]
    fn policy_at_its_reference_has_loss_ln_2() {
        let p = Pair {
            chosen: -5.0,
            rejected: -9.0,
            ref_chosen: -5.0,
            ref_rejected: -9.0,
            chosen_tokens: 3,
            rejected_tokens: 4,
        };
        let l = dpo(&settings(0.1, DpoLoss::Sigmoid, 0.0), &p).unwrap();
        assert_eq!(l.loss, std::f64::consts::LN_2);
        assert!(!l.correct() && l.margin() == 0.0);
        assert_eq!((l.d_chosen, l.d_rejected), (-0.05, 0.05));
    }

    #[test]
    fn extreme_margins_stay_finite() {
        for (chosen, rejected) in [(-1.0, -1e5), (-1e5, -1.0)] {
            let p =
                Pair { chosen, rejected, ref_chosen: -10.0, ref_rejected: -10.0, chosen_tokens: 2, rejected_tokens: 2 };
            for (loss, name) in LOSSES {
                let l = dpo(&settings(0.5, loss, 0.0), &p).unwrap();
                assert!(l.loss.is_finite() && l.d_chosen.is_finite() && l.d_rejected.is_finite(), "{name}");
            }
        }
    }

    #[test]
    fn sft_is_normalised_by_the_targets_of_the_step() {
        assert_eq!(sft_coefficient(4).unwrap(), -0.25);
        assert!(sft_coefficient(0).unwrap_err().cause().contains("no label token"));
    }

    #[test]
    fn settings_and_pairs_are_checked() {
        let p = cases()[0];
        assert!(dpo(&settings(0.0, DpoLoss::Sigmoid, 0.0), &p).is_err());
        assert!(dpo(&settings(0.1, DpoLoss::Robust, 0.5), &p).is_err());
        let empty = Pair { rejected_tokens: 0, ..p };
        assert!(dpo(&settings(0.1, DpoLoss::Ipo, 0.0), &empty).unwrap_err().cause().contains("without label tokens"));
    }
}
