//! Watching a model learn: the look at pictures and captions, gradients that explode, numbers that break.

use super::folder::{Folder, THREE_STAGES, assert_same, figures};
use candle_core::Tensor;
use serde_json::Value;
use std::fs;

const CHECK: &str = "stage.align.align_check={threshold=0.9,samples=6}";

fn results(f: &Folder) -> Value {
    serde_json::from_slice(&fs::read(f.path("run/results.json")).unwrap()).unwrap()
}

#[test]
fn pictures_are_compared_with_their_captions_before_and_after() {
    let f = Folder::with(THREE_STAGES);
    let longer = ["--set", "stage.align.max_steps=60", "--set", "stage.align.lr=1e-2"];
    let said = f.train(&[&["--stages", "align", "--set", CHECK][..], &longer].concat());
    let results = results(&f);
    let check = &results["align"]["align_check"];
    let value = |k: &str| check["values"][k].as_f64().unwrap();
    assert_eq!(check["n"], 6);
    assert!((value("cosine") - value("cosine/before")).abs() > 1e-3, "{check}");
    assert!(["retrieval", "retrieval/before", "chance"].iter().all(|k| (0.0..=1.0).contains(&value(k))), "{check}");
    let row = format!("{:.4}", value("cosine"));
    for part in ["align: pictures beside their captions (6 samples)", "mean cosine", row.as_str(), "by chance"] {
        assert!(said.stderr.contains(part), "`{part}` is not in:\n{}", said.stderr);
    }
    let warning = format!("warning: stage.align: the mean cosine of visual tokens and captions is {row} (before: ");
    assert!(said.stderr.contains(&warning) && said.stderr.contains("threshold = 0.9"), "{}", said.stderr);
    // The evaluations that the recipe names stand beside it, and their table leaves it out.
    assert!(results["align"]["captions"].is_object());
    // Below the threshold there is nothing to say. Training itself is the same without the look.
    let quiet = Folder::with(THREE_STAGES);
    let args = ["--stages", "align", "--set", "stage.align.align_check={threshold=-1.0,samples=6}"];
    assert!(!quiet.train(&[&args[..], &longer].concat()).stderr.contains("warning"));
    let none = Folder::with(THREE_STAGES);
    none.train(&[&["--stages", "align"][..], &longer].concat());
    let trained = |f: &Folder| fs::read(f.path("run/01-align/final/trained.safetensors")).unwrap();
    assert!(trained(&none) == trained(&f));
}

