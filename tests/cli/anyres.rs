//! Pictures in tiles through the commands: check, training, kills on the way, scoring, generation, what is left behind.

use super::folder::{CONSTANT, Folder, THREE_STAGES, golden};
use adfreeze::checkpoint::safetensors;
use std::path::{Path, PathBuf};

/// The golden model sees 56 px. The captions are seen at once, conversations and pairs in tiles; the last stage has its own grids.
fn recipe() -> String {
    let tiled = |text: String, file: &str, more: &str| {
        let entry = format!("{file}\", images = \"${{GOLDEN}}/images\"");
        text.replace(&entry, &format!("{entry}, resize = \"anyres\"{more}"))
    };
    let text =
        THREE_STAGES.replace("train = [\"projector.*\"]", "train = [\"!projector.image_newline\", \"projector.*\"]");
    tiled(tiled(text, "sft.json", ""), "dpo.jsonl", ", grid_pinpoints = [[56, 112], [112, 56], [56, 168]]")
}

fn set(more: &[&str]) -> Vec<String> {
    let short = ["defaults.max_steps=2", "defaults.checkpoint={every_steps=1,keep=2}"];
    short.iter().chain(more).flat_map(|s| ["--set".to_string(), s.to_string()]).collect()
}

fn through(more: &[&str]) -> Folder {
    let set = set(more);
    let set: Vec<&str> = set.iter().map(String::as_str).collect();
    let f = Folder::with(&recipe());
    f.ok(["check", "recipe.toml"].iter().chain(&set));
    f.train(&set);
    for image in ["landscape.png", "exif6.jpg"] {
        let image = golden("images").join(image).display().to_string();
        f.ok(["generate", "--run", "run", "--image", &image, "--prompt", "What is it?", "--max-new-tokens", "4"]);
    }
    f.same_when_killed(&set, &["sft", "dpo"]);
    f
}

#[test]
fn tiles_in_the_text() {
    let f = through(&[]);
    let newline = |stage: &str| {
        let all = safetensors::load(&f.path(&format!("run/{stage}/final/projector.safetensors"))).unwrap();
        all["image_newline"].to_vec1::<f32>().unwrap()
    };
    let [align, sft, dpo] = ["01-align", "02-sft", "03-dpo"].map(newline);
    assert!(align != sft && sft == dpo);
    // A saved projector brings its newline along; where nothing is in tiles it is left out.
    let from = format!(
        "model.projector={{mlp={{source=\"{}\"}}}}",
        f.path("run/02-sft/final/projector.safetensors").display()
    );
    let g = Folder::with(&recipe());
    let set = set(&[&from, "stage.align.train=[\"projector.linear_1.*\"]"]);
    g.train(&["--stages", "align"].into_iter().chain(set.iter().map(String::as_str)).collect::<Vec<_>>());
    let all = safetensors::load(&g.path("run/01-align/final/projector.safetensors")).unwrap();
    assert_eq!(all["image_newline"].to_vec1::<f32>().unwrap(), sft);
    let h = Folder::with(THREE_STAGES);
    h.train(&["--stages", "align", "--set", &from, "--set", "defaults.max_steps=1", "--set", CONSTANT]);
}

#[test]
fn tiles_beside_the_text_that_grow() {
    through(&[
        "model.deliver=\"cross_attention\"",
        "stage.align.adapters=[{cross_attention={every=1,heads=2,head_dim=8}}]",
        "stage.align.image_size=28",
        "stage.dpo.image_size=56",
        "stage.sft.batch={global=4,micro=2,group_by=\"modality_length\"}",
    ]);
}

#[test]
fn tiles_of_shuffled_pixels_in_bf16() {
    let f = Folder::with(&recipe());
    let set = set(&["model.projector={pixel_shuffle={factor=2}}", "eval.captions.pictures=[\"blank\",\"shuffled\"]"]);
    let args: Vec<&str> = ["--dtype", "bf16"].into_iter().chain(set.iter().map(String::as_str)).collect();
    f.train(&args);
}

/// A LLaVA-NeXT folder with a tokenizer, perhaps with grids of its own.
fn next(f: &Folder, name: &str, grids: Option<serde_json::Value>) -> PathBuf {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/anyres/model");
    let own = f.path(name);
    std::fs::create_dir(&own).unwrap();
    let model = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path());
    for path in model.chain(["tokenizer.json", "tokenizer_config.json"].map(|n| golden("model").join(n))) {
        std::fs::copy(&path, own.join(path.file_name().unwrap())).unwrap();
    }
    for file in ["config.json", "preprocessor_config.json"] {
        if let Some(grids) = &grids {
            state_grids(&own.join(file), grids.clone());
        }
    }
    own
}

