//! A trained model to ask or score with: a run directory, or a folder in Hugging Face layout.

use super::device;
use crate::bail;
use crate::error::{Result, near};
use crate::model::container::is_whole;
use crate::model::init::Place;
use crate::model::vlm::Vlm;
use crate::model::weights::source;
use crate::pipeline::assemble::{Assembly, assemble, sight};
use crate::pipeline::{Opened, loading, newline, open_run};
use crate::report::Reporter;
use crate::spec::{Alpha, Data, Recipe, Resize, Template};
use std::collections::BTreeMap;
use std::path::PathBuf;

/// `--run DIR [--stage NAME] | --model DIR`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// A run directory; its last finished stage is used.
    #[arg(long, conflicts_with = "model", required_unless_present = "model")]
    run: Option<PathBuf>,
    /// With --run: another finished stage.
    #[arg(long, requires = "run")]
    stage: Option<String>,
    /// A whole LLaVA folder or repository, or a language model alone.
    #[arg(long)]
    model: Option<String>,
    /// With --model: a PEFT LoRA folder on top of it.
    #[arg(long, requires = "model")]
    adapter: Option<String>,
    /// How prompts are rendered: plain, vicuna_v1 or chat; default: the run's template, vicuna_v1 for a model.
    #[arg(long, value_enum)]
    template: Option<TemplateArg>,
    /// The longest sample in tokens, of `generate` prompt and answer together; default: what the run's recipe says, for a model (and of
    /// `generate`) its max_position_embeddings.
    #[arg(long, value_name = "TOKENS", value_parser = super::count(1..=MOST_TOKENS))]
    max_seq_len: Option<usize>,
}

/// The longest `--max-seq-len`, as that of a recipe.
const MOST_TOKENS: u64 = i32::MAX as u64;

/// The same where a recipe may stand instead.
#[derive(Debug, clap::Args)]
pub struct Optional {
    /// A run directory; its last finished stage is used.
    #[arg(long, conflicts_with_all = ["model", "recipe"])]
    run: Option<PathBuf>,
    /// Of a recipe, another stage than the first; with --run, another finished stage.
    #[arg(long)]
    stage: Option<String>,
    /// A whole LLaVA folder or repository, or a language model alone.
    #[arg(long, conflicts_with = "recipe")]
    model: Option<String>,
    /// With --model or --run: plain, vicuna_v1 or chat; default: the run's template, vicuna_v1 for a model.
    #[arg(long, value_enum, conflicts_with = "recipe")]
    template: Option<TemplateArg>,
    /// With --model or --run: the longest sample in tokens; default: what the run's recipe says, for a model its
    /// max_position_embeddings.
    #[arg(long, value_name = "TOKENS", conflicts_with = "recipe", value_parser = super::count(1..=MOST_TOKENS))]
    max_seq_len: Option<usize>,
}

impl Optional {
    /// Is a run asked, and not a model?
    pub fn of_run(&self) -> bool {
        self.run.is_some()
    }

    /// A stage, if one is named.
    pub fn stage(&self) -> Option<&str> {
        self.stage.as_deref()
    }

