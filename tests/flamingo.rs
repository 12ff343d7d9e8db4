//! Flamingo's gated cross-attention beside OpenFlamingo's own code, from golden files; its resampler is in `projectors.rs`.

mod tiny;

use adfreeze::checkpoint::safetensors;
use adfreeze::model::init::{Place, Shapes};
use adfreeze::model::insert::Inserts;
use adfreeze::model::insert::cross_attention::CrossAttention;
use adfreeze::model::params::{Grads, Module};
use adfreeze::model::role::Scope;
use adfreeze::model::segment::Side;
use adfreeze::model::visual::{Shown, Visual};
use adfreeze::spec::{Adapter, CrossAttention as Recipe};
use candle_core::{DType, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use tiny::*;

const PLACE: &str = "language.layers.0";

fn recipe(text: &str) -> Recipe {
    let table: toml::Table = toml::from_str(&format!("a = {{ cross_attention = {text} }}")).unwrap();
    match table["a"].clone().try_into().unwrap() {
        Adapter::CrossAttention(cfg) => cfg,
        other => panic!("{other:?}"),
    }
}

fn wide(t: &Tensor) -> Tensor {
    t.to_dtype(DType::F64).unwrap()
}

/// Output and gradients of a block with OpenFlamingo's parameters, on its two texts with two pictures each.
fn run(
    golden: &BTreeMap<String, Tensor>,
    sees: &str,
    dtype: DType,
) -> (Tensor, Tensor, Tensor, BTreeMap<String, Tensor>) {
    let cfg = recipe(&format!("{{ heads = 2, head_dim = 3, ff_mult = 2, sees = '{sees}' }}"));
    let mut source = adfreeze::model::init::Fresh { key: key("block"), place: Place { dtype, ..Place::cpu() } };
    let mut block = CrossAttention::new(&cfg, "eyes", &Scope::language().layer("layers", 0), 8, &mut source).unwrap();
    let prefix = format!("{PLACE}.cross_attention.eyes.");
    let own = names(&mut block, |_| true);
    let theirs = |name: &String| (name.clone(), golden[name.strip_prefix(&prefix).unwrap()].clone());
    block.assign(&own.iter().map(theirs).collect()).unwrap();
    block.set_trainable(&own);
    let mut inserts = Inserts::default();
    inserts.push(Box::new(block)).unwrap();

    let in_type = |name: &str| golden[name].to_dtype(dtype).unwrap();
    let places: Vec<Vec<f32>> = golden["places"].to_vec2().unwrap();
    let mut shown = Vec::new();
    for (owner, at) in places.iter().enumerate() {
        for (i, place) in at.iter().enumerate() {
            let end = at.get(i + 1).map_or(7, |next| *next as usize);
            let first = (2 * owner + i) as u32 * 3;
            let rows = 7 * owner + *place as usize..7 * owner + end;
            shown.push(Shown { owner, rows, tokens: (first..first + 3).collect() });
        }
    }
    let mut side = Side::packed(&[7, 7]);
    side.visual = Some(Visual::new(in_type("media"), true, &shown));
    let x = in_type("x");
    let (y, inputs) = inserts.forward(x, &side).unwrap();
    let mut grads = Grads::new();
    let dy = masked(&golden["dy"], &places, sees).to_dtype(dtype).unwrap();
    let dx = inserts.backward(&inputs, &dy, &side, &mut grads, true).unwrap().unwrap();
    let dmedia = grads.take_visual().unwrap();
    let short = |(name, g): (&String, &Tensor)| (name.strip_prefix(&prefix).unwrap().to_string(), wide(g));
    let by_name = grads.by_name().iter().map(short).collect();
    (masked(&wide(&y), &places, sees), wide(&dx), wide(&dmedia), by_name)
}

/// Where all pictures are seen, OpenFlamingo lets a row before the first one see the mean of all: those rows are left out.
fn masked(rows: &Tensor, places: &[Vec<f32>], sees: &str) -> Tensor {
    let keep = |i: usize| sees == "last" || i % 7 >= places[i / 7][0] as usize;
    let mask: Vec<f64> = (0..14).map(|i| f64::from(u8::from(keep(i)))).collect();
    let mask = Tensor::from_vec(mask, (14, 1), rows.device()).unwrap().to_dtype(rows.dtype()).unwrap();
    rows.broadcast_mul(&mask).unwrap()
}

fn golden() -> BTreeMap<String, Tensor> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/flamingo/block.safetensors");
    safetensors::load(&path).unwrap().into_iter().collect()
}

#[test]
fn a_gated_block_agrees_with_openflamingo() {
    let golden = golden();
    for (sees, case) in [("last", ""), ("all", "all.")] {
        let theirs = |name: &str| wide(&golden[&format!("{case}{name}")]);
        let (y, dx, dmedia, grads) = run(&golden, sees, DType::F32);
        let mut worst = distance(&y, &theirs("y")).max(distance(&dx, &theirs("dx")));
        worst = worst.max(distance(&dmedia, &theirs("dmedia")));
        let known: BTreeSet<&str> = golden.keys().filter_map(|n| n.strip_prefix("grad.")).collect();
        assert!(known.len() == 11 && grads.keys().map(String::as_str).eq(known), "{:?}", grads.keys());
        for (name, g) in &grads {
            worst = worst.max(distance(g, &theirs(&format!("grad.{name}"))));
        }
        eprintln!("sees = {sees}: off by {worst:e} at most");
        assert!(worst < 1e-5, "sees = {sees}: off by {worst:e}");
    }
    // The two are not the same.
    assert!(distance(&wide(&golden["y"]), &wide(&golden["all.y"])) > 1e-2);
}

/// Parameters' gradients are sums in f32, the gates' among them.
#[test]
fn in_bf16_it_is_as_near_as_bf16_can_be() {
    let golden = golden();
    let norm = |t: &Tensor| flat(t).iter().map(|x| x * x).sum::<f64>().sqrt();
    for (sees, case) in [("last", ""), ("all", "all.")] {
        let (y, dx, dmedia, grads) = run(&golden, sees, DType::BF16);
        let theirs = |name: &str| wide(&golden[&format!("{case}{name}")]);
        let grads = grads.iter().map(|(name, g)| (format!("grad.{name}"), g.clone()));
        let parts = [("y", y), ("dx", dx), ("dmedia", dmedia)].map(|(name, t)| (name.to_string(), t));
        for (name, t) in parts.into_iter().chain(grads) {
            let want = theirs(&name);
            let off = norm(&(t - &want).unwrap()) / norm(&want);
            // A gate's is one number, in which much cancels.
            let bound = if name.ends_with("_gate") { 0.2 } else { 0.03 };
            assert!(off < bound, "sees = {sees}, {name}: off by {off:e}");
        }
    }
}

#[test]
fn it_has_as_many_parameters() {
    let block = CrossAttention::new(
        &recipe("{}"),
        "eyes",
        &Scope::language().layer("layers", 0),
        4096,
        &mut Shapes(Place::cpu()),
    )
    .unwrap();
    // As tests/golden/flamingo/make.py prints.
    assert_eq!(block.params().values().map(Tensor::elem_count).sum::<usize>(), 142_622_722);
}
