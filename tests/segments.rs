//! Every segment and the whole chain in f64: gradients against finite differences, the same bits whatever is kept,
//! frozen parameters untouched, packing without influence.

#[path = "segments/kept.rs"]
mod kept;
mod tiny;

use adfreeze::adapters::lora;
use adfreeze::model::backbone::{LanguageConfig, RopeScaling};
use adfreeze::model::block::Block;
use adfreeze::model::build;
use adfreeze::model::dora::Magnitude;
use adfreeze::model::language::Language;
use adfreeze::model::linear::{InputGrad, Linear, LowRank};
use adfreeze::model::params::{Grads, Module, Param};
use adfreeze::model::role::{Init, Role, Scope};
use adfreeze::model::segment::{self, Kept, Segment, Side};
use adfreeze::model::vlm::{Mode, Vlm};
use adfreeze::ops::norm::Kind;
use adfreeze::ops::random::dropout;
use adfreeze::spec::{self, Activation, SelectFeature};
use candle_core::Tensor;
use std::collections::BTreeMap;
use tiny::*;

/// Σ y·g: a scalar whose gradient at y is g.
fn against(y: &Tensor, g: &Tensor) -> f64 {
    flat(y).iter().zip(flat(g)).map(|(y, g)| y * g).sum()
}

fn role() -> Role {
    Scope::language().role(Init::Zeros)
}

fn low_rank(name: &str, adapter: &str, dropout: f64) -> LowRank {
    let matrix = |m: &str, shape: &[usize]| {
        let name = format!("{name}.lora_{m}.{adapter}.weight");
        Param::new(name.clone(), noise(&name, shape, 0.5), role())
    };
    let (a, b) = (matrix("A", &[2, 5]), matrix("B", &[7, 2]));
    LowRank { adapter: adapter.into(), a, b, magnitude: None, scale: 0.7, dropout }
}

/// The same with a magnitude.
fn dora(name: &str, adapter: &str, dropout: f64) -> LowRank {
    let d = low_rank(name, adapter, dropout);
    LowRank { magnitude: Some(magnitude(name, adapter, d.b.value.dims()[0])), ..d }
}

fn magnitude(name: &str, adapter: &str, out: usize) -> Magnitude {
    let name = format!("{name}.lora_magnitude_vector.{adapter}.weight");
    Magnitude::new(Param::new(name.clone(), (noise(&name, &[out], 0.3) + 1.0).unwrap(), role()))
}

fn check_linear(what: &str, deltas: Vec<LowRank>, trains: impl Fn(&str) -> bool) {
    let mut l = build::linear(&mut source(), &Scope::of("layer", &role()), 7, 5, true).unwrap();
    l.deltas = deltas;
    perturb(&mut l);
    let chosen = names(&mut l, trains);
    l.set_trainable(&chosen);
    let (x, g) = (noise("x", &[6, 5], 1.0), noise("g", &[6, 7], 1.0));
    let mut side = Side::packed(&[6]);
    side.dropout = Some(key("dropout"));
    let before = snapshot(&mut l);
    let (_, saved) = l.forward(&x, &side).unwrap();
    let mut grads = Grads::new();
    let mut dx = InputGrad::Empty;
    l.backward(&saved, l.needs_input().then_some(&x), &g, &side, &mut grads, &mut dx).unwrap();
    assert!(snapshot(&mut l) == before, "{what}: a parameter changed");
    let lengths = lengths(&l);
    let run = |l: &Linear, x: &Tensor| {
        let mut l = l.clone();
        hold(&mut l, &lengths);
        against(&l.forward(x, &side).unwrap().0, &g)
    };
    check_slope(&format!("{what}: x"), &x, dx.sum().unwrap(), 30, |x| run(&l, &x));
    check_params(what, &mut l, grads.by_name(), |_| false, |l| run(l, &x));
}

