//! Checkpoints within a stage: trained tensors and optimizer state, written as a whole or not at all.

use super::state::State;
use crate::checkpoint::atomic;
use crate::checkpoint::safetensors;
use crate::error::{Context, Error, Result};
use crate::model::params::Module;
use crate::optim::AdamW;
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// How far a stage has come.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub steps: usize,
    /// Loss of the last of them; NaN before the first.
    pub loss: f64,
}

/// The trained tensors of a checkpoint.
pub const TRAINED: &str = "trained.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const LOSS: &str = "loss";

/// Writes a checkpoint and deletes all but the newest `keep`.
pub fn save(
    stage_dir: &Path,
    at: Progress,
    params: &BTreeMap<String, Tensor>,
    optimizer: &AdamW,
    keep: usize,
) -> Result<()> {
    let folder = stage_dir.join("checkpoints");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let state = optimizer.state()?;
    atomic::directory(&folder.join(format!("step-{:08}", at.steps)), |dir| {
        let loss = BTreeMap::from([(LOSS.to_string(), format!("{:?}", at.loss))]);
        safetensors::save(&dir.join(TRAINED), params, &loss)?;
        safetensors::save(&dir.join(OPTIMIZER), &state, &BTreeMap::new())
    })?;
    let all = list(stage_dir)?;
    for (_, old) in all.iter().rev().skip(keep.max(1)) {
        fs::remove_dir_all(old).with_context(|| old.display().to_string())?;
    }
    Ok(())
}

/// Loads the newest checkpoint, if there is one, into model and optimizer; returns how far it had come.
pub fn resume(stage_dir: &Path, state: &mut State, optimizer: &mut AdamW) -> Result<Progress> {
    let none = Progress { steps: 0, loss: f64::NAN };
    let Some((steps, dir)) = newest(stage_dir)? else { return Ok(none) };
    let delete =
        || format!("delete {}: the stage goes on from the checkpoint before it, or begins again", dir.display());
    let damaged = |e: Error| e.context(format!("the checkpoint {}", dir.display())).hint(delete());
    let read = |file: &str| {
        let path = dir.join(file);
        // What cannot be opened is not damaged.
        fs::File::open(&path).with_context(|| path.display().to_string())?;
        safetensors::load(&path).map_err(damaged)
    };
    let trained = read(TRAINED)?;
    let known = state.vlm.trainable();
    if let Some(name) =
        known.keys().find(|n| !trained.contains_key(*n)).or(trained.keys().find(|n| !known.contains_key(*n)))
    {
        crate::bail!("the checkpoint {} and the recipe disagree on whether {name} trains", dir.display();
            "undo the change, or delete the stage's folder to start it again")
    }
    optimizer.load_state(&read(OPTIMIZER)?).with_context(|| dir.display().to_string())?;
    state.vlm.assign(&trained)?;
    let path = dir.join(TRAINED);
    let Some(loss) = safetensors::metadata(&path)?.get(LOSS).and_then(|l| l.parse().ok()) else {
        crate::bail!("{} does not say its loss", path.display(); "{}", delete())
    };
    Ok(Progress { steps, loss })
}

/// The newest checkpoint of a stage: its step and folder.
pub fn newest(stage_dir: &Path) -> Result<Option<(usize, PathBuf)>> {
    Ok(list(stage_dir)?.pop())
}

/// Checkpoints of a stage by step, oldest first.
pub fn list(stage_dir: &Path) -> Result<Vec<(usize, PathBuf)>> {
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
