//! `metrics.jsonl`: one JSON object for each optimizer step.
//!
//! Every field but those in [`TIMING_FIELDS`] is a function of the recipe and its inputs alone: the lines of a resumed
//! run equal those of an unbroken one once these are taken away ([`without_timing`]).

use crate::bail;
use crate::error::{Context, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// The fields of [`StepMetrics`] that depend on the machine and the moment.
pub const TIMING_FIELDS: [&str; 3] = ["tokens_per_s", "samples_per_s", "peak_memory_bytes"];

/// What one optimizer step was like.
#[derive(Debug, Clone, PartialEq, Default, Serialize)]
pub struct StepMetrics {
    /// The stage's name.
    pub stage: String,
    /// Counted from 1 within the stage.
    pub step: usize,
    /// Mean loss of a label token (SFT) or of a pair (DPO) over the global batch.
    pub loss: f64,
    /// Learning rate used in this step, by parameter group; of a group in which it decays layer by layer the highest.
    pub lr: BTreeMap<String, f64>,
    /// Of the groups in which it decays layer by layer the lowest.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub lr_lowest: BTreeMap<String, f64>,
    /// Norm of the gradient before clipping, by parameter group.
    pub grad_norm: BTreeMap<String, f64>,
    /// The same over all groups.
    pub grad_norm_total: f64,
    /// Label tokens of the global batch.
    pub label_tokens: usize,
    /// DPO only.
    #[serde(flatten, skip_serializing_if = "Option::is_none")]
    pub preference: Option<PreferenceMetrics>,
    /// Tokens that went through the language model, a second.
    pub tokens_per_s: f64,
    /// Samples (pairs, for DPO) a second.
    pub samples_per_s: f64,
    /// Largest resident size of the process so far; `null` where the system does not tell.
    pub peak_memory_bytes: Option<u64>,
}

/// Means over the pairs of a DPO step, under the names that TRL uses.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize)]
pub struct PreferenceMetrics {
    /// β · (log-probability under the policy − under the reference), of the chosen answer.
    #[serde(rename = "rewards/chosen")]
    pub reward_chosen: f64,
    /// The same of the rejected answer.
    #[serde(rename = "rewards/rejected")]
    pub reward_rejected: f64,
    /// The first less the second.
    #[serde(rename = "rewards/margins")]
    pub margin: f64,
    /// Share of the pairs whose margin is above 0.
    #[serde(rename = "rewards/accuracies")]
    pub accuracy: f64,
    /// Summed log-probability of the chosen answer.
    #[serde(rename = "logps/chosen")]
    pub logp_chosen: f64,
    /// The same of the rejected answer.
    #[serde(rename = "logps/rejected")]
    pub logp_rejected: f64,
}

/// The largest resident size that this process has had, in bytes (Linux: `VmHWM`); `None` where it is not known.
pub fn peak_memory_bytes() -> Option<u64> {
    peak_from_status(&fs::read_to_string("/proc/self/status").ok()?)
}

/// Lets [`peak_memory_bytes`] count from what is resident now; false where the system does not do so.
pub fn reset_peak_memory() -> bool {
    fs::write("/proc/self/clear_refs", "5").is_ok()
}

fn peak_from_status(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"))?;
    let kilobytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kilobytes * 1024)
}

/// A line of `metrics.jsonl` without its timing fields.
pub fn without_timing(line: &str) -> Result<String> {
    let mut value: serde_json::Map<String, Value> = serde_json::from_str(line).context("metrics line")?;
    value.retain(|key, _| !TIMING_FIELDS.contains(&key.as_str()));
    Ok(Value::Object(value).to_string())
}

/// SHA-256 of a stage's lines up to step `steps`, without their timing, in hex. What is no metrics line counts as absent.
pub fn metrics_sha256(file: &[u8], stage: &str, steps: usize) -> Result<String> {
    let mut hash = Sha256::new();
    for line in file.split_inclusive(|b| *b == b'\n').filter(|l| l.ends_with(b"\n")) {
        if serde_json::from_slice::<Position>(line).is_ok_and(|at| at.stage == stage && at.step <= steps) {
            add(&mut hash, line)?;
        }
    }
    Ok(hex(hash))
}