#[test]
fn linear_layers_and_their_adapters() {
    let one = |p| vec![low_rank("layer", "sft", p)];
    let two = || vec![low_rank("layer", "sft", 0.0), low_rank("layer", "dpo", 0.4)];
    check_linear("frozen", vec![], |_| false);
    check_linear("all of a plain layer", vec![], |_| true);
    check_linear("bias alone", vec![], |n| n == "layer.bias");
    check_linear("LoRA", one(0.0), |n| n.contains("lora"));
    check_linear("LoRA with dropout", one(0.4), |n| n.contains("lora"));
    check_linear("A alone", one(0.4), |n| n.contains("lora_A"));
    check_linear("B alone", one(0.0), |n| n.contains("lora_B"));
    check_linear("LoRA and weight", one(0.0), |_| true);
    check_linear("two adapters, the first frozen", two(), |n| n.contains(".dpo."));
    check_linear("two adapters, both trained", two(), |n| n.contains("lora"));
    for p in [0.0, 0.4] {
        let what = |case: &str| format!("DoRA with dropout {p}, {case}");
        let one = || vec![dora("layer", "sft", p)];
        check_linear(&what("alone"), one(), |n| n.contains("lora"));
        check_linear(&what("magnitude"), one(), |n| n.contains("magnitude"));
        check_linear(&what("A and B"), one(), |n| n.contains("lora_A") || n.contains("lora_B"));
        check_linear(&what("everything"), one(), |_| true);
        check_linear(&what("frozen under the layer's own weights"), one(), |n| !n.contains("lora"));
        let three = || vec![low_rank("layer", "a", p), dora("layer", "b", p), low_rank("layer", "c", 0.3)];
        check_linear(&what("between two of LoRA"), three(), |n| n.contains("lora"));
        check_linear(&what("frozen between two of LoRA"), three(), |n| n.contains("lora") && !n.contains(".b."));
        let twice = vec![dora("layer", "a", p), dora("layer", "b", 0.2)];
        check_linear(&what("twice, with the weight"), twice, |_| true);
    }
}

/// PEFT's `DoraLinearVariant.forward` in candle's products, on the same masks: each update after the other.
#[test]
fn dora_computes_what_peft_does() {
    let x = noise("x", &[6, 5], 1.0);
    for (bias, p) in [(false, 0.0), (true, 0.0), (false, 0.4), (true, 0.4)] {
        let mut l = build::linear(&mut source(), &Scope::of("layer", &role()), 7, 5, bias).unwrap();
        l.deltas = vec![low_rank("layer", "a", 0.0), dora("layer", "b", p), dora("layer", "c", 0.0)];
        perturb(&mut l);
        let all = names(&mut l, |_| true);
        l.set_trainable(&all);
        let mut side = Side::packed(&[6]);
        side.dropout = Some(key("dropout"));
        let w = &l.weight.value;
        let product = |x: &Tensor, w: &Tensor| x.matmul(&w.t().unwrap()).unwrap();
        let b = l.bias.as_ref().map_or(noise("none", &[7], 0.0), |b| b.value.clone());
        let mut y = product(&x, w).broadcast_add(&b).unwrap();
        for d in &l.deltas {
            let x = if d.dropout > 0.0 {
                dropout(key("dropout").child(&d.a.name), &x, d.dropout).unwrap()
            } else {
                x.clone()
            };
            let update = (product(&product(&x, &d.a.value), &d.b.value) * d.scale).unwrap();
            let Some(m) = &d.magnitude else {
                y = (y + update).unwrap();
                continue;
            };
            let whole = (w + (d.b.value.matmul(&d.a.value).unwrap() * d.scale).unwrap()).unwrap();
            let gain = (&m.param.value / whole.sqr().unwrap().sum(1).unwrap().sqrt().unwrap()).unwrap();
            let base = if d.dropout > 0.0 { product(&x, w) } else { y.broadcast_sub(&b).unwrap() };
            let more = base.broadcast_mul(&(&gain - 1.0).unwrap()).unwrap();
            y = (y + (more + update.broadcast_mul(&gain).unwrap()).unwrap()).unwrap();
        }
        let got = l.forward(&x, &side).unwrap().0;
        assert!(distance(&got, &y) < 1e-12, "bias {bias}, dropout {p}");
    }
}

#[test]
fn dropout_masks_some_inputs_and_only_while_training() {
    let mut l = build::linear(&mut source(), &Scope::of("layer", &role()), 7, 5, true).unwrap();
    l.deltas = vec![low_rank("layer", "sft", 0.4)];
    let lora = names(&mut l, |n| n.contains("lora"));
    l.set_trainable(&lora);
    let x = noise("x", &[6, 5], 1.0);
    let (off, mut on) = (Side::packed(&[6]), Side::packed(&[6]));
    on.dropout = Some(key("dropout"));
    let y = |side: &Side, l: &Linear| bits(&l.forward(&x, side).unwrap().0);
    assert_ne!(y(&off, &l), y(&on, &l));
    l.set_trainable(&Default::default());
    assert_eq!(y(&off, &l), y(&on, &l));
}

