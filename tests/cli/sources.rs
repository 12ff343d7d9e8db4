//! Where a model comes from: parts of a whole folder, adapters in either format, what prepares the inputs; and that a run
//! notices when any of these files changes.

use super::folder::{Folder, assert_same, figures, golden, metrics};
use adfreeze::data::ImageProcessor;
use std::collections::BTreeMap;
use std::fs;

/// Two steps on the golden model.
const TWO_STEPS: &str = r#"
stages     = ["one"]
output_dir = "run"

[model]
source = "${GOLDEN}/model"

[stage.one]
train     = ["projector.*"]
data      = [{ path = "${GOLDEN}/data/sft.json", images = "${GOLDEN}/images" }]
batch     = { global = 8, micro = 4 }
lr        = 1e-3
max_steps = 2
"#;

fn sets<'a>(values: &[&'a str]) -> Vec<&'a str> {
    values.iter().flat_map(|v| ["--set", v]).collect()
}

/// Losses of the two steps.
#[track_caller]
fn losses(f: &Folder, values: &[&str]) -> Vec<f64> {
    fs::remove_dir_all(f.path("run")).unwrap_or_default();
    f.train(&sets(values));
    metrics(&f.path("run")).iter().map(|m| m["loss"].as_f64().unwrap()).collect()
}

fn inputs(f: &Folder) -> BTreeMap<String, String> {
    serde_json::from_slice(&fs::read(f.path("run/inputs.json")).unwrap()).unwrap()
}

/// Replaces text that must be in the file.
#[track_caller]
fn edit(f: &Folder, name: &str, from: &str, to: &str) {
    let text = fs::read_to_string(f.path(name)).unwrap();
    assert!(text.contains(from), "{name}: {text}");
    f.write(name, &text.replace(from, to));
}

#[test]
fn a_whole_model_without_a_tokenizer_takes_one_from_elsewhere() {
    let f = Folder::with(TWO_STEPS);
    f.model("whole", |_| ());
    fs::create_dir(f.path("words")).unwrap();
    for name in ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"] {
        fs::rename(f.path("whole").join(name), f.path("words").join(name)).unwrap();
    }
    let source = "model.source='whole'";
    let bare = [&["check", "recipe.toml"], &sets(&[source])[..]].concat();
    f.fails(&bare, &["there is no tokenizer whole/tokenizer.json", "model.language.tokenizer"]);
    let apart = losses(&f, &[source, "model.language.tokenizer='words'"]);
    assert!(inputs(&f).keys().any(|k| k == "words/tokenizer.json"), "{:?}", inputs(&f));
    assert_eq!(apart, losses(&f, &[]));
}

#[test]
fn a_whole_model_keeps_its_features_but_for_what_the_recipe_says() {
    let f = Folder::with(TWO_STEPS);
    let own = losses(&f, &[]);
    assert_eq!(own, losses(&f, &["model.vision.select_layer=-2"]));
    let last = losses(&f, &["model.vision.select_layer=-1"]);
    assert_ne!(own, last);
    assert_ne!(own, losses(&f, &["model.vision.select_feature='full'"]));
    // What the folder says stays where the recipe is silent, also beside what it says.
    f.model("late", |_| ());
    edit(&f, "late/config.json", r#""vision_feature_layer": -2"#, r#""vision_feature_layer": -1"#);
    assert_eq!(last, losses(&f, &["model.source='late'"]));
    assert_eq!(last, losses(&f, &["model.source='late'", "model.vision.select_feature='patch'"]));
    // Without a whole folder there is nothing to take the tower from.
    let parts = ["model={vision={select_layer=-1},projector={mlp={}},language={source='${GOLDEN}/model'}}"];
    f.fails(&[&["check", "recipe.toml"], &sets(&parts)[..]].concat(), &["vision", "neither `source` nor `init`"]);
}

#[test]
fn an_adapter_of_pytorch_trains_on() {
    let f = Folder::with(TWO_STEPS);
    let adapter = "model.adapter='${GOLDEN}/../bin/adapter'";
    let with = losses(&f, &[adapter]);
    assert_eq!(with.len(), 2);
    let read = inputs(&f);
    for name in ["adapter_config.json", "adapter_model.bin"] {
        assert!(read.keys().any(|k| k.ends_with(&format!("bin/adapter/{name}"))), "{read:?}");
    }
    assert_ne!(with, losses(&f, &[]));
}

/// How the tower's pictures are prepared stands in the newer file alone.
#[test]
fn an_exported_tower_keeps_its_picture_preparation() {
    let f = Folder::with(TWO_STEPS);
    fs::create_dir(f.path("tower")).unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(golden("vision").join(name), f.path("tower").join(name)).unwrap();
    }
    let own = r#"{"image_processor": {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56},
        "resample": 2, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.25, 0.2, 0.3]}}"#;
    f.write("tower/processor_config.json", own);
    let prepared = ImageProcessor::from_dir(&f.path("tower")).unwrap();
    assert_ne!(prepared, ImageProcessor::clip(56));
    let parts = [
        "model={vision={source='tower'},projector={mlp={}},language={source='${GOLDEN}/model'}}",
        "stage.one.train=['projector.*','vision.encoder.layers[0].*']",
    ];
    losses(&f, &parts);
    assert!(inputs(&f).contains_key("tower/processor_config.json"), "{:?}", inputs(&f));
    let exported = f.path("run/01-one/final/vision");
    assert_eq!(ImageProcessor::from_dir(&exported).unwrap(), prepared);
    assert!(exported.join("preprocessor_config.json").is_file());
    // Without either file it is guessed, and said.
    let check = [&["check", "recipe.toml"], &sets(&parts)[..]].concat();
    let warning = "warning: tower has neither preprocessor_config.json nor processor_config.json";
    assert!(!f.ok(&check).stderr.contains(warning));
    fs::remove_file(f.path("tower/processor_config.json")).unwrap();
    let said = f.ok(&check).stderr;
    assert!(said.contains(warning) && said.contains("as CLIP's, at 56 px"), "{said}");
}

