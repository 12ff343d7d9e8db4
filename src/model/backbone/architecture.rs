//! What a folder under `backbone/` exports.

use crate::error::Result;
use crate::model::block;
use crate::model::config::fields::Fields;
use serde_json::Value;

/// An architecture: how its folders spell what the one language model or the one tower is built from. `C` is the config of that.
pub struct Architecture<C: 'static> {
    /// What `model_type` of a `config.json` calls it; the first is written.
    pub model_types: &'static [&'static str],
    /// How the names of its classes begin (`architectures` of a `config.json`), those of models that hold it as a part too.
    pub classes: &'static [&'static str],
    /// Reads a `config.json`, or the part of one. An option that is not built is an error that names it.
    pub read: fn(&Fields) -> Result<C>,
    /// A `config.json` that transformers 4 and 5 read.
    pub write: fn(&C) -> Value,
    /// The meaning of a tensor's name in its files, in the spelling of any version of transformers.
    pub canonical: fn(&str) -> Name,
    /// The name of a canonical tensor in the spelling that both transformers 4 and 5 read; `None` if it has no such tensor.
    pub stored: fn(&str) -> Option<String>,
    /// What the modules of its blocks are called.
    pub block: block::Names,
}

/// What a name found in a file means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Name {
    /// The canonical name: HF's module names under `vision.`, `projector.` and `language.`.
    Known(String),
    /// Belongs to a part that is not used or to a buffer that is computed.
    Ignored,
    /// Nothing of this architecture.
    Unknown,
}

impl<C> Architecture<C> {
    /// Its name: `model_type` as it is written.
    pub fn name(&self) -> &'static str {
        self.model_types[0]
    }
}

impl<C> std::fmt::Debug for Architecture<C> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl<C> PartialEq for Architecture<C> {
    fn eq(&self, other: &Self) -> bool {
        std::ptr::eq(self, other)
    }
}
