//! `adfreeze train`.

use super::{device, next};
use crate::error::Result;
use crate::model::init::Place;
use crate::pipeline::signals::{End, STOPPED, Signals};
use crate::pipeline::{self, Options, Outcome};
use crate::recipe;
use crate::report::Reporter;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipe (TOML).
    recipe: PathBuf,
    /// Override a value of the recipe by its path, e.g. --set stage.sft.lr=1e-4 or --set model.dtype=bf16; may be given several
    /// times. What holds for every stage that does not say otherwise is set by defaults: --set defaults.seed=7.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// Run only these stages, separated by commas.
    #[arg(long, value_delimiter = ',')]
    stages: Vec<String>,
    #[command(flatten)]
    compute: device::Args,
    /// Go on although the recipe or its inputs have changed since the run began.
    #[arg(long)]
    allow_changes: bool,
}

pub fn run(args: &Args, reporter: &'static Reporter) -> Result<ExitCode> {
    let signals = Signals::listen(End::GoesOn, |text| reporter.stopping(text))?;
    let device = args.compute.open()?;
    let mut recipe = recipe::load(&args.recipe, &args.sets)?;
    // Part of the run: the same command resumes it.
    recipe.model.dtype = args.compute.dtype().unwrap_or(recipe.model.dtype);
    let options = Options {
        place: Place::new(device, recipe.model.dtype),
        stages: args.stages.clone(),
        allow_changes: args.allow_changes,
        signals,
    };
    Ok(match pipeline::train(&recipe, &options, reporter)? {
        Outcome::Finished => {
            next::told(&recipe, &next::program()).iter().for_each(|line| reporter.info(line));
            ExitCode::SUCCESS
        }
        Outcome::Stopped => ExitCode::from(STOPPED),
    })
}
