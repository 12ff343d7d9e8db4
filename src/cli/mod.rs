//! Commands: arguments in, exit code out. One file per command.

mod bench;
mod check;
mod child;
mod data;
mod device;
mod flags;
mod generate;
mod hints;
mod model;
mod next;
mod score;
mod selftest;
mod stdout;
mod synth;
mod train;

use crate::report::{LogFormat, Reporter, width};
use clap::builder::RangedU64ValueParser;
use clap::{Parser, Subcommand, ValueEnum};
use std::io::{IsTerminal, Write};
use std::ops::RangeInclusive;
use std::process::ExitCode;
use tracing_subscriber::EnvFilter;

/// Trains vision-language models on frozen backbones: projector, LoRA SFT and DPO from one recipe.
///
/// A recipe (TOML) names a vision tower (CLIP) and a language model (LLaMA) in Hugging Face layout, whose weights stay frozen,
/// and a list of stages: first a projector learns on captions to turn picture features into visual tokens (align), then LoRA
/// adapters on questions and answers (SFT), then on preferred and rejected answers (DPO). What was trained is left in the formats
/// of PEFT and transformers.
#[derive(Debug, Parser)]
#[command(
    name = "adfreeze",
    version = env!("ADFREEZE_VERSION"),
    arg_required_else_help = true,
    after_help = FIRST_STEPS
)]
pub struct Args {
    /// How progress is written to stderr.
    #[arg(long, value_enum, default_value = "auto", global = true)]
    log: Log,
    #[command(subcommand)]
    command: Command,
}

/// Below the list of commands.
const FIRST_STEPS: &str = "First steps, in a checkout, with no network and no GPU:
  adfreeze check recipes/quickstart.toml    what would train, on what, in how many steps
  adfreeze train recipes/quickstart.toml    trains all three stages, some minutes
  adfreeze generate --run runs/quickstart --image FILE --prompt TEXT

Then copy a recipe from recipes/ and name your own models and data in it. A setting may also be
changed for one run: --set stage.sft.lr=1e-4. `adfreeze COMMAND --help` says more of each command.";

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Log {
    /// A progress bar on a terminal, plain lines elsewhere.
    Auto,
    /// One JSON object a line.
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Train the stages of a recipe in order; the same command again goes on where it stopped.
    ///
    /// Finished stages are skipped and a stopped one goes on from its newest checkpoint, to the same bits. Ctrl-C (or TERM, or
    /// USR1) ends the step that is running, writes a checkpoint and exits with code 75.
    #[command(after_help = "Examples:
  adfreeze train recipes/quickstart.toml
  adfreeze train my.toml --set stage.sft.lr=1e-4 --set output_dir=runs/lr1e-4
  adfreeze train my.toml --stages align            only the projector
  adfreeze train my.toml --device cuda:0           on the first GPU, in bf16

Everything of the run lies in the recipe's output_dir: checkpoints, metrics.jsonl (a line a step),
results.json (held-out figures), and the trained projector and adapters in NN-STAGE/final.")]
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

const WRONG_ARGUMENTS: u8 = 2;

/// Runs the command line; errors go to stderr as cause, blank line, hint. Exit codes: 0 done, 1 an error, 2 wrong
/// arguments, 75 a training stopped by a signal (the same command goes on); other commands end by the signal, which shells tell
/// as 128 and its number (130: Ctrl-C, 143: SIGTERM).
pub fn main() -> ExitCode {
    let args = match Args::try_parse() {
        Ok(args) => args,
        Err(e) => {
            let line: Vec<String> = std::env::args_os().map(|a| a.to_string_lossy().into_owned()).collect();
            match flags::told(&e, &line) {
                // Nothing is left to do about a stderr that is closed.
                Some(text) => _ = writeln!(std::io::stderr(), "{text}"),
                None => show(&e),
            }
            return ExitCode::from(u8::try_from(e.exit_code()).unwrap_or(WRONG_ARGUMENTS));
        }
    };
    let format = match args.log {
        Log::Auto => LogFormat::Auto,
        Log::Json => LogFormat::Json,
    };
    trace(format);
    // For as long as the process: what answers signals reports as well.
    let reporter: &'static Reporter = Box::leak(Box::new(Reporter::new(format)));
    let result = match args.command {
        Command::Train(a) => train::run(&a, reporter),
        Command::Check(a) => check::run(&a, reporter).map(done),
        Command::Generate(a) => generate::run(&a, reporter).map(done).map_err(|e| hints::of_command(e, a.of_run())),
        Command::Score(a) => score::run(&a, reporter).map_err(|e| hints::of_command(e, a.of_run())),
        Command::Data(a) => data::run(&a, reporter).map(done).map_err(|e| a.told(e)),
        Command::Synth(a) => synth::run(&a, reporter).map(done),
        Command::Selftest(a) => selftest::run(&a, reporter),
        Command::Bench(a) => bench::run(&a, reporter).map(done),
    };
    match result {
        Ok(code) => code,
        Err(e) => {
            reporter.error(&e.or_hint(UNKNOWN));
            ExitCode::FAILURE
        }
    }
}

/// Help, the version, or what clap says is wrong, within the terminal.
fn show(e: &clap::Error) {
    let columns = if e.use_stderr() { width::of_stderr() } else { width::of_stdout() };
    let columns = columns.or(width::of_environment()).unwrap_or(usize::MAX).min(HELP);
    let text = width::wrap_help(&e.render().to_string(), columns);
    // Nothing is left to do about a stream that is closed.
    let _ = match e.use_stderr() {
        true => std::io::stderr().write_all(text.as_bytes()),
        false => std::io::stdout().write_all(text.as_bytes()),
    };
}

/// Of what should not happen, and so has no hint.
const UNKNOWN: &str = "nothing is known that mends this: please report it with the command, the recipe and what `adfreeze --version` says";

/// Longer lines of help are hard to read on any terminal.
const HELP: usize = 100;

/// A whole number within bounds; beyond them, what it counts would be allocated or done without end.
fn count(range: RangeInclusive<u64>) -> RangedU64ValueParser<usize> {
    RangedU64ValueParser::new().range(range)
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
    let lines = lines.with_writer(stdout::Stderr::default);
    match format {
        LogFormat::Auto => lines.init(),
        LogFormat::Json => lines.json().flatten_event(true).init(),
    }
}
