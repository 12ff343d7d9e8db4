//! Whole vision-language models in one folder: which parts they are made of, how their tensors and modules are called, and what a
//! picture becomes in their text. One folder a kind, which exports one [`Container`].

mod llava;
mod llava_next;
#[cfg(test)]
mod tests;

use crate::error::Result;
use crate::model::backbone::{self, LanguageConfig, Name, VisionConfig};
use crate::model::config::fields::Fields;
use crate::model::config::{code_of_its_own, from_file, unsupported, whole_of_another_kind};
use crate::model::init::{self, Place, Shapes};
use crate::model::language::Language;
use crate::model::params::Module;
use crate::model::projector::{Projector, names};
use crate::model::vision::Tower;
use crate::model::weights::source::read_text;
use crate::spec::{self, Activation, MlpProjector, SelectFeature};
pub use llava::is_original;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;

/// Whole models.
static CONTAINERS: [&Container; 2] = [&llava::CONTAINER, &llava_next::CONTAINER];

/// A kind of whole model.
pub struct Container {
    /// What `model_type` of its `config.json` is.
    pub model_type: &'static str,
    /// How the names of its classes begin.
    pub classes: &'static [&'static str],
    /// Reads its `config.json`.
    pub read: fn(&Fields) -> Result<WholeConfig>,
    /// A `config.json` that transformers 4 and 5 read.
    pub write: fn(&WholeConfig) -> Value,
    /// What prepares its inputs (`processor_config.json`), with the text of the image token.
    pub processor: fn(&WholeConfig, &str) -> Value,
    /// What stands before the names of its parts' own tensors in its files.
    pub prefixes: Prefixes,
}

/// What stands before the names of tensors in the files of a whole model.
#[derive(Debug, Clone, Copy)]
pub struct Prefixes {
    pub vision: &'static str,
    pub language: &'static str,
}

impl std::fmt::Debug for Container {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.model_type)
    }
}

impl PartialEq for Container {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}

/// A whole model's parts and how they are put together.
#[derive(Debug, Clone, PartialEq)]
pub struct WholeConfig {
    /// Whose folders it is read from and written as.
    pub container: &'static Container,
    pub vision: VisionConfig,
    pub text: LanguageConfig,
    /// Stands for a visual token in the text.
    pub image_token_index: u32,
    pub select_layer: i64,
    pub select_feature: SelectFeature,
    pub projector_act: Activation,
    pub projector_bias: bool,
    /// Are pictures cut into tiles, whose rows end with a trained token?
    pub newline: bool,
}

impl WholeConfig {
    /// From a `config.json`.
    pub fn from_json(config: &Value) -> Result<Self> {
        let f = Fields::new(config, "")?;
        if is_original(config) {
            return Err(llava::original(&f));
        }
        let kind = f.text("model_type")?;
        let Some(container) = CONTAINERS.iter().find(|c| Some(c.model_type) == kind) else {
            let absent = || unsupported("", "model_type", kind.unwrap_or("absent"), &built());
            return Err(whole_of_another_kind(&f, &built()).unwrap_or_else(absent));
        };
        code_of_its_own(&f, container.classes)?;
        (container.read)(&f)
    }

