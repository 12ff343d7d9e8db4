//! From a recipe to a model in memory: weights found and loaded, tokenizer and picture preparation beside it.

use crate::adapters::lora::LoraAdapter;
use crate::bail;
use crate::data::{ImageProcessor, TextEncoder, TextSettings};
use crate::error::{Context, Error, Result};
use crate::model::config::{LlamaConfig, LlavaConfig, VisionConfig};
use crate::model::init::{Fresh, FromWeights, Source};
use crate::model::language::Language;
use crate::model::projector::Projector;
use crate::model::vision::Tower;
use crate::model::vlm::Vlm;
use crate::model::weights::{Weights, source};
use crate::ops::random::Key;
use crate::recipe::schema::{self, MlpProjector, Recipe, SelectFeature};
use candle_core::{DType, Device};
use std::path::{Path, PathBuf};

/// A model ready to train, and how its inputs are prepared.
pub struct Assembly {
    pub vlm: Vlm,
    /// How the adapter of `model.adapter` was made, if there is one.
    pub start_adapter: Option<schema::Lora>,
    /// Has a run begun to change the weights?
    pub used: bool,
    pub encoder: TextEncoder,
    pub images: Option<ImageProcessor>,
    /// Everything that was read: the model's files, for the checksums of the run.
    pub files: Vec<PathBuf>,
    /// `what → source[@revision]`, as resolved.
    pub sources: Vec<(String, String)>,
    /// Folders whose side files (tokenizer, preprocessor) go with an export.
    pub tokenizer_dir: PathBuf,
    pub vision_dir: Option<PathBuf>,
}

const DTYPE: DType = DType::F32;

/// Loads everything that `recipe.model` names. Fresh parts are keyed by the first stage's seed.
pub fn assemble(recipe: &Recipe) -> Result<Assembly> {
    let seed = recipe.stages.first().and_then(|s| recipe.stage.get(s)).map_or(42, |s| s.seed);
    let mut parts = Parts { key: Key::new(seed, "init"), files: Vec::new(), sources: Vec::new() };
    let whole = recipe.model.source.as_deref().map(|s| parts.llava(s)).transpose()?;
    let vision = parts.vision(recipe, whole.as_ref())?;
    let language = parts.language(recipe, whole.as_ref())?;
    let (mut tower, mut projector) = (None, None);
    if let Some(v) = &vision {
        let p =
            parts.projector(recipe, whole.as_ref(), v.tower.config.hidden_size, language.model.config.hidden_size)?;
        (tower, projector) = (Some(v.tower.clone()), Some(p));
    }
    let encoder = parts.encoder(recipe, &language, tower.as_ref().map_or(0, Tower::tokens_per_image))?;
    let images = match &vision {
        None => None,
        Some(Part { dir: Some(dir), tower }) => Some(processor(dir, &tower.config)?),
        Some(Part { dir: None, tower }) => Some(ImageProcessor::clip(tower.config.image_size)),
    };
    if let (Some(p), Some(t)) = (&images, &tower)
        && p.crop != t.config.image_size
    {
        bail!("pictures are prepared at {} px, but the tower takes {} px", p.crop, t.config.image_size;
            "preprocessor_config.json and config.json of the tower do not belong together")
    }
    let mut vlm = Vlm::new(tower, projector, language.model, encoder.image_token_id());
    let mut start_adapter = None;
    if let Some(adapter) = &recipe.model.adapter {
        let dir = source::resolve(adapter, source::ADAPTER)?.dir;
        parts.sources.push(("adapter".into(), adapter.clone()));
        parts.files.push(dir.join("adapter_model.safetensors"));
        let loaded = LoraAdapter::load(&dir, START_ADAPTER)?;
        crate::adapters::lora::attach_loaded(&mut vlm, &loaded)?;
        start_adapter = Some(described(&loaded));
    }
    let Parts { files, sources, .. } = parts;
    let vision_dir = vision.and_then(|v| v.dir);
    Ok(Assembly {
        vlm,
        start_adapter,
        used: false,
        encoder,
        images,
        files,
        sources,
        tokenizer_dir: language.tokenizer,
        vision_dir,
    })
}

