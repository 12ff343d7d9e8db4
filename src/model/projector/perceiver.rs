//! A fixed number of visual tokens at any resolution: trained latents look at a picture's features (Alayrac et al. 2022,
//! Flamingo's Perceiver Resampler), in the form of transformers' `Idefics2Connector`, whose names its parameters have.
//!
//! The features go through a gated MLP to the language model's width. Then, layer by layer, with every norm an RMSNorm:
//! h = h + attn(norm(h), [norm(context); norm(h)]), h = h + mlp(norm(h)); the last norm gives the tokens. Groups of query
//! heads share a head of keys and values.

use super::{Ends, Kind, Work};
use crate::error::{Context, Result};
use crate::model::init::Source;
use crate::model::island::Vars;
use crate::model::layers::{GatedMlp, Linear, RmsNorm, each_picture, of_each};
use crate::model::params::{Param, module};
use crate::model::role::{Init, Scope};
use crate::model::vision::Grid;
use crate::ops::attention::{Config, Sequences};
use crate::ops::graph::{attention, repeat};
use crate::spec::PerceiverProjector;
use candle_core::Tensor;

/// `modality_projection`, `perceiver_resampler.{latents, layers.N, norm}`.
#[derive(Debug, Clone)]
pub struct Perceiver {
    project: GatedMlp,
    /// `[queries, language]`
    latents: Param,
    layers: Vec<Layer>,
    norm: RmsNorm,
}

#[derive(Debug, Clone)]
struct Layer {
    config: Config,
    latents_norm: RmsNorm,
    context_norm: RmsNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    mlp_norm: RmsNorm,
    mlp: GatedMlp,
}

impl Perceiver {
    /// With `cfg.queries` latents of the language model's width.
    pub fn new(cfg: &PerceiverProjector, ends: Ends, src: &mut dyn Source) -> Result<Self> {
        let Ends { vision, language: d, .. } = ends;
        cfg.check().context("perceiver")?;
        let of = Scope::projector();
        let inside = of.at("perceiver_resampler");
        let widths = [vision, cfg.hidden.unwrap_or(4 * d), d];
        let project = GatedMlp::new(&of.at("modality_projection"), widths, cfg.act, src)?;
        let latents = src.master(&inside, "latents", &[cfg.queries, d], Init::Normal(1.0))?;
        let layers = (0..cfg.depth).map(|i| Layer::new(&inside.at(&format!("layers.{i}")), cfg, d, src));
        let layers = layers.collect::<Result<_>>()?;
        Ok(Self { project, latents, layers, norm: RmsNorm::new(&inside.at("norm"), d, cfg.norm_eps, src)? })
    }

    fn queries(&self) -> usize {
        self.latents.value.dims()[0]
    }
}

impl Layer {
    fn new(of: &Scope, cfg: &PerceiverProjector, d: usize, src: &mut dyn Source) -> Result<Self> {
        let PerceiverProjector { heads, kv_heads, head_dim, .. } = *cfg;
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let mut norm = |part: &str| RmsNorm::new(&of.at(part), d, cfg.norm_eps, src);
        let (latents_norm, context_norm) = (norm("input_latents_norm")?, norm("input_context_norm")?);
        let mlp_norm = norm("post_attention_layernorm")?;
        let mut linear = |part: &str, d_in, d_out| Linear::new(&of.at("self_attn").at(part), d_in, d_out, false, src);
        Ok(Self {
            config: Config { heads, kv_heads, head_dim, causal: false },
            latents_norm,
            context_norm,
            q: linear("q_proj", d, q)?,
            k: linear("k_proj", d, kv)?,
            v: linear("v_proj", d, kv)?,
            o: linear("o_proj", q, d)?,
            mlp_norm,
            mlp: GatedMlp::new(&of.at("mlp"), [d, 4 * d, d], cfg.act, src)?,
        })
    }

    /// Latents `[I·Q, D]` and context `[I·T, D]` → latents; `sequences` pair Q rows with T + Q.
    fn forward(&self, h: &Tensor, context: &Tensor, sequences: &Sequences, vars: &mut Vars) -> Result<Tensor> {
        let (own, seen) = (self.latents_norm.forward(h, vars)?, self.context_norm.forward(context, vars)?);
        let mut both = |layer: &Linear| -> Result<Tensor> {
            of_each(sequences.len(), [&layer.forward(&seen, vars)?, &layer.forward(&own, vars)?])
        };
        let (k, v) = (both(&self.k)?, both(&self.v)?);
        let a = attention(self.config, sequences, &self.q.forward(&own, vars)?, &k, &v)?;
        let h = (h + self.o.forward(&a, vars)?)?;
        let m = self.mlp.forward(&self.mlp_norm.forward(&h, vars)?, vars)?;
        Ok((h + m)?)
    }

    /// FLOPs of a picture of t features and q latents.
    fn work(&self, t: u64, q: u64) -> Work {
        let [first, second] = self.mlp.weights();
        let own = self.q.weights() + self.o.weights() + first + second;
        let inner = 2 * (q * own + (t + q) * (self.k.weights() + self.v.weights()));
        let width = (self.config.heads * self.config.head_dim) as u64;
        Work { features: 0, inner, attention: 4 * q * (t + q) * width }
    }
}

impl Kind for Perceiver {
    fn tokens(&self, _: Grid) -> Result<usize> {
        Ok(self.queries())
    }

    fn forward(&self, x: &Tensor, grid: Grid, vars: &mut Vars) -> Result<Tensor> {
        let (t, q) = (grid.tokens(), self.queries());
        let pictures = x.dims2()?.0 / t;
        let context = self.project.forward(x, vars)?;
        let sequences = each_picture(pictures, q, t + q);
        let mut h = repeat(&vars.get(&self.latents)?, pictures, x.dtype())?;
        for layer in &self.layers {
            h = layer.forward(&h, &context, &sequences, vars)?;
        }
        self.norm.forward(&h, vars)
    }

    fn work(&self, grid: Grid) -> Result<Work> {
        let (t, q) = (grid.tokens() as u64, self.queries() as u64);
        let [first, second] = self.project.weights();
        let mut all = Work { features: 2 * t * first, inner: 2 * t * second, attention: 0 };
        for layer in self.layers.iter().map(|l| l.work(t, q)) {
            all.inner += layer.inner;
            all.attention += layer.attention;
        }
        Ok(all)
    }

    fn boxed(&self) -> Box<dyn Kind> {
        Box::new(self.clone())
    }
}

module!(Perceiver: project, latents, layers, norm);

module!(Layer: latents_norm, context_norm, mlp_norm, q, k, v, o, mlp);
