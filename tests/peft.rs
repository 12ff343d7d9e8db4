//! Agreement with PEFT: DoRA, rsLoRA, several adapters at once, what they leave in merged weights, LoRA+, prompt tuning. The
//! values are made by `golden/lora/make.py`, in f64, and so is what is held against them; but LLaMA's norms, rotations and softmax
//! are in f32 there whatever the model is in, so outputs agree as f32 does. Merged weights are f64 throughout.

mod tiny;

use adfreeze::adapters::{attach, inserts, lora};
use adfreeze::checkpoint::{peft, safetensors};
use adfreeze::model::init::{FromWeights, Place};
use adfreeze::model::language::Language;
use adfreeze::model::params::Module;
use adfreeze::model::projector::Projector;
use adfreeze::model::vision::Tower;
use adfreeze::model::vlm::{Batch, Mode, Vlm};
use adfreeze::model::weights::Weights;
use adfreeze::ops::Weight;
use adfreeze::ops::random::Key;
use adfreeze::optim::{AdamW, Groups, Schedule};
use adfreeze::pipeline::state::State;
use adfreeze::spec::{self, Adapter, MlpProjector, Scheduler, Warmup};
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use tiny::{distance, flat, gradients};

/// Bounds of an error relative to the largest number, and of a gradient's relative to its norm.
const OUTPUTS: f64 = 1e-6;
const GRADIENTS: f64 = 2e-6;

const IMAGE_TOKENS: usize = 16;
const TEXT: [u32; 8] = [5, 40, 112, 9, 300, 77, 21, 2];

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn expected() -> BTreeMap<String, Tensor> {
    let all = safetensors::load(&golden("lora/expected.safetensors")).unwrap();
    all.into_iter().map(|(n, t)| (n, t.to_dtype(DType::F64).unwrap())).collect()
}

fn model(dtype: DType) -> Vlm {
    let (config, mut weights) = Weights::whole(&golden("a/model")).unwrap();
    let place = Place { device: Device::Cpu, dtype };
    let mut src = FromWeights { weights: &mut weights, place: &place };
    let tower = Tower::new(config.vision.clone(), config.select_layer, config.select_feature, &mut src).unwrap();
    let (d_in, d_out) = (config.vision.hidden_size, config.text.hidden_size);
    let (act, hidden) = (config.projector_act, None);
    let mlp = MlpProjector { source: None, depth: 2, hidden, act, input_norm: false, norm: false };
    let projector = spec::Projector::Mlp(mlp);
    let projector = Projector::new(&projector, d_in, d_out, config.projector_bias, &mut src).unwrap();
    let language = Language::new(config.text.clone(), &mut src).unwrap();
    weights.finish().unwrap();
    Vlm::new(Some(tower), Some(projector), language, config.image_token_index)
}

fn language() -> Vlm {
    let (config, mut weights) = Weights::language(&golden("a/language")).unwrap();
    let place = Place { device: Device::Cpu, dtype: DType::F64 };
    let language = Language::new(config, &mut FromWeights { weights: &mut weights, place: &place }).unwrap();
    weights.finish().unwrap();
    Vlm::new(None, None, language, None)
}

/// A start token, `pictures` (none or one) and a text of which each token is a target.
fn batch(vlm: &Vlm, pictures: usize) -> Batch {
    let mut ids = vec![1];
    ids.extend(vec![vlm.image_token_id.unwrap_or(0); IMAGE_TOKENS * pictures]);
    let first = ids.len() as u32 - 1;
    ids.extend(TEXT);
    let side = 56;
    let pixel = |i: usize| ((i * 7919) % 1000) as f64 / 500.0 - 1.0;
    let pixels: Vec<f64> = (0..3 * side * side).map(pixel).collect();
    let pixels = Tensor::from_vec(pixels, (1, 3, side, side), &Device::Cpu).unwrap();
    Batch {
        lengths: vec![ids.len()],
        ids,
        pixels: (pictures == 1).then(|| pixels.to_dtype(vlm.language.dtype()).unwrap()),
        layouts: Vec::new(),
        pictures: vec![0; pictures],
        targets: (first..).zip(TEXT).collect(),
        owners: vec![0; TEXT.len()],
    }
}