#[test]
fn norms() {
    for kind in [Kind::Rms, Kind::Layer] {
        let mut n = build::norm(&mut source(), kind, &Scope::of("norm", &role()), 9, 1e-5).unwrap();
        perturb(&mut n);
        let all = names(&mut n, |_| true);
        n.set_trainable(&all);
        let (x, g) = (noise("x", &[5, 9], 1.0), noise("g", &[5, 9], 1.0));
        let (y, stats) = n.forward(&x).unwrap();
        assert_eq!(bits(&n.rebuild(&x, &stats).unwrap()), bits(&y));
        let mut grads = Grads::new();
        let sum = noise("residual", &[5, 9], 1.0);
        let residual = sum.copy().unwrap();
        n.backward_into(&x, &stats, &g, &mut grads, &sum).unwrap();
        let run = |n: &adfreeze::model::norm::Norm, x: &Tensor| against(&n.forward(x).unwrap().0, &g);
        check_slope("x", &x, &(sum - residual).unwrap(), 45, |x| run(&n, &x));
        check_params("norm", &mut n, grads.by_name(), |_| false, |n| run(n, &x));
    }
}

/// One layer: everything trained, LoRA on everything, and frozen with dX alone.
fn check_layer(what: &str, layer: &Block, x: &Tensor, side: &Side) {
    let mut adapted = layer.clone();
    for l in adapted.linears_mut() {
        let (out, d) = l.dims().unwrap();
        let name = l.name().to_string();
        let matrix = |m: &str, shape: &[usize]| {
            let name = format!("{name}.lora_{m}.sft.weight");
            Param::new(name.clone(), noise(&name, shape, 0.4), role())
        };
        l.deltas.push(LowRank {
            adapter: "sft".into(),
            a: matrix("A", &[2, d]),
            b: matrix("B", &[out, 2]),
            magnitude: None,
            scale: 0.5,
            dropout: 0.3,
        });
    }
    let mut stacked = adapted.clone();
    for l in stacked.linears_mut() {
        let name = l.name().to_string();
        let lora = l.deltas[0].clone();
        let renamed = |p: &Param| Param::new(p.name.replace(".sft.", ".dpo."), p.value.clone(), role());
        let m = Some(magnitude(&name, "dpo", lora.b.value.dims()[0]));
        let (a, b) = (renamed(&lora.a), renamed(&lora.b));
        l.deltas.push(LowRank { adapter: "dpo".into(), a, b, magnitude: m, scale: 0.8, dropout: 0.2 });
    }
    let g = noise("g", x.dims(), 1.0);
    let everything: fn(&str) -> bool = |_| true;
    #[allow(clippy::type_complexity, reason = "a table of name, segment, and what trains")]
    let cases: [(&str, &Block, fn(&str) -> bool); 7] = [
        ("everything", layer, everything),
        ("LoRA", &adapted, |n| n.contains("lora")),
        ("DoRA on LoRA", &stacked, |n| n.contains("lora")),
        ("DoRA on frozen LoRA", &stacked, |n| n.contains(".dpo.")),
        ("norms", layer, |n| n.contains("norm")),
        ("biases", layer, |n| n.ends_with("_proj.bias")),
        ("frozen", layer, |_| false),
    ];
    for (case, layer, trains) in cases {
        let what = format!("{what}, {case}");
        let mut layer = [layer.clone()];
        let chosen = names(&mut layer[0], trains);
        layer[0].set_trainable(&chosen);
        let before = snapshot(&mut layer[0]);
        let at: Lengths = layer[0].linears().flat_map(lengths).collect();
        let run = |layer: &Block, x: &Tensor| {
            let mut layer = layer.clone();
            layer.linears_mut().for_each(|l| hold(l, &at));
            against(&layer.forward(x, side, Kept::Minimal).unwrap().0, &g)
        };
        let mut results = Vec::new();
        for (kept, need_dx) in [(Kept::Minimal, true), (Kept::All, true), (Kept::Input, true), (Kept::Minimal, false)] {
            let (_, tape) = segment::forward(&layer, x.clone(), side, 0, kept).unwrap();
            assert_eq!(tape.bytes(), x.dims()[0] * layer[0].bytes_per_row(kept).unwrap(), "{what}, {kept:?}");
            let mut grads = Grads::new();
            let dx = segment::backward(&layer, tape, g.copy().unwrap(), side, &mut grads, need_dx).unwrap();
            assert_eq!(dx.is_some(), need_dx, "{what}");
            results.push((grads.into_inner(), dx));
        }
        assert!(snapshot(&mut layer[0]) == before, "{what}: a parameter changed");
        let same = |a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>| {
            a.len() == b.len() && a.iter().zip(b).all(|((n, x), (m, y))| n == m && bits(x) == bits(y))
        };
        assert!(same(&results[0].0, &results[1].0), "{what}: keeping all changes a gradient");
        assert!(same(&results[0].0, &results[2].0), "{what}: recompute changes a gradient");
        assert!(same(&results[0].0, &results[3].0), "{what}: leaving dX out changes a gradient");
        let (grads, dx) = results.remove(0);
        let dx = dx.unwrap();
        for (_, other) in &results[..2] {
            assert_eq!(bits(&dx), bits(other.as_ref().unwrap()), "{what}: what is kept changes dX");
        }
        check_slope(&format!("{what}: x"), x, &dx, 40, |x| run(&layer[0], &x));
        // Softmax does not see a shift of all scores of a query: without rotation, k's bias has no effect.
        let zero = |n: &str| n.ends_with("k_proj.bias") && side.rope.is_none();
        check_params(&what, &mut layer[0], &grads, zero, |l| run(l, x));
    }
}

