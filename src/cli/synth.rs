//! `adfreeze synth`.

use crate::data::synth;
use crate::error::Result;
use crate::report::Reporter;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// What to make.
    kind: Kind,
    /// Folder to write into.
    #[arg(long)]
    out: PathBuf,
    /// Number of training pictures.
    #[arg(long, default_value_t = 4096)]
    n: usize,
    #[arg(long, default_value_t = 42)]
    seed: u64,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Kind {
    /// Pictures of coloured shapes, captions, questions, preference pairs, text, and a tokenizer.
    Shapes,
}

pub fn run(args: &Args, reporter: &Reporter) -> Result<()> {
    let Kind::Shapes = args.kind;
    let manifest = synth::shapes(&args.out, args.n, args.seed)?;
    reporter.info(&format!("{} files and folders in {}", manifest.files.len(), args.out.display()));
    Ok(())
}