fn logps(vlm: &Vlm, batch: &Batch) -> Vec<f64> {
    vlm.forward(batch, Mode::default()).unwrap().0.logps().unwrap()
}

/// Log-probabilities and logits of a case.
#[track_caller]
fn check_outputs(case: &str, vlm: &Vlm, batch: &Batch, want: &BTreeMap<String, Tensor>) {
    let logps = Tensor::new(logps(vlm, batch), &Device::Cpu).unwrap();
    let off = distance(&logps, &want[&format!("{case}.logps")]);
    assert!(off < OUTPUTS, "{case}: log-probabilities are off by {off:e}");
    let soft = vlm.prefixes.iter().map(|p| p.embeddings.value.dims()[0]).sum::<usize>();
    let side = vlm.language.side(&[batch.ids.len() + soft], None, false).unwrap();
    let rows: Vec<u32> = batch.targets[..2].iter().map(|(row, _)| row + soft as u32).collect();
    let logits = vlm.language.logits(vlm.embed_prompt(batch).unwrap(), &side, &rows).unwrap();
    let off = distance(&logits, &want[&format!("{case}.logits")]);
    assert!(off < OUTPUTS, "{case}: logits are off by {off:e}");
}

/// Gradients of the mean loss of all parameters of adapters.
#[track_caller]
fn check_gradients(case: &str, vlm: &mut Vlm, batch: &Batch, want: &BTreeMap<String, Tensor>) {
    let own: BTreeSet<String> = vlm.names(|p| p.is_adapter());
    vlm.train_only(&own);
    let got = gradients(vlm, batch, &[-1.0 / TEXT.len() as f64; TEXT.len()], Mode::default());
    let prefix = format!("{case}.grad.");
    let want: BTreeMap<String, &Tensor> =
        want.iter().filter_map(|(n, t)| n.strip_prefix(&prefix).map(|n| (canonical(n), t))).collect();
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{case}");
    let norm = |t: &Tensor| flat(t).iter().map(|x| x * x).sum::<f64>().sqrt();
    for (name, g) in got {
        let off = norm(&(&g - want[&name]).unwrap()) / norm(want[&name]);
        assert!(off < GRADIENTS, "{case}: the gradient of {name} is off by {off:e} of its norm");
    }
}

/// Our name of a parameter of PEFT, whose only adapter is called `start`.
fn canonical(peft: &str) -> String {
    let name = peft.strip_prefix("base_model.model.model.").unwrap_or(peft);
    let name = name.replacen("language_model.", "language.", 1).replacen("vision_tower.", "vision.", 1);
    let bare = name.strip_suffix(".weight").unwrap_or(&name);
    let named = bare.ends_with(".rslora") || bare.ends_with(".dora");
    if named { format!("{bare}.weight") } else { format!("{bare}.start.weight") }
}

fn adapted(folders: &[(&str, &str)]) -> Vlm {
    let mut vlm = model(DType::F64);
    for (folder, name) in folders {
        let peft::Loaded::Lora(adapter) = peft::load(&golden("lora").join(folder), name).unwrap() else {
            panic!("{folder} is no LoRA")
        };
        lora::attach_loaded(&mut vlm, &adapter).unwrap();
    }
    vlm.plan();
    vlm
}

fn check_merged(case: &str, mut vlm: Vlm, want: &BTreeMap<String, Tensor>) {
    lora::merge(&mut vlm).unwrap();
    let case = format!("{case}.merged");
    check_outputs(&case, &vlm, &batch(&vlm, 1), want);
    let params = vlm.params();
    for name in ["language.layers.0.self_attn.v_proj", "vision.encoder.layers.1.self_attn.k_proj"] {
        let off = distance(&params[&format!("{name}.weight")], &want[&format!("{case}.{name}.weight")]);
        assert!(off < 1e-12, "{case}: {name} is off by {off:e}");
    }
}

