//! Agreement with transformers, PEFT, TRL and Pillow: every case of every folder under `tests/golden/` that holds a
//! `golden.json`, and of the folder that the variable `ADFREEZE_GOLDEN` names. One line is printed for each case, whether
//! it passes or not; a group fails at its end, with all cases that are off.
//!
//! The folders are made by a Python script against the reference implementations; each carries its own tolerances.

mod golden;

use golden::{Golden, folders};

/// Runs one group of cases on every folder.
fn on_each(group: impl Fn(&Golden)) {
    let all = folders();
    assert!(!all.is_empty(), "no golden folder was found");
    let mut off = Vec::new();
    for dir in all {
        let golden = Golden::open(&dir);
        group(&golden);
        off.extend(golden.off.into_inner());
    }
    assert!(off.is_empty(), "{} cases are off:\n  {}", off.len(), off.join("\n  "));
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

/// The lines must reach whoever runs `cargo test`, which swallows what passing tests print.
#[test]
fn every_case_has_its_line() {
    let this = std::env::current_exe().unwrap();
    let out = std::process::Command::new(this).args(["--exact", "dpo_losses"]).output().unwrap();
    let (text, errors) = (String::from_utf8(out.stdout).unwrap(), String::from_utf8(out.stderr).unwrap());
    assert!(out.status.success(), "{text}{errors}");
    let lines = text.lines().filter(|l| l.contains("parity a: DPO loss sigmoid, "));
    assert!(lines.count() > 1, "no lines in:\n{text}");
}

#[test]
fn a_case_that_is_off_does_not_hide_the_next() {
    let off = std::panic::catch_unwind(|| {
        on_each(|g| {
            g.case("(made up) off", 2.0, 1.0);
            g.case("(made up) on", 1.0, 1.0);
            g.case("(made up) not a number", f64::NAN, 1.0);
        });
    });
    let off = *off.unwrap_err().downcast::<String>().unwrap();
    assert!(off.contains("cases are off") && !off.contains(") on"), "{off}");
    assert!(off.contains("a: (made up) off: 2e0 is above 1e0") && off.contains("a: (made up) not a number"), "{off}");
}
