//! Flamingo's Perceiver Resampler (Alayrac et al. 2022) in its first form, as OpenFlamingo has it, whose names its parameters have:
//! a fixed number of visual tokens at any resolution. Layer by layer, with LayerNorms and no biases in linear layers:
//! h = h + attn(norm(h), [norm(features); norm(h)]), h = h + ff(h); the last norm gives the tokens, of the tower's width. Where the
//! language model has another width, the linear layer `out` leads there; else there is none.

use super::{Ends, Kind, Work};
use crate::error::{Context, Result};
use crate::model::init::Source;
use crate::model::island::Vars;
use crate::model::layers::{FeedForward, LayerNorm, Linear, each_picture, of_each};
use crate::model::params::{Param, module};
use crate::model::role::{Init, Scope};
use crate::model::vision::Grid;
use crate::ops::attention::{Config, Sequences};
use crate::ops::graph::{attention, repeat};
use crate::spec::ResamplerProjector;
use candle_core::Tensor;

/// `perceiver.{latents, layers.N.0, layers.N.1, norm}`, `out`.
#[derive(Debug, Clone)]
pub struct Resampler {
    /// `[queries, vision]`
    latents: Param,
    layers: Vec<Layer>,
    norm: LayerNorm,
    out: Option<Linear>,
}

#[derive(Debug, Clone)]
struct Layer {
    config: Config,
    norm_media: LayerNorm,
    norm_latents: LayerNorm,
    to_q: Linear,
    /// Keys, then values, each of all heads.
    to_kv: Linear,
    to_out: Linear,
    ff: FeedForward,
}

impl Resampler {
    /// With `cfg.queries` latents of the tower's width.
    pub fn new(cfg: &ResamplerProjector, ends: Ends, src: &mut dyn Source) -> Result<Self> {
        let Ends { vision: d, language, bias } = ends;
        cfg.check().context("resampler")?;
        let of = Scope::projector();
        let inside = of.at("perceiver");
        let latents = src.master(&inside, "latents", &[cfg.queries, d], Init::Normal(1.0))?;
        let layers = (0..cfg.depth).map(|i| Layer::new(&inside.at(&format!("layers.{i}")), cfg, d, src));
        let layers = layers.collect::<Result<_>>()?;
        let norm = LayerNorm::new(&inside.at("norm"), d, src)?;
        let out = (d != language).then(|| Linear::new(&of.at("out"), d, language, bias, src)).transpose()?;
        Ok(Self { latents, layers, norm, out })
    }

    fn queries(&self) -> usize {
        self.latents.value.dims()[0]
    }
}

impl Layer {
    fn new(of: &Scope, cfg: &ResamplerProjector, d: usize, src: &mut dyn Source) -> Result<Self> {
        let inner = cfg.heads * cfg.head_dim;
        let part = |part: &str| of.at("0").at(part);
        Ok(Self {
            config: Config { heads: cfg.heads, kv_heads: cfg.heads, head_dim: cfg.head_dim, causal: false },
            norm_media: LayerNorm::new(&part("norm_media"), d, src)?,
            norm_latents: LayerNorm::new(&part("norm_latents"), d, src)?,
            to_q: Linear::new(&part("to_q"), d, inner, false, src)?,
            to_kv: Linear::new(&part("to_kv"), d, 2 * inner, false, src)?,
            to_out: Linear::new(&part("to_out"), inner, d, false, src)?,
            ff: FeedForward::new(&of.at("1"), d, cfg.ff_mult * d, src)?,
        })
    }

    /// Latents `[I·Q, D]` and features `[I·T, D]` → latents; `sequences` pair Q rows with T + Q.
    fn forward(&self, h: &Tensor, x: &Tensor, sequences: &Sequences, vars: &mut Vars) -> Result<Tensor> {
        let (own, seen) = (self.norm_latents.forward(h, vars)?, self.norm_media.forward(x, vars)?);
        let (a, b) = (self.to_kv.forward(&seen, vars)?, self.to_kv.forward(&own, vars)?);
        let kv = of_each(sequences.len(), [&a, &b])?;
        let inner = self.config.heads * self.config.head_dim;
        let (k, v) = (kv.narrow(1, 0, inner)?, kv.narrow(1, inner, inner)?);
        let a = attention(self.config, sequences, &self.to_q.forward(&own, vars)?, &k, &v)?;
        let h = (h + self.to_out.forward(&a, vars)?)?;
        Ok((&h + self.ff.forward(&h, vars)?)?)
    }
}

impl Kind for Resampler {
    fn tokens(&self, _: Grid) -> Result<usize> {
        Ok(self.queries())
    }

    fn forward(&self, x: &Tensor, grid: Grid, vars: &mut Vars) -> Result<Tensor> {
        let (t, q) = (grid.tokens(), self.queries());
        let pictures = x.dims2()?.0 / t;
        let sequences = each_picture(pictures, q, t + q);
        let mut h = repeat(&vars.get(&self.latents)?, pictures, x.dtype())?;
        for layer in &self.layers {
            h = layer.forward(&h, x, &sequences, vars)?;
        }
        let h = self.norm.forward(&h, vars)?;
        self.out.as_ref().map_or(Ok(h.clone()), |out| out.forward(&h, vars))
    }

    fn work(&self, grid: Grid) -> Result<Work> {
        let (t, q) = (grid.tokens() as u64, self.queries() as u64);
        let mut all = Work { inner: 2 * q * self.out.as_ref().map_or(0, Linear::weights), ..Work::default() };
        for l in &self.layers {
            let own = l.to_q.weights() + l.to_out.weights() + l.ff.weights();
            all.inner += 2 * (q * own + (t + q) * l.to_kv.weights());
            all.attention += 4 * q * (t + q) * (l.config.heads * l.config.head_dim) as u64;
        }
        Ok(all)
    }

    fn boxed(&self) -> Box<dyn Kind> {
        Box::new(self.clone())
    }
}

module!(Resampler: latents, layers, norm, out);
module!(Layer: norm_media, norm_latents, to_q, to_kv, to_out, ff);
