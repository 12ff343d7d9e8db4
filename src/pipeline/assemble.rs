//! From a recipe to a model in memory: weights found and loaded, tokenizer and picture preparation beside it.

use super::grids;
use crate::adapters::{self, lora::LoraAdapter};
use crate::bail;
use crate::checkpoint::peft;
use crate::data::{ImageProcessor, Sight, TextEncoder, TextSettings};
use crate::error::{Context, Error, Result};
use crate::model::backbone::{Config, LanguageConfig, VisionConfig};
use crate::model::config::{GENERATION, Generation, remarks};
use crate::model::container::WholeConfig;
use crate::model::init::{Fresh, FromWeights, NEWLINE, Partly, Place, Source, newline as newline_of};
use crate::model::language::Language;
use crate::model::linear::Linear;
use crate::model::params::{Module, Param};
use crate::model::projector::{Projector, published};
use crate::model::role::Part as Where;
use crate::model::vision::Tower;
use crate::model::vlm::Vlm;
use crate::model::weights::{BESIDE_LORA, Weights, source};
use crate::ops::random::Key;
use crate::spec::{self, Recipe, START_ADAPTER};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A model ready to train, and how its inputs are prepared.
pub struct Assembly {
    pub vlm: Vlm,
    /// Where it computes.
    pub place: Place,
    /// How the adapter of `model.adapter` was made, if there is one.
    pub start_adapter: Option<spec::Adapter>,
    /// Has a run begun to change the weights?
    pub used: bool,
    /// Sees pictures as the first stage does.
    pub encoder: TextEncoder,
    pub images: Option<ImageProcessor>,
    /// Everything that was read: weights, configurations, tokenizer, adapter, for the checksums of the run.
    pub files: Vec<PathBuf>,
    /// `what → source[@revision]`, as resolved.
    pub sources: Vec<(String, String)>,
    /// Folder or file of the tokenizer, whose files go with an export.
    pub tokenizer_dir: PathBuf,
    /// What was assumed for want of a file, for every command to say.
    pub warnings: Vec<String>,
    /// What of a loaded projector begins with random values, for `check` and `train` to say: a finished stage may have trained it.
    pub begins: Vec<String>,
    /// Does the newline of tiles begin with random values?
    pub newline_is_random: bool,
    /// Heights and widths that tiles may fill, as a LLaVA-NeXT folder says them of itself.
    pub grids: Option<Vec<[usize; 2]>>,
    /// How the language model's folder says answers are made.
    pub generation: Generation,
}

/// Where a tower alone is read, counted as in HF's `hidden_states`, unless the recipe says otherwise: LLaVA's choice.
const SELECT_LAYER: i64 = -2;

