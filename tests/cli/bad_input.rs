//! Bad input: what is wrong is named, a hint says what to do, the exit code is 1, and nothing that was good is lost.

use super::folder::{BINARY, Folder, THREE_STAGES, assert_same, figures, golden, said};
use candle_core::{Device, Tensor};
use std::fs;

/// The recipe with changes; `train` and `check` must both fail with all of `parts`.
#[track_caller]
fn refused(f: &Folder, sets: &[&str], parts: &[&str]) {
    let sets: Vec<&str> = sets.iter().flat_map(|s| ["--set", s]).collect();
    for command in ["check", "train"] {
        f.fails(&[&[command, "recipe.toml"], &sets[..]].concat(), parts);
        assert!(!f.path("run/metrics.jsonl").exists());
    }
}

#[test]
fn keys_and_variables() {
    let f = Folder::with(THREE_STAGES);
    refused(
        &f,
        &["stage.sft.learning_rate=1e-3"],
        &["stage.sft.learning_rate: unknown key", "did you mean `lr`? known: "],
    );
    refused(&f, &["stage.sft.adapters[0].lora.alfa=1"], &["alfa: unknown key", "did you mean `alpha`?"]);
    refused(&f, &["model.template=vicuna"], &["unknown value `vicuna`", "did you mean `vicuna_v1`?"]);
    refused(&f, &["stage.sft.epoch=1"], &["stage.sft.epoch: unknown key", "did you mean `epochs`?"]);
    refused(&f, &["stage.sft.adapters[0].lora.rnk=1"], &["stage.sft.adapters[0].lora.rnk", "did you mean `rank`?"]);
    refused(
        &f,
        &["output_dir=${NOT_SET}/run"],
        &["output_dir: the environment variable `NOT_SET` is not set", "export NOT_SET="],
    );
    f.fails(&["train", "nowhere.toml"], &["nowhere.toml: the recipe cannot be read"]);
    for file in [".", "latin.toml"] {
        fs::write(f.path("latin.toml"), b"# caf\xe9").unwrap();
        let e = f.fails(&["train", file], &[": the recipe cannot be read", "give the path of a recipe"]);
        assert!(!e.contains("extends"), "{e}");
    }
    f.write("taken", "");
    f.fails(
        &["train", "recipe.toml", "--set", "output_dir=taken/run"],
        &["cannot make the run directory taken/run", "set output_dir"],
    );
    f.fails(
        &["train", "recipe.toml", "--stages", "alin"],
        &["the recipe has no stage `alin`", "did you mean `align`? known: `align`, `sft`, `dpo`"],
    );
    f.fails(&["train", "recipe.toml", "--device", "cuda:0"], &["--device cuda:0", "--features cuda"]);
    assert!(!f.path("run").exists());
}

