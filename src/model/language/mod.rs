//! The language model, of any architecture (`model::backbone`): embeddings, decoder layers, norm, head.
//!
//! The head is computed on labelled rows only, in chunks. Gradients stop at the frontier.

pub mod rope;

use super::backbone::LanguageConfig;
use super::block::{Block, Cache};
use super::build::norm;
use super::init::{Place, Shapes, Source};
use super::norm::Norm;
use super::params::{Grads, Module, Param, module};
use super::role::{Init, Linears, Scope};
use super::segment::{self, Kept, Side, Tape};
use super::visual::Visual;
use super::watch;
use crate::bail;
use crate::error::Result;
use crate::ops::cross_entropy::{self, LogProbs, add_weight_grad};
use crate::ops::embedding::{gather, scatter_add_};
use crate::ops::matmul::scale_rows;
use crate::ops::norm::{Kind, Stats};
use crate::ops::{attention, random};
use candle_core::{DType, Device, Tensor};
use rope::Rope;
use std::collections::BTreeMap;
use tracing::debug_span;

/// The language model.
#[derive(Debug, Clone)]
pub struct Language {
    pub config: LanguageConfig,
    pub embed_tokens: Param,
    pub layers: Vec<Block>,
    norm: Norm,
    /// The embeddings themselves when tied.
    lm_head: Param,
    rope: Rope,
    frontier: usize,
    /// Does something below the layers need a gradient?
    below: bool,
}

/// What a pass left for backward.
pub struct Saved {
    tape: Tape<Block>,
    head: Option<Head>,
}

struct Head {
    /// Labelled rows before the last norm, `[M, D]`, and where they stand.
    rows: Vec<u32>,
    x: Tensor,
    stats: Stats,
    dx: Tensor,
    targets: Vec<u32>,
    total_rows: usize,
}

impl Saved {
    /// Bytes that the layers keep.
    pub(super) fn kept_bytes(&self) -> usize {
        self.tape.bytes()
    }
}

