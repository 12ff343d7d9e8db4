//! Samples to measure steps on.

use super::flops::Pass;
use super::preset::Preset;
use super::step::Work;
use crate::data::{IGNORE, ImageRef, Item, Pixels, Sample};
use crate::error::Result;
use crate::ops::random::{Key, normal};
use candle_core::DType;
use std::sync::Arc;

/// Made-up samples.
pub(super) struct Batch {
    /// Samples, or pairs of them.
    pub items: Vec<Item>,
    /// A picture for each.
    pub pixels: Pixels,
    length: usize,
    labels: usize,
}

impl Batch {
    /// A picture in front, then text: captions are labelled whole; of a conversation the second half, the answer.
    pub fn new(preset: &Preset, work: Work, micro: usize, sequence: Option<usize>) -> Result<Self> {
        let visual = preset.vision.num_patches();
        let usual = if work == Work::Align { visual + preset.caption } else { preset.sequence };
        let length = sequence.unwrap_or(usual);
        let text = length.saturating_sub(1 + visual);
        let prompt = if work == Work::Align { 0 } else { text / 2 };
        let words = preset.language.vocab_size as u64;
        let sample = |i: usize, side: u64| {
            let word = |t: usize| {
                // The prompt is the same on both sides of a pair.
                let draw = Key::new(1, "text").index(i as u64).index(if t < prompt { 0 } else { side });
                let id = (draw.uniform(t as u64) * words as f64) as u32;
                if id == preset.image_token { id.saturating_sub(1) } else { id }
            };
            let mut ids = vec![1];
            ids.extend(vec![preset.image_token; visual]);
            ids.extend((0..text).map(word));
            let first = 1 + visual + prompt;
            let labels = ids.iter().enumerate().map(|(t, id)| if t < first { IGNORE } else { *id as i32 }).collect();
            let (path, size) = (format!("picture {i}").into(), preset.vision.image_size);
            let image = ImageRef { path, resize: Default::default(), alpha: Default::default(), size, tiles: None };
            let id = format!("sample {i}");
            Sample { id, ids, labels, images: vec![image], category: None, absent: Vec::new() }
        };
        let item = |i: usize| match work {
            Work::Dpo => Item::Pair(sample(i, 1), sample(i, 2)),
            _ => Item::Sample(sample(i, 1)),
        };
        let items: Vec<Item> = (0..micro).map(item).collect();
        let mut pixels = Pixels::new();
        for (i, image) in items.iter().flat_map(Item::images).enumerate() {
            if !pixels.contains_key(image) {
                let values = normal(Key::new(1, "pixels").index(i as u64), &[image.numbers()], 1.0, DType::F32)?;
                pixels.insert(image.clone(), Arc::new(values.to_vec1()?));
            }
        }
        let labels = items.iter().flat_map(Item::samples).map(Sample::targets).sum();
        Ok(Self { items, pixels, length, labels })
    }

    /// What a step on it, with low-rank updates of this rank, consists of.
    pub fn pass(&self, work: Work, rank: usize) -> Pass {
        Pass {
            pictures: self.pixels.len(),
            sequences: self.items.iter().flat_map(Item::samples).count(),
            length: self.length,
            labels: self.labels,
            projector: work != Work::Dpo,
            rank: (work != Work::Align).then_some(rank),
        }
    }
}
