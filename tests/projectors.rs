//! Every projector from one table: parameters, shapes at two resolutions, f64 gradients against finite differences, saved
//! and loaded again, and the identity where one begins as it. Where transformers has the same, also against it.

mod tiny;

use adfreeze::checkpoint::{hf, safetensors};
use adfreeze::model::init::{Fresh, FromWeights, Partly, Place, Shapes};
use adfreeze::model::island::{self, Pass};
use adfreeze::model::params::{Grads, Module};
use adfreeze::model::projector::{Projector, Work};
use adfreeze::model::vision::Grid;
use adfreeze::model::vlm::{Batch, Mode};
use adfreeze::model::weights::Weights;
use adfreeze::spec::{self, SelectFeature};
use candle_core::{DType, Device, Tensor};
use std::path::Path;
use tiny::*;

/// In the words of a recipe.
fn config(text: &str) -> spec::Projector {
    let table: toml::Table = toml::from_str(&format!("p = {text}")).unwrap();
    table["p"].clone().try_into().unwrap()
}

/// A square of patches of 14 px.
fn grid(side: usize) -> Grid {
    Grid { image_size: 14 * side, patch_size: 14, class_token: false }
}

/// Each with its visual tokens of 4 × 4 and of 6 × 6 patches.
const TABLE: [(&str, [usize; 2]); 17] = [
    ("{ linear = {} }", [16, 36]),
    ("{ linear = { input_norm = true } }", [16, 36]),
    ("{ mlp = { hidden = 9, act = 'quick_gelu' } }", [16, 36]),
    ("{ mlp = { depth = 3, act = 'silu', input_norm = true, norm = true } }", [16, 36]),
    ("{ bottleneck = { dim = 3 } }", [16, 36]),
    ("{ bottleneck = { dim = 5, act = 'gelu_tanh', dropout = 0.4 } }", [16, 36]),
    ("{ pixel_shuffle = {} }", [4, 9]),
    ("{ pixel_shuffle = { factor = 1, then = { linear = { input_norm = true } } } }", [16, 36]),
    ("{ pixel_shuffle = { then = { mlp = { hidden = 7, norm = true } } } }", [4, 9]),
    ("{ perceiver = { queries = 3, depth = 2, heads = 4, kv_heads = 2, head_dim = 3, hidden = 7 } }", [3, 3]),
    ("{ perceiver = { queries = 1, depth = 1, heads = 1, kv_heads = 1, head_dim = 2, act = 'gelu' } }", [1, 1]),
    ("{ resampler = { queries = 3, depth = 2, heads = 2, head_dim = 3, ff_mult = 2 } }", [3, 3]),
    ("{ resampler = { queries = 1, depth = 1, heads = 1, head_dim = 4, ff_mult = 1 } }", [1, 1]),
    ("{ visual_prefix = {} }", [2, 2]),
    ("{ visual_prefix = { tokens = 3 } }", [3, 3]),
    ("{ qformer = { queries = 3, width = 6, layers = 3, heads = 2, intermediate = 7, dropout = 0.3 } }", [3, 3]),
    (
        "{ qformer = { queries = 2, width = 4, layers = 2, heads = 1, intermediate = 5, cross_every = 1, act = 'silu' } }",
        [2, 2],
    ),
];

/// A bias of keys moves all scores of a query alike, which changes nothing.
fn of_keys(name: &str) -> bool {
    name.ends_with("attention.key.bias")
}

/// Σ y·g: a scalar whose gradient at y is g.
fn against(y: &Tensor, g: &Tensor) -> f64 {
    flat(y).iter().zip(flat(g)).map(|(y, g)| y * g).sum()
}

