//! TRL's loss variants on fixed log-probabilities.

use super::Golden;
use adfreeze::spec::{Dpo, DpoLoss, Reference};
use adfreeze::train::objective::{Pair, dpo};

pub fn run(g: &Golden) {
    let table = super::json(&g.path("dpo_losses.json"));
    for (i, row) in table["rows"].as_array().unwrap().iter().enumerate() {
        let c = &row["case"];
        let f = |k: &str| c[k].as_f64().unwrap();
        let pair = Pair {
            chosen: f("chosen"),
            rejected: f("rejected"),
            ref_chosen: f("ref_chosen"),
            ref_rejected: f("ref_rejected"),
            chosen_tokens: f("chosen_len") as usize,
            rejected_tokens: f("rejected_len") as usize,
        };
        // TRL itself; the other rows are formulas that it does not compute.
        for l in row["losses"].as_array().unwrap().iter().filter(|l| l["source"] == "trl") {
            let name = l["loss_type"].as_str().unwrap();
            let loss = match name {
                "sigmoid" => DpoLoss::Sigmoid,
                "ipo" => DpoLoss::Ipo,
                "hinge" => DpoLoss::Hinge,
                "robust" => DpoLoss::Robust,
                _ => continue,
            };
            let smoothing = l["label_smoothing"].as_f64().unwrap();
            let beta = row["beta"].as_f64().unwrap();
            let settings = Dpo { beta, loss, reference: Reference::Base, label_smoothing: smoothing };
            let (got, want) = (dpo(&settings, &pair).unwrap().loss, l["loss"].as_f64().unwrap());
            let error = (got - want).abs() / want.abs().max(1.0);
            g.case(&format!("DPO loss {name}, ε {smoothing}, β {beta}, case {i}"), error, 1e-6);
        }
    }
}
