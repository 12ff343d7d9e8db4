//! The same kind of model on stock candle: composed differentiable ops, variables, `Tensor::backward`. Oracle of
//! `tests/oracle.rs`, and what `benches/step_vs_candle.rs` measures against.
//!
//! Sequences of one micro-batch have equal lengths here. Where nothing is tracked the fused inference ops are used, as
//! anyone would write it.
#![allow(
    clippy::disallowed_methods,
    reason = "the stock model uses the fast forward where nothing is tracked, as one would"
)]

use adfreeze::model::backbone::{LanguageConfig, VisionConfig};
use adfreeze::model::language::rope::Rope;
use adfreeze::model::params::Module;
use adfreeze::model::vlm::{Batch, Vlm};
use adfreeze::spec::Activation;
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::ops;
use std::collections::BTreeMap;

type Result<T> = candle_core::Result<T>;

/// Parameters of a model as candle sees them, and what is needed to run it.
pub struct Stock {
    vision: VisionConfig,
    text: LanguageConfig,
    /// Layers of the tower that run; patches are selected.
    depth: usize,
    image: Option<u32>,
    rope: Rope,
    pub vars: BTreeMap<String, Var>,
    tensors: BTreeMap<String, Tensor>,
    /// (adapter, scale) of each layer that has some.
    deltas: BTreeMap<String, Vec<(String, f64)>>,
}

impl Stock {
    /// The model `vlm` with its trained parameters as variables. Its projector is an MLP with quick GELU and two layers.
    pub fn new(vlm: &mut Vlm, depth: usize) -> Self {
        let vars: BTreeMap<String, Var> =
            vlm.trainable().into_iter().map(|(n, t)| (n, Var::from_tensor(&t).unwrap())).collect();
        let tensors = vlm
            .params()
            .into_iter()
            .map(|(n, t)| {
                let t = vars.get(&n).map_or(t, |v| v.as_tensor().clone());
                (n, t)
            })
            .collect();
        let mut deltas = BTreeMap::new();
        for l in vlm.linears() {
            let all: Vec<(String, f64)> = l.deltas.iter().map(|d| (d.adapter.clone(), d.scale)).collect();
            if !all.is_empty() {
                deltas.insert(l.name().to_string(), all);
            }
        }
        let text = vlm.language.config.clone();
        let vision = vlm.vision.as_ref().expect("a tower").config.clone();
        Self { vision, rope: Rope::new(&text), text, depth, image: vlm.image_token_id, vars, tensors, deltas }
    }

