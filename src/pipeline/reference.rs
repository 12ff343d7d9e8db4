//! DPO's reference: its log-probabilities of every pair, computed once before step 1 and kept in the run.
//!
//! The file holds the pairs so far, in the order of the data: a pass that was stopped goes on where it ended.

use super::freeze;
use super::run_dir::hex;
use super::stage::{Run, micro};
use super::state::State;
use crate::checkpoint::safetensors;
use crate::checkpoint::sums::Fit;
use crate::data::{Dataset, Item, load_pixels};
use crate::error::{Context, Result};
use crate::model::vlm::Vlm;
use crate::ops::tensor;
use crate::spec::{Objective, Reference, Stage};
use crate::train::step::{ReferenceTable, pair_logps};
use sha2::{Digest, Sha256};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// What the log-probabilities belong to.
const BELONGS_TO: &str = "reference_sha256";
/// Checksum of the numbers themselves.
const NUMBERS: &str = "numbers_sha256";

/// A kill loses no more of a long pass than this.
pub const KEEP_EVERY: Duration = Duration::from_secs(60);

/// The table of a DPO stage whose weights, as it starts, are those of `start` (a checksum); an empty one of another stage. `None`
/// if a signal asked to stop on the way: what there is is kept.
pub fn table(
    run: &Run,
    state: &mut State,
    stage: &Stage,
    data: &Dataset,
    path: &Path,
    start: impl FnOnce(&mut State) -> Result<String>,
) -> Result<Option<ReferenceTable>> {
    let Objective::Dpo(settings) = &stage.objective else { return Ok(Some(ReferenceTable::new())) };
    let whose = settings.reference;
    let fingerprint = belongs_to(data, whose, &start(state)?);
    let mut rows = kept(run, path, &fingerprint)?;
    let total = data.items.len();
    if rows.len() == total {
        return Ok(Some(rows.into_iter().enumerate().collect()));
    }
    let pairs = format!("log-probabilities of {total} pairs under the reference");
    match rows.len() {
        0 => run.reporter.info(&pairs),
        n => run.reporter.info(&format!("{pairs}: goes on after {n}")),
    }
    let _deferred = run.signals.defer("finishing the pairs at hand; the reference's log-probabilities so far are kept");
    let progress = run.reporter.progress("reference", total);
    progress.skip(rows.len());
    let mut saved = Instant::now();
    let items: Vec<_> = data.items.iter().enumerate().skip(rows.len()).collect();
    for part in items.chunks(micro(stage)) {
        if run.signals.asked() {
            save(run, path, &rows, &fingerprint)?;
            let n = rows.len();
            run.reporter.info(&format!(
                "asked to stop, stopped after {n} of {total} pairs; the same command goes on from there"
            ));
            return Ok(None);
        }
        let new = one(run, state, part, whose);
        if new.is_err() || saved.elapsed() > KEEP_EVERY {
            save(run, path, &rows, &fingerprint)?;
            saved = Instant::now();
        }
        rows.extend(new?.into_values());
        progress.inc(part.len());
    }
    save(run, path, &rows, &fingerprint)?;
    Ok(Some(rows.into_iter().enumerate().collect()))
}

/// The log-probabilities of some pairs.
fn one(run: &Run, state: &State, part: &[(usize, &Item)], whose: Reference) -> Result<ReferenceTable> {
    let pixels = load_pixels(part.iter().map(|(_, i)| *i), run.images)?;
    let rows = |vlm: &Vlm| pair_logps(vlm, part, &pixels, whose == Reference::Base);
    rows(&state.vlm)
        .map_err(|e| freeze::name_broken(&state.vlm, e, rows))
        .context("the log-probabilities under the reference")
}

/// Chosen and rejected of the pairs that are there and belong to this reference.
fn kept(run: &Run, path: &Path, fingerprint: &str) -> Result<Vec<(f64, f64)>> {
    if !path.exists() {
        return Ok(Vec::new());
    }
    let read = || -> Result<Option<Vec<(f64, f64)>>> {
        if run.dir.fit(path)? != Fit::Same {
            return Ok(None);
        }
        let about = safetensors::metadata(path)?;
        if about.get(BELONGS_TO).is_none_or(|f| f != fingerprint) {
            return Ok(Some(Vec::new()));
        }
        let all = safetensors::load(path)?;
        let column =
            |k: &str| -> Result<Vec<f64>> { Ok(all.get(k).map(|t| t.to_vec1()).transpose()?.unwrap_or_default()) };
        let rows: Vec<(f64, f64)> = column("chosen")?.into_iter().zip(column("rejected")?).collect();
        Ok(about.get(NUMBERS).is_some_and(|sum| *sum == checksum(&rows)).then_some(rows))
    };
    // What is computed can be computed again.
    Ok(read().ok().flatten().unwrap_or_else(|| {
        run.reporter
            .warn(&format!("{} is damaged: the reference's log-probabilities are computed again", path.display()));
        Vec::new()
    }))
}

fn save(run: &Run, path: &Path, rows: &[(f64, f64)], fingerprint: &str) -> Result<()> {
    if rows.is_empty() {
        return Ok(());
    }
    let (chosen, rejected): (Vec<f64>, Vec<f64>) = rows.iter().copied().unzip();
    let n = rows.len();
    let columns =
        BTreeMap::from([("chosen".to_string(), tensor(chosen, n)?), ("rejected".to_string(), tensor(rejected, n)?)]);
    let about = [(BELONGS_TO.to_string(), fingerprint.to_string()), (NUMBERS.to_string(), checksum(rows))];
    run.dir.replace(path, &safetensors::to_bytes(&columns, &BTreeMap::from(about))?)
}

fn checksum(rows: &[(f64, f64)]) -> String {
    let mut h = Sha256::new();
    rows.iter().for_each(|(c, r)| [c, r].iter().for_each(|x| h.update(x.to_le_bytes())));
    hex(&h.finalize())
}

/// SHA-256 of which model the reference is, of the weights that the stage starts from, and of all tokens and pictures, in order.
fn belongs_to(data: &Dataset, reference: Reference, start: &str) -> String {
    hex(&Sha256::digest(format!("{reference:?} {start} {}", fingerprint(data))))
}

/// SHA-256 of all tokens and pictures, in order.
pub fn fingerprint(data: &Dataset) -> String {
    let mut h = Sha256::new();
    for sample in data.items.iter().flat_map(Item::samples) {
        h.update((sample.ids.len() as u64).to_le_bytes());
        sample.ids.iter().for_each(|id| h.update(id.to_le_bytes()));
        sample.labels.iter().for_each(|l| h.update(l.to_le_bytes()));
        sample.images.iter().for_each(|i| h.update(format!("{i:?}")));
    }
    hex(&h.finalize())
}
