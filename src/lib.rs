//! adfreeze trains vision-language models on frozen backbones: one recipe, a fixed pipeline
//! (projector pretrain → LoRA SFT → DPO), one binary.
//!
//! The rooms of this house from the top down. A room uses those that its row lists, all of them below it; `error` is everyone's.
//! A test holds the rows to the imports.
//!
//! | room | what is in it | uses |
//! |---|---|---|
//! | [`cli`] | one file per command | bench, pipeline, recipe, train, checkpoint, report, model, data, ops, spec |
//! | [`mod@bench`] | how fast kernels and steps are on this machine, beside their floors | pipeline, recipe, train, report, adapters, model, data, optim, ops, spec |
//! | [`pipeline`] | a run: stages in order, hand-over, run directory, resume | recipe, train, checkpoint, report, adapters, model, data, optim, ops, spec |
//! | [`recipe`] | from the text of a recipe to its types: loading, rules, errors with a hint | spec |
//! | [`train`] | a stage: the step, the objectives, evaluation, generation | model, data, ops, spec |
//! | [`checkpoint`] | atomic safetensors, PEFT folders, HF folders | adapters, model, data, ops |
//! | [`report`] | console and JSON lines | |
//! | [`adapters`] | what is grafted onto a backbone | model, ops, spec |
//! | [`model`] | the chain of segments, parameters, weights on disk | ops, spec |
//! | [`data`] | samples, images, templates, batches, the loader | ops, spec |
//! | [`optim`] | AdamW, groups, schedules, clipping | ops, spec |
//! | [`ops`] | differentiable operations with their own backward | spec |
//! | [`spec`] | what a user writes, as types | |
//! | [`error`](mod@error) | errors with causes and a hint | |

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
#[warn(missing_docs)]
pub mod spec;
pub mod train;
