//! LoRA adapters as PEFT folders: `adapter_config.json` and `adapter_model.safetensors`; soft tokens in `peft::prompt`.
//!
//! Keys are written as PEFT does under transformers 5 (`base_model.model.` + module path + `.lora_A.weight`), and read in every
//! spelling that names a module of ours. Scale: alpha / rank, rsLoRA alpha / √rank. DoRA has `.lora_magnitude_vector` beside them.

mod prompt;

use super::{atomic, safetensors};
pub use crate::adapters::lora::LoraAdapter;
use crate::bail;
use crate::error::{Context, Error, Result};
use crate::model::container;
use crate::model::weights::{Tensors, source};
use candle_core::{Device, Tensor};
pub use prompt::save_prompt;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// What an adapter sits on; decides how PEFT names its modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// A whole model.
    Whole,
    /// A language model alone.
    Language,
}

/// What a PEFT folder holds.
#[derive(Debug)]
pub enum Loaded {
    /// Low-rank updates.
    Lora(LoraAdapter),
    /// Soft tokens, `[tokens, D]`.
    Prompt(Tensor),
}

/// Reads a PEFT folder; `name` is what the adapter is called from now on. Tensors are as stored, on the CPU.
pub fn load(dir: &Path, name: &str) -> Result<Loaded> {
    let config = read_config(dir)?;
    let read = || match config.get("peft_type").and_then(Value::as_str) {
        Some(prompt::TYPE) => prompt::load(dir, &config).map(Loaded::Prompt),
        _ => LoraAdapter::load(dir, name).map(Loaded::Lora),
    };
    read().map_err(|e| e.or_hint(AGAIN))
}

/// What to do with a folder whose files contradict each other.
const AGAIN: &str =
    "its files are damaged or do not belong together: copy the folder again from where the adapter comes from";

/// `base_model_name_or_path` and `revision` for a source: a repository by its name, a folder as it was given.
fn named(base_model: Option<&str>) -> (Option<&str>, Option<&str>) {
    match base_model.and_then(source::on_hub) {
        Some((repository, "main")) => (Some(repository), None),
        Some((repository, revision)) => (Some(repository), Some(revision)),
        None => (base_model, None),
    }
}

fn read_config(dir: &Path) -> Result<Value> {
    let path = dir.join("adapter_config.json");
    let text = source::read_text(&path).map_err(|e| e.or_hint("a PEFT folder holds this file"))?;
    let damaged = |e: serde_json::Error| Error::new(format!("{} is damaged", path.display())).source(e);
    serde_json::from_str(&text).map_err(|e| damaged(e).hint(AGAIN))
}

/// What the tensors of a folder are to one module.
#[derive(Debug, Default)]
struct Triple {
    /// The module's path in PEFT.
    path: String,
    a: Option<Tensor>,
    b: Option<Tensor>,
    magnitude: Option<Tensor>,
}

/// The layers of one part of the model → the modules adapted in exactly these layers.
type Groups<'a> = BTreeMap<(&'a str, BTreeSet<usize>), BTreeSet<&'a str>>;

/// The file of a PEFT folder that holds the tensors.
pub fn weight_file(dir: &Path) -> Result<PathBuf> {
    let files = ["adapter_model.safetensors", "adapter_model.bin"].map(|name| dir.join(name));
    let Some(file) = files.into_iter().find(|f| f.exists()) else {
        bail!("{} has no adapter_model.safetensors", dir.display(); "a PEFT folder holds this file, or adapter_model.bin")
    };
    Ok(file)
}

impl LoraAdapter {
    /// Reads a PEFT folder; `name` is what the adapter is called from now on. Tensors are as stored, on the CPU.
    pub fn load(dir: &Path, name: &str) -> Result<Self> {
        let config = Config::parse(&read_config(dir)?);
        let config = config.with_context(|| dir.join("adapter_config.json").display().to_string())?;
        let file = weight_file(dir)?;
        let modules = load_modules(&Tensors::open_file(&file)?).with_context(|| file.display().to_string())?;
        let (mut alphas, mut tensors, mut magnitudes) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
        for (module, (peft_name, a, b, magnitude)) in modules {
            let (rank, said) = (a.dim(0)?, pattern_value(&config.ranks, &peft_name).unwrap_or(config.rank as f64));
            if rank as f64 != said {
                bail!("{}: `{peft_name}` has rank {rank}, the configuration says {said}", file.display());
            }
            match (magnitude, config.dora) {
                (Some(m), true) => _ = magnitudes.insert(module.clone(), m),
                (None, false) => {}
                (Some(_), false) => bail!("{}: `{peft_name}` has a magnitude, but `use_dora` is false", file.display()),
                (None, true) => bail!("{}: `use_dora` is true, but `{peft_name}` has no magnitude", file.display();
                    "only linear layers, each with its `lora_magnitude_vector`, are supported"),
            }
            alphas.extend(pattern_value(&config.alphas, &peft_name).map(|alpha| (module.clone(), alpha)));
            tensors.insert(module, (a, b));
        }
        let Config { rank, alpha, rslora, dropout, .. } = config;
        Ok(Self { name: name.into(), rank, alpha, alphas, rslora, dropout, tensors, magnitudes })
    }

