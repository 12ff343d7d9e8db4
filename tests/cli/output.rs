//! What the commands write: answers, scores, data, log lines, metrics.

use super::folder::{CONSTANT, Folder, THREE_STAGES, golden};
use serde_json::Value;
use std::fs;

fn model() -> [String; 2] {
    ["--model".into(), golden("model").display().to_string()]
}

#[test]
fn answers_greedily_or_by_a_seed() {
    let f = Folder::new();
    let image = golden("images/exact0.png").display().to_string();
    let ask = |more: &[&str]| {
        let fixed = ["generate", "--image", &image, "--prompt", "What is it?", "--max-new-tokens", "12"];
        let model = model();
        let all = fixed.iter().copied().chain(model.iter().map(String::as_str)).chain(more.iter().copied());
        f.ok(all).stdout
    };
    let greedy = ask(&[]);
    assert!(greedy.ends_with('\n') && greedy.trim().len() > 1, "{greedy}");
    assert_eq!(greedy, ask(&["--seed", "7"]));
    let warm = |seed: &str| ask(&["--temperature", "1.5", "--top-p", "0.95", "--seed", seed]);
    assert_eq!(warm("1"), warm("1"));
    assert_ne!(warm("1"), warm("2"));
    let m = model();
    f.fails(&["generate", &m[0], &m[1], "--prompt", "<image> <image>?", "--image", &image], &["2 <image> mark(s)"]);
    f.fails(&["generate", &m[0], &m[1], "--prompt", "?", "--image", "no.png"], &["no.png"]);
    f.fails(&["generate", &m[0], &m[1], "--prompt", "?", "--temperature=-1"], &["--temperature -1"]);
    f.fails(&["generate", &m[0], &m[1], "--prompt", "?", "--temperature", "nan"], &["--temperature NaN"]);
}

#[test]
fn scores_agree_with_the_reference() {
    let f = Folder::new();
    let (data, images) = (golden("data/sft.json"), golden("images"));
    let m = model();
    let args = ["--data", data.to_str().unwrap(), "--images", images.to_str().unwrap(), "--out", "out.jsonl"];
    f.ok(["score", &m[0], &m[1]].iter().chain(&args));
    let lines: Vec<Value> =
        fs::read_to_string(f.path("out.jsonl")).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let ids: Vec<&str> = lines.iter().map(|l| l["id"].as_str().unwrap()).collect();
    assert_eq!((ids[0], ids[9], ids.len()), ("first", "long", 10));
    for l in &lines {
        let keys: Vec<&String> = l.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["id", "loss", "label_tokens", "logps"]);
        let logps: Vec<f64> = l["logps"].as_array().unwrap().iter().map(|x| x.as_f64().unwrap()).collect();
        assert_eq!(l["label_tokens"].as_u64().unwrap() as usize, logps.len());
        let mean = -logps.iter().sum::<f64>() / logps.len() as f64;
        assert!((l["loss"].as_f64().unwrap() - mean).abs() < 1e-12);
    }
    let reference: Value = serde_json::from_slice(&fs::read(golden("golden.json")).unwrap()).unwrap();
    let batch = &reference["forward_batch"];
    let of_batch = || lines.iter().filter(|l| batch["samples"].as_array().unwrap().contains(&l["id"]));
    let sum = |key: &str| of_batch().map(|l| l[key].as_f64().unwrap()).sum::<f64>();
    let total: f64 = of_batch().map(|l| l["loss"].as_f64().unwrap() * l["label_tokens"].as_f64().unwrap()).sum();
    assert_eq!(sum("label_tokens"), batch["targets"].as_f64().unwrap());
    let loss = total / sum("label_tokens");
    assert!((loss - batch["loss"].as_f64().unwrap()).abs() < 1e-5, "{loss}");
    // The split changes nothing that matters.
    f.ok(["score", &m[0], &m[1], "--micro", "1"].iter().chain(&args));
    for (l, line) in lines.iter().zip(fs::read_to_string(f.path("out.jsonl")).unwrap().lines()) {
        let again: Value = serde_json::from_str(line).unwrap();
        assert!((l["loss"].as_f64().unwrap() - again["loss"].as_f64().unwrap()).abs() < 1e-5);
    }
}

