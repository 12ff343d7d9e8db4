//! BLIP-2's Querying Transformer (Li et al. 2023): a BERT over trained queries, which look at a picture's features in every
//! n-th layer, and a linear layer to the language model's width. The form and the names are those of transformers'
//! `Blip2QFormerModel` inside a `Blip2ForConditionalGeneration`, without its branch for text.
//!
//! Every step is LayerNorm(x + dropout(dense(…))): attention of the queries among themselves, attention to the features where
//! the layer has it, an MLP. What HF drops of attention's probabilities stays here.

use super::{Ends, Kind, Work};
use crate::error::{Context, Result};
use crate::model::init::Source;
use crate::model::island::Vars;
use crate::model::layers::{LayerNorm, Linear, each_picture};
use crate::model::params::{Param, module};
use crate::model::role::{Init, Linears, Scope};
use crate::model::vision::Grid;
use crate::ops::attention::{Config, Sequences};
use crate::ops::graph::{activate, attention, repeat};
use crate::spec::{Activation, QformerProjector};
use candle_core::Tensor;

/// BERT's ε.
const NORM_EPS: f64 = 1e-12;

/// `query_tokens`, `qformer.{layernorm, encoder.layer.N}`, `language_projection`.
#[derive(Debug, Clone)]
pub struct Qformer {
    dropout: f64,
    /// `[1, queries, width]`
    query_tokens: Param,
    norm: LayerNorm,
    layers: Vec<Layer>,
    out: Linear,
}

#[derive(Debug, Clone)]
struct Layer {
    own: Attention,
    features: Option<Attention>,
    act: Activation,
    up: Linear,
    down: Close,
}

#[derive(Debug, Clone)]
struct Attention {
    config: Config,
    q: Linear,
    k: Linear,
    v: Linear,
    close: Close,
}

/// x, r → LayerNorm(x + dropout(dense(r))).
#[derive(Debug, Clone)]
struct Close {
    /// Of the mask.
    name: String,
    dropout: f64,
    dense: Linear,
    norm: LayerNorm,
}

impl Qformer {
    /// With `cfg.queries` queries of `cfg.width`.
    pub fn new(cfg: &QformerProjector, ends: Ends, src: &mut dyn Source) -> Result<Self> {
        cfg.check().context("qformer")?;
        let w = cfg.width;
        let of = Scope::projector();
        let inside = of.at("qformer").with(Linears::Pretrained);
        let query_tokens = src.master(&of, "query_tokens", &[1, cfg.queries, w], Init::Normal(Linears::DEVIATION))?;
        let norm = LayerNorm::new(&inside.at("layernorm"), w, src)?.with_eps(NORM_EPS);
        let layers = (0..cfg.layers).map(|i| Layer::new(cfg, &inside, i, ends.vision, src)).collect::<Result<_>>()?;
        let out = Linear::new(&of.at("language_projection"), w, ends.language, true, src)?;
        Ok(Self { dropout: cfg.dropout, query_tokens, norm, layers, out })
    }

    fn queries(&self) -> usize {
        self.query_tokens.value.dims()[1]
    }
}

impl Layer {
    fn new(cfg: &QformerProjector, of: &Scope, i: usize, vision: usize, src: &mut dyn Source) -> Result<Self> {
        let of = of.at(&format!("encoder.layer.{i}"));
        let (w, m) = (cfg.width, cfg.intermediate);
        let own = Attention::new(cfg, &of.at("attention"), w, src)?;
        let looks = i.is_multiple_of(cfg.cross_every);
        let features = if looks { Some(Attention::new(cfg, &of.at("crossattention"), vision, src)?) } else { None };
        let up = Linear::new(&of.at("intermediate_query.dense"), w, m, true, src)?;
        let down = Close::new(cfg, &of.at("output_query"), m, src)?;
        Ok(Self { own, features, act: cfg.act, up, down })
    }

    /// Queries `[I·Q, W]` and features `[I·T, vision]` → queries; `sequences` pair Q rows with Q and with T.
    fn forward(&self, h: &Tensor, x: &Tensor, sequences: &[Sequences; 2], vars: &mut Vars) -> Result<Tensor> {
        let [among, to_features] = sequences;
        let mut h = self.own.forward(h, h, among, vars)?;
        if let Some(features) = &self.features {
            h = features.forward(&h, x, to_features, vars)?;
        }
        let m = activate(self.act, &self.up.forward(&h, vars)?)?;
        self.down.forward(&h, &m, vars)
    }
}