/// Loads everything that `recipe.model` names to where it will compute. Fresh parts are keyed by the first stage's seed.
pub fn assemble(recipe: &Recipe, place: &Place) -> Result<Assembly> {
    let seed = recipe.stages.first().and_then(|s| recipe.stage.get(s)).map_or(42, |s| s.seed);
    let mut parts = Parts {
        key: Key::new(seed, "init"),
        place: place.clone(),
        files: Vec::new(),
        sources: Vec::new(),
        warnings: Vec::new(),
        begins: Vec::new(),
        newline_is_random: false,
    };
    let whole = recipe.model.source.as_deref().map(|s| parts.whole(s, recipe)).transpose()?;
    let vision = parts.vision(recipe, whole.as_ref())?;
    let language = parts.language(recipe, whole.as_ref())?;
    let (mut tower, mut projector, mut newline, mut see) = (None, None, None, None);
    if let Some(v) = &vision {
        let (p, n) =
            parts.projector(recipe, whole.as_ref(), v.tower.config.hidden_size, language.model.config.hidden_size)?;
        let (mut t, first) = (v.tower.clone(), recipe.stages.first());
        // A projector need not be able to take a size that no stage has.
        if let Some(size) = first.and_then(|s| recipe.stage.get(s)).and_then(|s| s.image_size) {
            t.set_size(size).with_context(|| format!("stage.{}.image_size", recipe.stages[0]))?;
        }
        see = Some(seen(&t, &p, recipe.model.deliver).context("model.projector")?);
        (tower, projector, newline) = (Some(t), Some(p), n);
    }
    let encoder = parts.encoder(recipe, &language, see)?;
    let images = vision.as_ref().map(|v| parts.processor(v)).transpose()?;
    if let (Some(p), Some(t)) = (&images, &tower)
        && p.crop != t.config.image_size
    {
        bail!("pictures are prepared at {} px, but the tower takes {} px", p.crop, t.config.image_size;
            "preprocessor_config.json and config.json of the tower do not belong together")
    }
    let mut vlm = Vlm::new(tower, projector, language.model, encoder.image_token_id());
    (vlm.deliver, vlm.newline) = (recipe.model.deliver, newline);
    let (mut start_adapter, mut beside_adapter) = (None, None);
    if let Some(adapter) = &recipe.model.adapter {
        let dir = parts.find("model.adapter", adapter, source::ADAPTER)?;
        parts.note(&dir, &["adapter_config.json"]);
        parts.files.push(peft::weight_file(&dir)?);
        beside_adapter = Some(dir.clone());
        start_adapter = Some(match peft::load(&dir, START_ADAPTER)? {
            peft::Loaded::Lora(loaded) => {
                adapters::lora::attach_loaded(&mut vlm, &loaded)?;
                parts.begins.extend(never_computed(&vlm, &loaded));
                spec::Adapter::Lora(described(&loaded))
            }
            peft::Loaded::Prompt(embeddings) => {
                adapters::inserts::attach_loaded_prefix(&mut vlm, &embeddings, START_ADAPTER)?;
                let (name, tokens) = (Some(START_ADAPTER.to_string()), embeddings.dim(0)?);
                spec::Adapter::Prefix(spec::Prefix { name, tokens, before: spec::PrefixPlace::Text, freeze: false })
            }
        });
    }
    if let Some(dir) = &beside_adapter {
        parts.beside_lora(dir, recipe, &mut vlm).context("model.adapter")?;
    }
    let Parts { place, files, sources, warnings, begins, newline_is_random, .. } = parts;
    Ok(Assembly {
        vlm,
        place,
        start_adapter,
        used: false,
        encoder,
        images,
        files,
        sources,
        tokenizer_dir: language.tokenizer,
        warnings,
        begins,
        newline_is_random,
        grids: whole.and_then(|w| w.grids),
        generation: language.generation,
    })
}

fn seen(tower: &Tower, projector: &Projector, deliver: spec::Deliver) -> Result<Sight> {
    let grid = tower.grid();
    Ok(Sight { size: grid.image_size, tokens: projector.tokens(grid)?, side: projector.square(grid), deliver })
}

/// How a model sees pictures now; `None` if it sees none.
pub fn sight(vlm: &Vlm) -> Result<Option<Sight>> {
    let (Some(tower), Some(projector)) = (&vlm.vision, &vlm.projector) else { return Ok(None) };
    seen(tower, projector, vlm.deliver).map(Some)
}

/// A loaded adapter in the words of a recipe.
fn described(a: &LoraAdapter) -> spec::Lora {
    let target = a.tensors.keys().cloned().collect();
    spec::Lora {
        name: Some(a.name.clone()),
        rank: a.rank,
        alpha: a.alpha,
        dropout: a.dropout,
        target,
        rslora: a.rslora,
        dora: a.dora(),
        ..spec::Lora::default()
    }
}

