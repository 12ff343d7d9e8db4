//! What a stage consists of and what each part of it costs: one table, in `check`, at a stage's start and in `params.json`.
//!
//! Every parameter is in exactly one row: that of its component, of the pattern or adapter that decides about it, of whether it
//! trains. Neighbouring layers that differ in none of this, nor in whether backward reaches them, share a row.

use super::state::State;
use crate::error::Result;
use crate::model::params::{Module, Param};
use crate::model::role::{Level, Part, Role};
use crate::model::segment::Kept;
use crate::model::vlm::{Load, Vlm};
use crate::ops::bytes;
use crate::optim::AdamW;
use crate::report::{Table, human};
use crate::spec::pattern::Patterns;
use crate::spec::{Optimizer, Stage};
use candle_core::DType;
use serde::Serialize;
use std::collections::{BTreeMap, BTreeSet};

/// One line of the table. Bytes are those of a step: weights in every type in which they stand (master and rounded copy),
/// gradients, and what the optimizer keeps.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// In the words of a pattern, e.g. `language.layers[0..10]`, or `adapter sft (lora)`.
    pub component: String,
    /// Pattern of the recipe, adapter, or the frozen rest of a part.
    pub what: String,
    pub state: &'static str,
    pub tensors: usize,
    pub parameters: usize,
    pub dtype: String,
    pub weight_bytes: u64,
    pub gradient_bytes: u64,
    pub optimizer_bytes: u64,
    /// What layers and projector keep for backward of the stage's largest micro-batch, what adapters keep in them included. Head
    /// and embeddings are not counted.
    pub activation_bytes: Activations,
}

/// Bytes under each policy that a stage may have; layers that the recipe lets recompute do so under each.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Activations {
    pub none: u64,
    pub minimal: u64,
    pub recompute: u64,
}

impl Activations {
    fn of(&self, kept: Kept) -> u64 {
        match kept {
            Kept::All => self.none,
            Kept::Minimal => self.minimal,
            Kept::Input => self.recompute,
            Kept::Nothing => 0,
        }
    }

    fn add(&mut self, other: Self) {
        self.none += other.none;
        self.minimal += other.minimal;
        self.recompute += other.recompute;
    }
}

/// A parameter's masters and moments are told by these.
pub struct Training<'a> {
    pub stage: &'a Stage,
    pub optimizer: &'a AdamW,
    /// The micro-batches that can be the stage's largest.
    pub loads: &'a [Load],
    /// Frozen parameters that have a master from an earlier stage although none stands in this model yet (`check` makes none).
    pub masters: &'a BTreeSet<String>,
}

/// What decides in which row a parameter is, in the order of the rows.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    part: (usize, String),
    layer: Option<usize>,
    trains: bool,
    what: (usize, String),
    dtype: String,
}

/// Every parameter in exactly one row.
pub fn rows(state: &State, training: &Training) -> Result<Vec<Row>> {
    let own: Vec<String> = state.vlm.names(|p| !p.is_adapter()).into_iter().collect();
    let train = &training.stage.train;
    let patterns = if train.is_empty() { None } else { Some(Patterns::new(train, &own)?) };
    let kinds: BTreeMap<&str, &str> = state.adapters.iter().map(|(name, a)| (name.as_str(), a.kind())).collect();
    let below = below(&state.vlm);
    let mut all: BTreeMap<Place, Row> = BTreeMap::new();
    let mut seen = BTreeSet::new();
    let mut result = Ok(());
    state.vlm.visit(&mut |p| {
        // A tied parameter comes twice.
        if result.is_err() || !seen.insert(p.name.clone()) {
            return;
        }
        let decided = patterns.as_ref().and_then(|patterns| patterns.first(&p.name)).map(|i| (i, train[i].clone()));
        let place = place(p, decided, &kinds, &below, dtype(p, training));
        let row = all.entry(place.clone()).or_insert_with(|| Row::empty(&place));
        result = row.add(p, training);
    });
    result?;
    let layers = activations(&state.vlm, training.loads)?;
    let mut counted: BTreeSet<&str> = BTreeSet::new();
    // Of a layer's rows the one that trains has its activations: they are kept for its sake.
    for (place, row) in all.iter_mut().rev() {
        let Some((name, kept)) = layers.get_key_value(&place.keeps()) else { continue };
        if counted.insert(name) {
            row.activation_bytes = *kept;
        }
    }
    Ok(joined(all, |place, i| layers.contains_key(&Place { layer: Some(i), ..place.clone() }.keeps())))
}

impl Place {
    /// The name of what keeps activations here.
    fn keeps(&self) -> String {
        self.layer.map_or_else(|| self.part.1.clone(), |i| format!("{}.{i}", self.part.1))
    }
}

