//! Every choice of what trains, in the words of a recipe, from one table: a step is made, and exactly what was chosen has moved,
//! at the learning rate of its group, its layer and the step.

mod tiny;

use adfreeze::model::params::{Grads, Module};
use adfreeze::model::vlm::{Mode, Vlm};
use adfreeze::optim::AdamW;
use adfreeze::pipeline::state::State;
use adfreeze::spec::{SelectFeature, Stage};
use candle_core::Tensor;
use std::collections::BTreeMap;
use tiny::*;

/// Peak learning rate of [`stage`].
const LR: f64 = 1e-3;

/// `text`: `train`, `adapters` and what else is special.
fn stage(text: &str) -> Stage {
    let common = "data = [{ path = 'x' }]\nbatch = { global = 1 }\nlr = 1e-3\nlr_scheduler = { constant = {} }\n\
                  max_grad_norm = 0\noptimizer = { adamw = { eps = 1e-30 } }\n";
    let own = text.lines().map(|l| l.split('=').next().unwrap_or_default().trim());
    let own: Vec<&str> = own.collect();
    let common: Vec<&str> = common.lines().filter(|l| !own.contains(&l.split('=').next().unwrap().trim())).collect();
    toml::from_str(&format!("{text}\n{}", common.join("\n"))).unwrap()
}

/// Three tower layers, of which two run, and four language layers; the head is tied to the embeddings or not.
fn model(tied: bool) -> Vlm {
    let text = adfreeze::model::backbone::LanguageConfig { num_hidden_layers: 4, tie_word_embeddings: tied, ..llama() };
    vlm(clip(), -2, SelectFeature::Patch, &mlp(false), text)
}

/// The stage entered, every parameter (also new ones) away from its initial value.
fn enter(stage: &Stage, tied: bool) -> State {
    let mut state = State::new(model(tied), None);
    state.enter(stage, "s").unwrap();
    perturb(&mut state.vlm);
    state
}

fn optimizer(stage: &Stage, vlm: &mut Vlm, total: usize) -> AdamW {
    let shapes = vlm.trainable().into_iter().map(|(n, t)| (n, t.dims().to_vec())).collect();
    AdamW::of_stage(stage, "s", total, &shapes, &vlm.distances(), &BTreeMap::new()).unwrap()
}

fn step(vlm: &mut Vlm, optimizer: &mut AdamW) -> adfreeze::optim::StepReport {
    let batch = pack(vlm, &sequences().iter().collect::<Vec<_>>());
    let (lp, saved) = vlm.forward(&batch, Mode { record: true, ..Mode::default() }).unwrap();
    let mut grads = Grads::new();
    vlm.backward(saved.unwrap(), &coefs(lp.rows()), &mut grads).unwrap();
    optimizer.step(&vlm.weights(), grads.by_name()).unwrap()
}

/// Copies of all parameters: steps are made in place.
fn values(vlm: &mut Vlm) -> BTreeMap<String, Tensor> {
    vlm.params().into_iter().map(|(n, t)| (n, t.copy().unwrap())).collect()
}

type Chosen = fn(&str) -> bool;

fn runs(n: &str) -> bool {
    n.starts_with("vision.") && !n.starts_with("vision.encoder.layers.2.") && !n.starts_with("vision.post")
}