/// A part of the projector that begins with fresh values only if the recipe says so must be in its source.
fn has_all_but(cfg: &spec::Projector, weights: &Weights, source: &str) -> Result<()> {
    let mut lacks = cfg.may_be_fresh();
    lacks.retain(|p| !cfg.fresh().contains(p) && !weights.names().any(|n| n.starts_with(p)));
    let Some(first) = lacks.first() else { return Ok(()) };
    let list: Vec<String> = lacks.iter().chain(&cfg.fresh()).map(|p| format!("\"{}\"", part_name(p))).collect();
    bail!("{source} has no `{}`", part_name(first);
        "to begin there with random values, say so beside `source`: fresh = [{}]", list.join(", "))
}

/// What a recipe calls the part of a projector whose parameters' names begin with `prefix`.
fn part_name(prefix: &str) -> &str {
    prefix.trim_start_matches("projector.").trim_end_matches('.')
}

/// The end tokens of config.json, then those that only generation_config.json names.
fn end_tokens(config: &LanguageConfig, generation: &Generation) -> Vec<u32> {
    let mut all = config.eos_token_ids.clone();
    all.extend(generation.eos_token_ids.iter().filter(|id| !config.eos_token_ids.contains(id)));
    all
}

/// What to say of a loaded adapter's layers that lie above the one whose features are taken: they never change.
fn never_computed(vlm: &Vlm, adapter: &LoraAdapter) -> Option<String> {
    let tower = vlm.vision.as_ref()?;
    let dormant = |l: &&Linear| !tower.computes(&l.weight.role) && adapter.tensors.contains_key(l.name());
    let above: Vec<&str> = vlm.linears().filter(dormant).map(Linear::name).collect();
    let first = above.first()?;
    Some(format!(
        "model.adapter: {} of its {} modules ({first}, …) lie above the layer whose features are taken (select_layer) and are never computed: they stay as they are",
        above.len(),
        adapter.tensors.len()
    ))
}

struct Whole {
    dir: PathBuf,
    config: WholeConfig,
    grids: Option<Vec<[usize; 2]>>,
}

struct Part {
    tower: Tower,
    dir: Option<PathBuf>,
}

struct LanguagePart {
    model: Language,
    tokenizer: PathBuf,
    image_token: Option<u32>,
    generation: Generation,
}

struct Parts {
    key: Key,
    place: Place,
    files: Vec<PathBuf>,
    sources: Vec<(String, String)>,
    warnings: Vec<String>,
    begins: Vec<String>,
    newline_is_random: bool,
}

/// What is read of a tokenizer's folder, or copied from it into an export, beside `tokenizer.json`.
const BESIDE_TOKENIZER: [&str; 6] = [
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
];

impl Parts {
    fn fresh(&self) -> Fresh {
        Fresh { key: self.key, place: self.place.clone() }
    }

    fn find(&mut self, what: &str, source: &str, files: &[&str]) -> Result<PathBuf> {
        let snapshot = source::resolve(source, files).with_context(|| what)?;
        let revision = snapshot.revision.map_or(String::new(), |r| format!("@{r}"));
        self.sources.push((what.to_string(), format!("{}{revision}", source.split('@').next().unwrap_or(source))));
        Ok(snapshot.dir)
    }

    /// Notes files of a folder as read, those that are there.
    fn note(&mut self, dir: &Path, names: &[&str]) {
        self.files.extend(names.iter().map(|n| dir.join(n)).filter(|p| p.is_file()));
    }

    /// Notes a model's `config.json` as read, and what is to be said of it.
    fn config(&mut self, dir: &Path) {
        self.note(dir, &["config.json"]);
        self.warnings.extend(remarks(dir));
    }

    fn whole(&mut self, source: &str, recipe: &Recipe) -> Result<Whole> {
        let dir = self.find(
            "model.source",
            source,
            &[source::MODEL, source::OPTIONAL_TOKENIZER, source::IMAGE_PROCESSOR].concat(),
        )?;
        self.config(&dir);
        let config = WholeConfig::from_dir(&dir)?;
        let size = config.vision.image_size;
        let grids = if config.newline { grids::of(&dir, size)? } else { None };
        if let Some(own) = grids.as_deref().filter(|_| recipe.has_tiles_of_usual_grids()) {
            self.warnings.extend(grids::warning(&dir, own, size));
        }
        Ok(Whole { dir, config, grids })
    }

