//! Samples to a packed micro-batch: no padding, each distinct picture once.

use crate::bail;
use crate::data::{IGNORE, ImageRef, Item, Pixels, Sample};
use crate::error::Result;
use crate::model::visual::Layout;
use crate::model::vlm::Batch;
use crate::ops::tensor;
use std::collections::BTreeMap;

/// Packs `samples` in order. `pixels` holds every picture that they show, all of one size; in the batch they are f32 on the
/// host.
pub fn collate(samples: &[&Sample], pixels: &Pixels) -> Result<Batch> {
    let mut batch = Batch::default();
    let mut index: BTreeMap<&ImageRef, u32> = BTreeMap::new();
    let mut values: Vec<f32> = Vec::new();
    for (owner, s) in samples.iter().enumerate() {
        let start = batch.ids.len() as u32;
        for (t, label) in s.labels.iter().enumerate().skip(1).filter(|(_, l)| **l != IGNORE) {
            batch.targets.push((start + t as u32 - 1, *label as u32));
            batch.owners.push(owner);
        }
        batch.ids.extend_from_slice(&s.ids);
        batch.lengths.push(s.ids.len());
        for image in &s.images {
            let next = index.len() as u32;
            let at = *index.entry(image).or_insert(next);
            if at == next {
                let Some(px) = pixels.get(image) else {
                    bail!("{}: its picture {} was not loaded", s.id, image.path.display())
                };
                if px.len() != image.numbers() {
                    bail!("{}: its picture {} was loaded in another size", s.id, image.path.display())
                }
                values.extend_from_slice(px);
                batch.layouts.push(image.tiles.map(|t| Layout { pieces: t.pieces(), tokens: t.layout() }));
            }
            batch.pictures.push(at);
        }
    }
    if let Some((first, _)) = index.first_key_value() {
        let size = first.size;
        if let Some((other, _)) = index.iter().find(|(i, _)| i.size != size) {
            bail!("pictures of {size} px and of {} px in one batch", other.size)
        }
        let pieces = index.keys().map(|i| i.pieces()).sum::<usize>();
        batch.pixels = Some(tensor(values, (pieces, 3, size, size))?);
    }
    Ok(batch)
}

/// Sums `values` (one a target) by sequence.
pub fn sum_by_owner(batch: &Batch, values: &[f64]) -> Vec<f64> {
    let mut sums = vec![0.0; batch.lengths.len()];
    for (owner, v) in batch.owners.iter().zip(values) {
        sums[*owner] += v;
    }
    sums
}

/// Label tokens of each sequence.
pub fn targets_by_owner(batch: &Batch) -> Vec<usize> {
    let mut n = vec![0; batch.lengths.len()];
    for owner in &batch.owners {
        n[*owner] += 1;
    }
    n
}

/// The sample of an item that is no pair.
pub fn single(item: &Item) -> Result<&Sample> {
    match item {
        Item::Sample(s) => Ok(s),
        Item::Pair(s, _) => {
            bail!("{} is a preference pair, but a conversation is needed", s.id; "give conversations with `conversations`")
        }
    }
}

/// Chosen and rejected of a pair.
pub fn pair(item: &Item) -> Result<(&Sample, &Sample)> {
    match item {
        Item::Pair(chosen, rejected) => Ok((chosen, rejected)),
        Item::Sample(s) => {
            bail!("{} is a conversation, but a preference pair is needed", s.id; "give pairs with `prompt`, `chosen`, `rejected`")
        }
    }
}
