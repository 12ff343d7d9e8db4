//! What a run reads, by checksum: whether it is still what the run began with.

use crate::checkpoint::sums::{self, hex, sha256_file};
use crate::error::{Context, Result};
use crate::report::Reporter;
use rayon::prelude::*;
use sha2::{Digest, Sha256};
use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

/// In front of a file that only evaluations read.
const EVALUATION: &str = "evaluation ";
/// In front of the pictures that only evaluations show.
const EVALUATION_PICTURES: &str = "pictures of evaluations ";
const PICTURES: &str = "pictures ";

/// Everything that a run reads.
#[derive(Debug, Default)]
pub struct Inputs {
    /// SHA-256 of files (contents) and of pictures (paths and sizes: there may be very many), by what they are.
    pub sums: BTreeMap<String, String>,
    pictures: Vec<PathBuf>,
}

/// The files of a run's inputs.
#[derive(Debug, Default)]
pub struct Read {
    pub files: BTreeSet<PathBuf>,
    pub pictures: BTreeSet<PathBuf>,
}

impl Inputs {
    /// Checksums of what the stages read, and of what only evaluations do; weights of a large model take a while.
    pub fn new(sources: &[(String, String)], stages: &Read, evaluations: &Read, reporter: &Reporter) -> Result<Self> {
        let mut sums: BTreeMap<String, String> =
            sources.iter().map(|(k, v)| (format!("source {k}"), v.clone())).collect();
        let stage_files = stages.files.iter().map(|f| (f, ""));
        let files: Vec<(&PathBuf, &str)> =
            stage_files.chain(evaluations.files.difference(&stages.files).map(|f| (f, EVALUATION))).collect();
        let bytes: u64 = files.iter().filter_map(|(f, _)| fs::metadata(f).ok()).map(|m| m.len()).sum();
        let before = sums::so_far().0;
        let sum = |(f, what): &(&PathBuf, &str)| Ok((format!("{what}{}", f.display()), sha256_file(f)?));
        let hashed: Vec<Result<(String, String)>> = reporter.watch(
            "checksums of the inputs",
            || (sums::so_far().0 - before, bytes),
            || files.par_iter().map(sum).collect(),
        );
        for h in hashed {
            let (k, v) = h?;
            sums.insert(k, v);
        }
        let shown: Vec<&PathBuf> = evaluations.pictures.difference(&stages.pictures).collect();
        for (what, pictures) in [(PICTURES, stages.pictures.iter().collect()), (EVALUATION_PICTURES, shown)] {
            if !pictures.is_empty() {
                sums.insert(format!("{what}({}: paths and sizes)", pictures.len()), sizes(&pictures, reporter)?);
            }
        }
        let pictures = stages.pictures.union(&evaluations.pictures).cloned().collect();
        Ok(Self { sums, pictures })
    }

    /// Compares with what the run began with. Which pictures evaluations show, and what files they read, may change.
    pub fn compare(&self, old: &BTreeMap<String, String>, inputs_json: &Path) -> InputChanges {
        let mut old = old.clone();
        for (key, sum) in &self.sums {
            // Earlier versions did not tell what only evaluations read.
            let bare = key.strip_prefix(EVALUATION).filter(|bare| old.get(*bare) == Some(sum));
            if let Some(bare) = bare.map(String::from) {
                old.remove(&bare);
                old.insert(key.clone(), sum.clone());
            }
        }
        let one_sided = |k: &String| old.contains_key(k) != self.sums.contains_key(k);
        let free = |k: &String| (k.starts_with(EVALUATION) || k.starts_with(EVALUATION_PICTURES)) && one_sided(k);
        let keys: BTreeSet<&String> = old.keys().chain(self.sums.keys()).collect();
        let changed: Vec<&String> = keys.into_iter().filter(|k| old.get(*k) != self.sums.get(*k) && !free(k)).collect();
        let (pictures, files): (Vec<_>, Vec<_>) = changed.into_iter().partition(|k| k.starts_with(PICTURES));
        let files = files.into_iter().map(|k| super::changes::told(&old, &self.sums, k)).collect();
        let pictures = (!pictures.is_empty()).then(|| self.changed_pictures(inputs_json));
        InputChanges { files, pictures }
    }

    /// Names the pictures that were written after the run began.
    fn changed_pictures(&self, inputs_json: &Path) -> String {
        let time = |p: &Path| fs::metadata(p).and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        let begun = time(inputs_json);
        let newer: Vec<String> =
            self.pictures.iter().filter(|p| time(p) > begun).map(|p| p.display().to_string()).collect();
        let more = newer.len().saturating_sub(6);
        let names = newer.iter().take(6).cloned().collect::<Vec<_>>().join(", ");
        let names = match (names.is_empty(), more) {
            (true, _) => "their sizes or paths are others".to_string(),
            (false, 0) => names,
            (false, more) => format!("{names} and {more} more"),
        };
        format!("pictures have changed since the run began ({names}): it goes on with them as they are now")
    }
}

/// What of the inputs has changed.
pub struct InputChanges {
    /// Files and sources: they forbid to go on.
    pub files: Vec<String>,
    /// Pictures: they are told.
    pub pictures: Option<String>,
}

fn sizes(pictures: &[&PathBuf], reporter: &Reporter) -> Result<String> {
    let (seen, all) = (AtomicU64::new(0), pictures.len() as u64);
    let look = || {
        let mut h = Sha256::new();
        for p in pictures {
            let size = fs::metadata(p).with_context(|| p.display().to_string())?.len();
            h.update(format!("{}\0{size}\n", p.display()));
            seen.fetch_add(1, Ordering::Relaxed);
        }
        Ok(hex(&h.finalize()))
    };
    // A network file system may take minutes over it.
    reporter.watch_count("sizes of pictures", || (seen.load(Ordering::Relaxed), all), look)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_forbid_pictures_are_told_and_evaluations_are_free() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for name in ["a.json", "b.json", "p.png", "q.png", "inputs.json"] {
            fs::write(at(name), name).unwrap();
        }
        let read = |files: &[&str], pictures: &[&str]| Read {
            files: files.iter().map(|f| at(f)).collect(),
            pictures: pictures.iter().map(|f| at(f)).collect(),
        };
        let inputs = |eval: &[&str]| {
            Inputs::new(&[], &read(&["a.json"], &["p.png"]), &read(eval, &["p.png", "q.png"]), &Reporter::silent())
                .unwrap()
        };
        let (old, compare) = (inputs(&["a.json"]).sums, |new: &Inputs, old: &_| new.compare(old, &at("inputs.json")));
        let quiet = |c: InputChanges| c.files.is_empty() && c.pictures.is_none();
        assert!(quiet(compare(&inputs(&["a.json", "b.json"]), &old)));
        // A version that did not tell what is only for evaluations.
        let mut older = inputs(&["b.json"]).sums;
        let b = older.remove(&format!("evaluation {}", at("b.json").display())).unwrap();
        older.insert(at("b.json").display().to_string(), b);
        assert!(quiet(compare(&inputs(&["b.json"]), &older)));
        std::thread::sleep(std::time::Duration::from_millis(20));
        fs::write(at("p.png"), "mended").unwrap();
        let told = compare(&inputs(&[]), &old);
        let pictures = told.pictures.unwrap();
        assert!(told.files.is_empty() && pictures.contains("p.png") && !pictures.contains("q.png"), "{pictures}");
        fs::write(at("a.json"), "other").unwrap();
        let told = compare(&inputs(&[]), &old).files;
        assert!(told.len() == 1 && told[0].contains("a.json: was "), "{told:?}");
    }
}