/// The modules below the tower's layers, as a pattern.
fn below(vlm: &Vlm) -> String {
    let names = vlm.names(|p| p.role.part == Part::Vision && p.role.level == Level::Below && !p.is_adapter());
    let modules: BTreeSet<&str> = names.iter().filter_map(|n| n.split('.').nth(1)).collect();
    let list = modules.into_iter().collect::<Vec<_>>().join(",");
    if list.contains(',') { format!("vision.{{{list}}}") } else { format!("vision.{list}") }
}

fn place(
    p: &Param,
    decided: Option<(usize, String)>,
    kinds: &BTreeMap<&str, &str>,
    below: &str,
    dtype: String,
) -> Place {
    let of =
        |part: (usize, String), layer, what| Place { part, layer, trains: p.trainable, what, dtype: dtype.clone() };
    if let Some(adapter) = p.role.adapter() {
        let kind = kinds.get(adapter).map_or(String::new(), |kind| format!(" ({kind})"));
        let what = format!("adapter {adapter}");
        return of((9, format!("{what}{kind}")), None, (0, what));
    }
    let what = decided.unwrap_or_else(|| (usize::MAX, format!("{} (no pattern)", first_word(&p.name))));
    let module = || p.name.split('.').take(2).collect::<Vec<_>>().join(".");
    match (p.role.part, p.role.level) {
        (Part::Vision, Level::Below) => of((0, below.to_string()), None, what),
        (part @ (Part::Vision | Part::Language), Level::Layer(i)) => {
            let stack = p.name.split_once(&format!(".{i}.")).map_or("", |(stack, _)| stack);
            of((if part == Part::Vision { 1 } else { 5 }, stack.to_string()), Some(i), what)
        }
        (Part::Vision, Level::Above) => of((2, module()), None, what),
        (Part::Projector, _) => of((3, "projector".to_string()), None, what),
        (Part::Language, Level::Below) => of((4, module()), None, what),
        (Part::Language, Level::Above) => of((if p.name.contains("norm") { 6 } else { 7 }, module()), None, what),
    }
}

fn first_word(name: &str) -> &str {
    name.split('.').next().unwrap_or(name)
}

impl Row {
    fn empty(place: &Place) -> Self {
        Self {
            component: place.part.1.clone(),
            what: place.what.1.clone(),
            state: if place.trains { "trains" } else { "frozen" },
            tensors: 0,
            parameters: 0,
            dtype: place.dtype.clone(),
            weight_bytes: 0,
            gradient_bytes: 0,
            optimizer_bytes: 0,
            activation_bytes: Activations::default(),
        }
    }

    fn add(&mut self, p: &Param, training: &Training) -> Result<()> {
        self.tensors += 1;
        self.parameters += p.value.elem_count();
        self.weight_bytes += weight_bytes(p, training);
        if p.trainable {
            // As `Grads` keeps them.
            let size = p.value.dtype().size_in_bytes().max(DType::F32.size_in_bytes());
            self.gradient_bytes += (size * p.value.elem_count()) as u64;
            let member = training.optimizer.groups().member(&p.name)?;
            self.optimizer_bytes += training.optimizer.moment_bytes(member);
        }
        Ok(())
    }

    fn join(&mut self, other: Self) {
        self.tensors += other.tensors;
        self.parameters += other.parameters;
        self.weight_bytes += other.weight_bytes;
        self.gradient_bytes += other.gradient_bytes;
        self.optimizer_bytes += other.optimizer_bytes;
        self.activation_bytes.add(other.activation_bytes);
    }
}

/// Has a trained parameter of this role a master where the model computes in bf16?
pub fn gets_master(stage: &Stage, role: &Role) -> bool {
    let Optimizer::Adamw(adamw) = &stage.optimizer;
    !adamw.stochastic_rounding || !role.is_backbone()
}

/// Has a parameter an f32 master beside what it is computed with, in the stage: one that stands, or that the stage will make?
fn has_master(p: &Param, training: &Training) -> bool {
    match (p.compute().dtype(), p.trainable) {
        (DType::BF16, true) => gets_master(training.stage, &p.role),
        (DType::BF16, false) => p.value.dtype() != DType::BF16 || training.masters.contains(&p.name),
        _ => false,
    }
}

/// The type of a parameter's value in the stage.
fn dtype(p: &Param, training: &Training) -> String {
    let dtype = if has_master(p, training) { DType::F32 } else { p.compute().dtype() };
    format!("{dtype:?}").to_lowercase()
}

/// Bytes of a parameter in the stage, in every type in which it stands.
fn weight_bytes(p: &Param, training: &Training) -> u64 {
    let master = if has_master(p, training) { DType::F32.size_in_bytes() * p.value.elem_count() } else { 0 };
    (bytes(p.compute()) + master) as u64
}

