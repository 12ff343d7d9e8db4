//! How stages hand over to each other and to others: continue, stack, merge, earlier stages; batches; what is written
//! loads again.

use super::folder::{Folder, THREE_STAGES, assert_same, distance, figures, golden};
use adfreeze::checkpoint::safetensors;
use serde_json::Value;
use std::fs;
use std::path::Path;

fn json(path: &Path) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// `stage`'s losses.
fn losses(f: &Folder, stage: &str) -> Vec<f64> {
    f.metrics().iter().filter(|m| m["stage"] == stage).map(|m| m["loss"].as_f64().unwrap()).collect()
}

const NO_DROPOUT: [&str; 2] = ["--set", "stage.sft.adapters[0].lora.dropout=0.0"];

/// The adapter's tensors in a stage's end, e.g. all of `lora_A.sft.`.
fn adapter(f: &Folder, stage: &str, name: &str) -> Vec<Vec<f32>> {
    let all = safetensors::load(&f.path(&format!("run/{stage}/final/trained.safetensors"))).unwrap();
    let of = |n: &&String| n.contains(&format!(".lora_A.{name}.")) || n.contains(&format!(".lora_B.{name}."));
    all.keys().filter(of).map(|n| all[n].flatten_all().unwrap().to_vec1().unwrap()).collect()
}

#[test]
fn continue_keeps_training_the_adapter_from_a_reference_that_is_itself() {
    let f = Folder::with(THREE_STAGES);
    f.train(&[&NO_DROPOUT[..], &["--set", "defaults.max_steps=4"]].concat());
    let first = losses(&f, "dpo")[0];
    assert!((first - std::f64::consts::LN_2).abs() < 1e-7, "{first}");
    let dpo = f.metrics().into_iter().find(|m| m["stage"] == "dpo").unwrap();
    for key in ["rewards/chosen", "rewards/margins", "logps/rejected"] {
        assert!(dpo[key].is_f64(), "{dpo}");
    }
    assert_eq!(dpo["rewards/accuracies"], 0.0);
    let (sft, dpo) = (adapter(&f, "02-sft", "sft"), adapter(&f, "03-dpo", "sft"));
    assert!(!sft.is_empty() && sft.len() == dpo.len() && sft != dpo);
    assert!(f.path("run/03-dpo/final/adapters/sft/adapter_model.safetensors").exists());
}

#[test]
fn a_reference_with_adapters_off_is_the_base() {
    let f = Folder::with(THREE_STAGES);
    let base = "stage.dpo.objective={dpo={reference='base'}}";
    f.train(&[&NO_DROPOUT[..], &["--set", base, "--set", "defaults.max_steps=4"]].concat());
    let first = losses(&f, "dpo")[0];
    assert!(first.is_finite() && (first - std::f64::consts::LN_2).abs() > 1e-6, "{first}");
}

#[test]
fn stack_freezes_the_first_adapter_and_trains_another_on_top() {
    let f = Folder::with(THREE_STAGES);
    let on_top = "stage.dpo.adapters=[{lora={rank=2,alpha=4,target=['language.layers.*.q_proj']}}]";
    let args =
        ["--set", "stage.dpo.from={stage='sft',adapters='stack'}", "--set", on_top, "--set", "defaults.max_steps=4"];
    let said = f.train(&[&NO_DROPOUT[..], &args].concat());
    assert!((losses(&f, "dpo")[0] - std::f64::consts::LN_2).abs() < 1e-7);
    assert_eq!(adapter(&f, "02-sft", "sft"), adapter(&f, "03-dpo", "sft"));
    let b = adapter(&f, "03-dpo", "dpo").concat();
    assert!(b.iter().any(|x| *x != 0.0));
    let rows = json(&f.path("run/03-dpo/params.json"));
    let row =
        |what: &str| rows.as_array().unwrap().iter().find(|r| r["what"] == what).unwrap_or_else(|| panic!("{rows}"));
    assert_eq!(
        (row("adapter sft")["state"].as_str(), row("adapter dpo")["state"].as_str()),
        (Some("frozen"), Some("trains"))
    );
    assert!(said.stderr.contains("adapter sft"), "{}", said.stderr);
    for name in ["sft", "dpo"] {
        assert!(f.path(&format!("run/03-dpo/final/adapters/{name}/adapter_config.json")).exists());
    }
}