#[test]
fn dora_and_rslora() {
    let want = expected();
    for case in ["dora", "rslora", "dora_rslora"] {
        let mut vlm = adapted(&[(case, "start")]);
        let batch = batch(&vlm, 1);
        check_outputs(case, &vlm, &batch, &want);
        check_gradients(case, &mut vlm, &batch, &want);
    }
    check_merged("dora", adapted(&[("dora", "start")]), &want);
}

#[test]
fn several_adapters_act_one_after_the_other() {
    let want = expected();
    for names in [["rslora", "dora"], ["dora", "rslora"]] {
        let case = names.join("_then_");
        let mut vlm = adapted(&names.map(|n| (n, n)));
        let batch = batch(&vlm, 1);
        check_outputs(&case, &vlm, &batch, &want);
        if names[0] == "rslora" {
            check_gradients(&case, &mut vlm, &batch, &want);
        }
        check_merged(&case, vlm, &want);
    }
}

#[test]
fn lora_plus() {
    const LR: f64 = 2e-3;
    let mut vlm = adapted(&[("dora", "start")]);
    let own: BTreeSet<String> = vlm.names(|p| p.is_adapter());
    vlm.train_only(&own);
    let cfg = spec::Lora { rank: 4, alpha: 8.0, dora: true, lr_ratio: Some(16.0), ..Default::default() };
    let state = State::new(vlm, Some(Adapter::Lora(cfg)));
    let factors = state.lr_factors();
    let shapes = state.vlm.trainable().into_iter().map(|(n, t)| (n, t.dims().to_vec())).collect();
    let groups = Groups::resolve(&[], LR, 0.0, &shapes).unwrap().multiplied(&factors).unwrap();
    let told: Vec<_> = groups.list().iter().map(|g| (g.name.as_str(), g.lr, g.tensors)).collect();
    assert_eq!(told, [("default", LR, 10), ("default ×16", 16.0 * LR, 20)]);
    let schedule = Schedule::new(&Scheduler::Constant(Warmup::default()), 6);
    let hyper = spec::AdamW { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.0, ..Default::default() };
    let mut optimizer = AdamW::new(hyper, groups, schedule, 0.0, Key::new(0, "none"));
    let (batch, params) = (batch(&state.vlm, 1), state.vlm.trainable());
    for (step, want) in flat(&expected()["loraplus.losses"]).into_iter().enumerate() {
        let loss = -logps(&state.vlm, &batch).iter().sum::<f64>() / TEXT.len() as f64;
        assert!((loss - want).abs() < OUTPUTS, "step {step}: {loss}, PEFT {want}");
        let grads = gradients(&state.vlm, &batch, &[-1.0 / TEXT.len() as f64; TEXT.len()], Mode::default());
        optimizer.step(&Weight::plain(&params), &grads).unwrap();
    }
}

#[test]
fn prompt_tuning() {
    let (want, mut vlm) = (expected(), language());
    let folder = golden("lora/prompt");
    let peft::Loaded::Prompt(embeddings) = peft::load(&folder, "start").unwrap() else { panic!("no prompt") };
    inserts::attach_loaded_prefix(&mut vlm, &embeddings, "start").unwrap();
    let batch = batch(&vlm, 0);
    check_outputs("prompt", &vlm, &batch, &want);
    vlm.train_only(&["language.prefix.start.weight".to_string()].into());
    let got = gradients(&vlm, &batch, &[-1.0 / TEXT.len() as f64; TEXT.len()], Mode::default());
    let off = distance(&got["language.prefix.start.weight"], &want["prompt.grad"]);
    assert!(off < GRADIENTS, "the gradient is off by {off:e}");
    // Another width, another model.
    let narrow = embeddings.narrow(1, 0, 16).unwrap();
    let e = inserts::attach_loaded_prefix(&mut vlm, &narrow, "other").unwrap_err();
    assert!(e.to_string().contains("[3, 16] for a language model of width 32"), "{e}");
}

