//! Every finished recipe through `check`, as it stands: its models are tiny stand-ins in a Hugging Face cache, or in the folder
//! that WEIGHTS names, its data the golden samples under the names that it gives.

use super::folder::{Folder, golden, said};
use adfreeze::checkpoint::hf;
use adfreeze::data::ImageProcessor;
use adfreeze::model::backbone::{Config, LanguageConfig, VisionConfig};
use adfreeze::model::init::{Fresh, Place};
use adfreeze::model::language::Language;
use adfreeze::model::params::Module;
use adfreeze::model::vision::Tower;
use adfreeze::ops::random::Key;
use adfreeze::recipe;
use adfreeze::spec::{Objective, Recipe, SelectFeature, Template};
use std::fs;
use std::path::{Path, PathBuf};

/// The golden tokenizer's image token, behind all of its vocabulary.
const IMAGE: u32 = 380;

fn fresh() -> Fresh {
    Fresh { key: Key::new(1, "stand-in"), place: Place::cpu() }
}

/// A tower of 12 layers with the picture and patch sizes of the model that it stands in for.
fn tower(dir: &Path, px: usize) {
    let config = serde_json::json!({ "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 12,
        "num_attention_heads": 2, "image_size": px, "patch_size": 14 });
    let config = VisionConfig::from_init(&config).unwrap();
    let tower = Tower::new(config.clone(), -2, SelectFeature::Patch, &mut fresh()).unwrap();
    hf::save_vision(dir, &config, &ImageProcessor::clip(px), &tower.params()).unwrap();
}

/// A language model of 8 layers. With the golden tokenizer, or, as Vicuna, without any, and with rows only for what a tokenizer
/// has beside its image token.
fn language(dir: &Path, bare: bool) {
    let config = serde_json::json!({ "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8,
        "num_attention_heads": 4, "vocab_size": if bare { IMAGE } else { 384 }, "max_position_embeddings": 8192, "bos_token_id": 1, "eos_token_id": 2 });
    let config = LanguageConfig::from_init(&config).unwrap();
    let model = Language::new(config.clone(), &mut fresh()).unwrap();
    let beside = golden("language");
    let beside: &[&Path] = if bare { &[] } else { &[&beside] };
    hf::save_language(dir, &config, &model.params(), beside).unwrap();
}

/// The golden tokenizer, its image token the last one.
fn tokenizer(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json"] {
        fs::copy(golden("language").join(name), dir.join(name)).unwrap();
    }
}

/// Where a source has to lie to be found: in the cache, or in the folder that it names.
fn place(f: &Folder, source: &str) -> PathBuf {
    if Path::new(source).is_absolute() {
        return PathBuf::from(source);
    }
    const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";
    let repository = f.path(&format!("hf/hub/models--{}", source.replace('/', "--")));
    fs::create_dir_all(repository.join("refs")).unwrap();
    fs::write(repository.join("refs/main"), COMMIT).unwrap();
    repository.join("snapshots").join(COMMIT)
}

/// Writes everything that the recipe reads.
fn stand_in(f: &Folder, recipe: &Recipe) {
    if let Some(source) = recipe.model.vision.as_ref().and_then(|v| v.source.as_ref()) {
        let px = if source.ends_with("-336") {
            336
        } else if source.ends_with("/clip") {
            112
        } else {
            224
        };
        tower(&place(f, source), px);
    }
    if let Some(part) = &recipe.model.language {
        part.source.iter().for_each(|source| language(&place(f, source), part.tokenizer.is_some()));
        part.tokenizer.iter().for_each(|source| tokenizer(&place(f, source)));
    }
    let stages = recipe.stage.values().flat_map(|s| s.data.iter().map(|d| (d, s.objective != Objective::Sft)));
    let evals = recipe.eval.values().flat_map(|e| e.data.iter().map(|d| (d, false)));
    for (data, pairs) in stages.chain(evals).filter(|(d, _)| !d.path.exists()) {
        let pairs = pairs || data.path.extension().is_some_and(|e| e == "jsonl");
        let plain = data.template == Some(Template::Plain);
        let file = if pairs {
            "dpo.jsonl"
        } else if plain {
            "plain.json"
        } else {
            "sft.json"
        };
        fs::create_dir_all(data.path.parent().unwrap()).unwrap();
        fs::copy(golden("data").join(file), &data.path).unwrap();
        let pictures = data.images.clone().unwrap_or_else(|| data.path.parent().unwrap().to_path_buf());
        fs::create_dir_all(&pictures).unwrap();
        for picture in fs::read_dir(golden("images")).unwrap() {
            let from = picture.unwrap().path();
            fs::copy(&from, pictures.join(from.file_name().unwrap())).unwrap();
        }
    }
}

#[test]
fn every_recipe_can_run_on_stand_ins() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
    let files = fs::read_dir(&root).unwrap().map(|e| e.unwrap().path());
    let mut files: Vec<PathBuf> = files.filter(|p| p.extension().is_some_and(|e| e == "toml")).collect();
    files.sort();
    // Those of the quickstart are run as a whole by tests of their own.
    files.retain(|p| !p.file_name().unwrap().to_str().unwrap().starts_with("quickstart"));
    assert!(files.len() >= 5, "{files:?}");
    for file in files {
        let f = Folder::new();
        let variable = |name: &str| Some(f.path(name).display().to_string());
        let recipe = recipe::load_with(&file, &[], &variable).unwrap();
        stand_in(&f, &recipe);
        // The stand-ins' few samples would be fewer steps than a warm-up.
        let steps: Vec<String> = recipe.stages.iter().map(|name| format!("--set=stage.{name}.max_steps=100")).collect();
        let mut check = f.adfreeze([Path::new("check"), &file]);
        check.args(steps);
        for name in ["DATA", "WEIGHTS"] {
            check.env(name, f.path(name));
        }
        let said = said(check.output().unwrap());
        assert_eq!(said.code, Some(0), "{}: {}", file.display(), said.stderr);
        assert!(
            said.stderr.contains(&format!("the recipe can run: {} stages", recipe.stages.len())),
            "{}",
            said.stderr
        );
    }
}
