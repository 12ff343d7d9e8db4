//! Checkpoints within a stage: trained tensors and optimizer state, written as a whole or not at all.

use super::state::{State, assign};
use crate::checkpoint::atomic;
use crate::checkpoint::safetensors;
use crate::error::{Context, Result};
use crate::model::params::Module;
use crate::optim::AdamW;
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

const TRAINED: &str = "trained.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";

/// Writes the checkpoint after `step` steps and deletes all but the newest `keep`.
pub fn save(
    stage_dir: &Path,
    step: usize,
    params: &BTreeMap<String, Tensor>,
    optimizer: &AdamW,
    keep: usize,
) -> Result<()> {
    let folder = stage_dir.join("checkpoints");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let state = optimizer.state()?;
    atomic::directory(&folder.join(format!("step-{step:08}")), |dir| {
        save_tensors(&dir.join(TRAINED), params)?;
        save_tensors(&dir.join(OPTIMIZER), &state)
    })?;
    let all = list(stage_dir)?;
    for (_, old) in all.iter().rev().skip(keep.max(1)) {
        fs::remove_dir_all(old).with_context(|| old.display().to_string())?;
    }
    Ok(())
}

fn save_tensors(path: &Path, tensors: &BTreeMap<String, Tensor>) -> Result<()> {
    safetensors::save(path, tensors, &BTreeMap::new())
}

/// Loads the newest checkpoint into model and optimizer; returns the number of steps done, 0 if there is none.
pub fn resume(stage_dir: &Path, state: &mut State, optimizer: &mut AdamW) -> Result<usize> {
    let Some((step, dir)) = list(stage_dir)?.pop() else { return Ok(0) };
    let read =
        |file: &str| safetensors::load(&dir.join(file)).with_context(|| format!("the checkpoint {}", dir.display()));
    let trained = read(TRAINED)?;
    let known = state.vlm.trainable();
    if let Some(name) =
        known.keys().find(|n| !trained.contains_key(*n)).or(trained.keys().find(|n| !known.contains_key(*n)))
    {
        crate::bail!("the checkpoint {} and the recipe disagree on whether {name} trains", dir.display();
            "undo the change, or delete the stage's folder to start it again")
    }
    optimizer.load_state(&read(OPTIMIZER)?).with_context(|| dir.display().to_string())?;
    assign(&mut state.vlm, &trained);
    Ok(step)
}

/// Checkpoints of a stage by step, oldest first.
fn list(stage_dir: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let folder = stage_dir.join("checkpoints");
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut out = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let step = path
            .file_name()
            .and_then(|n| n.to_str())
            .and_then(|n| n.strip_prefix("step-"))
            .and_then(|n| n.parse().ok());
        if let Some(step) = step {
            out.push((step, path));
        }
    }
    out.sort();
    Ok(out)
}
