//! `adfreeze check`, as a new user reads it.

use super::folder::{Folder, THREE_STAGES, golden};

#[test]
fn prints_what_will_happen_and_writes_nothing() {
    let f = Folder::with(THREE_STAGES);
    let said = f.ok(["check", "recipe.toml"]);
    println!("{}\n{}", said.stdout, said.stderr);
    let squeezed = said.stdout.split([' ', '─']).filter(|w| !w.is_empty()).collect::<Vec<_>>().join(" ");
    for part in [
        &format!("model.source {}", golden("model").display()),
        "stage align: parameters",
        "projector.* trains 4 2,112 f32",
        "language (no pattern) frozen",
        "stage sft: optimizer groups",
        "projector.* 4 2,112 1e-3 0",
        "default 42 ",
        "stage dpo: data",
        "steps 10",
        "pictures (all there) 6",
        "preference preference 8 6",
    ] {
        assert!(squeezed.contains(part), "`{part}` is not in:\n{squeezed}");
    }
    assert!(said.stderr.contains("the recipe can run: 3 stages, 30 steps, 0 warnings"), "{}", said.stderr);
    assert!(!f.path("run").exists());
    // Nor does it touch a run that is there.
    f.train(&["--stages", "align"]);
    let before = super::folder::figures(&f.path("run"));
    f.ok(["check", "recipe.toml", "--set", "stage.align.lr=2e-3"]);
    super::folder::assert_same(&before, &super::folder::figures(&f.path("run")));
}

#[test]
fn warns_of_what_is_rarely_meant() {
    let f = Folder::with(THREE_STAGES);
    let said = f.ok([
        "check",
        "recipe.toml",
        "--set",
        "stage.align.train=['projector.*','language.*']",
        "--set",
        "defaults.lr_scheduler={constant={}}",
    ]);
    let high = "warning: stage.align: 30 pretrained tensors of group `default`, e.g. language.embed_tokens.weight, get a learning rate of 1e-3";
    assert!(said.stderr.contains(high), "{}", said.stderr);
    assert!(said.stderr.contains("warning: stage.sft: 42 new tensors"), "{}", said.stderr);
    // The projector is loaded, and DPO goes on with the adapter of SFT: nothing there is new.
    assert!(!said.stderr.contains("stage.align: 4 new") && !said.stderr.contains("stage.dpo"), "{}", said.stderr);
}

#[test]
fn names_the_problems_of_all_stages_together() {
    let f = Folder::with(THREE_STAGES);
    f.write(
        "gone.jsonl",
        r#"{"id": "s", "image": "gone.png", "conversations": [{"from": "human", "value": "<image>"}]}"#,
    );
    let gone = "[{path='gone.jsonl'}]";
    let e = f.fails(
        &[
            "check",
            "recipe.toml",
            "--set",
            "stage.align.train=['nothing']",
            "--set",
            &format!("eval.captions.data={gone}"),
        ],
        &["2 problems:", "stage.align: train: ", "`nothing`", "eval.captions: ", "gone.jsonl"],
    );
    assert!(e.matches("hint: ").count() >= 3, "{e}");
}
