//! Whole training steps at a real model's shape with random weights: the pipeline's own step (`train::step`) and optimizer on
//! made-up samples. What is told of a speed comes from steps without a wait in between; the parts from other ones.

use super::flops::{FORMULA, Flops, Pass};
use super::noise::Noise;
use super::parts::{PARTS, by_part};
use super::preset::Preset;
use super::samples::Batch;
use super::timer::Times;
use super::{Bench, constant_optimizer, scaled, time, type_name};
use crate::adapters::lora;
use crate::bail;
use crate::data::Item;
use crate::error::{Context, Result};
use crate::model::params::Module;
use crate::model::params::Param;
use crate::model::role::Part;
use crate::model::segment::Kept;
use crate::model::vlm::{Load, Vlm};
use crate::ops::Weight;
use crate::ops::random::Key;
use crate::pipeline::memory;
use crate::report::human;
use crate::spec::{self, Activations, DpoLoss, Reference};
use crate::train::step::{ReferenceTable, StepConfig, Task, compute, pair_logps};
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// A stage of the usual pipeline.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Work {
    /// The projector alone, on a picture and its caption.
    Align,
    /// The projector and low-rank updates of the language model, on answers.
    Sft,
    /// The low-rank updates, on pairs of answers; the reference's log-probabilities are given.
    Dpo,
}

impl Work {
    fn name(self) -> &'static str {
        match self {
            Self::Align => "align",
            Self::Sft => "sft",
            Self::Dpo => "dpo",
        }
    }
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// The model's shape.
    pub preset: Preset,
    /// Which steps; run in the order of the pipeline.
    pub works: BTreeSet<Work>,
    /// Samples (pairs) of a step, which is one micro-batch; default: the preset's.
    pub micro: Option<usize>,
    /// Tokens of a sequence; default: the preset's.
    pub sequence: Option<usize>,
    /// Timed steps.
    pub steps: usize,
    /// Rank of the low-rank updates; default: the preset's.
    pub rank: Option<usize>,
    /// What a pass keeps.
    pub activations: Activations,
    /// FLOP/s that the device's data sheet promises.
    pub peak: Option<f64>,
}

impl Options {
    /// Can this be measured? To be asked before anything is.
    pub fn check(&self) -> Result<()> {
        let none = |n: Option<usize>| n == Some(0);
        if self.steps == 0 || none(self.micro) || none(self.rank) || self.peak.is_some_and(|p| p.is_nan() || p <= 0.0) {
            bail!("--steps, --micro, --rank or --peak is not above 0"; "leave it out for the default")
        }
        room(&self.preset, self.sequence)
    }
}

/// A sequence of so many tokens must hold a picture and a text.
pub(super) fn room(preset: &Preset, sequence: Option<usize>) -> Result<()> {
    let (visual, room) = (preset.vision.num_patches(), preset.vision.num_patches() + 3);
    match sequence.filter(|n| *n < room) {
        Some(n) => bail!("--seq {n} has no room for a picture of {visual} tokens and a text"; "take {room} or more"),
        None => Ok(()),
    }
}

/// Low-rank updates of every linear layer of the language model.
pub(super) fn low_rank(vlm: &mut Vlm, rank: usize, dropout: f64) -> Result<()> {
    let target = vec!["language.layers.*.{self_attn,mlp}.*_proj".to_string()];
    let alpha = 2.0 * rank as f64;
    let cfg = spec::Lora { rank, alpha, dropout, target, ..Default::default() };
    lora::attach(vlm, &cfg, "sft", Key::new(1, "lora")).map(drop)
}

/// What a step took and did.
#[derive(Serialize)]
struct Record<'a> {
    what: &'static str,
    work: &'static str,
    preset: &'static str,
    shape: String,
    dtype: &'static str,
    device: &'a str,
    activations: &'static str,
    #[serde(flatten)]
    measured: Measured,
    samples: usize,
    /// Through the language model.
    tokens: usize,
    label_tokens: usize,
    tokens_per_s: f64,
    samples_per_s: f64,
    trained: u64,
    /// Of a step.
    flops: u64,
    flops_by_part: Flops,
    flops_formula: &'static str,
    flops_per_s: f64,
    /// The step at the measured rate of a large product.
    floor_s: f64,
    /// FLOP/s over that rate.
    mfu_measured: f64,
    /// FLOP/s over what `--peak` says.
    mfu_peak: Option<f64>,
}

