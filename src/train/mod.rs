//! A stage: the step, the objectives, evaluation, generation.
pub mod objective;