    /// Builds a part from weights and makes sure that all of them were used.
    fn load<T>(&mut self, weights: Weights, build: impl FnOnce(&mut dyn Source) -> Result<T>) -> Result<T> {
        self.load_but(&[], weights, build)
    }

    /// [`Parts::load`], but with fresh values for the parameters whose names begin with one of `prefixes`.
    fn load_but<T>(
        &mut self,
        prefixes: &[&str],
        mut weights: Weights,
        build: impl FnOnce(&mut dyn Source) -> Result<T>,
    ) -> Result<T> {
        self.files.extend(weights.files().map(Path::to_path_buf));
        self.warnings.extend(weights.remarks().iter().cloned());
        prefixes.iter().for_each(|p| weights.skip(p));
        let fresh = self.fresh();
        let weights_of = FromWeights { weights: &mut weights, place: &self.place };
        let built = build(&mut Partly { weights: weights_of, fresh, prefixes })?;
        weights.finish()?;
        Ok(built)
    }

    fn vision(&mut self, recipe: &Recipe, whole: Option<&Whole>) -> Result<Option<Part>> {
        let v = recipe.model.vision.as_ref();
        let (source, init) = v.map_or((None, None), |v| (v.source.as_ref(), v.init.as_ref()));
        let (own_layer, own_feature) = v.map_or((None, None), |v| (v.select_layer, v.select_feature));
        let (layer, feature) = (own_layer.unwrap_or(SELECT_LAYER), own_feature.unwrap_or_default());
        match (source, init, whole) {
            (Some(source), None, _) => {
                let dir = self.find("model.vision", source, &[source::MODEL, source::IMAGE_PROCESSOR].concat())?;
                self.config(&dir);
                let (config, weights) = Weights::vision(&dir)?;
                let tower =
                    self.load(weights, |src| Tower::new(config, layer, feature, src)).context("model.vision")?;
                Ok(Some(Part { tower, dir: Some(dir) }))
            }
            (None, Some(init), _) => {
                let config = VisionConfig::from_init(init).context("model.vision.init")?;
                let tower = Tower::new(config, layer, feature, &mut self.fresh())?;
                Ok(Some(Part { tower, dir: None }))
            }
            (None, None, Some(w)) => {
                let (layer, feature) =
                    (own_layer.unwrap_or(w.config.select_layer), own_feature.unwrap_or(w.config.select_feature));
                let (config, weights) = Weights::vision(&w.dir)?;
                let tower =
                    self.load(weights, |src| Tower::new(config, layer, feature, src)).context("model.vision")?;
                Ok(Some(Part { tower, dir: Some(w.dir.clone()) }))
            }
            (None, None, None) if v.is_none() => Ok(None),
            _ => Err(either("model.vision")),
        }
    }