fn state_grids(file: &Path, grids: serde_json::Value) {
    let mut config: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    config["image_grid_pinpoints"] = grids;
    std::fs::write(file, config.to_string()).unwrap();
}

/// transformers cuts pictures up by the processor's grids, puts their features together by the model's, and fails where they differ.
#[test]
fn grids_that_two_files_state_otherwise() {
    use serde_json::json;
    let f = Folder::new();
    let fails = |dir: &Path, parts: &[&str]| {
        f.fails(&["generate", "--model", dir.to_str().unwrap(), "--prompt", "What?", "--max-new-tokens", "1"], parts);
    };
    let dir = next(&f, "differ", Some(json!([[12, 24], [24, 12]])));
    state_grids(&dir.join("preprocessor_config.json"), json!([[24, 12], [12, 24]]));
    let parts = [
        "preprocessor_config.json: image_grid_pinpoints is [[24,12],[12,24]], but ",
        "config.json says [[12,24],[24,12]]",
    ];
    fails(&dir, &[&parts[..], &["in the same order"]].concat());
    state_grids(&dir.join("config.json"), json!(null));
    fails(&dir, &["config.json says none, which means LLaVA-1.6's"]);
    state_grids(&dir.join("preprocessor_config.json"), json!("12x24"));
    fails(&dir, &["preprocessor_config.json: image_grid_pinpoints is \"12x24\"", "heights and widths"]);
    // processor_config.json comes first, as everywhere.
    let part = json!({ "image_processor": { "image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": [[12, 24]] } });
    std::fs::write(dir.join("processor_config.json"), part.to_string()).unwrap();
    fails(&dir, &["/processor_config.json: image_grid_pinpoints is [[12,24]], but "]);
    // A file that says nothing does not disagree.
    state_grids(&dir.join("config.json"), json!([[12, 24]]));
    std::fs::remove_file(dir.join("processor_config.json")).unwrap();
    state_grids(&dir.join("preprocessor_config.json"), json!(null));
    f.ok(["generate", "--model", dir.to_str().unwrap(), "--prompt", "What?", "--max-new-tokens", "1"]);
}

/// A model alone is scored with the grids of its folder, unless others are given; what was assumed is told.
#[test]
fn grids_of_a_model_alone() {
    let f = Folder::new();
    let [own, usual] = [Some(serde_json::json!([[12, 24], [48, 12]])), None].map(|grids| {
        let name = if grids.is_some() { "own" } else { "usual" };
        next(&f, name, grids).display().to_string()
    });
    let data = golden("data/sft.json").display().to_string();
    let images = golden("images").display().to_string();
    let score = |model: &str, more: &[&str]| {
        let args = ["score", "--model", model, "--data", &data, "--images", &images, "--out", "out.jsonl"];
        let said = f.ok(args.iter().chain(more));
        (std::fs::read_to_string(f.path("out.jsonl")).unwrap(), said.stderr)
    };
    let (by_folder, told) = score(&own, &[]);
    assert!(!told.contains("warning"), "{told}");
    assert_eq!(by_folder, score(&usual, &["--grid", "12x24,48x12"]).0);
    assert_ne!(by_folder, score(&usual, &[]).0);
    let generate = |more: &[&'static str]| {
        let start = ["generate", "--model", &own, "--prompt", "What is it?", "--max-new-tokens", "1"];
        [&start[..], more].concat()
    };
    f.fails(
        &generate(&["--grid", "12x24", "--pad"]),
        &["--grid, but pictures are not cut into tiles", "--resize anyres"],
    );
    std::fs::remove_file(Path::new(&own).join("preprocessor_config.json")).unwrap();
    for told in [f.ok(generate(&[])).stderr, score(&own, &[]).1] {
        assert!(told.contains("warning: ") && told.contains("has neither preprocessor_config.json"), "{told}");
    }
    let broken = next(&f, "broken", Some(serde_json::json!(["12x24"]))).display().to_string();
    let args = ["generate", "--model", &broken, "--prompt", "What?"];
    f.fails(&args, &["image_grid_pinpoints is [\"12x24\"]", "heights and widths"]);
}

