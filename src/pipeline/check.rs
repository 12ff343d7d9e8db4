//! All that can be known about a run before it begins: weights, tokenizer, data, what trains, steps, warnings.
//!
//! Nothing is written into the run directory. Problems of all stages and evaluations are reported together.

use super::align;
use super::assemble::{Assembly, assemble, sight};
use super::components::{self, Training};
use super::doubts;
use super::freeze::thousands;
use super::memory;
use super::pictures::{self, Looked, Pictures, together};
use super::positions;
use super::run_dir::refuse_others;
use super::stage::{check_reachable, dataset, micro, optimizer, step_counts};
use super::state::{State, parent};
use super::{evaluation, loading, make_data, newline};
use crate::data::{Dataset, ImageProcessor, Plan, Sight};
use crate::error::{Context, Error, Result};
use crate::model::init::{NEWLINE, Place};
use crate::model::params::Module;
use crate::model::role::{Part, Role};
use crate::optim::AdamW;
use crate::report::{Reporter, Table, human};
use crate::spec::{DType, Recipe, START_ADAPTER, Scheduler, Stage};
use candle_core::Device;
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;

/// Learning rate above which pretrained weights are usually destroyed.
const PRETRAINED_LR: f64 = 1e-4;

/// The machine that will train, as far as it is told to be another than the one that checks.
#[derive(Debug, Clone, Copy, Default)]
pub struct Aim {
    /// Type of frozen weights and activations; none: what the recipe says, which `auto` makes f32 here.
    pub dtype: Option<DType>,
    /// Bytes of memory that are free before the model is loaded; none: what is free here.
    pub memory: Option<u64>,
}

impl Aim {
    /// For which type and memory the tables hold, and how to ask for others.
    fn told(self, recipe: &Recipe, place: &Place) -> Result<String> {
        let dtype = place.dtype.as_str();
        let free = match self.memory {
            Some(bytes) => format!("{} of free memory", human::bytes(bytes)),
            None => match memory::free_memory(&place.device)? {
                Some(bytes) => format!("this machine's free memory ({})", human::bytes(bytes)),
                None => "free memory that cannot be told".to_string(),
            },
        };
        let open = self.dtype.unwrap_or(recipe.model.dtype) == DType::Auto;
        let gpu = if open { " (on a GPU it would be bf16)" } else { "" };
        let mut ask = Vec::new();
        if open {
            ask.push("--dtype bf16");
        }
        if self.memory.is_none() {
            ask.push("--memory 80GiB");
        }
        let ask = if ask.is_empty() { String::new() } else { format!("; {} tells of another machine", ask.join(" ")) };
        Ok(format!("the tables below hold for {dtype}{gpu} and {free}{ask}"))
    }
}

/// Checks `recipe` and prints its stages to `out`, as they will be on the machine of `aim`.
///
/// # Errors
/// What is wrong with the model at once; what is wrong with the stages and their data all together.
pub fn check(recipe: &Recipe, aim: Aim, reporter: &Reporter, out: &mut dyn Write) -> Result<()> {
    refuse_others(&recipe.output_dir, recipe)?;
    make_data(recipe, reporter)?;
    let place = Place::new(Device::Cpu, aim.dtype.unwrap_or(recipe.model.dtype));
    let mut assembly = loading(reporter, || assemble(recipe, &place))?;
    write!(out, "{}", sources(&assembly).for_stdout())?;
    writeln!(out, "{}", aim.told(recipe, &assembly.place)?)?;
    let mut newlines = Vec::new();
    for name in &recipe.stages {
        // A pattern that is wrong is a problem of its stage.
        newlines.extend(newline::warnings(recipe, &mut assembly, name).unwrap_or_default());
    }
    let (ends, random, masters) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    let warnings = assembly.warnings.iter().chain(&assembly.begins).cloned().chain(newlines).collect();
    let mut all = Check {
        recipe,
        aim,
        assembly: &assembly,
        ends,
        random,
        masters,
        sights: Vec::new(),
        warnings,
        steps: 0,
        reporter,
    };
    let mut problems = Vec::new();
    for name in &recipe.stages {
        writeln!(out)?;
        if let Err(e) = all.stage(name, out) {
            writeln!(out, "stage {name}: see the error at the end")?;
            problems.push(e.context(format!("stage.{name}")));
        }
    }
    writeln!(out)?;
    problems.extend(all.evaluations(out)?);
    all.warnings.extend(all.assembly.encoder.notices());
    all.warnings.iter().for_each(|w| reporter.warn(w));
    together(problems)?;
    let (stages, steps) = (recipe.stages.len(), thousands(all.steps));
    reporter.info(&format!("the recipe can run: {stages} stages, {steps} steps, {} warnings", all.warnings.len()));
    Ok(())
}