    /// Writes the folder `dir` as a whole. `base_model` is the path or repository (`owner/name[@revision]`) that PEFT loads the
    /// model from.
    pub fn save(&self, dir: &Path, base: Base, base_model: Option<&str>) -> Result<()> {
        atomic::directory(dir, |dir| self.write_files(dir, base, base_model))
    }

    /// Writes the two files into a folder that is there.
    pub fn write_files(&self, dir: &Path, base: Base, base_model: Option<&str>) -> Result<()> {
        let mut keys = Vec::new();
        for (module, (a, b)) in &self.tensors {
            let path = peft_path(base, module)?;
            keys.push((format!("base_model.model.{path}.lora_A.weight"), a));
            keys.push((format!("base_model.model.{path}.lora_B.weight"), b));
            let magnitude = self.magnitudes.get(module);
            keys.extend(magnitude.map(|m| (format!("base_model.model.{path}.lora_magnitude_vector"), m)));
        }
        let tensors = keys.iter().map(|(key, t)| (key.as_str(), *t)).collect();
        let metadata = BTreeMap::from([("format".to_string(), "pt".to_string())]);
        safetensors::save_list(&dir.join("adapter_model.safetensors"), tensors, &metadata)?;
        let config = serde_json::to_string_pretty(&self.config(base, base_model)?)?;
        atomic::write_bytes(&dir.join("adapter_config.json"), (config + "\n").as_bytes())
    }

    fn config(&self, base: Base, base_model: Option<&str>) -> Result<Value> {
        let (mut ranks, mut alphas) = (serde_json::Map::new(), serde_json::Map::new());
        for module in self.tensors.keys() {
            let path = peft_path(base, module)?;
            if self.rank_of(module) != self.rank {
                ranks.insert(path.clone(), json!(self.rank_of(module)));
            }
            if let Some(alpha) = self.alphas.get(module) {
                alphas.insert(path, json!(alpha));
            }
        }
        // PEFT writes whole alphas as integers.
        let alpha = if self.alpha.fract() == 0.0 { json!(self.alpha as i64) } else { json!(self.alpha) };
        let (base_model, revision) = named(base_model);
        Ok(json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base_model,
            "revision": revision,
            "inference_mode": true,
            "r": self.rank,
            "lora_alpha": alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "use_dora": self.dora(),
            "bias": "none",
            "fan_in_fan_out": false,
            "init_lora_weights": true,
            "modules_to_save": null,
            "rank_pattern": ranks,
            "alpha_pattern": alphas,
            "target_modules": target_modules(self.tensors.keys().map(String::as_str), base),
        }))
    }
}

/// The fields of `adapter_config.json` that decide what the adapter computes.
struct Config {
    rank: usize,
    alpha: f64,
    rslora: bool,
    dora: bool,
    dropout: f64,
    ranks: Pattern,
    alphas: Pattern,
}

/// Entries of `rank_pattern` or `alpha_pattern`, in the file's order.
type Pattern = Vec<(String, f64)>;

impl Config {
    /// Fields that are read, and fields that say how an adapter was made but not what it computes.
    const KNOWN: [&str; 27] = [
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "use_dora",
        "rank_pattern",
        "alpha_pattern",
        "peft_type",
        "bias",
        "init_lora_weights",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "peft_version",
        "megatron_core",
        "megatron_config",
        "qalora_group_size",
        "loftq_config",
        "eva_config",
        "ensure_weight_tying",
        "runtime_config",
    ];

