//! Tiny models and batches in f64, and the checks that `tests/segments.rs` and `tests/oracle.rs` share.
#![allow(dead_code, reason = "each test binary uses its own part")]

use adfreeze::model::backbone::{LANGUAGES, LanguageConfig, RopeScaling, TOWERS, VisionConfig};
use adfreeze::model::dora;
use adfreeze::model::init::{Fresh, Place};
use adfreeze::model::language::Language;
use adfreeze::model::linear::{Linear, LowRank};
use adfreeze::model::params::{Grads, Module};
use adfreeze::model::projector::Projector;
use adfreeze::model::vision::Tower;
use adfreeze::model::vlm::{Batch, Mode, Vlm};
use adfreeze::ops::random::{Key, normal};
use adfreeze::spec::{self, Activation, MlpProjector, SelectFeature};
use candle_core::{DType, Tensor};
use std::collections::{BTreeMap, BTreeSet};

/// Token id that stands for a visual token.
pub const IMAGE: u32 = 22;

pub fn key(what: &str) -> Key {
    Key::new(5, what)
}

pub fn source() -> Fresh {
    Fresh { key: key("weights"), place: Place { dtype: DType::F64, ..Place::cpu() } }
}

pub fn noise(what: &str, shape: &[usize], std: f64) -> Tensor {
    normal(key(what), shape, std, DType::F64).unwrap()
}

pub fn llama() -> LanguageConfig {
    LanguageConfig {
        architecture: LANGUAGES[0],
        vocab_size: 23,
        hidden_size: 12,
        intermediate_size: 10,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        rms_norm_eps: 1e-5,
        rope_theta: 100.0,
        rope_scaling: RopeScaling::None,
        max_position_embeddings: 64,
        attention_bias: false,
        mlp_bias: false,
        tie_word_embeddings: false,
        bos_token_id: Some(0),
        eos_token_ids: vec![1],
        pad_token_id: None,
    }
}

pub fn clip() -> VisionConfig {
    VisionConfig {
        architecture: TOWERS[0],
        hidden_size: 8,
        intermediate_size: 14,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        num_channels: 3,
        image_size: 6,
        patch_size: 3,
        hidden_act: Activation::QuickGelu,
        layer_norm_eps: 1e-5,
    }
}

pub fn mlp(input_norm: bool) -> spec::Projector {
    spec::Projector::Mlp(MlpProjector {
        source: None,
        depth: 2,
        hidden: Some(9),
        act: Activation::QuickGelu,
        input_norm,
        norm: false,
    })
}

/// Moves every parameter away from its initial value: LoRA's B off 0, norms off 1 and 0. Tied parameters stay tied.
pub fn perturb(m: &mut dyn Module) {
    let mut moved: BTreeMap<String, Tensor> = BTreeMap::new();
    m.visit_mut(&mut |p| {
        let new = moved.entry(p.name.clone()).or_insert_with(|| {
            let width = p.value.dims().last().copied().unwrap_or(1).max(1) as f64;
            let std = if p.value.rank() > 1 { 1.0 / width.sqrt() } else { 0.2 };
            (&p.value + noise(&p.name, p.value.dims(), std)).unwrap()
        });
        p.value = new.clone();
    });
}

/// ‖W + s·B·A‖ of each update with a magnitude, by the magnitude's name. DoRA's backward holds it constant.
pub type Lengths = BTreeMap<String, Tensor>;

fn lengths_of(l: &Linear, d: &LowRank) -> Tensor {
    let w = l.weight.compute();
    dora::lengths(w, &dora::row_squares(w).unwrap(), d.a.compute(), d.b.compute(), d.scale).unwrap()
}

pub fn lengths(l: &Linear) -> Lengths {
    let of = |d: &LowRank| d.magnitude.as_ref().map(|m| (m.param.name.clone(), lengths_of(l, d)));
    l.deltas.iter().filter_map(of).collect()
}

/// Lets the layer compute as if these were its lengths still: each magnitude grows as the length has grown.
pub fn hold(l: &mut Linear, lengths: &Lengths) {
    let now: Vec<Option<Tensor>> = l.deltas.iter().map(|d| d.magnitude.is_some().then(|| lengths_of(l, d))).collect();
    for (d, now) in l.deltas.iter_mut().zip(now) {
        if let (Some(m), Some(now)) = (&mut d.magnitude, now) {
            m.param.value = ((&m.param.value * now).unwrap() / &lengths[&m.param.name]).unwrap();
        }
    }
}