#[test]
fn a_change_of_any_file_that_is_read_stops_a_run() {
    let f = Folder::with(TWO_STEPS);
    f.model("whole", |_| ());
    f.write("whole/special_tokens_map.json", "{}");
    f.write("whole/generation_config.json", "{}");
    fs::create_dir(f.path("adapter")).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(golden("lora_init").join(name), f.path("adapter").join(name)).unwrap();
    }
    fs::create_dir(f.path("held")).unwrap();
    fs::copy(golden("images/exact0.png"), f.path("held/exact0.png")).unwrap();
    let turns = r#"[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A circle."}]"#;
    f.write("held/out.json", &format!(r#"[{{"id": "a", "image": "exact0.png", "conversations": {turns}}}]"#));
    let all = [
        "model.source='whole'",
        "model.adapter='adapter'",
        "eval.held={metric='loss',data=[{path='held/out.json'}]}",
        "stage.one.eval=['held']",
    ];
    losses(&f, &all);
    let before = figures(&f.path("run"));
    let read = inputs(&f);
    let files = [
        "whole/config.json",
        "whole/model.safetensors",
        "whole/tokenizer.json",
        "whole/tokenizer_config.json",
        "whole/special_tokens_map.json",
        "whole/chat_template.jinja",
        "whole/generation_config.json",
        "whole/preprocessor_config.json",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    ];
    assert!(read.contains_key("evaluation held/out.json"), "{read:?}");
    assert_eq!(files.iter().filter(|f| !read.contains_key(**f)).collect::<Vec<_>>(), [&""; 0], "{read:?}");
    let again = [&["train", "recipe.toml"], &sets(&all)[..]].concat();
    let changes = |name: &str, what: &str, change: &dyn Fn(&mut Vec<u8>)| {
        let old = fs::read(f.path(name)).unwrap();
        let mut new = old.clone();
        change(&mut new);
        assert_ne!(old, new);
        fs::write(f.path(name), new).unwrap();
        let said = f.fails(&again, &["another recipe or other inputs", what, "--allow-changes"]);
        assert_eq!(said.matches(": was ").count(), 1, "{said}");
        fs::write(f.path(name), old).unwrap();
    };
    changes("adapter/adapter_config.json", "adapter/adapter_config.json: was ", &|text| {
        *text = String::from_utf8(text.clone()).unwrap().replace("\"lora_alpha\": 8", "\"lora_alpha\": 16").into();
    });
    for name in files.iter().filter(|n| n.ends_with("config.json") || n.ends_with("jinja")) {
        changes(name, &format!("{name}: was "), &|text| text.extend(b"\n"));
    }
    // Evaluations are free.
    let picture = fs::read(f.path("held/exact0.png")).unwrap();
    fs::write(f.path("held/exact0.png"), [&picture[..], b"\0"].concat()).unwrap();
    f.ok(&again);
    fs::write(f.path("held/exact0.png"), picture).unwrap();
    f.ok(&again);
    assert_same(&before, &figures(&f.path("run")));
}