impl Attention {
    /// With keys and values of rows of width `seen`.
    fn new(cfg: &QformerProjector, of: &Scope, seen: usize, src: &mut dyn Source) -> Result<Self> {
        let (w, heads) = (cfg.width, cfg.heads);
        let mut linear = |part: &str, d_in| Linear::new(&of.at("attention").at(part), d_in, w, true, src);
        let (q, k, v) = (linear("query", w)?, linear("key", seen)?, linear("value", seen)?);
        let config = Config { heads, kv_heads: heads, head_dim: w / heads, causal: false };
        Ok(Self { config, q, k, v, close: Close::new(cfg, &of.at("output"), w, src)? })
    }

    fn forward(&self, h: &Tensor, seen: &Tensor, sequences: &Sequences, vars: &mut Vars) -> Result<Tensor> {
        let q = self.q.forward(h, vars)?;
        let (k, v) = (self.k.forward(seen, vars)?, self.v.forward(seen, vars)?);
        self.close.forward(h, &attention(self.config, sequences, &q, &k, &v)?, vars)
    }

    /// FLOPs of what q queries make of themselves and of t rows; the products with those rows apart.
    fn work(&self, q: u64, t: u64) -> (u64, u64, u64) {
        let width = (self.config.heads * self.config.head_dim) as u64;
        let own = 2 * q * (self.q.weights() + self.close.dense.weights());
        (own, 2 * t * (self.k.weights() + self.v.weights()), 4 * q * t * width)
    }
}

impl Close {
    fn new(cfg: &QformerProjector, of: &Scope, d_in: usize, src: &mut dyn Source) -> Result<Self> {
        Ok(Self {
            name: of.name().to_string(),
            dropout: cfg.dropout,
            dense: Linear::new(&of.at("dense"), d_in, cfg.width, true, src)?,
            norm: LayerNorm::new(&of.at("LayerNorm"), cfg.width, src)?.with_eps(NORM_EPS),
        })
    }

    fn forward(&self, x: &Tensor, r: &Tensor, vars: &mut Vars) -> Result<Tensor> {
        let r = self.dense.forward(r, vars)?;
        let r = vars.dropout(&self.name, r, self.dropout)?;
        self.norm.forward(&(x + r)?, vars)
    }
}

impl Kind for Qformer {
    fn tokens(&self, _: Grid) -> Result<usize> {
        Ok(self.queries())
    }

    fn forward(&self, x: &Tensor, grid: Grid, vars: &mut Vars) -> Result<Tensor> {
        let (t, q) = (grid.tokens(), self.queries());
        let pictures = x.dims2()?.0 / t;
        let queries = vars.get(&self.query_tokens)?.squeeze(0)?;
        let h = self.norm.forward(&repeat(&queries, pictures, x.dtype())?, vars)?;
        let mut h = vars.dropout("projector.qformer", h, self.dropout)?;
        let sequences = [each_picture(pictures, q, q), each_picture(pictures, q, t)];
        for layer in &self.layers {
            h = layer.forward(&h, x, &sequences, vars)?;
        }
        self.out.forward(&h, vars)
    }

    fn work(&self, grid: Grid) -> Result<Work> {
        let (t, q) = (grid.tokens() as u64, self.queries() as u64);
        let mut all = Work { inner: 2 * q * self.out.weights(), ..Work::default() };
        for layer in &self.layers {
            let (own, seen, pairs) = layer.own.work(q, q);
            all.inner += own + seen + 2 * q * (layer.up.weights() + layer.down.dense.weights());
            all.attention += pairs;
            if let Some(features) = &layer.features {
                let (own, seen, pairs) = features.work(q, t);
                all.features += seen;
                all.inner += own;
                all.attention += pairs;
            }
        }
        Ok(all)
    }

    fn boxed(&self) -> Box<dyn Kind> {
        Box::new(self.clone())
    }
}

module!(Qformer: query_tokens, norm, layers, out);

module!(Layer: own, features, up, down);

module!(Attention: q, k, v, close);

module!(Close: dense, norm);
