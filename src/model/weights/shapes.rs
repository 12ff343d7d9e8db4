//! The tensors that each architecture consists of: canonical name → shape. What is saved is held against this list, since
//! `from_pretrained` fills a missing tensor with random numbers and only warns.

use crate::model::config::{LlamaConfig, LlavaConfig, VisionConfig};
use std::collections::BTreeMap;

/// Canonical name → shape, sorted.
pub type Shapes = BTreeMap<String, Vec<usize>>;

/// All tensors of a `CLIPVisionModel`.
pub fn vision(c: &VisionConfig) -> Shapes {
    let (d, f) = (c.hidden_size, c.intermediate_size);
    let mut shapes = Shapes::new();
    let mut add = |name: String, shape: &[usize]| shapes.insert(format!("vision.{name}"), shape.to_vec());
    add("embeddings.class_embedding".into(), &[d]);
    add("embeddings.patch_embedding.weight".into(), &[d, c.num_channels, c.patch_size, c.patch_size]);
    add("embeddings.position_embedding.weight".into(), &[c.num_patches() + 1, d]);
    let mut with_bias = |name: &str, shape: &[usize]| {
        add(format!("{name}.weight"), shape);
        add(format!("{name}.bias"), &shape[..1]);
    };
    with_bias("pre_layrnorm", &[d]);
    with_bias("post_layernorm", &[d]);
    for layer in (0..c.num_hidden_layers).map(|i| format!("encoder.layers.{i}")) {
        for part in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            with_bias(&format!("{layer}.self_attn.{part}"), &[d, d]);
        }
        with_bias(&format!("{layer}.layer_norm1"), &[d]);
        with_bias(&format!("{layer}.layer_norm2"), &[d]);
        with_bias(&format!("{layer}.mlp.fc1"), &[f, d]);
        with_bias(&format!("{layer}.mlp.fc2"), &[d, f]);
    }
    shapes
}

/// All tensors of a `LlamaForCausalLM`; a tied head is not one of them.
pub fn language(c: &LlamaConfig) -> Shapes {
    let (d, f, q) = (c.hidden_size, c.intermediate_size, c.num_attention_heads * c.head_dim);
    let kv = c.num_key_value_heads * c.head_dim;
    let mut shapes = Shapes::new();
    let mut add = |name: String, shape: &[usize]| shapes.insert(format!("language.{name}"), shape.to_vec());
    add("embed_tokens.weight".into(), &[c.vocab_size, d]);
    add("norm.weight".into(), &[d]);
    if !c.tie_word_embeddings {
        add("lm_head.weight".into(), &[c.vocab_size, d]);
    }
    let attention = [("q_proj", q, d), ("k_proj", kv, d), ("v_proj", kv, d), ("o_proj", d, q)];
    let mlp = [("gate_proj", f, d), ("up_proj", f, d), ("down_proj", d, f)];
    for layer in (0..c.num_hidden_layers).map(|i| format!("layers.{i}")) {
        add(format!("{layer}.input_layernorm.weight"), &[d]);
        add(format!("{layer}.post_attention_layernorm.weight"), &[d]);
        let parts = [("self_attn", attention.as_slice(), c.attention_bias), ("mlp", mlp.as_slice(), c.mlp_bias)];
        for (part, linears, bias) in parts {
            for (name, rows, columns) in linears {
                add(format!("{layer}.{part}.{name}.weight"), &[*rows, *columns]);
                if bias {
                    add(format!("{layer}.{part}.{name}.bias"), &[*rows]);
                }
            }
        }
    }
    shapes
}

/// All tensors of a `LlavaForConditionalGeneration`; its projector always has two layers.
pub fn llava(c: &LlavaConfig) -> Shapes {
    let mut shapes = vision(&c.vision);
    shapes.extend(language(&c.text));
    for (name, columns) in [("linear_1", c.vision.hidden_size), ("linear_2", c.text.hidden_size)] {
        shapes.insert(format!("projector.{name}.weight"), vec![c.text.hidden_size, columns]);
        if c.projector_bias {
            shapes.insert(format!("projector.{name}.bias"), vec![c.text.hidden_size]);
        }
    }
    if c.newline {
        shapes.insert("projector.image_newline".to_string(), vec![c.text.hidden_size]);
    }
    shapes
}

#[cfg(test)]
mod tests {
    use crate::model::weights::Weights;
    use std::path::Path;

    #[test]
    fn the_golden_model_has_exactly_these_tensors() {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/a/model");
        let (config, weights) = Weights::llava(&dir).unwrap();
        let found = weights.names().map(|n| (n.to_string(), weights.info(n).unwrap().shape.clone())).collect();
        assert_eq!(super::llava(&config), found);
    }
}
