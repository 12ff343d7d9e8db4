//! Each kind of projector through the commands: check, training of two stages, a kill on the way, generation.

use super::folder::{Folder, THREE_STAGES, golden};
use adfreeze::checkpoint::safetensors;
use std::collections::BTreeMap;

/// The recipe without its last stage, two steps a stage.
fn set(projector: &str) -> [String; 6] {
    let projector = format!("model.projector={projector}");
    let steps = "defaults.max_steps=2".to_string();
    let checkpoint = "defaults.checkpoint={every_steps=1,keep=2}".to_string();
    let set = || "--set".to_string();
    [set(), projector, set(), steps, set(), checkpoint]
}

fn through(projector: &str) {
    let f = Folder::with(THREE_STAGES);
    let set = set(projector);
    let set: Vec<&str> = set.iter().map(String::as_str).collect();
    let two: Vec<&str> = ["--stages", "align,sft"].iter().chain(&set).copied().collect();
    f.ok(["check", "recipe.toml"].iter().chain(&set));
    f.train(&two);
    let image = golden("images/exact0.png").display().to_string();
    f.ok(["generate", "--run", "run", "--image", &image, "--prompt", "What is it?", "--max-new-tokens", "4"]);

    f.same_when_killed(&two, &["sft"]);
}

#[test]
fn linear_with_norm() {
    through("{linear={input_norm=true}}");
}

#[test]
fn mlp_with_norm() {
    through("{mlp={hidden=24,norm=true}}");
}

#[test]
fn bottleneck() {
    through("{bottleneck={dim=8,dropout=0.1}}");
}

#[test]
fn pixel_shuffle() {
    through("{pixel_shuffle={factor=2,then={mlp={}}}}");
}

const PERCEIVER: &str = "{perceiver={queries=3,depth=2,heads=4,kv_heads=2,head_dim=4}}";
const QFORMER: &str = "{qformer={queries=3,width=12,layers=3,heads=2,intermediate=20,dropout=0.1}}";

#[test]
fn perceiver() {
    through(PERCEIVER);
}

#[test]
fn qformer() {
    through(QFORMER);
}

#[test]
fn resamplers_in_bf16() {
    for projector in [PERCEIVER, QFORMER] {
        let f = Folder::with(THREE_STAGES);
        let set = set(projector);
        let args = ["--dtype", "bf16", "--stages", "align"].into_iter().chain(set.iter().map(String::as_str));
        f.train(&args.collect::<Vec<_>>());
    }
}

/// Flamingo: a perceiver, and inserts that look at what it makes.
#[test]
fn a_perceiver_beside_the_text() {
    let f = Folder::with(THREE_STAGES);
    let mut set = set(PERCEIVER).to_vec();
    let eyes = "stage.align.adapters=[{cross_attention={every=1,heads=2,head_dim=8}}]";
    for more in ["model.deliver=\"cross_attention\"", eyes] {
        set.extend(["--set".to_string(), more.to_string()]);
    }
    let set: Vec<&str> = set.iter().map(String::as_str).collect();
    f.train(&["--stages", "align,sft"].iter().chain(&set).copied().collect::<Vec<_>>());
    let saved = |what: &str| safetensors::load(&f.path("run/02-sft/final").join(what)).unwrap();
    assert!(saved("projector.safetensors").keys().any(|n| n.ends_with("perceiver_resampler.latents")));
    let eyes = saved("adapters/align/adapter.safetensors");
    let gate = eyes.iter().find(|(n, _)| n.ends_with("attn_gate")).unwrap().1;
    assert_ne!(gate.to_vec1::<f32>().unwrap(), [0.0], "the insert has learned nothing");
}

/// A `Blip2QFormerModel` of transformers alone: the recipe has to say that what stands around it is fresh.
#[test]
fn a_qformer_saved_alone() {
    let f = Folder::with(THREE_STAGES);
    let run = |projector: &str| -> Vec<String> {
        let more = ["train", "recipe.toml", "--stages", "align"].map(String::from);
        more.into_iter().chain(set(projector)).collect()
    };
    f.ok(run(QFORMER));
    let saved = safetensors::load(&f.path("run/01-align/final/projector.safetensors")).unwrap();
    let alone = saved.iter().filter_map(|(n, t)| Some((n.split_once(".qformer.")?.1.to_string(), t.clone())));
    std::fs::create_dir(f.path("alone")).unwrap();
    safetensors::save(&f.path("alone/model.safetensors"), &alone.collect(), &BTreeMap::new()).unwrap();

    let other = ["--set", "output_dir=other"].map(String::from);
    let from = |fresh: &str| {
        let source = QFORMER.replace("{queries", &format!("{{source=\"alone\",{fresh}queries"));
        [run(&source), other.to_vec()].concat()
    };
    let all = from("");
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    f.fails(
        &all,
        &["model.projector: alone has no `query_tokens`", "fresh = [\"query_tokens\", \"language_projection\"]"],
    );
    f.write("alone/config.json", "{\"model_type\": \"blip_2_qformer\", \"num_attention_heads\": 3}");
    f.fails(&all, &["model.projector: heads = 2, but the config.json beside the weights says 3"]);
    f.write("alone/config.json", "{\"model_type\": \"blip_2_qformer\", \"num_attention_heads\": 2}");
    let said = f.ok(from("fresh=[\"query_tokens\",\"language_projection\"],"));
    for part in ["query_tokens", "language_projection"] {
        let told = format!("model.projector: `{part}` begins with random values, not with those of alone");
        assert!(said.stderr.contains(&told), "{}", said.stderr);
    }
}

#[test]
fn a_grid_that_does_not_divide_is_told_before_training() {
    let f = Folder::with(THREE_STAGES);
    let set = set("{pixel_shuffle={factor=3}}");
    let args: Vec<&str> = ["train", "recipe.toml"].into_iter().chain(set.iter().map(String::as_str)).collect();
    f.fails(&args, &["model.projector: pixel_shuffle: factor 3 does not divide the 4 × 4 patches", "1, 2, 4"]);
}