/// What was seen of the steps.
#[derive(Serialize)]
struct Measured {
    #[serde(flatten)]
    times: Times,
    /// Of the last timed step.
    loss: f64,
    /// Most that was in use in these steps: of the GPU's pool, or resident of the process.
    peak_memory_bytes: Option<u64>,
    /// In a step that waits after each part; `rest` is what no part holds.
    parts_s: BTreeMap<&'static str, f64>,
}

/// Steps of each kind, each told as it is measured. The options have been checked.
pub fn run(bench: &mut Bench, o: &Options) -> Result<()> {
    if !bench.out.json {
        writeln!(bench.out.to, "\nFLOPs of a step:\n  {}", FORMULA.replace("; ", "\n  "))?;
    }
    let mut vlm = o.preset.build(&mut Noise::new(&bench.place))?;
    let rank = o.rank.unwrap_or(o.preset.rank);
    for work in &o.works {
        let trains = prepare(&mut vlm, *work, o.preset.dropout, rank)?;
        one(bench, o, *work, &vlm, trains, rank).with_context(|| work.name())?;
    }
    Ok(())
}

/// Lets train what the work trains; returns its weights as the optimizer sees them.
fn prepare(vlm: &mut Vlm, work: Work, dropout: f64, rank: usize) -> Result<BTreeMap<String, Weight>> {
    if work != Work::Align && lora::names(vlm).is_empty() {
        low_rank(vlm, rank, dropout)?;
    }
    let projector = |p: &Param| p.role.part == Part::Projector;
    let names = vlm.names(|p| match work {
        Work::Align => projector(p),
        Work::Sft => projector(p) || p.is_adapter(),
        Work::Dpo => p.is_adapter(),
    });
    vlm.train_only(&names);
    Ok(vlm.weights())
}

/// Makes samples, chooses what is kept, and measures one kind of step.
fn one(
    bench: &mut Bench,
    o: &Options,
    work: Work,
    vlm: &Vlm,
    weights: BTreeMap<String, Weight>,
    rank: usize,
) -> Result<()> {
    let micro = o.micro.unwrap_or(o.preset.micro[work as usize]);
    let batch = Batch::new(&o.preset, work, micro, o.sequence)?;
    let pass = batch.pass(work, rank);
    let items: Vec<(usize, &Item)> = batch.items.iter().enumerate().collect();
    let trained = weights.values().map(|w| w.value.elem_count() as u64).sum::<u64>();
    let load = Load { pictures: pass.pictures, tokens: pass.sequences * pass.length };
    let shapes = weights.iter().map(|(n, w)| (n.clone(), w.value.dims().to_vec())).collect();
    let mut optimizer = constant_optimizer(&shapes, 1e-5, spec::AdamW::default())?;
    let free = || memory::free_memory(&bench.place.device);
    let (kept, _) =
        memory::choose(o.activations, vlm, &[load], 4 * trained + optimizer.bytes_to_come(&bench.place.device), free)?;
    let settings = spec::Dpo { beta: 0.1, loss: DpoLoss::Sigmoid, reference: Reference::Start, label_smoothing: 0.0 };
    let reference = match work {
        Work::Dpo => pair_logps(vlm, &items, &batch.pixels, false)?,
        _ => ReferenceTable::new(),
    };
    let task = match work {
        Work::Dpo => Task::Dpo { settings: &settings, reference: &reference },
        _ => Task::Sft,
    };
    let (dropout, mut count) = (Key::new(1, "dropout"), 0);
    let mut step = || -> Result<f64> {
        let cfg = StepConfig { micro, kept, dropout: dropout.index(count) };
        count += 1;
        let done = compute(vlm, &task, &items, &batch.pixels, cfg)?;
        let _span = tracing::debug_span!("optimizer").entered();
        optimizer.step(&weights, done.grads.by_name())?;
        Ok(done.loss)
    };
    let measured = measure(bench, o.steps, &mut step)?;
    tell(bench, o, work, &pass, kept, trained, measured)
}

