//! A stage's inside: packing samples, the step, objectives, evaluation, generation.

pub mod align;
pub mod collate;
pub mod evaluate;
pub mod generate;
pub mod objective;
pub mod step;
