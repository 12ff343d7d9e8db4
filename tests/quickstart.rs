//! The embedded default: the committed backbones load, and a short run of the recipe goes through all stages.

use adfreeze::pipeline::{self, Options, check};
use adfreeze::recipe;
use adfreeze::report::{LogFormat, Reporter};
use adfreeze::spec::Recipe;
use serde_json::Value;
use std::path::{Path, PathBuf};

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The recipe with everything that it reads or writes below `dir`, and few pictures and steps.
fn small(dir: &Path) -> Recipe {
    let text = std::fs::read_to_string(repository("recipes/quickstart.toml")).unwrap();
    let here = format!("\"{}", dir.display());
    let text = text
        .replace("\"runs/quickstart", &here)
        .replace("\"${RECIPE_DIR}", &format!("\"{}", repository("recipes").display()));
    let path = dir.join("small.toml");
    std::fs::write(&path, text).unwrap();
    let sets = ["synth.shapes.n=64", "stage.align.max_steps=2", "stage.sft.max_steps=2", "stage.dpo.max_steps=2"];
    recipe::load(&path, &sets.map(String::from)).unwrap()
}

#[test]
fn the_backbones_are_small_and_complete() {
    let mut bytes = 0;
    for file in [
        "vision/config.json",
        "vision/model.safetensors",
        "vision/preprocessor_config.json",
        "language/config.json",
        "language/model.safetensors",
        "language/tokenizer.json",
        "language/tokenizer_config.json",
    ] {
        let path = repository("recipes/quickstart").join(file);
        bytes += path.metadata().unwrap_or_else(|e| panic!("{}: {e}", path.display())).len();
    }
    assert!(bytes <= 4_000_000, "{bytes} bytes");
}

#[test]
fn a_short_run_goes_through_all_stages_and_gives_every_figure() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = small(dir.path());
    let reporter = Reporter::new(LogFormat::Json);
    let mut said = Vec::new();
    check::check(&recipe, check::Aim::default(), &reporter, &mut said).unwrap();
    let said = String::from_utf8(said).unwrap();
    assert!(recipe.stages.iter().all(|s| said.contains(&format!("stage {s}: parameters"))), "{said}");

    pipeline::train(&recipe, &Options::default(), &reporter).unwrap();
    let text = std::fs::read_to_string(recipe.output_dir.join("results.json")).unwrap();
    let results: Value = serde_json::from_str(&text).unwrap();
    let figure = |stage: &str, eval: &str, name: &str| {
        let value = results[stage][eval]["values"][name].as_f64();
        value.unwrap_or_else(|| panic!("results.json lacks {stage}, {eval}, {name}: {text}"))
    };
    let captions = figure("align", "captions", "loss");
    assert!(captions > 0.0 && captions < 5.0, "{captions}");
    for stage in ["align", "sft", "dpo"] {
        for name in
            ["exact_match", "exact_match/blank", "exact_match/shuffled", "chance/uniform", "chance/most_frequent"]
        {
            assert!((0.0..=1.0).contains(&figure(stage, "seen", name)));
        }
        assert!((0.0..=1.0).contains(&figure(stage, "unseen", "exact_match")));
    }
    for stage in ["sft", "dpo"] {
        assert!((0.0..=1.0).contains(&figure(stage, "hallucination", "hallucination")));
        assert!((0.0..=1.0).contains(&figure(stage, "preference", "preference")));
    }
    // The same command again has nothing left to do and changes nothing.
    pipeline::train(&recipe, &Options::default(), &reporter).unwrap();
    assert_eq!(std::fs::read_to_string(recipe.output_dir.join("results.json")).unwrap(), text);
}

#[test]
fn the_recipe_of_the_backbones_is_valid() {
    recipe::load(&repository("recipes/quickstart-backbones.toml"), &[]).unwrap();
}
