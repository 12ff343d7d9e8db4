//! adfreeze trains vision-language models on frozen backbones: one recipe, a fixed pipeline
//! (projector pretrain → LoRA SFT → DPO), one binary.
//!
//! The rooms of this house, in the direction in which data flows:
//!
//! `cli` → `bench` → `pipeline` → { `recipe`, `train`, `report`, `checkpoint` } → { `adapters`, `model`, `data`, `optim` } → `ops`
//!
//! | room | what is in it |
//! |---|---|
//! | [`cli`] | one file per command |
//! | [`recipe`] | what the user writes: structs, loading, patterns, errors with a hint |
//! | [`mod@bench`] | how fast kernels and steps are on this machine, beside their floors |
//! | [`pipeline`] | a run: stages in order, hand-over, run directory, resume |
//! | [`train`] | a stage: the step, the objectives, evaluation, generation |
//! | [`report`] | console and JSON lines |
//! | [`checkpoint`] | atomic safetensors, PEFT folders, HF folders |
//! | [`adapters`] | what is grafted onto a backbone |
//! | [`model`] | the chain of segments, parameters, weights on disk |
//! | [`data`] | samples, images, templates, batches, the loader |
//! | [`optim`] | AdamW, groups, schedules, clipping |
//! | [`ops`] | differentiable operations with their own backward |

// Input never panics: what the user can get wrong is an error.
#![cfg_attr(
    not(test),
    warn(
        clippy::unwrap_used,
        clippy::expect_used,
        clippy::panic,
        clippy::unreachable,
        clippy::todo,
        clippy::unimplemented,
        clippy::exit,
        clippy::print_stdout
    )
)]

#[warn(missing_docs)]
pub mod adapters;
#[warn(missing_docs)]
pub mod bench;
#[warn(missing_docs)]
pub mod checkpoint;
pub mod cli;
pub mod data;
#[warn(missing_docs)]
pub mod error;
pub mod model;
#[warn(missing_docs)]
pub mod ops;
#[warn(missing_docs)]
pub mod optim;
pub mod pipeline;
pub mod recipe;
#[warn(missing_docs)]
pub mod report;
pub mod train;