    /// What is named, as [`Args`].
    ///
    /// # Errors
    /// If nothing is.
    pub fn given(&self) -> Result<Args> {
        if self.run.is_none() && self.model.is_none() {
            bail!("--data needs the model whose tokenizer reads it"; "add --model FOLDER or --run FOLDER")
        }
        let (run, stage, model) = (self.run.clone(), self.stage.clone(), self.model.clone());
        Ok(Args { run, stage, model, adapter: None, template: self.template, max_seq_len: self.max_seq_len })
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum TemplateArg {
    Plain,
    #[value(name = "vicuna_v1")]
    VicunaV1,
    Chat,
}

/// How pictures are prepared, where the run's own way does not fit.
#[derive(Debug, clap::Args)]
pub struct Pictures {
    /// How pictures become square: crop, pad as LLaVA-1.5 does, or anyres as LLaVA-1.6 does; default: as the first data entry of the run's stage, crop
    /// for a model (anyres for LLaVA-1.6).
    #[arg(long, value_enum)]
    resize: Option<ResizeArg>,
    /// The same as --resize pad.
    #[arg(long, conflicts_with = "resize")]
    pad: bool,
    /// What becomes of transparency: drop, or white below it; default: as the first data entry of the run's stage, drop for
    /// a model.
    #[arg(long, value_enum)]
    alpha: Option<AlphaArg>,
    /// With anyres: a height and width in pixels that tiles may fill, e.g. 336x672; may be given several times. Default: as the
    /// first data entry of the run's stage; for a model what its folder says, else LLaVA-1.6's.
    #[arg(long, value_name = "HxW", value_delimiter = ',', value_parser = grid)]
    grid: Vec<[usize; 2]>,
}

/// `336x672`.
fn grid(text: &str) -> Result<[usize; 2], String> {
    let number = |n: &str| n.trim().parse().ok().filter(|n| (1..=1 << 14).contains(n));
    let both = text.split_once(['x', '×']).and_then(|(h, w)| Some([number(h)?, number(w)?]));
    both.ok_or_else(|| "a height and a width in pixels, up to 16384, e.g. 336x672".to_string())
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum ResizeArg {
    Crop,
    Pad,
    Anyres,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum AlphaArg {
    Drop,
    White,
}

impl Pictures {
    /// What the arguments say, else what is usual for the model: all of a data entry but its files.
    pub fn of(&self, model: &Loaded, reporter: &Reporter) -> Result<Data> {
        let resize = match self.resize {
            Some(ResizeArg::Crop) => Resize::Crop,
            Some(ResizeArg::Pad) => Resize::Pad,
            Some(ResizeArg::Anyres) => Resize::Anyres,
            None if self.pad => Resize::Pad,
            None => model.pictures.resize,
        };
        let alpha = match self.alpha {
            Some(AlphaArg::Drop) => Alpha::Drop,
            Some(AlphaArg::White) => Alpha::White,
            None => model.pictures.alpha,
        };
        let tiles = resize == Resize::Anyres;
        if !tiles && !self.grid.is_empty() {
            bail!("--grid, but pictures are not cut into tiles"; "say so with --resize anyres, or leave --grid out")
        }
        if tiles && model.newline_is_random {
            reporter.warn(&newline::told());
        }
        let own = || model.pictures.grid_pinpoints.clone();
        let grid_pinpoints = if self.grid.is_empty() { own().filter(|_| tiles) } else { Some(self.grid.clone()) };
        Ok(Data { resize, alpha, grid_pinpoints, ..Data::new(PathBuf::new()) })
    }
}

/// Model, tokenizer, picture preparation, template.
pub struct Loaded {
    pub vlm: Vlm,
    pub assembly: Assembly,
    pub template: Template,
    /// How pictures are prepared: as in the first data entry of the run's stage.
    pub pictures: Data,
    /// Has nothing trained the newline of tiles?
    newline_is_random: bool,
}

impl Args {
    /// Is a run asked, and not a model?
    pub fn of_run(&self) -> bool {
        self.run.is_some()
    }

    /// `--max-seq-len`, if it is given.
    pub fn max_seq_len(&self) -> Option<usize> {
        self.max_seq_len
    }

    /// Loads what the arguments name; what was assumed on the way is a warning.
    pub fn load(&self, compute: &device::Args, reporter: &Reporter) -> Result<Loaded> {
        let device = compute.open()?;
        let place = |recipe| Place::new(device, compute.dtype().unwrap_or(recipe));
        let mut loaded = match (&self.run, &self.model) {
            (Some(run), _) => {
                if !run.exists() {
                    bail!("there is no run {}", run.display(); "{}", near::path_hint(run, "give the output_dir of a recipe that was trained"))
                }
                let Opened { recipe, stage, mut assembly, state } =
                    loading(reporter, || open_run(run, self.stage.as_deref(), place))?;
                let pictures = recipe.stage[&stage].data.first().cloned();
                let mut pictures = pictures.unwrap_or_else(|| Data::new(PathBuf::new()));
                if !pictures.has_tiles() {
                    pictures.grid_pinpoints = assembly.grids.clone();
                }
                let newline_is_random = newline::untrained(&recipe, &mut assembly, &stage)?;
                Loaded { newline_is_random, vlm: state.vlm, assembly, template: recipe.model.template, pictures }
            }
            (None, Some(model)) => {
                let recipe = bare(model, self.adapter.as_deref())?;
                let assembly = loading(reporter, || assemble(&recipe, &place(recipe.model.dtype)))?;
                let vlm = assembly.vlm.clone();
                let resize = if vlm.newline.is_some() { Resize::Anyres } else { Resize::default() };
                let grid_pinpoints = assembly.grids.clone();
                let pictures = Data { resize, grid_pinpoints, ..Data::new(PathBuf::new()) };
                assembly.begins.iter().for_each(|w| reporter.warn(w));
                let newline_is_random = assembly.newline_is_random;
                Loaded { newline_is_random, vlm, assembly, template: Template::default(), pictures }
            }
            (None, None) => bail!("neither --run nor --model is given"),
        };
        loaded.assembly.warnings.iter().for_each(|w| reporter.warn(w));
        let encoder = loaded.assembly.encoder.seeing(sight(&loaded.vlm)?);
        // A folder says no limit but the positions, of which soft tokens take some.
        let own = || {
            let positions = loaded.vlm.language.config.max_position_embeddings;
            self.model.as_ref().map(|_| positions.saturating_sub(loaded.vlm.prefix_rows()[0]).max(1))
        };
        let limit = self.max_seq_len.or_else(own).unwrap_or(encoder.max_seq_len());
        loaded.assembly.encoder = encoder.holding(limit);
        loaded.template = match self.template {
            Some(TemplateArg::Plain) => Template::Plain,
            Some(TemplateArg::VicunaV1) => Template::VicunaV1,
            Some(TemplateArg::Chat) => Template::Chat,
            None => loaded.template,
        };
        Ok(loaded)
    }
}

/// A recipe without stages around one model.
fn bare(model: &str, adapter: Option<&str>) -> Result<Recipe> {
    let whole = is_whole(&source::resolve(model, &["config.json"])?.dir);
    let mut m = if whole {
        serde_json::json!({ "source": model })
    } else {
        serde_json::json!({ "language": { "source": model } })
    };
    if let Some(a) = adapter {
        m["adapter"] = a.into();
    }
    let recipe =
        serde_json::json!({ "model": m, "stages": [], "output_dir": "", "stage": BTreeMap::<String, u8>::new() });
    Ok(serde_json::from_value(recipe)?)
}
