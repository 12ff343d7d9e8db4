//! Hugging Face model folders that `from_pretrained` of transformers 4 and 5 reads: a vision tower, a language model, a whole
//! model. Names and fields are those of the hub, which both versions understand.

use super::{atomic, safetensors};
use crate::bail;
use crate::data::ImageProcessor;
use crate::error::{Context, Result};
use crate::model::backbone::{Config, LanguageConfig, VisionConfig};
use crate::model::container::WholeConfig;
use crate::model::language::Language;
use crate::model::projector::names;
use crate::model::vision::Tower;
use candle_core::{DType, Tensor};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::Path;

/// What belongs to a tokenizer.
const TOKENIZER: [&str; 6] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
];
const PREPROCESSOR: &str = "preprocessor_config.json";
const PROCESSOR: &str = "processor_config.json";

/// Writes `dir` as a vision tower with its preprocessor. Of `tensors` (canonical names), those of the tower are written.
pub fn save_vision(
    dir: &Path,
    config: &VisionConfig,
    images: &ImageProcessor,
    tensors: &BTreeMap<String, Tensor>,
) -> Result<()> {
    let list = complete(config.architecture.stored, &Tower::parameters(config)?, tensors)?;
    atomic::directory(dir, |dir| {
        write_json(&dir.join(PREPROCESSOR), &images.to_json())?;
        write_model(dir, config.to_json(), list)
    })
}

/// Writes `dir` as a language model. Of `tensors` (canonical names), those of the language model are written; the files
/// of the tokenizer are copied from the first of `files_from` that has them.
pub fn save_language(
    dir: &Path,
    config: &LanguageConfig,
    tensors: &BTreeMap<String, Tensor>,
    files_from: &[&Path],
) -> Result<()> {
    let list = complete(config.architecture.stored, &Language::parameters(config)?, tensors)?;
    atomic::directory(dir, |dir| {
        copy(dir, &TOKENIZER, files_from)?;
        write_model(dir, config.to_json(), list)
    })
}

/// Writes `dir` as a whole model with tokenizer (copied as by [`save_language`]) and processor.
/// `tensors` must be exactly its tensors: the projector needs two layers and no norm.
pub fn save_whole(
    dir: &Path,
    config: &WholeConfig,
    images: &ImageProcessor,
    image_token: &str,
    tensors: &BTreeMap<String, Tensor>,
    files_from: &[&Path],
) -> Result<()> {
    let shapes = config.parameters()?;
    if let Some(extra) = tensors.keys().find(|name| !shapes.contains_key(*name)) {
        bail!("a whole `{}` has no tensor `{extra}`", config.container.model_type;
            "only a projector `mlp` of depth 2, with hidden size and activation of the language model's side and no \
             norm, fits; merge adapters before the export");
    }
    let list = complete(|name| config.stored(name), &shapes, tensors)?;
    atomic::directory(dir, |dir| {
        copy(dir, &TOKENIZER, files_from)?;
        write_json(&dir.join(PREPROCESSOR), &images.to_json())?;
        write_json(&dir.join(PROCESSOR), &(config.container.processor)(config, image_token))?;
        write_model(dir, config.to_json(), list)
    })
}

/// Saves `projector.*` of `tensors` in one file that [`crate::model::weights::Weights::projector`] reads.
pub fn save_projector(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    let named: Vec<(String, &Tensor)> =
        tensors.iter().filter_map(|(name, t)| Some((names::stored(name)?, t))).collect();
    if named.is_empty() {
        bail!("there is no projector to save at {}", path.display());
    }
    let list = named.iter().map(|(name, t)| (name.as_str(), *t)).collect();
    safetensors::save_list(path, list, &format())
}

/// Every tensor of the architecture under its name in the file; a missing or misshaped one is an error.
fn complete<'a>(
    stored: impl Fn(&str) -> Option<String>,
    shapes: &BTreeMap<String, Vec<usize>>,
    tensors: &'a BTreeMap<String, Tensor>,
) -> Result<Vec<(String, &'a Tensor)>> {
    let mut list = Vec::new();
    for (name, shape) in shapes {
        let Some(tensor) = tensors.get(name) else {
            bail!("tensor `{name}` is missing, the model would not be complete")
        };
        if tensor.dims() != shape.as_slice() {
            bail!("tensor `{name}` has the shape {:?}, but {shape:?} is expected", tensor.dims());
        }
        let Some(stored) = stored(name) else { bail!("`{name}` has no name in the files of this architecture") };
        list.push((stored, tensor));
    }
    Ok(list)
}