#[test]
fn merge_measures_the_drift_and_ends_in_whole_weights() {
    let f = Folder::with(THREE_STAGES);
    let on_top = "stage.dpo.adapters=[{lora={rank=2,alpha=4,target=['language.layers.*.q_proj']}}]";
    let args =
        ["--set", "stage.dpo.from={stage='sft',adapters='merge'}", "--set", on_top, "--set", "defaults.max_steps=4"];
    let args = [&NO_DROPOUT[..], &args].concat();
    let said = f.train(&args);
    assert!(said.stderr.contains("dpo: adapters merged; log-probabilities moved by at most "), "{}", said.stderr);
    let drift = json(&f.path("run/03-dpo/merge.json"))["max_abs_logp_difference"].as_f64().unwrap();
    assert!(drift > 0.0 && drift < 1e-4, "{drift}");
    assert!((losses(&f, "dpo")[0] - std::f64::consts::LN_2).abs() < 1e-7);
    assert!(adapter(&f, "03-dpo", "sft").is_empty());
    // From the run directory alone, in another process, it comes out the same.
    let again = Folder::with(THREE_STAGES);
    for stage in ["align", "sft", "dpo"] {
        again.train(&[&args[..], &["--stages", stage]].concat());
    }
    assert_same(&figures(&f.path("run")), &figures(&again.path("run")));
}

#[test]
fn what_a_stage_adds_is_not_put_down_to_its_merge() {
    let f = Folder::with(THREE_STAGES);
    let mut args = vec!["--set", "defaults.max_steps=2"];
    for own in [
        "stage.dpo.from={stage='sft',adapters='merge'}",
        "stage.dpo.adapters=[{prefix={tokens=8}}]",
        "stage.dpo.reset=['projector.*']",
    ] {
        args.extend(["--set", own]);
    }
    f.train(&args);
    let drift = json(&f.path("run/03-dpo/merge.json"))["max_abs_logp_difference"].as_f64().unwrap();
    assert!(drift > 0.0 && drift < 1e-4, "{drift}");
    assert!(f.path("run/03-dpo/final/adapters/dpo/adapter_model.safetensors").exists());
}

#[test]
fn a_stage_may_start_from_an_earlier_one() {
    let f = Folder::with(THREE_STAGES);
    let own = "stage.dpo.adapters=[{lora={rank=2,alpha=4,target=['language.layers.*.q_proj']}}]";
    f.train(&["--set", "stage.dpo.from={stage='align'}", "--set", own, "--set", "defaults.max_steps=4"]);
    assert!((losses(&f, "dpo")[0] - std::f64::consts::LN_2).abs() < 1e-7);
    assert!(adapter(&f, "03-dpo", "sft").is_empty() && !adapter(&f, "03-dpo", "dpo").is_empty());
    let projector = |stage: &str| fs::read(f.path(&format!("run/{stage}/final/projector.safetensors"))).unwrap();
    assert_eq!(projector("01-align"), projector("03-dpo"));
    assert_ne!(projector("01-align"), projector("02-sft"));
}

#[test]
fn the_split_into_micro_batches_changes_nothing_and_recomputing_not_a_bit() {
    let run = |args: &[&str]| {
        let f = Folder::with(THREE_STAGES);
        f.train(&[args, &["--set", "defaults.max_steps=4"]].concat());
        f
    };
    // Dropout is keyed by micro-batch; without it the split is only a matter of rounding.
    let whole = run(&[&NO_DROPOUT[..], &["--set", "defaults.batch.micro=8"]].concat());
    let ones = run(&[&NO_DROPOUT[..], &["--set", "defaults.batch.micro=1"]].concat());
    for (a, b) in whole.metrics().iter().zip(&ones.metrics()) {
        let (x, y) = (a["loss"].as_f64().unwrap(), b["loss"].as_f64().unwrap());
        assert!((x - y).abs() < 1e-5, "{a} {b}");
    }
    for stage in ["01-align", "02-sft", "03-dpo"] {
        let file = format!("run/{stage}/final/trained.safetensors");
        let d = distance(&whole.path(&file), &ones.path(&file));
        assert!(d < 2e-4, "{stage}: {d}");
    }
    // `auto`, the default, tells what it has chosen; the run does not depend on it.
    let auto = run(&[]);
    let trained = |f: &Folder| {
        let mut all = figures(&f.path("run"));
        all.retain(|file, _| !file.ends_with("recipe.toml") && !file.ends_with("SHA256SUMS"));
        all
    };
    for activations in ["none", "minimal", "keep", "recompute"] {
        assert_same(&trained(&auto), &trained(&run(&["--set", &format!("defaults.activations='{activations}'")])));
    }
}

