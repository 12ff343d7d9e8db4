//! What freezing saves: the same step with the projector alone, low-rank updates, the last two language layers, or everything
//! training, each with everything kept and with layers that run again, beside the ratios that guides publish.
//!
//! A configuration is measured in a process of its own, so that its peak of memory is its own on the CPU as well, where an allocator
//! gives nothing back; `adfreeze bench freeze` starts them one after the other. One that does not fit takes no other with it.

mod claims;

use super::noise::Noise;
use super::preset::Preset;
use super::samples::Batch;
use super::step::{Work, kept_name, low_rank};
use super::timer::{Clock, Times};
use super::{Output, constant_optimizer, time, type_name};
use crate::bail;
use crate::data::Item;
use crate::error::{Context, Error, Result};
use crate::model::init::Place;
use crate::model::params::Module;
use crate::model::role::{Level, Part, Role};
use crate::model::segment::Kept;
use crate::model::vlm::{Load, Vlm};
use crate::ops::random::Key;
use crate::pipeline::memory;
use crate::report::{Table, human};
use crate::spec;
use crate::train::step::{StepConfig, Task, compute};
use claims::{claims, published};
use serde::{Deserialize, Serialize};

/// Who trains.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    /// The projector.
    Projector,
    /// Low-rank updates of every linear layer of the language model.
    Lora,
    /// The last two layers of the language model.
    LastTwo,
    /// Everything that a gradient can reach: tower, projector, language model.
    Full,
}

/// Every policy, each without and with layers that run again; the order of measuring.
pub const CONFIGURATIONS: [(Policy, Kept); 8] = [
    (Policy::Projector, Kept::All),
    (Policy::Projector, Kept::Input),
    (Policy::Lora, Kept::All),
    (Policy::Lora, Kept::Input),
    (Policy::LastTwo, Kept::All),
    (Policy::LastTwo, Kept::Input),
    (Policy::Full, Kept::All),
    (Policy::Full, Kept::Input),
];

impl Policy {
    fn name(self) -> &'static str {
        match self {
            Self::Projector => "projector only",
            Self::Lora => "LoRA",
            Self::LastTwo => "last 2 layers",
            Self::Full => "full",
        }
    }

    /// Lets train what the policy says.
    fn apply(self, vlm: &mut Vlm, preset: &Preset) -> Result<()> {
        if self == Self::Lora {
            low_rank(vlm, preset.rank, preset.dropout)?;
        }
        let n = vlm.language.layers.len();
        let late = |role: &Role| role.part == Part::Language && matches!(role.level, Level::Layer(i) if i + 2 >= n);
        let mut names = vlm.names(|p| match self {
            Self::Projector => p.role.part == Part::Projector,
            Self::Lora => p.is_adapter(),
            Self::LastTwo => late(&p.role),
            Self::Full => true,
        });
        vlm.train_only(&names);
        for (name, _) in vlm.unreachable(true) {
            names.remove(&name);
        }
        vlm.train_only(&names);
        // In bf16 as a stage does it.
        vlm.make_masters()
    }
}

/// What to measure.
#[derive(Debug, Clone)]
pub struct Options {
    /// The model's shape.
    pub preset: Preset,
    /// Samples of a step, which is one micro-batch; default: the preset's of SFT.
    pub micro: Option<usize>,
    /// Tokens of a sequence; default: the preset's.
    pub sequence: Option<usize>,
    /// Timed steps.
    pub steps: usize,
}

impl Options {
    /// Can this be measured? To be asked before anything is.
    pub fn check(&self) -> Result<()> {
        if self.steps == 0 || self.micro == Some(0) {
            bail!("--steps or --micro is not above 0"; "leave it out for the default")
        }
        super::step::room(&self.preset, self.sequence)
    }
}

/// What one configuration took.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Record {
    what: String,
    policy: String,
    activations: String,
    preset: String,
    dtype: String,
    samples: usize,
    tokens: usize,
    parameters: u64,
    trained: u64,
    median_s: f64,
    min_s: f64,
    runs: usize,
    loss: f64,
    /// In use before the first step: the weights, and what the process itself takes.
    start_memory_bytes: Option<u64>,
    /// Most that was in use in the steps.
    peak_memory_bytes: Option<u64>,
    /// What layers and projector keep for backward, as `check` tells it.
    kept_bytes: u64,
}

/// Steps before the first timed one: memory is found, moments are made.
const WARM: usize = 2;