fn sources(assembly: &Assembly) -> Table {
    let mut t = Table::new("sources", ["part", "from"]);
    for (part, from) in &assembly.sources {
        t.row([part.clone(), from.clone()]);
    }
    t
}

/// The stages that were checked so far.
struct Check<'a> {
    recipe: &'a Recipe,
    aim: Aim,
    assembly: &'a Assembly,
    /// How each stage leaves the model; the copies share their tensors.
    ends: BTreeMap<&'a str, State>,
    /// What is still random at a stage's end: it began so, and no stage on the way has trained it.
    random: BTreeMap<&'a str, BTreeSet<String>>,
    /// What has an f32 master at a stage's end, where the model computes in bf16.
    masters: BTreeMap<&'a str, BTreeSet<String>>,
    /// The evaluations of the stages that could be checked, and how their model sees.
    sights: Vec<(&'a str, Option<Sight>)>,
    warnings: Vec<String>,
    steps: usize,
    reporter: &'a Reporter,
}

impl<'a> Check<'a> {
    /// The model as the stage finds it; `None` if the stage before it cannot run.
    fn start(&self, name: &str) -> Result<Option<State>> {
        Ok(match parent(self.recipe, name)? {
            Some(before) => self.ends.get(before).cloned(),
            None => Some(State::new(self.assembly.vlm.clone(), self.assembly.start_adapter.clone())),
        })
    }

    fn stage(&mut self, name: &'a str, out: &mut dyn Write) -> Result<()> {
        let stage = &self.recipe.stage[name];
        let Some(mut state) = self.start(name)? else {
            writeln!(out, "stage {name}: not checked, because the stage that it starts from cannot run")?;
            return Ok(());
        };
        state.enter(stage, name)?;
        let fresh = self.fresh(name, &state)?;
        self.ends.insert(name, state.clone());
        let sight = sight(&state.vlm)?;
        self.sights.extend(stage.eval.iter().map(|e| (e.as_str(), sight)));
        let data = dataset(self.recipe, stage, &self.assembly.encoder.seeing(sight))?;
        check_reachable(&state, &data)?;
        self.warnings.extend(positions::warning(&format!("stage.{name}"), &state.vlm, &data.items));
        align::samples(stage, &state, &data)?;
        let (total, epoch) = step_counts(stage, data.items.len());
        let optimizer = optimizer(stage, name, &state, total)?;
        self.parts(name, &mut state, &data, &optimizer, total, out)?;
        writeln!(out)?;
        write!(out, "{}", groups(name, stage, &optimizer).for_stdout())?;
        writeln!(out)?;
        let shown = pictures::shown(&data, stage, name, total)?;
        let looked = look("pictures", &data, shown, self.assembly.images.as_ref(), self.reporter)?;
        write!(out, "{}", data_table(name, stage, &data, sight, looked, (total, epoch)).for_stdout())?;
        self.steps += total;
        self.warnings.extend(warnings(stage, name, &state, &optimizer, &fresh));
        let doubts = doubts::of_stage(&data, &self.assembly.encoder, &optimizer)?;
        self.warnings.extend(doubts.iter().map(|w| format!("stage.{name}: {w}")));
        Ok(())
    }

