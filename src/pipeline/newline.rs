//! The newline of tiles, where nothing it was loaded from has one: until a stage trains it, it is noise in what every picture in
//! tiles becomes.

use super::assemble::Assembly;
use super::state::lineage;
use crate::error::{Context, Result};
use crate::model::init::NEWLINE;
use crate::model::params::Module;
use crate::spec::pattern::Patterns;
use crate::spec::{Data, Recipe};

/// Is the newline still random at the end of `stage`: it began so, or was reset, and no stage on the way has trained it?
pub fn untrained(recipe: &Recipe, assembly: &mut Assembly, stage: &str) -> Result<bool> {
    if assembly.vlm.newline.is_none() {
        return Ok(false);
    }
    let known: Vec<String> = assembly.vlm.names(|p| !p.is_adapter()).into_iter().collect();
    let mut random = assembly.newline_is_random;
    for name in lineage(recipe, stage)? {
        let stage = &recipe.stage[name];
        let named = |patterns: &[String]| -> Result<bool> {
            Ok(!patterns.is_empty() && Patterns::new(patterns, &known)?.matches(NEWLINE))
        };
        random |= named(&stage.reset).with_context(|| format!("stage.{name}: reset"))?;
        random &= !named(&stage.train).with_context(|| format!("stage.{name}: train"))?;
    }
    Ok(random)
}

/// What to say of a stage that shows pictures in tiles, in its data or in its evaluations, with a newline that nothing has trained.
pub fn warnings(recipe: &Recipe, assembly: &mut Assembly, name: &str) -> Result<Vec<String>> {
    let (stage, tiles) = (&recipe.stage[name], |data: &[Data]| data.iter().any(Data::has_tiles));
    let evals = stage.eval.iter().filter(|e| recipe.eval.get(*e).is_some_and(|e| tiles(&e.data)));
    let mut places: Vec<String> = evals.map(|e| format!("eval.{e} after stage.{name}")).collect();
    if tiles(&stage.data) {
        places.insert(0, format!("stage.{name}"));
    }
    if places.is_empty() || !untrained(recipe, assembly, name)? {
        return Ok(Vec::new());
    }
    Ok(places.into_iter().map(|place| format!("{place}: {}", told())).collect())
}

/// What is wrong, and what to do.
pub fn told() -> String {
    format!(
        "pictures are shown in tiles, but `{NEWLINE}`, which ends each row of them, has random values that no stage has trained: let a stage with resize = \"anyres\" train it, or show pictures with another `resize`"
    )
}
