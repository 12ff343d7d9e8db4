//! `adfreeze data show`: what a sample is to the model, token by token.

use super::{device, hints, model};
use crate::bail;
use crate::data::{Dataset, IGNORE, Item, Sample, TextEncoder};
use crate::error::near::suggestion;
use crate::error::{Error, Result};
use crate::model::init::Place;
use crate::pipeline::assemble::{assemble, sight};
use crate::pipeline::make_data;
use crate::pipeline::stage::dataset;
use crate::pipeline::state::{State, lineage};
use crate::recipe;
use crate::report::Reporter;
use crate::spec;
use std::io::Write;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, clap::Subcommand)]
enum Command {
    /// Print ids, pieces and labels of samples: of a recipe's stage, or of a data file for a model or a run.
    Show(Box<Show>),
}

#[derive(Debug, clap::Args)]
struct Show {
    /// The recipe (TOML); instead, --model or --run with --data.
    #[arg(conflicts_with = "data", required_unless_present = "data")]
    recipe: Option<PathBuf>,
    /// Override a value of the recipe, as in `train`.
    #[arg(long = "set", value_name = "KEY=VALUE", requires = "recipe")]
    sets: Vec<String>,
    /// Conversations (JSON or JSONL).
    #[arg(long)]
    data: Option<PathBuf>,
    /// Folder of the pictures; default: the folder of the data file.
    #[arg(long, requires = "data")]
    images: Option<PathBuf>,
    /// How many samples, from the first one on.
    #[arg(long, default_value_t = 1)]
    n: usize,
    /// Only the sample with this id.
    #[arg(long)]
    id: Option<String>,
    /// One JSON object a line: id, ids, pieces, labels (null: not trained on).
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    model: model::Optional,
    #[command(flatten)]
    pictures: model::Pictures,
    #[command(flatten)]
    compute: device::Args,
}

impl Args {
    /// An error in the words of what is given: a recipe has keys, a model has arguments.
    pub fn told(&self, e: Error) -> Error {
        let Command::Show(show) = &self.command;
        if show.recipe.is_some() { e } else { hints::of_command(e, show.model.of_run()) }
    }
}

/// One line of `--json`.
#[derive(serde::Serialize)]
struct Line<'a> {
    id: &'a str,
    /// `chosen` or `rejected`, of a pair.
    #[serde(skip_serializing_if = "Option::is_none")]
    answer: Option<&'static str>,
    ids: &'a [u32],
    pieces: Vec<String>,
    labels: Vec<Option<i32>>,
}

pub fn run(args: &Args, reporter: &Reporter) -> Result<()> {
    let Command::Show(show) = &args.command;
    let (encoder, set) = show.load(reporter)?;
    encoder.notices().iter().for_each(|w| reporter.warn(w));
    let wanted = |item: &&Item| show.id.as_ref().is_none_or(|id| item.id() == id);
    let items: Vec<&Item> = set.items.iter().filter(wanted).take(show.n.max(1)).collect();
    if let (true, Some(id)) = (items.is_empty(), &show.id) {
        let some: Vec<&str> = set.items.iter().take(5).map(Item::id).collect();
        bail!("there is no sample {id}"; "the first ones are {}", some.join(", "))
    }
    let mut out = super::stdout::Stdout::lock();
    for item in items {
        match item {
            Item::Sample(s) => show.print(&mut out, &encoder, s, None)?,
            Item::Pair(chosen, rejected) => {
                show.print(&mut out, &encoder, chosen, Some("chosen"))?;
                show.print(&mut out, &encoder, rejected, Some("rejected"))?;
            }
        }
    }
    Ok(())
}

impl Show {
    fn load(&self, reporter: &Reporter) -> Result<(TextEncoder, Dataset)> {
        let (Some(path), model) = (&self.recipe, &self.model) else {
            let Some(data) = &self.data else { bail!("neither a recipe nor --data is given") };
            let m = self.model.given()?.load(&self.compute, reporter)?;
            let how = self.pictures.of(&m, reporter)?;
            let data = spec::Data { path: data.clone(), images: self.images.clone(), ..how };
            let set = Dataset::conversations(&[data], &m.assembly.encoder, m.template)?;
            return Ok((m.assembly.encoder, set));
        };
        let recipe = recipe::load(path, &self.sets)?;
        let stages: Vec<&str> = recipe.stages.iter().map(String::as_str).collect();
        let name = match (model.stage(), stages.first()) {
            (Some(name), _) if stages.contains(&name) => name,
            (Some(unknown), _) => bail!("the recipe has no stage `{unknown}`"; "{}", suggestion(unknown, &stages)),
            (None, Some(first)) => first,
            (None, None) => bail!("the recipe has no stage"; "list one under `stages`"),
        };
        make_data(&recipe, reporter)?;
        let assembly = assemble(&recipe, &Place::new(self.compute.open()?, recipe.model.dtype))?;
        let mut state = State::new(assembly.vlm.clone(), assembly.start_adapter.clone());
        for ancestor in lineage(&recipe, name)? {
            state.enter(&recipe.stage[ancestor], ancestor)?;
        }
        let encoder = assembly.encoder.seeing(sight(&state.vlm)?);
        let set = dataset(&recipe, &recipe.stage[name], &encoder)?;
        Ok((encoder, set))
    }

    fn print(
        &self,
        out: &mut dyn Write,
        encoder: &TextEncoder,
        s: &Sample,
        answer: Option<&'static str>,
    ) -> Result<()> {
        if self.json {
            let pieces = s.ids.iter().map(|id| encoder.piece(*id)).collect();
            let labels = s.labels.iter().map(|l| (*l != IGNORE).then_some(*l)).collect();
            serde_json::to_writer(&mut *out, &Line { id: &s.id, answer, ids: &s.ids, pieces, labels })?;
            return Ok(writeln!(out)?);
        }
        let which = answer.map_or(String::new(), |a| format!(", {a} answer"));
        writeln!(out, "sample {}{which}: {} tokens, {} of them trained on", s.id, s.ids.len(), s.targets())?;
        writeln!(out, "{:>6}  {:>7}  {:<7}  piece", "at", "id", "trained")?;
        let mut at = 0;
        for run in s.ids.chunk_by(|a, b| a == b && Some(*a) == encoder.image_token_id()) {
            let trained = if s.labels[at] == IGNORE { "" } else { "yes" };
            let piece: String = encoder.piece(run[0]).chars().flat_map(shown).take(40).collect();
            let times = if run.len() > 1 { format!(" × {}", run.len()) } else { String::new() };
            writeln!(out, "{at:>6}  {:>7}  {trained:<7}  {piece}{times}", run[0])?;
            at += run.len();
        }
        Ok(writeln!(out)?)
    }
}

/// A character as a terminal can show it.
fn shown(c: char) -> impl Iterator<Item = char> {
    let escaped = c.is_control().then(|| c.escape_default());
    escaped.into_iter().flatten().chain((!c.is_control()).then_some(c))
}