fn check_gradients(what: &str, p: &mut Projector, [d_in, d_out]: [usize; 2], grid: Grid) {
    let tokens = p.tokens(grid).unwrap();
    let (x, g) = (noise("x", &[2 * grid.tokens(), d_in], 1.0), noise("g", &[2 * tokens, d_out], 1.0));
    let all = names(p, |_| true);
    p.set_trainable(&all);
    let before = snapshot(p);
    let plain = Pass { dropout: Some(key("dropout")), ..Pass::default() };
    let pass = Pass { trains: true, need_dx: true, ..plain };
    let (y, tape) = p.forward(&x, grid, pass).unwrap();
    assert_eq!(y.dims(), [2 * tokens, d_out], "{what}");
    let mut grads = Grads::new();
    let dx = island::backward(tape.unwrap(), &g, &mut grads).unwrap().unwrap();
    assert!(snapshot(p) == before, "{what}: a parameter changed");
    let run = |p: &Projector, x: &Tensor| against(&p.forward(x, grid, plain).unwrap().0, &g);
    check_slope(&format!("{what}: x"), &x, &dx, 40, |x| run(p, &x));
    check_params(what, p, grads.by_name(), of_keys, |p| run(p, &x));
    // Half of the parameters trained: they have the same gradients, the others none.
    let some = names(p, |n| n.ends_with(".weight"));
    p.set_trainable(&some);
    let (_, tape) = p.forward(&x, grid, Pass { need_dx: false, ..pass }).unwrap();
    let mut fewer = Grads::new();
    assert!(island::backward(tape.unwrap(), &g, &mut fewer).unwrap().is_none(), "{what}");
    assert!(fewer.by_name().keys().eq(&some), "{what}: who has a gradient");
    for (name, grad) in fewer.by_name() {
        assert_eq!(bits(grad), bits(&grads.by_name()[name]), "{what}: {name}");
    }
}

#[test]
fn gradients_and_shapes_at_two_resolutions() {
    for (text, tokens) in TABLE {
        for (bias, d_out, (side, tokens)) in [(true, 5, (4, tokens[0])), (false, 8, (6, tokens[1]))] {
            let mut p = Projector::new(&config(text), 8, d_out, bias, &mut source()).unwrap();
            perturb(&mut p);
            assert_eq!(p.tokens(grid(side)).unwrap(), tokens, "{text}");
            check_gradients(&format!("{text}, bias {bias}, {side} × {side}"), &mut p, [8, d_out], grid(side));
        }
    }
}

#[test]
fn saved_and_loaded_they_give_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("projector.safetensors");
    let x = noise("x", &[32, 8], 1.0).to_dtype(DType::F32).unwrap();
    let run = |p: &Projector| {
        let (y, tape) = p.forward(&x, grid(4), Pass::default()).unwrap();
        assert!(tape.is_none());
        bits(&y.to_dtype(DType::F64).unwrap())
    };
    for (text, _) in TABLE {
        let mut fresh = Fresh { key: key("weights"), place: Place::cpu() };
        let mut p = Projector::new(&config(text), 8, 12, true, &mut fresh).unwrap();
        p.visit_mut(&mut |p| {
            p.value = (&p.value + noise(&p.name, p.value.dims(), 0.3).to_dtype(DType::F32).unwrap()).unwrap()
        });
        hf::save_projector(&path, &p.params()).unwrap();
        let mut weights = Weights::projector(&path).unwrap();
        let mut src = FromWeights { weights: &mut weights, place: &Place::cpu() };
        let again = Projector::new(&config(text), 8, 12, true, &mut src).unwrap();
        weights.finish().unwrap();
        assert_eq!(run(&p), run(&again), "{text}");
    }
}

/// Parameters of all tensors whose name `keep` accepts.
fn count(text: &str, vision: usize, language: usize, keep: impl Fn(&str) -> bool) -> usize {
    let p = Projector::new(&config(text), vision, language, true, &mut Shapes(Place::cpu())).unwrap();
    p.params().iter().filter(|(n, _)| keep(n)).map(|(_, t)| t.elem_count()).sum()
}