/// [`loss`] with the lengths held: what finite differences must see of a model with DoRA.
pub fn held_loss(vlm: &Vlm, lengths: &Lengths, batch: &Batch, coefs: &[f64], mode: Mode) -> f64 {
    if lengths.is_empty() {
        return loss(vlm, batch, coefs, mode);
    }
    let mut vlm = vlm.clone();
    vlm.linears_mut().for_each(|l| hold(l, lengths));
    loss(&vlm, batch, coefs, mode)
}

pub fn all_lengths(vlm: &Vlm) -> Lengths {
    vlm.linears().flat_map(lengths).collect()
}

pub fn tower(config: VisionConfig, select_layer: i64, select: SelectFeature) -> Tower {
    Tower::new(config, select_layer, select, &mut source()).unwrap()
}

/// A whole model, everything frozen and perturbed.
pub fn vlm(
    vision: VisionConfig,
    select_layer: i64,
    select: SelectFeature,
    projector: &spec::Projector,
    text: LanguageConfig,
) -> Vlm {
    let (d_in, d_out) = (vision.hidden_size, text.hidden_size);
    let tower = tower(vision, select_layer, select);
    let projector = Projector::new(projector, d_in, d_out, true, &mut source()).unwrap();
    let language = Language::new(text, &mut source()).unwrap();
    let mut vlm = Vlm::new(Some(tower), Some(projector), language, IMAGE);
    perturb(&mut vlm);
    vlm
}

/// One sequence: text tokens, and the picture that is shown before the token at a place.
pub struct Sequence {
    pub text: Vec<u32>,
    pub pictures: Vec<(usize, usize)>,
}

/// Three sequences: two pictures, one of them shown again in the second; the third is text alone.
pub fn sequences() -> Vec<Sequence> {
    let seq = |text: &[u32], pictures: &[(usize, usize)]| Sequence { text: text.to_vec(), pictures: pictures.to_vec() };
    vec![seq(&[0, 3, 7, 7, 2, 1], &[(1, 0), (4, 1)]), seq(&[0, 9, 1], &[(1, 1)]), seq(&[0, 4, 11, 6, 1], &[])]
}

/// Packs sequences; every text token from the second on is a target.
pub fn pack(vlm: &Vlm, sequences: &[&Sequence]) -> Batch {
    let mut batch = Batch::default();
    let mut distinct: Vec<usize> = Vec::new();
    for (owner, s) in sequences.iter().enumerate() {
        let start = batch.ids.len();
        for (at, id) in s.text.iter().enumerate() {
            for (_, picture) in s.pictures.iter().filter(|(place, _)| *place == at) {
                let index = distinct.iter().position(|p| p == picture).unwrap_or_else(|| {
                    distinct.push(*picture);
                    distinct.len() - 1
                });
                batch.pictures.push(index as u32);
                batch.ids.extend(vec![IMAGE; vlm.tokens_per_image().unwrap()]);
            }
            if at > 0 {
                batch.targets.push((batch.ids.len() as u32 - 1, *id));
                batch.owners.push(owner);
            }
            batch.ids.push(*id);
        }
        batch.lengths.push(batch.ids.len() - start);
    }
    if let (false, Some(tower)) = (distinct.is_empty(), &vlm.vision) {
        let side = tower.grid().image_size;
        let pixels: Vec<Tensor> =
            distinct.iter().map(|p| noise(&format!("picture {p}"), &[3, side, side], 1.0)).collect();
        batch.pixels = Some(Tensor::stack(&pixels, 0).unwrap());
    }
    batch
}

/// Weight of each target in the loss: all different, of both signs.
pub fn coefs(n: usize) -> Vec<f64> {
    (0..n).map(|i| 0.3 - 0.17 * ((i * 5 % 7) as f64)).collect()
}

pub fn loss(vlm: &Vlm, batch: &Batch, coefs: &[f64], mode: Mode) -> f64 {
    let (lp, _) = vlm.forward(batch, Mode { record: false, ..mode }).unwrap();
    lp.logps().unwrap().iter().zip(coefs).map(|(p, c)| p * c).sum()
}

pub fn gradients(vlm: &Vlm, batch: &Batch, coefs: &[f64], mode: Mode) -> BTreeMap<String, Tensor> {
    let (_, saved) = vlm.forward(batch, Mode { record: true, ..mode }).unwrap();
    let mut grads = Grads::new();
    vlm.backward(saved.unwrap(), coefs, &mut grads).unwrap();
    grads.into_inner()
}