fn write_model(dir: &Path, mut config: Value, tensors: Vec<(String, &Tensor)>) -> Result<()> {
    let dtype = match tensors.first().map(|(_, t)| t.dtype()) {
        Some(DType::BF16) => "bfloat16",
        Some(DType::F16) => "float16",
        _ => "float32",
    };
    config["torch_dtype"] = json!(dtype);
    write_json(&dir.join("config.json"), &config)?;
    let list = tensors.iter().map(|(name, t)| (name.as_str(), *t)).collect();
    safetensors::save_list(&dir.join("model.safetensors"), list, &format())
}

/// transformers asks which framework wrote a file.
fn format() -> BTreeMap<String, String> {
    BTreeMap::from([("format".to_string(), "pt".to_string())])
}

fn write_json(path: &Path, value: &Value) -> Result<()> {
    atomic::write_bytes(path, (serde_json::to_string_pretty(value)? + "\n").as_bytes())
}

/// Copies each of `names` from the first folder that has it.
fn copy(dir: &Path, names: &[&str], from: &[&Path]) -> Result<()> {
    for name in names {
        if let Some(source) = from.iter().map(|d| d.join(name)).find(|p| p.is_file()) {
            let bytes = std::fs::read(&source).with_context(|| format!("cannot read {}", source.display()))?;
            atomic::write_bytes(&dir.join(name), &bytes)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::weights::Weights;
    use candle_core::Device;
    use std::path::PathBuf;

    fn golden(folder: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/a").join(folder)
    }

    fn all(mut weights: Weights) -> BTreeMap<String, Tensor> {
        let shapes: Vec<_> = weights.names().map(|n| (n.to_string(), weights.info(n).unwrap().shape.clone())).collect();
        let mut take = |n: &str, s: &[usize]| weights.take(n, s, DType::F32, &Device::Cpu).unwrap();
        shapes.iter().map(|(name, shape)| (name.clone(), take(name, shape))).collect()
    }

    fn same(a: &BTreeMap<String, Tensor>, b: &BTreeMap<String, Tensor>) -> bool {
        let list = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        a.keys().eq(b.keys()) && a.iter().all(|(n, t)| t.dims() == b[n].dims() && list(t) == list(&b[n]))
    }

    #[test]
    fn folders_round_trip_and_carry_the_tokenizer_and_processor() {
        let (config, weights) = Weights::whole(&golden("model")).unwrap();
        let tensors = all(weights);
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let from = golden("model");
        let images = ImageProcessor::from_dir(&from).unwrap();
        save_whole(&at("llava"), &config, &images, "<image>", &tensors, &[&from]).unwrap();
        let (again, weights) = Weights::whole(&at("llava")).unwrap();
        assert!(again == config && same(&tensors, &all(weights)));
        for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
            assert_eq!(
                std::fs::read(from.join(name)).unwrap(),
                std::fs::read(at("llava").join(name)).unwrap(),
                "{name}"
            );
        }
        let processor =
            |dir: &Path| -> Value { serde_json::from_slice(&std::fs::read(dir.join(PROCESSOR)).unwrap()).unwrap() };
        assert_eq!(processor(&from), processor(&at("llava")));
        save_vision(&at("vision"), &config.vision, &images, &tensors).unwrap();
        for folder in ["llava", "vision"] {
            assert_eq!(ImageProcessor::from_dir(&at(folder)).unwrap(), images);
        }
        save_language(&at("language"), &config.text, &tensors, &[Path::new("nowhere"), &from]).unwrap();
        save_projector(&at("projector.safetensors"), &tensors).unwrap();
        let (vision, weights) = Weights::vision(&at("vision")).unwrap();
        let mut parts = all(weights);
        let (language, weights) = Weights::language(&at("language")).unwrap();
        parts.extend(all(weights));
        parts.extend(all(Weights::projector(&at("projector.safetensors")).unwrap()));
        assert!(vision == config.vision && language == config.text && same(&tensors, &parts));
        assert!(at("language").join("tokenizer.json").exists());
    }

    #[test]
    fn an_incomplete_or_foreign_model_is_not_written() {
        let (config, weights) = Weights::whole(&golden("model")).unwrap();
        let mut tensors = all(weights);
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("llava");
        let bias = tensors.remove("vision.post_layernorm.bias").unwrap();
        let save = |tensors: &_| {
            let images = ImageProcessor::clip(config.vision.image_size);
            save_whole(&path, &config, &images, "<image>", tensors, &[]).unwrap_err().report()
        };
        assert!(save(&tensors).contains("tensor `vision.post_layernorm.bias` is missing"));
        tensors.insert("vision.post_layernorm.bias".into(), bias.reshape((1, 32)).unwrap());
        assert!(save(&tensors).contains("has the shape [1, 32], but [32] is expected"));
        tensors.insert("projector.linear_3.weight".into(), bias);
        assert!(save(&tensors).contains("has no tensor `projector.linear_3.weight`"));
        assert!(!path.exists());
    }
}