/// What we save of PEFT's adapters is what PEFT has saved: the tensors to the byte, and the configuration in all that decides.
#[test]
fn saved_again_they_are_the_same_files() {
    let dir = tempfile::tempdir().unwrap();
    let bytes = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    let words = |dir: &Path| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(dir.join("adapter_config.json")).unwrap()).unwrap()
    };
    for folder in ["dora", "rslora", "dora_rslora", "prompt"] {
        let (theirs, ours) = (golden("lora").join(folder), dir.path().join(folder));
        match peft::load(&theirs, "x").unwrap() {
            peft::Loaded::Lora(a) => a.save(&ours, peft::Base::Whole, None).unwrap(),
            peft::Loaded::Prompt(t) => peft::save_prompt(&ours, &t, &language().language.config, None).unwrap(),
        }
        assert!(bytes(&theirs) == bytes(&ours), "{folder}");
        let (theirs, ours) = (words(&theirs), words(&ours));
        for (key, value) in ours.as_object().unwrap() {
            // Patterns are written by full name, and `target_modules` names the layers one by one.
            if !["target_modules", "rank_pattern", "alpha_pattern"].contains(&key.as_str()) {
                assert_eq!(*value, theirs[key], "{folder}: {key}");
            }
        }
    }
}

/// Writes adapters of our own making, and what the model then says, for `golden/lora/verify.py` to load with PEFT.
#[test]
#[ignore = "writes what a Python script is to read: set ADFREEZE_PEFT_OUT to a folder"]
fn written_for_peft() {
    let out = PathBuf::from(std::env::var_os("ADFREEZE_PEFT_OUT").expect("ADFREEZE_PEFT_OUT"));
    let mut told: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
    let target = vec!["language.layers.*_proj".to_string(), "vision.encoder.layers.*.{fc1,q_proj}".to_string()];
    for (case, dora, rslora) in [("dora", true, false), ("dora_rslora", true, true), ("rslora", false, true)] {
        let mut vlm = model(DType::F32);
        let base = vlm.params();
        let cfg = spec::Lora { rank: 3, alpha: 5.0, dora, rslora, target: target.clone(), ..Default::default() };
        attach(&mut vlm, &Adapter::Lora(cfg.clone()), case, Key::new(1, case)).unwrap();
        nudge(&mut vlm, &base);
        told.insert(case, logps(&vlm, &batch(&vlm, 1)));
        lora::export(&vlm, case, &cfg).unwrap().save(&out.join(case), peft::Base::Whole, None).unwrap();
    }
    let mut vlm = language();
    let base = vlm.params();
    attach(
        &mut vlm,
        &Adapter::Prefix(spec::Prefix { name: None, tokens: 4, before: Default::default(), freeze: false }),
        "soft",
        Key::new(1, "p"),
    )
    .unwrap();
    nudge(&mut vlm, &base);
    told.insert("prompt", logps(&vlm, &batch(&vlm, 0)));
    let soft = vlm.prefixes[0].embeddings.value.to_dtype(DType::F32).unwrap();
    peft::save_prompt(&out.join("prompt"), &soft, &vlm.language.config, None).unwrap();
    std::fs::write(out.join("told.json"), serde_json::to_string(&told).unwrap()).unwrap();
}

/// Moves the adapters' parameters alone, a little.
fn nudge(vlm: &mut Vlm, base: &BTreeMap<String, Tensor>) {
    let before = vlm.params();
    let dtype = vlm.language.dtype();
    let moved = before.iter().filter(|(n, _)| !base.contains_key(*n)).map(|(n, t)| {
        let noise = tiny::noise(n, t.dims(), 0.1).to_dtype(dtype).unwrap();
        (n.clone(), (t + noise).unwrap())
    });
    vlm.assign(&moved.collect()).unwrap();
}
