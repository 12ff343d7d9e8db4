//! Samples that are longer than the language model has positions.

use crate::data::Item;
use crate::model::vlm::Vlm;
use crate::report::human::thousands;

/// What to say of samples of a recipe's `place` that lie beyond `max_position_embeddings`; `None` if none does.
pub fn warning(place: &str, vlm: &Vlm, items: &[Item]) -> Option<String> {
    let positions = vlm.language.config.max_position_embeddings;
    let beyond = beyond(place, vlm, items)?;
    Some(format!("{beyond}: set model.max_seq_len = {positions} and model.truncate = true, or leave them out"))
}

/// The same without what to do about it. Rotary positions can be computed there, but the model has never seen them.
pub fn beyond(place: &str, vlm: &Vlm, items: &[Item]) -> Option<String> {
    let positions = vlm.language.config.max_position_embeddings;
    let soft: usize = vlm.prefix_rows()[0];
    let lengths = items.iter().flat_map(Item::samples).map(|s| (s.ids.len() + soft, &s.id));
    let long: Vec<_> = lengths.filter(|(n, _)| *n > positions).collect();
    let (longest, id) = long.iter().max_by_key(|(n, _)| *n)?;
    Some(format!(
        "{place}: {} of {} samples are longer than the {} positions that the language model was made for (max_position_embeddings); the longest, {id}, takes {}",
        thousands(long.len() as u64),
        thousands(items.iter().flat_map(Item::samples).count() as u64),
        thousands(positions as u64),
        thousands(*longest as u64)
    ))
}
