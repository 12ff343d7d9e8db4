//! Checkpoints within a stage: trained tensors and optimizer state, written as a whole or not at all.

use super::run_dir::RunDir;
use super::state::State;
use crate::bail;
use crate::checkpoint::atomic::{self, storage_error};
use crate::checkpoint::safetensors;
use crate::checkpoint::sums::{self, Sums};
use crate::error::{Context, Error, Result};
use crate::model::params::Module;
use crate::optim::AdamW;
use candle_core::Tensor;
use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// How far a stage has come.
#[derive(Debug, Clone, PartialEq)]
pub struct Progress {
    /// Steps done.
    pub steps: usize,
    /// Loss of the last of them; NaN before the first.
    pub loss: f64,
    /// SHA-256 of the stage's lines in the metrics; `None` before the first step, and in checkpoints of earlier versions.
    pub metrics_sha256: Option<String>,
}

/// The trained tensors of a checkpoint.
pub const TRAINED: &str = "trained.safetensors";
const OPTIMIZER: &str = "optimizer.safetensors";
const LOSS: &str = "loss";
const METRICS: &str = "metrics_sha256";
/// Ending of a damaged checkpoint that was set aside.
const DAMAGED: &str = "damaged";

/// Writes a checkpoint and deletes all but the newest `keep`. Returns what is to be told as warnings: old checkpoints that
/// could not be deleted (a network file system may keep what is open elsewhere), which is tried again with the next one.
///
/// # Errors
/// It cannot be written; the run's folder has gone or is another process's.
pub fn save(
    run: &RunDir,
    stage_dir: &Path,
    at: &Progress,
    params: &BTreeMap<String, Tensor>,
    optimizer: &AdamW,
    keep: usize,
) -> Result<Vec<String>> {
    run.prove_there(stage_dir)?;
    let folder = self::folder(stage_dir);
    if !folder.exists() {
        fs::create_dir(&folder).map_err(|e| storage_error(&folder, e))?;
    }
    let state = optimizer.state()?;
    atomic::summed_directory(&folder.join(name(at.steps)), |dir| {
        let mut about = BTreeMap::from([(LOSS.to_string(), format!("{:?}", at.loss))]);
        about.extend(at.metrics_sha256.clone().map(|sum| (METRICS.to_string(), sum)));
        let mut sums = Sums::default();
        sums.set(TRAINED, &safetensors::save_summed(&dir.join(TRAINED), params, &about)?);
        sums.set(OPTIMIZER, &safetensors::save_summed(&dir.join(OPTIMIZER), &state, &BTreeMap::new())?);
        Ok(sums)
    })?;
    let mut warnings = Vec::new();
    for (_, old) in list(stage_dir)?.iter().rev().skip(keep.max(1)) {
        match delete(old) {
            Ok(None) => {}
            Ok(Some(left)) => warnings.push(left),
            Err(e) => {
                let again = "it is tried again with the next checkpoint";
                warnings.push(format!("cannot delete the old checkpoint {}: {e}; {again}", old.display()));
            }
        }
    }
    Ok(warnings)
}

/// Deletes the files that a checkpoint was written with, its list last, so that what could not be deleted is known as ours the next
/// time; and its folder, if nothing else is in it. Returns what to say if something is.
fn delete(dir: &Path) -> Result<Option<String>> {
    let known = Sums::read(dir)?;
    for name in known.iter().flat_map(Sums::names).chain(known.as_ref().map(|_| sums::FILE)) {
        match fs::remove_file(dir.join(name)) {
            Err(e) if e.kind() != ErrorKind::NotFound => return Err(e.into()),
            _ => {}
        }
    }
    let left: Vec<PathBuf> = sums::files(dir)?.iter().map(|name| dir.join(name)).collect();
    if left.is_empty() {
        fs::remove_dir_all(dir)?;
        return Ok(None);
    }
    // It has been said; or a network file system keeps what is open elsewhere under such a name.
    if known.is_none() || left.iter().all(|f| f.file_name().is_some_and(|n| n.to_string_lossy().starts_with(".nfs"))) {
        return Ok(None);
    }
    let (dir, left) = (dir.display(), sums::told(&left));
    Ok(Some(format!("the old checkpoint {dir} is deleted, but for files that adfreeze did not write:\n  {left}")))
}