    fn language(&mut self, recipe: &Recipe, whole: Option<&Whole>) -> Result<LanguagePart> {
        let l = recipe.model.language.as_ref();
        let (source, init) = l.map_or((None, None), |l| (l.source.as_ref(), l.init.as_ref()));
        let (model, dir, image_token) = match (source, init, whole) {
            (Some(source), None, _) => {
                let dir = self.find("model.language", source, &[source::MODEL, source::OPTIONAL_TOKENIZER].concat())?;
                self.config(&dir);
                let (config, weights) = Weights::language(&dir)?;
                let model = self.load(weights, |src| Language::new(config, src)).context("model.language")?;
                (model, Some(dir), None)
            }
            (None, Some(init), _) => {
                let config = LanguageConfig::from_init(init).context("model.language.init")?;
                (Language::new(config, &mut self.fresh())?, None, None)
            }
            (None, None, Some(w)) => {
                let (config, weights) = Weights::language(&w.dir)?;
                let model = self.load(weights, |src| Language::new(config, src))?;
                (model, Some(w.dir.clone()), Some(w.config.image_token_index))
            }
            (None, None, None) if l.is_none() => {
                bail!("the recipe names no language model"; "set model.language.source, or model.source to a whole LLaVA folder")
            }
            _ => return Err(either("model.language")),
        };
        let generation = dir.as_deref().map_or(Ok(Generation::default()), Generation::from_dir)?;
        if let Some(dir) = &dir {
            self.note(dir, &[GENERATION]);
        }
        let tokenizer = match (l.and_then(|l| l.tokenizer.as_ref()), dir) {
            (Some(t), _) => self.find("model.language.tokenizer", t, source::TOKENIZER)?,
            (None, Some(dir)) => dir,
            (None, None) => {
                bail!("model.language.init needs a tokenizer"; "set model.language.tokenizer to a folder with tokenizer.json")
            }
        };
        Ok(LanguagePart { model, tokenizer, image_token, generation })
    }

    /// The projector, and the newline of tiles where the recipe has pictures in tiles or the whole model is one that sees them.
    fn projector(
        &mut self,
        recipe: &Recipe,
        whole: Option<&Whole>,
        d_in: usize,
        d_out: usize,
    ) -> Result<(Projector, Option<Param>)> {
        let tiles = recipe.has_tiles() || whole.is_some_and(|w| w.config.newline);
        let newline = |src: &mut dyn Source| tiles.then(|| newline_of(d_out, src)).transpose();
        let cfg = match (&recipe.model.projector, whole) {
            (Some(p), _) => p.clone(),
            (None, Some(w)) => w.config.projector(Some(w.dir.display().to_string())),
            (None, None) => {
                bail!("the recipe names no projector"; "set model.projector, e.g. {{ mlp = {{ depth = 2 }} }}")
            }
        };
        let bias = whole.is_none_or(|w| w.config.projector_bias);
        let Some(source) = cfg.source() else {
            let mut src = self.fresh();
            self.newline_is_random = tiles;
            return Ok((Projector::new(&cfg, d_in, d_out, bias, &mut src)?, newline(&mut src)?));
        };
        let path = PathBuf::from(source);
        let path = if path.exists() { path } else { self.find("model.projector", source, source::PROJECTOR)? };
        let weights = Weights::projector(&path)?;
        let mut fresh = cfg.fresh();
        self.published(&cfg, &path).and_then(|()| has_all_but(&cfg, &weights, source)).context("model.projector")?;
        if tiles && weights.info(NEWLINE).is_none() {
            fresh.push(NEWLINE);
            self.newline_is_random = true;
        }
        for part in fresh.iter().map(|p| part_name(p)) {
            self.begins
                .push(format!("model.projector: `{part}` begins with random values, not with those of {source}"));
        }
        if !tiles {
            // Of no use where no picture is in tiles.
            fresh.push(NEWLINE);
        }
        let build = |src: &mut dyn Source| Ok((Projector::new(&cfg, d_in, d_out, bias, src)?, newline(src)?));
        self.load_but(&fresh, weights, build).context("model.projector")
    }

