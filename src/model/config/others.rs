//! Folders of models that are not built: what they are, so that the error says it.

use super::fields::Fields;
use crate::error::{Error, Result};
use crate::model::weights::source::read_text;
use serde_json::Value;
use std::path::Path;

/// Keys that only a model that takes pictures and writes text has.
const SEES_AND_WRITES: [&str; 6] =
    ["image_token_index", "image_token_id", "mm_vision_tower", "visual", "img_processor", "vision_encoder"];
/// Endings of the names of such models' classes; those of towers beside a text encoder (CLIP, SigLIP) end in `Model`.
const WRITES: [&str; 4] = ["ForConditionalGeneration", "ForCausalLM", "ForVision2Seq", "ForImageTextToText"];

/// The error for a whole vision-language model that is none of those that are `built`; `None` if it is something else.
pub(in crate::model) fn whole_of_another_kind(f: &Fields, built: &str) -> Option<Error> {
    let class = f.class();
    let writes = class.is_some_and(|c| WRITES.iter().any(|end| c.ends_with(end)));
    let whole = SEES_AND_WRITES.iter().any(|key| f.get(key).is_some()) || writes && f.get("vision_config").is_some();
    let kind = f.get("model_type").and_then(Value::as_str).filter(|_| whole && f.path().is_empty())?;
    let class = class.map_or(String::new(), |c| format!(" ({c})"));
    Some(
        Error::new(format!(
            "`model_type` is {kind}{class}: a whole vision-language model of another kind than those that are built"
        ))
        .hint(format!(
            "whole models that load are {built}; or build one from parts: a tower under model.vision, a language model under \
             model.language"
        )),
    )
}

/// A class with code of its own (`auto_map`) may compute anything: unless its name begins as those of the classes that are
/// built, it is an error.
pub(in crate::model) fn code_of_its_own(f: &Fields, built: &[&str]) -> Result<()> {
    let Some((class, code)) = f.class().zip(code(f)) else { return Ok(()) };
    if built.iter().any(|begin| class.starts_with(begin)) {
        return Ok(());
    }
    Err(Error::new(format!("`architectures` is {class}, which computes by code of its own (`auto_map`: {code}); code from model folders is never run"))
        .hint("take a folder of a model that is built; if this one computes the same, change `architectures` and remove `auto_map` in a copy of its config.json"))
}

/// What is to be said of a model folder's `config.json` although it can be read; nothing if the file cannot be.
pub fn remarks(dir: &Path) -> Vec<String> {
    let path = dir.join("config.json");
    let json = read_text(&path).ok().and_then(|t| serde_json::from_str::<Value>(&t).ok());
    let code = json.as_ref().and_then(|j| code(&Fields::new(j, "").ok()?));
    let said = |code| {
        format!(
            "{}: `auto_map` names code of the model's own ({code}), which is not run: it is computed as what `model_type` says",
            path.display()
        )
    };
    code.map(said).into_iter().collect()
}

/// What `auto_map` names, if it names anything.
fn code(f: &Fields) -> Option<String> {
    let map = f.get("auto_map")?.as_object()?;
    let first = map.values().find_map(|v| match v {
        Value::Array(list) => list.iter().find_map(Value::as_str),
        v => v.as_str(),
    });
    first.map(String::from)
}
