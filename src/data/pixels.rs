//! Decoded pictures by reference, each once.

use super::dataset::Item;
use super::image::{ImageProcessor, ImageRef};
use crate::bail;
use crate::error::{Context, Result};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

/// Prepared pictures, [`ImageRef::numbers`] each.
pub type Pixels = BTreeMap<ImageRef, Arc<Vec<f32>>>;

/// Decodes every picture that `items` show, on all threads. Errors name the sample.
pub fn load_pixels<'a>(
    items: impl IntoIterator<Item = &'a Item>,
    processor: Option<&ImageProcessor>,
) -> Result<Pixels> {
    let mut wanted: BTreeMap<&ImageRef, &str> = BTreeMap::new();
    for item in items {
        for image in item.images() {
            wanted.entry(image).or_insert(item.id());
        }
    }
    let Some(processor) = processor else {
        if let Some((image, id)) = wanted.first_key_value() {
            bail!("sample {id} shows {}, but the model has no vision tower", image.path.display();
                "set model.vision, or leave the pictures out of the data")
        }
        return Ok(Pixels::new());
    };
    let load = |(image, id): (&ImageRef, &str)| -> Result<_> {
        let px = processor.load(image).with_context(|| format!("sample {id}"))?;
        Ok((image.clone(), Arc::new(px)))
    };
    wanted.into_par_iter().map(load).collect()
}
