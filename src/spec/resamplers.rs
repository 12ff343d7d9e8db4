//! Projectors that ask a picture's features a fixed number of questions: as many visual tokens at any resolution.

use super::Activation;
use crate::bail;
use crate::error::Result;
use serde::{Deserialize, Serialize};

/// Flamingo's resampler in the form of Idefics2: a gated MLP to the language model's width, then `depth` layers in which
/// `queries` latents look at the features and at themselves.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PerceiverProjector {
    /// A projector saved before, a connector of Idefics2, or a whole Idefics2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Visual tokens of a picture.
    #[serde(default = "sixty_four")]
    pub queries: usize,
    /// How many layers.
    #[serde(default = "three")]
    pub depth: usize,
    /// How many heads the latents look with.
    #[serde(default = "sixteen")]
    pub heads: usize,
    /// Heads of keys and values; divides `heads`.
    #[serde(default = "four")]
    pub kv_heads: usize,
    /// Width of a head, whatever the language model's width.
    #[serde(default = "ninety_six")]
    pub head_dim: usize,
    /// Width inside the gated MLP in front; default: four times the language model's. (Idefics2 8B: 14336.)
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<usize>,
    /// Of all gated MLPs.
    #[serde(default = "silu")]
    pub act: Activation,
    /// ε of the RMSNorms.
    #[serde(default = "millionth")]
    pub norm_eps: f64,
}

impl PerceiverProjector {
    /// Do its numbers fit together?
    pub fn check(&self) -> Result<()> {
        let hidden = self.hidden.unwrap_or(1);
        at_least_one(&[
            ("queries", self.queries),
            ("depth", self.depth),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("hidden", hidden),
        ])?;
        if !self.heads.is_multiple_of(self.kv_heads) {
            bail!("kv_heads = {} does not divide heads = {}", self.kv_heads, self.heads; "Idefics2 has 4 and 16")
        }
        if !(self.norm_eps > 0.0 && self.norm_eps.is_finite()) {
            bail!("norm_eps = {}", self.norm_eps; "Idefics2 has 1e-6")
        }
        Ok(())
    }
}

/// Flamingo's Perceiver Resampler in its first form, as OpenFlamingo has it: `depth` layers in which `queries` latents of the tower's
/// width look at the features and at themselves, and a linear layer to the language model's width if that is another. The defaults
/// are OpenFlamingo's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResamplerProjector {
    /// A projector saved before, or an OpenFlamingo checkpoint if tower and language model have one width.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Visual tokens of a picture.
    #[serde(default = "sixty_four")]
    pub queries: usize,
    /// Layers.
    #[serde(default = "six")]
    pub depth: usize,
    /// Of attention.
    #[serde(default = "eight")]
    pub heads: usize,
    /// Width of a head, whatever the tower's width.
    #[serde(default = "sixty_four")]
    pub head_dim: usize,
    /// Width inside the MLPs, in widths of the tower.
    #[serde(default = "four")]
    pub ff_mult: usize,
}

impl ResamplerProjector {
    /// Do its numbers fit together?
    pub fn check(&self) -> Result<()> {
        at_least_one(&[
            ("queries", self.queries),
            ("depth", self.depth),
            ("heads", self.heads),
            ("head_dim", self.head_dim),
            ("ff_mult", self.ff_mult),
        ])
    }
}

impl QformerProjector {
    /// Do its numbers fit together?
    pub fn check(&self) -> Result<()> {
        at_least_one(&[
            ("queries", self.queries),
            ("width", self.width),
            ("layers", self.layers),
            ("heads", self.heads),
            ("intermediate", self.intermediate),
            ("cross_every", self.cross_every),
        ])?;
        if !self.width.is_multiple_of(self.heads) {
            bail!("heads = {} does not divide width = {}", self.heads, self.width; "BLIP-2 has 12 and 768")
        }
        if !(0.0..1.0).contains(&self.dropout) {
            bail!("dropout = {}", self.dropout; "from 0 to below 1")
        }
        if self.source.is_none() && !self.fresh.is_empty() {
            bail!("`fresh` without `source`"; "without a source all of it is fresh: leave `fresh` out")
        }
        Ok(())
    }
}

fn at_least_one(numbers: &[(&str, usize)]) -> Result<()> {
    match numbers.iter().find(|(_, n)| *n == 0) {
        Some((name, _)) => bail!("{name} = 0"; "1 or more; leave it out for the default"),
        None => Ok(()),
    }
}

/// Frozen's visual prefix: one linear layer makes `tokens` visual tokens of the mean of a picture's features.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisualPrefixProjector {
    /// A projector saved before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Visual tokens of a picture; Frozen has 2.
    #[serde(default = "two")]
    pub tokens: usize,
}

impl VisualPrefixProjector {
    /// Do its numbers fit together?
    pub fn check(&self) -> Result<()> {
        at_least_one(&[("tokens", self.tokens)])
    }
}

/// BLIP-2's Querying Transformer: a BERT over `queries` trained tokens, which look at the features in every `cross_every`-th
/// layer, and a linear layer to the language model's width. The defaults are BLIP-2's.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QformerProjector {
    /// A projector saved before, a `Blip2QFormerModel`, or a whole BLIP-2.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Parts that begin with fresh values although there is a `source`, which may lack them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub fresh: Vec<QformerPart>,
    /// Visual tokens of a picture.
    #[serde(default = "thirty_two")]
    pub queries: usize,
    /// Width of the queries.
    #[serde(default = "bert_width")]
    pub width: usize,
    /// How many layers.
    #[serde(default = "twelve")]
    pub layers: usize,
    /// Divides `width`.
    #[serde(default = "twelve")]
    pub heads: usize,
    /// Width inside the layers' MLPs.
    #[serde(default = "bert_intermediate")]
    pub intermediate: usize,
    /// Layers 0, n, 2n, … look at the features.
    #[serde(default = "two")]
    pub cross_every: usize,
    /// Of the layers' MLPs.
    #[serde(default)]
    pub act: Activation,
    /// Behind the first norm and behind each attention and MLP (HF's `hidden_dropout_prob`). The probabilities of attention
    /// are not masked.
    #[serde(default = "tenth")]
    pub dropout: f64,
}

/// What stands in front of a Q-Former and behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QformerPart {
    /// The trained tokens.
    QueryTokens,
    /// The linear layer to the language model's width.
    LanguageProjection,
}

impl QformerPart {
    /// What its parameters' names begin with.
    pub fn prefix(self) -> &'static str {
        match self {
            Self::QueryTokens => "projector.query_tokens",
            Self::LanguageProjection => "projector.language_projection.",
        }
    }
}

fn two() -> usize {
    2
}

fn three() -> usize {
    3
}

fn four() -> usize {
    4
}

fn six() -> usize {
    6
}

fn eight() -> usize {
    8
}

fn twelve() -> usize {
    12
}

fn sixteen() -> usize {
    16
}

fn thirty_two() -> usize {
    32
}

fn sixty_four() -> usize {
    64
}

fn ninety_six() -> usize {
    96
}

fn bert_width() -> usize {
    768
}

fn bert_intermediate() -> usize {
    3072
}

fn silu() -> Activation {
    Activation::Silu
}

fn millionth() -> f64 {
    1e-6
}

fn tenth() -> f64 {
    0.1
}
