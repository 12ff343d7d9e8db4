//! What a finished run of `recipes/quickstart.toml` must show: the model answers from the picture, and preference training
//! makes it name absent things less often. Continuous integration runs the recipe, then this:
//!
//! ```text
//! adfreeze train recipes/quickstart.toml --stages align --dtype bf16 --set output_dir=runs/bf16
//! ADFREEZE_QUICKSTART=runs/quickstart ADFREEZE_BF16=runs/bf16 cargo test --release --test quickstart_figures -- --ignored
//! ```

use serde_json::Value;
use std::path::PathBuf;

struct Run {
    dir: PathBuf,
    results: Value,
}

impl Run {
    fn open(variable: &str) -> Self {
        let dir = std::env::var_os(variable).unwrap_or_else(|| panic!("{variable} names the run directory"));
        let dir = PathBuf::from(dir);
        let path = dir.join("results.json");
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        Self { results: serde_json::from_slice(&bytes).unwrap(), dir }
    }

    /// A held-out figure after a stage.
    fn figure(&self, stage: &str, eval: &str, name: &str) -> f64 {
        let value = &self.results[stage][eval]["values"][name];
        value.as_f64().unwrap_or_else(|| panic!("results.json has no {name} of {eval} after {stage}"))
    }
}

/// Prints a claim and fails if it does not hold.
#[track_caller]
fn above(what: &str, figure: f64, bound: f64) {
    println!("{what}: {figure:.3}, must be above {bound:.3}");
    assert!(figure > bound, "{what}: {figure} is not above {bound}");
}

#[test]
#[ignore = "looks at a finished run of recipes/quickstart.toml"]
fn the_figures_of_the_quickstart() {
    let run = Run::open("ADFREEZE_QUICKSTART");
    let seen = |name: &str| run.figure("sft", "seen", name);
    let answered = seen("exact_match");
    above("exact match after sft, against blank pictures", answered, seen("exact_match/blank") + 0.3);
    above("exact match after sft, against other pictures", answered, seen("exact_match/shuffled") + 0.3);
    above("exact match after sft, against the most frequent answers", answered, seen("chance/most_frequent") + 0.2);
    let unseen = run.figure("sft", "unseen", "exact_match");
    above("exact match after sft, combinations never seen", unseen, seen("exact_match/blank") + 0.1);
    let (before, after) =
        (run.figure("sft", "hallucination", "hallucination"), run.figure("dpo", "hallucination", "hallucination"));
    above("absent things named, share after sft against after dpo", before, after);
    above("exact match after dpo, against after sft", run.figure("dpo", "seen", "exact_match"), answered - 0.1);
}

#[test]
#[ignore = "looks at finished runs of recipes/quickstart.toml"]
fn bf16_ends_where_f32_does() {
    let loss = |variable: &str| Run::open(variable).figure("align", "captions", "loss");
    let (exact, rounded) = (loss("ADFREEZE_QUICKSTART"), loss("ADFREEZE_BF16"));
    assert!(exact != rounded, "the run that ADFREEZE_BF16 names was computed in f32");
    above("held-out loss in f32 and 2 %, against that in bf16", 1.02 * exact, rounded);
    above("held-out loss in bf16 and 2 %, against that in f32", 1.02 * rounded, exact);
}

#[test]
#[ignore = "looks at a finished run of recipes/quickstart.toml"]
fn the_run_directory_of_the_quickstart() {
    let run = Run::open("ADFREEZE_QUICKSTART");
    for file in [
        "recipe.toml",
        "inputs.json",
        "metrics.jsonl",
        "01-align/done.json",
        "01-align/final/projector.safetensors",
        "02-sft/done.json",
        "02-sft/final/adapters/sft/adapter_config.json",
        "02-sft/final/adapters/sft/adapter_model.safetensors",
        "03-dpo/done.json",
        "03-dpo/final/adapters/sft/adapter_model.safetensors",
    ] {
        assert!(run.dir.join(file).is_file(), "{} is missing", run.dir.join(file).display());
    }
}