fn llama_variants() -> Vec<(&'static str, LanguageConfig)> {
    let scaled = RopeScaling::Llama3 {
        factor: 4.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 16.0,
    };
    vec![
        ("one head a group", LanguageConfig { num_key_value_heads: 4, head_dim: 2, ..llama() }),
        ("grouped queries", llama()),
        (
            "one key head, biases",
            LanguageConfig { num_key_value_heads: 1, attention_bias: true, mlp_bias: true, ..llama() },
        ),
        ("linear scaling", LanguageConfig { rope_scaling: RopeScaling::Linear { factor: 2.5 }, ..llama() }),
        ("llama3 scaling", LanguageConfig { rope_scaling: scaled, ..llama() }),
    ]
}

#[test]
fn llama_layers() {
    for (what, config) in llama_variants() {
        let mut language = Language::new(config, &mut source()).unwrap();
        perturb(&mut language);
        let mut side = language.side(&[4, 1, 6], None, false).unwrap();
        side.dropout = Some(key("dropout"));
        let x = noise("x", &[11, 12], 1.0);
        check_layer(what, &language.layers[1], &x, &side);
    }
}

#[test]
fn clip_layers() {
    for act in [Activation::QuickGelu, Activation::Gelu, Activation::GeluTanh] {
        let mut tower =
            tower(adfreeze::model::backbone::VisionConfig { hidden_act: act, ..clip() }, -1, SelectFeature::Patch);
        perturb(&mut tower);
        let mut side = Side::packed(&[5, 5]);
        side.dropout = Some(key("dropout"));
        let x = noise("x", &[10, 8], 1.0);
        check_layer(&format!("{act:?}"), &tower.layers[0], &x, &side);
    }
}

#[test]
fn towers() {
    for (layer, select, b) in [
        (-1, SelectFeature::Patch, 1),
        (-1, SelectFeature::Full, 3),
        (-2, SelectFeature::Patch, 3),
        (-2, SelectFeature::Full, 1),
        (-4, SelectFeature::Full, 1),
        (-4, SelectFeature::Patch, 2),
    ] {
        let what = format!("select {layer} {select:?}, {b} pictures");
        let mut tower = tower(clip(), layer, select);
        perturb(&mut tower);
        let all = names(&mut tower, |_| true);
        tower.set_trainable(&all);
        let unreachable: Vec<String> = tower.unreachable().into_iter().map(|(n, _)| n).collect();
        let reachable = names(&mut tower, |n| !unreachable.iter().any(|u| u == n));
        tower.set_trainable(&reachable);
        tower.plan();
        assert!(tower.unreachable().is_empty());
        let pixels = noise("pixels", &[b, 3, 6, 6], 1.0);
        let run = |t: &adfreeze::model::vision::Tower, record, policy| {
            t.forward(&pixels, None, false, policy, record).unwrap()
        };
        let before = snapshot(&mut tower);
        let mut results = Vec::new();
        let mut g = noise("g", &[1], 1.0);
        for policy in [Kept::Minimal, Kept::All, Kept::Input] {
            let (y, saved) = run(&tower, true, policy);
            assert_eq!(y.dim(0).unwrap(), b * tower.grid().tokens());
            g = noise("g", y.dims(), 1.0);
            let mut grads = Grads::new();
            tower.backward(saved.unwrap(), g.copy().unwrap(), &mut grads).unwrap();
            results.push(grads.into_inner());
        }
        assert!(snapshot(&mut tower) == before, "{what}: a parameter changed");
        for (n, t) in &results[0] {
            assert!(results[1..].iter().all(|r| bits(t) == bits(&r[n])), "{what}: what is kept changes {n}");
        }
        let zero = |n: &str| n.ends_with("k_proj.bias") || (layer == -4 && n.ends_with("class_embedding"));
        check_params(&what, &mut tower, &results[0], zero, |t| against(&run(t, false, Kept::Minimal).0, &g));
    }
}