    /// Reads `DIR/config.json`.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        from_file(dir, Self::from_json)
    }

    /// A `config.json` that transformers 4 and 5 read.
    pub fn to_json(&self) -> Value {
        (self.container.write)(self)
    }

    /// Its projector in the words of a recipe.
    pub fn projector(&self, source: Option<String>) -> spec::Projector {
        let act = self.projector_act;
        spec::Projector::Mlp(MlpProjector { source, depth: 2, hidden: None, act, input_norm: false, norm: false })
    }

    /// Names and shapes of all its parameters. What is saved is held against these, since `from_pretrained` fills a missing tensor
    /// with random numbers and only warns.
    pub fn parameters(&self) -> Result<BTreeMap<String, Vec<usize>>> {
        let (d, width) = (self.vision.hidden_size, self.text.hidden_size);
        let projector =
            Projector::new(&self.projector(None), d, width, self.projector_bias, &mut Shapes(Place::cpu()))?;
        let mut all = Tower::parameters(&self.vision)?;
        all.extend(Language::parameters(&self.text)?);
        all.extend(projector.shapes());
        if self.newline {
            all.insert(init::NEWLINE.to_string(), vec![width]);
        }
        Ok(all)
    }

    /// Tokens that one picture becomes in the text, seen at once.
    pub fn tokens_per_image(&self) -> usize {
        self.vision.num_patches() + usize::from(self.select_feature == SelectFeature::Full)
    }

    /// The meaning of a tensor's name in its files, in any spelling: transformers 4 and 5, also that of modules inside
    /// transformers 5 (`model.` in front, the head at the top).
    pub fn canonical(&self, name: &str) -> Name {
        let Prefixes { vision, language, .. } = self.container.prefixes;
        let bare = name.strip_prefix("model.").unwrap_or(name);
        if name == "lm_head.weight" {
            return (self.text.architecture.canonical)(name);
        }
        if let Some(rest) = bare.strip_prefix(vision) {
            return (self.vision.architecture.canonical)(rest);
        }
        if let Some(rest) = bare.strip_prefix(language) {
            return (self.text.architecture.canonical)(rest);
        }
        names::canonical(name).map_or(Name::Unknown, Name::Known)
    }

    /// The name of a canonical tensor in the spelling that transformers 4 and 5 read; `None` if the model has no such tensor.
    pub fn stored(&self, canonical: &str) -> Option<String> {
        let prefixes = self.container.prefixes;
        let behind = |prefix: &str, name: String| format!("{prefix}{name}");
        match canonical.split_once('.')? {
            ("vision", _) => Some(behind(prefixes.vision, (self.vision.architecture.stored)(canonical)?)),
            ("language", _) => Some(behind(prefixes.language, (self.text.architecture.stored)(canonical)?)),
            _ => names::stored(canonical),
        }
    }
}

/// The kinds that are built.
fn built() -> String {
    CONTAINERS.map(|c| c.model_type).join(", ")
}

/// A folder from which a part is to be read must not be a whole model of a kind that is not built.
pub fn deny_unknown(dir: &Path) -> Result<()> {
    from_file(dir, |config| {
        let f = Fields::new(config, "")?;
        let known = f.text("model_type")?.is_none_or(backbone::is_built);
        if known { Ok(()) } else { whole_of_another_kind(&f, &built()).map_or(Ok(()), Err) }
    })
}

/// Whether `config.json` in `dir` describes a whole model that is built; any problem with the file is reported by its reader.
pub fn is_built(dir: &Path) -> bool {
    config(dir).is_some_and(|c| {
        let kind = c.get("model_type").and_then(Value::as_str);
        CONTAINERS.iter().any(|built| Some(built.model_type) == kind) && !is_original(&c)
    })
}

/// Whether `config.json` in `dir` describes a whole model, be it in the layout of the original LLaVA code.
pub fn is_whole(dir: &Path) -> bool {
    is_built(dir) || config(dir).is_some_and(|c| is_original(&c))
}

fn config(dir: &Path) -> Option<Value> {
    read_text(&dir.join("config.json")).ok().and_then(|t| serde_json::from_str(&t).ok())
}

/// The canonical name of a module in the spelling of any model, whole or a part; `None` if it is none of ours.
pub fn module(path: &str) -> Option<String> {
    let bare = path.strip_prefix("model.").unwrap_or(path);
    for Prefixes { vision, language, .. } in CONTAINERS.map(|c| c.prefixes) {
        if let Some(rest) = bare.strip_prefix(vision) {
            return Some(format!("vision.{}", tower_module(rest)));
        }
        if let Some(rest) = bare.strip_prefix(language) {
            return Some(format!("language.{}", rest.strip_prefix("model.").unwrap_or(rest)));
        }
    }
    if path.starts_with("vision_model.") || path.starts_with("encoder.") {
        return Some(format!("vision.{}", tower_module(path)));
    }
    if path == "lm_head" || bare.starts_with("layers.") {
        return Some(format!("language.{bare}"));
    }
    names::canonical(path)
}

fn tower_module(path: &str) -> &str {
    path.strip_prefix("vision_model.").unwrap_or(path)
}
