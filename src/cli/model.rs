//! A trained model to ask or score with: a run directory, or a folder in Hugging Face layout.

use crate::bail;
use crate::error::Result;
use crate::model::vlm::Vlm;
use crate::model::weights::{is_llava, source};
use crate::pipeline::assemble::{Assembly, assemble};
use crate::pipeline::open_run;
use crate::recipe::schema::{Recipe, Template};
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
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum TemplateArg {
    Plain,
    #[value(name = "vicuna_v1")]
    VicunaV1,
    Chat,
}

/// Model, tokenizer, picture preparation, template.
pub struct Loaded {
    pub vlm: Vlm,
    pub assembly: Assembly,
    pub template: Template,
}

impl Args {
    /// Loads what the arguments name.
    pub fn load(&self) -> Result<Loaded> {
        let (assembly, vlm, template) = match (&self.run, &self.model) {
            (Some(run), _) => {
                let (recipe, assembly, state) = open_run(run, self.stage.as_deref())?;
                (assembly, state.vlm, recipe.model.template)
            }
            (None, Some(model)) => {
                let assembly = assemble(&bare(model, self.adapter.as_deref())?)?;
                let vlm = assembly.vlm.clone();
                (assembly, vlm, Template::default())
            }
            (None, None) => bail!("neither --run nor --model is given"),
        };
        let template = self.template.map_or(template, |t| match t {
            TemplateArg::Plain => Template::Plain,
            TemplateArg::VicunaV1 => Template::VicunaV1,
            TemplateArg::Chat => Template::Chat,
        });
        Ok(Loaded { vlm, assembly, template })
    }
}

/// A recipe without stages around one model.
fn bare(model: &str, adapter: Option<&str>) -> Result<Recipe> {
    let llava = is_llava(&source::resolve(model, &["config.json"])?.dir);
    let mut m = if llava {
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
