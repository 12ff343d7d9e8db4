//! Merging the fixture's LoRA into the weights.

use super::{Golden, distance};
use adfreeze::adapters::lora;
use adfreeze::model::params::Module;
use adfreeze::spec::Template;

/// PEFT's own promise for a merge in f32.
const PEFT: f64 = 1e-5;

pub fn run(g: &Golden) {
    let mut vlm = g.with_lora();
    lora::merge(&mut vlm).unwrap();
    let params = vlm.params();
    let changed = g.tensors("merged/changed_weights.safetensors");
    let worst = changed.iter().map(|(k, t)| distance(&params[&g.canonical(k)], t)).fold(0.0, f64::max);
    g.case(&format!("LoRA merge: {} weights", changed.len()), worst, PEFT);
    let (_, batch) = g.batch("samples", "data/sft.json", Template::VicunaV1);
    let rows: Vec<u32> = batch.targets.iter().map(|t| t.0).collect();
    let side = vlm.language.side(&batch.lengths, None, false).unwrap();
    let got = vlm.language.logits(vlm.embed_prompt(&batch).unwrap(), &side, &rows).unwrap();
    let want = &g.tensors("merged/logits.safetensors")["logits_at_targets"];
    g.case("LoRA merge: logits", distance(&got, want), g.tolerance(&["merged/logits", "atol"]));
}