#[test]
fn known_numbers_of_parameters() {
    let all = |_: &str| true;
    assert_eq!(count("{ linear = {} }", 1024, 2560, all), 2_624_000);
    assert_eq!(count("{ mlp = {} }", 1024, 4096, all), 20_979_712);
    assert_eq!(count("{ mlp = { hidden = 8192, norm = true } }", 1024, 4096, all), 41_963_520);
    let narrow = |n: &str| n.contains(".down.") || n.contains(".up.");
    let weights = |n: &str| narrow(n) && n.ends_with(".weight");
    let bottleneck = "{ bottleneck = { dim = 256 } }";
    assert_eq!(count(bottleneck, 1024, 1024, weights), 524_288);
    assert_eq!(count(bottleneck, 1024, 1024, all), 524_288 + 256 + 1024 + 2 * 1024);
    assert_eq!(count(bottleneck, 1024, 4096, |n| n.contains(".out.")), 1024 * 4096 + 4096);
    assert_eq!(count("{ pixel_shuffle = {} }", 1024, 512, all), 4 * 1024 * 512 + 512);
    // Those of `Blip2QFormerModel` and of Idefics2 8B's connector, as `tests/golden/projectors/make.py` prints them.
    let qformer = "{ qformer = {} }";
    assert_eq!(count(qformer, 1408, 2560, |n| n.starts_with("projector.qformer.")), 105_137_664);
    assert_eq!(count(qformer, 1408, 2560, all), 105_137_664 + 32 * 768 + 768 * 2560 + 2560);
    assert_eq!(count("{ perceiver = { hidden = 14336 } }", 1152, 4096, all), 743_219_200);
    assert_eq!(count("{ visual_prefix = {} }", 1024, 4096, all), 2 * 4096 * 1024 + 2 * 4096);
    // OpenFlamingo's, as `tests/golden/flamingo/make.py` prints.
    assert_eq!(count("{ resampler = {} }", 1024, 1024, all), 63_019_008);
    assert_eq!(count("{ resampler = {} }", 1024, 4096, all), 63_019_008 + 1024 * 4096 + 4096);
}

#[test]
fn flops_by_hand() {
    let work = |text: &str, side| {
        Projector::new(&config(text), 8, 10, true, &mut Shapes(Place::cpu())).unwrap().work(grid(side)).unwrap()
    };
    let of = |features, inner, attention| Work { features, inner, attention };
    assert_eq!(work("{ linear = {} }", 4), of(2 * 16 * 80, 0, 0));
    assert_eq!(work("{ linear = { input_norm = true } }", 4), of(0, 2 * 16 * 80, 0));
    assert_eq!(work("{ mlp = { hidden = 9 } }", 4), of(2 * 16 * 72, 2 * 16 * 90, 0));
    assert_eq!(work("{ bottleneck = { dim = 3 } }", 4), of(0, 2 * 16 * (24 + 24 + 80), 0));
    assert_eq!(work("{ pixel_shuffle = {} }", 4), of(2 * 4 * 320, 0, 0));
    // 36 features and 3 latents of width 10; heads 4 × 3, keys and values of 2 × 3.
    let perceiver = "{ perceiver = { queries = 3, depth = 2, heads = 4, kv_heads = 2, head_dim = 3, hidden = 7 } }";
    let latents = 2 * 3 * (120 + 120 + 3 * 400);
    let layer = latents + 2 * 39 * 2 * 60;
    assert_eq!(work(perceiver, 6), of(2 * 36 * 2 * 56, 2 * 36 * 70 + 2 * layer, 2 * 4 * 3 * 39 * 12));
    // Layers 0 and 2 of three look at 16 features of width 8.
    let qformer = "{ qformer = { queries = 3, width = 6, layers = 3, heads = 2, intermediate = 7 } }";
    let (own, mlp, cross) = (4 * 36, 2 * 42, 2 * 36);
    let inner = 2 * 3 * (3 * (own + mlp) + 2 * cross + 60);
    assert_eq!(work(qformer, 4), of(2 * 2 * 16 * 2 * 48, inner, 3 * 4 * 9 * 6 + 2 * 4 * 3 * 16 * 6));
    // 16 features and 3 latents of width 8, heads 2 × 3, and the way from 8 to 10.
    let resampler = "{ resampler = { queries = 3, depth = 2, heads = 2, head_dim = 3, ff_mult = 2 } }";
    let layer = 3 * (48 + 48 + 2 * 128) + 19 * 96;
    assert_eq!(work(resampler, 4), of(0, 2 * (2 * layer + 3 * 80), 2 * 4 * 3 * 19 * 6));
    assert_eq!(work("{ visual_prefix = { tokens = 3 } }", 4), of(2 * 3 * 80, 0, 0));
    assert_eq!(of(10, 100, 1000).forward(), 1110);
    assert_eq!(of(10, 100, 1000).training(), 20 + 300 + 3500);
}

