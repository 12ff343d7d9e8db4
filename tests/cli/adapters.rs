//! Each kind of adapter through the commands: check, training of all stages, a kill on the way, generation, hand-over.

use super::folder::{Folder, THREE_STAGES, assert_same, figures, golden};
use adfreeze::checkpoint::safetensors;

const LORA: &str = "{lora={name=\"low\",rank=2,alpha=4,target=[\"language.layers.*_proj\"]}}";
const BOTTLENECK: &str = "{bottleneck={dim=4,norm=true,dropout=0.1,target=[\"language.layers.*.{self_attn,mlp}\",\"vision.encoder.layers[0].mlp\"]}}";
const FLAMINGO: &str = "{cross_attention={every=1,heads=2,head_dim=8}}";
const PREFIX: &str = "{prefix={name=\"soft\",tokens=3}}";

fn set(adapters: &str, more: &[&str]) -> Vec<String> {
    let adapters = format!("stage.sft.adapters=[{adapters}]");
    let fixed = [adapters.as_str(), "defaults.max_steps=2", "defaults.checkpoint={every_steps=1,keep=2}"];
    fixed.iter().chain(more).flat_map(|s| ["--set".to_string(), s.to_string()]).collect()
}

/// Trains with and without a kill in each of the last two stages; returns the folder of the run.
fn through(adapters: &str, more: &[&str]) -> Folder {
    let set = set(adapters, more);
    let set: Vec<&str> = set.iter().map(String::as_str).collect();
    let f = Folder::with(THREE_STAGES);
    f.ok(["check", "recipe.toml"].iter().chain(&set));
    f.train(&set);
    let image = golden("images/exact0.png").display().to_string();
    f.ok(["generate", "--run", "run", "--image", &image, "--prompt", "What is it?", "--max-new-tokens", "4"]);

    let g = Folder::with(THREE_STAGES);
    for stage in ["sft", "dpo"] {
        let mut child = g.start(&set);
        g.wait_for_step(&mut child, stage, 1);
        child.kill().unwrap();
        child.wait().unwrap();
    }
    g.train(&set);
    assert_same(&figures(&f.path("run")), &figures(&g.path("run")));
    f
}

#[test]
fn several_adapters_in_one_stage() {
    let f = through(&[BOTTLENECK, LORA, PREFIX].join(","), &[]);
    let at = |name: &str| f.path("run/03-dpo/final/adapters").join(name);
    assert!(at("low/adapter_model.safetensors").exists());
    let bottleneck = safetensors::load(&at("sft/adapter.safetensors")).unwrap();
    assert!(bottleneck.keys().all(|n| n.contains(".bottleneck.sft.")) && !bottleneck.is_empty());
    let words = std::fs::read_to_string(at("sft/adapter.json")).unwrap();
    assert!(words.contains("\"dim\": 4"), "{words}");
    let prompt = safetensors::load(&at("soft/adapter_model.safetensors")).unwrap();
    assert_eq!(prompt["prompt_embeddings"].dims()[0], 3);
    // The stage before had none of them, the next one trains them on.
    let [sft, dpo] = ["02-sft", "03-dpo"].map(|s| f.path("run").join(s).join("final/adapters/sft/adapter.safetensors"));
    assert_ne!(std::fs::read(sft).unwrap(), std::fs::read(dpo).unwrap());
}

#[test]
fn flamingo() {
    let beside = ["model.deliver=\"cross_attention\"", "stage.align.max_steps=1"];
    let align = format!("stage.align.adapters=[{}]", FLAMINGO.replace("every", "name=\"eyes\",every"));
    let mut more = beside.to_vec();
    more.push(&align);

    through(LORA, &more);
}

#[test]
fn a_post_norm_form_that_sees_all_pictures() {
    let align = "stage.align.adapters=[{cross_attention={every=2,heads=2,head_dim=8,form=\"post_norm\",sees=\"all\"}}]";
    through(LORA, &["model.deliver=\"cross_attention\"", align]);
}

#[test]
fn in_bf16() {
    let f = Folder::with(THREE_STAGES);
    let align = format!("stage.align.adapters=[{}]", FLAMINGO.replace("every", "name=\"eyes\",every"));
    let set = set(&[BOTTLENECK, LORA, PREFIX].join(","), &["model.deliver=\"cross_attention\"", &align]);
    let args: Vec<&str> = ["--dtype", "bf16"].into_iter().chain(set.iter().map(String::as_str)).collect();
    f.train(&args);
}

#[test]
fn what_cannot_be_is_told_before_training() {
    let f = Folder::with(THREE_STAGES);
    let fails = |adapters: &str, more: &[&str], want: &[&str]| {
        let set = set(adapters, more);
        let args: Vec<&str> = ["train", "recipe.toml"].into_iter().chain(set.iter().map(String::as_str)).collect();
        f.fails(&args, want);
    };
    fails(FLAMINGO, &[], &["adapters[0].cross_attention: the visual tokens stand in the text", "model.deliver"]);
    let merge = "stage.dpo.from={stage=\"sft\",adapters=\"merge\"}";
    let projector = "stage.dpo.train=[\"projector.*\"]";
    fails(BOTTLENECK, &[merge, projector], &["the adapter `sft` is a bottleneck and cannot be merged", "\"stack\""]);
    fails(LORA, &["model.deliver=\"cross_attention\""], &["no cross_attention adapter reads the visual tokens"]);
    fails("{bottleneck={dim=0,target=[\"*\"]}}", &[], &["adapters[0].bottleneck: dim = 0"]);
    fails("{bottleneck={dim=2,target=[\"language.layers.*.mpl\"]}}", &[], &["language.layers.*.mpl"]);
    fails("{prefix={tokens=0}}", &[], &["adapters[0].prefix: tokens = 0"]);
}