#[test]
fn adapters_and_projector_load_again_and_score_the_same() {
    let f = Folder::with(THREE_STAGES);
    f.train(&["--stages", "align,sft", "--set", "defaults.max_steps=4"]);
    let (data, images) = (golden("data/sft.json"), golden("images"));
    let score = |model: &[&str], out: &str| {
        let rest = ["--data", data.to_str().unwrap(), "--images", images.to_str().unwrap(), "--out", out];
        f.ok(["score"].iter().chain(model).chain(&rest));
        fs::read_to_string(f.path(out)).unwrap()
    };
    let of_run = score(&["--run", "run"], "run.jsonl");
    assert_eq!(of_run.lines().count(), 10);
    let final_ = "run/02-sft/final";
    // A second recipe starts from the files of the first, and changes next to nothing.
    let reload = format!(
        r#"
stages = ["same"]
output_dir = "again"
[model]
source = "${{GOLDEN}}/model"
adapter = "{final_}/adapters/sft"
projector = {{ mlp = {{ source = "{final_}/projector.safetensors" }} }}
[stage.same]
data = [{{ path = "${{GOLDEN}}/data/sft.json", images = "${{GOLDEN}}/images" }}]
batch = {{ global = 8 }}
lr = 1e-30
lr_scheduler = {{ constant = {{}} }}
max_steps = 1
"#
    );
    f.write("again.toml", &reload);
    // The only step has a learning rate that moves nothing.
    f.ok(["train", "again.toml"]);
    assert_eq!(score(&["--run", "again"], "again.jsonl"), of_run);
    // Without the projector it is another model.
    let base = score(
        &["--model", golden("model").to_str().unwrap(), "--adapter", &format!("{final_}/adapters/sft")],
        "b.jsonl",
    );
    assert_ne!(base, of_run);
    assert!(score(&["--run", "run", "--stage", "align"], "align.jsonl") != of_run);
}

#[test]
fn a_fully_trained_backbone_loads_as_a_source() {
    let f = Folder::with(THREE_STAGES);
    let all = "stage.align.train=['!vision.post_layernorm.*','!vision.encoder.layers[-1].*','*']";
    f.train(&["--stages", "align", "--set", all, "--set", "defaults.max_steps=4", "--set", "stage.align.lr=1e-4"]);
    let (data, images) = (golden("data/sft.json"), golden("images"));
    let score = |run: &str| {
        let rest = ["--data", data.to_str().unwrap(), "--images", images.to_str().unwrap(), "--out", "out.jsonl"];
        f.ok(["score", "--run", run].iter().chain(&rest));
        fs::read_to_string(f.path("out.jsonl")).unwrap()
    };
    let parts = r#"
stages = ["same"]
output_dir = "again"
[model]
vision    = { source = "run/01-align/final/vision" }
language  = { source = "run/01-align/final/language" }
projector = { mlp = { source = "run/01-align/final/projector.safetensors" } }
image_token = "<image>"
[stage.same]
train = ["projector.*"]
data = [{ path = "${GOLDEN}/data/sft.json", images = "${GOLDEN}/images" }]
batch = { global = 8 }
lr = 1e-30
lr_scheduler = { constant = {} }
max_steps = 1
"#;
    f.write("again.toml", parts);
    f.ok(["train", "again.toml"]);
    assert_eq!(score("again"), score("run"));
}