    fn parse(json: &Value) -> Result<Self> {
        let Some(map) = json.as_object() else { bail!("not a JSON object") };
        let get = |key: &str| map.get(key).filter(|v| !v.is_null());
        let text =
            |key: &str, default: &'static str| get(key).map_or(default, |v| v.as_str().unwrap_or("?")).to_string();
        if text("peft_type", "LORA") != "LORA" {
            bail!("`peft_type` is {}", text("peft_type", ""); "only LORA and PROMPT_TUNING are built: merge the adapter into its model with PEFT (merge_and_unload), if its kind can be, and start from that");
        }
        if text("bias", "none") != "none" {
            bail!("`bias` is {}, so the adapter changes biases too", text("bias", ""); "only bias = \"none\" is supported");
        }
        // Initialisations that change the base weights leave an adapter that fits only those.
        let init = get("init_lora_weights");
        if !init.is_none_or(|v| v.is_boolean() || matches!(v.as_str(), Some("gaussian" | "eva" | "orthogonal"))) {
            bail!("`init_lora_weights` is {}, which also changes the base model", init.unwrap_or(&Value::Null);
                "convert it to a plain LoRA with PEFT (save_pretrained with path_initial_model_for_weight_conversion)");
        }
        let empty = |v: &Value| match v {
            Value::Null | Value::Bool(false) => true,
            Value::Array(a) => a.is_empty(),
            Value::Object(o) => o.is_empty(),
            _ => false,
        };
        if let Some((key, value)) = map.iter().find(|(k, v)| !Self::KNOWN.contains(&k.as_str()) && !empty(v)) {
            bail!("`{key}` is {value}, which is not supported"; "merge the adapter into its model with PEFT and start from that");
        }
        let number = |key: &str, default: f64| match get(key) {
            None => Ok(default),
            Some(v) => v.as_f64().ok_or_else(|| Error::new(format!("`{key}` must be a number, not {v}"))),
        };
        let rank = number("r", 8.0)?;
        if rank < 1.0 || rank.fract() != 0.0 {
            bail!("`r` is {rank}; a rank is a positive whole number");
        }
        Ok(Self {
            rank: rank as usize,
            alpha: number("lora_alpha", 8.0)?,
            dropout: number("lora_dropout", 0.0)?,
            rslora: get("use_rslora").is_some_and(|v| v == &Value::Bool(true)),
            dora: get("use_dora").is_some_and(|v| v == &Value::Bool(true)),
            ranks: pattern(get("rank_pattern"), "rank_pattern")?,
            alphas: pattern(get("alpha_pattern"), "alpha_pattern")?,
        })
    }
}

/// `rank_pattern` or `alpha_pattern`: module names or their endings. PEFT takes regular expressions; plain names are what it writes.
fn pattern(value: Option<&Value>, key: &str) -> Result<Pattern> {
    let entries = value.and_then(Value::as_object).into_iter().flatten();
    let read = |(name, v): (&String, &Value)| {
        let plain = name.trim_start_matches('^').chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
        match v.as_f64() {
            Some(v) if plain => Ok((name.clone(), v)),
            _ => Err(Error::new(format!("`{key}` has the entry {name} = {v}"))
                .hint("only module names and numbers are supported")),
        }
    };
    entries.map(read).collect()
}

/// The value for a module as PEFT finds it (`get_pattern_key`): of the entries that equal the module's path or end it after a
/// dot, the first one in the file, be it the longest or not. (PEFT sorts the entries by name when it writes the file, not when
/// it reads it.)
fn pattern_value(pattern: &Pattern, path: &str) -> Option<f64> {
    let fits = |key: &str| match key.strip_prefix('^') {
        Some(whole) => path == whole,
        None => path.strip_suffix(key).is_some_and(|rest| rest.is_empty() || rest.ends_with('.')),
    };
    pattern.iter().find(|(key, _)| fits(key)).map(|(_, value)| *value)
}

/// Canonical module → its path in PEFT, A, B, DoRA's magnitude if there is one.
type Modules = BTreeMap<String, (String, Tensor, Tensor, Option<Tensor>)>;

/// What to do with an adapter that changes more than is built.
const BEYOND: &str = "a LoRA is built for the linear layers of tower and language model, not for `lm_head`, embeddings, biases or the projector: merge the adapter into its model with PEFT (merge_and_unload) and start from that";

fn load_modules(tensors: &Tensors) -> Result<Modules> {
    let mut found: BTreeMap<String, Triple> = BTreeMap::new();
    for key in tensors.names() {
        let Some((path, part)) = split_key(key) else {
            bail!("`{key}` is no part of a LoRA on a linear layer"; "{BEYOND}");
        };
        let Some(module) = container::module(path) else {
            bail!("`{key}` adapts `{path}`, which is no module of a model that is built";
                "the adapter belongs to another model");
        };
        let of = found.entry(module.clone()).or_insert_with(|| Triple { path: path.to_string(), ..Triple::default() });
        let slot = match part {
            Part::A => &mut of.a,
            Part::B => &mut of.b,
            Part::Magnitude => &mut of.magnitude,
        };
        if slot.replace(tensors.load(key, &Device::Cpu)?).is_some() {
            bail!("two tensors are the same part of the adapter of `{module}`; one of them is `{key}`");
        }
    }
    found.into_iter().map(|(module, t)| Ok((module, t.complete()?))).collect()
}

