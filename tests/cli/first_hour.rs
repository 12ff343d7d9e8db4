//! A newcomer's first hour: what is typed wrongly is answered with what is right, and a run ends with what to do next.

use super::folder::{Folder, THREE_STAGES, golden, said};
use std::fs;

/// Short stages.
fn quick() -> Folder {
    let short = THREE_STAGES.replace("max_steps    = 10", "max_steps    = 1");
    Folder::with(&short.replace("{ cosine = { warmup_steps = 2 } }", "{ constant = {} }"))
}

#[test]
fn a_run_ends_with_a_line_that_asks_the_model() {
    let f = quick();
    let told = f.train(&[]).stderr;
    for part in ["the run is in run", "run/results.json", "run/metrics.jsonl", "run/03-dpo/final"] {
        assert!(told.contains(part), "`{part}` is not in:\n{told}");
    }
    let ask = |told: &str| {
        let line = told.lines().find(|l| l.starts_with("  ") && l.contains(" generate --run run ")).expect(told);
        let answer = said(f.command("sh").args(["-c", line]).output().unwrap());
        assert_eq!(answer.code, Some(0), "{line}\n{}", answer.stderr);
        assert!(answer.stdout.ends_with('\n') && !answer.stderr.contains("warning"), "{line}: {}", answer.stderr);
        line.to_string()
    };
    let line = ask(&told);
    assert!(line.contains("/images/") && line.contains(".png") && line.contains("--prompt "), "{line}");
    assert!(!line.contains("<image>"), "{line}");
    // A run of captions alone, whose template is the data's.
    let g = quick();
    let line = g.train(&["--stages", "align"]).stderr;
    let line = line.lines().find(|l| l.contains(" generate --run run ")).unwrap().to_string();
    assert!(line.contains("--template plain"), "{line}");
    assert_eq!(said(g.command("sh").args(["-c", &line]).output().unwrap()).code, Some(0), "{line}");
    // Of data in another template than the model's.
    let g = Folder::with(
        r#"
stages = ["align"]
output_dir = "run"
[model]
source = "${GOLDEN}/model"
template = "plain"
[stage.align]
train = ["projector.*"]
data = [{ path = "${GOLDEN}/data/sft.json", images = "${GOLDEN}/images", template = "vicuna_v1" }]
batch = { global = 2 }
max_steps = 1
lr = 1e-3
lr_scheduler = { constant = {} }
"#,
    );
    let line = g.train(&[]).stderr;
    let line = line.lines().find(|l| l.contains(" generate --run run ")).unwrap().to_string();
    assert!(line.contains("--template vicuna_v1"), "{line}");
    assert_eq!(said(g.command("sh").args(["-c", &line]).output().unwrap()).code, Some(0), "{line}");
    g.fails(&["data", "show", "recipe.toml", "--stage", "algin"], &["no stage `algin`", "did you mean `align`"]);
    // As JSON it is an event like all others.
    let json = f.train(&["--log", "json"]).stderr;
    assert!(json.lines().all(|l| serde_json::from_str::<serde_json::Value>(l).is_ok()), "{json}");
}

#[test]
fn settings_that_are_set_in_the_wrong_place() {
    let f = quick();
    let set = |set: &str, parts: &[&str]| {
        for command in ["check", "train"] {
            f.fails(&[command, "recipe.toml", "--set", set], parts);
        }
    };
    set("lr=1e-4", &["--set lr=1e-4: lr: unknown key", "`stage.align.lr` or `stage.sft.lr` or `stage.dpo.lr`"]);
    set("defaults.lr=1e-4", &["it would change nothing, for every stage sets its own `lr`", "--set stage.sft.lr=…"]);
    set("stage.align.batch=4", &["stage.align.batch: is 4", "batch = { global = 4, micro = 2 }"]);
    set("stage.align.lr=fast", &["is the text \"fast\", and must be a number"]);
    set("stage.align.data=caption.json", &["and must be a list", "data = [{ path = "]);
    set("alig.lr=1", &["alig: unknown key"]);
    set("stage.alig.lr=1", &["did you mean `align`?"]);
    set("eval.caption.metric=loss", &["eval.caption"]);
    set("stage.sft.eval=[\"caption\"]", &["there is no [eval.caption]", "did you mean `captions`?"]);
    assert!(!f.path("run").exists());
}

#[test]
fn flags_of_other_trainers() {
    let f = quick();
    let flag = |args: &[&str], parts: &[&str]| {
        let told = said(f.adfreeze(args).output().unwrap());
        assert_eq!(told.code, Some(2), "{}", told.stderr);
        for part in ["error: ", "\n\nhint: "].iter().chain(parts) {
            assert!(told.stderr.contains(part), "`{part}` is not in:\n{}", told.stderr);
        }
    };
    flag(&["train", "recipe.toml", "--lr", "1e-4"], &["`adfreeze train` has no --lr", "--set stage.sft.lr=1e-4"]);
    flag(&["check", "recipe.toml", "--num-train-epochs=3"], &["--set stage.sft.epochs=3"]);
    flag(&["train", "recipe.toml", "--per-device-train-batch-size", "4"], &["--set stage.sft.batch.global=4"]);
    flag(&["train", "recipe.toml", "--output_dir", "x"], &["--set output_dir=FOLDER"]);
    flag(&["train", "--config", "recipe.toml"], &["adfreeze train RECIPE.toml"]);
}

