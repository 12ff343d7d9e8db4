//! The optimizer's step on every low-rank update of a language model, in each form of storage.

use super::{Item, Shapes, Work};
use crate::bench::constant_optimizer;
use crate::model::init::Place;
use crate::ops::Weight;
use crate::spec::{self, MomentType};
use candle_core::DType;
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
    let copy = if rounds { place.dtype.size_in_bytes() } else { 0 };
    let (exact, eight) = (spec::AdamW::default(), spec::AdamW { moments: MomentType::Eight, ..Default::default() });
    // Bytes an element: value, gradient and both moments are read; all but the gradient are written, and the rounded copy. The
    // norm, which must be known before, reads the gradient once more.
    let forms = [
        ("AdamW, f32 values", false, exact.clone(), 4 + 28 + copy),
        ("AdamW, bf16 rounded stochastically", true, exact, 4 + 24),
        ("AdamW, f32 values, 8-bit moments", false, eight.clone(), 4 + 16 + copy),
        ("AdamW, bf16, 8-bit moments", true, eight, 4 + 12),
    ];
    let item = |(name, alone, hyper, bytes): (&'static str, bool, spec::AdamW, usize)| {
        let (shape, shapes) = (format!("{} tensors, {elements}", shapes.len()), shapes.clone());
        Item::new("adamw", name, shape, Work { flops: 0, bytes: elements * bytes }, move |noise| {
            let (mut weights, mut grads) = (BTreeMap::new(), BTreeMap::new());
            for (name, shape) in &shapes {
                let value = noise.wide(name, shape, 0.02)?;
                let weight = if alone {
                    Weight { value: value.to_dtype(DType::BF16)?, rounded: None }
                } else {
                    let rounded = if rounds { Some(noise.normal(name, shape, 0.02)?) } else { None };
                    Weight { value, rounded }
                };
                weights.insert(name.clone(), weight);
                grads.insert(name.clone(), noise.wide(&format!("gradient of {name}"), shape, 1e-3)?);
            }
            let mut optimizer = constant_optimizer(&shapes, 1e-4, hyper.clone())?;
            Ok(Box::new(move || optimizer.step(&weights, &grads).map(drop)))
        })
    };
    forms.into_iter().map(item).collect()
}
