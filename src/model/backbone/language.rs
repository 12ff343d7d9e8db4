//! The shape of a language model, whatever its architecture.

use super::architecture::Architecture;
use crate::model::block::{MlpKind, Shape};
use crate::ops::attention;
use crate::ops::norm::Kind;

/// What the one language model is built from.
#[derive(Debug, Clone, PartialEq)]
pub struct LanguageConfig {
    /// Whose folders it is read from and written as.
    pub architecture: &'static Architecture<LanguageConfig>,
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: RopeScaling,
    pub max_position_embeddings: usize,
    /// Have q, k, v and the projection behind attention biases?
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
}

/// How rotary frequencies are stretched beyond the trained length.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    Linear { factor: f64 },
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: f64 },
}

impl LanguageConfig {
    /// Of each of its blocks.
    pub fn block(&self) -> Shape {
        Shape {
            width: self.hidden_size,
            attention: attention::Config {
                heads: self.num_attention_heads,
                kv_heads: self.num_key_value_heads,
                head_dim: self.head_dim,
                causal: true,
            },
            norm: Kind::Rms,
            eps: self.rms_norm_eps,
            qkv_bias: self.attention_bias,
            out_bias: self.attention_bias,
            mlp: MlpKind::Gated,
            hidden: self.intermediate_size,
            mlp_bias: self.mlp_bias,
        }
    }
}
