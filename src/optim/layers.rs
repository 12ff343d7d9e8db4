//! Layer-wise decay of the learning rate: the lower a layer of a pretrained backbone stands, the less it moves.
//!
//! As BEiT does it (Bao et al. 2022; `LayerDecayValueAssigner` of microsoft/unilm), and timm's `layer_decay`: with decay d, a
//! parameter at distance k from the top gets lr·dᵏ. Of a backbone of L layers, what stands behind the layers has k = 0, layer i
//! (from 0) k = L − i, and the embeddings, with what stands between them and the layers, k = L + 1.

/// Layers that run, of each backbone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Depths {
    /// Up to the one whose output becomes the features: the tower's top is what feeds the projector.
    pub vision: usize,
    /// All of them.
    pub language: usize,
}

impl Depths {
    /// How far the parameter `name` stands from the top of its backbone; 0 for projectors, soft tokens and whatever else is in
    /// neither stack. An adapter in a layer goes with the layer. A head that is tied to the embeddings is one with them.
    pub fn from_top(&self, name: &str) -> usize {
        let index = |rest: &str| rest.split('.').next().and_then(|i| i.parse::<usize>().ok());
        if let Some(i) = name.strip_prefix("vision.encoder.layers.").and_then(index) {
            return self.vision.saturating_sub(i);
        }
        if let Some(i) = name.strip_prefix("language.layers.").and_then(index) {
            return self.language.saturating_sub(i);
        }
        match name {
            n if n.starts_with("vision.embeddings.") || n.starts_with("vision.pre_layrnorm.") => self.vision + 1,
            n if n.starts_with("language.embed_tokens.") => self.language + 1,
            _ => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BEiT's assignment for a model of 12 layers: `decay ** (12 + 1 - id)`, ids 0 for embeddings, i + 1 for layer i, 13 behind.
    #[test]
    fn distances_are_beits() {
        let depths = Depths { vision: 12, language: 2 };
        let id = |name: &str| 13 - depths.from_top(name);
        assert_eq!(id("vision.embeddings.class_embedding"), 0);
        assert_eq!(id("vision.pre_layrnorm.weight"), 0);
        assert_eq!(id("vision.encoder.layers.0.mlp.fc1.weight"), 1);
        assert_eq!(id("vision.encoder.layers.11.mlp.fc1.weight"), 12);
        assert_eq!(id("vision.post_layernorm.weight"), 13);
        for (name, distance) in [
            ("language.embed_tokens.weight", 3),
            ("language.layers.0.self_attn.q_proj.lora_A.sft.weight", 2),
            ("language.layers.1.input_layernorm.weight", 1),
            ("language.norm.weight", 0),
            ("language.lm_head.weight", 0),
            ("language.prefix.soft.weight", 0),
            ("projector.linear_1.weight", 0),
        ] {
            assert_eq!(depths.from_top(name), distance, "{name}");
        }
    }
}
