//! Signals: a checkpoint and a distinct exit code at the first, an end at the second.

use super::folder::{Folder, THREE_STAGES, assert_same, figures, said};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

fn send(child: &Child, signal: &str) {
    let kill = format!("kill -{signal} {}", child.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
}

#[test]
fn a_signal_ends_the_step_writes_a_checkpoint_and_says_how_to_go_on() {
    let whole = Folder::with(THREE_STAGES);
    // No checkpoint but the one that the signal asks for.
    let args = ["--stages", "align", "--set", "defaults.checkpoint.every_steps=0", "--set", "defaults.max_steps=30"];
    whole.train(&args);
    for signal in ["TERM", "INT", "USR1"] {
        let f = Folder::with(THREE_STAGES);
        let mut child = f.start(&args);
        f.wait_for_step(&mut child, "align", 2);
        send(&child, signal);
        let said = said(child.wait_with_output().unwrap());
        assert_eq!(said.code, Some(75), "{}", said.stderr);
        assert!(said.stderr.contains("align: asked to stop, stopped after step "), "{}", said.stderr);
        assert!(said.stderr.contains("the same command goes on"), "{}", said.stderr);
        let steps = f.metrics().len();
        assert!(f.path(&format!("run/01-align/checkpoints/step-{steps:08}")).exists());
        assert!(!f.path("run/01-align/done.json").exists());
        assert!(f.train(&args).stderr.contains(&format!("goes on after step {steps} of 30")));
        assert_same(&figures(&whole.path("run")), &figures(&f.path("run")));
    }
}

#[test]
fn a_second_signal_ends_at_once() {
    let f = Folder::with(THREE_STAGES);
    // A step that takes very long.
    let mut child = f.start(&["--log", "json", "--set", "stage.align.batch.global=200000"]);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|l| l.unwrap().contains("stage_start")));
    std::thread::sleep(Duration::from_millis(200));
    send(&child, "TERM");
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "the first signal must leave the step its time");
    let asked = Instant::now();
    send(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(75));
    assert!(asked.elapsed() < Duration::from_secs(2));
    assert!(!f.path("run/01-align/checkpoints").exists());
}