    /// Takes the projector that the original LLaVA code trained beside a LoRA, if there is one in the adapter's folder.
    fn beside_lora(&mut self, dir: &Path, recipe: &Recipe, vlm: &mut Vlm) -> Result<()> {
        let file = dir.join(BESIDE_LORA);
        // A link that leads nowhere is no silence, here and below.
        if file.symlink_metadata().is_err() {
            return Ok(());
        }
        let mut weights = Weights::beside_lora(&file)?;
        let mut params = vlm.params();
        let own = vlm.names(|p| p.role.part == Where::Projector && !p.is_adapter());
        params.retain(|name, _| own.contains(name));
        if params.is_empty() {
            bail!("{} holds a projector, but the model has none", file.display();
                "give the model a vision tower and a projector, or remove the file from a copy of the adapter's folder")
        }
        // A model that shows no tiles has no newline; one that does keeps its own where the file has none.
        match (params.contains_key(NEWLINE), weights.info(NEWLINE).is_some()) {
            (false, _) => weights.skip(NEWLINE),
            (true, false) => _ = params.remove(NEWLINE),
            (true, true) => self.newline_is_random = false,
        }
        let mut values = BTreeMap::new();
        for (name, old) in &params {
            values.insert(name.clone(), weights.take(name, old.dims(), old.dtype(), old.device())?);
        }
        weights.finish()?;
        vlm.assign(&values)?;
        if recipe.model.projector.as_ref().is_some_and(|p| p.source().is_some()) {
            self.warnings.push(format!("model.projector names a source, but the adapter's {} brings a projector of its own, which takes its place", file.display()));
        }
        self.sources.push(("model.adapter, projector".to_string(), file.display().to_string()));
        self.files.push(file);
        Ok(())
    }

    /// Holds the recipe's projector to the `config.json` beside its weights, if there is one.
    fn published(&mut self, cfg: &spec::Projector, dir: &Path) -> Result<()> {
        let file = dir.join("config.json");
        if !dir.is_dir() || file.symlink_metadata().is_err() {
            return Ok(());
        }
        let config = serde_json::from_str(&source::read_text(&file)?)
            .with_context(|| format!("{} is no JSON", file.display()))?;
        self.note(dir, &["config.json"]);
        published::check(cfg, &config)
    }

    fn encoder(&mut self, recipe: &Recipe, language: &LanguagePart, sight: Option<Sight>) -> Result<TextEncoder> {
        let (m, c) = (&recipe.model, &language.model.config);
        let (dir, file) = if language.tokenizer.is_dir() {
            (language.tokenizer.as_path(), language.tokenizer.join("tokenizer.json"))
        } else {
            (language.tokenizer.parent().unwrap_or(Path::new("")), language.tokenizer.clone())
        };
        self.files.push(file);
        self.note(dir, &BESIDE_TOKENIZER);
        let settings = TextSettings {
            image_token: m.image_token.clone(),
            image_token_id: language.image_token,
            vocab_size: c.vocab_size,
            sight,
            bos: c.bos_token_id,
            eos: end_tokens(c, &language.generation),
            system: m.system.clone(),
            max_seq_len: m.max_seq_len,
            truncate: m.truncate,
            date: m.template_date.as_deref().map(super::date::parse).transpose()?,
        };
        TextEncoder::load(&language.tokenizer, settings).context("model.language")
    }

    /// How the tower's folder says pictures are prepared; CLIP's way if it says nothing, which is worth a warning.
    fn processor(&mut self, vision: &Part) -> Result<ImageProcessor> {
        let size = vision.tower.config.image_size;
        let Some(dir) = &vision.dir else { return Ok(ImageProcessor::clip(size)) };
        let files = ["processor_config.json", "preprocessor_config.json"].map(|name| dir.join(name));
        let there: Vec<_> = files.into_iter().filter(|f| f.symlink_metadata().is_ok()).collect();
        if !there.is_empty() {
            self.files.extend(there);
            self.warnings.extend(ImageProcessor::remark(dir));
            return ImageProcessor::from_dir(dir);
        }
        self.warnings.push(format!(
            "{} has neither preprocessor_config.json nor processor_config.json: pictures are prepared as CLIP's, at {size} px; if the tower was trained otherwise, copy the file from the repository that it comes from",
            dir.display()
        ));
        Ok(ImageProcessor::clip(size))
    }
}

fn either(key: &str) -> Error {
    Error::new(format!("{key} needs exactly one of `source` and `init`"))
        .hint("`source` loads weights; `init` starts from random values")
}
