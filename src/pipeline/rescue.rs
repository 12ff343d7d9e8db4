//! The way on after a training has diverged: which checkpoint is worth to go on from, and what to delete to get there.

use super::checkpoints;
use super::health::{self, Health, Sizes};
use crate::checkpoint::safetensors;
use crate::error::{Error, Result};
use crate::report::MetricsFile;
use std::path::{Path, PathBuf};

/// An error of numbers that broke gets a hint that works: it names the newest checkpoint of the stage whose weights are finite
/// and of a sane size, and whose losses were, and what is to be deleted to go on from it. Another error stays as it is.
pub fn advise(e: Error, root: &Path, name: &str, dir: &Path, start: &Sizes) -> Error {
    if !e.has_diverged() {
        return e;
    }
    let mut broken = Vec::new();
    let mut all = checkpoints::list(dir).unwrap_or_default();
    while let Some((step, path)) = all.pop() {
        if is_sound(root, name, step, &path, start).unwrap_or(false) {
            return e.hint(hint(&broken, &format!("goes on from {}", path.display())));
        }
        broken.push(path);
    }
    e.hint(hint(&broken, "begins the stage again"))
}

/// Could a training go on from this checkpoint?
fn is_sound(root: &Path, name: &str, step: usize, path: &Path, start: &Sizes) -> Result<bool> {
    let mut health = Health::default();
    for (loss, gradient) in MetricsFile::history(&root.join("metrics.jsonl"), name)?.into_iter().take(step) {
        let _ = health.see(loss, gradient);
    }
    let trained = safetensors::load(&path.join(checkpoints::TRAINED))?;
    Ok(health.is_sound() && health::exploded(start, &health::sizes(&trained)?).is_none())
}

fn hint(broken: &[PathBuf], goes_on: &str) -> String {
    let names: Vec<String> = broken.iter().map(|p| p.display().to_string()).collect();
    let delete = match names.is_empty() {
        true => String::new(),
        false => format!("delete {} (what they hold has diverged as well), then ", names.join(", ")),
    };
    format!(
        "{delete}lower the learning rate (or the weight decay) or lengthen the warm-up, and run the command again with --allow-changes: it {goes_on}"
    )
}