/// What a stage says, and who moves then.
const TABLE: [(&str, Chosen); 16] = [
    ("train = ['projector.*']", |n| n.starts_with("projector.")),
    // The whole tower, up to where the features are taken.
    ("train = ['!vision.encoder.layers[-1].*', '!vision.post_layernorm.*', 'vision.*']", runs),
    ("train = ['vision.encoder.layers[-2..-1].*']", |n| n.starts_with("vision.encoder.layers.1.")),
    ("train = ['vision.encoder.layers[-3..-1].*', 'projector.*']", |n| {
        n.starts_with("vision.encoder.layers.0.")
            || n.starts_with("vision.encoder.layers.1.")
            || n.starts_with("projector.")
    }),
    ("train = ['vision.embeddings.*']", |n| n.starts_with("vision.embeddings.")),
    // The language model: its last layers, all of it, parts of it.
    ("train = ['language.layers[-2..].*']", |n| {
        n.starts_with("language.layers.2.") || n.starts_with("language.layers.3.")
    }),
    ("train = ['language.layers[-1].*', 'language.norm.*', 'language.lm_head.*', 'projector.*']", |n| {
        n.starts_with("language.layers.3.")
            || n.starts_with("language.norm.")
            || n.starts_with("language.lm_head.")
            || n.starts_with("projector.")
    }),
    ("train = ['language.*']", |n| n.starts_with("language.")),
    ("train = ['language.embed_tokens.*']", |n| n == "language.embed_tokens.weight"),
    ("train = ['language.lm_head.*']", |n| n == "language.lm_head.weight"),
    ("train = ['!vision.encoder.layers[-1].*', '!vision.post*', '*norm*.weight']", |n| {
        n.contains("norm") && n.ends_with(".weight") && (runs(n) || n.starts_with("language."))
    }),
    // Low-rank updates, alone and beside other things.
    ("adapters = [{ lora = { rank = 2, alpha = 4, target = ['language.layers.*_proj'] } }]", |n| n.contains(".lora_")),
    (
        "train = ['projector.*', 'language.norm.*']\n\
         adapters = [{ lora = { rank = 2, alpha = 4, target = ['language.layers[1..3].*_proj', 'vision.encoder.layers[1].mlp.*'] } }]",
        |n| n.contains(".lora_") || n.starts_with("projector.") || n.starts_with("language.norm."),
    ),
    (
        "train = ['vision.encoder.layers[1].*']\n\
         adapters = [{ bottleneck = { dim = 2, target = ['language.layers[-1].mlp'] } }, { prefix = { tokens = 2, freeze = true } },\n\
                     { lora = { name = 'late', rank = 1, alpha = 1, target = ['language.layers[-1].*.q_proj'] } }]",
        |n| {
            n.starts_with("vision.encoder.layers.1.")
                || [".bottleneck.s.", ".lora_A.late.", ".lora_B.late."].iter().any(|a| n.contains(a))
        },
    ),
    // An ordered list: the first match wins.
    (
        "train = ['language.layers[0].mlp.*', '!language.layers[0..2].*', '!*norm*', 'language.layers.*', 'projector.*.bias']",
        |n| {
            n.starts_with("language.layers.0.mlp.")
                || (n.starts_with("language.layers.2.") || n.starts_with("language.layers.3.")) && !n.contains("norm")
                || n.starts_with("projector.") && n.ends_with(".bias")
        },
    ),
    ("train = ['!vision.encoder.layers[-1].*', '!vision.post*', '*']", |n| !n.starts_with("vision.") || runs(n)),
];

#[test]
fn exactly_what_was_chosen_moves() {
    for (text, chosen) in TABLE {
        for tied in [false, true] {
            if tied && text.contains("lm_head") {
                continue;
            }
            let stage = stage(text);
            let mut state = enter(&stage, tied);
            assert!(state.vlm.unreachable(true).is_empty(), "{text}");
            let mut optimizer = optimizer(&stage, &mut state.vlm, 4);
            let before = snapshot(&mut state.vlm);
            step(&mut state.vlm, &mut optimizer);
            let after = snapshot(&mut state.vlm);
            let (mut moved, mut expected) = (0, 0);
            for (name, bits) in &before {
                // Softmax does not see what all keys have in common, so that this gradient is 0 but for rounding.
                if name.ends_with("k_proj.bias") && chosen(name) {
                    continue;
                }
                assert_eq!(*bits != after[name], chosen(name), "{text}\n{name}");
                moved += usize::from(*bits != after[name]);
                expected += usize::from(chosen(name));
            }
            assert!(moved == expected && moved > 0 && moved <= before.len(), "{text}");
        }
    }
}

#[test]
fn a_reset_of_an_adapter_changes_no_backbone() {
    let lora = "adapters = [{ lora = { rank = 2, alpha = 4, target = ['language.layers.*.q_proj'] } }]";
    let mut state = enter(&stage(lora), false);
    let before = state.vlm.params();
    state.enter(&stage("reset = ['*.lora_B.*']"), "t").unwrap();
    assert!(state.changed.iter().all(|n| n.starts_with("projector.")), "{:?}", state.changed);
    let own = state.own();
    let moved: Vec<&String> = before.keys().filter(|n| bits(&before[*n]) != bits(&state.vlm.params()[*n])).collect();
    assert!(!moved.is_empty() && moved.iter().all(|n| n.contains(".lora_B.") && own.contains_key(*n)), "{moved:?}");
    state.enter(&stage("reset = ['language.norm.*']"), "u").unwrap();
    assert!(state.changed.contains("language.norm.weight"));
}

