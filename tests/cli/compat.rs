//! A promise: recipes and runs of earlier versions check, go on, generate and score (`tests/compat/make.py`).

use super::folder::{Folder, golden};
use serde_json::Value;
use std::fs;
use std::path::Path;

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let (from, to) = (entry.as_ref().unwrap().path(), to.join(entry.unwrap().file_name()));
        if from.is_dir() { copy(&from, &to) } else { _ = fs::copy(&from, &to).unwrap() }
    }
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[test]
fn a_run_of_an_earlier_version_goes_on() {
    let old = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compat/0.1-1d32fef");
    let f = Folder::new();
    copy(&old, &f.path("."));
    for part in ["model", "data", "images"] {
        copy(&golden(part), &f.path(&format!("a/{part}")));
    }
    f.ok(["check", "recipe.toml"]);
    let said = f.ok(["train", "recipe.toml"]).stderr;
    assert!(said.contains("sft: goes on after step 6 of 10"), "{said}");
    // As that version went on without a stop. Another processor may round otherwise.
    let (now, then) = (lines(&f.path("run/metrics.jsonl")), lines(&old.join("whole.jsonl")));
    assert_eq!((now.len(), then.len()), (30, 30));
    for (now, then) in now.iter().zip(&then) {
        for key in ["stage", "step", "lr"] {
            assert_eq!(now[key], then[key]);
        }
        let off = (now["loss"].as_f64().unwrap() - then["loss"].as_f64().unwrap()).abs();
        assert!(off < 1e-3, "{now}\n{then}");
    }
    let image = f.path("a/images/exact0.png").display().to_string();
    f.ok(["generate", "--run", "run", "--image", &image, "--prompt", "What?", "--max-new-tokens", "4"]);
    f.ok(["score", "--run", "run", "--data", "a/data/sft.json", "--images", "a/images", "--out", "scores.jsonl"]);
    assert_eq!(lines(&f.path("scores.jsonl")).len(), 10);
}
