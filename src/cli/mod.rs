//! Commands: arguments in, exit code out. One file per command.

mod bench;
mod check;
mod child;
mod data;
mod device;
mod generate;
mod model;
mod score;
mod selftest;
mod stdout;
mod synth;
mod train;

use crate::report::{LogFormat, Reporter};
use clap::{Parser, Subcommand, ValueEnum};
use std::io::IsTerminal;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Trains vision-language models on frozen backbones: projector, LoRA SFT and DPO from one recipe.
#[derive(Debug, Parser)]
#[command(name = "adfreeze", version = env!("ADFREEZE_VERSION"), about, arg_required_else_help = true)]
pub struct Args {
    /// How progress is written to stderr.
    #[arg(long, value_enum, default_value = "auto", global = true)]
    log: Log,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Log {
    /// A progress bar on a terminal, plain lines elsewhere.
    Auto,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the stages of a recipe in order; the same command again resumes.
    Train(train::Args),
    /// Validate a recipe, its weights, tokenizer and data, without training.
    Check(check::Args),
    /// Answer a prompt about a picture.
    Generate(generate::Args),
    /// Loss and log-probabilities of every sample of a data file.
    Score(score::Args),
    /// See what is trained: tokens and labels of samples.
    Data(data::Args),
    /// Make the built-in data.
    Synth(synth::Args),
    /// Compute every op and a tiny training on this machine and compare them with f64.
    Selftest(selftest::Args),
    /// Measure kernels and training steps on this machine.
    Bench(bench::Args),
}

/// Runs the command line; errors go to stderr as cause, blank line, hint. Exit codes: 0 done, 1 an error, 2 wrong
/// arguments, 75 stopped by a signal (the same command goes on).
pub fn main() -> ExitCode {
    let args = Args::parse();
    let format = match args.log {
        Log::Auto => LogFormat::Auto,
        Log::Json => LogFormat::Json,
    };
    trace(format);
    let reporter = Reporter::new(format);
    let result = match args.command {
        Command::Train(a) => train::run(&a, &reporter),
        Command::Check(a) => check::run(&a, &reporter).map(done),
        Command::Generate(a) => generate::run(&a, &reporter).map(done),
        Command::Score(a) => score::run(&a, &reporter).map(done),
        Command::Data(a) => data::run(&a, &reporter).map(done),
        Command::Synth(a) => synth::run(&a, &reporter).map(done),
        Command::Selftest(a) => selftest::run(&a, &reporter),
        Command::Bench(a) => bench::run(&a, &reporter).map(done),
    };
    match result {
        Ok(code) => code,
        Err(e) => {
            reporter.error(&e);
            ExitCode::FAILURE
        }
    }
}

fn done((): ()) -> ExitCode {
    ExitCode::SUCCESS
}

/// What the rooms below notice goes to stderr, in the form of the other lines there: warnings, and more if
/// `ADFREEZE_LOG` (the syntax of `RUST_LOG`) asks for it.
fn trace(format: LogFormat) {
    let filter = EnvFilter::try_from_env("ADFREEZE_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    let spans = tracing_subscriber::fmt::format::FmtSpan::CLOSE;
    let color = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none_or(|v| v.is_empty());
    let lines = tracing_subscriber::fmt().with_env_filter(filter).with_span_events(spans).with_ansi(color);
    let lines = lines.with_writer(std::io::stderr);
    match format {
        LogFormat::Auto => lines.init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
}