#[test]
fn layers_behind_the_features_cannot_be_chosen() {
    for (text, why) in [
        ("train = ['vision.encoder.layers[-2..].*']", "taken after layer 2 of 3 (select_layer)"),
        ("train = ['vision.post_layernorm.*']", "before the tower's last norm"),
    ] {
        let lost = enter(&stage(text), false).vlm.unreachable(true);
        assert!(!lost.is_empty() && lost.iter().all(|(_, told)| told.contains(why)), "{lost:?}");
    }
}

/// Largest change of an element; with Adam's ε at nothing the first step is as long as the learning rate.
fn longest(before: &Tensor, after: &Tensor) -> f64 {
    flat(before).iter().zip(flat(after)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
}

#[test]
fn each_layer_moves_at_its_own_rate() {
    let everything = "train = ['!vision.encoder.layers[-1].*', '!vision.post*', '*']\nlayer_decay = 0.5\n\
                      param_groups = [{ match = ['projector.*'], lr = 4e-3 }, { match = ['vision.*'], layer_decay = 0.8 }]";
    let stage = stage(everything);
    let mut state = enter(&stage, false);
    let mut optimizer = optimizer(&stage, &mut state.vlm, 4);
    let before = values(&mut state.vlm);
    let report = step(&mut state.vlm, &mut optimizer);
    for (name, rate) in [
        ("projector.linear_1.weight", 4e-3),
        ("vision.encoder.layers.1.mlp.fc1.weight", LR * 0.8),
        ("vision.encoder.layers.0.mlp.fc1.weight", LR * 0.64),
        ("vision.embeddings.patch_embedding.weight", LR * 0.512),
        ("language.lm_head.weight", LR),
        ("language.norm.weight", LR),
        ("language.layers.3.mlp.up_proj.weight", LR * 0.5),
        ("language.layers.2.mlp.up_proj.weight", LR * 0.25),
        ("language.layers.1.mlp.up_proj.weight", LR * 0.125),
        ("language.layers.0.mlp.up_proj.weight", LR * 0.0625),
        ("language.embed_tokens.weight", LR * 0.03125),
    ] {
        let moved = longest(&before[name], &state.vlm.params()[name]);
        assert!((moved / rate - 1.0).abs() < 1e-6, "{name}: {moved:e} instead of {rate:e}");
    }
    let want = [("projector.*", 4.0, None), ("vision.*", 0.8, Some(0.512)), ("default", 1.0, Some(0.03125))];
    assert_eq!(report.groups.len(), want.len());
    for (g, (name, highest, lowest)) in report.groups.iter().zip(want) {
        assert!(g.name == name && (g.lr / LR - highest).abs() < 1e-12, "{g:?}");
        assert_eq!(g.lr_lowest.is_some(), lowest.is_some(), "{g:?}");
        assert!(g.lr_lowest.zip(lowest).is_none_or(|(got, want)| (got / LR - want).abs() < 1e-12), "{g:?}");
    }
}

#[test]
fn each_group_has_its_own_schedule() {
    let text = "train = ['projector.*', 'language.norm.*', 'language.lm_head.*']\n\
                lr_scheduler = { cosine = { warmup_steps = 2 } }\n\
                param_groups = [{ match = ['projector.*'], lr_scheduler = { linear = { warmup_ratio = 0.25 } } },\n\
                                { match = ['language.norm.*'], lr = 2e-3, lr_scheduler = { constant = {} } }]";
    let stage = stage(text);
    let mut state = enter(&stage, false);
    let mut optimizer = optimizer(&stage, &mut state.vlm, 4);
    let mut rates: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    for s in 0..4 {
        let before = values(&mut state.vlm);
        let report = step(&mut state.vlm, &mut optimizer);
        let moves =
            longest(&before["projector.linear_1.weight"], &state.vlm.params()["projector.linear_1.weight"]) > 0.0;
        assert_eq!(moves, s > 0, "the projector warms up for one step");
        for g in report.groups {
            rates.entry(g.name).or_default().push(g.lr / LR);
        }
    }
    let want: [(&str, [f64; 4]); 3] = [
        ("default", [0.0, 0.5, 1.0, 0.5]),
        ("language.norm.*", [2.0; 4]),
        ("projector.*", [0.0, 1.0, 2.0 / 3.0, 1.0 / 3.0]),
    ];
    for ((name, got), (wanted, want)) in rates.iter().zip(&want) {
        let close = got.iter().zip(want).all(|(a, b)| (a - b).abs() < 1e-12);
        assert!(name == wanted && close, "{name}: {got:?}");
    }
}
