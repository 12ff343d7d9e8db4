//! Agreement with transformers, PEFT, TRL and Pillow: every case of every folder under `tests/golden/` that holds a
//! `golden.json`, and of the folder that the variable `ADFREEZE_GOLDEN` names. One line is printed for each case.
//!
//! The folders are made by a Python script against the reference implementations; each carries its own tolerances.

mod golden;

use golden::{Golden, folders};

/// Runs one group of cases on every folder.
fn on_each(group: impl Fn(&Golden)) {
    let all = folders();
    assert!(!all.is_empty(), "no golden folder was found");
    for dir in all {
        group(&Golden::open(&dir));
    }
}

#[test]
fn pixels() {
    on_each(golden::pixels::run);
}

#[test]
fn tokens_and_labels() {
    on_each(golden::tokens::run);
}

#[test]
fn forward() {
    on_each(golden::forward::run);
}

#[test]
fn gradients() {
    on_each(golden::gradients::run);
}

#[test]
fn lora_merge() {
    on_each(golden::merge::run);
}

#[test]
fn dpo_losses() {
    on_each(golden::dpo_losses::run);
}

#[test]
fn training() {
    on_each(golden::training::run);
}
