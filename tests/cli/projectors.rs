//! Each kind of projector through the commands: check, training of two stages, a kill on the way, generation.

use super::folder::{Folder, THREE_STAGES, assert_same, figures, golden};

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

    let g = Folder::with(THREE_STAGES);
    let mut child = g.start(&two);
    g.wait_for_step(&mut child, "sft", 1);
    child.kill().unwrap();
    child.wait().unwrap();
    g.train(&two);
    assert_same(&figures(&f.path("run")), &figures(&g.path("run")));
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

#[test]
fn a_grid_that_does_not_divide_is_told_before_training() {
    let f = Folder::with(THREE_STAGES);
    let set = set("{pixel_shuffle={factor=3}}");
    let args: Vec<&str> = ["train", "recipe.toml"].into_iter().chain(set.iter().map(String::as_str)).collect();
    f.fails(&args, &["model.projector: pixel_shuffle: factor 3 does not divide the 4 × 4 patches", "1, 2, 4"]);
}
