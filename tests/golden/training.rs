//! The three training curves, step by step, and the final weights.

use super::{Golden, distance};
use adfreeze::checkpoint::{peft, safetensors};
use adfreeze::data::Item;
use adfreeze::model::params::Module;
use adfreeze::model::segment::Kept;
use adfreeze::model::vlm::Vlm;
use adfreeze::ops::Weight;
use adfreeze::ops::random::Key;
use adfreeze::optim::{AdamW, Groups, Schedule};
use adfreeze::spec::{self, Dpo, DpoLoss, ParamGroup, Reference, Scheduler, Template, Warmup};
use adfreeze::train::step::{ReferenceTable, StepConfig, Task, compute, pair_logps};
use candle_core::Tensor;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};

pub fn run(g: &Golden) {
    let projector = [
        "projector.linear_1.weight",
        "projector.linear_1.bias",
        "projector.linear_2.weight",
        "projector.linear_2.bias",
    ];
    let projector: BTreeSet<String> = projector.map(str::to_string).into();
    let mut vlm = g.model("model");
    vlm.train_only(&projector);
    curve(g, "train_projector", &mut vlm, "data/plain.json", Template::Plain);
    let want = g.tensors("train_projector_final.safetensors");
    final_weights(g, "train_projector", &mut vlm, &want);

    let mut vlm = g.with_lora();
    let lora: BTreeSet<String> = vlm.params().into_keys().filter(|n| n.contains(".lora_")).collect();
    vlm.train_only(&lora.union(&projector).cloned().collect());
    curve(g, "train_sft_lora", &mut vlm, "data/sft.json", Template::VicunaV1);
    let mut want = safetensors::load(&g.path("train_sft_lora_final/projector.safetensors")).unwrap();
    want.extend(safetensors::load(&g.path("train_sft_lora_final/adapter_model.safetensors")).unwrap());
    final_weights(g, "train_sft_lora", &mut vlm, &want);

    let mut vlm = g.with_lora();
    vlm.train_only(&lora);
    curve(g, "train_dpo", &mut vlm, "data/dpo.jsonl", Template::VicunaV1);
    let want = safetensors::load(&g.path("train_dpo_final/adapter_model.safetensors")).unwrap();
    final_weights(g, "train_dpo", &mut vlm, &want);
    // PEFT's folder is read as a whole too.
    assert_eq!(peft::LoraAdapter::load(&g.path("train_dpo_final"), "x").unwrap().tensors.len() * 2, want.len());
}

fn curve(g: &Golden, name: &str, vlm: &mut Vlm, file: &str, template: Template) {
    let want = super::json(&g.path(&format!("{name}.json")));
    let (items, hyper) = (g.items(file, template), &want["hyper"]);
    let pixels = g.pixels(&items);
    let mut optimizer = optimizer(&want, vlm);
    let settings = Dpo {
        beta: want["beta"].as_f64().unwrap_or(0.1),
        loss: DpoLoss::Sigmoid,
        reference: Reference::Base,
        label_smoothing: 0.0,
    };
    let reference: ReferenceTable = if name == "train_dpo" {
        pair_logps(vlm, &items.iter().enumerate().collect::<Vec<_>>(), &pixels, true).unwrap()
    } else {
        ReferenceTable::new()
    };
    let task = if name == "train_dpo" { Task::Dpo { settings: &settings, reference: &reference } } else { Task::Sft };
    let params = vlm.trainable();
    let micro = hyper["micro_batch"].as_u64().unwrap() as usize;
    let mut worst: BTreeMap<String, f64> = BTreeMap::new();
    for (step, order) in want["steps"].as_array().unwrap().iter().zip(want["order"].as_array().unwrap()) {
        let indices =
            order.as_array().unwrap().iter().flat_map(|m| m.as_array().unwrap()).map(|i| i.as_u64().unwrap() as usize);
        let batch: Vec<(usize, &Item)> = indices.map(|i| (i, &items[i])).collect();
        let cfg = StepConfig { micro, kept: Kept::Minimal, dropout: Key::new(0, "none") };
        let done = compute(vlm, &task, &batch, &pixels, cfg).unwrap();
        let report = optimizer.step(&Weight::plain(&params), done.grads.by_name()).unwrap();
        let mut see = |k: &str, got: f64| {
            let e = (got - step[k].as_f64().unwrap()).abs();
            let w = worst.entry(k.to_string()).or_default();
            *w = w.max(if e.is_nan() { f64::INFINITY } else { e });
        };
        see("loss", done.loss);
        see("grad_norm", report.grad_norm);
        if let Some(m) = done.dpo {
            for (k, v) in [
                ("rewards/chosen", m.reward_chosen),
                ("rewards/rejected", m.reward_rejected),
                ("rewards/margins", m.margin),
                ("rewards/accuracies", m.accuracy),
                ("logps/chosen", m.chosen),
                ("logps/rejected", m.rejected),
                ("ref_logps/chosen", m.ref_chosen),
                ("ref_logps/rejected", m.ref_rejected),
            ] {
                see(k, v);
            }
        }
    }
    for (k, e) in worst {
        g.case(
            &format!("{name}: {k} over {} steps", want["steps"].as_array().unwrap().len()),
            e,
            g.tolerance(&[name, &k]),
        );
    }
}

/// The fixture's groups: LoRA, projector weights with decay, projector biases without.
fn optimizer(want: &Value, vlm: &mut Vlm) -> AdamW {
    let hyper = &want["hyper"];
    let mut groups = Vec::new();
    for (i, group) in want["groups"].as_array().unwrap().iter().enumerate() {
        let name = group["name"].as_str().unwrap();
        let patterns: &[&str] = match name {
            "lora" => &["*.lora_*"],
            n if n.ends_with("bias") => &["projector.*.bias"],
            n if n.ends_with("weight") => &["projector.*.weight"],
            other => panic!("group {i} is called {other}"),
        };
        groups.push(ParamGroup {
            name: Some(name.to_string()),
            r#match: patterns.iter().map(|p| p.to_string()).collect(),
            lr: group["lr"].as_f64(),
            weight_decay: group["weight_decay"].as_f64(),
            ..Default::default()
        });
    }
    let shapes: BTreeMap<String, Vec<usize>> =
        vlm.trainable().into_iter().map(|(n, t)| (n, t.dims().to_vec())).collect();
    let groups = Groups::resolve(&groups, 0.0, 0.0, &shapes).unwrap();
    let warmup = Warmup { warmup_ratio: None, warmup_steps: Some(hyper["warmup_steps"].as_u64().unwrap() as usize) };
    let schedule = Schedule::new(&Scheduler::Cosine(warmup), hyper["steps"].as_u64().unwrap() as usize);
    let beta = |i: usize| hyper["betas"][i].as_f64().unwrap();
    let adamw = spec::AdamW { betas: [beta(0), beta(1)], eps: hyper["eps"].as_f64().unwrap(), ..Default::default() };
    AdamW::new(adamw, groups, schedule, hyper["max_grad_norm"].as_f64().unwrap(), Key::new(1, "noise"))
}

fn final_weights(g: &Golden, name: &str, vlm: &mut Vlm, want: &BTreeMap<String, Tensor>) {
    let params = vlm.params();
    let worst = want.iter().map(|(k, t)| distance(&params[&g.canonical(k)], t)).fold(0.0, f64::max);
    g.case(&format!("{name}: {} final tensors", want.len()), worst, g.tolerance(&[name, "final_weights", "atol"]));
}