fn tell(
    bench: &mut Bench,
    o: &Options,
    work: Work,
    pass: &Pass,
    kept: Kept,
    trained: u64,
    measured: Measured,
) -> Result<()> {
    let (flops_by_part, median) = (Flops::of(&o.preset, pass)?, measured.times.median);
    let (flops, tokens) = (flops_by_part.total(), pass.sequences * pass.length);
    let (flops_per_s, possible) = (flops as f64 / median, bench.machine.matmul_flops_per_s);
    // Every sample or pair shows a picture of its own.
    let samples = pass.pictures;
    let sides = if pass.sequences > samples { "2 × " } else { "" };
    let record = Record {
        what: "step",
        work: work.name(),
        preset: o.preset.name,
        shape: format!("{samples} × {sides}{}", pass.length),
        dtype: type_name(bench.place.dtype),
        device: &bench.machine.device,
        activations: kept_name(kept),
        measured,
        samples,
        tokens,
        label_tokens: pass.labels,
        tokens_per_s: tokens as f64 / median,
        samples_per_s: samples as f64 / median,
        trained,
        flops,
        flops_by_part,
        flops_formula: FORMULA,
        flops_per_s,
        floor_s: flops as f64 / possible,
        mfu_measured: flops_per_s / possible,
        mfu_peak: o.peak.map(|peak| flops_per_s / peak),
    };
    bench.out.record(&record, || lines(&record, o.peak))
}

/// Steps before the first timed one: kernels are loaded, memory is found, moments are made.
const WARM: usize = 2;

/// Times `steps` steps, and the parts of one more.
fn measure(bench: &Bench, steps: usize, step: &mut dyn FnMut() -> Result<f64>) -> Result<Measured> {
    for _ in 0..WARM {
        step()?;
    }
    bench.clock.wait()?;
    memory::reset_peak(&bench.place.device)?;
    let mut loss = f64::NAN;
    let mut marks = vec![bench.clock.mark()?];
    for _ in 0..steps {
        loss = step()?;
        marks.push(bench.clock.mark()?);
    }
    let times = Times::between(&marks)?;
    let peak_memory_bytes = memory::peak(&bench.place.device)?;
    Ok(Measured { times, loss, peak_memory_bytes, parts_s: parts(bench, step)? })
}

/// Seconds of each part of one step, and of the rest.
fn parts(bench: &Bench, step: &mut dyn FnMut() -> Result<f64>) -> Result<BTreeMap<&'static str, f64>> {
    let (mut begin, mut end) = (None, None);
    let mut parts = by_part(&bench.place.device, || {
        bench.clock.wait()?;
        begin = Some(bench.clock.mark()?);
        step()?;
        end = Some(bench.clock.mark()?);
        Ok(())
    })?;
    if let (Some(begin), Some(end)) = (begin, end) {
        let whole = Times::between(&[begin, end])?.median;
        parts.insert("rest", (whole - parts.values().sum::<f64>()).max(0.0));
    }
    Ok(parts)
}

/// A policy as a recipe writes it.
pub(super) fn kept_name(kept: Kept) -> &'static str {
    match kept {
        Kept::All => "none",
        Kept::Minimal => "minimal",
        Kept::Input => "recompute",
        Kept::Nothing => "nothing",
    }
}

/// A record for people.
fn lines(r: &Record, peak: Option<f64>) -> String {
    let (share, m) = (human::percent, &r.measured);
    let mut out = format!(
        "\n{} of {}, {} tokens, activations {}, {} parameters train\n",
        r.work,
        r.preset,
        r.shape,
        r.activations,
        human::thousands(r.trained)
    );
    let mut line = |what: &str, text: String| out += &format!("  {what:<20}{text}\n");
    line("step", format!("{} (fastest {}, {} runs)", time(m.times.median), time(m.times.min), m.times.runs));
    line("tokens/s", format!("{} ({} a step, {} labelled)", scaled(r.tokens_per_s), r.tokens, r.label_tokens));
    line("samples/s", scaled(r.samples_per_s));
    line("MFU", format!("{} of the measured rate, {}FLOP/s", share(r.mfu_measured), scaled(r.flops_per_s)));
    if let (Some(mfu), Some(peak)) = (r.mfu_peak, peak) {
        line("", format!("{} of {}FLOP/s", share(mfu), scaled(peak)));
    }
    let f = &r.flops_by_part;
    let parts = [
        ("linears", f.linears),
        ("updates", f.updates),
        ("attention", f.attention),
        ("head", f.head),
        ("tower", f.tower),
        ("projector", f.projector),
    ];
    let parts: Vec<String> = parts.iter().map(|(name, n)| format!("{name} {}", scaled(*n as f64))).collect();
    line("FLOPs of a step", format!("{} = {}", scaled(r.flops as f64), parts.join(" + ")));
    line("peak memory", m.peak_memory_bytes.map_or("unknown".to_string(), human::bytes));
    let whole: f64 = m.parts_s.values().sum();
    for name in PARTS.iter().chain(&["rest"]) {
        if let Some(s) = m.parts_s.get(name) {
            line(name, format!("{:>8}  {:>6}", time(*s), share(s / whole)));
        }
    }
    out.truncate(out.trim_end().len());
    out
}
