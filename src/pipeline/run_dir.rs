//! The run directory: where everything of a run lies, and whether it still belongs to the recipe.
//!
//! ```text
//! recipe.toml            the resolved recipe
//! inputs.json            checksums of every file that the run reads
//! metrics.jsonl          one line an optimizer step
//! results.json           every held-out figure by stage
//! 01-align/
//!   params.json          what is frozen and what trains
//!   reference.safetensors  DPO: the reference's log-probabilities
//!   checkpoints/step-N/  trained tensors and optimizer state
//!   final/               trained.safetensors, projector.safetensors, one PEFT folder an adapter, changed backbones
//!   done.json            written last
//! ```

use crate::bail;
use crate::checkpoint::atomic::{recover, storage_error, write_bytes};
use crate::error::{Context, Error, Result};
use crate::recipe::schema::Recipe;
use rayon::prelude::*;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// A run's directory.
#[derive(Debug, Clone)]
pub struct RunDir {
    root: PathBuf,
    /// Held while a run writes here; the system lets go of it when the process ends, however it ends.
    _lock: Option<Arc<fs::File>>,
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
}

impl RunDir {
    /// Opens or makes the directory. It is an error if another process writes there, or if it holds checkpoints of
    /// another recipe or other inputs (unless `allow_changes`).
    pub fn open(root: &Path, recipe: &Recipe, inputs: &BTreeMap<String, String>, allow_changes: bool) -> Result<Self> {
        fs::create_dir_all(root).map_err(|e| {
            Error::new(format!("cannot make the run directory {}", root.display()))
                .source(e)
                .hint("set output_dir to a folder that this user can make or write to")
        })?;
        let run = Self { root: root.to_path_buf(), _lock: Some(Arc::new(lock(root)?)) };
        recover(root)?;
        let (recipe_path, inputs_path) = (root.join("recipe.toml"), root.join("inputs.json"));
        let text = crate::recipe::to_toml(recipe)?;
        if !begun(root)? {
            // Whatever an earlier attempt left, nothing was trained with it.
            for name in ["metrics.jsonl", "results.json"] {
                remove(&root.join(name))?;
            }
        } else if recipe_path.exists() && !allow_changes {
            let mut changed = changes(&flatten_toml(&fs::read_to_string(&recipe_path)?)?, &flatten_toml(&text)?);
            if inputs_path.exists() {
                let hint = || "pass --allow-changes to go on without knowing whether the inputs are the same".into();
                let old: BTreeMap<String, String> = read_json(&inputs_path, hint)?;
                changed.extend(changes(&old, inputs));
            }
            if !changed.is_empty() {
                bail!("{} holds a run of another recipe or other inputs:\n  {}", root.display(), changed.join("\n  ");
                    "choose another output_dir, or pass --allow-changes to go on with what is there")
            }
        }
        write_bytes(&recipe_path, text.as_bytes())?;
        write_bytes(&inputs_path, serde_json::to_string_pretty(inputs)?.as_bytes())?;
        Ok(run)
    }

    /// An existing run, to read from.
    pub fn existing(root: &Path) -> Result<Self> {
        if !root.join("recipe.toml").exists() {
            bail!("{} is no run directory: it has no recipe.toml", root.display(); "give the output_dir of a recipe that was trained")
        }
        Ok(Self { root: root.to_path_buf(), _lock: None })
    }

    /// The resolved recipe of the run.
    pub fn recipe(&self) -> Result<Recipe> {
        let path = self.root.join("recipe.toml");
        toml::from_str(&fs::read_to_string(&path)?).map_err(|e| {
            Error::new(format!("{}: {e}", path.display())).hint("the file was edited by hand, or is of another version")
        })
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Folder of a stage.
    pub fn stage(&self, recipe: &Recipe, stage: &str) -> PathBuf {
        let n = recipe.stages.iter().position(|s| s == stage).map_or(0, |i| i + 1);
        self.root.join(format!("{n:02}-{stage}"))
    }

    /// What a stage said when it was done; `None` if it is not.
    pub fn done(&self, recipe: &Recipe, stage: &str) -> Result<Option<Done>> {
        let path = self.stage(recipe, stage).join("done.json");
        if !path.exists() {
            return Ok(None);
        }
        let hint = || format!("delete {}: the stage goes on from its last checkpoint", path.display());
        read_json(&path, hint).map(Some)
    }

    /// All figures so far: stage → evaluation → figures.
    pub fn results(&self) -> Result<BTreeMap<String, Value>> {
        let path = self.root.join("results.json");
        if !path.exists() {
            return Ok(BTreeMap::new());
        }
        let hint = || format!("delete {}: it is begun again, without the figures of finished stages", path.display());
        read_json(&path, hint)
    }

    /// Adds a stage's figures.
    pub fn add_results(&self, stage: &str, figures: Value) -> Result<()> {
        let mut all = self.results()?;
        all.insert(stage.to_string(), figures);
        write_bytes(&self.root.join("results.json"), serde_json::to_string_pretty(&all)?.as_bytes())
    }
}

/// Reads a file of ours; `hint` says what to do if it is damaged.
fn read_json<T: DeserializeOwned>(path: &Path, hint: impl Fn() -> String) -> Result<T> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    serde_json::from_str(&text)
        .map_err(|e| Error::from(e).context(format!("{} is damaged", path.display())).hint(hint()))
}