#[test]
fn pictures() {
    let f = Folder::with(THREE_STAGES);
    let record = |id: &str, image: &str| {
        let turns = r#"[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A circle."}]"#;
        format!(r#"{{"id": "{id}", "image": "{image}", "conversations": {turns}}}"#)
    };
    let data = "stage.align.data=[{path='data.jsonl',images='images'}]";
    fs::create_dir(f.path("images")).unwrap();
    fs::copy(golden("images/exact0.png"), f.path("images/good.png")).unwrap();
    f.write("data.jsonl", &[record("a", "good.png"), record("b", "gone.png"), record("c", "lost.png")].join("\n"));
    let both = [
        "2 problems in the data",
        "sample b: there is no image images/gone.png",
        "sample c: there is no image images/lost.png",
    ];
    refused(&f, &[data], &both);
    // Nothing has been trained: the data may still be mended.
    let whole = fs::read(golden("images/exact1.png")).unwrap();
    fs::write(f.path("images/cut.png"), &whole[..whole.len() / 2]).unwrap();
    f.write("data.jsonl", &[record("a", "good.png"), record("b", "cut.png")].join("\n"));
    f.fails(&["check", "recipe.toml", "--set", data], &["sample b", "images/cut.png"]);
    f.fails(&["train", "recipe.toml", "--set", data], &["sample b", "images/cut.png"]);
    f.write("images/cut.png", "this is text");
    f.fails(&["train", "recipe.toml", "--set", data], &["sample b", "images/cut.png"]);
    // What only the second stage evaluates is told before the first one trains.
    let g = Folder::with(&fs::read_to_string(f.path("recipe.toml")).unwrap());
    let (held, whole) = (f.path("data.jsonl").display().to_string(), f.path("images").display().to_string());
    let eval = format!("eval.preference={{metric='loss',data=[{{path='{held}',images='{whole}'}}]}}");
    let args =
        ["train", "recipe.toml", "--set", &eval, "--set", "stage.dpo.eval=[]", "--set", "stage.sft.image_size=28"];
    g.fails(&args, &["eval.preference: sample b", "images/cut.png"]);
    assert!(!g.path("run/metrics.jsonl").exists());
}

#[test]
fn samples() {
    let f = Folder::with(THREE_STAGES);
    let data = "stage.align.data=[{path='data.jsonl'}]";
    f.write("data.jsonl", r#"{"id": "mute", "conversations": [{"from": "human", "value": "Well?"}]}"#);
    refused(&f, &[data], &["data.jsonl", "sample mute", "no label token", "answer"]);
    refused(&f, &["model.max_seq_len=60"], &["sample long", "max_seq_len = 60", "raise model.max_seq_len"]);
    f.write("data.jsonl", "{\"id\": \"a\"");
    refused(&f, &[data], &["data.jsonl", "line 1"]);
    refused(&f, &["stage.align.data=[{path='none.json'}]"], &["none.json"]);
    let pairs = "stage.align.data=[{path='${GOLDEN}/data/dpo.jsonl',images='${GOLDEN}/images'}]";
    refused(&f, &[pairs], &["dpo.jsonl", "conversations"]);
}

#[test]
fn a_hallucination_rate_of_nothing() {
    let f = Folder::with(THREE_STAGES);
    let none = ["eval.captions", "no sample names anything `absent`", "phrases"];
    refused(&f, &["eval.captions.metric=hallucination"], &none);
}

#[test]
fn files_of_a_model_or_a_run_that_are_damaged() {
    let f = Folder::with(THREE_STAGES);
    f.model("bad", |_| ());
    f.write("bad/config.json", "{\"model_type\": \"llava\",");
    refused(&f, &["model.source='bad'"], &["bad/config.json", "download it again"]);

    f.train(&["--stages", "align"]);
    let go_on = &["train", "recipe.toml", "--stages", "align"];
    f.write("run/01-align/done.json", "{");
    f.fails(go_on, &["run/01-align/done.json is damaged", "delete run/01-align/done.json"]);
    fs::remove_file(f.path("run/01-align/done.json")).unwrap();
    let newest = "run/01-align/checkpoints/step-00000010";
    let path = f.path(newest).join("trained.safetensors");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() / 2]).unwrap();
    let said = f.train(&["--stages", "align"]);
    let told = format!("the checkpoint {newest} is damaged (trained.safetensors");
    assert!(
        said.stderr.contains(&told) && said.stderr.contains("align: goes on after step 8 of 10"),
        "{}",
        said.stderr
    );
}

#[test]
fn weights() {
    let f = Folder::with(THREE_STAGES);
    let file = "model.safetensors";
    let source = |name: &str| format!("model.source='{name}'");
    let dir = f.model("cut", |_| ());
    let bytes = fs::read(dir.join(file)).unwrap();
    fs::write(dir.join(file), &bytes[..bytes.len() - 1000]).unwrap();
    let found = format!("expected {} bytes, found {}", bytes.len(), bytes.len() - 1000);
    refused(&f, &[&source("cut")], &["cut/model.safetensors is damaged", &found, "again"]);
    let name = |all: &std::collections::BTreeMap<String, Tensor>, part: &str| {
        all.keys().find(|n| n.contains(part)).unwrap().clone()
    };
    f.model("shape", |t| {
        let n = name(t, "layers.1.mlp.up_proj");
        t.insert(n.clone(), t[&n].narrow(0, 0, 80).unwrap().contiguous().unwrap());
    });
    refused(
        &f,
        &[&source("shape")],
        &["language.layers.1.mlp.up_proj.weight", "[80, 32]", "[88, 32]", "shape/model.safetensors"],
    );
    f.model("less", |t| {
        t.remove(&name(t, "layers.1.mlp.up_proj"));
    });
    refused(&f, &[&source("less")], &["language.layers.1.mlp.up_proj.weight", "missing", "less"]);
    f.model("more", |t| {
        let extra = name(t, "layers.1.mlp.up_proj").replace("layers.1", "layers.7");
        t.insert(extra, Tensor::zeros((88, 32), candle_core::DType::F32, &Device::Cpu).unwrap());
    });
    refused(&f, &[&source("more")], &["layers.7.mlp.up_proj", "does not use"]);
    refused(&f, &[&source("nowhere")], &["nowhere"]);
}

