//! What freezing saves: the same step with the projector alone, low-rank updates, the last two language layers, or everything
//! training, each with everything kept and with layers that run again, beside the ratios that guides publish.
//!
//! A configuration is measured in a process of its own, so that its peak of memory is its own on the CPU as well, where an allocator
//! gives nothing back; `adfreeze bench freeze` starts them one after the other.

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
use crate::model::segment::Kept;
use crate::model::vlm::{Load, Vlm};
use crate::ops::random::Key;
use crate::pipeline::memory;
use crate::recipe::schema;
use crate::report::{Table, human};
use crate::train::step::{StepConfig, Task, compute};
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
        let late: Vec<String> = (n.saturating_sub(2)..n).map(|i| format!("language.layers.{i}.")).collect();
        let trains = |name: &String| match self {
            Self::Projector => name.starts_with("projector."),
            Self::Lora => name.contains(".lora_"),
            Self::LastTwo => late.iter().any(|layer| name.starts_with(layer)),
            Self::Full => true,
        };
        let mut names = vlm.params().into_keys().filter(trains).collect();
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
    /// What the layers keep for backward, as `check` tells it.
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
    let mut optimizer = constant_optimizer(&shapes, 1e-5, schema::AdamW::default())?;
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

/// Measures every configuration through `measure`, which gives a record as JSON, and tells of all.
pub fn run(out: &mut Output, mut measure: impl FnMut(usize) -> Result<String>) -> Result<()> {
    let mut records: Vec<Record> = Vec::with_capacity(CONFIGURATIONS.len());
    for (i, (policy, kept)) in CONFIGURATIONS.iter().enumerate() {
        let what = || format!("{}, activations = \"{}\"", policy.name(), kept_name(*kept));
        let text = measure(i).with_context(what)?;
        let record: Record = serde_json::from_str(text.trim()).map_err(|e| Error::from(e).context(what()))?;
        if out.json {
            out.record(&record, String::new)?;
        }
        records.push(record);
    }
    let claims = claims(&records);
    if out.json {
        return claims.iter().try_for_each(|c| out.record(c, String::new));
    }
    let Some(first) = records.first() else { return Ok(()) };
    let title = format!(
        "a step of {}, {}: {} samples, {} tokens, {} parameters",
        first.preset,
        first.dtype,
        first.samples,
        human::thousands(first.tokens as u64),
        human::thousands(first.parameters)
    );
    writeln!(out.to, "\n{}\n{}", measured(&title, &records).render(), published(&claims).render())?;
    Ok(out.to.flush()?)
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

/// A ratio that guides publish, and ours.
#[derive(Debug, Clone, Serialize)]
struct Claim {
    what: &'static str,
    claim: String,
    published: &'static str,
    /// Times as fast, or the share by which the first is slower or smaller; none where memory cannot be told.
    here: Option<f64>,
    /// For people.
    #[serde(skip)]
    shown: String,
}

/// Each claim by the records that it is about: times are medians, memory is the peak of the whole process or pool.
fn claims(records: &[Record]) -> Vec<Claim> {
    let find = |policy: Policy, kept: Kept| {
        records.iter().find(|r| r.policy == policy.name() && r.activations == kept_name(kept))
    };
    let faster = |a: &Record, b: &Record| Some(b.median_s / a.median_s);
    let slower = |a: &Record, b: &Record| Some(a.median_s / b.median_s - 1.0);
    let smaller = |a: &Record, b: &Record| Some(1.0 - a.peak_memory_bytes? as f64 / b.peak_memory_bytes? as f64);
    let mut all = Vec::new();
    let mut claim = |claim: String,
                     published,
                     pair: Option<(&Record, &Record)>,
                     of: &dyn Fn(&Record, &Record) -> Option<f64>,
                     share: bool| {
        let Some((a, b)) = pair else { return };
        let here = of(a, b);
        let show = |v: f64| if share { human::percent(v) } else { format!("{v:.2} ×") };
        all.push(Claim { what: "claim", claim, published, here, shown: here.map_or("unknown".to_string(), show) });
    };
    for kept in [Kept::All, Kept::Input] {
        let of = |p| find(p, kept).zip(find(Policy::Full, kept));
        let where_ = format!("activations = \"{}\"", kept_name(kept));
        claim(format!("projector only faster than full, {where_}"), "3 to 5 ×", of(Policy::Projector), &faster, false);
        claim(format!("LoRA faster than full, {where_}"), "1.5 to 2 ×", of(Policy::Lora), &faster, false);
        claim(format!("LoRA takes less memory than full, {where_}"), "40 to 50 %", of(Policy::Lora), &smaller, true);
    }
    for policy in [Policy::Projector, Policy::Lora, Policy::LastTwo, Policy::Full] {
        let pair = || find(policy, Kept::Input).zip(find(policy, Kept::All));
        claim(format!("{}: recompute slower", policy.name()), "20 to 30 %", pair(), &slower, true);
        claim(format!("{}: recompute takes less memory", policy.name()), "40 to 50 %", pair(), &smaller, true);
    }
    all
}

fn published(claims: &[Claim]) -> Table {
    let mut t = Table::new("beside what is published", ["", "published", "here"]);
    for c in claims {
        t.row([c.claim.clone(), c.published.to_string(), c.shown.clone()]);
    }
    t
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_are_ratios_of_the_right_records() {
        let record = |i: usize, median_s: f64, peak: u64| Record {
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
        };
        // Projector 1 s and 1.25 s, LoRA 2 s and 2.5 s, last two 1 s and 1 s, full 4 s and 5 s; 100 to 400 bytes, and half of it.
        let times = [1.0, 1.25, 2.0, 2.5, 1.0, 1.0, 4.0, 5.0];
        let peaks = [100, 50, 200, 100, 100, 100, 400, 200];
        let records: Vec<Record> = (0..8).map(|i| record(i, times[i], peaks[i])).collect();
        let got: Vec<(String, f64)> = claims(&records).into_iter().map(|c| (c.claim, c.here.unwrap())).collect();
        let find = |what: &str| got.iter().find(|(c, _)| c.starts_with(what)).unwrap().1;
        assert_eq!(find("projector only faster"), 4.0);
        assert_eq!(find("LoRA faster"), 2.0);
        assert_eq!(find("LoRA takes less"), 0.5);
        assert_eq!((find("full: recompute slower"), find("full: recompute takes")), (0.25, 0.5));
        assert_eq!((find("last 2 layers: recompute slower"), find("last 2 layers: recompute takes")), (0.0, 0.0));
        assert_eq!(got.len(), 14);
    }
}
