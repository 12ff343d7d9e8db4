//! The shape of a vision tower, whatever its architecture.

use super::architecture::Architecture;
use crate::model::block::{MlpKind, Shape};
use crate::ops::attention;
use crate::ops::norm::Kind;
use crate::spec::Activation;

/// What the one tower is built from.
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
    /// Whose folders it is read from and written as.
    pub architecture: &'static Architecture<VisionConfig>,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_channels: usize,
    /// Pixels along one edge.
    pub image_size: usize,
    /// Pixels along one edge of a patch.
    pub patch_size: usize,
    pub hidden_act: Activation,
    pub layer_norm_eps: f64,
}

impl VisionConfig {
    /// Patches of one picture.
    pub fn num_patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }

    /// Of each of its blocks.
    pub fn block(&self) -> Shape {
        Shape {
            width: self.hidden_size,
            attention: attention::Config {
                heads: self.num_attention_heads,
                kv_heads: self.num_attention_heads,
                head_dim: self.hidden_size / self.num_attention_heads,
                causal: false,
            },
            norm: Kind::Layer,
            eps: self.layer_norm_eps,
            qkv_bias: true,
            out_bias: true,
            mlp: MlpKind::Plain(self.hidden_act),
            hidden: self.intermediate_size,
            mlp_bias: true,
        }
    }
}