#[test]
fn fresh_queries_differ_and_norms_and_biases_are_neutral() {
    let bits = |t: &Tensor| -> Vec<Vec<f64>> { t.to_vec2().unwrap() };
    for (text, queries) in [
        ("{ perceiver = { queries = 3, depth = 1 } }", "projector.perceiver_resampler.latents"),
        ("{ resampler = { queries = 3, depth = 1 } }", "projector.perceiver.latents"),
        ("{ qformer = { queries = 3, width = 24, layers = 1 } }", "projector.query_tokens"),
    ] {
        let p = Projector::new(&config(text), 8, 16, true, &mut source()).unwrap();
        let params = p.params();
        let q = bits(&params[queries].reshape(((), params[queries].dims().last().copied().unwrap())).unwrap());
        assert!(q.len() == 3 && q[0] != q[1] && q[1] != q[2], "{text}");
        for (name, t) in params.iter().filter(|(_, t)| t.rank() == 1) {
            let want = if name.ends_with(".weight") { 1.0 } else { 0.0 };
            let inner = !["projector.language_projection", "projector.out"].iter().any(|out| name.starts_with(out));
            assert!(!inner || flat(t).iter().all(|x| *x == want), "{name}");
        }
        let y = p.forward(&noise("x", &[16, 8], 1.0), grid(4), Pass::default()).unwrap().0;
        let y = bits(&y);
        assert!(y[0] != y[1] && y[1] != y[2], "{text}: tokens are alike");
    }
}

#[test]
fn a_bottleneck_begins_as_the_identity() {
    let p = |d_out| Projector::new(&config("{ bottleneck = { dim = 3 } }"), 8, d_out, true, &mut source()).unwrap();
    let x = noise("x", &[16, 8], 1.0);
    let y = |p: &Projector| p.forward(&x, grid(4), Pass::default()).unwrap().0;
    assert_eq!(bits(&y(&p(8))), bits(&x));
    // With another width the layer that follows is all that there is.
    let mut wide = p(12).params();
    let [w, b] = ["weight", "bias"].map(|kind| wide.remove(&format!("projector.out.{kind}")).unwrap());
    let out = x.matmul(&w.t().unwrap()).unwrap().broadcast_add(&b).unwrap();
    assert!(distance(&y(&p(12)), &out) < 1e-14);
}

#[test]
fn dropout_follows_the_pass_and_only_where_the_projector_trains() {
    let cfg = config("{ bottleneck = { dim = 5, dropout = 0.4 } }");
    let mut vlm = vlm(clip(), -2, SelectFeature::Patch, &cfg, llama());
    let batch = pack(&vlm, &sequences().iter().collect::<Vec<_>>());
    let weights = coefs(batch.targets.len());
    let run = |vlm: &_, dropout| loss(vlm, &batch, &weights, Mode { dropout, ..Mode::default() }).to_bits();
    let off = run(&vlm, None);
    assert_eq!(run(&vlm, Some(key("one"))), off);
    let projector = names(&mut vlm, |n| n.starts_with("projector."));
    vlm.train_only(&projector);
    assert_eq!(run(&vlm, None), off);
    assert_ne!(run(&vlm, Some(key("one"))), off);
    assert_ne!(run(&vlm, Some(key("one"))), run(&vlm, Some(key("other"))));
    assert_eq!(run(&vlm, Some(key("one"))), run(&vlm, Some(key("one"))));
}

