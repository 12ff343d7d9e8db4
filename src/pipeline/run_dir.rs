//! The run directory: where everything of a run lies, and whether it still belongs to the recipe.
//!
//! ```text
//! SHA256SUMS             checksums of what the run has written here: by them it knows its own files, and damage
//! recipe.toml            the resolved recipe
//! inputs.json            checksums of every file that the run reads
//! metrics.jsonl          one line an optimizer step
//! results.json           every held-out figure by stage
//! 01-align/
//!   recipe.toml          the recipe that the stage was trained with
//!   params.json          what is frozen and what trains
//!   reference.safetensors  DPO: the reference's log-probabilities
//!   checkpoints/step-N/  trained tensors and optimizer state, with their SHA256SUMS
//!   final/               trained.safetensors, projector.safetensors, one PEFT folder an adapter, changed backbones, SHA256SUMS
//!   done.json            written last
//! ```

mod changes;
mod guard;
mod inputs;
mod owned;
mod resume;

pub use crate::checkpoint::sums::{hex, sha256_file};
pub use inputs::{Inputs, Read};
pub use owned::refuse_others;

use crate::bail;
use crate::checkpoint::atomic::{recover, write_bytes};
use crate::checkpoint::sums::{self, Fit, Sums, sha256};
use crate::error::{Context, Error, Result};
use crate::pipeline::state::TRAINED;
use crate::report::metrics_sha256;
use crate::spec::Recipe;
use guard::{is_locked, lock};
use owned::{DONE, FINAL, INPUTS, METRICS, RECIPE, RESULTS};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A run's directory.
#[derive(Debug, Clone)]
pub struct RunDir {
    root: PathBuf,
    /// Go on although something differs from what the run has written.
    allow_changes: bool,
    /// Held while a run writes here; the system lets go of it when the process ends, however it ends.
    lock: Option<Arc<fs::File>>,
    /// `None`: a run of an earlier version, which kept none.
    sums: Option<Arc<Mutex<Listed>>>,
}

/// The list of checksums, as it is and as it stands on the disk.
#[derive(Debug, Default)]
struct Listed {
    now: Sums,
    saved: Sums,
    /// The weights that finished stages have left.
    weights: BTreeSet<String>,
}

/// What a finished stage says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Done {
    pub stage: String,
    pub steps: usize,
    /// Loss of the last step.
    pub loss: f64,
    /// Frozen tensors whose checksum was the same before and after.
    pub frozen_unchanged: usize,
    /// SHA-256 of the trained tensors.
    pub trained_sha256: String,
    /// That of the stage that this one started from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub started_from: Option<String>,
    /// SHA-256 of the stage's lines in the metrics, without their timing.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics_sha256: Option<String>,
}

impl RunDir {
    /// Opens or makes the directory; returns with it what is to be told as warnings.
    ///
    /// # Errors
    /// Another process writes there; files of others stand in the way; the run's own are damaged; it holds checkpoints of
    /// another recipe or other inputs (unless `allow_changes`), or a finished stage of another model.
    pub fn open(root: &Path, recipe: &Recipe, inputs: &Inputs, allow_changes: bool) -> Result<(Self, Vec<String>)> {
        refuse_others(root, recipe)?;
        fs::create_dir_all(root).map_err(|e| {
            Error::new(format!("cannot make the run directory {}", root.display()))
                .source(e)
                .hint("set output_dir to a folder that this user can make or write to")
        })?;
        let lock = lock(root)?;
        recover(root, owned::is_name)?;
        let mut warnings = Vec::new();
        let saved = Sums::read(root)?;
        let now = match &saved {
            Some(sums) => sums.clone(),
            None => match owned::adopt(root)? {
                None => Sums::default(),
                Some(sums) => {
                    warnings.push(format!(
                        "{} was begun by a version that kept no checksums: its files are taken as they are",
                        root.display()
                    ));
                    sums
                }
            },
        };
        let listed = Listed { now, saved: saved.unwrap_or_default(), weights: BTreeSet::new() };
        let sums = Some(Arc::new(Mutex::new(listed)));
        let run = Self { root: root.to_path_buf(), allow_changes, lock: Some(Arc::new(lock)), sums };
        let text = crate::recipe::to_toml(recipe)?;
        match owned::run_has_begun(root)? {
            true => run.compare(recipe, &text, inputs, &mut warnings)?,
            false => run.begin_again()?,
        }
        run.resolve()?;
        let inputs = serde_json::to_string_pretty(&inputs.sums)?;
        run.write(&[(&root.join(RECIPE), text.as_bytes()), (&root.join(INPUTS), inputs.as_bytes())])?;
        Ok((run, warnings))
    }

    /// An existing run, to read from.
    pub fn existing(root: &Path) -> Result<Self> {
        if !root.join(RECIPE).exists() {
            bail!("{} is no run directory: it has no recipe.toml", root.display(); "give the output_dir of a recipe that was trained")
        }
        let sums = Sums::read(root)?
            .map(|now| Arc::new(Mutex::new(Listed { saved: now.clone(), now, weights: BTreeSet::new() })));
        Ok(Self { root: root.to_path_buf(), allow_changes: false, lock: None, sums })
    }

