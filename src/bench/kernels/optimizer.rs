//! The optimizer's update of every low-rank update of a language model.

use super::{Item, Shapes, Work};
use crate::bench::constant_optimizer;
use crate::model::init::Place;
use crate::ops::Weight;
use std::collections::BTreeMap;

pub(super) fn items(s: Shapes, place: &Place) -> Vec<Item> {
    let rounds = place.dtype != place.master();
    let mut shapes: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    for layer in 0..s.layers {
        let (d, m) = (s.hidden, s.mlp);
        let linears =
            [("q", d, d), ("k", d, d), ("v", d, d), ("o", d, d), ("gate", d, m), ("up", d, m), ("down", m, d)];
        for (name, k, out) in linears {
            shapes.insert(format!("{layer}.{name}.A"), vec![s.rank, k]);
            shapes.insert(format!("{layer}.{name}.B"), vec![out, s.rank]);
        }
    }
    let elements: usize = shapes.values().map(|s| s.iter().product::<usize>()).sum();
    // Value, gradient and both moments are read; all but the gradient are written, and the rounded copy.
    let work = Work { flops: 0, bytes: elements * (16 + 12 + if rounds { place.dtype.size_in_bytes() } else { 0 }) };
    let shape = format!("{} tensors, {elements}", shapes.len());
    vec![Item::new("adamw", "AdamW, all low-rank updates", shape, work, move |noise| {
        let (mut weights, mut grads) = (BTreeMap::new(), BTreeMap::new());
        for (name, shape) in &shapes {
            let value = noise.wide(name, shape, 0.02)?;
            let rounded = if rounds { Some(noise.normal(name, shape, 0.02)?) } else { None };
            weights.insert(name.clone(), Weight { value, rounded });
            grads.insert(name.clone(), noise.wide(&format!("gradient of {name}"), shape, 1e-3)?);
        }
        let mut optimizer = constant_optimizer(&shapes, 1e-4)?;
        Ok(Box::new(move || optimizer.step(&weights, &grads).map(drop)))
    })]
}