#[test]
fn whole_models_splice_what_the_projector_makes() {
    // 2 × 2 patches a picture.
    let perceiver = "{ perceiver = { queries = 2, depth = 1, heads = 2, kv_heads = 1, head_dim = 4 } }";
    let qformer = "{ qformer = { queries = 3, width = 6, layers = 2, heads = 2, intermediate = 7, dropout = 0.2 } }";
    let (patch, full) = (SelectFeature::Patch, SelectFeature::Full);
    for (text, per, select) in [
        ("{ pixel_shuffle = {} }", 1, patch),
        ("{ bottleneck = { dim = 3, dropout = 0.3 } }", 4, patch),
        (perceiver, 2, patch),
        (perceiver, 2, full),
        (qformer, 3, full),
    ] {
        let mut vlm = vlm(clip(), -2, select, &config(text), llama());
        assert_eq!(vlm.tokens_per_image().unwrap(), per);
        let chosen = names(&mut vlm, |n| n.starts_with("projector.") || n.contains("layers.1."));
        vlm.train_only(&chosen);
        let unreachable: Vec<String> = vlm.unreachable(true).into_iter().map(|(n, _)| n).collect();
        assert!(unreachable.is_empty(), "{unreachable:?}");
        let batch = pack(&vlm, &sequences().iter().collect::<Vec<_>>());
        let weights = coefs(batch.targets.len());
        let mode = Mode { dropout: Some(key("dropout")), ..Mode::default() };
        let frozen = snapshot(&mut vlm);
        let grads = gradients(&vlm, &batch, &weights, mode);
        assert!(snapshot(&mut vlm) == frozen, "{text}: a parameter changed");
        let zero = |n: &str| n.ends_with("k_proj.bias") || of_keys(n);
        check_params(text, &mut vlm, &grads, zero, |vlm| loss(vlm, &batch, &weights, mode));
    }
}

/// An image token that the embedding table has no row for: visual tokens stand in its place in any case.
#[test]
fn an_image_token_beyond_the_embedding_table() {
    let mut within = vlm(clip(), -2, SelectFeature::Patch, &config("{ linear = {} }"), llama());
    let all = names(&mut within, |n| n.starts_with("projector.") || n.starts_with("language."));
    within.train_only(&all);
    let batch = pack(&within, &sequences().iter().collect::<Vec<_>>());
    let mut beyond = within.clone();
    beyond.image_token_id = Some(10 * IMAGE);
    let ids = batch.ids.iter().map(|id| if *id == IMAGE { 10 * IMAGE } else { *id }).collect();
    let other = Batch { ids, ..batch.clone() };
    let weights = coefs(batch.targets.len());
    let [a, b] = [(&within, &batch), (&beyond, &other)].map(|(v, b)| gradients(v, b, &weights, Mode::default()));
    assert_eq!(a.len(), all.len());
    assert!(a.iter().all(|(name, g)| bits(g) == bits(&b[name])));
}

#[test]
fn pixel_shuffle_says_what_it_cannot_take() {
    let p = |text: &str| Projector::new(&config(text), 8, 12, true, &mut source()).unwrap();
    let e = p("{ pixel_shuffle = { factor = 5 } }").tokens(grid(24)).unwrap_err();
    assert_eq!(
        e.cause(),
        "pixel_shuffle: factor 5 does not divide the 24 × 24 patches of a picture (336 px, patches of 14 px)"
    );
    assert_eq!(e.hint_text(), Some("factors that do: 1, 2, 3, 4, 6, 8, 12, 24"));
    let e = p("{ pixel_shuffle = {} }").tokens(Grid { class_token: true, ..grid(24) }).unwrap_err();
    assert!(e.cause().contains("class token") && e.hint_text().unwrap().contains("select_feature = \"patch\""), "{e}");
    assert_eq!(p("{ linear = {} }").tokens(Grid { class_token: true, ..grid(24) }).unwrap(), 577);
}

/// The order of tokens and of channels within them is that of `Idefics3Connector` in transformers.
#[test]
fn pixel_shuffle_agrees_with_transformers() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/projectors");
    let golden = safetensors::load(&dir.join("pixel_shuffle.safetensors")).unwrap();
    for (side, factor) in [(4, 2), (6, 3)] {
        let part = |name: &str| golden[&format!("{side}x{side}.{factor}.{name}")].to_dtype(DType::F32).unwrap();
        let (x, weight, y) = (part("x"), part("weight"), part("y"));
        let cfg = config(&format!("{{ pixel_shuffle = {{ factor = {factor} }} }}"));
        let mut fresh = Fresh { key: key("weights"), place: Place::cpu() };
        let mut p = Projector::new(&cfg, x.dims()[1], y.dims()[1], false, &mut fresh).unwrap();
        p.assign(&[("projector.linear_1.weight".to_string(), weight)].into()).unwrap();
        assert!(p.params().len() == 1 && x.device().same_device(&Device::Cpu));
        let (out, _) = p.forward(&x, grid(side), Pass::default()).unwrap();
        let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
        let off = distance(&wide(&out), &wide(&y));
        assert!(off < 1e-6, "{side} × {side}, factor {factor}: {off:e}");
    }
}