impl Language {
    /// Builds the model from `src`.
    pub fn new(config: LanguageConfig, src: &mut dyn Source) -> Result<Self> {
        let c = &config;
        if c.num_key_value_heads == 0
            || !c.num_attention_heads.is_multiple_of(c.num_key_value_heads)
            || !c.head_dim.is_multiple_of(2)
        {
            bail!(
                "the language model's config does not fit together: {} heads, {} key-value heads, head_dim {}",
                c.num_attention_heads,
                c.num_key_value_heads,
                c.head_dim
            )
        }
        let (d, eps) = (c.hidden_size, c.rms_norm_eps);
        let of = Scope::language();
        let table = Init::Normal(Linears::DEVIATION);
        let embed_tokens = src.param(&of.below().at("embed_tokens"), "weight", &[c.vocab_size, d], table)?;
        let mut layers = Vec::with_capacity(c.num_hidden_layers);
        for i in 0..c.num_hidden_layers {
            layers.push(Block::new(&of.layer("layers", i), &c.block(), &c.architecture.block, src)?);
        }
        let last = norm(src, Kind::Rms, &of.at("norm"), d, eps)?;
        let lm_head = if c.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            src.param(&of.at("lm_head"), "weight", &[c.vocab_size, d], table)?
        };
        let (rope, frontier) = (Rope::new(c), layers.len());
        Ok(Self { config, embed_tokens, layers, norm: last, lm_head, rope, frontier, below: false })
    }

    /// Names and shapes of all its parameters; a tied head is not one of them.
    pub fn parameters(config: &LanguageConfig) -> Result<BTreeMap<String, Vec<usize>>> {
        Ok(Self::new(config.clone(), &mut Shapes(Place::cpu()))?.shapes())
    }

    /// Recomputes where backward has to go. `below`: something that feeds the embeddings needs a gradient; `visual`: so do
    /// the visual tokens that layers read.
    pub fn plan(&mut self, below: bool, visual: bool) {
        self.below = below || self.embed_tokens.trainable;
        self.frontier = segment::frontier(&self.layers, self.below);
        if let (true, Some(first)) = (visual, self.first_that_sees()) {
            self.frontier = self.frontier.min(first);
        }
    }

    /// The first layer that backward reaches, or their number; and whether it goes on to what is below the layers.
    pub fn frontier(&self) -> (usize, bool) {
        (self.frontier, self.below)
    }

    /// Does backward pass through the last norm?
    pub fn reaches_norm(&self) -> bool {
        self.enters_layers() || self.norm.weight.trainable
    }

    /// The first layer that reads visual tokens.
    pub fn first_that_sees(&self) -> Option<usize> {
        self.layers.iter().position(|l| l.before.see())
    }

    /// Does backward have to enter the layers at all?
    fn enters_layers(&self) -> bool {
        self.below || self.frontier < self.layers.len()
    }

    /// Token embeddings; ids outside the table (an image placeholder may be) give row 0 and are overwritten by the caller.
    pub fn embed(&self, ids: &[u32]) -> Result<Tensor> {
        let v = self.config.vocab_size as u32;
        let safe: Vec<u32> = ids.iter().map(|i| if *i < v { *i } else { 0 }).collect();
        gather(self.embed_tokens.compute(), &safe)
    }

    /// Side of packed sequences: positions count from 0 in each.
    pub fn side(&self, lengths: &[usize], dropout: Option<random::Key>, adapters_off: bool) -> Result<Side> {
        let mut side = Side::packed(lengths);
        let positions: Vec<usize> = lengths.iter().flat_map(|n| 0..*n).collect();
        side.rope = Some(self.rope.angles(&positions, self.dtype(), self.device())?);
        (side.dropout, side.adapters_off) = (dropout, adapters_off);
        Ok(side)
    }

    /// Log-probabilities of `targets` (row whose next token it is, token id) from embedded rows `[N, D]`.
    pub fn forward(
        &self,
        x: Tensor,
        side: &Side,
        targets: &[(u32, u32)],
        kept: Kept,
        record: bool,
    ) -> Result<(LogProbs, Option<Saved>)> {
        let frontier = if record { self.frontier } else { self.layers.len() };
        let (y, tape) = debug_span!("language").in_scope(|| segment::forward(&self.layers, x, side, frontier, kept))?;
        let _span = debug_span!("head").entered();
        let (rows, ids): (Vec<u32>, Vec<u32>) = targets.iter().copied().unzip();
        let total_rows = y.dim(0)?;
        let x = gather(&y, &rows)?;
        drop(y);
        let (h, stats) = self.norm.forward(&x)?;
        watch::see("language.norm", &h)?;
        let mut out = cross_entropy::forward(&h, self.lm_head.compute(), &ids, record)?;
        let head = out.dx.take().map(|dx| Head { rows, x, stats, dx, targets: ids, total_rows });
        Ok((out, record.then_some(Saved { tape, head })))
    }

    /// Gradients of Σ coefᵢ·log pᵢ; returns the gradient of the embedded rows if something below needs it.
    pub fn backward(
        &self,
        saved: Saved,
        ids: &[u32],
        side: &Side,
        coefs: &[f64],
        spliced: &[u32],
        grads: &mut Grads,
    ) -> Result<Option<Tensor>> {
        let Saved { tape, head } = saved;
        let Some(head) = head else { bail!("backward without a recorded forward pass") };
        let span = debug_span!("head backward").entered();
        if self.lm_head.trainable {
            let h = self.norm.rebuild(&head.x, &head.stats)?;
            add_weight_grad(grads.slot(&self.lm_head)?, &h, self.lm_head.compute(), &head.targets, coefs)?;
        }
        if !self.enters_layers() && !self.norm.weight.trainable {
            return Ok(None);
        }
        let dh = scale_rows(&head.dx, coefs)?;
        let dx = self.norm.backward(&head.x, &head.stats, &dh, grads)?;
        if !self.enters_layers() {
            return Ok(None);
        }
        let dy = Tensor::zeros((head.total_rows, self.config.hidden_size), dx.dtype(), dx.device())?;
        scatter_add_(&dy, &head.rows, &dx)?;
        drop(span);
        let _span = debug_span!("language backward").entered();
        let dx = segment::backward(&self.layers, tape, dy, side, grads, self.below)?;
        if let (true, Some(dx)) = (self.embed_tokens.trainable, &dx) {
            // Rows that visual features took the place of belong to the projector.
            // The padding token's embedding is no parameter in HF (`padding_idx`), even where it doubles as the end token.
            let pad = self.config.pad_token_id;
            let mut text = text_rows(ids.len(), spliced);
            text.retain(|r| Some(ids[*r as usize]) != pad);
            let table_rows: Vec<u32> = text.iter().map(|r| ids[*r as usize]).collect();
            scatter_add_(grads.slot(&self.embed_tokens)?, &table_rows, &gather(dx, &text)?)?;
        }
        Ok(dx)
    }

    /// Logits of the last of the newest rows `x` `[n, D]` of one sequence, `[vocab]`; `cache` grows by n. `visual`: what these
    /// rows may see beside the cache.
    pub fn extend(&self, mut x: Tensor, visual: Option<&Visual>, cache: &mut KvCache) -> Result<Tensor> {
        let (n, seen) = (x.dim(0)?, cache.seen);
        let mut side = Side::packed(&[n]);
        side.visual = visual.cloned();
        side.sequences = vec![attention::Segment::new(0..n, 0..seen + n)].into();
        let positions: Vec<usize> = (seen..seen + n).collect();
        side.rope = Some(self.rope.angles(&positions, self.dtype(), self.device())?);
        for (layer, c) in self.layers.iter().zip(&mut cache.layers) {
            x = layer.extend(&x, &side, c)?;
        }
        cache.seen += n;
        let (h, _) = self.norm.forward(&x.narrow(0, n - 1, 1)?)?;
        Ok(cross_entropy::logits(&h, self.lm_head.compute())?.squeeze(0)?)
    }

    /// Bytes a token that a recorded pass keeps of the layers.
    pub fn bytes_per_token(&self, kept: Kept) -> Result<usize> {
        segment::bytes_per_row(&self.layers[self.frontier..], kept)
    }

    /// An empty cache.
    pub fn cache(&self) -> KvCache {
        KvCache { layers: vec![Cache::default(); self.layers.len()], seen: 0 }
    }

    /// Logits of the given rows, `[rows, vocab]`; for tests.
    pub fn logits(&self, x: Tensor, side: &Side, rows: &[u32]) -> Result<Tensor> {
        let (y, _) = segment::forward(&self.layers, x, side, self.layers.len(), Kept::Input)?;
        let (h, _) = self.norm.forward(&gather(&y, rows)?)?;
        cross_entropy::logits(&h, self.lm_head.compute())
    }

    /// The type of computation.
    pub fn dtype(&self) -> DType {
        self.embed_tokens.compute().dtype()
    }

    /// Where it computes.
    pub fn device(&self) -> &Device {
        self.embed_tokens.compute().device()
    }
}

/// Keys and values of all layers for one sequence.
pub struct KvCache {
    layers: Vec<Cache>,
    seen: usize,
}

impl KvCache {
    /// Tokens in the cache.
    pub fn seen(&self) -> usize {
        self.seen
    }
}

fn text_rows(n: usize, spliced: &[u32]) -> Vec<u32> {
    let mut taken = vec![false; n];
    for r in spliced {
        taken[*r as usize] = true;
    }
    (0..n as u32).filter(|r| !taken[*r as usize]).collect()
}

module!(Language: embed_tokens, layers, norm, lm_head);
