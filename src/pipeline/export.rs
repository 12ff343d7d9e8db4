//! What a stage leaves behind: everything for adfreeze itself in one file, and the same in the formats of others.

use super::state::{State, TRAINED};
use crate::adapters::lora;
use crate::bail;
use crate::checkpoint::atomic;
use crate::checkpoint::sums::Sums;
use crate::checkpoint::{hf, peft, safetensors};
use crate::data::{ImageProcessor, TextEncoder};
use crate::error::Result;
use crate::model::params::Module;
use crate::model::role::{Part, Role};
use crate::model::weights::source;
use crate::spec::{Adapter, PrefixPlace, Recipe};
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::path::Path;

/// Writes an adapter of no format but ours: `adapter.json`, the recipe's words, and `adapter.safetensors`, its parameters.
fn save_insert(dir: &Path, cfg: &Adapter, params: &BTreeMap<String, Tensor>) -> Result<()> {
    atomic::directory(dir, |dir| {
        safetensors::save(&dir.join("adapter.safetensors"), params, &BTreeMap::new())?;
        atomic::write_bytes(&dir.join("adapter.json"), (serde_json::to_string_pretty(cfg)? + "\n").as_bytes())
    })
}

/// The source that a recipe's adapters sit on, as it names it: that of the whole model, or of the language model where there is no
/// tower. A model put together from parts has none.
pub fn base_model(recipe: &Recipe) -> Option<&str> {
    let m = &recipe.model;
    match (&m.source, &m.vision) {
        (Some(whole), _) => Some(whole),
        (None, None) => m.language.as_ref()?.source.as_deref(),
        (None, Some(_)) => None,
    }
}

/// What to say of adapters that name a folder of this disk.
pub fn only_here(base_model: Option<&str>, state: &State) -> Option<String> {
    let folder = base_model.filter(|s| source::on_hub(s).is_none())?;
    let peft = |a: &Adapter| match a {
        Adapter::Lora(_) => true,
        Adapter::Prefix(p) => p.before == PrefixPlace::Text,
        Adapter::Bottleneck(_) | Adapter::CrossAttention(_) => false,
    };
    state.adapters.values().any(peft).then(|| {
        format!(
            "the adapters' base_model_name_or_path is the folder {folder}: before you publish them, put the repository that it comes from into adapter_config.json"
        )
    })
}

/// Writes `dir`: `trained.safetensors`; `projector.safetensors` if there is a projector; `adapters/NAME/` in PEFT's
/// format where it has one; `vision/` and `language/` in HF's layout if their own weights have changed, with what prepares their inputs: the
/// pictures' preparation as it was used, the tokenizer's files from `tokenizer_dir`; `SHA256SUMS` of all of it. What stands there
/// already is replaced, unless it holds files of others. Returns the SHA-256 of `trained.safetensors`.
///
/// `base_model`: where the model comes from, see [`base_model`]; adapters name it unless the weights below them have changed.
pub fn write_final(
    state: &mut State,
    dir: &Path,
    base_model: Option<&str>,
    tokenizer_dir: &Path,
    images: Option<&ImageProcessor>,
    encoder: &TextEncoder,
) -> Result<String> {
    let mut trained = String::new();
    let base = if state.vlm.vision.is_some() { peft::Base::Whole } else { peft::Base::Language };
    atomic::summed_directory(dir, |dir| {
        let mut sums = Sums::default();
        trained = state.save(dir)?;
        sums.set(TRAINED, &trained);
        let (params, roles) = (state.vlm.params(), state.vlm.roles());
        let own = |which: &dyn Fn(&Role) -> bool| -> BTreeMap<_, _> {
            params.iter().filter(|(n, _)| which(&roles[*n])).map(|(n, t)| (n.clone(), t.clone())).collect()
        };
        let part = |part: Part| own(&|r| r.part == part && r.adapter.is_none());
        let projector = part(Part::Projector);
        if !projector.is_empty() {
            hf::save_projector(&dir.join("projector.safetensors"), &projector)?;
        }
        let changed = |part: Part| state.changed.iter().any(|n| roles.get(n).is_some_and(|r| r.part == part));
        let moved = changed(Part::Vision) || changed(Part::Language);
        let base_model = base_model.filter(|_| !moved);
        for (name, cfg) in state.adapters.clone() {
            let own = own(&|r| r.adapter() == Some(name.as_str()));
            let dir = dir.join("adapters").join(&name);
            match &cfg {
                Adapter::Lora(cfg) => lora::export(&state.vlm, &name, cfg)?.save(&dir, base, base_model)?,
                Adapter::Prefix(cfg) if cfg.before == PrefixPlace::Text => {
                    own.values().try_for_each(|t| peft::save_prompt(&dir, t, &state.vlm.language.config, base_model))?
                }
                Adapter::Prefix(_) | Adapter::Bottleneck(_) | Adapter::CrossAttention(_) => {
                    save_insert(&dir, &cfg, &own)?
                }
            }
        }
        if let (true, Some(tower)) = (changed(Part::Vision), &state.vlm.vision) {
            let Some(images) = images else { bail!("the vision tower has no picture preparation to be saved with it") };
            hf::save_vision(&dir.join("vision"), &tower.config, images, &part(Part::Vision))?;
        }
        if changed(Part::Language) {
            let language = &state.vlm.language;
            let out = dir.join("language");
            hf::save_language(&out, &language.config, &part(Part::Language), &[tokenizer_dir])?;
            // A tokenizer that is a file alone has no folder to be copied from.
            if encoder.image_token_added() || tokenizer_dir.is_file() {
                atomic::write_bytes(&out.join("tokenizer.json"), encoder.tokenizer_json()?.as_bytes())?;
            }
        }
        Ok(sums)
    })?;
    Ok(trained)
}
