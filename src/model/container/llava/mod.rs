//! LLaVA (HF `LlavaForConditionalGeneration`; Liu et al. 2023).
//!
//! | file | spelling |
//! |---|---|
//! | on the hub | `vision_tower.vision_model.encoder…`, `language_model.model.layers…`, `language_model.lm_head.weight` |
//! | transformers 5 | `vision_tower.encoder…`, else as above |
//! | inside transformers 5 (and PEFT keys) | `model.vision_tower.encoder…`, `model.language_model.layers…`, `lm_head.weight` |

use super::{Container, Prefixes, WholeConfig};
use crate::error::{Error, Result};
use crate::model::backbone::{Config, LanguageConfig, VisionConfig};
use crate::model::config::fields::Fields;
use crate::model::config::{activation, activation_name, unsupported};
use crate::spec::{Activation, SelectFeature};
use serde_json::{Value, json};

/// LLaVA.
pub static CONTAINER: Container =
    Container { model_type: "llava", classes: &["Llava"], read, write, processor, prefixes: PREFIXES };

pub(super) const PREFIXES: Prefixes = Prefixes { vision: "vision_tower.", language: "language_model." };

/// Is this the `config.json` of a whole model as the original LLaVA code writes it (`model_type` llava_llama, in its first versions
/// llava)?
pub fn is_original(config: &Value) -> bool {
    config.get("mm_vision_tower").is_some_and(|tower| !tower.is_null())
        && config.get("vision_config").is_none_or(Value::is_null)
        || config.get("model_type").and_then(Value::as_str) == Some("llava_llama")
}

/// How to load such a folder: the language model and the projector are in it, the tower stands elsewhere.
pub(super) fn original(f: &Fields) -> Error {
    let kind = f.get("model_type").and_then(Value::as_str).unwrap_or("absent");
    let tower = f.get("mm_vision_tower").and_then(Value::as_str).unwrap_or("openai/clip-vit-large-patch14-336");
    Error::new(format!("`model_type` is {kind}, the layout of the original LLaVA code, which keeps the tower elsewhere"))
        .hint(format!(
            "use its conversion for transformers (model_type llava, e.g. llava-hf/llava-1.5-7b-hf) as model.source; or name the \
             parts in a recipe: this folder as model.language.source and as model.projector.mlp.source, and \
             model.vision.source = \"{tower}\""
        ))
}

fn read(f: &Fields) -> Result<WholeConfig> {
    let vision = match f.object("vision_config")? {
        Some(v) => VisionConfig::from_fields(&v)?,
        None => VisionConfig::from_json(&default_vision())?,
    };
    let empty = json!({});
    let text = f.object("text_config")?.map_or_else(|| Fields::new(&empty, "text_config."), Ok)?;
    let mut text = LanguageConfig::from_fields(&text)?;
    text.tie_word_embeddings |= f.flag("tie_word_embeddings")?.unwrap_or(false);
    let image_token = match f.token("image_token_index")? {
        Some(id) => id,
        None => f.token("image_token_id")?.unwrap_or(32000),
    };
    Ok(WholeConfig {
        container: &CONTAINER,
        vision,
        text,
        image_token_index: image_token,
        select_layer: select_layer(f)?,
        select_feature: match f.text("vision_feature_select_strategy")? {
            None | Some("default") => SelectFeature::Patch,
            Some("full") => SelectFeature::Full,
            Some(other) => {
                return Err(unsupported("", "vision_feature_select_strategy", other, "default, full"));
            }
        },
        projector_act: activation(f, "projector_hidden_act")?.unwrap_or(Activation::Gelu),
        projector_bias: f.flag("multimodal_projector_bias")?.unwrap_or(true),
        newline: false,
    })
}

/// What an absent `vision_config` means: CLIP ViT-L/14 at 336 pixels.
fn default_vision() -> Value {
    json!({
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    })
}

fn write(config: &WholeConfig) -> Value {
    json!({
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": CONTAINER.model_type,
        "ignore_index": -100,
        "image_token_index": config.image_token_index,
        "image_seq_length": config.tokens_per_image(),
        "projector_hidden_act": activation_name(config.projector_act),
        "multimodal_projector_bias": config.projector_bias,
        "vision_feature_layer": config.select_layer,
        "vision_feature_select_strategy": strategy(config.select_feature),
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "text_config": config.text.to_json(),
        "vision_config": config.vision.to_json(),
    })
}

fn strategy(feature: SelectFeature) -> &'static str {
    match feature {
        SelectFeature::Patch => "default",
        SelectFeature::Full => "full",
    }
}

/// How LlavaProcessor of transformers expands the image token.
fn processor(config: &WholeConfig, image_token: &str) -> Value {
    json!({
        "processor_class": "LlavaProcessor",
        "image_token": image_token,
        "patch_size": config.vision.patch_size,
        "vision_feature_select_strategy": strategy(config.select_feature),
        // The class token, which the strategy `default` takes off again.
        "num_additional_image_tokens": 1,
    })
}

/// transformers takes one layer or a list; we take one.
fn select_layer(f: &Fields) -> Result<i64> {
    match f.get("vision_feature_layer") {
        None => Ok(-2),
        Some(Value::Array(list)) => match list.as_slice() {
            [one] if one.is_i64() => Ok(one.as_i64().unwrap_or(-2)),
            _ => Err(unsupported("", "vision_feature_layer", "a list", "one layer")),
        },
        Some(_) => Ok(f.integer("vision_feature_layer")?.unwrap_or(-2)),
    }
}
