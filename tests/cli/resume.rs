//! A run that is killed, stopped, split or repeated ends as an unbroken one does.

use super::folder::{Folder, THREE_STAGES, assert_same, figures};
use std::collections::BTreeMap;
use std::fs;
use std::sync::OnceLock;

/// What an unbroken run leaves.
fn unbroken() -> &'static BTreeMap<String, Vec<u8>> {
    static RUN: OnceLock<BTreeMap<String, Vec<u8>>> = OnceLock::new();
    RUN.get_or_init(|| {
        let f = Folder::with(THREE_STAGES);
        f.train(&[]);
        figures(&f.path("run"))
    })
}

/// Kills a run in `stage` once and lets it go on.
fn killed_in(stage: &str, folder: &str) {
    let attempt = |_| {
        let f = Folder::with(THREE_STAGES);
        let mut child = f.start(&[]);
        f.wait_for_step(&mut child, stage, 5);
        child.kill().unwrap();
        child.wait().unwrap();
        // On a busy machine the kill may come too late.
        (!f.path(&format!("run/{folder}/done.json")).exists()).then_some(f)
    };
    let f = (0..20).find_map(attempt).expect("always killed too late");
    let said = f.train(&[]);
    assert!(said.stderr.contains(&format!("{stage}: goes on after step ")), "{}", said.stderr);
    assert_same(unbroken(), &figures(&f.path("run")));
}

#[test]
fn killed_in_align() {
    killed_in("align", "01-align");
}

#[test]
fn killed_in_sft() {
    killed_in("sft", "02-sft");
}

#[test]
fn killed_in_dpo() {
    killed_in("dpo", "03-dpo");
}

#[test]
fn killed_many_times_at_any_moment() {
    let f = Folder::with(THREE_STAGES);
    for ms in (20..).step_by(35) {
        let mut child = f.start(&[]);
        std::thread::sleep(std::time::Duration::from_millis(ms));
        if child.try_wait().unwrap().is_some_and(|s| s.success()) {
            break;
        }
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_same(unbroken(), &figures(&f.path("run")));
}

#[test]
fn stages_one_by_one_equal_the_whole_and_a_finished_run_is_left_alone() {
    let f = Folder::with(THREE_STAGES);
    let early = f.fails(&["train", "recipe.toml", "--stages", "sft"], &["stage `align` is not finished"]);
    assert!(early.contains("--stages align"), "{early}");
    f.train(&["--stages", "align"]);
    assert!(!f.path("run/02-sft").exists());
    f.train(&["--stages", "dpo,sft"]);
    assert_same(unbroken(), &figures(&f.path("run")));

    let said = f.train(&[]);
    assert!(said.stderr.contains("align: done (10 steps, loss "), "{}", said.stderr);
    assert!(said.stderr.contains("nothing to do: the run is finished"), "{}", said.stderr);
    assert_same(unbroken(), &figures(&f.path("run")));
    // Only the newest checkpoints stay.
    for stage in ["01-align", "02-sft", "03-dpo"] {
        let steps: Vec<_> = fs::read_dir(f.path(&format!("run/{stage}/checkpoints"))).unwrap().collect();
        assert_eq!(steps.len(), 2, "{stage}");
    }
}

#[test]
fn what_has_changed_is_named() {
    let f = Folder::with(&THREE_STAGES.replace("${GOLDEN}/data", "data"));
    for name in ["plain.json", "sft.json", "dpo.jsonl"] {
        let text = fs::read_to_string(super::folder::golden("data").join(name)).unwrap();
        f.write(&format!("data/{name}"), &text);
    }
    f.train(&["--stages", "align"]);
    let before = figures(&f.path("run"));
    let args = ["train", "recipe.toml", "--set", "stage.sft.lr=3e-3", "--set", "stage.dpo.seed=1"];
    let e = f.fails(&args, &["stage.sft.lr: was 0.002, is 0.003", "stage.dpo.seed: was 42, is 1"]);
    assert!(e.contains("--allow-changes"), "{e}");
    let old = fs::read_to_string(f.path("data/sft.json")).unwrap();
    f.write("data/sft.json", &old.replace("A green circle.", "A red square."));
    let e = f.fails(&["train", "recipe.toml"], &["data/sft.json: was "]);
    assert!(!e.contains("plain.json"), "{e}");
    assert_same(&before, &figures(&f.path("run")));
    let said = f.train(&["--allow-changes", "--set", "stage.sft.lr=3e-3", "--set", "defaults.max_steps=3"]);
    assert!(said.stderr.contains("align: done (10 steps"), "{}", said.stderr);
    assert_eq!(f.metrics().len(), 10 + 3 + 3);
}

/// A kept reference is that of the data and of the model that the recipe names.
#[test]
fn another_reference_is_computed_again() {
    let f = Folder::with(THREE_STAGES);
    let kept = |f: &Folder| fs::read(f.path("run/03-dpo/reference.safetensors")).unwrap();
    let mut child = f.start(&[]);
    f.wait_for_step(&mut child, "dpo", 5);
    child.kill().unwrap();
    child.wait().unwrap();
    let start = kept(&f);
    let base = ["--set", "stage.dpo.objective.dpo.reference='base'"];
    let said = f.train(&[&["--allow-changes"][..], &base].concat());
    assert!(said.stderr.contains("pairs under the reference"), "{}", said.stderr);
    let whole = Folder::with(THREE_STAGES);
    whole.train(&base);
    assert!(kept(&f) != start && kept(&f) == kept(&whole));
}

#[test]
fn one_process_a_run() {
    let f = Folder::with(THREE_STAGES);
    let mut first = f.start(&[]);
    f.wait_for_step(&mut first, "align", 1);
    f.fails(&["train", "recipe.toml"], &["another process is training in run"]);
    first.kill().unwrap();
    first.wait().unwrap();
    f.train(&["--stages", "align"]);
}