/// A newline that began with random values and that nothing has trained is told wherever pictures are in tiles.
#[test]
fn a_newline_that_nothing_has_trained() {
    let seen_in_tiles = "eval.captions.data=[{path=\"${GOLDEN}/data/plain.json\",images=\"${GOLDEN}/images\",template=\"plain\",resize=\"anyres\"}]";
    let without = "stage.align.train=[\"!projector.image_newline\",\"projector.*\"]";
    let told = |text: &str| -> Vec<String> {
        let lines =
            text.lines().filter_map(|l| l.strip_prefix("warning: ")?.split_once(": pictures are shown in tiles"));
        lines.map(|(place, _)| place.to_string()).collect()
    };
    let f = Folder::with(THREE_STAGES);
    let set = set(&[without, &without.replace("align", "sft"), seen_in_tiles]);
    let set: Vec<&str> = set.iter().map(String::as_str).collect();
    let all = ["align", "sft", "dpo"].map(|s| format!("eval.captions after stage.{s}"));
    assert_eq!(told(&f.ok(["check", "recipe.toml"].iter().chain(&set)).stderr), all);
    assert_eq!(told(&f.train(&[&["--stages", "align"], &set[..]].concat()).stderr), all);
    let image = golden("images/exact0.png").display().to_string();
    let ask = ["generate", "--run", "run", "--image", &image, "--prompt", "What?", "--max-new-tokens", "1"];
    let tiles = |more: &[&str]| f.ok(ask.iter().chain(more)).stderr.contains("warning: pictures are shown in tiles");
    assert_eq!([tiles(&[]), tiles(&["--resize", "anyres"])], [false, true]);
    // Trained by the second stage, on tiles; then made anew.
    let g = Folder::with(&recipe());
    let check = |more: &[&str]| told(&g.ok(["check", "recipe.toml"].iter().chain(more)).stderr);
    assert!(check(&[]).is_empty());
    assert_eq!(check(&["--set", seen_in_tiles]), all[..1]);
    let anew = ["stage.dpo", "eval.preference after stage.dpo"];
    assert_eq!(check(&["--set", "stage.dpo.reset=[\"projector.image_newline\"]"]), anew);
}

#[test]
fn a_llava_next_folder() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/anyres/model");
    let source = format!("model.source=\"{}\"", dir.display());
    let tokenizer = format!("model.language={{tokenizer=\"{}\"}}", golden("model").display());
    let f = Folder::with(&recipe());
    let grids = "stage.dpo.data=[{path=\"${GOLDEN}/data/dpo.jsonl\",images=\"${GOLDEN}/images\",resize=\"anyres\"}]";
    let eval =
        "eval.preference.data=[{path=\"${GOLDEN}/data/dpo.jsonl\",images=\"${GOLDEN}/images\",resize=\"anyres\"}]";
    let set = set(&[&source, &tokenizer, grids, eval, "stage.sft.train=[\"projector.linear_1.*\"]"]);
    let said = f.train(&set.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(!said.stderr.contains("image_grid_pinpoints"), "{}", said.stderr);
    // Grids of its own are not those of data that states none, which is told.
    let other = next(&f, "other", Some(serde_json::json!([[12, 24], [48, 12]])));
    let other = format!("model.source=\"{}\"", other.display());
    let set: Vec<&str> = set.iter().map(|s| if *s == source { other.as_str() } else { s.as_str() }).collect();
    let said = f.ok(["check", "recipe.toml"].iter().chain(&set));
    assert!(said.stderr.contains("image_grid_pinpoints is [[12,24],[48,12]]"), "{}", said.stderr);
    let from = safetensors::load(&dir.join("model.safetensors")).unwrap();
    let left = safetensors::load(&f.path("run/03-dpo/final/projector.safetensors")).unwrap();
    assert_eq!(left["image_newline"].to_vec1::<f32>().unwrap(), from["image_newline"].to_vec1::<f32>().unwrap());
}

#[test]
fn what_cannot_be_is_told_before_training() {
    let f = Folder::with(&recipe());
    let fails = |more: &[&str], want: &[&str]| {
        let set = set(more);
        let args: Vec<&str> = ["train", "recipe.toml"].into_iter().chain(set.iter().map(String::as_str)).collect();
        f.fails(&args, want)
    };
    let e = fails(
        &["stage.align.train=[\"projector.*\"]"],
        &["projector.image_newline: no picture of this stage is in tiles"],
    );
    assert!(e.contains("!pattern"), "{e}");
    fails(&["model.vision={select_feature=\"full\"}"], &["do not stand as a square", "select_feature = \"patch\""]);
    fails(&["stage.dpo.image_size=84"], &["stage.dpo", "[56, 112] is no multiple of the 84 px"]);
    fails(&["stage.sft.data[0].grid_pinpoints=[[60,56]]"], &["[60, 56] is no multiple of the 56 px"]);
    fails(&["stage.align.data[0].grid_pinpoints=[[56,56]]"], &["stage.align: data[0]: grid_pinpoints without tiles"]);
    fails(&["model.max_seq_len=70"], &["more than max_seq_len = 70"]);
    let g = Folder::with(THREE_STAGES);
    g.train(&["--stages", "align", "--set", "defaults.max_steps=1", "--set", CONSTANT]);
    let image = golden("images/exact0.png").display().to_string();
    let args = ["generate", "--run", "run", "--image", &image, "--prompt", "What?", "--resize", "anyres"];
    g.fails(&args, &["no newline token"]);
}
