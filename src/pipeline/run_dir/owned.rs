//! Which files of a folder a run has written: nothing else there is ever replaced or removed.

use super::{RunDir, stage_dir};
use crate::bail;
use crate::checkpoint::atomic::write_bytes;
use crate::checkpoint::sums::{self, Fit, Sums, sha256_file};
use crate::error::{Context, Result};
use crate::spec::Recipe;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

pub const RECIPE: &str = "recipe.toml";
pub const INPUTS: &str = "inputs.json";
pub const METRICS: &str = "metrics.jsonl";
pub const RESULTS: &str = "results.json";
pub const DONE: &str = "done.json";
pub const FINAL: &str = "final";
pub const CHECKPOINTS: &str = "checkpoints";
/// What evaluations have come to so far, beside the checkpoints.
pub const EVALUATIONS: &str = "evaluations.json";

/// Files of a run's folder that are written as a whole.
pub const ROOT_FILES: [&str; 3] = [RECIPE, INPUTS, RESULTS];
/// Files of a stage's folder.
const STAGE_FILES: [&str; 5] = [RECIPE, "params.json", "merge.json", "reference.safetensors", DONE];
/// What lies in a stage's `final`.
const FINAL_PARTS: [&str; 5] = ["trained.safetensors", "projector.safetensors", "adapters", "vision", "language"];

/// May a name in the run's folders be one of ours?
pub fn is_name(name: &str) -> bool {
    let fixed =
        ROOT_FILES.iter().chain(&STAGE_FILES).chain(&[METRICS, FINAL, EVALUATIONS, sums::FILE]).any(|n| *n == name);
    fixed || name.strip_prefix("step-").is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()))
}

/// Refuses a folder in which a run of `recipe` would replace what no run has written. Nothing is made or changed.
pub fn refuse_others(root: &Path, recipe: &Recipe) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    if !root.is_dir() {
        bail!("output_dir: {} is a file, not a folder", root.display(); "choose another output_dir")
    }
    if in_the_way(root, recipe)?.is_empty() {
        return Ok(());
    }
    // A run that has just begun may not have listed its files a moment ago.
    if super::is_locked(root) {
        bail!("another process is training in {}", root.display(); "wait until it ends, or choose another output_dir")
    }
    let found = in_the_way(root, recipe)?;
    if found.is_empty() {
        return Ok(());
    }
    bail!("output_dir: {} holds files that no run of adfreeze has written, where this run would write:\n  {}",
        root.display(), sums::told(&found);
        "choose an output_dir that is a folder of the run's own, or move these files away; none of them was touched")
}

fn in_the_way(root: &Path, recipe: &Recipe) -> Result<Vec<PathBuf>> {
    let stages = recipe.stages.iter().map(|s| stage_dir(root, recipe, s));
    let mut found = Vec::new();
    let Some(known) = Sums::read(root)? else {
        if is_older_run(root) {
            return Ok(found);
        }
        let files = ROOT_FILES.iter().chain(&[METRICS, sums::FILE]).map(|n| root.join(n));
        found.extend(files.filter(|p| fs::symlink_metadata(p).is_ok()));
        for dir in stages {
            match dir.is_dir() {
                true => found.extend(sums::files(&dir)?.iter().map(|f| dir.join(f))),
                false => found.extend(fs::symlink_metadata(&dir).ok().map(|_| dir)),
            }
        }
        return Ok(found);
    };
    let mut other = |name: String| -> Result<bool> {
        let foreign = known.fit(root, &name)? == Fit::Foreign;
        if foreign {
            found.push(root.join(&name));
        }
        Ok(foreign)
    };
    for name in ROOT_FILES {
        other(name.to_string())?;
    }
    let mut finals = Vec::new();
    for dir in stages {
        if fs::symlink_metadata(&dir).is_ok() && !dir.is_dir() {
            finals.push(dir);
            continue;
        }
        let name = dir.file_name().unwrap_or_default().to_string_lossy();
        for file in STAGE_FILES {
            other(format!("{name}/{file}"))?;
        }
        if !dir.join(DONE).exists() {
            finals.push(dir.join(FINAL));
        }
    }
    for path in finals {
        found.extend(sums::foreign(&path)?);
    }
    Ok(found)
}

/// Is this the folder of a run that an earlier version began, which kept no checksums?
fn is_older_run(root: &Path) -> bool {
    let text = |name: &str| fs::read_to_string(root.join(name)).ok();
    let recipe = text(RECIPE).is_some_and(|t| toml::from_str::<Recipe>(&t).is_ok());
    recipe && text(INPUTS).is_some_and(|t| serde_json::from_str::<BTreeMap<String, String>>(&t).is_ok())
}

/// Takes the files of such a run as they are: lists them, and gives each stage that has begun its copy of the recipe.
pub fn adopt(root: &Path) -> Result<Option<Sums>> {
    if !is_older_run(root) {
        return Ok(None);
    }
    let text = fs::read_to_string(root.join(RECIPE))?;
    let Ok(recipe) = toml::from_str::<Recipe>(&text) else { return Ok(None) };
    let mut known = Sums::default();
    let mut take = |path: &Path| -> Result<()> {
        if path.is_file() {
            known.set(&RunDir::name_in(root, path), &sha256_file(path)?);
        }
        Ok(())
    };
    for name in ROOT_FILES {
        take(&root.join(name))?;
    }
    for stage in &recipe.stages {
        let dir = stage_dir(root, &recipe, stage);
        if !has_begun(&dir) {
            continue;
        }
        if !dir.join(RECIPE).exists() {
            write_bytes(&dir.join(RECIPE), text.as_bytes())?;
        }
        for name in STAGE_FILES {
            take(&dir.join(name))?;
        }
        let saved = fs::read_dir(dir.join(CHECKPOINTS)).into_iter().flatten().flatten().map(|e| e.path());
        for folder in saved.filter(|p| p.is_dir()) {
            list_folder(&folder, &["trained.safetensors", "optimizer.safetensors"])?;
        }
        list_folder(&dir.join(FINAL), &FINAL_PARTS)?;
    }
    Ok(Some(known))
}

/// Lists the files of `parts` in a folder that has no list.
fn list_folder(dir: &Path, parts: &[&str]) -> Result<()> {
    if !dir.is_dir() || Sums::read(dir)?.is_some() {
        return Ok(());
    }
    let mut known = Sums::default();
    for name in sums::files(dir)? {
        if parts.contains(&name.split('/').next().unwrap_or_default()) {
            known.set(&name, &sha256_file(&dir.join(&name))?);
        }
    }
    known.write(dir)
}

/// Does a stage's folder hold a checkpoint, or its end?
pub fn has_begun(dir: &Path) -> bool {
    fs::read_dir(dir.join(CHECKPOINTS)).is_ok_and(|mut all| all.next().is_some()) || dir.join(DONE).exists()
}

/// Does the run's folder hold a stage that has begun?
pub fn run_has_begun(root: &Path) -> Result<bool> {
    for entry in fs::read_dir(root).with_context(|| root.display().to_string())? {
        let entry = entry.with_context(|| root.display().to_string())?;
        if entry.file_name().to_str().is_some_and(is_stage) && has_begun(&entry.path()) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Is this the name of a stage's folder, `NN-NAME`? Others' folders hold what they hold.
fn is_stage(name: &str) -> bool {
    name.split_once('-').is_some_and(|(n, _)| n.len() >= 2 && n.bytes().all(|b| b.is_ascii_digit()))
}
