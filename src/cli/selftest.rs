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
}

pub fn run(args: &Args, reporter: &Reporter) -> Result<ExitCode> {
    let device = device::open(&args.device)?;
    reporter.info(&format!("every op on {:?}, against f64 on the CPU", device.location()));
    let good = selftest::ops(&device, reporter, &mut super::stdout::Stdout::lock())?;
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