/// Measures one of [`CONFIGURATIONS`].
pub fn one(place: &Place, o: &Options, configuration: usize) -> Result<Record> {
    let Some((policy, kept)) = CONFIGURATIONS.get(configuration).copied() else {
        bail!("there is no configuration {configuration}"; "0 to {}", CONFIGURATIONS.len() - 1)
    };
    let mut vlm = o.preset.build(&mut Noise::new(place))?;
    policy.apply(&mut vlm, &o.preset).context(policy.name())?;
    let (device, clock) = (&place.device, Clock::new(&place.device));
    let micro = o.micro.unwrap_or(o.preset.micro[Work::Sft as usize]);
    let batch = Batch::new(&o.preset, Work::Sft, micro, o.sequence)?;
    let pass = batch.pass(Work::Sft, o.preset.rank);
    let load = Load { pictures: pass.pictures, tokens: pass.sequences * pass.length };
    let items: Vec<(usize, &Item)> = batch.items.iter().enumerate().collect();
    let weights = vlm.weights();
    let shapes = weights.iter().map(|(n, w)| (n.clone(), w.value.dims().to_vec())).collect();
    let mut optimizer = constant_optimizer(&shapes, 1e-5, spec::AdamW::default())?;
    clock.wait()?;
    memory::reset_peak(device)?;
    let start_memory_bytes = memory::peak(device)?;
    let (dropout, mut loss) = (Key::new(1, "dropout"), f64::NAN);
    let mut marks = Vec::with_capacity(o.steps + 1);
    for s in 0..WARM + o.steps {
        if s == WARM {
            marks.push(clock.mark()?);
        }
        let cfg = StepConfig { micro, kept, dropout: dropout.index(s as u64) };
        let done = compute(&vlm, &Task::Sft, &items, &batch.pixels, cfg)?;
        optimizer.step(&weights, done.grads.by_name())?;
        loss = done.loss;
        if s >= WARM {
            marks.push(clock.mark()?);
        }
    }
    let times = Times::between(&marks)?;
    Ok(Record {
        what: "freeze".into(),
        policy: policy.name().into(),
        activations: kept_name(kept).into(),
        preset: o.preset.name.into(),
        dtype: type_name(place.dtype).into(),
        samples: micro,
        tokens: load.tokens,
        parameters: vlm.params().values().map(|t| t.elem_count() as u64).sum(),
        trained: weights.values().map(|w| w.value.elem_count() as u64).sum(),
        median_s: times.median,
        min_s: times.min,
        runs: times.runs,
        loss,
        start_memory_bytes,
        peak_memory_bytes: memory::peak(device)?,
        kept_bytes: vlm.kept_bytes(load, kept)? as u64,
    })
}

/// A configuration that gave no figures.
#[derive(Debug, Clone, Serialize)]
struct Failure {
    what: &'static str,
    policy: &'static str,
    activations: &'static str,
    /// First line of the cause.
    reason: String,
}

impl Failure {
    fn of((policy, kept): (Policy, Kept), e: &Error) -> Self {
        let cause = e.to_string();
        let reason = cause.lines().next().unwrap_or_default().to_string();
        Self { what: "failed", policy: policy.name(), activations: kept_name(kept), reason }
    }

    /// `did not fit: …` where the reason says so.
    fn told(&self) -> String {
        let reason = self.reason.to_lowercase().replace('_', " ");
        let short = reason.contains("out of memory") || reason.contains("memory allocation");
        format!("{}: {}", if short { "did not fit" } else { "failed" }, self.reason)
    }
}

/// Measures every configuration through `measure` and tells of each as it comes, also of one that fails: the others go on. Then
/// all stand in one table, beside the published ratios, of which some may lack a configuration.
///
/// # Errors
/// If not one configuration could be measured.
pub fn run(out: &mut Output, mut measure: impl FnMut(usize) -> Result<Record>) -> Result<()> {
    let (mut records, mut failures) = (Vec::new(), Vec::new());
    let mut first_error = None;
    for (i, configuration) in CONFIGURATIONS.into_iter().enumerate() {
        let what = format!("{}, activations = \"{}\"", configuration.0.name(), kept_name(configuration.1));
        match measure(i) {
            Ok(record) => {
                out.record(&record, || format!("{what}: {} a step", time(record.median_s)))?;
                records.push(record);
            }
            Err(e) => {
                let failure = Failure::of(configuration, &e);
                out.record(&failure, || format!("{what}: {}", failure.told()))?;
                failures.push(failure);
                first_error.get_or_insert(e.context(what));
            }
        }
    }
    if records.is_empty() {
        return first_error.map_or(Ok(()), |e| Err(e.context("no configuration could be measured")));
    }
    let claims = claims(&records);
    if out.json {
        return claims.iter().try_for_each(|c| out.record(c, String::new));
    }
    let first = &records[0];
    let title = format!(
        "a step of {}, {}: {} samples, {} tokens, {} parameters",
        first.preset,
        first.dtype,
        first.samples,
        human::thousands(first.tokens as u64),
        human::thousands(first.parameters)
    );
    writeln!(out.to, "\n{}", measured(&title, &records).for_stdout())?;
    if !failures.is_empty() {
        writeln!(out.to, "{}", not_measured(&failures).for_stdout())?;
    }
    writeln!(out.to, "{}", published(&claims).for_stdout())?;
    Ok(out.to.flush()?)
}

