//! All that can be known about a run before it begins: weights, tokenizer, data, what trains, steps, warnings.

use super::assemble::assemble;
use super::freeze;
use super::stage::{check_reachable, dataset, step_counts};
use super::state::{State, parent};
use super::{evaluation, make_data};
use crate::data::Stats;
use crate::error::{Context, Result};
use crate::model::params::Module;
use crate::optim::AdamW;
use crate::recipe::schema::{Recipe, Scheduler, Stage, Warmup};
use crate::report::{Reporter, Table};
use std::collections::BTreeMap;
use std::io::Write;

/// Learning rate above which pretrained weights are usually destroyed.
const PRETRAINED_LR: f64 = 1e-4;

/// Checks `recipe` and prints its stages to `out`; the first thing that is wrong is the error.
pub fn check(recipe: &Recipe, reporter: &Reporter, out: &mut dyn Write) -> Result<()> {
    make_data(recipe, reporter)?;
    let assembly = assemble(recipe)?;
    let mut sources = Table::new("sources", ["part", "from"]);
    for (part, from) in &assembly.sources {
        sources.row([part.clone(), from.clone()]);
    }
    write!(out, "{}", sources.render())?;
    let mut states: BTreeMap<&str, Start> = BTreeMap::new();
    for name in &recipe.stages {
        let stage = &recipe.stage[name];
        let start = match parent(recipe, name)?.and_then(|p| states.get(p)) {
            Some(s) => s.clone(),
            None => Start {
                vlm: assembly.vlm.clone(),
                adapters: assembly
                    .start_adapter
                    .clone()
                    .into_iter()
                    .map(|l| (super::assemble::START_ADAPTER.to_string(), l))
                    .collect(),
                changed: Default::default(),
            },
        };
        let mut state = State { vlm: start.vlm, adapters: start.adapters, changed: start.changed };
        state.enter(stage, name).with_context(|| format!("stage.{name}"))?;
        let data = dataset(recipe, stage, &assembly.encoder).with_context(|| format!("stage.{name}.data"))?;
        check_reachable(&mut state, name, !data.images().is_empty())?;
        let rows = freeze::rows(&mut state, stage)?;
        writeln!(out)?;
        write!(out, "{}", freeze::table(&format!("stage {name}: parameters"), &rows).render())?;
        let (total, epoch) = step_counts(stage, data.items.len());
        writeln!(out)?;
        write!(out, "{}", data_table(name, &data.stats(), total, epoch).render())?;
        for warning in warnings(&mut state, stage, name, total)? {
            reporter.warn(&warning);
        }
        states.insert(name, Start { vlm: state.vlm, adapters: state.adapters, changed: state.changed });
    }
    let names: Vec<&str> = recipe.stages.iter().map(String::as_str).collect();
    evaluation::Evaluations::load(recipe, &names, &assembly.encoder, assembly.images.as_ref())?;
    Ok(())
}

#[derive(Clone)]
struct Start {
    vlm: crate::model::vlm::Vlm,
    adapters: BTreeMap<String, crate::recipe::schema::Lora>,
    changed: std::collections::BTreeSet<String>,
}

fn data_table(name: &str, s: &Stats, total: usize, epoch: usize) -> Table {
    let mut t = Table::new(format!("stage {name}: data"), ["", ""]);
    let mut row = |k: &str, v: String| t.row([k.to_string(), v]);
    row("samples", freeze::thousands(s.items));
    row("of them without a picture", freeze::thousands(s.text_only));
    row("pictures", freeze::thousands(s.images));
    row("tokens of an epoch", freeze::thousands(s.tokens));
    row("label tokens of an epoch", freeze::thousands(s.labels));
    row("length, min / median / max", format!("{} / {} / {}", s.min_len, s.median_len, s.max_len));
    row("steps", freeze::thousands(total));
    row("steps of an epoch", freeze::thousands(epoch));
    t
}

/// What is allowed but rarely meant.
fn warnings(state: &mut State, stage: &Stage, name: &str, total: usize) -> Result<Vec<String>> {
    let trained = state.vlm.trainable();
    let shapes = trained.iter().map(|(n, t)| (n.clone(), t.dims().to_vec())).collect();
    let optimizer = AdamW::of_stage(stage, total, &shapes).with_context(|| format!("stage.{name}"))?;
    let mut out = Vec::new();
    for (i, group) in optimizer.groups().list().iter().enumerate() {
        let members = optimizer.groups().members().iter().filter(|(_, m)| m.group == i);
        let pretrained: Vec<&String> =
            members.map(|(n, _)| n).filter(|n| !super::state::is_adapter(n) && !n.starts_with("projector.")).collect();
        let fresh = pretrained.iter().all(|n| stage_resets(stage, n));
        if group.lr > PRETRAINED_LR && !pretrained.is_empty() && !fresh {
            out.push(format!(
                "stage.{name}: {} pretrained tensors (group `{}`, e.g. {}) get a learning rate of {:e}; above {PRETRAINED_LR:e} they are usually destroyed",
                pretrained.len(), group.name, pretrained[0], group.lr
            ));
        }
    }
    let (Scheduler::Cosine(w) | Scheduler::Linear(w) | Scheduler::Constant(w)) = &stage.lr_scheduler;
    let new = !stage.adapters.is_empty() || trained.keys().any(|n| n.starts_with("projector."));
    if new && no_warmup(w) {
        out.push(format!(
            "stage.{name}: new parameters get no warm-up; set lr_scheduler = {{ cosine = {{ warmup_ratio = 0.03 }} }}"
        ));
    }
    Ok(out)
}

fn no_warmup(w: &Warmup) -> bool {
    w.warmup_ratio.unwrap_or(0.0) == 0.0 && w.warmup_steps.unwrap_or(0) == 0
}

/// Does the stage itself start this parameter from fresh values?
fn stage_resets(stage: &Stage, name: &str) -> bool {
    !stage.reset.is_empty()
        && crate::recipe::pattern::Patterns::new(&stage.reset, &[name.to_string()]).is_ok_and(|p| p.matches(name))
}
