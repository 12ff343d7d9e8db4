//! Pretrained weights on disk, under canonical names, loaded one by one and accounted for to the last.

pub mod hub;
mod pickle;
pub mod progress;
pub mod source;
pub mod tensors;
#[cfg(test)]
mod tests;

use crate::bail;
use crate::error::{Error, Result};
use crate::model::backbone::{Config, LanguageConfig, Name, VisionConfig};
use crate::model::container::{self, WholeConfig};
use crate::model::projector::names;
use candle_core::{DType, Device, Tensor};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
pub use tensors::{Info, Tensors};

/// Tensors of a model folder by canonical name. Each is loaded by [`Weights::take`]; [`Weights::finish`] makes sure that
/// none was forgotten.
pub struct Weights {
    tensors: Tensors,
    /// Folder or file, for messages.
    source: PathBuf,
    /// Canonical name → name in the file. A name without a canonical form stands for itself and is found by `finish`.
    names: BTreeMap<String, String>,
    taken: BTreeSet<String>,
    /// What is to be said although everything can be read.
    remarks: Vec<String>,
}

/// The file in which the original LLaVA code leaves what it trained beside a LoRA.
pub const BESIDE_LORA: &str = "non_lora_trainables.bin";

const HEAD: &str = "language.lm_head.weight";
const EMBEDDINGS: &str = "language.embed_tokens.weight";

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Weights({}, {} tensors)", self.source.display(), self.names.len())
    }
}

impl Weights {
    /// The vision tower in a folder of one, or of a whole model.
    pub fn vision(dir: &Path) -> Result<(VisionConfig, Self)> {
        if container::is_built(dir) {
            let whole = WholeConfig::from_dir(dir)?;
            let weights = Self::open(dir, |name| whole.canonical(name))?.only("vision.");
            return Ok((whole.vision, weights));
        }
        container::deny_unknown(dir)?;
        let config = VisionConfig::from_dir(dir)?;
        let weights = Self::open(dir, config.architecture.canonical)?;
        Ok((config, weights))
    }

    /// The language model in a folder of one, or of a whole model.
    pub fn language(dir: &Path) -> Result<(LanguageConfig, Self)> {
        let (mut config, mut weights) = if container::is_built(dir) {
            let whole = WholeConfig::from_dir(dir)?;
            let weights = Self::open(dir, |name| whole.canonical(name))?.only("language.");
            (whole.text, weights)
        } else {
            container::deny_unknown(dir)?;
            let config = LanguageConfig::from_dir(dir)?;
            let weights = Self::open(dir, config.architecture.canonical)?;
            (config, weights)
        };
        weights.tie(&mut config.tie_word_embeddings)?;
        Ok((config, weights))
    }

    /// The folder of a whole model.
    pub fn whole(dir: &Path) -> Result<(WholeConfig, Self)> {
        let mut config = WholeConfig::from_dir(dir)?;
        let mut weights = Self::open(dir, |name| config.canonical(name))?;
        weights.tie(&mut config.text.tie_word_embeddings)?;
        Ok((config, weights))
    }

    /// A projector: a file of ours (`projector.safetensors`) or of the original LLaVA code (`mm_projector.bin`,
    /// `non_lora_trainables.bin`), a folder that holds one of them, a whole LLaVA, Idefics2 or BLIP-2, the connector or Q-Former of one.
    pub fn projector(path: &Path) -> Result<Self> {
        let inside = ["projector.safetensors", "mm_projector.bin", BESIDE_LORA].map(|name| path.join(name));
        let tensors = match inside.iter().find(|p| p.exists()) {
            Some(file) => Tensors::open_file(file)?,
            None if path.is_dir() => Tensors::open(path)?,
            None => Tensors::open_file(path)?,
        };
        let inside = if names::bare_qformer(tensors.names()) { "qformer." } else { "" };
        let named = |name: &str| names::canonical(&format!("{inside}{name}")).map_or(Name::Ignored, Name::Known);
        let weights = Self::new(tensors, path, named)?;
        if weights.names.is_empty() {
            bail!("{} holds no projector", path.display(); "expected tensors `multi_modal_projector.linear_1.weight` …");
        }
        Ok(weights)
    }

    /// What the original LLaVA code trained beside a LoRA: the projector, and nothing else that is known.
    pub fn beside_lora(file: &Path) -> Result<Self> {
        let named = |name: &str| names::canonical(name).map_or(Name::Unknown, Name::Known);
        let weights = Self::new(Tensors::open_file(file)?, file, named)?;
        if let Some(other) = weights.names().find(|n| !n.starts_with("projector.")) {
            bail!("{}: `{other}` was trained beside the LoRA and is no part of a projector", file.display();
                "merge the folder with LLaVA's own scripts/merge_lora_weights.py and start from what that writes")
        }
        Ok(weights)
    }

    fn open(dir: &Path, meaning: impl Fn(&str) -> Name) -> Result<Self> {
        let computed = |name: &str| name.ends_with(".position_ids") || name.ends_with(".rotary_emb.inv_freq");
        Self::new(Tensors::open(dir)?, dir, |name| if computed(name) { Name::Ignored } else { meaning(name) })
    }