fn not_measured(failures: &[Failure]) -> Table {
    let mut t = Table::new("not measured", ["trains", "activations", "why"]);
    for f in failures {
        t.row([f.policy.to_string(), f.activations.to_string(), f.told()]);
    }
    t
}

fn measured(title: &str, records: &[Record]) -> Table {
    let columns =
        ["trains", "activations", "parameters", "step", "fastest", "peak memory", "of it from the start", "kept"];
    let mut t = Table::new(title, columns);
    let bytes = |n: Option<u64>| n.map_or("unknown".to_string(), human::bytes);
    for r in records {
        t.row([
            r.policy.clone(),
            r.activations.clone(),
            human::thousands(r.trained),
            time(r.median_s),
            time(r.min_s),
            bytes(r.peak_memory_bytes),
            bytes(r.start_memory_bytes),
            human::bytes(r.kept_bytes),
        ]);
    }
    t
}

#[cfg(test)]
mod tests {
    use super::*;

    pub fn record(i: usize, median_s: f64, peak: u64) -> Record {
        Record {
            what: "freeze".into(),
            policy: CONFIGURATIONS[i].0.name().into(),
            activations: kept_name(CONFIGURATIONS[i].1).into(),
            preset: "tiny".into(),
            dtype: "f32".into(),
            samples: 2,
            tokens: 64,
            parameters: 100,
            trained: 10,
            median_s,
            min_s: median_s,
            runs: 1,
            loss: 1.0,
            start_memory_bytes: Some(1),
            peak_memory_bytes: Some(peak),
            kept_bytes: 1,
        }
    }

    /// What a run tells if the two configurations that train everything fail.
    fn told(json: bool) -> String {
        let mut to = Vec::new();
        let measure = |i: usize| match i {
            6 => Err(Error::new("CUDA_ERROR_OUT_OF_MEMORY\nsecond line")),
            7 => Err(Error::new("its process ended with signal: 9 (SIGKILL)")),
            i => Ok(record(i, 1.0 + i as f64, 100)),
        };
        run(&mut Output { to: &mut to, json }, measure).unwrap();
        String::from_utf8(to).unwrap()
    }

    #[test]
    fn what_does_not_fit_takes_nothing_with_it() {
        let text = told(false);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[0], "projector only, activations = \"none\": 1.00 s a step");
        assert_eq!(lines[6], "full, activations = \"none\": did not fit: CUDA_ERROR_OUT_OF_MEMORY");
        assert_eq!(lines[7], "full, activations = \"recompute\": failed: its process ended with signal: 9 (SIGKILL)");
        for what in ["not measured: full, \"none\"", "LoRA: recompute slower", "33.3 %", "a step of tiny"] {
            assert!(text.contains(what), "{what} in:\n{text}");
        }
        let all: Vec<serde_json::Value> = told(true).lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let count = |what: &str| all.iter().filter(|r| r["what"] == what).count();
        assert_eq!((count("freeze"), count("failed"), count("claim")), (6, 2, 14));
        assert_eq!((&all[6]["policy"], &all[6]["reason"]), (&"full".into(), &"CUDA_ERROR_OUT_OF_MEMORY".into()));
        assert_eq!(all[8]["missing"], serde_json::json!(["full, \"none\""]));
    }

    #[test]
    fn nothing_measured_is_an_error() {
        let mut to = Vec::new();
        let fails = |i: usize| Err(Error::new(format!("no device {i}")).hint("look"));
        let e = run(&mut Output { to: &mut to, json: false }, fails).unwrap_err();
        let want = "no configuration could be measured: projector only, activations = \"none\": no device 0";
        assert_eq!((e.cause(), e.hint_text()), (want, Some("look")));
    }
}
