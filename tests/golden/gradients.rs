//! Gradients in the three freeze settings: projector, LoRA + projector, everything.

use super::{Golden, distance, flat};
use adfreeze::model::params::{Grads, Module};
use adfreeze::model::segment::Kept;
use adfreeze::model::vlm::{Mode, Vlm};
use adfreeze::spec::Template;
use candle_core::Tensor;
use std::collections::{BTreeMap, BTreeSet};

pub fn run(g: &Golden) {
    let all = g.tensors("grads.safetensors");
    for (setting, vlm) in [("a", g.model("model")), ("b", g.with_lora()), ("c", g.model("model"))] {
        let prefix = format!("{setting}.");
        let want: BTreeMap<String, Tensor> =
            all.iter().filter_map(|(k, t)| k.strip_prefix(&prefix).map(|k| (g.canonical(k), t.clone()))).collect();
        let keep = compute(g, vlm.clone(), want.keys().cloned().collect(), Kept::Minimal);
        compare(g, setting, &want, &keep);
        let recompute = compute(g, vlm.clone(), want.keys().cloned().collect(), Kept::Input);
        let moved = keep.iter().map(|(k, t)| distance(t, &recompute[k])).fold(0.0, f64::max);
        g.case(&format!("gradients {setting}: recompute gives the same bits as keep"), moved, 0.0);
        let mixed = {
            let mut vlm = vlm.clone();
            vlm.recompute(&["*.layers[1..]".to_string()]).unwrap();
            compute(g, vlm, want.keys().cloned().collect(), Kept::Minimal)
        };
        let moved = keep.iter().map(|(k, t)| distance(t, &mixed[k])).fold(0.0, f64::max);
        g.case(&format!("gradients {setting}: recomputing some layers gives the same bits"), moved, 0.0);
    }
}

fn compute(g: &Golden, mut vlm: Vlm, trainable: BTreeSet<String>, kept: Kept) -> BTreeMap<String, Tensor> {
    let (_, batch) = g.batch("samples", "data/sft.json", Template::VicunaV1);
    assert_eq!(vlm.params().keys().filter(|k| trainable.contains(*k)).count(), trainable.len());
    vlm.train_only(&trainable);
    let mode = Mode { record: true, kept, ..Mode::default() };
    let (lp, saved) = vlm.forward(&batch, mode).unwrap();
    let mut grads = Grads::new();
    let coefs = vec![-1.0 / lp.rows() as f64; lp.rows()];
    vlm.backward(saved.unwrap(), &coefs, &mut grads).unwrap();
    grads.into_inner()
}

fn compare(g: &Golden, setting: &str, want: &BTreeMap<String, Tensor>, got: &BTreeMap<String, Tensor>) {
    assert_eq!(
        want.keys().collect::<Vec<_>>(),
        got.keys().collect::<Vec<_>>(),
        "gradients {setting}: other parameters"
    );
    let norm = |t: &Tensor| flat(t).iter().map(|x| x * x).sum::<f64>().sqrt();
    let largest = want.values().map(norm).fold(0.0, f64::max);
    let key = format!("grads/{setting}");
    let (mut worst, mut relative) = (0f64, 0f64);
    for (name, w) in want {
        worst = worst.max(distance(&got[name], w));
        // Tensors whose gradient is zero up to rounding are compared against the largest gradient.
        if norm(w) > 1e-6 * largest {
            let diff = norm(&(&got[name] - w).unwrap());
            relative = relative.max(diff / norm(w));
        }
    }
    g.case(
        &format!("gradients {setting}: {} tensors, largest difference", want.len()),
        worst,
        g.tolerance(&[&key, "atol"]),
    );
    g.case(
        &format!("gradients {setting}: worst relative difference of a tensor"),
        relative,
        g.tolerance(&[&key, "per_tensor_rel_l2"]),
    );
}