    /// What the stage consists of and costs, on the free memory of the machine in question where the recipe leaves the choice to it.
    fn parts(
        &mut self,
        name: &'a str,
        state: &mut State,
        data: &Dataset,
        optimizer: &AdamW,
        total: usize,
        out: &mut dyn Write,
    ) -> Result<()> {
        let stage = &self.recipe.stage[name];
        let plan = Plan::new(data, &stage.batch, stage.seed, name, total)?;
        let loads = memory::loads(data, &plan, 0..total, micro(stage), state.vlm.prefix_rows());
        let mut masters = parent(self.recipe, name)?.and_then(|p| self.masters.get(p)).cloned().unwrap_or_default();
        let rows = components::rows(state, &Training { stage, optimizer, loads: &loads, masters: &masters })?;
        // A stage finds its weights loaded as it chooses.
        let weights = rows.iter().map(|r| r.weight_bytes).sum();
        let free = self.aim.memory.map(|bytes| bytes.saturating_sub(weights));
        let (kept, told) = memory::of_stage(stage, state, &loads, optimizer, free)?;
        write!(out, "{}", components::table(&format!("stage {name}: parameters"), &rows, kept).for_stdout())?;
        writeln!(out, "{}", components::notes(&state.vlm, &rows, &loads, kept)?)?;
        told.iter().try_for_each(|line| writeln!(out, "{line}"))?;
        let trained = state.vlm.names(|p| p.trainable);
        let with = state.vlm.names(|p| p.trainable && components::gets_master(stage, &p.role));
        masters.retain(|n| !trained.contains(n));
        masters.extend(with);
        self.masters.insert(name, masters);
        Ok(())
    }

    /// Parameters that this stage trains and that are random until then: from the start, reset or newly declared, and
    /// trained by none of the stages that lead here.
    fn fresh(&mut self, name: &'a str, state: &State) -> Result<BTreeSet<String>> {
        let stage = &self.recipe.stage[name];
        let before = parent(self.recipe, name)?;
        let roles = state.vlm.roles();
        let known: Vec<String> = roles.keys().cloned().collect();
        let mut random = match before {
            Some(p) => self.random.get(p).cloned().unwrap_or_default(),
            None => roles.iter().filter(|(n, r)| self.is_random(n, r)).map(|(n, _)| n.clone()).collect(),
        };
        let carried = before.and_then(|p| self.ends.get(p)).map(|s| &s.adapters);
        let declared = |n: &str| {
            let new = |a: &str| a != START_ADAPTER && !carried.is_some_and(|c| c.contains_key(a));
            roles[n].adapter().is_some_and(new)
        };
        random.extend(known.iter().filter(|n| declared(n)).cloned());
        if !stage.reset.is_empty() {
            let reset = crate::spec::pattern::Patterns::new(&stage.reset, &known).context("reset")?;
            random.extend(known.iter().filter(|n| reset.matches(n)).cloned());
        }
        let trained: BTreeSet<String> = state.vlm.trainable().into_keys().collect();
        let fresh = random.intersection(&trained).cloned().collect();
        self.random.insert(name, random.difference(&trained).cloned().collect());
        Ok(fresh)
    }

    /// Does the model, without its adapters, begin with random values here?
    fn is_random(&self, name: &str, role: &Role) -> bool {
        let model = &self.recipe.model;
        if role.adapter.is_some() {
            return false;
        }
        if name == NEWLINE {
            return self.assembly.newline_is_random;
        }
        match role.part {
            Part::Vision => model.vision.as_ref().is_some_and(|v| v.init.is_some()),
            Part::Language => model.language.as_ref().is_some_and(|l| l.init.is_some()),
            Part::Projector => {
                let fresh = |p: &str| name.starts_with(p);
                model.projector.as_ref().is_some_and(|p| p.source().is_none() || p.fresh().into_iter().any(fresh))
            }
        }
    }