    /// The resolved recipe of the run.
    pub fn recipe(&self) -> Result<Recipe> {
        self.read_recipe(&self.root.join(RECIPE))
    }

    /// The recipe that a stage was trained with.
    pub fn recipe_of(&self, recipe: &Recipe, stage: &str) -> Result<Recipe> {
        let path = self.stage(recipe, stage).join(RECIPE);
        match self.sums {
            // Of a version that kept none.
            None if !path.exists() => self.recipe(),
            _ => self.read_recipe(&path),
        }
    }

    fn read_recipe(&self, path: &Path) -> Result<Recipe> {
        const COPY: &str = "put it back from a copy; the run's recipe.toml and those of its stages are often the same";
        self.prove(path, COPY)?;
        let text = fs::read_to_string(path).map_err(|e| {
            Error::new(format!("cannot read {}, the recipe of what was trained", path.display())).source(e).hint(COPY)
        })?;
        toml::from_str(&text).map_err(|e| {
            Error::new(format!("{}: {e}", path.display())).hint("the file was edited by hand, or is of another version")
        })
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Folder of a stage.
    pub fn stage(&self, recipe: &Recipe, stage: &str) -> PathBuf {
        stage_dir(&self.root, recipe, stage)
    }

    /// What a stage said when it was done; `None` if it is not.
    pub fn done(&self, recipe: &Recipe, stage: &str) -> Result<Option<Done>> {
        let path = self.stage(recipe, stage).join(DONE);
        if !path.exists() {
            return Ok(None);
        }
        let hint = format!("delete {}: the stage goes on from its last checkpoint", path.display());
        self.prove(&path, &hint)?;
        read_json(&path, &hint).map(Some)
    }

    /// Is a stage unfinished only because its `done.json` has been taken away?
    pub fn done_is_missing(&self, recipe: &Recipe, stage: &str) -> Result<Option<PathBuf>> {
        let path = self.stage(recipe, stage).join(DONE);
        Ok((self.fit(&path)? == Fit::Missing).then_some(path))
    }

    /// The folder with what a finished stage left, its weights checked.
    pub fn finished(&self, recipe: &Recipe, stage: &str) -> Result<PathBuf> {
        let Some(done) = self.done(recipe, stage)? else {
            bail!("stage `{stage}` is not finished in {}", self.root.display(); "run it first: `adfreeze train RECIPE --stages {stage}`")
        };
        let folder = self.stage(recipe, stage).join(FINAL);
        let path = folder.join(TRAINED);
        let again = format!(
            "copy it back, or delete {} and {DONE} beside it: `adfreeze train` makes them again from the stage's last checkpoint",
            folder.display()
        );
        let sum = sha256_file(&path)
            .map_err(|e| e.context(format!("cannot read the weights of stage `{stage}`")).hint(again.clone()))?;
        if sum != done.trained_sha256 {
            bail!("{} is damaged: it is not what stage `{stage}` wrote (SHA-256)", path.display(); "{again}")
        }
        Ok(folder)
    }

    /// All figures so far: stage → evaluation → figures.
    pub fn results(&self) -> Result<BTreeMap<String, Value>> {
        let path = self.root.join(RESULTS);
        if !path.exists() {
            return Ok(BTreeMap::new());
        }
        self.prove(&path, DELETE_RESULTS)?;
        read_json(&path, DELETE_RESULTS)
    }

    /// Adds a stage's figures, and says that it is done.
    pub fn finish(&self, recipe: &Recipe, done: &Done, figures: Value) -> Result<()> {
        let mut all = self.results()?;
        all.insert(done.stage.clone(), figures);
        let (results, done_path) = (self.root.join(RESULTS), self.stage(recipe, &done.stage).join(DONE));
        self.write(&[(&results, serde_json::to_string_pretty(&all)?.as_bytes())])?;
        self.write(&[(&done_path, serde_json::to_string_pretty(done)?.as_bytes())])?;
        if let Some(mut listed) = self.listed() {
            listed.weights.extend(weights_of(&Self::name_in(&self.root, &done_path)));
        }
        Ok(())
    }

    /// Writes files of the run, announced with their checksums before; one that has these bytes already is left alone.
    ///
    /// # Errors
    /// One of them is there with other bytes than the run has written; the disk refuses.
    pub fn write(&self, files: &[(&Path, &[u8])]) -> Result<()> {
        for (path, _) in files {
            self.prove(path, "move it away; the run writes it again")?;
        }
        self.put(files)
    }

    /// As [`RunDir::write`], of a file that the run may lose: one that is damaged is replaced.
    pub fn replace(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        if self.fit(path)? == Fit::Foreign {
            bail!("{} was not written by this run, and would be replaced", path.display(); "move it away")
        }
        self.put(&[(path, bytes)])
    }

    fn put(&self, files: &[(&Path, &[u8])]) -> Result<()> {
        let Some(mut listed) = self.listed() else { bail!("{} is open to read only", self.root.display()) };
        let (mut new, mut settled) = (Vec::new(), Vec::new());
        for (path, bytes) in files {
            let (name, sum) = (Self::name_in(&self.root, path), sha256(bytes));
            if !listed.now.allows(&name, &sum) || fs::read(path).ok().as_deref() != Some(*bytes) {
                listed.now.announce(&name, &sum);
                new.push((path, bytes));
            }
            settled.push((name, sum));
        }
        listed.save(&self.root)?;
        for (path, bytes) in new {
            write_bytes(path, bytes)?;
        }
        settled.iter().for_each(|(name, sum)| listed.now.set(name, sum));
        Ok(())
    }

    /// Writes the list of checksums as it is when nothing is under way.
    pub fn settle(&self) -> Result<()> {
        self.listed().map_or(Ok(()), |mut listed| listed.save(&self.root))
    }

    /// Is a file of the run as it was written?
    pub fn fit(&self, path: &Path) -> Result<Fit> {
        let name = Self::name_in(&self.root, path);
        let Some(known) = self.listed().map(|l| l.now.clone()) else {
            return Ok(if path.exists() { Fit::Same } else { Fit::Absent });
        };
        let fit = known.fit(&self.root, &name)?;
        if matches!(fit, Fit::Other | Fit::Foreign) && self.lock.is_none() {
            // A run that is under way may just have replaced it.
            return Sums::read(&self.root)?.unwrap_or_default().fit(&self.root, &name);
        }
        Ok(fit)
    }

    /// Refuses a file of the run that is there with other bytes than were written.
    pub fn prove(&self, path: &Path, hint: &str) -> Result<()> {
        match self.fit(path)? {
            Fit::Same | Fit::Missing | Fit::Absent => Ok(()),
            Fit::Foreign => bail!("{} was not written by this run", path.display(); "{hint}"),
            Fit::Other => {
                bail!("{} is damaged or was edited: it is not what the run wrote (SHA-256)", path.display(); "{hint}")
            }
        }
    }

    /// SHA-256 of a stage's lines in the metrics up to its step `steps`, without their timing.
    pub fn metrics_sha256(&self, stage: &str, steps: usize) -> Result<String> {
        let path = self.root.join(METRICS);
        let text = match fs::read(&path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            read => read.with_context(|| format!("cannot read {}", path.display()))?,
        };
        metrics_sha256(&text, stage, steps)
    }

    /// Compares a stage's lines in the metrics with their checksum at step `steps`: what differs is an error, or a warning if
    /// changes are allowed.
    pub fn prove_metrics(&self, stage: &str, steps: usize, sum: &str) -> Result<Option<String>> {
        if self.metrics_sha256(stage, steps)? == sum {
            return Ok(None);
        }
        let path = self.root.join(METRICS);
        let lines =
            format!("{}: lines of stage `{stage}` up to its step {steps} are missing or damaged", path.display());
        if self.allow_changes {
            return Ok(Some(format!("{lines}; the run goes on without them")));
        }
        bail!("{lines}"; "put the file back from a copy, or pass --allow-changes to go on with the lines that are left")
    }

    /// Brings the list up to date: what is no longer there is written or made again.
    fn resolve(&self) -> Result<()> {
        let Some(mut listed) = self.listed() else { return Ok(()) };
        listed.now.resolve(&self.root)?;
        let done: Vec<String> = listed.now.names().filter_map(weights_of).collect();
        listed.weights = done.into_iter().filter(|n| self.root.join(n).exists()).collect();
        Ok(())
    }

    fn listed(&self) -> Option<MutexGuard<'_, Listed>> {
        self.sums.as_ref().map(|s| s.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Name of a file in the list of the run in `root`.
    fn name_in(root: &Path, path: &Path) -> String {
        let parts = path.strip_prefix(root).unwrap_or(path).components();
        parts.map(|c| c.as_os_str().to_string_lossy().into_owned()).collect::<Vec<_>>().join("/")
    }
}

impl Listed {
    fn save(&mut self, root: &Path) -> Result<()> {
        if self.now != self.saved || !root.join(sums::FILE).exists() {
            self.now.write(root)?;
            self.saved = self.now.clone();
        }
        Ok(())
    }
}

const DELETE_RESULTS: &str =
    "delete it and pass --allow-changes: it is begun again, without the figures of finished stages";

/// The weights of the stage whose `done.json` this is.
fn weights_of(name: &str) -> Option<String> {
    Some(format!("{}/{FINAL}/{TRAINED}", name.strip_suffix(DONE)?.strip_suffix('/')?))
}

/// Folder of a stage of the run in `root`.
fn stage_dir(root: &Path, recipe: &Recipe, stage: &str) -> PathBuf {
    let n = recipe.stages.iter().position(|s| s == stage).map_or(0, |i| i + 1);
    root.join(format!("{n:02}-{stage}"))
}

/// Removes what a killed process had begun to write in a folder of the run.
pub fn tidy(dir: &Path) -> Result<()> {
    recover(dir, owned::is_name).map(drop)
}

/// Reads a file of ours; `hint` says what to do if it is damaged.
fn read_json<T: DeserializeOwned>(path: &Path, hint: &str) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text).map_err(|e| Error::from(e).context(format!("{} is damaged", path.display())).hint(hint))
}
