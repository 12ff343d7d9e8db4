//! A tiny training in three stages (align, LoRA SFT with dropout, DPO), through the pipeline itself in a temporary folder,
//! beside its reference curve in f64; and each stage once more from its checkpoint, to the same bits.
//!
//! The recipe is `recipe.toml`. `curve.toml` holds the f64 curve, and how far from it at most the CPU's reference ops and
//! the emulated kernels were in f32 and in bf16, by stage and kind of figure. A training may be [`ROOM`] times as far off,
//! and [`FLOOR`] more.
//! `cargo test --release --test kernels -- --ignored the_curve_is_made_again` writes the file.

use super::curve::{self, Curves};
use crate::error::{Context, Error, Result};
use crate::model::init::Place;
use crate::pipeline::run_dir::RunDir;
use crate::pipeline::state::TRAINED;
use crate::pipeline::{self, Options};
use crate::recipe;
use crate::report::{Reporter, without_timing};
use crate::spec::Recipe;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs;
use tempfile::TempDir;

const RECIPE: &str = include_str!("recipe.toml");
const REFERENCE: &str = include_str!("curve.toml");

/// How many times as far from f64 as was measured a training may be. An op may be twice as far as the plain computation
/// (`ops::registry::verify`); a training adds up many such errors, and its worst step is another with another order of sums.
pub const ROOM: f64 = 4.0;
/// As for an op in f32 (`ops::registry::verify`): a mean of many errors may by chance have been as good as none.
pub const FLOOR: f64 = 2e-6;

/// Type → stage → kind of figure → largest relative deviation.
pub type Measured = BTreeMap<String, BTreeMap<String, BTreeMap<String, f64>>>;

/// What the training should be like.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reference {
    /// In f64.
    pub curve: Curves,
    /// How far from it f32 and bf16 were.
    pub measured: Measured,
}

impl Reference {
    /// The one in this binary.
    pub fn embedded() -> Result<Self> {
        toml::from_str(REFERENCE).map_err(|e| Error::new(format!("the self-test's curve: {e}")))
    }

    /// What a stage in `dtype` shows, its worst deviation by share of the bound first: (off, bound, what is wrong).
    pub fn judge(&self, dtype: &str, stage: &str, found: &Curves) -> Result<(f64, f64, Option<String>)> {
        let missing = || Error::new(format!("there is no curve of stage {stage} in {dtype}"));
        let (found, want) = (found.get(stage).ok_or_else(missing)?, self.curve.get(stage).ok_or_else(missing)?);
        let measured = self.measured.get(dtype).and_then(|m| m.get(stage)).ok_or_else(missing)?;
        let mut worst = (0.0, 0.0, None);
        for d in found.deviations(want)? {
            let bound = ROOM * measured.get(d.kind).ok_or_else(missing)? + FLOOR;
            if worst.1 == 0.0 || d.off / bound > worst.0 / worst.1 {
                let wrong = (d.off > bound).then(|| format!("{}: off by {:.1e}, {bound:.1e} would do", d.told, d.off));
                worst = (d.off, bound, wrong);
            }
        }
        Ok(worst)
    }
}

/// A finished training in a folder of its own, which goes with it.
pub struct Training {
    recipe: Recipe,
    place: Place,
    _folder: TempDir,
}

impl Training {
    /// Makes data and models, and trains all stages.
    pub fn run(place: Place) -> Result<Self> {
        let folder = tempfile::tempdir().map_err(|e| {
            Error::new("no temporary folder can be made").source(e).hint("set TMPDIR to a folder on a disk")
        })?;
        let path = folder.path().join("recipe.toml");
        fs::write(&path, RECIPE).with_context(|| path.display())?;
        let recipe = recipe::load_with(&path, &[], &|_| None)?;
        let training = Self { recipe, place, _folder: folder };
        training.train()?;
        Ok(training)
    }

    fn train(&self) -> Result<()> {
        let options = Options { place: self.place.clone(), ..Options::default() };
        pipeline::train(&self.recipe, &options, &Reporter::silent()).map(drop)
    }

