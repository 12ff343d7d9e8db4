//! Schedules, pairs and figures that would silently be others than the user thinks.

use super::folder::{Folder, Said, THREE_STAGES, said};
use serde_json::Value;
use std::fs;

/// Runs `command` on the recipe of a case in `tests/cases`, whose paths begin at the project's root, with `sets`; the run goes to
/// `run` in `f`.
fn case(f: &Folder, command: &str, case: &str, sets: &[&str]) -> Said {
    let output = format!("output_dir={}", f.path("run").display());
    let recipe = format!("tests/cases/{case}/recipe.toml");
    let sets = [output.as_str()].into_iter().chain(sets.iter().copied()).flat_map(|s| ["--set", s]);
    let mut c = f.adfreeze([command, recipe.as_str()].into_iter().chain(sets));
    said(c.current_dir(env!("CARGO_MANIFEST_DIR")).output().unwrap())
}

/// `check` and `train` must both say all of `parts`; `code` is how they end.
#[track_caller]
fn both_say(name: &str, sets: &[&str], code: i32, parts: &[&str]) {
    for command in ["check", "train"] {
        let said = case(&Folder::new(), command, name, sets);
        assert_eq!(said.code, Some(code), "{command}: {}", said.stderr);
        parts.iter().for_each(|p| assert!(said.stderr.contains(p), "{command}: `{p}` is not in:\n{}", said.stderr));
    }
}

/// A figure of the run in `f`.
fn figure(f: &Folder, stage: &str, eval: &str, name: &str) -> Option<f64> {
    let results: Value = serde_json::from_slice(&fs::read(f.path("run/results.json")).unwrap()).unwrap();
    results[stage][eval]["values"][name].as_f64()
}

