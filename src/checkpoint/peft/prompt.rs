//! Soft tokens in PEFT's format of prompt tuning (Lester et al. 2021): `prompt_embeddings` `[tokens, D]` and their configuration.

use super::{atomic, named, safetensors, weight_file};
use crate::bail;
use crate::error::{Context, Result};
use crate::model::backbone::LanguageConfig;
use crate::model::weights::Tensors;
use candle_core::{Device, Tensor};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// `peft_type` of such a folder.
pub(super) const TYPE: &str = "PROMPT_TUNING";

/// Name of the only tensor.
const EMBEDDINGS: &str = "prompt_embeddings";

/// Writes soft tokens `[tokens, D]` of a model as the folder `dir`; `base_model` as in [`super::LoraAdapter::save`].
pub fn save_prompt(dir: &Path, embeddings: &Tensor, language: &LanguageConfig, base_model: Option<&str>) -> Result<()> {
    let (base_model, revision) = named(base_model);
    let (tokens, width) = embeddings.dims2()?;
    let config = json!({
        "peft_type": TYPE,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": revision,
        "inference_mode": true,
        "num_virtual_tokens": tokens,
        "token_dim": width,
        "num_transformer_submodules": 1,
        "num_attention_heads": language.num_attention_heads,
        "num_layers": language.num_hidden_layers,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": null,
        "tokenizer_name_or_path": null,
    });
    let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
    atomic::directory(dir, |dir| {
        let path = dir.join("adapter_model.safetensors");
        safetensors::save_list(&path, vec![(EMBEDDINGS, embeddings)], &metadata)?;
        let text = serde_json::to_string_pretty(&config)? + "\n";
        atomic::write_bytes(&dir.join("adapter_config.json"), text.as_bytes())
    })
}

/// The soft tokens of the folder `dir`, as stored, on the CPU. `config` is its configuration.
pub(super) fn load(dir: &Path, config: &Value) -> Result<Tensor> {
    let submodules = config.get("num_transformer_submodules").and_then(Value::as_u64).unwrap_or(1);
    if submodules != 1 {
        bail!("{}: `num_transformer_submodules` is {submodules}", dir.join("adapter_config.json").display();
            "a decoder alone has one");
    }
    let file = weight_file(dir)?;
    let tensors = Tensors::open_file(&file)?;
    if let Some(other) = tensors.names().find(|n| *n != EMBEDDINGS) {
        bail!("{}: `{other}` is no part of prompt tuning", file.display(); "it holds `{EMBEDDINGS}` alone");
    }
    let embeddings = tensors.load(EMBEDDINGS, &Device::Cpu).with_context(|| file.display().to_string())?;
    let said = config.get("num_virtual_tokens").and_then(Value::as_u64);
    match embeddings.dims() {
        [tokens, _] if said.is_none_or(|said| said == *tokens as u64) => Ok(embeddings),
        dims => {
            let said = said.map_or("nothing of".to_string(), |n| n.to_string());
            bail!("{}: `{EMBEDDINGS}` is {dims:?}, the configuration says {said} tokens", file.display())
        }
    }
}