/// A loaded adapter in the words of a recipe.
fn described(a: &LoraAdapter) -> schema::Lora {
    let target = a.tensors.keys().cloned().collect();
    let name = Some(a.name.clone());
    schema::Lora { name, rank: a.rank, alpha: a.alpha, dropout: a.dropout, target, rslora: a.rslora, freeze: false }
}

/// Name of the adapter that `model.adapter` brings along.
pub const START_ADAPTER: &str = "start";

struct Whole {
    dir: PathBuf,
    config: LlavaConfig,
}

struct Part {
    tower: Tower,
    dir: Option<PathBuf>,
}

struct LanguagePart {
    model: Language,
    tokenizer: PathBuf,
    image_token: Option<u32>,
}

struct Parts {
    key: Key,
    files: Vec<PathBuf>,
    sources: Vec<(String, String)>,
}

impl Parts {
    fn find(&mut self, what: &str, source: &str, files: &[&str]) -> Result<PathBuf> {
        let snapshot = source::resolve(source, files).with_context(|| what)?;
        let revision = snapshot.revision.map_or(String::new(), |r| format!("@{r}"));
        self.sources.push((what.to_string(), format!("{}{revision}", source.split('@').next().unwrap_or(source))));
        Ok(snapshot.dir)
    }

    fn llava(&mut self, source: &str) -> Result<Whole> {
        let dir = self.find(
            "model.source",
            source,
            &[source::MODEL, source::OPTIONAL_TOKENIZER, source::IMAGE_PROCESSOR].concat(),
        )?;
        let config = LlavaConfig::from_dir(&dir)?;
        Ok(Whole { dir, config })
    }

    /// Builds a part from weights and makes sure that all of them were used.
    fn load<T>(&mut self, mut weights: Weights, build: impl FnOnce(&mut dyn Source) -> Result<T>) -> Result<T> {
        self.files.extend(weights.files().map(Path::to_path_buf));
        let built = build(&mut FromWeights { weights: &mut weights, dtype: DTYPE, device: &Device::Cpu })?;
        weights.finish()?;
        Ok(built)
    }

    fn vision(&mut self, recipe: &Recipe, whole: Option<&Whole>) -> Result<Option<Part>> {
        let Some(v) = &recipe.model.vision else {
            let Some(w) = whole else { return Ok(None) };
            let (config, weights) = Weights::vision(&w.dir)?;
            let tower =
                self.load(weights, |src| Tower::new(config, w.config.select_layer, w.config.select_feature, src))?;
            return Ok(Some(Part { tower, dir: Some(w.dir.clone()) }));
        };
        let (select, feature): (i64, SelectFeature) = (v.select_layer, v.select_feature);
        match (&v.source, &v.init) {
            (Some(source), None) => {
                let dir = self.find("model.vision", source, &[source::MODEL, source::IMAGE_PROCESSOR].concat())?;
                let (config, weights) = Weights::vision(&dir)?;
                let tower =
                    self.load(weights, |src| Tower::new(config, select, feature, src)).context("model.vision")?;
                Ok(Some(Part { tower, dir: Some(dir) }))
            }
            (None, Some(init)) => {
                let config = VisionConfig::from_init(init).context("model.vision.init")?;
                let tower = Tower::new(config, select, feature, &mut Fresh { key: self.key, dtype: DTYPE })?;
                Ok(Some(Part { tower, dir: None }))
            }
            _ => Err(either("model.vision")),
        }
    }