    /// Holds what config.json says of the head (`tied`: it is the embeddings) to the files, as `tie_weights` of transformers 5
    /// does: a head that differs from the embeddings stays, and `tied` becomes false; the head alone is the embeddings, too.
    fn tie(&mut self, tied: &mut bool) -> Result<()> {
        let Some(head) = self.names.get(HEAD).filter(|_| *tied).cloned() else { return Ok(()) };
        if let Some(embeddings) = self.names.get(EMBEDDINGS)
            && !self.tensors.same(&head, embeddings)?
        {
            *tied = false;
            self.remarks.push(format!(
                "{}: `tie_word_embeddings` is true in config.json, but the weights hold a head of their own (`{head}`) that differs from the embeddings: it is used, and exported with `tie_word_embeddings` = false",
                self.source.display()
            ));
            return Ok(());
        }
        self.names.remove(HEAD);
        self.names.entry(EMBEDDINGS.into()).or_insert(head);
        Ok(())
    }

    /// What is to be said of the files although everything can be read.
    pub fn remarks(&self) -> &[String] {
        &self.remarks
    }

    fn new(tensors: Tensors, source: &Path, meaning: impl Fn(&str) -> Name) -> Result<Self> {
        let mut names = BTreeMap::new();
        for name in tensors.names() {
            let key = match meaning(name) {
                Name::Known(key) => key,
                Name::Unknown => name.to_string(),
                Name::Ignored => continue,
            };
            if let Some(other) = names.insert(key.clone(), name.to_string()) {
                bail!("`{other}` and `{name}` in {} are both `{key}`", source.display();
                    "a model has one spelling of names: copy or convert the weights again");
            }
        }
        Ok(Self { tensors, source: source.to_path_buf(), names, taken: BTreeSet::new(), remarks: Vec::new() })
    }

    /// Keeps the tensors whose canonical name begins with `prefix`.
    fn only(mut self, prefix: &str) -> Self {
        self.names.retain(|name, _| name.starts_with(prefix));
        self
    }

    /// Canonical names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// Shape and stored type of a tensor, without loading it.
    pub fn info(&self, name: &str) -> Option<&Info> {
        self.names.get(name).and_then(|stored| self.tensors.info(stored))
    }

    /// The files the tensors come from.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.tensors.files()
    }

    /// Loads a tensor as `dtype` on `device`. A missing one, another shape than `shape`, or a type that is not floating
    /// point is an error that names tensor and file.
    pub fn take(&mut self, name: &str, shape: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
        let Some((stored, info)) = self.names.get(name).and_then(|s| Some((s, self.tensors.info(s)?))) else {
            return Err(self.missing(name));
        };
        let place = || {
            let file = self.tensors.file(stored).unwrap_or(&self.source);
            format!("tensor `{name}` (`{stored}` in {})", file.display())
        };
        if info.shape != shape {
            bail!("{} has the shape {:?}, but {shape:?} is expected", place(), info.shape;
                "the weights and the configuration beside them do not belong together");
        }
        if !info.dtype.is_some_and(|d| d.is_float()) {
            bail!("{} holds no floating-point numbers", place(); "quantised weights are not supported");
        }
        let tensor = self.tensors.load(stored, device)?.to_dtype(dtype)?;
        self.taken.insert(name.to_string());
        Ok(tensor)
    }

    /// Leaves out, on purpose, every tensor whose canonical name begins with `prefix` (e.g. layers that are never run).
    pub fn skip(&mut self, prefix: &str) {
        self.taken.extend(self.names.keys().filter(|name| name.starts_with(prefix)).cloned());
    }

    /// Every tensor must have been taken or skipped; else an error names those that were not.
    pub fn finish(self) -> Result<()> {
        let left: Vec<_> = self.names.iter().filter(|(name, _)| !self.taken.contains(*name)).map(|(_, s)| s).collect();
        if left.is_empty() {
            return Ok(());
        }
        let shown: Vec<_> = left.iter().take(8).map(|name| format!("`{name}`")).collect();
        let more =
            if left.len() > shown.len() { format!(" and {} more", left.len() - shown.len()) } else { String::new() };
        Err(Error::new(format!(
            "{} holds tensors that the model does not use: {}{more}",
            self.source.display(),
            shown.join(", ")
        ))
        .hint("its `config.json` describes another model (fewer layers, no bias, another projector?)"))
    }

    fn missing(&self, name: &str) -> Error {
        let error = Error::new(format!("tensor `{name}` is missing in {}", self.source.display()));
        if name == HEAD {
            return error.hint(
                "a model without a head (LlamaModel, a classifier) writes no text; if the head is to be the embeddings, set \
                 `tie_word_embeddings` to true in a copy of its config.json",
            );
        }
        let free = self.names.keys().filter(|n| !self.taken.contains(*n));
        match free.max_by(|a, b| strsim::jaro_winkler(a, name).total_cmp(&strsim::jaro_winkler(b, name))) {
            Some(near) => {
                error.hint(format!("the nearest that is there is `{near}`; does `config.json` fit the weights?"))
            }
            None => error.hint("does `config.json` fit the weights?"),
        }
    }
}
