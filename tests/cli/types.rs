//! Computing in bf16, and the self-test.

use super::folder::{Folder, THREE_STAGES, assert_same, figures};
use std::fs;

#[test]
fn bf16_trains_f32_masters_and_resumes_to_the_same_bits() {
    let (whole, parts) = (Folder::with(THREE_STAGES), Folder::with(THREE_STAGES));
    whole.train(&["--dtype", "bf16"]);
    parts.train(&["--dtype", "bf16", "--stages", "align"]);
    let mut child = parts.start(&["--dtype", "bf16"]);
    parts.wait_for_step(&mut child, "sft", 3);
    child.kill().unwrap();
    child.wait().unwrap();
    parts.train(&["--dtype", "bf16"]);
    assert_same(&figures(&whole.path("run")), &figures(&parts.path("run")));
    let rows = fs::read_to_string(whole.path("run/02-sft/params.json")).unwrap();
    let rows: serde_json::Value = serde_json::from_str(&rows).unwrap();
    for row in rows.as_array().unwrap() {
        let dtype = if row["state"] == "trains" { "f32" } else { "bf16" };
        let projector = row["what"].as_str().unwrap().contains("projector");
        assert!(row["dtype"] == dtype || projector, "{row}");
    }
    // Another type is another run.
    whole.fails(&["train", "recipe.toml"], &["model.dtype", "--allow-changes"]);
    let f32 = Folder::with(THREE_STAGES);
    f32.train(&[]);
    let last = |f: &Folder| fs::read(f.path("run/03-dpo/final/trained.safetensors")).unwrap();
    assert_eq!(last(&f32).len(), last(&whole).len(), "masters are f32 as well");
    assert_ne!(last(&f32), last(&whole));
}

#[test]
fn a_backbone_trains_without_masters_and_resumes_to_the_same_bits() {
    let full =
        ["--dtype", "bf16", "--set", "stage.sft.adapters=[]", "--set", "stage.dpo.train=['projector.*','language.*']"];
    let full = [full.as_slice(), &["--set", "stage.sft.train=['projector.*','language.*']"]].concat();
    let lean = "stage.sft.optimizer={adamw={moments='8bit',stochastic_rounding=true}}";
    let lean = [full.as_slice(), &["--set", lean]].concat();
    let (masters, whole, parts) = (Folder::with(THREE_STAGES), Folder::with(THREE_STAGES), Folder::with(THREE_STAGES));
    masters.train(&full);
    whole.train(&lean);
    let mut child = parts.start(&lean);
    parts.wait_for_step(&mut child, "sft", 5);
    child.kill().unwrap();
    child.wait().unwrap();
    parts.train(&lean);
    assert_same(&figures(&whole.path("run")), &figures(&parts.path("run")));

    let rows = fs::read_to_string(whole.path("run/02-sft/params.json")).unwrap();
    let rows: serde_json::Value = serde_json::from_str(&rows).unwrap();
    for row in rows.as_array().unwrap().iter().filter(|r| r["state"] == "trains") {
        let projector = row["what"].as_str().unwrap().contains("projector");
        assert_eq!(row["dtype"], if projector { "f32" } else { "bf16" }, "{row}");
    }
    let last = |f: &Folder| fs::metadata(f.path("run/02-sft/final/trained.safetensors")).unwrap().len();
    assert!(last(&whole) * 10 < last(&masters) * 6, "{} {}", last(&whole), last(&masters));
    // With masters from a checkpoint that has none.
    let other = Folder::with(THREE_STAGES);
    let mut child =
        other.start(&[full.as_slice(), &["--set", "stage.sft.optimizer={adamw={stochastic_rounding=true}}"]].concat());
    other.wait_for_step(&mut child, "sft", 5);
    child.kill().unwrap();
    child.wait().unwrap();
    other.train(&[full.as_slice(), &["--allow-changes"]].concat());
    assert_eq!(last(&other), last(&masters));
    // The same training but for the rounding.
    let losses = |f: &Folder| -> Vec<f64> {
        let lines = fs::read_to_string(f.path("run/metrics.jsonl")).unwrap();
        let lines = lines.lines().map(|l| serde_json::from_str::<serde_json::Value>(l).unwrap());
        lines.filter(|l| l["stage"] == "sft").map(|l| l["loss"].as_f64().unwrap()).collect()
    };
    let (rounded, exact) = (losses(&whole), losses(&masters));
    assert_eq!(rounded[..2], exact[..2], "the first update has learning rate 0");
    assert!(exact[9] < 0.9 * exact[0], "{exact:?}");
    assert!((rounded[9] - exact[9]).abs() < 0.1 * (exact[0] - exact[9]), "{rounded:?} {exact:?}");
}

#[test]
fn the_selftest_passes_here() {
    let f = Folder::new();
    let said = f.ok(["selftest", "--device", "cpu"]);
    for op in ["attention", "linear", "cross_entropy"] {
        assert!(
            said.stdout.lines().any(|l| l.starts_with(op) && l.trim_end().ends_with("ok")),
            "{op}:\n{}",
            said.stdout
        );
    }
    for stage in ["align", "sft", "dpo"] {
        let rows = said.stdout.lines().filter(|l| l.starts_with(stage) && l.trim_end().ends_with("ok"));
        assert_eq!(rows.count(), 2, "{stage} in f32 and bf16:\n{}", said.stdout);
    }
    assert!(!said.stdout.contains("wrong"), "{}", said.stdout);
    let half = f.ok(["selftest", "--device", "cpu", "--only", "training"]).stdout;
    assert!(said.stdout.ends_with(&half) && half.starts_with("training\n"), "{half}");
    f.fails(&["selftest", "--device", "gpu"], &["--device gpu", "cuda:N"]);
}