/// In the second stage as well, whose start is the first one's end.
#[test]
fn a_resumed_run_tells_the_same() {
    let more = ["--set", CHECK, "--set", "stage.sft.align_check={samples=4}"];
    let (whole, parts) = (Folder::with(THREE_STAGES), Folder::with(THREE_STAGES));
    whole.train(&more);
    for (stage, step) in [("align", 5), ("sft", 5)] {
        let mut child = parts.start(&more);
        parts.wait_for_step(&mut child, stage, step);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    parts.train(&more);
    assert_same(&figures(&whole.path("run")), &figures(&parts.path("run")));
    let results = results(&whole);
    let of = |stage: &str, k: &str| results[stage]["align_check"]["values"][k].as_f64().unwrap();
    assert!(of("align", "cosine/before") != of("align", "cosine") && of("sft", "cosine") != of("sft", "cosine/before"));
}

#[test]
fn a_look_that_can_tell_nothing_is_refused() {
    let f = Folder::with(THREE_STAGES);
    f.write("text.json", r#"[{"id": "a", "conversations": [{"from": "human", "value": "Well?"}, {"from": "gpt", "value": "A circle."}]}]"#);
    let text = "stage.sft.data=[{path='text.json'}]";
    for (sets, parts) in [
        (
            &["stage.sft.align_check={}", "stage.sft.train=[]", "stage.sft.param_groups=[]"][..],
            ["stage.sft: align_check", "the projector does not train"],
        ),
        (
            &["stage.sft.align_check={}", text, "stage.sft.train=['language.norm.*']", "stage.sft.param_groups=[]"],
            ["align_check", "the projector does not train"],
        ),
        (&["stage.dpo.align_check={}"], ["stage.dpo: align_check", "pairs of answers"]),
        (&["stage.align.align_check={samples=1}"], ["align_check: samples = 1", "2 or more"]),
        (&["stage.align.align_check={threshold=1.5}"], ["align_check: threshold = 1.5", "from -1 to 1"]),
        (
            &[
                "stage.align.align_check={}",
                "stage.align.data[0].limit=1",
                "stage.align.batch.global=1",
                "stage.align.batch.micro=1",
            ],
            ["stage.align: align_check: 1 of this stage's samples show a picture", "drop align_check"],
        ),
        (
            &[
                "stage.align.align_check={}",
                "model.deliver='cross_attention'",
                "stage.sft.adapters=[{cross_attention={every=1,heads=2,head_dim=4}}]",
            ],
            ["align_check: visual tokens that stand beside the text", "splice"],
        ),
    ] {
        let sets: Vec<&str> = sets.iter().flat_map(|s| ["--set", s]).collect();
        for command in ["check", "train"] {
            f.fails(&[&[command, "recipe.toml"], &sets[..]].concat(), &parts);
        }
        assert!(!f.path("run/metrics.jsonl").exists());
    }
}

#[test]
fn an_explosion_is_told_once_in_a_while() {
    let f = Folder::with(THREE_STAGES);
    f.model("loud", |t| {
        let name = t.keys().find(|n| n.contains("lm_head")).unwrap().clone();
        let loud: Tensor = (&t[&name] * 1e3).unwrap();
        t.insert(name, loud);
    });
    let set = ["--stages", "align", "--set", "model.source='loud'", "--set", "stage.align.lr=1e-9"];
    let said = f.train(&set);
    let told = said.stderr.matches("the gradients' norm is").count();
    let over = f.metrics().iter().filter(|m| m["grad_norm_total"].as_f64().unwrap() > 100.0).count();
    assert!(over >= 5 && told == if over >= 10 { 2 } else { 1 }, "{over} steps, {told} times:\n{}", said.stderr);
    // The first comes before any update: the rate of its step, 0, is no advice.
    let first = said.stderr.lines().find(|l| l.contains("the gradients' norm is")).unwrap();
    for part in ["align, step 1: ", "updated nothing yet", "weights that it starts from", "lr (at most 1.0e-9)"] {
        assert!(first.contains(part), "`{part}` is not in: {first}");
    }
    let calm = Folder::with(THREE_STAGES).train(&["--stages", "align"]);
    assert!(!calm.stderr.contains("the gradients' norm is"), "{}", calm.stderr);
}

/// NaN in the middle of the model: the first tensor that holds it is named, not only where it was seen.
#[test]
fn a_planted_nan_is_named() {
    let f = Folder::with(THREE_STAGES);
    let planted = ["model.layers.1.mlp.up_proj.weight", "model.layers.2.self_attn.q_proj.weight"];
    f.model("nan", |t| {
        for part in planted {
            let name = t.keys().find(|n| n.ends_with(part)).unwrap().clone();
            let mut values = t[&name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values[7] = f32::NAN;
            t.insert(name.clone(), Tensor::from_vec(values, t[&name].dims(), t[&name].device()).unwrap());
        }
    });
    let args = ["train", "recipe.toml", "--set", "model.source='nan'"];
    let e = f.fails(&args, &["align, step 1: `language.layers.1.mlp.up_proj.weight` holds NaN", "the loss is NaN"]);
    assert!(!e.contains("layers.2"), "{e}");
    assert!(!f.path("run/01-align/done.json").exists());
}

/// The same before the first step: in the look at pictures and captions, and under the reference of preference training.
#[test]
fn a_planted_nan_is_named_before_the_first_step() {
    let f = Folder::with(THREE_STAGES);
    let plant = |name: &str, part: &str| {
        f.model(name, |t| {
            let name = t.keys().find(|n| n.ends_with(part)).unwrap().clone();
            let mut values = t[&name].flatten_all().unwrap().to_vec1::<f32>().unwrap();
            values[3] = f32::NAN;
            t.insert(name.clone(), Tensor::from_vec(values, t[&name].dims(), t[&name].device()).unwrap());
        });
    };
    plant("projector", "linear_2.weight");
    let args = ["train", "recipe.toml", "--set", "model.source='projector'", "--set", CHECK];
    let e = f.fails(&args, &["stage.align: align_check: `projector.linear_2.weight` holds NaN", "are not numbers"]);
    assert!(!e.contains("step 1"), "{e}");
    plant("language", "layers.2.self_attn.v_proj.weight");
    let (head, rest) = THREE_STAGES.split_once("[stage.align]").unwrap();
    let dpo = rest.split_once("[stage.dpo]\nfrom").unwrap().1.split_once('\n').unwrap().1;
    let head = head.replace("[\"align\", \"sft\", \"dpo\"]", "[\"dpo\"]");
    f.write("recipe.toml", &format!("{head}[stage.dpo]\ntrain = [\"projector.*\"]\n{dpo}"));
    let args = ["train", "recipe.toml", "--set", "model.source='language'"];
    let e = f.fails(
        &args,
        &[
            "stage.dpo: the log-probabilities under the reference: `language.layers.2.self_attn.v_proj.weight` holds NaN",
            "a label's log-probability is NaN",
        ],
    );
    assert!(!e.contains("step 1"), "{e}");
}

/// Weights that are numbers, but so large that what a layer makes of them is not.
#[test]
fn the_layer_that_overflows_is_named() {
    let f = Folder::with(THREE_STAGES);
    f.model("large", |t| {
        for part in ["layers.1.mlp.up_proj.weight", "layers.1.mlp.down_proj.weight"] {
            let name = t.keys().find(|n| n.ends_with(&format!("model.{part}"))).unwrap().clone();
            let large: Tensor = (&t[&name] * 1e25).unwrap();
            t.insert(name, large);
        }
    });
    let args = ["train", "recipe.toml", "--set", "model.source='large'"];
    f.fails(
        &args,
        &["align, step 1: all weights are finite, but what `language.layers.1` makes of them is not: the loss"],
    );
}

/// Rates that fall by layer and groups with schedules of their own: told as they are, and resumed to the same bits.
#[test]
fn schedules_and_rates_by_layer_are_told_and_resume() {
    let sets = [
        "stage.sft.train=['projector.*','language.layers.*']",
        "stage.sft.adapters=[]",
        "stage.sft.layer_decay=0.5",
        "stage.sft.param_groups=[{match=['projector.*'],lr=1e-3,lr_scheduler={constant={}}}]",
        "stage.dpo.train=['language.norm.*']",
        "stage.dpo.from={stage='sft'}",
    ];
    let sets: Vec<&str> = sets.iter().flat_map(|s| ["--set", s]).collect();
    let (whole, parts) = (Folder::with(THREE_STAGES), Folder::with(THREE_STAGES));
    whole.train(&sets);
    let mut child = parts.start(&sets);
    parts.wait_for_step(&mut child, "sft", 5);
    child.kill().unwrap();
    child.wait().unwrap();
    let said = parts.train(&sets);
    assert_same(&figures(&whole.path("run")), &figures(&parts.path("run")));
    let steps: Vec<Value> = whole.metrics().into_iter().filter(|m| m["stage"] == "sft").collect();
    for m in &steps {
        // Three layers: half of the peak on the last, an eighth on the first.
        let (high, low) = (m["lr"]["default"].as_f64().unwrap(), m["lr_lowest"]["default"].as_f64().unwrap());
        assert!((high / 4.0 - low).abs() < 1e-12, "{m}");
        assert_eq!(m["lr"]["projector.*"], 1e-3);
        assert!(m["lr_lowest"]["projector.*"].is_null(), "{m}");
    }
    assert_eq!((&steps[0]["lr"]["default"], &steps[2]["lr"]["default"]), (&0.0.into(), &1e-3.into()));
    assert!(said.stderr.contains("sft  step"), "{}", said.stderr);
    let table = whole.ok([&["check", "recipe.toml"][..], &sets].concat()).stdout;
    for part in ["1e-3 down to 2.5e-4, by layer", "constant", "cosine, warm-up 2 steps"] {
        assert!(table.contains(part), "`{part}` is not in:\n{table}");
    }
    for (set, part) in [
        ("stage.align.layer_decay=0.9", "no parameter in a layer takes the stage's"),
        ("stage.sft.layer_decay=1.5", "layer_decay = 1.5"),
        (
            "stage.sft.param_groups=[{match=['projector.*'],lr_scheduler={cosine={warmup_ratio=2.0}}}]",
            "param_groups[0]: lr_scheduler: warmup_ratio = 2",
        ),
        (
            "stage.sft.param_groups=[{match=['projector.*'],layer_decay=0.5}]",
            "`projector.*` has layer_decay, but no parameter in a layer",
        ),
    ] {
        Folder::with(THREE_STAGES).fails(&["check", "recipe.toml", "--set", set], &[part]);
    }
}