    fn language(&mut self, recipe: &Recipe, whole: Option<&Whole>) -> Result<LanguagePart> {
        let Some(l) = &recipe.model.language else {
            let Some(w) = whole else {
                bail!("the recipe names no language model"; "set model.language.source, or model.source to a whole LLaVA folder")
            };
            let (config, weights) = Weights::language(&w.dir)?;
            let model = self.load(weights, |src| Language::new(config, src))?;
            return Ok(LanguagePart { model, tokenizer: w.dir.clone(), image_token: Some(w.config.image_token_index) });
        };
        let (model, dir) = match (&l.source, &l.init) {
            (Some(source), None) => {
                let dir = self.find("model.language", source, &[source::MODEL, source::OPTIONAL_TOKENIZER].concat())?;
                let (config, weights) = Weights::language(&dir)?;
                (self.load(weights, |src| Language::new(config, src)).context("model.language")?, Some(dir))
            }
            (None, Some(init)) => {
                let config = LlamaConfig::from_init(init).context("model.language.init")?;
                (Language::new(config, &mut Fresh { key: self.key, dtype: DTYPE })?, None)
            }
            _ => return Err(either("model.language")),
        };
        let tokenizer = match (&l.tokenizer, dir) {
            (Some(t), _) => self.find("model.language.tokenizer", t, source::TOKENIZER)?,
            (None, Some(dir)) => dir,
            (None, None) => {
                bail!("model.language.init needs a tokenizer"; "set model.language.tokenizer to a folder with tokenizer.json")
            }
        };
        Ok(LanguagePart { model, tokenizer, image_token: None })
    }

    fn projector(&mut self, recipe: &Recipe, whole: Option<&Whole>, d_in: usize, d_out: usize) -> Result<Projector> {
        let from_whole = |w: &Whole| {
            schema::Projector::Mlp(MlpProjector {
                source: Some(w.dir.display().to_string()),
                depth: 2,
                hidden: None,
                act: w.config.projector_act,
                input_norm: false,
            })
        };
        let cfg = match (&recipe.model.projector, whole) {
            (Some(p), _) => p.clone(),
            (None, Some(w)) => from_whole(w),
            (None, None) => {
                bail!("the recipe names no projector"; "set model.projector, e.g. {{ mlp = {{ depth = 2 }} }}")
            }
        };
        let source = match &cfg {
            schema::Projector::Linear(p) => p.source.clone(),
            schema::Projector::Mlp(p) => p.source.clone(),
        };
        let bias = whole.is_none_or(|w| w.config.projector_bias);
        let Some(source) = source else {
            return Projector::new(&cfg, d_in, d_out, bias, &mut Fresh { key: self.key, dtype: DTYPE });
        };
        let path = PathBuf::from(&source);
        let path = if path.exists() { path } else { self.find("model.projector", &source, source::PROJECTOR)? };
        let weights = Weights::projector(&path)?;
        self.load(weights, |src| Projector::new(&cfg, d_in, d_out, bias, src)).context("model.projector")
    }

    fn encoder(&mut self, recipe: &Recipe, language: &LanguagePart, tokens_per_image: usize) -> Result<TextEncoder> {
        let (m, c) = (&recipe.model, &language.model.config);
        self.files.push(if language.tokenizer.is_dir() {
            language.tokenizer.join("tokenizer.json")
        } else {
            language.tokenizer.clone()
        });
        let settings = TextSettings {
            image_token: m.image_token.clone(),
            image_token_id: language.image_token,
            vocab_size: c.vocab_size,
            tokens_per_image,
            bos: c.bos_token_id,
            eos: c.eos_token_ids.clone(),
            system: m.system.clone(),
            max_seq_len: m.max_seq_len,
            truncate: m.truncate,
        };
        TextEncoder::load(&language.tokenizer, settings).context("model.language")
    }
}

/// How the tower's folder says pictures are prepared; CLIP's way if it says nothing.
fn processor(dir: &Path, config: &VisionConfig) -> Result<ImageProcessor> {
    let says = ["preprocessor_config.json", "processor_config.json"].iter().any(|f| dir.join(f).exists());
    if says { ImageProcessor::from_dir(dir) } else { Ok(ImageProcessor::clip(config.image_size)) }
}

fn either(key: &str) -> Error {
    Error::new(format!("{key} needs exactly one of `source` and `init`"))
        .hint("`source` loads weights; `init` starts from random values")
}
