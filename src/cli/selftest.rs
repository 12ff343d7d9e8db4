//! `adfreeze selftest`.

use super::device;
use crate::error::Result;
use crate::pipeline::selftest;
use crate::report::Reporter;
use std::process::ExitCode;

#[derive(Debug, clap::Args)]
pub struct Args {
    /// Where to compute: auto, cpu, cuda or cuda:N.
    #[arg(long, default_value = "auto")]
    device: String,
    /// Only one half.
    #[arg(long, value_enum)]
    only: Option<Half>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Half {
    /// Every op, forward and backward.
    Ops,
    /// A tiny training of three stages, and going on from its checkpoints.
    Training,
}

pub fn run(args: &Args, reporter: &Reporter) -> Result<ExitCode> {
    let device = device::open(&args.device)?;
    let (at, mut out) = (device.location(), super::stdout::Stdout::lock());
    let mut good = true;
    if args.only != Some(Half::Training) {
        reporter.info(&format!("every op on {at:?}, against f64 on the CPU"));
        good &= selftest::ops(&device, reporter, &mut out)?;
    }
    if args.only != Some(Half::Ops) {
        reporter.info(&format!("a tiny training of three stages on {at:?}, against its curve in f64"));
        good &= selftest::training(&device, reporter, &mut out)?;
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
