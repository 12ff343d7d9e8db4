//! `adfreeze bench`.

use super::{child, device, stdout};
use crate::bail;
use crate::bench::preset::{NAMES, Preset};
use crate::bench::{Bench, Output, freeze, kernels, step, tell_machine, zoo};
use crate::error::Result;
use crate::model::init::Place;
use crate::report::Reporter;
use crate::spec::{Activations, DType};
use std::io::Write;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Every op of training beside its floor: bytes at the measured bandwidth of a copy, or FLOPs at the measured rate of a
    /// large matrix product.
    Kernels(Kernels),
    /// Training steps at a model's shape: tokens/s, share of the possible FLOPs, memory, time by part.
    Step(Step),
    /// What freezing saves: the projector, LoRA, the last two layers or everything training, each with and without recompute,
    /// beside the published ratios.
    Freeze(Freeze),
    /// Every projector and adapter on a recipe's first two stages: parameters, visual tokens, time of a step, held-out accuracy.
    Zoo(Zoo),
}

#[derive(Debug, clap::Args)]
struct Common {
    #[command(flatten)]
    compute: device::Args,
    /// One JSON object a line, the machine first.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
struct Kernels {
    #[command(flatten)]
    common: Common,
    /// Only kernels whose name holds this.
    #[arg(long, value_name = "SUBSTRING")]
    only: Option<String>,
    /// Small shapes, as on a CPU, of which some fit in its caches: a copy may then seem faster than its floor. The others are
    /// those of LLaVA-1.5-7B at 16,384 rows.
    #[arg(long)]
    small: bool,
}

#[derive(Debug, clap::Args)]
struct Step {
    #[command(flatten)]
    common: Common,
    /// The model's shape: llava-1.5-7b, smollm2-135m-dinov2-s or tiny.
    #[arg(long)]
    preset: String,
    /// Fill it with random weights.
    #[arg(long)]
    random_init: bool,
    /// Which steps to measure.
    #[arg(long, value_enum, value_delimiter = ',', default_value = "align,sft,dpo")]
    work: Vec<Work>,
    /// Samples (pairs) of a step, in one micro-batch; default: the preset's.
    #[arg(long, value_parser = super::count(0..=65_536))]
    micro: Option<usize>,
    /// Tokens of a sequence, the picture's among them; default: the preset's.
    #[arg(long, value_parser = super::count(0..=1_048_576))]
    seq: Option<usize>,
    /// Timed steps.
    #[arg(long, default_value_t = 5, value_parser = super::count(0..=1_000_000))]
    steps: usize,
    /// Rank of the low-rank updates; default: the preset's.
    #[arg(long, value_parser = super::count(0..=1_048_576))]
    rank: Option<usize>,
    /// What a forward pass keeps, as in a recipe.
    #[arg(long, value_enum, default_value = "auto")]
    activations: Kept,
    /// TFLOP/s of the device by its data sheet (H100 and H200, bf16: 990), to compare with.
    #[arg(long, value_name = "TFLOPS")]
    peak: Option<f64>,
}

#[derive(Debug, clap::Args)]
struct Freeze {
    #[command(flatten)]
    common: Common,
    /// The model's shape, filled with random weights: llava-1.5-7b, smollm2-135m-dinov2-s or tiny.
    #[arg(long)]
    preset: String,
    /// Samples of a step, in one micro-batch; default: the preset's.
    #[arg(long, value_parser = super::count(0..=65_536))]
    micro: Option<usize>,
    /// Tokens of a sequence, the picture's among them; default: the preset's.
    #[arg(long, value_parser = super::count(0..=1_048_576))]
    seq: Option<usize>,
    /// Timed steps.
    #[arg(long, default_value_t = 5, value_parser = super::count(0..=1_000_000))]
    steps: usize,
    /// Measure this alone, in this process, and write what came of it as JSON: `machine`, or a configuration's number.
    #[arg(long, hide = true)]
    part: Option<String>,
}

#[derive(Debug, clap::Args)]
struct Zoo {
    #[command(flatten)]
    common: Common,
    /// The recipe whose first two stages are run.
    #[arg(default_value = "recipes/quickstart.toml")]
    recipe: PathBuf,
    /// Override a value of the recipe, for every entry, e.g. --set stage.sft.max_steps=400.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    sets: Vec<String>,
    /// The folder of all runs; the same command goes on where it was stopped.
    #[arg(long, default_value = "runs/zoo")]
    out: PathBuf,
    /// Only entries whose name holds this.
    #[arg(long, value_name = "SUBSTRING")]
    only: Option<String>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Work {
    /// The projector, on captions.
    Align,
    /// Projector and low-rank updates, on answers.
    Sft,
    /// Low-rank updates, on pairs of answers.
    Dpo,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Kept {
    Auto,
    None,
    Minimal,
    Recompute,
}

pub fn run(args: &Args, reporter: &Reporter) -> Result<()> {
    match &args.what {
        What::Kernels(a) => a.run(),
        What::Step(a) => a.run(),
        What::Freeze(a) => a.run(),
        What::Zoo(a) => a.run(reporter),
    }
}

impl Common {
    fn place(&self) -> Result<Place> {
        Ok(Place::new(self.compute.open()?, self.compute.dtype().unwrap_or(DType::Auto)))
    }

    /// Measures the machine at `place` and hands on to `f`.
    fn with(&self, place: Place, f: impl FnOnce(&mut Bench) -> Result<()>) -> Result<()> {
        let mut to = stdout::Stdout::lock();
        f(&mut Bench::new(place, Output { to: &mut to, json: self.json })?)
    }
}

impl Kernels {
    fn run(&self) -> Result<()> {
        let place = self.common.place()?;
        let small = self.small || place.device.is_cpu();
        let shapes = if small { kernels::Shapes::SMALL } else { kernels::Shapes::LLAVA };
        let items = kernels::choose(shapes, &place, self.only.as_deref())?;
        self.common.with(place, |bench| kernels::run(bench, &items))
    }
}

impl Step {
    fn run(&self) -> Result<()> {
        let preset = Preset::named(&self.preset)?;
        if !self.random_init {
            bail!("a step is measured on random weights only"; "say so with --random-init; presets: {}", NAMES.join(", "))
        }
        let work = |w: &Work| match w {
            Work::Align => step::Work::Align,
            Work::Sft => step::Work::Sft,
            Work::Dpo => step::Work::Dpo,
        };
        let options = step::Options {
            preset,
            works: self.work.iter().map(work).collect(),
            micro: self.micro,
            sequence: self.seq,
            steps: self.steps,
            rank: self.rank,
            activations: match self.activations {
                Kept::Auto => Activations::Auto,
                Kept::None => Activations::None,
                Kept::Minimal => Activations::Minimal,
                Kept::Recompute => Activations::Recompute,
            },
            peak: self.peak.map(|tera| tera * 1e12),
        };
        options.check()?;
        self.common.with(self.common.place()?, |bench| step::run(bench, &options))
    }
}

impl Freeze {
    fn run(&self) -> Result<()> {
        let preset = Preset::named(&self.preset)?;
        let options = freeze::Options { preset, micro: self.micro, sequence: self.seq, steps: self.steps };
        options.check()?;
        match self.part.as_deref() {
            Some("machine") => return child::answer(|| tell_machine(&self.common.place()?, self.common.json)),
            Some(n) => {
                let Ok(n) = n.parse() else { bail!("--part {n}: there is no such part") };
                return child::answer(|| freeze::one(&self.common.place()?, &options, n));
            }
            None => {}
        }
        // No device is opened here: what this process held of a GPU's memory, the others would lack.
        let mut to = stdout::Stdout::lock();
        writeln!(to, "{}", child::ask::<String>("machine")?)?;
        to.flush()?;
        freeze::run(&mut Output { to: &mut to, json: self.common.json }, |i| child::ask(&i.to_string()))
    }
}

impl Zoo {
    fn run(&self, reporter: &Reporter) -> Result<()> {
        let options = zoo::Options {
            recipe: self.recipe.clone(),
            sets: self.sets.clone(),
            out: self.out.clone(),
            only: self.only.clone(),
        };
        let mut to = stdout::Stdout::lock();
        zoo::run(&options, &self.common.place()?, reporter, &mut Output { to: &mut to, json: self.common.json })
    }
}