    /// The data of every evaluation that a stage runs; returns what is wrong.
    fn evaluations(&mut self, out: &mut dyn Write) -> Result<Vec<Error>> {
        let wanted: BTreeSet<&String> = self.recipe.stages.iter().flat_map(|s| &self.recipe.stage[s].eval).collect();
        let (mut problems, mut t) =
            (Vec::new(), Table::new("held out", ["evaluation", "metric", "samples", "pictures", "decoded"]));
        for name in wanted {
            let eval = &self.recipe.eval[name];
            let encoder = &self.assembly.encoder;
            let mut sights: Vec<Option<Sight>> = Vec::new();
            let of_stages = self.sights.iter().filter(|(eval, _)| eval == name);
            of_stages.for_each(|(_, s)| {
                if !sights.contains(s) {
                    sights.push(*s)
                }
            });
            let mut looked = Looked { at: 0, of: 0 };
            let mut load = || -> Result<(Dataset, Vec<String>)> {
                let first = sights.first().copied().unwrap_or(encoder.sight());
                let data = evaluation::dataset(self.recipe, eval, &encoder.seeing(first))?;
                looked = look("pictures", &data, 0..data.items.len(), self.assembly.images.as_ref(), self.reporter)?;
                for other in sights.iter().skip(1) {
                    evaluation::dataset(self.recipe, eval, &encoder.seeing(*other))?;
                }
                let doubts = doubts::of_evaluation(eval, &data, encoder)?;
                Ok((data, doubts))
            };
            match load() {
                Ok((data, doubts)) => {
                    self.warnings.extend(doubts.iter().map(|w| format!("eval.{name}: {w}")));
                    let metric = serde_json::to_value(eval.metric)?;
                    t.row([
                        name.clone(),
                        metric.as_str().unwrap_or_default().to_string(),
                        thousands(data.items.len()),
                        thousands(data.images().len()),
                        thousands(looked.at),
                    ]);
                }
                Err(e) => problems.push(e.context(format!("eval.{name}"))),
            }
        }
        if !t.rows.is_empty() {
            write!(out, "{}", t.for_stdout())?;
        }
        Ok(problems)
    }
}

/// Decodes the pictures that the items `shown` of a data set show.
fn look(
    owner: &str,
    data: &Dataset,
    shown: impl IntoIterator<Item = usize>,
    images: Option<&ImageProcessor>,
    reporter: &Reporter,
) -> Result<Looked> {
    let mut pictures = Pictures::default();
    pictures.add(owner, data, shown);
    pictures.prove(&BTreeSet::from([owner.to_string()]), images, reporter)
}

fn groups(name: &str, stage: &Stage, optimizer: &AdamW) -> Table {
    let mut t = Table::new(
        format!("stage {name}: optimizer groups"),
        ["group", "tensors", "parameters", "peak lr", "schedule", "weight decay"],
    );
    for (i, g) in optimizer.groups().list().iter().enumerate() {
        let decays: BTreeSet<String> = optimizer
            .groups()
            .members()
            .values()
            .filter(|m| m.group == i)
            .map(|m| m.weight_decay.to_string())
            .collect();
        let decays: Vec<String> = decays.into_iter().rev().collect();
        let decay = match decays.as_slice() {
            [decay, rest] if rest == "0" => format!("{decay} (biases and norms 0)"),
            all => all.join(" or "),
        };
        let own = g.scheduler.as_ref().unwrap_or(&stage.lr_scheduler);
        let peak = match g.peaks() {
            [low, high] if low < high => format!("{high:e} down to {low:.1e}, by layer"),
            [_, peak] => format!("{peak:e}"),
        };
        t.row([g.name.clone(), g.tensors.to_string(), thousands(g.elements), peak, schedule(own), decay]);
    }
    t
}