/// Pictures whose preparation matters: one is not square, one has an alpha channel.
#[test]
fn a_run_is_asked_with_the_pictures_prepared_as_in_its_stage() {
    let f = Folder::with(THREE_STAGES);
    let one = |image: &str| {
        let turns = r#"[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A red circle."}]"#;
        format!(r#"{{"id": "{image}", "image": "{image}", "conversations": {turns}}}"#)
    };
    f.write("data.jsonl", &[one("landscape.png"), one("rgba.png")].join("\n"));
    let data = "stage.align.data=[{path='data.jsonl',images='${GOLDEN}/images',resize='pad',alpha='white'}]";
    f.train(&[
        "--stages",
        "align",
        "--set",
        data,
        "--set",
        "defaults.max_steps=1",
        "--set",
        CONSTANT,
        "--set",
        "defaults.batch.global=2",
    ]);
    let images = golden("images").display().to_string();
    let score = |more: &[&str]| {
        let fixed = ["score", "--run", "run", "--data", "data.jsonl", "--images", &images, "--out", "out.jsonl"];
        f.ok(fixed.iter().chain(more));
        let text = fs::read_to_string(f.path("out.jsonl")).unwrap();
        let loss = |l: &str| serde_json::from_str::<Value>(l).unwrap()["loss"].as_f64().unwrap();
        text.lines().map(loss).collect::<Vec<_>>()
    };
    let own = score(&[]);
    for same in [&["--resize", "pad"][..], &["--pad"], &["--alpha", "white"], &["--pad", "--alpha", "white"]] {
        assert_eq!(own, score(same), "{same:?}");
    }
    let (cropped, dropped) = (score(&["--resize", "crop"]), score(&["--alpha", "drop"]));
    assert!(own[0] != cropped[0] && own[0] == dropped[0] && own[1] != dropped[1], "{own:?} {cropped:?} {dropped:?}");
    let ask = |more: &[&str]| {
        let image = golden("images/landscape.png").display().to_string();
        let fixed = ["generate", "--run", "run", "--prompt", "What?", "--image", &image, "--max-new-tokens", "60"];
        f.ok(fixed.iter().chain(&["--temperature", "2"]).chain(more)).stdout
    };
    assert!(
        ask(&[]) == ask(&["--resize", "pad"]) && ask(&[]) == ask(&["--pad"]) && ask(&[]) != ask(&["--resize", "crop"])
    );
    let both = f.adfreeze(["generate", "--run", "run", "--prompt", "?", "--pad", "--resize", "crop"]).output().unwrap();
    assert_eq!(both.status.code(), Some(2));
}

#[cfg(target_os = "linux")]
#[test]
fn scores_go_through_a_pipe_and_behind_what_a_log_holds() {
    let f = Folder::new();
    let (data, images) = (golden("data/plain.json"), golden("images"));
    let m = model();
    let args = |out: &str| {
        let fixed = ["score", &m[0], &m[1], "--template", "plain", "--data", data.to_str().unwrap()];
        let rest = ["--images", images.to_str().unwrap(), "--out", out];
        fixed.iter().chain(&rest).map(|s| s.to_string()).collect::<Vec<_>>()
    };
    f.ok(args("out.jsonl"));
    let lines = fs::read_to_string(f.path("out.jsonl")).unwrap();
    // As /dev/stdout, in a folder where a mistake harms nothing.
    std::os::unix::fs::symlink("/proc/self/fd/1", f.path("stdout")).unwrap();
    assert_eq!(f.ok(args("stdout")).stdout, lines);
    f.write("log", "begun\n");
    let log = fs::File::options().append(true).open(f.path("log")).unwrap();
    assert!(f.adfreeze(args("stdout")).stdout(log).status().unwrap().success());
    assert_eq!(fs::read_to_string(f.path("log")).unwrap(), format!("begun\n{lines}"));
    std::os::unix::fs::symlink("/dev/null", f.path("null")).unwrap();
    f.ok(args("null"));
    assert!(f.path("null").is_symlink() && f.path("stdout").is_symlink());
}

#[test]
fn makes_the_built_in_data() {
    let f = Folder::new();
    for (out, seed) in [("a", "1"), ("b", "1"), ("c", "2")] {
        f.ok(["synth", "shapes", "--out", out, "--n", "40", "--seed", seed]);
    }
    let read = |d: &str| fs::read(f.path(d).join("captions_train.json")).unwrap();
    assert!(read("a") == read("b") && read("a") != read("c"));
    let captions: Value = serde_json::from_slice(&read("a")).unwrap();
    let image = captions[0]["image"].as_str().unwrap();
    assert!(f.path("a").join(image).exists() || f.path("a/images").join(image).exists(), "{image}");
}

#[test]
fn log_lines_and_metrics_are_json() {
    let f = Folder::with(THREE_STAGES);
    let said = f.train(&["--log", "json", "--set", "defaults.max_steps=3"]);
    let events: Vec<Value> = said.stderr.lines().map(|l| serde_json::from_str(l).expect(l)).collect();
    let count = |name: &str| events.iter().filter(|e| e["event"] == name).count();
    assert_eq!((count("stage_start"), count("step"), count("stage_end")), (3, 9, 3), "{}", said.stderr);
    assert!(count("table") >= 6 && count("info") >= 1 && said.stdout.is_empty());
    let metrics = f.metrics();
    assert_eq!(metrics.len(), 9);
    let common = ["stage", "step", "loss", "lr", "grad_norm", "grad_norm_total", "label_tokens"];
    let timing = ["tokens_per_s", "samples_per_s", "peak_memory_bytes"];
    let trl = [
        "rewards/chosen",
        "rewards/rejected",
        "rewards/margins",
        "rewards/accuracies",
        "logps/chosen",
        "logps/rejected",
    ];
    for m in &metrics {
        let keys: Vec<&str> = m.as_object().unwrap().keys().map(String::as_str).collect();
        let dpo = if m["stage"] == "dpo" { &trl[..] } else { &[] };
        assert_eq!(keys, [&common, dpo, &timing].concat());
        assert!(
            m["loss"].is_f64()
                && m["grad_norm_total"].as_f64().unwrap() > 0.0
                && m["tokens_per_s"].as_f64().unwrap() > 0.0
        );
    }
    let sft = &metrics[4];
    // Warm-up over two steps; the projector has its own group.
    assert_eq!((&sft["lr"]["default"], &sft["lr"]["projector.*"]), (&1e-3.into(), &5e-4.into()));
    let errors = f.adfreeze(["--log", "json", "train", "recipe.toml", "--stages", "x"]).output().unwrap();
    let last = String::from_utf8(errors.stderr).unwrap();
    let error: Value = serde_json::from_str(last.lines().last().unwrap()).expect(&last);
    assert_eq!(error["event"], "error");
    assert!(error["message"].as_str().unwrap().contains("no stage `x`") && error["hint"].is_string(), "{last}");
}
