//! CLIP's vision tower (Radford et al. 2021; HF `CLIPVisionModel`), alone or inside a `CLIPModel`.
//!
//! | file | spelling |
//! |---|---|
//! | transformers 4 and whole `CLIPModel`s | `vision_model.encoder…` |
//! | transformers 5 | `encoder…` |

use super::architecture::{Architecture, Name};
use super::vision::VisionConfig;
use crate::bail;
use crate::error::Result;
use crate::model::block;
use crate::model::config::fields::Fields;
use crate::model::config::{activation, activation_name, divides, no_dropout};
use crate::spec::Activation;
use serde_json::{Map, Value, json};

/// CLIP's tower.
pub static ARCHITECTURE: Architecture<VisionConfig> = Architecture {
    model_types: &["clip_vision_model", "clip"],
    classes: &["CLIP"],
    read,
    write,
    canonical,
    stored,
    block: block::Names {
        norms: ["layer_norm1", "layer_norm2"],
        qkv: ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
        out: "self_attn.out_proj",
        open: &["mlp.fc1"],
        close: "mlp.fc2",
    },
};

fn read(f: &Fields) -> Result<VisionConfig> {
    if f.text("model_type")? != Some("clip") {
        return tower(f);
    }
    // The dictionary of the oldest files wins where both are given, as in transformers.
    let mut vision = Map::new();
    for key in ["vision_config", "vision_config_dict"] {
        if let Some(Value::Object(part)) = f.get(key) {
            vision.extend(part.clone());
        }
    }
    tower(&Fields::new(&Value::Object(vision), "vision_config.")?)
}

fn tower(f: &Fields) -> Result<VisionConfig> {
    let config = VisionConfig {
        architecture: &ARCHITECTURE,
        hidden_size: f.count("hidden_size")?.unwrap_or(768),
        intermediate_size: f.count("intermediate_size")?.unwrap_or(3072),
        num_hidden_layers: f.layers("num_hidden_layers")?.unwrap_or(12),
        num_attention_heads: f.count("num_attention_heads")?.unwrap_or(12),
        num_channels: f.count("num_channels")?.unwrap_or(3),
        image_size: f.edge("image_size")?.unwrap_or(224),
        patch_size: f.edge("patch_size")?.unwrap_or(32),
        hidden_act: activation(f, "hidden_act")?.unwrap_or(Activation::QuickGelu),
        layer_norm_eps: f.not_negative("layer_norm_eps")?.unwrap_or(1e-5),
    };
    no_dropout(f)?;
    divides(f, "num_attention_heads", config.num_attention_heads, "hidden_size", config.hidden_size)?;
    divides(f, "patch_size", config.patch_size, "image_size", config.image_size)?;
    if config.num_channels != 3 {
        bail!("`{}num_channels` is {}, but pictures have 3", f.path(), config.num_channels);
    }
    Ok(config)
}

fn write(c: &VisionConfig) -> Value {
    json!({
        "architectures": ["CLIPVisionModel"],
        "model_type": ARCHITECTURE.name(),
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_hidden_layers": c.num_hidden_layers,
        "num_attention_heads": c.num_attention_heads,
        "num_channels": c.num_channels,
        "image_size": c.image_size,
        "patch_size": c.patch_size,
        "hidden_act": activation_name(c.hidden_act),
        "layer_norm_eps": c.layer_norm_eps,
        "attention_dropout": 0.0,
    })
}

fn canonical(name: &str) -> Name {
    const OTHER_PARTS: [&str; 4] = ["text_model.", "text_projection.", "visual_projection.", "logit_scale"];
    if OTHER_PARTS.iter().any(|part| name.starts_with(part)) {
        return Name::Ignored;
    }
    Name::Known(format!("vision.{}", name.strip_prefix("vision_model.").unwrap_or(name)))
}

fn stored(canonical: &str) -> Option<String> {
    canonical.strip_prefix("vision.").map(|rest| format!("vision_model.{rest}"))
}