#[test]
fn a_hallucination_is_looked_for_to_the_end_of_an_answer() {
    let f = Folder::new();
    let short = "eval.short={metric='hallucination',data=[{path='${RECIPE_DIR}/data.json'}],max_new_tokens=48}";
    let evals = "stage.sft.eval=['answers','invented','short']";
    let said = case(&f, "train", "09-hallucination-long-answer", &[short, evals]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert_eq!(figure(&f, "sft", "answers", "exact_match"), Some(1.0));
    assert_eq!(figure(&f, "sft", "invented", "hallucination"), Some(1.0));
    assert_eq!(figure(&f, "sft", "invented", "hallucination/cut"), None);
    // The thing that is absent comes behind the 48th token.
    assert_eq!(figure(&f, "sft", "short", "hallucination"), Some(0.0));
    assert_eq!(figure(&f, "sft", "short", "hallucination/cut"), Some(1.0));
    let warning = "eval.short: 1 of 1 answers had not ended after max_new_tokens = 48";
    assert!(said.stderr.contains(warning) && !said.stderr.contains("eval.invented: 1 of"), "{}", said.stderr);
}

#[test]
fn limits_and_pictures_of_evaluations_are_checked() {
    let f = Folder::with(THREE_STAGES);
    let refused = |sets: &[&str], parts: &[&str]| {
        for command in ["check", "train"] {
            let sets = sets.iter().flat_map(|s| ["--set", s]);
            f.fails(&[command, "recipe.toml"].into_iter().chain(sets).collect::<Vec<_>>(), parts);
        }
    };
    refused(&["eval.captions.max_new_tokens=0"], &["eval.captions: max_new_tokens = 0", "at least 1"]);
    let question = r#""conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A circle."}]"#;
    f.write("text.jsonl", &format!("{{\"id\": \"a\", {question}}}\n"));
    let sets = ["eval.captions.data=[{path='text.jsonl'}]", "eval.captions.pictures=['blank']"];
    refused(&sets, &["eval.captions: ", "no sample shows one"]);
    let seen = question.replace("What?", "<image>\\nWhat?");
    let two = format!("{{\"id\": \"a\", \"image\": \"gray.png\", {seen}}}\n").repeat(2);
    f.write("one.jsonl", &two.replacen("\"a\"", "\"b\"", 1));
    let data = "eval.captions.data=[{path='one.jsonl',images='${GOLDEN}/images'}]";
    refused(&[data, "eval.captions.pictures=['shuffled']"], &["eval.captions: ", "needs two pictures", "gray.png"]);
}

#[test]
fn samples_that_name_nothing_absent_are_no_part_of_the_rate() {
    let f = Folder::new();
    let asked = fs::read_to_string("tests/cases/09-hallucination-long-answer/data.json").unwrap();
    let silent = asked.replace("\"long\"", "\"other\"").replace(", \"absent\": [\"cat\"]", "");
    assert!(!silent.contains("absent"));
    let (head, tail) = (asked.trim_end().trim_end_matches(']'), silent.trim_start().trim_start_matches('['));
    let path = f.write("two.json", &format!("{head}, {tail}"));
    let data = format!("eval.invented.data=[{{path='{}'}}]", path.display());
    let said = case(&f, "train", "09-hallucination-long-answer", &[&data, "stage.sft.eval=['invented']"]);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert_eq!(figure(&f, "sft", "invented", "hallucination"), Some(1.0));
}

#[test]
fn pairs_of_the_same_tokens_are_named() {
    let same = "2 of 3 pairs have two answers of the same tokens";
    let causes = ["same (the texts are equal", "cut (cut at max_seq_len = 160 before they differ)"];
    both_say("11-pairs-of-the-same-tokens", &[], 0, &[&["stage.dpo: ", same], &causes[..]].concat());
    let cut = "stage.dpo.data=[{path='${RECIPE_DIR}/cut.jsonl',images='tests/golden/a/images'}]";
    let all =
        ["in all 1 pairs the chosen and the rejected answer are the same tokens", "cut (cut at max_seq_len = 160"];
    both_say(
        "11-pairs-of-the-same-tokens",
        &[cut, "stage.dpo.batch.global=1"],
        1,
        &[&all[..], &["hint: raise"]].concat(),
    );
}

#[test]
fn a_pair_of_the_same_tokens_counts_half() {
    let f = Folder::new();
    let eval =
        "eval.pairs={metric='preference',data=[{path='${RECIPE_DIR}/pairs.jsonl',images='tests/golden/a/images'}]}";
    let good =
        eval.replacen("eval.pairs", "eval.good", 1).replace("tests/golden/a/images'", "tests/golden/a/images',limit=1");
    let sets = [eval, &good, "stage.dpo.eval=['pairs','good']", "stage.dpo.max_steps=2"];
    let said = case(&f, "train", "11-pairs-of-the-same-tokens", &sets);
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(said.stderr.contains("eval.pairs: 2 of 3 pairs have two answers of the same tokens, which count half"));
    let [pairs, good] = ["pairs", "good"].map(|e| figure(&f, "dpo", e, "preference").unwrap());
    assert_eq!(pairs, (good + 1.0) / 3.0);
}

#[test]
fn a_stage_without_a_rate_above_0_is_refused() {
    let why =
        "no step has a learning rate above 0: group `default` warms up for 1 steps, from 0 on, and the stage has 1";
    both_say("12-warm-up-as-long-as-the-stage", &[], 1, &["stage.sft: ", why, "hint: ", "warmup_steps = 0"]);
    both_say("12-warm-up-as-long-as-the-stage", &["stage.sft.lr_scheduler={cosine={warmup_steps=0}}"], 0, &[]);
    // A group's own schedule as well.
    let own = "stage.sft.param_groups=[{match=['*bias'],lr_scheduler={linear={warmup_ratio=1.0}}}]";
    let sets = ["stage.sft.lr_scheduler={constant={}}", own];
    both_say("12-warm-up-as-long-as-the-stage", &sets, 1, &["no step has a learning rate above 0: group `*bias`"]);
}

#[test]
fn a_warm_up_that_is_not_shorter_than_its_stage_is_told() {
    let six = "stage.sft.max_steps=6";
    for (scheduler, steps, rate) in [
        ("{cosine={warmup_steps=100}}", "100", "5.0e-5"),
        ("{linear={warmup_ratio=1.0}}", "6", "8.3e-4"),
        ("{constant={warmup_steps=6}}", "6", "8.3e-4"),
    ] {
        let scheduler = format!("stage.sft.lr_scheduler={scheduler}");
        let parts = [
            format!("stage.sft: group `default` warms up for {steps} steps, no fewer than the stage has (6)"),
            format!("rises to {rate} of 1e-3 in the last step"),
        ];
        both_say("12-warm-up-as-long-as-the-stage", &[six, &scheduler], 0, &parts.each_ref().map(String::as_str));
    }
    let said = case(&Folder::new(), "train", "12-warm-up-as-long-as-the-stage", &[six]);
    assert!(said.code == Some(0) && !said.stderr.contains("warms up"), "{}", said.stderr);
}

#[test]
fn rates_that_move_nothing_are_told() {
    let sets = |decay: &'static str| ["stage.sft.train=['language.*']", "stage.sft.max_steps=6", decay];
    both_say(
        "12-warm-up-as-long-as-the-stage",
        &sets("stage.sft.layer_decay=1e-20"),
        1,
        &[
            "group `default` has a learning rate of 1.0e-83 at most",
            "which f32 cannot hold",
            "a layer_decay closer to 1",
        ],
    );
    both_say(
        "12-warm-up-as-long-as-the-stage",
        &sets("stage.sft.layer_decay=1e-4"),
        0,
        &["group `default` has learning rates down to 1.0e-1", " by layer_decay", "stay as they are"],
    );
    both_say(
        "12-warm-up-as-long-as-the-stage",
        &["stage.sft.max_steps=6", "stage.sft.lr=1e-50"],
        1,
        &["f32 cannot hold"],
    );
    let decay = "stage.sft.optimizer={adamw={weight_decay=2000.0}}";
    both_say(
        "12-warm-up-as-long-as-the-stage",
        &["stage.sft.max_steps=6", decay],
        0,
        &["group `default` has a weight decay times learning rate of 2"],
    );
}
