//! Tower output, projected features, logits, log-probabilities and loss.

use super::{Golden, distance};
use adfreeze::model::vlm::{Batch, Mode, Vlm};
use adfreeze::spec::Template;
use candle_core::Tensor;
use std::collections::BTreeMap;

pub fn run(g: &Golden) {
    let want = g.tensors("forward.safetensors");
    let (_, batch) = g.batch("samples", "data/sft.json", Template::VicunaV1);
    for (name, vlm) in [
        ("model", g.model("model")),
        ("model_hub_naming", g.model("model_hub_naming")),
        ("vision + projector + language", g.parts("vision")),
        ("vision_clip_full + projector + language", g.parts("vision_clip_full")),
    ] {
        check(g, name, &vlm, &batch, &want, "");
    }
    // `pixel_values` holds a picture for each sample that shows one; ours are the distinct ones.
    let (hidden, projected) = g.model("model").project(&want["pixel_values"]).unwrap().unwrap();
    g.case("tower output", distance(&hidden, &want["vision_hidden"]), g.tolerance(&["forward/vision_hidden", "atol"]));
    g.case("projected features", distance(&projected, &want["projected"]), g.tolerance(&["forward/projected", "atol"]));
    check(g, "with LoRA", &g.with_lora(), &batch, &want, "lora.");
    let (_, plain) = g.batch("plain_samples", "data/plain.json", Template::Plain);
    check(g, "plain", &g.model("model"), &plain, &want, "plain.");
}

fn check(g: &Golden, name: &str, vlm: &Vlm, batch: &Batch, want: &BTreeMap<String, Tensor>, prefix: &str) {
    let (lp, _) = vlm.forward(batch, Mode::default()).unwrap();
    let tolerance = |k: &str| g.tolerance(&[&format!("forward/{prefix}{k}"), "atol"]);
    // The reference has a zero wherever the next token is no target.
    let targets: Vec<f64> = super::flat(&want[&format!("{prefix}logps")]).into_iter().filter(|x| *x != 0.0).collect();
    let logps = lp.logps().unwrap();
    assert_eq!(targets.len(), logps.len(), "{name}: number of targets");
    let worst = targets.iter().zip(&logps).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    g.case(&format!("{name}: log-probabilities"), worst, tolerance("logps"));
    let loss = -logps.iter().sum::<f64>() / logps.len() as f64;
    let want_loss = super::flat(&want[&format!("{prefix}loss")])[0];
    g.case(&format!("{name}: loss"), (loss - want_loss).abs(), tolerance("loss"));
    let x = vlm.embed_prompt(batch).unwrap();
    let side = vlm.language.side(&batch.lengths, None, false).unwrap();
    if let Some(logits) = want.get(&format!("{prefix}logits_at_targets")) {
        let rows: Vec<u32> = batch.targets.iter().map(|t| t.0).collect();
        let got = vlm.language.logits(x.clone(), &side, &rows).unwrap();
        g.case(&format!("{name}: logits at targets"), distance(&got, logits), tolerance("logits_at_targets"));
    }
    if let Some(logits) = want.get(&format!("{prefix}logits_sample0")) {
        let rows: Vec<u32> = (0..batch.lengths[0] as u32).collect();
        let got = vlm.language.logits(x, &side, &rows).unwrap();
        g.case(&format!("{name}: all logits of the first sample"), distance(&got, logits), tolerance("logits_sample0"));
    }
}