/// All checks of a whole model with the parameters that `trains` names.
fn check_chain(what: &str, vlm: &mut Vlm, trains: impl Fn(&str) -> bool, sequences: &[Sequence], dropout: bool) {
    let chosen = names(vlm, &trains);
    vlm.train_only(&chosen);
    let pictures = sequences.iter().any(|s| !s.pictures.is_empty());
    let unreachable: Vec<String> = vlm.unreachable(pictures).into_iter().map(|(n, _)| n).collect();
    let reachable = names(vlm, |n| trains(n) && !unreachable.iter().any(|u| u == n));
    vlm.train_only(&reachable);

    let batch = pack(vlm, &sequences.iter().collect::<Vec<_>>());
    let weights = coefs(batch.targets.len());
    let mode = Mode { dropout: dropout.then(|| key("dropout")), ..Mode::default() };
    let before = snapshot(vlm);
    let grads = gradients(vlm, &batch, &weights, mode);
    for kept in [Kept::All, Kept::Input] {
        let again = gradients(vlm, &batch, &weights, Mode { kept, ..mode });
        assert_close(&format!("{what}, {kept:?}"), &again, &grads, 0.0);
    }
    assert!(snapshot(vlm) == before, "{what}: a parameter changed");
    let zero = |n: &str| n.starts_with("vision.") && n.ends_with("k_proj.bias");
    check_params(what, vlm, &grads, zero, |v| loss(v, &batch, &weights, mode));

    if dropout {
        return;
    }
    // Each sequence alone, and in another order.
    let mut alone = Grads::new();
    for (i, s) in sequences.iter().enumerate() {
        let single = pack(vlm, &[s]);
        let own: Vec<f64> = batch.owners.iter().zip(&weights).filter(|(o, _)| **o == i).map(|(_, w)| *w).collect();
        for (name, g) in gradients(vlm, &single, &own, mode) {
            alone.add(&name, g).unwrap();
        }
    }
    assert!(snapshot(vlm) == before, "{what}: a parameter changed in a batch of one");
    assert_close(&format!("{what}, one by one"), alone.by_name(), &grads, 1e-12);
    let reversed = pack(vlm, &sequences.iter().rev().collect::<Vec<_>>());
    let mut order: Vec<f64> = Vec::new();
    for i in (0..sequences.len()).rev() {
        order.extend(batch.owners.iter().zip(&weights).filter(|(o, _)| **o == i).map(|(_, w)| *w));
    }
    assert_close(&format!("{what}, reversed"), &gradients(vlm, &reversed, &order, mode), &grads, 1e-12);
}

#[test]
fn language_models_alone() {
    for tie in [false, true] {
        let config = LanguageConfig { tie_word_embeddings: tie, ..llama() };
        let mut vlm = Vlm::new(None, None, Language::new(config, &mut source()).unwrap(), IMAGE);
        perturb(&mut vlm);
        let text = || sequences().into_iter().map(|s| Sequence { pictures: vec![], ..s }).collect::<Vec<_>>();
        check_chain(&format!("everything, tied {tie}"), &mut vlm, |_| true, &text(), false);
        check_chain(&format!("last layer, tied {tie}"), &mut vlm, |n| n.contains("layers.1."), &text(), false);
        check_chain(&format!("last norm, tied {tie}"), &mut vlm, |n| n == "language.norm.weight", &text(), false);
        check_chain(&format!("nothing, tied {tie}"), &mut vlm, |_| false, &text(), false);
        if !tie {
            check_chain("head alone", &mut vlm, |n| n.contains("lm_head"), &text(), false);
        }
    }
}