/// Bytes that each layer, and the projector, keeps at most, by its name.
fn activations(vlm: &Vlm, loads: &[Load]) -> Result<BTreeMap<String, Activations>> {
    let mut all: BTreeMap<String, Activations> = BTreeMap::new();
    for kept in [Kept::All, Kept::Minimal, Kept::Input] {
        let Some(load) = largest(vlm, loads, kept)? else { continue };
        for (name, bytes) in vlm.kept_by_layer(load, kept)? {
            let of = all.entry(name.to_string()).or_default();
            match kept {
                Kept::All => of.none = bytes as u64,
                Kept::Minimal => of.minimal = bytes as u64,
                Kept::Input | Kept::Nothing => of.recompute = bytes as u64,
            }
        }
    }
    Ok(all)
}

/// The micro-batch of which the layers keep the most.
pub fn largest(vlm: &Vlm, loads: &[Load], kept: Kept) -> Result<Option<Load>> {
    let mut most: Option<(usize, Load)> = None;
    for load in loads {
        let bytes = vlm.kept_bytes(*load, kept)?;
        if most.is_none_or(|(b, _)| bytes > b) {
            most = Some((bytes, *load));
        }
    }
    Ok(most.map(|(_, load)| load))
}

/// Joins the rows of neighbouring layers that are alike. `reached`: does backward reach the layer i of a place?
fn joined(all: BTreeMap<Place, Row>, reached: impl Fn(&Place, usize) -> bool) -> Vec<Row> {
    // The run of layers that a kind of row has last reached, and where its row is.
    let mut open: BTreeMap<(Place, bool), (usize, usize, usize)> = BTreeMap::new();
    let mut rows: Vec<(Place, Row)> = Vec::new();
    for (place, row) in all {
        let Some(i) = place.layer else {
            rows.push((place, row));
            continue;
        };
        let kind = (Place { layer: None, ..place.clone() }, reached(&place, i));
        match open.get_mut(&kind) {
            Some((_, last, at)) if *last + 1 == i => {
                *last = i;
                rows[*at].1.join(row);
            }
            _ => {
                open.insert(kind.clone(), (i, i, rows.len()));
                rows.push((place, row));
            }
        }
        if let Some((first, last, at)) = open.get(&kind) {
            let range = if first == last { first.to_string() } else { format!("{first}..{}", last + 1) };
            rows[*at].1.component = format!("{}[{range}]", kind.0.part.1);
        }
    }
    rows.sort_by(|(a, _), (b, _)| a.cmp(b));
    rows.into_iter().map(|(_, row)| row).collect()
}

/// The rows as a table; `kept`: the stage's policy.
pub fn table(title: &str, rows: &[Row], kept: Kept) -> Table {
    let columns =
        ["component", "", "parameters", "share", "dtype", "weights", "gradients", "optimizer", "activations", "by"];
    let mut t = Table::new(title, columns);
    let total: usize = rows.iter().map(|r| r.parameters).sum();
    let share = |n: usize| format!("{:.2} %", 100.0 * n as f64 / total.max(1) as f64);
    let size = |n: u64| if n == 0 { "-".to_string() } else { human::bytes(n) };
    let sum = |of: &dyn Fn(&Row) -> u64| size(rows.iter().map(of).sum());
    for r in rows {
        t.row([
            r.component.clone(),
            r.state.to_string(),
            human::thousands(r.parameters as u64),
            share(r.parameters),
            r.dtype.clone(),
            size(r.weight_bytes),
            size(r.gradient_bytes),
            size(r.optimizer_bytes),
            size(r.activation_bytes.of(kept)),
            r.what.clone(),
        ]);
    }
    let trained: usize = rows.iter().filter(|r| r.state == "trains").map(|r| r.parameters).sum();
    t.row([
        "all".to_string(),
        String::new(),
        human::thousands(total as u64),
        String::new(),
        String::new(),
        sum(&|r| r.weight_bytes),
        sum(&|r| r.gradient_bytes),
        sum(&|r| r.optimizer_bytes),
        sum(&|r| r.activation_bytes.of(kept)),
        format!("{} trains", share(trained)),
    ]);
    t
}

/// What stands below the table: where backward stops, and what the activations are those of.
pub fn notes(vlm: &Vlm, rows: &[Row], loads: &[Load], kept: Kept) -> Result<String> {
    let stops = vlm.stops_above();
    let stops = if stops.is_empty() {
        "backward goes down to all inputs".to_string()
    } else {
        format!("backward stops above {}", stops.join(" and above "))
    };
    let name = match kept {
        Kept::All => "none",
        Kept::Minimal => "minimal",
        Kept::Input => "recompute",
        Kept::Nothing => "nothing",
    };
    let sum = |kept| human::bytes(rows.iter().map(|r| r.activation_bytes.of(kept)).sum());
    let Some(load) = largest(vlm, loads, kept)? else { return Ok(stops) };
    Ok(format!(
        "{stops}\nactivations = \"{name}\"; layers and projector keep of the largest micro-batch ({} tokens, {} pictures): none {}, minimal {}, recompute {}",
        human::thousands(load.tokens as u64),
        human::thousands(load.pictures as u64),
        sum(Kept::All),
        sum(Kept::Minimal),
        sum(Kept::Input)
    ))
}
