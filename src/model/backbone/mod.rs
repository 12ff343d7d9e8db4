//! Pretrained language models and vision towers: one folder an architecture, which exports one [`Architecture`]. Chosen by what
//! `model_type` of a `config.json` says; nothing outside names one.
//!
//! Both spellings of the ecosystem are read (`rope_theta` + `rope_scaling` and `rope_parameters`, nested and flat files), and an
//! absent field takes the default of its HF class, since published files leave those out. What changes the computation and is not
//! built is an error, never ignored.

mod architecture;
mod clip;
mod language;
mod llama;
mod rope;
#[cfg(test)]
mod tests;
mod vision;

use crate::error::Result;
use crate::model::config::fields::Fields;
use crate::model::config::{code_of_its_own, from_file, unsupported};
pub use architecture::{Architecture, Name};
pub use language::{LanguageConfig, RopeScaling};
use serde_json::Value;
use std::path::Path;
pub use vision::VisionConfig;

/// Language models. The first is what a config without `model_type` means.
pub static LANGUAGES: [&Architecture<LanguageConfig>; 1] = [&llama::ARCHITECTURE];

/// Vision towers. The first is what a config without `model_type` means.
pub static TOWERS: [&Architecture<VisionConfig>; 1] = [&clip::ARCHITECTURE];

/// Is there an architecture that a `config.json` calls `model_type`?
pub fn is_built(model_type: &str) -> bool {
    let languages = LANGUAGES.iter().flat_map(|a| a.model_types);
    languages.chain(TOWERS.iter().flat_map(|a| a.model_types)).any(|built| *built == model_type)
}

/// Something that a folder's `config.json` describes.
pub trait Config: Sized + 'static {
    /// The architectures that are built.
    fn architectures() -> &'static [&'static Architecture<Self>];

    /// Reads the whole or a part of a `config.json` by the architecture that its `model_type` names.
    fn from_fields(f: &Fields) -> Result<Self> {
        let all = Self::architectures();
        let Some(kind) = f.text("model_type")? else { return (all[0].read)(f) };
        match all.iter().find(|a| a.model_types.contains(&kind)) {
            Some(architecture) => (architecture.read)(f),
            None => {
                let built: Vec<&str> = all.iter().flat_map(|a| a.model_types).copied().collect();
                Err(unsupported(f.path(), "model_type", kind, &built.join(", ")))
            }
        }
    }

    /// From a whole `config.json`.
    fn from_json(config: &Value) -> Result<Self> {
        let fields = Fields::new(config, "")?;
        let classes: Vec<&str> = Self::architectures().iter().flat_map(|a| a.classes).copied().collect();
        code_of_its_own(&fields, &classes)?;
        Self::from_fields(&fields)
    }

    /// From a table the user wrote: as [`Config::from_json`], and an unknown key is an error.
    fn from_init(config: &Value) -> Result<Self> {
        let fields = Fields::new(config, "")?;
        let config = Self::from_fields(&fields)?;
        fields.deny_unknown().map(|()| config)
    }

    /// Reads `DIR/config.json`.
    fn from_dir(dir: &Path) -> Result<Self> {
        from_file(dir, Self::from_json)
    }

    /// A `config.json` that transformers 4 and 5 read.
    fn to_json(&self) -> Value;
}

impl Config for LanguageConfig {
    fn architectures() -> &'static [&'static Architecture<Self>] {
        &LANGUAGES
    }

    fn to_json(&self) -> Value {
        (self.architecture.write)(self)
    }
}

impl Config for VisionConfig {
    fn architectures() -> &'static [&'static Architecture<Self>] {
        &TOWERS
    }

    fn to_json(&self) -> Value {
        (self.architecture.write)(self)
    }
}
