//! Shapes of the backbones, read from and written as Hugging Face `config.json` files.
//!
//! Both spellings of the ecosystem are read (`rope_theta` + `rope_scaling` and `rope_parameters`, nested and flat CLIP
//! files), and an absent field takes the default of its HF class, since published files leave those out. What changes
//! the computation and is not built is an error, never ignored.

mod fields;
mod generation;
mod llava;
mod others;
mod rope;
#[cfg(test)]
mod tests;

use crate::bail;
use crate::error::{Error, Result};
use crate::model::weights::source::read_text;
use crate::spec::Activation;
use fields::Fields;
pub use generation::{GENERATION, Generation};
pub use llava::{LlavaConfig, is_original};
pub use others::remarks;
use others::{code_of_its_own, whole_of_another_kind};
use serde_json::{Value, json};
use std::path::Path;

/// The CLIP vision tower (HF `CLIPVisionConfig`).
#[derive(Debug, Clone, PartialEq)]
pub struct VisionConfig {
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

    /// From a `config.json` of `CLIPVisionModel` or of `CLIPModel` (its `vision_config`).
    pub fn from_json(config: &Value) -> Result<Self> {
        let fields = Fields::new(config, "")?;
        code_of_its_own(&fields, &["CLIP"])?;
        match fields.text("model_type")? {
            None | Some("clip_vision_model") => Self::from_fields(&fields),
            // The dictionary of the oldest files wins where both are given, as in transformers.
            Some("clip") => {
                let mut vision = serde_json::Map::new();
                for key in ["vision_config", "vision_config_dict"] {
                    if let Some(Value::Object(part)) = fields.get(key) {
                        vision.extend(part.clone());
                    }
                }
                Self::from_fields(&Fields::new(&Value::Object(vision), "vision_config.")?)
            }
            Some(other) => Err(whole_of_another_kind(&fields)
                .unwrap_or_else(|| unsupported("", "model_type", other, "clip_vision_model, clip"))),
        }
    }

    /// From a table the user wrote: as [`Self::from_json`], and an unknown key is an error.
    pub fn from_init(config: &Value) -> Result<Self> {
        let fields = Fields::new(config, "")?;
        fields.text("model_type")?;
        let config = Self::from_fields(&fields)?;
        fields.deny_unknown().map(|()| config)
    }

    /// Reads `DIR/config.json`.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        from_file(dir, Self::from_json)
    }

    fn from_fields(f: &Fields) -> Result<Self> {
        let config = Self {
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

    /// A `config.json` that `CLIPVisionModel` of transformers 4 and 5 reads.
    pub fn to_json(&self) -> Value {
        json!({
            "architectures": ["CLIPVisionModel"],
            "model_type": "clip_vision_model",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_channels": self.num_channels,
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "hidden_act": activation_name(self.hidden_act),
            "layer_norm_eps": self.layer_norm_eps,
            "attention_dropout": 0.0,
        })
    }
}

/// The LLaMA architecture (HF `LlamaConfig`).
#[derive(Debug, Clone, PartialEq)]
pub struct LlamaConfig {
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
    pub attention_bias: bool,
    pub mlp_bias: bool,
    pub tie_word_embeddings: bool,
    pub bos_token_id: Option<u32>,
    pub eos_token_ids: Vec<u32>,
    pub pad_token_id: Option<u32>,
}

/// What the language model's folder may call itself: LLaMA, or the original LLaVA code's whole model, whose language model is one.
const LANGUAGE_TYPES: [&str; 2] = ["llama", "llava_llama"];

/// How rotary frequencies are stretched beyond the trained length.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    None,
    Linear { factor: f64 },
    Llama3 { factor: f64, low_freq_factor: f64, high_freq_factor: f64, original_max_position_embeddings: f64 },
}