/// Loads the newest checkpoint that is whole, if there is one, into model and optimizer; returns how far it had come. A newer one
/// that is damaged is told by `warn` and set aside.
///
/// # Errors
/// There are checkpoints, but none is whole; it is of another recipe; a file cannot be read.
pub fn resume(stage_dir: &Path, state: &mut State, optimizer: &mut AdamW, warn: impl Fn(&str)) -> Result<Progress> {
    let mut damaged = Vec::new();
    for (steps, dir) in list(stage_dir)?.into_iter().rev() {
        match damage(&dir).with_context(|| format!("the checkpoint {}", dir.display()))? {
            Some(what) => damaged.push((dir, what)),
            None => {
                for (newer, what) in &damaged {
                    let aside = aside(newer);
                    fs::rename(newer, &aside).map_err(|e| storage_error(&aside, e))?;
                    warn(&format!(
                        "the checkpoint {} is damaged ({what}): the stage goes on from step {steps}; it was set aside as {}",
                        newer.display(),
                        aside.display()
                    ));
                }
                return load(steps, &dir, state, optimizer);
            }
        }
    }
    let Some((newest, what)) = damaged.first() else {
        return Ok(Progress { steps: 0, loss: f64::NAN, metrics_sha256: None });
    };
    let older = if damaged.len() > 1 { ", and so are all before it" } else { ", and there is no other" };
    bail!("the checkpoint {} is damaged ({what}){older}", newest.display();
        "copy it back from a backup, or delete {}: the stage begins again", folder(stage_dir).display())
}

/// A free name beside a damaged checkpoint.
fn aside(dir: &Path) -> PathBuf {
    let mut free = dir.with_extension(DAMAGED);
    let mut n = 1;
    while fs::symlink_metadata(&free).is_ok() {
        n += 1;
        free = dir.with_extension(format!("{DAMAGED}-{n}"));
    }
    free
}

/// What of a checkpoint is not as it was written.
fn damage(dir: &Path) -> Result<Option<String>> {
    match Sums::read(dir) {
        Ok(Some(sums)) => match [TRAINED, OPTIMIZER].into_iter().find(|n| !sums.names().any(|s| s == *n)) {
            Some(name) => Ok(Some(format!("{name} is not in its list of checksums"))),
            None => sums.damage(dir),
        },
        Ok(None) => Ok(Some("it has no list of checksums".to_string())),
        Err(e) => Ok(Some(e.cause().to_string())),
    }
}

fn load(steps: usize, dir: &Path, state: &mut State, optimizer: &mut AdamW) -> Result<Progress> {
    let delete =
        || format!("delete {}: the stage goes on from the checkpoint before it, or begins again", dir.display());
    let damaged = |e: Error| e.context(format!("the checkpoint {}", dir.display())).hint(delete());
    let read = |file: &str| safetensors::load(&dir.join(file)).map_err(damaged);
    let trained = read(TRAINED)?;
    let known = state.vlm.trainable();
    if let Some(name) =
        known.keys().find(|n| !trained.contains_key(*n)).or(trained.keys().find(|n| !known.contains_key(*n)))
    {
        bail!("the checkpoint {} and the recipe disagree on whether {name} trains", dir.display();
            "undo the change, or delete the stage's folder to start it again")
    }
    optimizer.load_state(&read(OPTIMIZER)?).with_context(|| dir.display().to_string())?;
    state.vlm.assign(&trained)?;
    let path = dir.join(TRAINED);
    let about = safetensors::metadata(&path)?;
    let Some(loss) = about.get(LOSS).and_then(|l| l.parse().ok()) else {
        bail!("{} does not say its loss", path.display(); "{}", delete())
    };
    Ok(Progress { steps, loss, metrics_sha256: about.get(METRICS).cloned() })
}

/// Where a stage's checkpoints are.
pub fn folder(stage_dir: &Path) -> PathBuf {
    stage_dir.join("checkpoints")
}

/// The newest checkpoint of a stage: its step and folder.
pub fn newest(stage_dir: &Path) -> Result<Option<(usize, PathBuf)>> {
    Ok(list(stage_dir)?.pop())
}

/// Checkpoints of a stage by step, oldest first.
pub fn list(stage_dir: &Path) -> Result<Vec<(usize, PathBuf)>> {
    let folder = self::folder(stage_dir);
    if !folder.exists() {
        return Ok(Vec::new());
    }
    let mut out = Vec::new();
    for entry in fs::read_dir(&folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        let step = path.file_name().and_then(|n| n.to_str()?.strip_prefix("step-")?.parse().ok());
        // Another way to write the number is not ours.
        if let Some(step) = step.filter(|step| path.ends_with(name(*step))) {
            out.push((step, path));
        }
    }
    out.sort();
    Ok(out)
}

/// A checkpoint's folder.
fn name(step: usize) -> String {
    format!("step-{step:08}")
}