/// Does the directory hold a checkpoint or a finished stage?
fn begun(root: &Path) -> Result<bool> {
    for entry in fs::read_dir(root).with_context(|| root.display().to_string())? {
        let stage = entry?.path();
        let saved = fs::read_dir(stage.join("checkpoints")).is_ok_and(|mut all| all.next().is_some());
        if saved || stage.join("done.json").exists() {
            return Ok(true);
        }
    }
    Ok(false)
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).with_context(|| path.display().to_string()),
        _ => Ok(()),
    }
}

/// Keeps a second process from writing into the same run.
fn lock(root: &Path) -> Result<fs::File> {
    let path = root.join(".lock");
    let file = fs::File::create(&path).map_err(|e| storage_error(&path, e))?;
    match file.try_lock() {
        Err(fs::TryLockError::WouldBlock) => {
            bail!("another process is training in {}", root.display(); "wait until it ends, or choose another output_dir")
        }
        // Some network file systems know no locks.
        Err(fs::TryLockError::Error(e)) => tracing::warn!("{}: no lock: {e}", path.display()),
        Ok(()) => {}
    }
    Ok(file)
}

/// SHA-256 of files (contents) and of pictures (path and size: there may be very many), by what they are.
pub fn checksums(
    sources: &[(String, String)],
    files: &[PathBuf],
    pictures: &[PathBuf],
) -> Result<BTreeMap<String, String>> {
    let mut out: BTreeMap<String, String> = sources.iter().map(|(k, v)| (format!("source {k}"), v.clone())).collect();
    let hashed: Vec<Result<(String, String)>> =
        files.par_iter().map(|f| Ok((f.display().to_string(), sha256_file(f)?))).collect();
    for h in hashed {
        let (k, v) = h?;
        out.insert(k, v);
    }
    if !pictures.is_empty() {
        let mut h = Sha256::new();
        for p in pictures {
            let size = fs::metadata(p).with_context(|| p.display().to_string())?.len();
            h.update(format!("{}\0{size}\n", p.display()));
        }
        out.insert(format!("pictures ({}: paths and sizes)", pictures.len()), hex(&h.finalize()));
    }
    Ok(out)
}

/// SHA-256 of a file, in hex.
pub fn sha256_file(path: &Path) -> Result<String> {
    let mut file = fs::File::open(path).with_context(|| path.display().to_string())?;
    let (mut h, mut buf) = (Sha256::new(), vec![0; 1 << 20]);
    loop {
        let n = file.read(&mut buf).with_context(|| path.display().to_string())?;
        if n == 0 {
            return Ok(hex(&h.finalize()));
        }
        h.update(&buf[..n]);
    }
}

/// Bytes as hex digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn flatten_toml(text: &str) -> Result<BTreeMap<String, String>> {
    let value: toml::Value = toml::from_str(text).map_err(|e| Error::new(format!("the run's recipe.toml: {e}")))?;
    let mut out = BTreeMap::new();
    flatten(&value, String::new(), &mut out);
    // Where a run lies and what its passes keep does not change what it computes.
    let kept = |key: &str| key.ends_with(".activations") || key.ends_with(".recompute");
    out.retain(|key, _| key != "output_dir" && !(key.starts_with("stage.") && kept(key)));
    Ok(out)
}

fn flatten(value: &toml::Value, path: String, out: &mut BTreeMap<String, String>) {
    let join = |k: &str| if path.is_empty() { k.to_string() } else { format!("{path}.{k}") };
    match value {
        toml::Value::Table(t) => t.iter().for_each(|(k, v)| flatten(v, join(k), out)),
        toml::Value::Array(a) if a.iter().any(|v| v.is_table()) => {
            a.iter().enumerate().for_each(|(i, v)| flatten(v, format!("{path}[{i}]"), out));
        }
        other => {
            out.insert(path, other.to_string());
        }
    }
}

fn changes(old: &BTreeMap<String, String>, new: &BTreeMap<String, String>) -> Vec<String> {
    let keys: std::collections::BTreeSet<&String> = old.keys().chain(new.keys()).collect();
    let show = |m: &BTreeMap<String, String>, k: &String| m.get(k).cloned().unwrap_or_else(|| "(absent)".into());
    keys.into_iter()
        .filter(|k| old.get(*k) != new.get(*k))
        .map(|k| format!("{k}: was {}, is {}", show(old, k), show(new, k)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_name_the_key_and_both_values() {
        let old =
            flatten_toml("output_dir = 'a'\n[stage.sft]\nlr = 1e-3\nadapters = [{ lora = { rank = 8 } }]").unwrap();
        let new = flatten_toml(
            "output_dir = 'b'\n[stage.sft]\nlr = 2e-3\nadapters = [{ lora = { rank = 8 } }]\nmax_steps = 3\n\
             activations = 'recompute'\nrecompute = ['language.*']",
        )
        .unwrap();
        assert_eq!(
            changes(&old, &new),
            ["stage.sft.lr: was 0.001, is 0.002", "stage.sft.max_steps: was (absent), is 3"]
        );
        assert!(changes(&old, &old).is_empty());
    }
}
