//! A whole LLaVA or LLaVA-NeXT.

use super::fields::Fields;
use super::{
    LlamaConfig, VisionConfig, activation, activation_name, code_of_its_own, from_file, unsupported,
    whole_of_another_kind,
};
use crate::error::{Error, Result};
use crate::spec::{Activation, SelectFeature};
use serde_json::{Value, json};
use std::path::Path;

/// Is this the `config.json` of a whole model as the original LLaVA code writes it (`model_type` llava_llama, in its first versions
/// llava)?
pub fn is_original(config: &Value) -> bool {
    config.get("mm_vision_tower").is_some_and(|tower| !tower.is_null())
        && config.get("vision_config").is_none_or(Value::is_null)
        || config.get("model_type").and_then(Value::as_str) == Some("llava_llama")
}

/// How to load such a folder: the language model and the projector are in it, the tower stands elsewhere.
fn original(f: &Fields) -> Error {
    let kind = f.get("model_type").and_then(Value::as_str).unwrap_or("absent");
    let tower = f.get("mm_vision_tower").and_then(Value::as_str).unwrap_or("openai/clip-vit-large-patch14-336");
    Error::new(format!("`model_type` is {kind}, the layout of the original LLaVA code, which keeps the tower elsewhere"))
        .hint(format!(
            "use its conversion for transformers (model_type llava, e.g. llava-hf/llava-1.5-7b-hf) as model.source; or name the \
             parts in a recipe: this folder as model.language.source and as model.projector.mlp.source, and \
             model.vision.source = \"{tower}\""
        ))
}

/// A whole LLaVA model (HF `LlavaConfig`).
#[derive(Debug, Clone, PartialEq)]
pub struct LlavaConfig {
    pub vision: VisionConfig,
    pub text: LlamaConfig,
    pub image_token_index: u32,
    pub select_layer: i64,
    pub select_feature: SelectFeature,
    pub projector_act: Activation,
    pub projector_bias: bool,
    /// LLaVA-NeXT: pictures are cut into tiles, whose rows end with a trained token.
    pub newline: bool,
}

impl LlavaConfig {
    /// From a `config.json` of `LlavaForConditionalGeneration` or `LlavaNextForConditionalGeneration`.
    pub fn from_json(config: &Value) -> Result<Self> {
        let f = Fields::new(config, "")?;
        match f.text("model_type")? {
            _ if is_original(config) => return Err(original(&f)),
            Some("llava" | "llava_next") => {}
            other => {
                let absent = || unsupported("", "model_type", other.unwrap_or("absent"), "llava, llava_next");
                return Err(whole_of_another_kind(&f).unwrap_or_else(absent));
            }
        }
        code_of_its_own(&f, &["Llava"])?;
        let vision = match f.object("vision_config")? {
            Some(v) => match v.text("model_type")? {
                None | Some("clip_vision_model") => VisionConfig::from_fields(&v)?,
                Some(other) => return Err(unsupported(v.path(), "model_type", other, "clip_vision_model")),
            },
            None => Self::default_vision(),
        };
        let empty = json!({});
        let text = f.object("text_config")?.map_or_else(|| Fields::new(&empty, "text_config."), Ok)?;
        let mut text = LlamaConfig::from_fields(&text)?;
        text.tie_word_embeddings |= f.flag("tie_word_embeddings")?.unwrap_or(false);
        let image_token = match f.token("image_token_index")? {
            Some(id) => id,
            None => f.token("image_token_id")?.unwrap_or(32000),
        };
        Ok(Self {
            vision,
            text,
            image_token_index: image_token,
            select_layer: select_layer(&f)?,
            select_feature: match f.text("vision_feature_select_strategy")? {
                None | Some("default") => SelectFeature::Patch,
                Some("full") => SelectFeature::Full,
                Some(other) => {
                    return Err(unsupported("", "vision_feature_select_strategy", other, "default, full"));
                }
            },
            projector_act: activation(&f, "projector_hidden_act")?.unwrap_or(Activation::Gelu),
            projector_bias: f.flag("multimodal_projector_bias")?.unwrap_or(true),
            newline: f.text("model_type")? == Some("llava_next"),
        })
    }

    /// Reads `DIR/config.json`.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        from_file(dir, Self::from_json)
    }

    /// What an absent `vision_config` means: CLIP ViT-L/14 at 336 pixels.
    fn default_vision() -> VisionConfig {
        VisionConfig {
            hidden_size: 1024,
            intermediate_size: 4096,
            num_hidden_layers: 24,
            num_attention_heads: 16,
            num_channels: 3,
            image_size: 336,
            patch_size: 14,
            hidden_act: Activation::QuickGelu,
            layer_norm_eps: 1e-5,
        }
    }

    /// Tokens that one picture becomes.
    pub fn tokens_per_image(&self) -> usize {
        self.vision.num_patches() + usize::from(self.select_feature == SelectFeature::Full)
    }

    /// A `config.json` that `LlavaForConditionalGeneration` of transformers 4 and 5 reads.
    pub fn to_json(&self) -> Value {
        json!({
            "architectures": [if self.newline { "LlavaNextForConditionalGeneration" } else { "LlavaForConditionalGeneration" }],
            "model_type": if self.newline { "llava_next" } else { "llava" },
            "ignore_index": -100,
            "image_token_index": self.image_token_index,
            "image_seq_length": self.tokens_per_image(),
            "projector_hidden_act": activation_name(self.projector_act),
            "multimodal_projector_bias": self.projector_bias,
            "vision_feature_layer": self.select_layer,
            "vision_feature_select_strategy": match self.select_feature {
                SelectFeature::Patch => "default",
                SelectFeature::Full => "full",
            },
            "tie_word_embeddings": self.text.tie_word_embeddings,
            "text_config": self.text.to_json(),
            "vision_config": self.vision.to_json(),
        })
    }
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
