//! Going on with a run: whether recipe, inputs and finished stages are still what it was begun with.

use super::changes::{changes, flatten_toml, of_finished};
use super::inputs::Inputs;
use super::owned::{self, INPUTS, METRICS, RECIPE, RESULTS};
use super::{DELETE_RESULTS, Done, RunDir, read_json};
use crate::bail;
use crate::checkpoint::atomic::storage_error;
use crate::checkpoint::sums::sha256;
use crate::error::Result;
use crate::pipeline::state::{lineage, parent};
use crate::report::MetricsFile;
use crate::spec::Recipe;
use std::fs;
use std::path::Path;

impl RunDir {
    /// Nothing was trained with what an earlier attempt left.
    pub(super) fn begin_again(&self) -> Result<()> {
        for name in owned::ROOT_FILES {
            self.prove(&self.root.join(name), "move it away; the run writes another")?;
        }
        let metrics = self.root.join(METRICS);
        if metrics.exists() {
            // It is an error if there are lines of others.
            MetricsFile::resume(&metrics, "", 0)?;
        }
        for path in [&metrics, &self.root.join(RESULTS)] {
            match fs::remove_file(path) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(storage_error(path, e)),
                _ => {}
            }
        }
        Ok(())
    }

    /// Compares recipe, inputs and finished stages with what the run has written.
    pub(super) fn compare(
        &self,
        recipe: &Recipe,
        text: &str,
        inputs: &Inputs,
        warnings: &mut Vec<String>,
    ) -> Result<()> {
        let root = self.root.display();
        let mut changed = Vec::new();
        let path = self.root.join(RECIPE);
        if self.there(&path, text, "whether the recipe has changed", warnings)? {
            changed.extend(changes(&flatten_toml(&fs::read_to_string(&path)?)?, &flatten_toml(text)?));
        }
        let (path, json) = (self.root.join(INPUTS), serde_json::to_string_pretty(&inputs.sums)?);
        if self.there(&path, &json, "whether the inputs have changed", warnings)? {
            let old = read_json(&path, "delete it and pass --allow-changes")?;
            let found = inputs.compare(&old, &path);
            changed.extend(found.files);
            warnings.extend(found.pictures);
        }
        let told = self.compare_finished(recipe, warnings)?;
        changed.retain(|line| !self.allow_changes || !told.contains(line));
        if changed.is_empty() {
            return Ok(());
        }
        if !self.allow_changes {
            bail!("{root} holds a run of another recipe or other inputs:\n  {}", changed.join("\n  ");
                "choose another output_dir, or pass --allow-changes to go on with what is there")
        }
        warnings.push(format!("--allow-changes: the run in {root} goes on although\n  {}", changed.join("\n  ")));
        Ok(())
    }

    /// Is the file there to be compared? One that has gone need not be, if its checksum tells that nothing has changed (`new`: what
    /// it would be now), or if changes are allowed.
    fn there(&self, path: &Path, new: &str, what: &str, warnings: &mut Vec<String>) -> Result<bool> {
        let again = format!("if it was changed on purpose, move it away; the run then writes {} again", path.display());
        self.prove(path, &again)?;
        if path.exists() {
            return Ok(true);
        }
        let name = Self::name_in(&self.root, path);
        let unchanged = self.listed().is_some_and(|l| l.now.allows(&name, &sha256(new.as_bytes())));
        if !unchanged && !self.allow_changes {
            bail!("{} is missing, so that it cannot be told {what}", path.display();
                "put it back from a copy, or pass --allow-changes to go on with what there is now")
        }
        warnings.push(format!("{} was missing and is written again", path.display()));
        Ok(false)
    }

    /// A finished stage is kept as it was trained: a recipe that would build another model is refused, one that would train
    /// otherwise is told. Returns the changes that were.
    fn compare_finished(&self, recipe: &Recipe, warnings: &mut Vec<String>) -> Result<Vec<String>> {
        let (mut finished, mut told) = (false, Vec::new());
        for stage in &recipe.stages {
            let Some(done) = self.done(recipe, stage)? else { continue };
            finished = true;
            if let Some(sum) = &done.metrics_sha256 {
                warnings.extend(self.prove_metrics(stage, done.steps, sum)?);
            }
            let difference = of_finished(&self.recipe_of(recipe, stage)?, recipe, stage)?;
            let after = recipe.stages.iter().filter(|s| lineage(recipe, s).is_ok_and(|l| l.contains(&stage.as_str())));
            let folders = after.map(|s| self.stage(recipe, s)).filter(|d| d.exists()).map(|d| d.display().to_string());
            let again = format!("delete {} to train again", folders.collect::<Vec<_>>().join(" and "));
            if !difference.model.is_empty() {
                bail!("stage `{stage}` is finished in {}, and its weights are of another model:\n  {}",
                    self.root.display(), difference.model.join("\n  ");
                    "undo the change; or choose another output_dir; or {again}")
            }
            if !difference.training.is_empty() {
                warnings.push(format!(
                    "stage `{stage}` is finished and kept as it was trained, although\n  {}\n({again})",
                    difference.training.join("\n  ")
                ));
                told.extend(difference.training);
            }
        }
        let path = self.root.join(RESULTS);
        if finished {
            self.prove(&path, DELETE_RESULTS)?;
            if !path.exists() && !self.allow_changes {
                bail!("{} is missing, with the figures of finished stages", path.display();
                    "put it back from a copy, or pass --allow-changes to go on without these figures")
            }
            if !path.exists() {
                warnings.push(format!("{} was missing: figures of finished stages are lost", path.display()));
            }
        }
        Ok(told)
    }

    /// SHA-256 of what the stage before `stage` has left, if it is finished.
    pub fn before(&self, recipe: &Recipe, stage: &str) -> Result<Option<String>> {
        let Some(before) = parent(recipe, stage)? else { return Ok(None) };
        Ok(self.done(recipe, before)?.map(|done| done.trained_sha256))
    }

    /// What to say of a finished stage when the one that it started from has been trained again since, to other weights.
    pub fn outdated(&self, recipe: &Recipe, stage: &str, done: &Done) -> Result<Option<String>> {
        let (was, now) = (done.started_from.as_ref(), self.before(recipe, stage)?);
        let trained_again = was.zip(now.as_ref()).is_some_and(|(was, now)| was != now);
        let (before, dir) = (parent(recipe, stage)?.unwrap_or_default(), self.stage(recipe, stage));
        Ok(trained_again.then(|| {
            format!(
                "stage `{stage}` is finished and kept as it was trained, but from an earlier `{before}`, which has other weights now (delete {} to train it again)",
                dir.display()
            )
        }))
    }
}
