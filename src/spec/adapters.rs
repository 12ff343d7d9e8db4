//! `adapters` of a stage: what is grafted onto the frozen backbones.

use super::Activation;
use serde::{Deserialize, Serialize};

/// Name of the adapter that `model.adapter` brings along.
pub const START_ADAPTER: &str = "start";

/// One adapter of a stage, by its kind.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Adapter {
    /// Low-rank updates of linear layers.
    Lora(Lora),
    /// Narrow residual blocks behind attention or MLP.
    Bottleneck(BottleneckAdapter),
    /// Blocks through which the text looks at visual tokens; with `model.deliver = "cross_attention"`.
    CrossAttention(CrossAttention),
    /// Soft tokens in front of every text or picture.
    Prefix(Prefix),
}

impl Adapter {
    /// Its kind, as the recipe calls it.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Lora(_) => "lora",
            Self::Bottleneck(_) => "bottleneck",
            Self::CrossAttention(_) => "cross_attention",
            Self::Prefix(_) => "prefix",
        }
    }

    /// Its name as the i-th adapter of a stage: the one that it states, or else the stage's.
    pub fn name(&self, stage: &str, i: usize) -> String {
        let own = match self {
            Self::Lora(a) => &a.name,
            Self::Bottleneck(a) => &a.name,
            Self::CrossAttention(a) => &a.name,
            Self::Prefix(a) => &a.name,
        };
        let fallback = || if i == 0 { stage.to_string() } else { format!("{stage}_{}", i + 1) };
        own.clone().unwrap_or_else(fallback)
    }

    /// Does it stay as it is?
    pub fn freeze(&self) -> bool {
        match self {
            Self::Lora(a) => a.freeze,
            Self::Bottleneck(a) => a.freeze,
            Self::CrossAttention(a) => a.freeze,
            Self::Prefix(a) => a.freeze,
        }
    }

    /// Lets it stay as it is from now on.
    pub fn set_freeze(&mut self) {
        match self {
            Self::Lora(a) => a.freeze = true,
            Self::Bottleneck(a) => a.freeze = true,
            Self::CrossAttention(a) => a.freeze = true,
            Self::Prefix(a) => a.freeze = true,
        }
    }
}

/// W + s·B·A on linear layers (Hu et al. 2021); B begins at zero.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Lora {
    /// Default: the stage's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Rows of A and columns of B.
    pub rank: usize,
    /// What B·A is scaled by, times the rank; often once or twice the rank.
    pub alpha: f64,
    /// Share of the inputs of A that training sets to zero.
    #[serde(default)]
    pub dropout: f64,
    /// Patterns over the names of linear layers of `vision.` and `language.`.
    pub target: Vec<String>,
    /// Scale alpha/√rank instead of alpha/rank.
    #[serde(default)]
    pub rslora: bool,
    /// A trained length for each row of W + s·B·A (DoRA).
    #[serde(default)]
    pub dora: bool,
    /// Learning rate of B, and of DoRA's lengths, in learning rates of A (LoRA+, Hayou et al. 2024).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr_ratio: Option<f64>,
    /// It stays as it is.
    #[serde(default)]
    pub freeze: bool,
}

/// y = x + up(dropout(act(down(norm(x))))) on what attention or the MLP of a layer gives; `up` begins at zero.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BottleneckAdapter {
    /// Default: the stage's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Width between `down` and `up`.
    pub dim: usize,
    /// Behind `down`.
    #[serde(default)]
    pub act: Activation,
    /// Share of the activation's outputs that training sets to zero.
    #[serde(default)]
    pub dropout: f64,
    /// LayerNorm before `down`.
    #[serde(default)]
    pub norm: bool,
    /// Patterns over the places `language.layers.N.{self_attn,mlp}` and `vision.encoder.layers.N.{self_attn,mlp}`.
    pub target: Vec<String>,
    /// It stays as it is.
    #[serde(default)]
    pub freeze: bool,
}

/// Blocks before every n-th layer of the language model.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CrossAttention {
    /// Default: the stage's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Before layers n, 2n, … counted from 1.
    #[serde(default = "four")]
    pub every: usize,
    /// What stands around the attention.
    #[serde(default)]
    pub form: CrossAttentionForm,
    /// How many heads look.
    #[serde(default = "eight")]
    pub heads: usize,
    /// Width of a head.
    #[serde(default = "sixty_four")]
    pub head_dim: usize,
    /// Width of the block's own MLP in widths of the language model; `gated` alone.
    #[serde(default = "four")]
    pub ff_mult: usize,
    /// Which pictures a token looks at.
    #[serde(default)]
    pub sees: Sees,
    /// It stays as it is.
    #[serde(default)]
    pub freeze: bool,
}

/// What stands around the attention of a `cross_attention` block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CrossAttentionForm {
    /// Flamingo's: attention and MLP, each behind a tanh gate that begins at 0.
    #[default]
    Gated,
    /// LayerNorm(text + attention).
    PostNorm,
}

/// Which pictures of its text a token sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sees {
    /// The last one before it (Flamingo).
    #[default]
    Last,
    /// All that come before it.
    All,
}

/// Trained embeddings in front of every text (prompt tuning).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Prefix {
    /// Default: the stage's name.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// How many.
    pub tokens: usize,
    /// Where they stand.
    #[serde(default)]
    pub before: PrefixPlace,
    /// It stays as it is.
    #[serde(default)]
    pub freeze: bool,
}

/// Where soft tokens stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PrefixPlace {
    /// In front of every text: prompt tokens, PEFT's prompt tuning.
    #[default]
    Text,
    /// In front of every picture in a text: soft visual tokens, the same for all pictures.
    Picture,
}

/// `model.deliver`: where visual tokens go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Deliver {
    /// Into the text, in the place of the picture.
    #[default]
    Splice,
    /// Beside the text, where a picture takes one image token; `cross_attention` adapters read them.
    CrossAttention,
}

impl Deliver {
    /// Image tokens that a picture of so many visual tokens takes in a text.
    pub fn image_tokens(self, visual: usize) -> usize {
        match self {
            Self::Splice => visual,
            Self::CrossAttention => visual.min(1),
        }
    }
}

fn four() -> usize {
    4
}

fn eight() -> usize {
    8
}

fn sixty_four() -> usize {
    64
}
