//! The date that chat templates are told: part of the run, so that going on another day computes the same.

use super::assemble::Assembly;
use super::run_dir::RunDir;
use crate::error::{Context, Result};
use crate::spec::{Recipe, Template};
use jiff::civil::Date;

/// `model.template_date`.
///
/// # Errors
/// If it is no date.
pub fn parse(text: &str) -> Result<Date> {
    let date = text.parse::<Date>().map_err(|e| crate::error::Error::new(e.to_string()));
    date.with_context(|| format!("model.template_date = {text:?}"))
        .map_err(|e| e.hint("a date looks like \"2024-07-26\""))
}

/// The recipe with the date of its run, where a template asks for one and the recipe names none: the one that an earlier attempt
/// has kept, else today's.
pub fn kept(recipe: &Recipe, assembly: &mut Assembly) -> Result<Recipe> {
    let mut recipe = recipe.clone();
    let entries = recipe.stage.values().flat_map(|s| &s.data).chain(recipe.eval.values().flat_map(|e| &e.data));
    let chat = entries.map(|d| d.template.unwrap_or(recipe.model.template)).any(|t| t == Template::Chat);
    let Some(today) = assembly.encoder.date().filter(|_| chat && assembly.encoder.asks_the_date()) else {
        return Ok(recipe);
    };
    if recipe.model.template_date.is_none() {
        let before = RunDir::existing(&recipe.output_dir).and_then(|dir| dir.recipe()).ok();
        let date = match before.and_then(|r| r.model.template_date) {
            Some(date) => parse(&date)?,
            None => today,
        };
        assembly.encoder = assembly.encoder.on(date);
        recipe.model.template_date = Some(date.to_string());
    }
    Ok(recipe)
}
