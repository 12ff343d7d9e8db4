//! Entering a stage; where adapters are merged on the way, the drift of the log-probabilities is measured.

use super::assemble::{Assembly, sight};
use super::run_dir::RunDir;
use super::stage::dataset;
use super::state::{State, hand_over};
use crate::bail;
use crate::data::{Item, load_pixels};
use crate::error::{Context, Result};
use crate::model::vlm::{Mode, Vlm};
use crate::report::Reporter;
use crate::spec::{HandOver, Recipe};
use crate::train::collate::collate;
use crate::train::step::finite_logps;

/// Samples that the drift is measured on.
const SAMPLES: usize = 4;
/// Largest change of a label token's log-probability that a merge may cause.
const TOLERANCE: f64 = 1e-2;

/// Enters stage `name`. If that merges adapters, the log-probabilities of a few samples are compared before and after the
/// merge alone, since what else the stage does may move them as well; the largest difference is reported and saved, and an
/// error above the tolerance.
pub fn measured(
    recipe: &Recipe,
    state: &mut State,
    name: &str,
    assembly: &Assembly,
    reporter: &Reporter,
    run: &RunDir,
) -> Result<()> {
    let stage = &recipe.stage[name];
    if hand_over(stage) != HandOver::Merge || state.adapters.is_empty() {
        return state.enter(stage, name);
    }
    state.look(stage)?;
    let data = dataset(recipe, stage, &assembly.encoder.seeing(sight(&state.vlm)?))?;
    let items = &data.items[..data.items.len().min(SAMPLES)];
    let before = logps(&state.vlm, items, assembly)?;
    state.take_over(stage)?;
    let after = logps(&state.vlm, items, assembly)?;
    let drift = before.iter().zip(&after).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    reporter.info(&format!("{name}: adapters merged; log-probabilities moved by at most {drift:.2e}"));
    let dir = run.stage(recipe, name);
    std::fs::create_dir_all(&dir).with_context(|| dir.display().to_string())?;
    let json = serde_json::json!({ "max_abs_logp_difference": drift, "samples": items.len(), "tolerance": TOLERANCE });
    run.write(&[(&dir.join("merge.json"), serde_json::to_string_pretty(&json)?.as_bytes())])?;
    if drift > TOLERANCE {
        bail!("merging moved a log-probability by {drift:.2e}, more than {TOLERANCE:.0e}";
            "the weights' dtype is too coarse for the update: use adapters = \"continue\" or \"stack\"")
    }
    state.begin(stage, name)
}

fn logps(vlm: &Vlm, items: &[Item], assembly: &Assembly) -> Result<Vec<f64>> {
    let pixels = load_pixels(items, assembly.images.as_ref())?;
    let samples: Vec<_> = items.iter().flat_map(Item::samples).collect();
    let batch = collate(&samples, &pixels)?;
    let logps = vlm.forward(&batch, Mode::default())?.0.logps()?;
    finite_logps(&logps, &samples)?;
    Ok(logps)
}