fn add(hash: &mut Sha256, line: &[u8]) -> Result<()> {
    hash.update(without_timing(&String::from_utf8_lossy(line))?);
    hash.update(b"\n");
    Ok(())
}

fn hex(hash: Sha256) -> String {
    hash.finalize().iter().map(|b| format!("{b:02x}")).collect()
}

/// Appends to `metrics.jsonl`, one whole line at a time.
#[derive(Debug)]
pub struct MetricsFile {
    path: PathBuf,
    file: File,
    /// Of this stage's lines, without their timing.
    hash: Sha256,
}

/// As much of a line as tells where it belongs.
#[derive(Deserialize)]
struct Position {
    stage: String,
    step: usize,
}

/// As much as tells how a stage went.
#[derive(Deserialize)]
struct Went {
    stage: String,
    loss: Option<f64>,
    grad_norm_total: Option<f64>,
}

impl MetricsFile {
    /// Opens the file to go on after step `done` of `stage` (0: at its start). Lines of the stage behind that point, left by a
    /// run that went further than its last checkpoint, are taken out, and so is a last line that was not written to its end;
    /// those of other stages stay.
    ///
    /// Errors: the file cannot be read or written; a line is not a metrics line (the error names its number).
    pub fn resume(path: &Path, stage: &str, done: usize) -> Result<Self> {
        let named = |e: std::io::Error| {
            Error::new(format!("cannot open {}", path.display()))
                .source(e)
                .hint("check that the run directory can be read and written")
        };
        let old = match fs::read(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            read => read.map_err(named)?,
        };
        let kept = kept(&old, stage, done).with_context(|| path.display())?;
        let append = || OpenOptions::new().create(true).append(true).open(path).map_err(named);
        let file = if old.starts_with(&kept) {
            let file = append()?;
            if kept.len() < old.len() {
                file.set_len(kept.len() as u64).map_err(named)?;
            }
            file
        } else {
            // Lines in the middle go: beside its place, then renamed, so that a kill leaves the old file or the new one.
            let dir = path.parent().filter(|d| *d != Path::new("")).unwrap_or(Path::new("."));
            let mut new =
                tempfile::Builder::new().prefix(".metrics.jsonl.").suffix(".tmp").tempfile_in(dir).map_err(named)?;
            let mode = fs::metadata(path).map_err(named)?.permissions();
            new.write_all(&kept).and_then(|()| new.as_file().set_permissions(mode)).map_err(named)?;
            new.as_file().sync_all().map_err(named)?;
            new.persist(path).map_err(|e| named(e.error))?;
            append()?
        };
        let mut hash = Sha256::new();
        for line in kept.split_inclusive(|b| *b == b'\n') {
            if serde_json::from_slice::<Position>(line).is_ok_and(|at| at.stage == stage) {
                add(&mut hash, line)?;
            }
        }
        Ok(Self { path: path.into(), file, hash })
    }

    /// Loss and norm of the gradient of the steps of `stage` that are in the file, in order; lines that are none are passed over.
    pub fn history(path: &Path, stage: &str) -> Result<Vec<(f64, f64)>> {
        let text = match fs::read(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Vec::new(),
            read => read.with_context(|| path.display())?,
        };
        let lines = text.split(|b| *b == b'\n').filter_map(|line| serde_json::from_slice::<Went>(line).ok());
        let number = |n: Option<f64>| n.unwrap_or(f64::NAN);
        Ok(lines.filter(|w| w.stage == stage).map(|w| (number(w.loss), number(w.grad_norm_total))).collect())
    }

    /// Writes one line, as a whole or not at all.
    pub fn append(&mut self, metrics: &StepMetrics) -> Result<()> {
        let mut line = serde_json::to_vec(metrics)?;
        line.push(b'\n');
        let before = self.file.metadata().map_err(|e| self.cannot_write(e))?.len();
        self.file.write_all(&line).map_err(|e| {
            // What cannot be cut off now is at the next start.
            let _ = self.file.set_len(before);
            self.cannot_write(e)
        })?;
        add(&mut self.hash, &line)
    }

    /// As [`metrics_sha256`] of the stage's lines so far.
    pub fn sha256(&self) -> String {
        hex(self.hash.clone())
    }

