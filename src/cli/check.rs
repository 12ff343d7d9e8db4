//! `adfreeze check`.

use crate::error::Result;
use crate::pipeline::check;
use crate::recipe;
use crate::report::Reporter;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// The recipe (TOML).
    recipe: PathBuf,
    /// Override a value, as in `train`.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
}

pub fn run(args: &Args, reporter: &Reporter) -> Result<()> {
    let recipe = recipe::load(&args.recipe, &args.sets)?;
    check::check(&recipe, reporter, &mut super::stdout::Stdout::lock())
}
