//! LLaMA and everything of its architecture (Touvron et al. 2023; HF `LlamaForCausalLM`), also as the language model that the
//! original LLaVA code wrote with the projector beside it.
//!
//! | file | spelling |
//! |---|---|
//! | all | `model.layers…`, `lm_head.weight` |

use super::architecture::{Architecture, Name};
use super::language::{LanguageConfig, RopeScaling};
use super::rope;
use crate::error::Result;
use crate::model::block;
use crate::model::config::fields::Fields;
use crate::model::config::{divides, no_dropout, unsupported};
use serde_json::{Value, json};

/// LLaMA.
pub static ARCHITECTURE: Architecture<LanguageConfig> = Architecture {
    model_types: &["llama", "llava_llama"],
    classes: &["Llama", "LlavaLlama"],
    read,
    write,
    canonical,
    stored,
    block: block::Names {
        norms: ["input_layernorm", "post_attention_layernorm"],
        qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        out: "self_attn.o_proj",
        open: &["mlp.gate_proj", "mlp.up_proj"],
        close: "mlp.down_proj",
    },
};

fn read(f: &Fields) -> Result<LanguageConfig> {
    if let Some(other) = f.text("hidden_act")?.filter(|a| !matches!(*a, "silu" | "swish")) {
        return Err(unsupported(f.path(), "hidden_act", other, "silu"));
    }
    for key in ["sliding_window", "quantization_config"] {
        if let Some(value) = f.get(key) {
            return Err(unsupported(f.path(), key, &value.to_string(), "null"));
        }
    }
    no_dropout(f)?;
    let hidden_size = f.count("hidden_size")?.unwrap_or(4096);
    let heads = f.count("num_attention_heads")?.unwrap_or(32);
    let kv_heads = f.count("num_key_value_heads")?.unwrap_or(heads);
    let head_dim = match f.count("head_dim")? {
        Some(d) => d,
        None => divides(f, "num_attention_heads", heads, "hidden_size", hidden_size)?,
    };
    divides(f, "num_key_value_heads", kv_heads, "num_attention_heads", heads)?;
    divides(f, "2", 2, "head_dim", head_dim)?;
    let max_position_embeddings = f.count("max_position_embeddings")?.unwrap_or(2048);
    let (rope_theta, rope_scaling) = rope::read(f, max_position_embeddings)?;
    Ok(LanguageConfig {
        architecture: &ARCHITECTURE,
        vocab_size: f.count("vocab_size")?.unwrap_or(32000),
        hidden_size,
        intermediate_size: f.count("intermediate_size")?.unwrap_or(11008),
        num_hidden_layers: f.layers("num_hidden_layers")?.unwrap_or(32),
        num_attention_heads: heads,
        num_key_value_heads: kv_heads,
        head_dim,
        rms_norm_eps: f.not_negative("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta,
        rope_scaling,
        max_position_embeddings,
        attention_bias: f.flag("attention_bias")?.unwrap_or(false),
        mlp_bias: f.flag("mlp_bias")?.unwrap_or(false),
        tie_word_embeddings: f.flag("tie_word_embeddings")?.unwrap_or(false),
        bos_token_id: f.token("bos_token_id")?.or((!f.has("bos_token_id")).then_some(1)),
        eos_token_ids: f.tokens("eos_token_id")?.unwrap_or(if f.has("eos_token_id") { vec![] } else { vec![2] }),
        pad_token_id: f.token("pad_token_id")?,
    })
}

/// Both transformers 4 and 5 take the old spelling of RoPE.
fn write(c: &LanguageConfig) -> Value {
    let eos = match c.eos_token_ids.as_slice() {
        [] => Value::Null,
        [one] => json!(one),
        list => json!(list),
    };
    let scaling = match &c.rope_scaling {
        RopeScaling::None => Value::Null,
        RopeScaling::Linear { factor } => json!({ "rope_type": "linear", "factor": factor }),
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": *original_max_position_embeddings as u64,
            })
        }
    };
    json!({
        "architectures": ["LlamaForCausalLM"],
        "model_type": ARCHITECTURE.name(),
        "vocab_size": c.vocab_size,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.rms_norm_eps,
        "rope_theta": c.rope_theta,
        "rope_scaling": scaling,
        "max_position_embeddings": c.max_position_embeddings,
        "attention_bias": c.attention_bias,
        "attention_dropout": 0.0,
        "mlp_bias": c.mlp_bias,
        "tie_word_embeddings": c.tie_word_embeddings,
        "bos_token_id": c.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": c.pad_token_id,
    })
}

fn canonical(name: &str) -> Name {
    // Parts of the original LLaVA code's whole model that are not its language model.
    const OTHER_PARTS: [&str; 4] =
        ["model.mm_projector.", "model.vision_tower.", "model.vision_resampler.", "model.image_newline"];
    if OTHER_PARTS.iter().any(|part| name.starts_with(part)) {
        return Name::Ignored;
    }
    Name::Known(format!("language.{}", name.strip_prefix("model.").unwrap_or(name)))
}

fn stored(canonical: &str) -> Option<String> {
    let rest = canonical.strip_prefix("language.")?;
    Some(if rest == "lm_head.weight" { rest.into() } else { format!("model.{rest}") })
}