/// A schedule as the table has it: `cosine, warm-up 3 %`.
fn schedule(s: &Scheduler) -> String {
    let name = match s {
        Scheduler::Cosine(_) => "cosine",
        Scheduler::Linear(_) => "linear",
        Scheduler::Constant(_) => "constant",
    };
    match (s.warmup().warmup_steps, s.warmup().warmup_ratio) {
        (Some(n), _) if n > 0 => format!("{name}, warm-up {n} steps"),
        (None, Some(r)) if r > 0.0 => format!("{name}, warm-up {} %", 100.0 * r),
        _ => name.to_string(),
    }
}

fn data_table(
    name: &str,
    stage: &Stage,
    data: &Dataset,
    sight: Option<Sight>,
    looked: Looked,
    (total, epoch): (usize, usize),
) -> Table {
    let s = data.stats();
    let mut t = Table::new(format!("stage {name}: data"), ["", ""]);
    let mut row = |k: &str, v: String| t.row([k.to_string(), v]);
    row("samples", thousands(s.items));
    row("of them without a picture", thousands(s.text_only));
    row("pictures (all there)", thousands(s.images));
    row("of them shown in the stage's steps", thousands(looked.of));
    row("of these decoded to see whether they are whole", thousands(looked.at));
    if let Some(Sight { size, tokens, .. }) = sight {
        row("what the tower sees at once", format!("{size} × {size} px"));
        row("visual tokens of that", thousands(tokens));
    }
    row("tokens of an epoch", thousands(s.tokens));
    row("label tokens of an epoch", thousands(s.labels));
    row("longest sample, in tokens", thousands(s.max_len));
    row("median", thousands(s.median_len));
    row("shortest", thousands(s.min_len));
    row("samples a step", thousands(stage.batch.global));
    row("steps of an epoch", thousands(epoch));
    row("steps", thousands(total));
    t
}

/// What is allowed but rarely meant. `fresh`: trained parameters that start from random values.
fn warnings(stage: &Stage, name: &str, state: &State, optimizer: &AdamW, fresh: &BTreeSet<String>) -> Vec<String> {
    let mut out = Vec::new();
    let backbone = state.vlm.names(|p| p.role.is_backbone());
    let pretrained = |n: &&String| backbone.contains(*n) && !fresh.contains(*n);
    for (i, group) in optimizer.groups().list().iter().enumerate() {
        let members = optimizer.groups().members().iter().filter(|(_, m)| m.group == i).map(|(n, _)| n);
        let pretrained: Vec<&String> = members.filter(pretrained).collect();
        if let (true, Some(first)) = (group.peaks()[1] > PRETRAINED_LR, pretrained.first()) {
            out.push(format!(
                "stage.{name}: {} pretrained tensors of group `{}`, e.g. {first}, get a learning rate of {:e}; above {PRETRAINED_LR:e} they are usually destroyed: give them a lower one in param_groups",
                pretrained.len(), group.name, group.peaks()[1]
            ));
        }
    }
    let cold = |n: &&String| {
        let group = optimizer.groups().members().get(*n).and_then(|m| optimizer.groups().list().get(m.group));
        no_warmup(group.and_then(|g| g.scheduler.as_ref()).unwrap_or(&stage.lr_scheduler))
    };
    let cold: Vec<&String> = fresh.iter().filter(cold).collect();
    if let Some(first) = cold.first() {
        out.push(format!(
            "stage.{name}: {} new tensors, e.g. {first}, get no warm-up: set e.g. lr_scheduler = {{ cosine = {{ warmup_ratio = 0.03 }} }}",
            cold.len()
        ));
    }
    out
}

fn no_warmup(s: &Scheduler) -> bool {
    let w = s.warmup();
    w.warmup_ratio.unwrap_or(0.0) == 0.0 && w.warmup_steps.unwrap_or(0) == 0
}
