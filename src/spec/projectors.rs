//! `model.projector`: the connector between tower and language model.

use super::{Activation, PerceiverProjector, QformerPart, QformerProjector, ResamplerProjector, VisualPrefixProjector};
use crate::bail;
use crate::error::{Context, Result};
use serde::{Deserialize, Serialize};

/// `model.projector`: the connector between tower and language model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Projector {
    /// One linear layer with bias.
    Linear(LinearProjector),
    /// `depth` linear layers with an activation between them.
    Mlp(MlpProjector),
    /// A narrow residual block on the tower's features, which starts as the identity.
    Bottleneck(BottleneckProjector),
    /// Squares of neighbouring patches become one token.
    PixelShuffle(PixelShuffleProjector),
    /// Latents look at the features: a fixed number of tokens.
    Perceiver(PerceiverProjector),
    /// The same in Flamingo's first form.
    Resampler(ResamplerProjector),
    /// Frozen's: a few tokens made of the mean of the features.
    VisualPrefix(VisualPrefixProjector),
    /// BLIP-2's Querying Transformer: a fixed number of tokens.
    Qformer(QformerProjector),
}

impl Projector {
    /// File, folder or repository of the weights to start from.
    pub fn source(&self) -> Option<&str> {
        let source = match self {
            Self::Linear(p) => &p.source,
            Self::Mlp(p) => &p.source,
            Self::Bottleneck(p) => &p.source,
            Self::PixelShuffle(p) => p.then.source(),
            Self::Perceiver(p) => &p.source,
            Self::Resampler(p) => &p.source,
            Self::VisualPrefix(p) => &p.source,
            Self::Qformer(p) => &p.source,
        };
        source.as_deref()
    }

    /// Do its numbers fit together? Errors name its kind.
    pub fn check(&self) -> Result<()> {
        match self {
            Self::Linear(_) => Ok(()),
            Self::Mlp(p) => p.check().context("mlp"),
            Self::Bottleneck(p) => p.check().context("bottleneck"),
            Self::PixelShuffle(p) => p.check().context("pixel_shuffle"),
            Self::Perceiver(p) => p.check().context("perceiver"),
            Self::Resampler(p) => p.check().context("resampler"),
            Self::VisualPrefix(p) => p.check().context("visual_prefix"),
            Self::Qformer(p) => p.check().context("qformer"),
        }
    }

    /// Parts that a published `source` may lack, and which may be `fresh`: what their parameters' names begin with.
    pub fn may_be_fresh(&self) -> Vec<&'static str> {
        match self {
            Self::Qformer(_) => {
                [QformerPart::QueryTokens, QformerPart::LanguageProjection].map(|p| p.prefix()).to_vec()
            }
            _ => Vec::new(),
        }
    }

    /// What the names of parameters begin with that have fresh values in spite of a [`Projector::source`].
    pub fn fresh(&self) -> Vec<&'static str> {
        match self {
            Self::Qformer(p) => p.fresh.iter().map(|part| part.prefix()).collect(),
            _ => Vec::new(),
        }
    }
}

/// Layers that work on each token alone.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Layers {
    /// One linear layer with bias.
    Linear(LinearProjector),
    /// `depth` linear layers with an activation between them.
    Mlp(MlpProjector),
}

impl Layers {
    fn source(&self) -> &Option<String> {
        match self {
            Self::Linear(p) => &p.source,
            Self::Mlp(p) => &p.source,
        }
    }
}

impl MlpProjector {
    fn check(&self) -> Result<()> {
        if self.depth == 0 {
            bail!("depth = 0"; "LLaVA-1.5 has depth = 2")
        }
        if self.hidden == Some(0) {
            bail!("hidden = 0"; "leave it out for the language model's width")
        }
        Ok(())
    }
}

impl BottleneckProjector {
    fn check(&self) -> Result<()> {
        if self.dim == 0 {
            bail!("dim = 0"; "a quarter of the tower's width, say")
        }
        if !(0.0..1.0).contains(&self.dropout) {
            bail!("dropout = {}", self.dropout; "from 0 to below 1")
        }
        Ok(())
    }
}

impl PixelShuffleProjector {
    fn check(&self) -> Result<()> {
        if self.factor == 0 {
            bail!("factor = 0"; "2 makes a quarter of the tokens")
        }
        match &self.then {
            Layers::Linear(_) => Ok(()),
            Layers::Mlp(p) => p.check().context("then: mlp"),
        }
    }
}

impl Default for Layers {
    fn default() -> Self {
        Self::Linear(LinearProjector { source: None, input_norm: false })
    }
}

/// One linear layer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LinearProjector {
    /// File, folder or repository of the weights to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// LayerNorm over the tower's features before the first layer (their rms may be far from the embeddings').
    #[serde(default)]
    pub input_norm: bool,
}

/// Linear layers with an activation between them (LLaVA-1.5).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MlpProjector {
    /// File, folder or repository of the weights to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// How many layers.
    #[serde(default = "two")]
    pub depth: usize,
    /// Width between the layers; default: the language model's hidden size.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hidden: Option<usize>,
    /// Between the layers.
    #[serde(default)]
    pub act: Activation,
    /// LayerNorm over the tower's features before the first layer.
    #[serde(default)]
    pub input_norm: bool,
    /// LayerNorm over the visual tokens, after the last layer.
    #[serde(default)]
    pub norm: bool,
}

/// y = out(x + up(dropout(act(down(norm(x)))))); `out`, a linear layer, is there if the widths of tower and language model
/// differ.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BottleneckProjector {
    /// File, folder or repository of the weights to start from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// Width between `down` and `up`.
    pub dim: usize,
    /// Behind `down`.
    #[serde(default)]
    pub act: Activation,
    /// Share of the activation's outputs that training sets to zero.
    #[serde(default)]
    pub dropout: f64,
}

/// Fewer tokens of more features each.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PixelShuffleProjector {
    /// `factor` × `factor` patches make one token, their features side by side; it must divide the patches of a side.
    #[serde(default = "two")]
    pub factor: usize,
    /// From there to the language model's width: `linear` (default) or `mlp`. A `source` stands here.
    #[serde(default)]
    pub then: Layers,
}
fn two() -> usize {
    2
}