    /// Makes the lines so far durable: to be called before the checkpoint of the same step.
    ///
    /// Errors: the disk refuses; the file has been removed or replaced, so that the lines would be lost.
    pub fn sync(&self) -> Result<()> {
        if !self.in_place() {
            bail!("{} has been removed or replaced while the run writes to it", self.path.display();
                "put it back (or pass --allow-changes to go on without the lines so far), and run the same command again: it goes on from the last checkpoint");
        }
        self.file.sync_data().map_err(|e| self.cannot_write(e))
    }

    /// Is the open file still the one of this name?
    fn in_place(&self) -> bool {
        #[cfg(unix)]
        {
            use std::os::unix::fs::MetadataExt;
            let id = |m: fs::Metadata| (m.dev(), m.ino());
            matches!((self.file.metadata().map(id), fs::metadata(&self.path).map(id)), (Ok(a), Ok(b)) if a == b)
        }
        #[cfg(not(unix))]
        self.path.exists()
    }

    fn cannot_write(&self, e: std::io::Error) -> Error {
        Error::new(format!("cannot write {}", self.path.display()))
            .source(e)
            .hint("make room on the disk; the same command goes on from the last checkpoint")
    }
}

const LINE_BEGINS: &[u8] = b"{\"stage\":";

/// The whole lines but those of `stage` behind step `done`.
fn kept(old: &[u8], stage: &str, done: usize) -> Result<Vec<u8>> {
    let mut kept = Vec::with_capacity(old.len());
    for (number, line) in old.split_inclusive(|b| *b == b'\n').enumerate() {
        // A last line that was not written to its end begins as ours do.
        let begins = line.len().min(LINE_BEGINS.len());
        if !line.ends_with(b"\n") && line[..begins] == LINE_BEGINS[..begins] {
            break;
        }
        let Ok(at) = serde_json::from_slice::<Position>(line) else {
            bail!("line {} is not a metrics line", number + 1; "move the file away; a new one is begun");
        };
        if at.stage != stage || at.step <= done {
            kept.extend_from_slice(line);
        }
    }
    Ok(kept)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn metrics(stage: &str, step: usize, tokens_per_s: f64) -> StepMetrics {
        StepMetrics {
            stage: stage.into(),
            step,
            loss: 0.5,
            lr: [("projector".into(), 1e-3)].into(),
            lr_lowest: BTreeMap::new(),
            grad_norm: [("projector".into(), 2.0)].into(),
            grad_norm_total: 2.0,
            label_tokens: 7,
            tokens_per_s,
            samples_per_s: 3.0,
            peak_memory_bytes: Some(1024),
            preference: None,
        }
    }

    #[test]
    fn a_line_has_the_fields_in_order_and_trl_names() {
        let mut m = metrics("dpo", 3, 10.0);
        m.preference = Some(PreferenceMetrics { margin: 0.25, ..Default::default() });
        assert_eq!(
            serde_json::to_string(&m).unwrap(),
            r#"{"stage":"dpo","step":3,"loss":0.5,"lr":{"projector":0.001},"grad_norm":{"projector":2.0},"#.to_string()
                + r#""grad_norm_total":2.0,"label_tokens":7,"rewards/chosen":0.0,"rewards/rejected":0.0,"#
                + r#""rewards/margins":0.25,"rewards/accuracies":0.0,"logps/chosen":0.0,"logps/rejected":0.0,"#
                + r#""tokens_per_s":10.0,"samples_per_s":3.0,"peak_memory_bytes":1024}"#
        );
    }

    #[test]
    fn a_resumed_file_equals_an_unbroken_one_but_for_timing() {
        let dir = tempfile::tempdir().unwrap();
        let steps = |path: &Path, stage: &str, done: usize, last: usize, speed: f64| {
            let mut file = MetricsFile::resume(path, stage, done).unwrap();
            for step in done + 1..=last {
                file.append(&metrics(stage, step, speed)).unwrap();
            }
            file.sync().unwrap();
        };
        let (whole, broken) = (dir.path().join("whole.jsonl"), dir.path().join("broken.jsonl"));
        steps(&whole, "align", 0, 3, 1.0);
        steps(&whole, "sft", 0, 6, 1.0);
        steps(&broken, "align", 0, 3, 2.0);
        steps(&broken, "sft", 0, 5, 2.0);
        // Killed in the middle of a line; the last checkpoint is that of step 4.
        let mut file = OpenOptions::new().append(true).open(&broken).unwrap();
        file.write_all(b"{\"stage\":\"sft\",\"st").unwrap();
        steps(&broken, "sft", 4, 6, 3.0);
        let lines = |path: &Path| fs::read_to_string(path).unwrap().lines().map(str::to_string).collect::<Vec<_>>();
        assert_ne!(lines(&whole), lines(&broken));
        let bare = |path: &Path| lines(path).iter().map(|l| without_timing(l).unwrap()).collect::<Vec<_>>();
        assert_eq!(bare(&whole), bare(&broken));
        assert_eq!(bare(&whole).len(), 9);
        // A stage that is trained again leaves the lines of a later one alone.
        steps(&broken, "align", 1, 3, 4.0);
        let (mut a, mut b) = (bare(&whole), bare(&broken));
        assert_ne!(a, b);
        a.sort();
        b.sort();
        assert_eq!(a, b);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
    }

    #[test]
    fn the_checksum_is_that_of_a_stages_lines_without_timing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut file = MetricsFile::resume(&path, "align", 0).unwrap();
        (1..=3).for_each(|step| file.append(&metrics("align", step, step as f64)).unwrap());
        let align = file.sha256();
        let mut file = MetricsFile::resume(&path, "sft", 0).unwrap();
        file.append(&metrics("sft", 1, 1.0)).unwrap();
        let of = |text: &str, stage: &str, steps: usize| metrics_sha256(text.as_bytes(), stage, steps).unwrap();
        let text = fs::read_to_string(&path).unwrap();
        assert_eq!((of(&text, "align", 3), of(&text, "sft", 9)), (align.clone(), file.sha256()));
        assert_eq!(MetricsFile::resume(&path, "align", 2).unwrap().sha256(), of(&text, "align", 2));
        assert_eq!(of(&text.replace("\"tokens_per_s\":2.0", "\"tokens_per_s\":2.5"), "align", 3), align);
        let cut: String = text.split_inclusive('\n').skip(1).collect();
        for changed in [text.replace("\"loss\":0.5", "\"loss\":0.6"), cut, text[..20].to_string(), String::new()] {
            assert_ne!(of(&changed, "align", 3), align, "{changed}");
        }
    }

    #[test]
    fn a_file_that_is_taken_away_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        let mut file = MetricsFile::resume(&path, "a", 0).unwrap();
        file.append(&metrics("a", 1, 1.0)).unwrap();
        file.sync().unwrap();
        fs::remove_file(&path).unwrap();
        let report = file.sync().unwrap_err().report();
        assert!(report.contains("metrics.jsonl has been removed or replaced") && report.contains("hint: "), "{report}");
        if cfg!(unix) {
            fs::write(&path, "").unwrap();
            file.sync().unwrap_err();
        }
    }

    #[test]
    fn a_foreign_line_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("metrics.jsonl");
        fs::write(&path, "{\"stage\":\"a\",\"step\":1}\nhello\n").unwrap();
        let report = MetricsFile::resume(&path, "a", 1).unwrap_err().report();
        assert!(report.contains("metrics.jsonl: line 2 is not a metrics line\n\nhint: "), "{report}");
    }

    #[test]
    fn peak_memory_is_read_where_the_system_tells() {
        assert_eq!(peak_from_status("VmPeak:\t  9 kB\nVmHWM:\t    1234 kB\nVmRSS: 1 kB\n"), Some(1234 * 1024));
        assert_eq!(peak_from_status("nothing"), None);
        if cfg!(target_os = "linux") {
            assert!(peak_memory_bytes().unwrap() > 1 << 20);
        }
    }

    #[test]
    fn the_peak_counts_anew_where_the_system_lets_it() {
        drop(std::hint::black_box(vec![1u8; 1 << 28]));
        let before = peak_memory_bytes();
        if reset_peak_memory() {
            // Other tests run meanwhile, but none of them needs half of that.
            assert!(peak_memory_bytes().unwrap() + (1 << 27) < before.unwrap());
        }
    }

    #[test]
    fn timing_fields_are_fields() {
        let line = serde_json::to_string(&metrics("a", 1, 1.0)).unwrap();
        let bare = without_timing(&line).unwrap();
        assert!(TIMING_FIELDS.iter().all(|f| line.contains(f) && !bare.contains(f)));
    }
}