/// Loads a projector from its golden file, where transformers' names are, and holds its output and gradients to what stands
/// there. `prefix` is what those names have in the place of `projector.`.
fn agrees(file: &str, text: &str, prefix: &str) -> Projector {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/projectors").join(file);
    let golden = safetensors::load(&path).unwrap();
    let wide = |t: &Tensor| t.to_dtype(DType::F64).unwrap();
    let (x, y, dy) = (&golden["x"], &golden["y"], &golden["dy"]);
    let mut weights = Weights::projector(&path).unwrap();
    let mut src = FromWeights { weights: &mut weights, place: &Place::cpu() };
    let mut p = Projector::new(&config(text), x.dims()[1], y.dims()[1], true, &mut src).unwrap();
    weights.finish().unwrap();
    let all = names(&mut p, |_| true);
    p.set_trainable(&all);
    let (out, tape) = p.forward(x, grid(4), Pass { trains: true, need_dx: true, dropout: None }).unwrap();
    let mut grads = Grads::new();
    let dx = island::backward(tape.unwrap(), dy, &mut grads).unwrap().unwrap();
    let mut worst = distance(&wide(&out), &wide(y)).max(distance(&wide(&dx), &wide(&golden["dx"])));
    let mut seen = 0;
    for (name, grad) in grads.by_name() {
        let theirs = &golden[&format!("grad.{prefix}{}", name.strip_prefix("projector.").unwrap())];
        seen += 1;
        if of_keys(name) {
            let largest = flat(&wide(grad)).iter().chain(&flat(&wide(theirs))).fold(0f64, |m, g| m.max(g.abs()));
            assert!(largest < 1e-5, "{file}: {name} should be zero and is {largest:e}");
            continue;
        }
        worst = worst.max(distance(&wide(grad), &wide(theirs)));
    }
    assert_eq!(seen, golden.keys().filter(|n| n.starts_with("grad.")).count());
    eprintln!("{file}: off by {worst:e} at most");
    assert!(worst < 3e-6, "{file}: off by {worst:e}");
    p
}

#[test]
fn perceiver_agrees_with_transformers() {
    let text = "{ perceiver = { queries = 3, depth = 2, heads = 4, kv_heads = 2, head_dim = 3, hidden = 10, norm_eps = 1e-5 } }";
    agrees("perceiver.safetensors", text, "model.connector.");
}

#[test]
fn resampler_agrees_with_openflamingo() {
    let text = "{ resampler = { queries = 3, depth = 2, heads = 4, head_dim = 3, ff_mult = 2 } }";
    agrees("../flamingo/resampler.safetensors", text, "");
}

#[test]
fn qformer_agrees_with_transformers_and_loads_a_model_of_its_own() {
    let text = "{ qformer = { queries = 4, width = 12, layers = 3, heads = 3, intermediate = 20 } }";
    let whole = agrees("qformer.safetensors", text, "").params();

    // Saved alone it brings neither queries nor the way to the language model.
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/projectors/blip2_qformer");
    let load = |text: &str| {
        let cfg = config(text);
        let mut weights = Weights::projector(&dir).unwrap();
        let fresh = Fresh { key: key("weights"), place: Place::cpu() };
        let place = Place::cpu();
        let from = FromWeights { weights: &mut weights, place: &place };
        let p = Projector::new(&cfg, 7, 5, true, &mut Partly { weights: from, fresh, prefixes: &cfg.fresh() })?;
        weights.finish()?;
        Ok::<_, adfreeze::error::Error>(p.params())
    };
    let e = load(text).unwrap_err();
    assert!(e.cause().contains("tensor `projector.query_tokens` is missing"), "{e}");
    let parts =
        load(&text.replace("{ queries", "{ source = 'x', fresh = ['query_tokens', 'language_projection'], queries"));
    for (name, t) in &parts.unwrap() {
        let same = bits(&t.to_dtype(DType::F64).unwrap()) == bits(&whole[name].to_dtype(DType::F64).unwrap());
        assert_eq!(same, name.starts_with("projector.qformer."), "{name}");
    }
}