    /// The stages in order.
    pub fn stages(&self) -> &[String] {
        &self.recipe.stages
    }

    /// What it was like.
    pub fn curves(&self) -> Result<Curves> {
        curve::read(&self.recipe)
    }

    /// Runs each stage again from the checkpoint in its middle; names the first thing whose bits are others, if any.
    pub fn again(&self) -> Result<Option<String>> {
        let before = self.bits()?;
        let dir = RunDir::existing(&self.recipe.output_dir)?;
        for stage in self.stages() {
            let stage = dir.stage(&self.recipe, stage);
            fs::remove_file(stage.join("done.json"))?;
            fs::remove_dir_all(stage.join("final"))?;
        }
        self.train()?;
        // Of the later stages only the steps behind the checkpoint are there again.
        Ok(self.bits()?.into_iter().find(|(what, bits)| before.get(what) != Some(bits)).map(|(what, _)| what))
    }

    /// Every step's figures but its timing, and every stage's tensors, with what they are.
    fn bits(&self) -> Result<BTreeMap<String, Vec<u8>>> {
        let dir = RunDir::existing(&self.recipe.output_dir)?;
        let mut bits = BTreeMap::new();
        for line in fs::read_to_string(dir.root().join("metrics.jsonl"))?.lines() {
            let line = without_timing(line)?;
            let value: serde_json::Value = serde_json::from_str(&line)?;
            let stage = value["stage"].as_str().unwrap_or_default();
            bits.insert(format!("{stage}, step {}", value["step"]), line.into_bytes());
        }
        for stage in self.stages() {
            let path = dir.stage(&self.recipe, stage).join("final").join(TRAINED);
            bits.insert(format!("{stage}, the trained tensors"), fs::read(&path).with_context(|| path.display())?);
        }
        Ok(bits)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference() -> Reference {
        Reference::embedded().unwrap()
    }

    #[test]
    fn what_is_off_is_named_with_its_step() {
        let r = reference();
        for dtype in ["f32", "bf16"] {
            for (stage, kinds) in &r.measured[dtype] {
                let (off, bound, wrong) = r.judge(dtype, stage, &r.curve).unwrap();
                assert!(off == 0.0 && bound > 0.0 && wrong.is_none(), "{dtype} {stage}");
                for (by, caught) in [(0.9, false), (1.1, true)] {
                    let mut moved = r.curve.clone();
                    let norms = &mut moved.get_mut(stage).unwrap().gradient_norm;
                    let largest = norms.iter().copied().fold(0.0, f64::max);
                    norms[6] += by * (ROOM * kinds["gradient norm"] + FLOOR) * largest;
                    let (.., wrong) = r.judge(dtype, stage, &moved).unwrap();
                    assert_eq!(wrong.is_some(), caught, "{dtype} {stage} {by}: {wrong:?}");
                    assert!(wrong.is_none_or(|w| w.contains("gradient norm") && w.contains("(step 7)")));
                }
                let mut broken = r.curve.clone();
                broken.get_mut(stage).unwrap().loss[2] = f64::NAN;
                let (.., wrong) = r.judge(dtype, stage, &broken).unwrap();
                assert!(wrong.is_some_and(|w| w.starts_with("loss NaN (step 3)")), "{dtype} {stage}");
                broken.get_mut(stage).unwrap().loss.pop();
                assert!(r.judge(dtype, stage, &broken).is_err());
            }
        }
    }

    #[test]
    fn every_kind_of_figure_has_a_bound_that_would_show_a_wrong_step() {
        let r = reference();
        for (dtype, most) in [("f32", 1e-5), ("bf16", 2e-2)] {
            for (stage, kinds) in &r.measured[dtype] {
                let margin = usize::from(stage == "dpo");
                assert_eq!(kinds.len(), curve::KINDS.len() - 1 + margin, "{dtype} {stage}");
                for (kind, off) in kinds {
                    assert!(*off > 0.0 && ROOM * off <= most, "{dtype} {stage} {kind}: {off:e}");
                }
            }
        }
    }
}
