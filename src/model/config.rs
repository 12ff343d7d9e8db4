//! Reading `config.json` and `generation_config.json` of Hugging Face folders: fields by name and type, and what is said of
//! models that are not built.

pub mod fields;
mod generation;
mod others;

use crate::bail;
use crate::error::{Error, Result};
use crate::model::weights::source::read_text;
use crate::spec::Activation;
use fields::Fields;
pub use generation::{GENERATION, Generation};
pub use others::remarks;
pub(super) use others::{code_of_its_own, whole_of_another_kind};
use serde_json::Value;
use std::path::Path;

/// Reads `DIR/config.json`.
pub(super) fn from_file<T>(dir: &Path, parse: impl Fn(&Value) -> Result<T>) -> Result<T> {
    let path = dir.join("config.json");
    let text = read_text(&path).map_err(|e| e.or_hint("a model folder holds a `config.json`"))?;
    let read = || parse(&serde_json::from_str(&text)?);
    let again = "the file is damaged or was edited: get it again from where the model comes from";
    read().map_err(|e| e.context(path.display()).or_hint(again))
}

/// An option that is not built.
pub(super) fn unsupported(path: &str, key: &str, found: &str, supported: &str) -> Error {
    Error::new(format!("`{path}{key}` is {found}, which is not supported")).hint(format!("supported: {supported}"))
}

/// `whole / part`, or an error that names both keys.
pub(super) fn divides(f: &Fields, part_key: &str, part: usize, whole_key: &str, whole: usize) -> Result<usize> {
    if !whole.is_multiple_of(part) {
        bail!("`{}{whole_key}` ({whole}) is not a multiple of `{part_key}` ({part})", f.path());
    }
    Ok(whole / part)
}

/// Dropout inside a backbone is an error.
pub(super) fn no_dropout(f: &Fields) -> Result<()> {
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

/// An activation by its name.
pub(super) fn activation(f: &Fields, key: &'static str) -> Result<Option<Activation>> {
    let Some(name) = f.text(key)? else { return Ok(None) };
    match ACTIVATIONS.iter().find(|(n, _)| *n == name) {
        Some((_, act)) => Ok(Some(*act)),
        None => Err(unsupported(f.path(), key, name, &ACTIVATIONS.map(|(n, _)| n).join(", "))),
    }
}

/// The name of an activation.
pub(super) fn activation_name(act: Activation) -> &'static str {
    ACTIVATIONS.iter().find(|(_, a)| *a == act).map_or("gelu", |(n, _)| n)
}