    fn get(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("no tensor {name}"))
    }

    /// `x` `[N, in]` through the linear layer `name` and its adapters.
    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let mut y = x.matmul(&self.get(&format!("{name}.weight")).t()?)?;
        if let Some(b) = self.tensors.get(&format!("{name}.bias")) {
            y = y.broadcast_add(b)?;
        }
        for (adapter, scale) in self.deltas.get(name).into_iter().flatten() {
            let a = self.get(&format!("{name}.lora_A.{adapter}.weight"));
            let b = self.get(&format!("{name}.lora_B.{adapter}.weight"));
            y = (y + (x.matmul(&a.t()?)?.matmul(&b.t()?)? * *scale)?)?;
        }
        Ok(y)
    }

    fn layer_norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let (w, b) = (self.get(&format!("{name}.weight")), self.get(&format!("{name}.bias")));
        let eps = self.vision.layer_norm_eps as f32;
        let tracked = slow(&[x, w, b]);
        if tracked { ops::layer_norm_slow(x, w, b, eps) } else { ops::layer_norm(x, w, b, eps) }
    }

    fn rms_norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let (w, eps) = (self.get(&format!("{name}.weight")), self.text.rms_norm_eps as f32);
        let tracked = slow(&[x, w]);
        if tracked { ops::rms_norm_slow(x, w, eps) } else { ops::rms_norm(x, w, eps) }
    }

    /// Heads `[B, H, L, hd]` attending; rows `[B·L, H·hd]` out.
    fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
        let (b, h, l, hd) = q.dims4()?;
        let mut scores = (q.matmul(&k.t()?)? / (hd as f64).sqrt())?;
        if let Some(mask) = mask {
            scores = scores.broadcast_add(mask)?;
        }
        let p = if scores.track_op() { ops::softmax(&scores, D::Minus1)? } else { ops::softmax_last_dim(&scores)? };
        p.matmul(v)?.transpose(1, 2)?.reshape((b * l, h * hd))
    }

    fn heads(x: &Tensor, b: usize, heads: usize) -> Result<Tensor> {
        let (n, d) = x.dims2()?;
        x.reshape((b, n / b, heads, d / heads))?.transpose(1, 2)?.contiguous()
    }

    /// Visual tokens `[I·patches, D]` of `pixels`.
    fn visual_tokens(&self, pixels: &Tensor) -> Result<Tensor> {
        let c = &self.vision;
        let (b, d, g) = (pixels.dim(0)?, c.hidden_size, c.image_size / c.patch_size);
        let (p, t) = (c.patch_size, g * g + 1);
        let patches =
            pixels.reshape((b, 3, g, p, g, p))?.permute((0, 2, 4, 1, 3, 5))?.reshape((b * g * g, 3 * p * p))?;
        let kernel = self.get("vision.embeddings.patch_embedding.weight").reshape((d, 3 * p * p))?;
        let words = patches.matmul(&kernel.t()?)?.reshape((b, g * g, d))?;
        let class = self.get("vision.embeddings.class_embedding").reshape((1, 1, d))?.broadcast_as((b, 1, d))?;
        let positions = self.get("vision.embeddings.position_embedding.weight");
        let x = Tensor::cat(&[&class.contiguous()?, &words], 1)?.broadcast_add(positions)?.reshape((b * t, d))?;
        let mut x = self.layer_norm("vision.pre_layrnorm", &x)?;
        for i in 0..self.depth {
            let name = |part: &str| format!("vision.encoder.layers.{i}.{part}");
            let h = self.layer_norm(&name("layer_norm1"), &x)?;
            let part = |s: &str| Self::heads(&self.linear(&name(s), &h)?, b, c.num_attention_heads);
            let o =
                Self::attend(&part("self_attn.q_proj")?, &part("self_attn.k_proj")?, &part("self_attn.v_proj")?, None)?;
            x = (x + self.linear(&name("self_attn.out_proj"), &o)?)?;
            let h = self.linear(&name("mlp.fc1"), &self.layer_norm(&name("layer_norm2"), &x)?)?;
            assert_eq!(c.hidden_act, Activation::QuickGelu);
            x = (x + self.linear(&name("mlp.fc2"), &quick_gelu(&h)?)?)?;
        }
        let features = x.reshape((b, t, d))?.narrow(1, 1, t - 1)?.reshape((b * (t - 1), d))?;
        self.linear("projector.linear_2", &quick_gelu(&self.linear("projector.linear_1", &features)?)?)
    }

    /// Log-probability of each target.
    pub fn logps(&self, batch: &Batch) -> Result<Tensor> {
        let c = &self.text;
        let (b, l) = (batch.lengths.len(), batch.lengths[0]);
        assert!(batch.lengths.iter().all(|n| *n == l), "equal lengths only");
        let table = self.get("language.embed_tokens.weight");
        let mut x = table.index_select(&Tensor::new(batch.ids.as_slice(), &Device::Cpu)?, 0)?;
        if let Some(pixels) = &batch.pixels {
            let (tokens, n) = (self.visual_tokens(pixels)?, batch.ids.len() as u32);
            let per = tokens.dim(0)? / pixels.dim(0)?;
            let mut shown = batch.pictures.iter().flat_map(|p| (0..per as u32).map(move |k| n + p * per as u32 + k));
            let row = |(i, id): (usize, &u32)| if Some(*id) == self.image { shown.next().unwrap() } else { i as u32 };
            let rows: Vec<u32> = batch.ids.iter().enumerate().map(row).collect();
            x = Tensor::cat(&[&x, &tokens], 0)?.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
        }
        let positions: Vec<usize> = (0..l).collect();
        let (cos, sin) = self.rope.angles(&positions, x.dtype(), x.device()).unwrap();
        let mask: Vec<f32> = (0..l * l).map(|i| if i % l > i / l { f32::NEG_INFINITY } else { 0.0 }).collect();
        let mask = Tensor::from_vec(mask, (l, l), &Device::Cpu)?.to_dtype(x.dtype())?;
        let group = c.num_attention_heads / c.num_key_value_heads;
        for i in 0..c.num_hidden_layers {
            let name = |part: &str| format!("language.layers.{i}.{part}");
            let h = self.rms_norm(&name("input_layernorm"), &x)?;
            let part = |s: &str, heads: usize| Self::heads(&self.linear(&name(s), &h)?, b, heads);
            let turn = |t: Tensor| candle_nn::rotary_emb::rope_slow(&t, &cos, &sin);
            let q = turn(part("self_attn.q_proj", c.num_attention_heads)?)?;
            let k = repeat(&turn(part("self_attn.k_proj", c.num_key_value_heads)?)?, group)?;
            let v = repeat(&part("self_attn.v_proj", c.num_key_value_heads)?, group)?;
            x = (x + self.linear(&name("self_attn.o_proj"), &Self::attend(&q, &k, &v, Some(&mask))?)?)?;
            let h = self.rms_norm(&name("post_attention_layernorm"), &x)?;
            let act = (self.linear(&name("mlp.gate_proj"), &h)?.silu()? * self.linear(&name("mlp.up_proj"), &h)?)?;
            x = (x + self.linear(&name("mlp.down_proj"), &act)?)?;
        }
        // The head on labelled rows only, as ours.
        let (rows, ids): (Vec<u32>, Vec<u32>) = batch.targets.iter().copied().unzip();
        let x = x.index_select(&Tensor::new(rows, &Device::Cpu)?, 0)?;
        let head = if c.tie_word_embeddings { table } else { self.get("language.lm_head.weight") };
        let logits = self.rms_norm("language.norm", &x)?.matmul(&head.t()?)?;
        let ids = Tensor::new(ids, &Device::Cpu)?.unsqueeze(1)?;
        ops::log_softmax(&logits, D::Minus1)?.gather(&ids, 1)?.squeeze(1)
    }

    /// Σ coefᵢ·log pᵢ.
    pub fn loss(&self, batch: &Batch, coefs: &[f64]) -> Result<Tensor> {
        let logps = self.logps(batch)?;
        let coefs = Tensor::new(coefs, &Device::Cpu)?.to_dtype(logps.dtype())?;
        (logps * coefs)?.sum_all()
    }
}

/// The fused norms have no backward, and no f64.
fn slow(args: &[&Tensor]) -> bool {
    args.iter().any(|t| t.track_op() || t.dtype() == DType::F64)
}

fn repeat(x: &Tensor, n: usize) -> Result<Tensor> {
    let (b, h, l, hd) = x.dims4()?;
    if n == 1 {
        return Ok(x.clone());
    }
    Tensor::cat(&vec![x; n], 2)?.reshape((b, h * n, l, hd))
}

fn quick_gelu(x: &Tensor) -> Result<Tensor> {
    x * ops::sigmoid(&(x * 1.702)?)?
}

/// The number in a scalar.
pub fn number(t: &Tensor) -> f64 {
    t.to_dtype(DType::F64).unwrap().to_scalar().unwrap()
}
