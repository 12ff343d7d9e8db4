//! What trains and what is frozen: the table that is printed and saved, and the proof that frozen stayed frozen.

use super::run_dir::hex;
use super::state::{State, is_adapter};
use crate::bail;
use crate::error::Result;
use crate::model::params::{Module, adapter_of};
use crate::ops::adamw::sum_of_squares;
use crate::recipe::schema::Stage;
use crate::report::Table;
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use serde::Serialize;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// Pattern of the recipe, adapter, or the frozen rest of a component.
    pub what: String,
    pub state: &'static str,
    pub tensors: usize,
    pub parameters: usize,
    pub dtype: String,
}

/// Every parameter in exactly one row: by the `train` pattern that decides it, by adapter, by component.
pub fn rows(state: &mut State, stage: &Stage) -> Result<Vec<Row>> {
    let (params, trainable) = (state.vlm.params(), state.vlm.trainable());
    let own: Vec<String> = params.keys().filter(|n| !is_adapter(n)).cloned().collect();
    let patterns =
        if stage.train.is_empty() { None } else { Some(crate::recipe::pattern::Patterns::new(&stage.train, &own)?) };
    let mut rows: BTreeMap<(usize, String), Row> = BTreeMap::new();
    for (name, t) in &params {
        let trains = trainable.contains_key(name);
        let key = if let Some(adapter) = adapter_of(name) {
            (1_000, format!("adapter {adapter}"))
        } else if let Some(i) = patterns.as_ref().and_then(|p| p.first(name)) {
            (i, stage.train[i].clone())
        } else {
            (2_000, format!("{} (no pattern)", name.split('.').next().unwrap_or(name)))
        };
        let what = key.1.clone();
        let row = rows.entry(key).or_insert(Row {
            what,
            state: if trains { "trains" } else { "frozen" },
            tensors: 0,
            parameters: 0,
            dtype: format!("{:?}", t.dtype()).to_lowercase(),
        });
        row.tensors += 1;
        row.parameters += t.elem_count();
    }
    Ok(rows.into_values().collect())
}

/// The rows as a table with shares.
pub fn table(title: &str, rows: &[Row]) -> Table {
    let total: usize = rows.iter().map(|r| r.parameters).sum();
    let mut t = Table::new(title, ["pattern", "", "tensors", "parameters", "dtype", "share"]);
    let share = |n: usize| format!("{:.2} %", 100.0 * n as f64 / total.max(1) as f64);
    for r in rows {
        t.row([
            r.what.clone(),
            r.state.into(),
            r.tensors.to_string(),
            thousands(r.parameters),
            r.dtype.clone(),
            share(r.parameters),
        ]);
    }
    let trained: usize = rows.iter().filter(|r| r.state == "trains").map(|r| r.parameters).sum();
    let tensors: usize = rows.iter().map(|r| r.tensors).sum();
    t.row([
        "all".to_string(),
        String::new(),
        tensors.to_string(),
        thousands(total),
        String::new(),
        format!("{} trains", share(trained)),
    ]);
    t
}

/// 1234567 → 1,234,567.
pub fn thousands(n: usize) -> String {
    let s = n.to_string();
    let mut out = String::new();
    for (i, c) in s.chars().enumerate() {
        if i > 0 && (s.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(c);
    }
    out
}

/// Checksums of the frozen parameters.
pub fn frozen_checksums(state: &mut State) -> Result<BTreeMap<String, String>> {
    let trainable = state.vlm.trainable();
    let frozen: Vec<(String, Tensor)> =
        state.vlm.params().into_iter().filter(|(n, _)| !trainable.contains_key(n)).collect();
    // candle has a stream for each of the host's threads: what this one has asked for must be done before others read.
    state.vlm.language.device().synchronize()?;
    frozen.into_par_iter().map(|(n, t)| Ok((n, checksum(&t)?))).collect()
}

/// Checks the frozen parameters against their checksums at the stage's start; returns how many there are.
pub fn prove_frozen(state: &mut State, before: &BTreeMap<String, String>) -> Result<usize> {
    let after = frozen_checksums(state)?;
    let moved: Vec<&String> = before.keys().filter(|n| before.get(*n) != after.get(*n)).collect();
    if !moved.is_empty() {
        bail!("frozen parameters have changed: {moved:?}"; "this is a fault of adfreeze; please report it with the recipe")
    }
    Ok(before.len())
}

/// The trained parameters must be numbers: what a broken update left is neither saved nor called done. The error names
/// the tensors.
pub fn prove_finite(trained: &BTreeMap<String, Tensor>) -> Result<()> {
    let mut broken = Vec::new();
    for (name, t) in trained {
        if !sum_of_squares(t)?.is_finite() {
            broken.push(name.as_str());
        }
    }
    if broken.is_empty() {
        return Ok(());
    }
    let more = if broken.len() > 8 { ", …" } else { "" };
    let names = broken[..broken.len().min(8)].join(", ");
    bail!("{} trained parameters are NaN or infinite after the update: {names}{more}", broken.len();
        "lower the learning rate or lengthen the warm-up and run the command again with --allow-changes: it goes on from the last checkpoint")
}

/// SHA-256 of a tensor's elements.
pub fn checksum(t: &Tensor) -> Result<String> {
    let bytes: Vec<u8> = match t.dtype() {
        DType::F64 => t.flatten_all()?.to_vec1::<f64>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        _ => t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
    Ok(hex(&Sha256::digest(&bytes)))
}

/// Watches that every trained parameter gets a gradient within an epoch.
pub struct GradientWatch {
    missing: BTreeSet<String>,
    /// Step (from 0) by which all must have had one.
    deadline: usize,
}

/// With LoRA's B at zero and a first step at learning rate 0, A sees its first gradient in the third step.
const GRACE: usize = 3;

impl GradientWatch {
    /// For a stage that begins (or goes on) at step `first` and whose epoch has `epoch` steps.
    pub fn new(trainable: impl IntoIterator<Item = String>, first: usize, epoch: usize) -> Self {
        Self { missing: trainable.into_iter().collect(), deadline: first + epoch.max(GRACE) }
    }

    /// Notes the squares of the gradients of step `step` (from 0); an error names parameters that got none in a whole epoch.
    pub fn see(&mut self, step: usize, squares: &BTreeMap<String, f64>) -> Result<()> {
        self.missing.retain(|name| squares.get(name).is_none_or(|s| *s == 0.0));
        if step + 1 >= self.deadline && !self.missing.is_empty() {
            let names: Vec<&str> = self.missing.iter().take(8).map(String::as_str).collect();
            bail!("{} trained parameters got no gradient in a whole epoch: {}", self.missing.len(), names.join(", ");
                "freeze them (`!pattern` before the one that trains them), or give the stage data that reaches them")
        }
        Ok(())
    }
}