#[test]
fn the_padding_token_has_no_gradient() {
    let config = LanguageConfig { pad_token_id: Some(7), ..llama() };
    let mut vlm = vlm(clip(), -2, SelectFeature::Patch, &mlp(false), config);
    let embeddings = names(&mut vlm, |n| n.contains("embed_tokens"));
    vlm.train_only(&embeddings);
    let batch = pack(&vlm, &sequences().iter().collect::<Vec<_>>());
    let grads = gradients(&vlm, &batch, &coefs(batch.targets.len()), Mode::default());
    let table: Vec<Vec<f64>> = grads["language.embed_tokens.weight"].to_vec2().unwrap();
    for (id, row) in table.iter().enumerate() {
        // What ends a sequence feeds no target.
        let used = ![1, 7, IMAGE as usize].contains(&id) && batch.ids.contains(&(id as u32));
        assert_eq!(row.iter().any(|g| *g != 0.0), used, "token {id}");
    }
}

#[test]
fn whole_models() {
    for (layer, select, tie) in [(-2, SelectFeature::Patch, false), (-1, SelectFeature::Full, true)] {
        let config = LanguageConfig { tie_word_embeddings: tie, ..llama() };
        let fresh = || vlm(clip(), layer, select, &mlp(true), config.clone());
        let what = |case: &str| format!("{case}, select {layer} {select:?}");
        check_chain(&what("everything"), &mut fresh(), |_| true, &sequences(), false);
        check_chain(&what("projector"), &mut fresh(), |n| n.starts_with("projector."), &sequences(), false);
        check_chain(&what("one picture"), &mut fresh(), |n| !n.starts_with("language."), &sequences()[1..2], false);
        let upper = |n: &str| n.contains("layers.1.") || n.starts_with("projector.");
        check_chain(&what("second layers and projector"), &mut fresh(), upper, &sequences(), false);
    }
}

#[test]
fn adapters_on_tower_and_language_model() {
    for dropout in [0.0, 0.3] {
        let mut vlm = vlm(clip(), -2, SelectFeature::Patch, &mlp(false), llama());
        for (name, target) in [("sft", "*"), ("dpo", "language.*")] {
            let cfg = spec::Lora {
                name: Some(name.into()),
                rank: 2,
                alpha: 3.0,
                dropout,
                target: vec![target.into()],
                rslora: name == "dpo",
                ..Default::default()
            };
            lora::attach(&mut vlm, &cfg, name, key("lora")).unwrap();
        }
        perturb(&mut vlm);
        vlm.plan();
        let on = dropout > 0.0;
        let what = |case: &str| format!("{case}, dropout {dropout}");
        check_chain(&what("both adapters"), &mut vlm, |n| n.contains(".lora_"), &sequences(), on);
        check_chain(&what("second adapter"), &mut vlm, |n| n.contains(".dpo."), &sequences(), on);
        let sft = |n: &str| n.contains(".sft.") || n.starts_with("projector.");
        check_chain(&what("first adapter and projector"), &mut vlm, sft, &sequences(), on);
        check_chain(&what("first adapter, no picture"), &mut vlm, sft, &sequences()[2..], on);
    }
}

#[test]
fn adapters_switched_off_leave_the_base_model() {
    let base = vlm(clip(), -2, SelectFeature::Patch, &mlp(false), llama());
    let mut adapted = base.clone();
    let target = vec!["*".to_string()];
    let cfg = spec::Lora { rank: 2, alpha: 3.0, target, ..Default::default() };
    lora::attach(&mut adapted, &cfg, "sft", key("lora")).unwrap();
    let batch = pack(&base, &sequences().iter().collect::<Vec<_>>());
    let logps =
        |v: &Vlm, adapters_off| v.forward(&batch, Mode { adapters_off, ..Mode::default() }).unwrap().0.logps().unwrap();
    let want = logps(&base, false);
    assert_eq!(logps(&adapted, false), want, "B = 0");
    adapted.visit_mut(&mut |p| {
        if p.name.contains(".lora_B.") {
            p.value = noise(&p.name, p.value.dims(), 0.5);
        }
    });
    assert_ne!(logps(&adapted, false), want);
    assert_eq!(logps(&adapted, true), want);
}
