//! Every adapter that is a module of its own, from one table: parameters, the model at the start, f64 gradients against finite
//! differences, what layers keep, answers token by token, saved and loaded again.

mod tiny;

use adfreeze::adapters::{attach, lora};
use adfreeze::error::Result;
use adfreeze::model::backbone::LanguageConfig;
use adfreeze::model::init::{Place, Source};
use adfreeze::model::language::Language;
use adfreeze::model::params::Module;
use adfreeze::model::role::{Init, Part};
use adfreeze::model::segment::Kept;
use adfreeze::model::visual::{Shown, Visual};
use adfreeze::model::vlm::{Batch, Load, Mode, Vlm};
use adfreeze::spec::{Adapter, Deliver, Sees, SelectFeature};
use adfreeze::train::generate::{Sampling, generate};
use candle_core::{DType, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use tiny::*;

/// In the words of a recipe.
fn config(text: &str) -> Adapter {
    let table: toml::Table = toml::from_str(&format!("a = {text}")).unwrap();
    table["a"].clone().try_into().unwrap()
}

/// An adapter, whether it starts as the identity, and its parameters on the tiny model.
const TABLE: [(&str, bool, usize); 12] = [
    ("{ bottleneck = { dim = 3, target = ['language.layers.*.mlp'] } }", true, 2 * (2 * 12 * 3 + 3 + 12)),
    (
        "{ bottleneck = { dim = 5, act = 'relu', norm = true, dropout = 0.3, target = ['language.layers[-1].*', 'vision.encoder.layers[0..2].self_attn'] } }",
        true,
        2 * (2 * 12 * 5 + 5 + 12 + 24) + 2 * (2 * 8 * 5 + 5 + 8 + 16),
    ),
    ("{ bottleneck = { dim = 2, target = ['vision.encoder.layers[1].mlp'] } }", true, 2 * 8 * 2 + 2 + 8),
    (
        "{ cross_attention = { every = 1, heads = 2, head_dim = 3, ff_mult = 2 } }",
        true,
        2 * (4 * 12 * 6 + 2 + 48 + 2 * 12 * 24),
    ),
    (
        "{ cross_attention = { every = 2, heads = 3, head_dim = 2, ff_mult = 1, sees = 'all' } }",
        true,
        4 * 12 * 6 + 2 + 48 + 2 * 12 * 12,
    ),
    ("{ cross_attention = { every = 1, heads = 1, head_dim = 4, form = 'post_norm' } }", false, 2 * (4 * 12 * 4 + 24)),
    (
        "{ cross_attention = { every = 2, heads = 1, head_dim = 4, form = 'post_norm', sees = 'all' } }",
        false,
        4 * 12 * 4 + 24,
    ),
    ("{ prefix = { tokens = 3 } }", false, 3 * 12),
    (
        "{ lora = { rank = 2, alpha = 4, target = ['language.layers.*.{q,o}_proj', 'vision.encoder.layers[0].*.fc1'] } }",
        true,
        2 * 2 * (12 + 24) * 2 + 2 * (8 + 14),
    ),
    (
        "{ lora = { rank = 2, alpha = 4, dora = true, target = ['language.layers.*.{q,k,v,o}_proj', 'vision.encoder.layers[0].*.{fc1,k_proj}'] } }",
        true,
        2 * (2 * (12 + 24) + 24 + 2 * (2 * (12 + 12) + 12) + 2 * (24 + 12) + 12) + 2 * (8 + 14) + 14 + 2 * (8 + 8) + 8,
    ),
    (
        "{ lora = { rank = 3, alpha = 2, dora = true, rslora = true, dropout = 0.3, target = ['language.layers.*.mlp.*', 'vision.encoder.layers[1].*'] } }",
        true,
        2 * (2 * (3 * (12 + 10) + 10) + 3 * (10 + 12) + 12) + 4 * (3 * (8 + 8) + 8) + 2 * 3 * (8 + 14) + 14 + 8,
    ),
    ("{ prefix = { tokens = 2, before = 'picture' } }", false, 2 * 12),
];

fn deliver(text: &str) -> Deliver {
    if text.contains("cross_attention") { Deliver::CrossAttention } else { Deliver::Splice }
}

/// The tiny model, its visual tokens delivered as the adapter needs it.
fn plain(text: &str) -> Vlm {
    let mut vlm = vlm(clip(), -2, SelectFeature::Patch, &mlp(false), llama());
    vlm.deliver = deliver(text);
    vlm.plan();
    vlm
}

fn adapted(text: &str) -> Vlm {
    let mut vlm = plain(text);
    attach(&mut vlm, &config(text), "new", key("adapter")).unwrap();
    vlm
}

fn batch(vlm: &Vlm) -> Batch {
    pack(vlm, &sequences().iter().collect::<Vec<_>>())
}

fn own(vlm: &mut Vlm) -> BTreeSet<String> {
    vlm.names(|p| p.role.adapter() == Some("new"))
}

fn logps(vlm: &Vlm, batch: &Batch, mode: Mode) -> Vec<u64> {
    vlm.forward(batch, mode).unwrap().0.logps().unwrap().into_iter().map(f64::to_bits).collect()
}

#[test]
fn parameters_and_the_model_at_the_start() {
    for (text, identity, parameters) in TABLE {
        let (before, mut after) = (plain(text), adapted(text));
        let own = own(&mut after);
        let count: usize = after.params().iter().filter(|(n, _)| own.contains(*n)).map(|(_, t)| t.elem_count()).sum();
        assert_eq!(count, parameters, "{text}: {own:?}");
        let batch = batch(&before);
        let [a, b] = [&before, &after].map(|vlm| logps(vlm, &batch, Mode::default()));
        assert_eq!(a == b, identity, "{text}: the model at the start");
        let off = logps(&after, &batch, Mode { adapters_off: true, ..Mode::default() });
        assert!(off == a, "{text}: adapters off");
    }
}

#[test]
fn gradients_of_every_parameter() {
    for (text, ..) in TABLE {
        for (what, projector) in [("alone", false), ("with the projector", true)] {
            let mut vlm = adapted(text);
            perturb(&mut vlm);
            let mut chosen = own(&mut vlm);
            if projector {
                chosen.extend(names(&mut vlm, |n| n.starts_with("projector.")));
            }
            vlm.train_only(&chosen);
            assert!(vlm.unreachable(true).is_empty(), "{text}");
            let batch = batch(&vlm);
            let weights = coefs(batch.targets.len());
            let mode = Mode { dropout: Some(key("dropout")), ..Mode::default() };
            let lengths = all_lengths(&vlm);
            let frozen = snapshot(&mut vlm);
            let grads = gradients(&vlm, &batch, &weights, mode);
            assert!(snapshot(&mut vlm) == frozen, "{text}: a parameter changed");
            check_params(
                &format!("{text}, {what}"),
                &mut vlm,
                &grads,
                |_| false,
                |vlm| held_loss(vlm, &lengths, &batch, &weights, mode),
            );
            for kept in [Kept::All, Kept::Input] {
                let again = gradients(&vlm, &batch, &weights, Mode { kept, ..mode });
                assert!(grads.iter().all(|(n, g)| bits(g) == bits(&again[n])), "{text}, {what}: {kept:?}");
            }
        }
    }
}

#[test]
fn gradients_of_what_lies_below_and_beside() {
    for (text, ..) in TABLE {
        let mut vlm = adapted(text);
        perturb(&mut vlm);
        // The adapter frozen, everything else that a gradient can reach trained.
        let lost: BTreeSet<String> = vlm.unreachable(true).into_iter().map(|(n, _)| n).collect();
        assert!(lost.is_empty());
        let frozen = own(&mut vlm);
        let some = names(&mut vlm, |n| {
            !frozen.contains(n)
                && (n.starts_with("projector.") || n.contains("layers.0.") || n.contains("embed_tokens"))
        });
        vlm.train_only(&some);
        let batch = batch(&vlm);
        let weights = coefs(batch.targets.len());
        let lengths = all_lengths(&vlm);
        let grads = gradients(&vlm, &batch, &weights, Mode::default());
        let zero = |n: &str| n.ends_with("k_proj.bias");
        check_params(text, &mut vlm, &grads, zero, |vlm| held_loss(vlm, &lengths, &batch, &weights, Mode::default()));
    }
}

#[test]
fn layers_keep_what_they_say() {
    for (text, ..) in TABLE.iter().filter(|(text, ..)| !text.contains("prefix")) {
        let mut vlm = adapted(text);
        perturb(&mut vlm);
        let all = vlm.names(|p| p.is_adapter() || p.role.part == Part::Projector);
        vlm.train_only(&all);
        let batch = batch(&vlm);
        for kept in [Kept::All, Kept::Minimal, Kept::Input] {
            let (_, saved) = vlm.forward(&batch, Mode { record: true, kept, ..Mode::default() }).unwrap();
            let told = vlm.kept_bytes(Load { pictures: 2, tokens: batch.ids.len() }, kept).unwrap();
            assert_eq!(saved.unwrap().kept_bytes(), told, "{text}: {kept:?}");
        }
    }
}

/// Greedy answers from the cache are the ones that whole passes give.
#[test]
fn answers_token_by_token() {
    for (text, ..) in TABLE {
        let mut vlm = adapted(text);
        perturb(&mut vlm);
        let sequences = sequences();
        let mut prompt = pack(&vlm, &[&sequences[0]]);
        (prompt.targets, prompt.owners) = (vec![], vec![]);
        let answer = generate(&vlm, &prompt, &[], Sampling::greedy(5), |_| {}).unwrap();
        assert_eq!(answer.len(), 5);
        let mut whole = prompt.clone();
        for next in &answer {
            let row = whole.ids.len() as u32 - 1;
            let best = (0..vlm.language.config.vocab_size as u32).map(|id| {
                let batch = Batch { targets: vec![(row, id)], owners: vec![0], ..whole.clone() };
                vlm.forward(&batch, Mode::default()).unwrap().0.logps().unwrap()[0]
            });
            let best: Vec<f64> = best.collect();
            let top = best.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            assert!((best[*next as usize] - top).abs() < 1e-9, "{text}: {next} {best:?}");
            whole.ids.push(*next);
            whole.lengths[0] += 1;
        }
    }
}

/// Soft visual tokens beside cross-attention: they stand in front of a picture's place, and what follows sees the picture.
#[test]
fn soft_visual_tokens_in_front_of_pictures_beside_the_text() {
    let mut vlm = adapted("{ cross_attention = { every = 1, heads = 2, head_dim = 3, ff_mult = 2 } }");
    attach(&mut vlm, &config("{ prefix = { tokens = 2, before = 'picture' } }"), "soft", key("soft")).unwrap();
    perturb(&mut vlm);
    assert_eq!(vlm.prefix_rows(), [0, 2]);
    let chosen = vlm.names(|p| p.is_adapter() || p.role.part == Part::Projector);
    vlm.train_only(&chosen);
    let batch = batch(&vlm);
    let weights = coefs(batch.targets.len());
    let grads = gradients(&vlm, &batch, &weights, Mode::default());
    check_params("soft", &mut vlm, &grads, |_| false, |vlm| loss(vlm, &batch, &weights, Mode::default()));
    let rows = vlm.embed_prompt(&batch).unwrap().dims()[0];
    assert_eq!(rows, batch.ids.len() + 2 * batch.pictures.len());
    assert!(batch.pictures.len() > batch.lengths.len() - 1);
}

#[test]
fn a_text_sees_the_pictures_before_it() {
    for sees in ["last", "all"] {
        let text = format!("{{ cross_attention = {{ every = 2, heads = 2, head_dim = 3, sees = '{sees}' }} }}");
        let mut vlm = adapted(&text);
        perturb(&mut vlm);
        let sequences = sequences();
        let batch = pack(&vlm, &[&sequences[0], &sequences[2]]);
        let [first, second] = [0, 1].map(|i| batch.pixels.as_ref().unwrap().narrow(0, i, 1).unwrap());
        let moved = |pictures: [Tensor; 2]| -> Vec<bool> {
            let other = Batch { pixels: Some(Tensor::cat(&pictures, 0).unwrap()), ..batch.clone() };
            let [a, b] = [&batch, &other].map(|b| logps(&vlm, b, Mode::default()));
            a.iter().zip(&b).map(|(a, b)| a != b).collect()
        };
        // 0 [first] 3 7 7 [second] 2 1: the picture's own row predicts what follows it. Then a sequence without a picture.
        let by_second = moved([first.clone(), (&second * 1.5).unwrap()]);
        assert_eq!(by_second[..5], [false, false, false, true, true], "{sees}");
        let by_first = moved([(&first * 1.5).unwrap(), second]);
        assert_eq!(by_first[..3], [true, true, true], "{sees}");
        assert!(by_second[5..].iter().chain(&by_first[5..]).all(|m| !m), "{sees}");
    }
}

/// Only through its own eyes: a layer before which nothing stands carries what rows before it saw.
#[test]
fn behind_the_last_picture_the_first_is_seen_or_not() {
    for (sees, seen) in [("last", false), ("all", true)] {
        let mut vlm = plain("cross_attention");
        let text = format!("{{ cross_attention = {{ every = 2, heads = 2, head_dim = 3, sees = '{sees}' }} }}");
        attach(&mut vlm, &config(&text), "new", key("adapter")).unwrap();
        perturb(&mut vlm);
        // Nothing passes from row to row behind the block.
        vlm.visit_mut(&mut |p| {
            if p.name == "language.layers.1.self_attn.o_proj.weight" {
                p.value = p.value.zeros_like().unwrap();
            }
        });
        let batch = pack(&vlm, &[&sequences()[0]]);
        let [first, second] = [0, 1].map(|i| batch.pixels.as_ref().unwrap().narrow(0, i, 1).unwrap());
        let pixels = Tensor::cat(&[(first * 1.5).unwrap(), second], 0).unwrap();
        let other = Batch { pixels: Some(pixels), ..batch.clone() };
        let [a, b] = [&batch, &other].map(|b| logps(&vlm, b, Mode::default()));
        assert_eq!(a[3..5] != b[3..5], seen, "{sees}");
        assert!(a[..3] != b[..3], "{sees}");
    }
}

/// Two sequences, the second with two pictures, the later one of which is the first one's.
#[test]
fn the_last_picture_or_all_before() {
    let shown = |owner, rows, tokens: std::ops::Range<u32>| Shown { owner, rows, tokens: tokens.collect() };
    let list = [shown(0, 1..4, 0..2), shown(1, 5..6, 2..4), shown(1, 6..9, 0..2)];
    let tokens = noise("tokens", &[4, 12], 1.0);
    let visual = Visual::new(tokens, false, &list);
    let view = |sees| {
        let v = visual.view(sees);
        let ranges: Vec<_> = v.sequences.iter().map(|s| (s.q.clone(), s.k.clone())).collect();
        (v.rows.clone(), ranges)
    };
    assert_eq!(view(Sees::Last), (vec![0, 1, 2, 3, 0, 1], vec![(1..4, 0..2), (5..6, 2..4), (6..9, 4..6)]));
    assert_eq!(view(Sees::All), (vec![0, 1, 2, 3, 2, 3, 0, 1], vec![(1..4, 0..2), (5..6, 2..4), (6..9, 4..8)]));
}

#[test]
fn saved_and_loaded_they_give_the_same() {
    for (text, ..) in TABLE {
        let mut vlm = adapted(text);
        perturb(&mut vlm);
        let batch = batch(&vlm);
        let mut again = adapted(text);
        assert_ne!(logps(&again, &batch, Mode::default()), logps(&vlm, &batch, Mode::default()));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("all.safetensors");
        adfreeze::checkpoint::safetensors::save(&path, &vlm.params(), &Default::default()).unwrap();
        again.assign(&adfreeze::checkpoint::safetensors::load(&path).unwrap()).unwrap();
        assert_eq!(logps(&again, &batch, Mode::default()), logps(&vlm, &batch, Mode::default()), "{text}");
    }
}

#[test]
fn without_inserts_nobody_reads_what_stands_beside_the_text() {
    let mut vlm = plain("cross_attention");
    let projector = names(&mut vlm, |n| n.starts_with("projector."));
    vlm.train_only(&projector);
    let lost = vlm.unreachable(true);
    assert_eq!(lost.len(), projector.len());
    assert!(lost[0].1.contains("no cross_attention adapter"), "{lost:?}");
    assert!(vlm.is_blind() && !plain("splice").is_blind());
    let e = attach(&mut vlm, &config("{ cross_attention = { every = 3 } }"), "new", key("adapter")).unwrap_err();
    assert!(e.to_string().contains("every = 3, but the language model has 2 layers"), "{e}");
    let twice = "{ bottleneck = { dim = 3, target = ['language.layers.*.mlp'] } }";
    attach(&mut vlm, &config(twice), "new", key("adapter")).unwrap();
    let e = attach(&mut vlm, &config(twice), "new", key("adapter")).unwrap_err();
    assert!(e.to_string().contains("already an adapter named `new`"), "{e}");
}

/// Without a picture the part of a block that looks at pictures learns nothing, and is told; the rest has gradients.
#[test]
fn without_pictures_the_eyes_learn_nothing() {
    let eyes = TABLE.iter().filter(|(text, ..)| text.contains("cross_attention"));
    for (text, ..) in eyes {
        let mut vlm = adapted(text);
        perturb(&mut vlm);
        let own = own(&mut vlm);
        vlm.train_only(&own);
        let lost: BTreeSet<String> = vlm.unreachable(false).into_iter().map(|(n, _)| n).collect();
        let written: Vec<Sequence> = sequences().into_iter().filter(|s| s.pictures.is_empty()).collect();
        assert!(!written.is_empty());
        let batch = pack(&vlm, &written.iter().collect::<Vec<_>>());
        let grads = gradients(&vlm, &batch, &coefs(batch.targets.len()), Mode::default());
        let moves = |n: &String| grads.get(n).is_some_and(|g| flat(g).iter().any(|x| *x != 0.0));
        let still: BTreeSet<String> = own.iter().filter(|n| !moves(n)).cloned().collect();
        assert_eq!(still, lost, "{text}");
        let eyes = lost.iter().all(|n| n.contains(".new.attn"));
        assert!(eyes && !lost.is_empty() && lost.len() < own.len(), "{text}: {lost:?}");
    }
}

/// Hands out weights of any size that take no memory.
struct Weightless(Place);

impl Source for Weightless {
    fn place(&self) -> &Place {
        &self.0
    }
    fn get(&mut self, _: &str, shape: &[usize], dtype: DType, _: Init) -> Result<Tensor> {
        Ok(Tensor::ones(vec![1; shape.len()], dtype, &self.0.device)?.broadcast_as(shape)?)
    }
}

#[test]
fn a_known_number_of_parameters() {
    let shape = LanguageConfig {
        vocab_size: 32_000,
        hidden_size: 4096,
        intermediate_size: 11_008,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 32,
        head_dim: 128,
        ..llama()
    };
    let mut vlm = Vlm::new(None, None, Language::new(shape, &mut Weightless(Place::cpu())).unwrap(), None);
    let text = "{ lora = { rank = 8, alpha = 16, target = ['language.layers.*.self_attn.{q,k,v,o}_proj'] } }";
    attach(&mut vlm, &config(text), "new", key("adapter")).unwrap();
    let own = own(&mut vlm);
    let count: usize = vlm.params().iter().filter(|(n, _)| own.contains(*n)).map(|(_, t)| t.elem_count()).sum();
    assert_eq!(count, 8_388_608);
}

#[test]
fn a_row_of_zeros_has_no_direction() {
    let mut vlm = plain("lora");
    vlm.visit_mut(&mut |p| {
        if p.name == "language.layers.1.self_attn.v_proj.weight" {
            let rows: Vec<f64> = (0..12).map(|i| if i == 7 { 0.0 } else { 1.0 }).collect();
            p.value =
                p.value.broadcast_mul(&Tensor::new(rows, p.value.device()).unwrap().unsqueeze(1).unwrap()).unwrap();
        }
    });
    let lora =
        |dora| format!("{{ lora = {{ rank = 2, alpha = 4, dora = {dora}, target = ['language.layers.*.v_proj'] }} }}");
    let e = attach(&mut vlm, &config(&lora(true)), "new", key("adapter")).unwrap_err();
    assert!(e.to_string().contains("language.layers.1.self_attn.v_proj.weight: row 7 has length 0"), "{e}");
    attach(&mut vlm, &config(&lora(false)), "other", key("adapter")).unwrap();
}

/// An adapter that is taken into the weights leaves a model that computes the same, whatever it was stacked on.
#[test]
fn merged_they_give_the_same() {
    let lora = "{ lora = { rank = 3, alpha = 5, target = ['language.layers.*', 'vision.encoder.layers.*'] } }";
    let dora =
        "{ lora = { rank = 2, alpha = 4, dora = true, target = ['language.layers.*', 'vision.encoder.layers.*'] } }";
    for both in [[lora, dora], [dora, lora], [dora, dora]] {
        let mut vlm = plain("lora");
        for (text, name) in both.iter().zip(["z", "a"]) {
            attach(&mut vlm, &config(text), name, key(name)).unwrap();
        }
        let fresh = vlm.params();
        perturb(&mut vlm);
        let roles = vlm.roles();
        let base: BTreeMap<_, _> = fresh.into_iter().filter(|(n, _)| roles[n].adapter.is_none()).collect();
        vlm.assign(&base).unwrap();
        let batch = batch(&vlm);
        let values = |vlm: &Vlm| vlm.forward(&batch, Mode::default()).unwrap().0.logps().unwrap();
        let before = values(&vlm);
        lora::merge(&mut vlm).unwrap();
        assert!(vlm.roles().values().all(|r| r.adapter.is_none()));
        let off = before.iter().zip(values(&vlm)).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(off < 1e-12, "{both:?}: {off:e}");
    }
}

#[test]
fn a_reset_gives_magnitudes_the_lengths_of_their_rows() {
    let text = TABLE[9].0;
    let (fresh, mut vlm) = (adapted(text), adapted(text));
    vlm.visit_mut(&mut |p| {
        if p.name.contains("magnitude") {
            p.value = (&p.value * 1.5).unwrap();
        }
    });
    lora::reset_magnitudes(&vlm, |n| n.contains("language.")).unwrap();
    let (want, got) = (fresh.params(), vlm.params());
    for (name, t) in want.iter().filter(|(n, _)| n.contains("magnitude")) {
        assert_eq!(bits(t) == bits(&got[name]), name.contains("language."), "{name}");
    }
}

/// Squares of a frozen weight's rows are kept: they must not outlive the weight, nor its being frozen.
#[test]
fn lengths_follow_the_weight() {
    let mut vlm = adapted("{ lora = { rank = 2, alpha = 4, dora = true, target = ['language.layers.*.q_proj'] } }");
    perturb(&mut vlm);
    let batch = batch(&vlm);
    let name = "language.layers.0.self_attn.q_proj.weight";
    let again = |vlm: &mut Vlm| {
        let mut other =
            adapted("{ lora = { rank = 2, alpha = 4, dora = true, target = ['language.layers.*.q_proj'] } }");
        other.assign(&vlm.params()).unwrap();
        logps(&other, &batch, Mode::default())
    };
    let before = logps(&vlm, &batch, Mode::default());
    assert_eq!(before, again(&mut vlm));
    // Another tensor.
    let doubled = (&vlm.params()[name] * 2.0).unwrap();
    vlm.assign(&[(name.to_string(), doubled)].into()).unwrap();
    let replaced = logps(&vlm, &batch, Mode::default());
    assert!(replaced != before && replaced == again(&mut vlm));
    // The same tensor, trained in place and then frozen.
    vlm.train_only(&[name.to_string()].into());
    assert_eq!(logps(&vlm, &batch, Mode::default()), replaced);
    let tripled = (&vlm.params()[name] * 3.0).unwrap();
    vlm.visit_mut(&mut |p| {
        if p.name == name {
            p.overwrite(&tripled).unwrap();
        }
    });
    vlm.train_only(&Default::default());
    let trained = logps(&vlm, &batch, Mode::default());
    assert!(trained != replaced && trained == again(&mut vlm));
}