#[test]
fn what_trains() {
    let f = Folder::with(THREE_STAGES);
    refused(&f, &["stage.align.train=['projektor.*']"], &["stage.align", "projektor.*", "projector."]);
    refused(&f, &["stage.sft.adapters[0].lora.target=['language.layers.*.qproj']"], &["adapters[0].lora", "qproj"]);
    let reach = "no gradient can reach";
    let norm = ["stage.align", reach, "vision.post_layernorm.weight", "`!pattern`"];
    refused(&f, &["stage.align.train=['vision.post_layernorm.*']"], &norm);
    let late = ["stage.align", reach, "vision.encoder.layers.2.", "select_layer"];
    refused(&f, &["stage.align.train=['projector.*','vision.encoder.layers[2].*']"], &late);
    let text = r#"{"id": "t", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho."}]}"#;
    f.write("text.jsonl", text);
    let blind = ["stage.align", reach, "projector.linear_1.weight", "no sample of this stage has a picture"];
    refused(&f, &["stage.align.data=[{path='text.jsonl'}]"], &blind);
}

/// Units that never fire pass no gradient on: it is zero in every step.
#[test]
fn a_parameter_without_gradient_for_an_epoch() {
    let f = Folder::with(THREE_STAGES);
    f.model("dead", |t| {
        let n = t.keys().find(|n| n.ends_with("linear_1.bias")).unwrap().clone();
        t.insert(n.clone(), t[&n].affine(0.0, -1e6).unwrap());
    });
    let json = fs::read_to_string(f.path("dead/config.json")).unwrap();
    f.write(
        "dead/config.json",
        &json.replace(r#""projector_hidden_act": "gelu""#, r#""projector_hidden_act": "relu""#),
    );
    let e = f.fails(
        &["train", "recipe.toml", "--set", "model.source='dead'", "--set", "stage.align.batch.global=2"],
        &["align, step 4", "got no gradient in a whole epoch", "projector.linear_1.weight"],
    );
    assert!(!e.contains("linear_2.bias"), "{e}");
    // A stage that is shorter than an epoch has not shown every sample.
    let short = ["model.source='dead'", "stage.align.batch.global=2", "defaults.max_steps=3", "output_dir=short"];
    let short: Vec<&str> = short.into_iter().flat_map(|s| ["--set", s]).collect();
    f.train(&[&["--stages", "align"], &short[..]].concat());
}

#[test]
fn a_loss_that_is_no_number() {
    let f = Folder::with(THREE_STAGES);
    f.model("nan", |t| {
        let n = t.keys().find(|n| n.contains("layers.1.mlp.up_proj")).unwrap().clone();
        t.insert(n.clone(), t[&n].affine(f64::NAN, 0.0).unwrap());
    });
    let e = f.fails(
        &["train", "recipe.toml", "--set", "model.source='nan'"],
        &["align, step 1", "the loss is NaN in a micro-batch with samples plain-"],
    );
    assert!(e.contains("weights hold NaN"), "{e}");
    let (data, images) = (golden("data/plain.json"), golden("images"));
    let score = ["score", "--model", "nan", "--template", "plain", "--data", data.to_str().unwrap()];
    let args = [&score[..], &["--images", images.to_str().unwrap(), "--out", "scores.jsonl"]].concat();
    f.fails(&args, &["log-probability is NaN among samples plain-"]);
    assert!(!f.path("scores.jsonl").exists());
    // It breaks later: what was saved before stays, and a lower rate goes on from there.
    f.train(&["--set", "stage.align.max_steps=6", "--stages", "align", "--set", "stage.align.lr=1e-30"]);
    fs::remove_file(f.path("run/01-align/done.json")).unwrap();
    fs::remove_dir_all(f.path("run/01-align/checkpoints/step-00000006")).unwrap();
    let wild = ["--stages", "align", "--allow-changes", "--set", "stage.align.max_steps=12"];
    let lr = ["--set", "stage.align.lr=1e38", "--set", "stage.align.max_grad_norm=0"];
    f.fails(&[&["train", "recipe.toml"], &wild[..], &lr].concat(), &["align, step ", "samples plain-"]);
    assert!(f.path("run/01-align/checkpoints/step-00000004").exists());
    assert!(f.train(&wild).stderr.contains("align: goes on after step 4 of 12"));
}

/// Nothing that looks finished is left of a stage whose last update breaks the model.
#[test]
fn a_model_that_breaks_in_the_last_step() {
    let breaks = |lr: &str, sets: &[&str], parts: &[&str]| {
        let f = Folder::with(THREE_STAGES);
        let lr = format!("stage.align.lr={lr}");
        let common =
            ["stage.align.max_steps=1", &lr, "stage.align.max_grad_norm=0", "stage.align.lr_scheduler={constant={}}"];
        let sets: Vec<&str> = common.iter().chain(sets).flat_map(|s| ["--set", s]).collect();
        f.fails(&[&["train", "recipe.toml", "--stages", "align"], &sets[..]].concat(), parts);
        for file in ["01-align/done.json", "01-align/final", "results.json"] {
            assert!(!f.path("run").join(file).exists(), "{file}");
        }
        f
    };
    // Finite weights whose products are not.
    breaks("1e19", &[], &["align, after its last step: eval.captions", "log-probability is ", "learning rate"]);
    // Weights that are not.
    let parts = ["trained parameters are NaN or infinite", "projector.linear_1.weight", "lower the learning rate"];
    let decay = "stage.align.optimizer={adamw={weight_decay=1e3}}";
    breaks("3e38", &[decay, "stage.align.eval=[]"], &[&["align, after its last step"], &parts[..]].concat());
    let f = breaks("3e38", &[decay], &[&["align, step 1"], &parts[..]].concat());
    assert!(!f.path("run/01-align/checkpoints").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_keeps_the_last_good_checkpoint() {
    let args = ["--set", "defaults.max_steps=40", "--stages", "align,sft"];
    let whole = Folder::with(THREE_STAGES);
    whole.train(&args);
    let f = Folder::with(THREE_STAGES);
    let mut child = f.start(&args);
    f.wait_for_step(&mut child, "sft", 3);
    child.kill().unwrap();
    child.wait().unwrap();
    let checkpoints = f.path("run/02-sft/checkpoints");
    let newest = |dir: &std::path::Path| {
        let mut all: Vec<_> =
            fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        all.sort();
        all.pop().unwrap()
    };
    let before = newest(&checkpoints);
    // No file may grow beyond 40 kB: the metrics fit, a checkpoint does not.
    let limited = format!("ulimit -f 40; exec {BINARY} train recipe.toml {}", args.join(" "));
    let said = said(f.command("bash").args(["-c", &limited]).output().unwrap());
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    for part in [
        "cannot write run/02-sft/checkpoints/step-000000",
        ".safetensors",
        "hint: free space on the disk",
        "checkpoints (or",
        "same command",
    ] {
        assert!(said.stderr.contains(part), "`{part}` is not in:\n{}", said.stderr);
    }
    assert_eq!(newest(&checkpoints), before);
    assert!(f.train(&args).stderr.contains("sft: goes on after step "));
    assert_same(&figures(&whole.path("run")), &figures(&f.path("run")));
}

#[test]
fn runs_that_are_none() {
    let f = Folder::with(THREE_STAGES);
    let ask = |dir: &str| ["generate", "--run", dir, "--prompt", "Hi"].map(String::from);
    let fails = |dir: &str, parts: &[&str]| f.fails(&ask(dir).each_ref().map(String::as_str), parts);
    fails("run", &["there is no run run", "output_dir"]);
    let mut child = f.start(&["--stages", "align", "--set", "defaults.max_steps=1000"]);
    f.wait_for_step(&mut child, "align", 1);
    child.kill().unwrap();
    child.wait().unwrap();
    fails("run", &["run has no finished stage", "train it first"]);
    fs::remove_dir_all(f.path("run")).unwrap();
    f.train(&["--stages", "align"]);
    f.fails(&["score", "--run", "run", "--stage", "sft", "--data", "x", "--out", "y"], &["no finished stage `sft`"]);
    f.fails(&["score", "--run", "run", "--data", "x.json", "--out", "y"], &["x.json"]);
    assert!(!f.path("y").exists());
}