pub fn flat(t: &Tensor) -> Vec<f64> {
    t.flatten_all().unwrap().to_vec1().unwrap()
}

/// Bits of a tensor.
pub fn bits(t: &Tensor) -> Vec<u64> {
    flat(t).into_iter().map(f64::to_bits).collect()
}

/// Bits of every parameter by name.
pub fn snapshot(m: &mut dyn Module) -> BTreeMap<String, Vec<u64>> {
    let mut all = BTreeMap::new();
    m.visit_mut(&mut |p| {
        all.insert(p.name.clone(), bits(&p.value));
    });
    all
}

/// Largest difference, relative to the larger tensor's largest value.
pub fn distance(a: &Tensor, b: &Tensor) -> f64 {
    assert_eq!(a.dims(), b.dims());
    let (a, b) = (flat(a), flat(b));
    let scale = a.iter().chain(&b).fold(1e-3f64, |m, x| m.max(x.abs()));
    let off = |(x, y): (&f64, &f64)| if x.is_nan() || y.is_nan() { f64::INFINITY } else { (x - y).abs() / scale };
    a.iter().zip(&b).map(off).fold(0.0, f64::max)
}

pub fn assert_close(what: &str, got: &BTreeMap<String, Tensor>, want: &BTreeMap<String, Tensor>, tolerance: f64) {
    assert_eq!(got.keys().collect::<Vec<_>>(), want.keys().collect::<Vec<_>>(), "{what}");
    for (name, g) in got {
        let d = distance(g, &want[name]);
        assert!(d <= tolerance, "{what}: gradient of {name} is off by {d:e}");
    }
}

/// Slope of `f` at up to `places` elements of `x`, spread over the tensor, by a five-point stencil, against `grad`.
pub fn check_slope(what: &str, x: &Tensor, grad: &Tensor, places: usize, mut f: impl FnMut(Tensor) -> f64) {
    const H: f64 = 2e-5;
    assert_eq!(x.dims(), grad.dims(), "{what}: shape of the gradient");
    let (base, grad) = (flat(x), flat(grad));
    for i in (0..base.len()).step_by(base.len().div_ceil(places)) {
        let mut at = |d: f64| {
            let mut v = base.clone();
            v[i] += d;
            f(Tensor::from_vec(v, x.dims(), x.device()).unwrap())
        };
        let slope = (8.0 * (at(H) - at(-H)) - (at(2.0 * H) - at(-2.0 * H))) / (12.0 * H);
        let error = (slope - grad[i]).abs() / grad[i].abs().max(1.0);
        assert!(error < 1e-8, "{what}[{i}]: gradient {}, finite difference {slope}", grad[i]);
    }
}

/// Checks the gradients of every trainable parameter of `m` by finite differences of `f`, that frozen ones have none,
/// and that each is finite and, but for those whose name `zero` accepts, not zero.
pub fn check_params<M: Module>(
    what: &str,
    m: &mut M,
    grads: &BTreeMap<String, Tensor>,
    zero: impl Fn(&str) -> bool,
    mut f: impl FnMut(&M) -> f64,
) {
    let trainable = m.trainable();
    assert_eq!(grads.keys().collect::<Vec<_>>(), trainable.keys().collect::<Vec<_>>(), "{what}: who has a gradient");
    for (name, value) in &trainable {
        let largest =
            flat(&grads[name]).iter().fold(0f64, |m, g| if g.is_nan() { f64::INFINITY } else { m.max(g.abs()) });
        assert!(
            largest.is_finite() && (largest > 1e-9 || zero(name)),
            "{what}: gradient of {name} reaches {largest:e}"
        );
        check_slope(&format!("{what}: {name}"), value, &grads[name], 5, |v| {
            let set = |m: &mut M, v: &Tensor| {
                m.visit_mut(&mut |p| {
                    if &p.name == name {
                        p.value = v.clone();
                    }
                })
            };
            set(m, &v);
            let loss = f(m);
            set(m, value);
            loss
        });
    }
}

/// Names of all parameters that `keep` accepts.
pub fn names(m: &mut dyn Module, keep: impl Fn(&str) -> bool) -> BTreeSet<String> {
    let mut all = BTreeSet::new();
    m.visit_mut(&mut |p| {
        if keep(&p.name) {
            all.insert(p.name.clone());
        }
    });
    all
}