impl Triple {
    fn complete(self) -> Result<(String, Tensor, Tensor, Option<Tensor>)> {
        let Self { path, a, b, magnitude } = self;
        let (Some(a), Some(b)) = (a, b) else { bail!("`{path}` has only one of lora_A and lora_B") };
        let (&[r, _], &[out, s]) = (a.dims(), b.dims()) else {
            bail!("`{path}`: lora_A {:?} and lora_B {:?} are no matrices", a.dims(), b.dims())
        };
        if r != s {
            bail!("`{path}`: lora_A {:?} and lora_B {:?} do not fit (want [r, in] and [out, r])", a.dims(), b.dims())
        }
        if let Some(m) = magnitude.as_ref().filter(|m| m.dims() != [out]) {
            bail!("`{path}`: lora_magnitude_vector {:?} does not fit lora_B {:?}", m.dims(), b.dims())
        }
        Ok((path, a, b, magnitude))
    }
}

#[derive(Debug, Clone, Copy)]
enum Part {
    A,
    B,
    Magnitude,
}

/// `base_model.model.PATH.lora_A[.NAME].weight` → PATH and what it is; a magnitude may do without `.weight`.
fn split_key(key: &str) -> Option<(&str, Part)> {
    let key = key.strip_prefix("base_model.model.").unwrap_or(key);
    let weight = key.strip_suffix(".weight");
    let parts = [
        (weight.and_then(|k| k.rsplit_once(".lora_A")), Part::A),
        (weight.and_then(|k| k.rsplit_once(".lora_B")), Part::B),
        (weight.unwrap_or(key).rsplit_once(".lora_magnitude_vector"), Part::Magnitude),
    ];
    let (path, rest, part) = parts.into_iter().find_map(|(split, part)| split.map(|(p, r)| (p, r, part)))?;
    (rest.is_empty() || rest.starts_with('.')).then_some((path, part))
}

/// The path of a module inside the transformers 5 model.
fn peft_path(base: Base, module: &str) -> Result<String> {
    let path = match (base, module.split_once('.')) {
        (_, Some(("language", "lm_head"))) => "lm_head".to_string(),
        (Base::Language, Some(("language", rest))) => format!("model.{rest}"),
        (Base::Whole, Some(("language", rest))) => format!("model.language_model.{rest}"),
        (Base::Whole, Some(("vision", rest))) => format!("model.vision_tower.{rest}"),
        (Base::Whole, Some(("projector", rest))) => format!("model.multi_modal_projector.{rest}"),
        _ => bail!("`{module}` is no module of the model that the adapter is written for ({base:?})"),
    };
    Ok(path)
}

/// A pattern (Python's `re.fullmatch`) that hits exactly these modules, whichever version of transformers names them.
fn target_modules<'a>(modules: impl Iterator<Item = &'a str>, base: Base) -> String {
    let mut layers_of: BTreeMap<(&str, &str), BTreeSet<usize>> = BTreeMap::new();
    let mut alternatives = Vec::new();
    for module in modules {
        let layer = module.split_once("layers.").and_then(|(part, rest)| {
            let (layer, name) = rest.split_once('.')?;
            Some((part, layer.parse::<usize>().ok()?, name))
        });
        match layer {
            Some((part, layer, name)) => _ = layers_of.entry((part, name)).or_default().insert(layer),
            None => {
                let name = module.split_once('.').map_or(module, |(_, name)| name);
                let owner = if module.starts_with("projector.") { r"multi_modal_projector\." } else { "" };
                alternatives.push(format!(r"(.*\.)?{owner}{}", name.replace('.', r"\.")));
            }
        }
    }
    let mut groups = Groups::new();
    for ((part, name), layers) in layers_of {
        groups.entry((part, layers)).or_default().insert(name);
    }
    for ((part, layers), names) in groups {
        let owner = match (base, part.starts_with("vision.")) {
            (_, true) => r"(.*\.)?vision_tower\.(vision_model\.)?encoder\.",
            (Base::Whole, false) => r"(.*\.)?language_model\.(model\.)?",
            (Base::Language, false) => r"(model\.)?",
        };
        let layers: Vec<_> = layers.iter().map(usize::to_string).collect();
        let names: Vec<_> = names.iter().map(|n| n.replace('.', r"\.")).collect();
        alternatives.push(format!(r"{owner}layers\.({})\.({})", layers.join("|"), names.join("|")));
    }
    alternatives.join("|")
}

#[cfg(test)]
mod tests;