#[test]
fn misspelt_paths_and_names() {
    let f = quick();
    f.write("data/captions.jsonl", "{}");
    f.write("pictures/a.png", "");
    let near = |args: &[&str], right: &str| {
        let e = f.fails(args, &[]);
        assert!(e.contains(&format!("did you mean {right}?")), "{right}: {e}");
    };
    near(&["train", "recipes.toml"], "recipe.toml");
    near(&["check", "recipe"], "recipe.toml");
    near(&["train", "recipe.toml", "--stages", "alin"], "`align`");
    near(&["check", "recipe.toml", "--set", "stage.align.data=[{path='data/caption.jsonl'}]"], "data/captions.jsonl");
    near(&["check", "recipe.toml", "--set", "stage.align.data=[{path='dat/captions.json'}]"], "data/captions.jsonl");
    near(&["bench", "step", "--random-init", "--preset", "llava-1.5-7"], "`llava-1.5-7b`");
    let turns = r#"[{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "A circle."}]"#;
    f.write("c.json", &format!(r#"[{{"id": "a", "image": "a.png", "conversations": {turns}}}]"#));
    near(&["check", "recipe.toml", "--set", "stage.align.data=[{path='c.json',images='picture'}]"], "pictures/a.png");
    f.model("model", |_| ());
    near(&["check", "recipe.toml", "--set", "model.source=./modle"], "./model");
    let image = golden("images/exact0.png").display().to_string();
    near(&["generate", "--model", "./modle", "--prompt", "?", "--image", &image], "./model");
    near(&["generate", "--model", "./model", "--prompt", "?", "--image", &image.replace("exact0", "exakt0")], &image);
    f.train(&["--stages", "align"]);
    near(&["generate", "--run", "rum", "--prompt", "?"], "run");
    near(&["generate", "--run", "run", "--stage", "algin", "--prompt", "?"], "`align`");
    near(&["train", "run"], "run/recipe.toml");
}

/// `score` and `generate` have no recipe, and so no hint speaks of its keys.
#[test]
fn hints_name_arguments_that_the_command_has() {
    let f = Folder::new();
    let model = golden("model").display().to_string();
    let turns = |answer: &str| {
        format!(r#"[{{"from": "human", "value": "<image>\nWhat?"}}, {{"from": "gpt", "value": "{answer}"}}]"#)
    };
    let data = |image: &str, answer: &str| {
        f.write("data.json", &format!(r#"[{{"id": "a", "image": "{image}", "conversations": {}}}]"#, turns(answer)));
    };
    let score = |parts: &[&str]| {
        let e = f.fails(&["score", "--model", &model, "--data", "data.json", "--out", "out.jsonl"], parts);
        for key in ["model.", "data entry", "recipe"] {
            assert!(!e.split("hint: ").nth(1).unwrap().contains(key), "{key}: {e}");
        }
        assert!(!e.contains("cannot write"), "{e}");
    };
    data("gone.png", "A circle.");
    score(&["there is no image", "--images"]);
    fs::copy(golden("images/exact0.png"), f.path("a.png")).unwrap();
    data("a.png", &"long ".repeat(3000));
    score(&["max_seq_len", "shorten the sample"]);
    f.write("data.json", "[]");
    score(&["no samples", "--data"]);
    fs::remove_file(f.path("data.json")).unwrap();
    score(&["data.json", "--data"]);
}

/// Tables and help at 80 columns, longer lines only where a word is longer.
#[test]
fn nothing_wraps_at_80_columns() {
    let f = quick();
    let wide = |text: &str| -> Vec<String> {
        let long = text.lines().filter(|l| l.chars().count() > 80);
        long.filter(|l| !l.starts_with(' ') && l.split_whitespace().all(|w| w.chars().count() < 40))
            .map(str::to_string)
            .collect()
    };
    let help = [
        &["--help"][..],
        &["train", "--help"],
        &["check", "--help"],
        &["generate", "--help"],
        &["score", "-h"],
        &["bench", "step", "--help"],
    ];
    for args in help.iter().copied().chain([&["check", "recipe.toml"][..], &["train", "recipe.toml"]]) {
        let out = said(f.adfreeze(args).env("COLUMNS", "80").output().unwrap());
        assert_eq!(out.code, Some(0), "{}", out.stderr);
        for text in [&out.stdout, &out.stderr] {
            let wide = wide(text);
            assert!(wide.is_empty(), "{args:?}: {}", wide.join("\n"));
        }
    }
    for args in help {
        let out = said(f.adfreeze(args).env("COLUMNS", "80").output().unwrap());
        let wide: Vec<&str> = out.stdout.lines().filter(|l| l.chars().count() > 80).collect();
        assert!(wide.is_empty(), "{args:?}: {}", wide.join("\n"));
    }
}

#[test]
fn the_first_screen_says_what_to_do() {
    let f = Folder::new();
    let alone = said(f.adfreeze::<&str>([]).output().unwrap());
    assert_eq!(alone.code, Some(2));
    let help = f.ok(["--help"]).stdout;
    for text in [&alone.stderr, &help] {
        for part in
            ["projector", "LoRA", "DPO", "adfreeze train recipes/quickstart.toml", "adfreeze generate --run", "--set"]
        {
            assert!(text.contains(part), "`{part}` is not in:\n{text}");
        }
    }
    let train = f.ok(["train", "--help"]).stdout;
    for part in ["Ctrl-C", "checkpoint", "Examples:", "--stages align", "output_dir", "results.json"] {
        assert!(train.contains(part), "`{part}` is not in:\n{train}");
    }
}
