//! `align_check` of a stage: visual tokens beside their captions' embeddings, at the stage's start and at its end.
//!
//! The figures of the start are computed whenever the stage begins or goes on: its start is rebuilt from the stage before to the
//! same bits, so that nothing has to be kept for a resumed run.

use super::freeze::name_broken;
use super::stage::{Run, micro};
use super::state::State;
use crate::bail;
use crate::data::{Dataset, Item, load_pixels};
use crate::error::{Context, Result};
use crate::model::params::Module;
use crate::report::Table;
use crate::report::human::percent;
use crate::spec::{AlignCheck, Stage};
pub use crate::train::align::Alignment;
use crate::train::align::measure;
use crate::train::evaluate::Figures;

/// What it is called in the recipe and in `results.json`.
pub const NAME: &str = "align_check";

/// The samples that a stage's check looks at, evenly spread over those with pictures; none without a check.
///
/// # Errors
/// If the figures could not tell anything: no projector trains, or there are no two samples with pictures.
pub fn samples<'a>(stage: &Stage, state: &State, data: &'a Dataset) -> Result<Vec<&'a Item>> {
    let Some(check) = &stage.align_check else { return Ok(Vec::new()) };
    if !state.vlm.projector.as_ref().is_some_and(Module::trains) {
        bail!("align_check: the projector does not train in this stage, so that nothing would be seen to change";
            "add \"projector.*\" to `train`, or drop align_check")
    }
    let shown: Vec<&Item> = data.items.iter().filter(|i| !i.images().is_empty()).collect();
    if shown.len() < 2 {
        bail!("align_check: {} of this stage's samples show a picture, and two are the least to compare", shown.len();
            "give the stage data with pictures, or drop align_check")
    }
    let n = check.samples.min(shown.len());
    Ok((0..n).map(|i| shown[i * shown.len() / n]).collect())
}

/// The figures of a model as it stands.
pub fn look(run: &Run, stage: &Stage, state: &State, items: &[&Item]) -> Result<Alignment> {
    measure(&state.vlm, items, micro(stage), |part| load_pixels(part.iter().copied(), run.images))
        .map_err(|e| name_broken(&state.vlm, e, |_| ()))
        .context(NAME)
}

/// The figures of a stage's end beside those of its start, for `results.json`.
pub fn figures(before: &Alignment, after: &Alignment) -> Figures {
    let values = [
        ("cosine", after.cosine),
        ("cosine/before", before.cosine),
        ("retrieval", after.retrieval),
        ("retrieval/before", before.retrieval),
        ("chance", after.chance),
    ];
    Figures { n: after.n, values: values.map(|(name, v)| (name.to_string(), v)).into() }
}

/// The same as a table.
pub fn table(stage: &str, before: &Alignment, after: &Alignment) -> Table {
    let title = format!("stage {stage}: pictures beside their captions ({} samples)", after.n);
    let mut t = Table::new(title, ["", "before", "after"]);
    let cosine = |a: &Alignment| format!("{:.4}", a.cosine);
    t.row(["mean cosine of visual tokens and caption".to_string(), cosine(before), cosine(after)]);
    t.row(["pictures that find their caption".to_string(), percent(before.retrieval), percent(after.retrieval)]);
    t.row(["  by chance".to_string(), percent(before.chance), percent(after.chance)]);
    t
}

/// What to say of a cosine below the threshold.
pub fn warning(stage: &str, check: &AlignCheck, before: &Alignment, after: &Alignment) -> Option<String> {
    (after.cosine < check.threshold).then(|| {
        format!(
            "stage.{stage}: the mean cosine of visual tokens and captions is {:.4} (before: {:.4}), below align_check.threshold = {}: \
             train longer or with a higher lr, see that pictures and captions belong together, or, if held-out figures are good, lower the threshold",
            after.cosine, before.cosine, check.threshold
        )
    })
}
