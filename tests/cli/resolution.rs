//! Stages whose pictures grow, through the commands: check, training, kills on the way, scoring, generation.

use super::folder::{CONSTANT, Folder, THREE_STAGES, golden};
use adfreeze::model::weights::Weights;
use serde_json::Value;

/// The golden model's tower was made for 56 px, 4 × 4 patches.
const GROWING: [&str; 4] = [
    "stage.align.image_size=28",
    "stage.sft.image_size=56",
    "stage.dpo.image_size=84",
    // The position embeddings train at the largest size.
    "stage.dpo.train=[\"vision.embeddings.*\"]",
];

fn set(more: &[&str]) -> Vec<String> {
    let short = ["defaults.max_steps=2", "defaults.checkpoint={every_steps=1,keep=2}"];
    short.iter().chain(more).flat_map(|s| ["--set".to_string(), s.to_string()]).collect()
}

#[test]
fn three_stages_of_growing_pictures() {
    let set = set(&GROWING);
    let set: Vec<&str> = set.iter().map(String::as_str).collect();
    let f = Folder::with(THREE_STAGES);
    let said = f.ok(["check", "recipe.toml"].iter().chain(&set)).stdout;
    for size in ["28 × 28 px", "56 × 56 px", "84 × 84 px"] {
        assert_eq!(said.matches(size).count(), 1, "{said}");
    }
    f.train(&set);

    f.same_when_killed(&set, &["align", "sft", "dpo"]);

    // What the last stage says of its held-out captions is what `score` says of them: it sees as that stage does.
    let (data, images) = (golden("data/plain.json").display().to_string(), golden("images").display().to_string());
    let losses = |stage: &str| {
        let fixed = ["score", "--run", "run", "--stage", stage, "--template", "plain", "--out", "out.jsonl"];
        f.ok(fixed.iter().copied().chain(["--data", &data, "--images", &images]));
        let text = std::fs::read_to_string(f.path("out.jsonl")).unwrap();
        let lines: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        let of = |l: &Value, k: &str| l[k].as_f64().unwrap();
        let n: f64 = lines.iter().map(|l| of(l, "label_tokens")).sum();
        lines.iter().map(|l| of(l, "loss") * of(l, "label_tokens")).sum::<f64>() / n
    };
    let results: Value = serde_json::from_slice(&std::fs::read(f.path("run/results.json")).unwrap()).unwrap();
    for stage in ["align", "sft", "dpo"] {
        let told = results[stage]["captions"]["values"]["loss"].as_f64().unwrap();
        assert!((told - losses(stage)).abs() < 1e-5, "{stage}: {told} {}", losses(stage));
    }
    let image = golden("images/exact0.png").display().to_string();
    f.ok(["generate", "--run", "run", "--image", &image, "--prompt", "What is it?", "--max-new-tokens", "4"]);

    // The tower that trained is a tower of its own size.
    let (config, weights) = Weights::vision(&f.path("run/03-dpo/final/vision")).unwrap();
    assert_eq!(config.image_size, 56);
    assert_eq!(weights.info("vision.embeddings.position_embedding.weight").unwrap().shape, [17, 32]);
    let tower = format!("model.vision={{source=\"{}\"}}", f.path("run/03-dpo/final/vision").display());
    let h = Folder::with(THREE_STAGES);
    h.train(&["--stages", "align", "--set", &tower, "--set", "defaults.max_steps=1", "--set", CONSTANT]);
}

/// Each stage's evaluations are seen as that stage sees them, whichever stages are left to run.
#[test]
fn grids_of_an_evaluation_need_only_fit_the_stages_that_run_it() {
    let tiled = "[eval.tiled]\nmetric = \"loss\"\ndata = [{ path = \"${GOLDEN}/data/sft.json\", \
        images = \"${GOLDEN}/images\", resize = \"anyres\", grid_pinpoints = [[56, 112], [112, 56]] }]\n";
    // A newline token is there for stages that see tiles.
    let entry = "sft.json\", images = \"${GOLDEN}/images\"";
    let text = THREE_STAGES.replace(entry, &format!("{entry}, resize = \"anyres\""));
    let text = text.replacen("train = [\"projector.*\"]", "train = [\"!projector.image_newline\", \"projector.*\"]", 1);
    let f = Folder::with(&(text + tiled));
    let sizes = ["stage.align.image_size=84", "stage.sft.image_size=56", "stage.dpo.image_size=84"];
    let set =
        set(&[&sizes[..], &["stage.sft.eval=[\"captions\",\"tiled\"]", "stage.dpo.eval=[\"captions\"]"]].concat());
    let set: Vec<&str> = set.iter().map(String::as_str).collect();
    f.ok(["check", "recipe.toml"].iter().chain(&set));
    f.train(&set);
    f.same_when_killed(&set, &["align", "sft", "dpo"]);
    let results: Value = serde_json::from_slice(&std::fs::read(f.path("run/results.json")).unwrap()).unwrap();
    assert!(results["sft"]["tiled"]["values"]["loss"].is_f64() && results["dpo"]["tiled"].is_null(), "{results}");
}

#[test]
fn a_stage_goes_on_with_the_size_of_the_one_before() {
    let set =
        set(&["stage.align.image_size=28", "stage.dpo.from={stage=\"align\"}", "stage.dpo.train=[\"projector.*\"]"]);
    let set: Vec<&str> = set.iter().map(String::as_str).chain(["--set", "stage.sft.image_size=84"]).collect();
    let f = Folder::with(THREE_STAGES);
    let said = f.ok(["check", "recipe.toml"].iter().chain(&set)).stdout;
    assert_eq!((said.matches("28 × 28 px").count(), said.matches("84 × 84 px").count()), (2, 1), "{said}");
}

#[test]
fn what_cannot_be_is_told_before_training() {
    let f = Folder::with(THREE_STAGES);
    let fails = |more: &[&str], want: &[&str]| {
        let set = set(more);
        let args: Vec<&str> = ["train", "recipe.toml"].into_iter().chain(set.iter().map(String::as_str)).collect();
        f.fails(&args, want);
        assert!(!f.path("run/01-align").exists());
    };
    fails(
        &["stage.sft.image_size=60"],
        &["stage.sft: image_size: patches of 14 px do not fill a picture of 60 px", "56, 70"],
    );
    fails(&["stage.align.image_size=10"], &["stage.align", "image_size: patches of 14 px"]);
    fails(&["stage.sft.image_size=0"], &["stage.sft: image_size = 0"]);
    let shuffle = "model.projector={pixel_shuffle={factor=2}}";
    fails(
        &[shuffle, "stage.dpo.image_size=70"],
        &["stage.dpo: image_size: pixel_shuffle: factor 2 does not divide the 5 × 5"],
    );
    fails(&["model.max_seq_len=60", "stage.sft.image_size=112"], &["stage.sft", "more than max_seq_len = 60"]);
}