impl LlamaConfig {
    /// From a `config.json` of `LlamaForCausalLM`, or of the original LLaVA code, whose language model has its fields at the top.
    pub fn from_json(config: &Value) -> Result<Self> {
        let fields = Fields::new(config, "")?;
        code_of_its_own(&fields, &["Llama", "LlavaLlama"])?;
        Self::from_fields(&fields)
    }

    /// From a table the user wrote: as [`Self::from_json`], and an unknown key is an error.
    pub fn from_init(config: &Value) -> Result<Self> {
        let fields = Fields::new(config, "")?;
        let config = Self::from_fields(&fields)?;
        fields.deny_unknown().map(|()| config)
    }

    /// Reads `DIR/config.json`.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        from_file(dir, Self::from_json)
    }

    fn from_fields(f: &Fields) -> Result<Self> {
        if let Some(other) = f.text("model_type")?.filter(|t| !LANGUAGE_TYPES.contains(t)) {
            return Err(whole_of_another_kind(f).unwrap_or_else(|| unsupported(f.path(), "model_type", other, "llama")));
        }
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
        Ok(Self {
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

    /// A `config.json` that `LlamaForCausalLM` of transformers 4 and 5 reads (both take the old spelling of RoPE).
    pub fn to_json(&self) -> Value {
        let eos = match self.eos_token_ids.as_slice() {
            [] => Value::Null,
            [one] => json!(one),
            list => json!(list),
        };
        let scaling = match &self.rope_scaling {
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
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "max_position_embeddings": self.max_position_embeddings,
            "attention_bias": self.attention_bias,
            "attention_dropout": 0.0,
            "mlp_bias": self.mlp_bias,
            "tie_word_embeddings": self.tie_word_embeddings,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "pad_token_id": self.pad_token_id,
        })
    }
}

fn from_file<T>(dir: &Path, parse: impl Fn(&Value) -> Result<T>) -> Result<T> {
    let path = dir.join("config.json");
    let text = read_text(&path).map_err(|e| e.or_hint("a model folder holds a `config.json`"))?;
    let read = || parse(&serde_json::from_str(&text)?);
    let again = "the file is damaged or was edited: get it again from where the model comes from";
    read().map_err(|e| e.context(path.display()).or_hint(again))
}

fn unsupported(path: &str, key: &str, found: &str, supported: &str) -> Error {
    Error::new(format!("`{path}{key}` is {found}, which is not supported")).hint(format!("supported: {supported}"))
}

/// `whole / part`, or an error that names both keys.
fn divides(f: &Fields, part_key: &str, part: usize, whole_key: &str, whole: usize) -> Result<usize> {
    if !whole.is_multiple_of(part) {
        bail!("`{}{whole_key}` ({whole}) is not a multiple of `{part_key}` ({part})", f.path());
    }
    Ok(whole / part)
}

fn no_dropout(f: &Fields) -> Result<()> {
    match f.number("attention_dropout")? {
        Some(p) if p != 0.0 => Err(unsupported(f.path(), "attention_dropout", &p.to_string(), "0")),
        _ => Ok(()),
    }
}

/// Activations by the names that transformers' `ACT2FN` has for them.
pub(super) const ACTIVATIONS: [(&str, Activation); 6] = [
    ("gelu", Activation::Gelu),
    ("gelu_pytorch_tanh", Activation::GeluTanh),
    ("gelu_new", Activation::GeluTanh),
    ("quick_gelu", Activation::QuickGelu),
    ("silu", Activation::Silu),
    ("relu", Activation::Relu),
];

fn activation(f: &Fields, key: &'static str) -> Result<Option<Activation>> {
    let Some(name) = f.text(key)? else { return Ok(None) };
    match ACTIVATIONS.iter().find(|(n, _)| *n == name) {
        Some((_, act)) => Ok(Some(*act)),
        None => Err(unsupported(f.path(), key, name, &ACTIVATIONS.map(|(n, _)| n).join(", "))),
    }
}

fn activation_name(act: Activation) -> &'static str {
    ACTIVATIONS.iter().find(|(_, a)| *a == act).map_or("gelu", |(n, _)| n)
}
