//! What ends a run early, other than signals: broken pictures, files that change in mid-run, trainings that diverge.

use super::folder::{BINARY, CONSTANT, Folder, THREE_STAGES, assert_same, figures, golden, said};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name)
}

fn sample(id: &str, image: &str) -> String {
    let turns = r#"[{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A circle."}]"#;
    format!(r#"{{"id": "{id}", "image": "{image}", "conversations": {turns}}}"#)
}

/// Twenty steps of forty samples in the order of the file, of which that of step 17 shows `late.png`; no checkpoints on the way.
fn twenty_steps() -> Folder {
    let f = Folder::with(
        r#"
stages = ["align"]
output_dir = "run"
[model]
source = "${GOLDEN}/model"
[stage.align]
train = ["projector.*"]
data  = [{ path = "data.jsonl" }]
batch = { global = 40, micro = 4, group_by = "sequential" }
lr    = 1e-3
checkpoint = { every_steps = 0 }
"#,
    );
    for name in ["good.png", "late.png"] {
        fs::copy(golden("images/exact0.png"), f.path(name)).unwrap();
    }
    let image = |i: usize| if i == 16 * 40 + 7 { "late.png" } else { "good.png" };
    let lines: Vec<String> = (0..800).map(|i| sample(&format!("s{i}"), image(i))).collect();
    f.write("data.jsonl", &lines.join("\n"));
    f
}

#[test]
fn a_run_that_breaks_in_step_17_goes_on_at_17() {
    let whole = twenty_steps();
    whole.train(&[]);
    let f = twenty_steps();
    let mut child = f.start(&[]);
    f.wait_for_step(&mut child, "align", 2);
    fs::write(f.path("late.png"), "<html>404</html>").unwrap();
    let broken = said(child.wait_with_output().unwrap());
    assert_eq!(broken.code, Some(1), "{}", broken.stderr);
    for part in ["sample s647", "late.png", "16 steps are saved", "the same command goes on at step 17"] {
        assert!(broken.stderr.contains(part), "`{part}` is not in:\n{}", broken.stderr);
    }
    assert!(f.path("run/01-align/checkpoints/step-00000016").is_dir());
    // Still broken: found before anything is computed, and nothing is lost.
    f.fails(&["train", "recipe.toml"], &["sample s647", "late.png"]);
    fs::copy(golden("images/exact0.png"), f.path("late.png")).unwrap();
    let again = f.train(&[]);
    assert!(again.stderr.contains("align: goes on after step 16 of 20"), "{}", again.stderr);
    assert_same(&figures(&whole.path("run")), &figures(&f.path("run")));
}

#[test]
fn a_picture_that_was_mended_is_named_and_does_not_forbid() {
    let f = twenty_steps();
    let mut child = f.start(&[]);
    f.wait_for_step(&mut child, "align", 2);
    fs::write(f.path("late.png"), "<html>404</html>").unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    fs::copy(golden("images/exact1.png"), f.path("late.png")).unwrap();
    assert_ne!(fs::read(f.path("late.png")).unwrap().len(), fs::read(f.path("good.png")).unwrap().len());
    let again = f.train(&[]);
    assert!(again.stderr.contains("warning: pictures have changed"), "{}", again.stderr);
    assert!(again.stderr.contains("late.png"), "{}", again.stderr);
    assert!(again.stderr.contains("align: goes on after step 16 of 20"), "{}", again.stderr);
}

/// Case 02: the ninth sample of the second stage is a web page.
#[test]
fn a_broken_picture_of_any_stage_is_named_before_step_1() {
    let f = Folder::new();
    for entry in fs::read_dir(case("02-broken-picture-late")).unwrap() {
        let from = entry.unwrap().path();
        fs::create_dir_all(f.path("late")).unwrap();
        fs::copy(&from, f.path("late").join(from.file_name().unwrap())).unwrap();
    }
    std::os::unix::fs::symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"), f.path("tests")).unwrap();
    for command in ["check", "train"] {
        f.fails(&[command, "late/recipe.toml"], &["stage.sft", "late/late.png", "an HTML page"]);
    }
    assert!(!f.path("runs/late/metrics.jsonl").exists());
    fs::copy(golden("images/exact0.png"), f.path("late/late.png")).unwrap();
    f.ok(["train", "late/recipe.toml"]);
    let looked = f.ok(["check", "late/recipe.toml"]).stdout;
    assert!(looked.contains("of these decoded to see whether they are whole"), "{looked}");
}

#[test]
fn all_broken_pictures_are_named_together() {
    let f = twenty_steps();
    let ids: Vec<String> = (0..30).map(|i| format!("b{i}")).collect();
    ids.iter().for_each(|id| drop(f.write(&format!("{id}.png"), "no picture")));
    let lines: Vec<String> = ids.iter().map(|id| sample(id, &format!("{id}.png"))).collect();
    f.write("data.jsonl", &lines.join("\n"));
    f.fails(&["train", "recipe.toml", "--set", CONSTANT], &["30 problems", "sample b0:", "and 10 more"]);
    // A stage of one step shows one sample.
    let one = ["--set", "stage.align.batch={global=1}", "--set", "stage.align.max_steps=1", "--set", CONSTANT];
    let said = f.fails(&[&["train", "recipe.toml"], &one[..]].concat(), &["cannot decode the image b"]);
    assert!(!said.contains("problems"), "{said}");
}

/// What was whole is not decoded again until it changes; what the cache says does not matter where it is damaged.
#[test]
fn whole_pictures_are_remembered_by_path_size_and_time() {
    let f = twenty_steps();
    let old = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
    let age = |name: &str| fs::File::options().append(true).open(f.path(name)).unwrap().set_modified(old).unwrap();
    age("good.png");
    age("late.png");
    let check = || said(f.adfreeze(["check", "recipe.toml"]).env("HOME", f.path("home")).output().unwrap());
    assert_eq!(check().code, Some(0));
    let cache = f.path("home/.cache/adfreeze/pictures");
    assert_eq!(fs::read(&cache).unwrap().len(), 2 * 16);
    // Of the same size and time: taken to be the same.
    let whole = fs::read(f.path("late.png")).unwrap();
    fs::write(f.path("late.png"), vec![b'x'; whole.len()]).unwrap();
    age("late.png");
    assert_eq!(check().code, Some(0));
    fs::write(&cache, b"damaged").unwrap();
    assert_eq!(check().code, Some(1));
    fs::write(f.path("late.png"), &whole).unwrap();
    assert_eq!(check().code, Some(0));
}

/// Case 07: the last of twenty samples shows a file that is no picture.
#[test]
fn score_names_all_broken_pictures_before_it_computes_and_keeps_what_it_has() {
    let f = Folder::new();
    std::os::unix::fs::symlink(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests"), f.path("tests")).unwrap();
    fs::create_dir(f.path("score")).unwrap();
    for name in ["data.json", "last.png"] {
        fs::copy(case("07-score-loses-all").join(name), f.path("score").join(name)).unwrap();
    }
    let args =
        ["score", "--model", "tests/golden/a/model", "--data", "score/data.json", "--images", ".", "--micro", "1"];
    let args = [&args[..], &["--out", "scores.jsonl"]].concat();
    f.fails(&args, &["score/data.json: sample last", "last.png"]);
    assert!(!f.path("scores.jsonl").exists());
    // It breaks on the way: what was computed stays.
    let lines: Vec<String> =
        (0..500).map(|i| sample(&format!("s{i}"), if i == 490 { "late.png" } else { "good.png" })).collect();
    f.write("many.jsonl", &lines.join("\n"));
    for name in ["good.png", "late.png"] {
        fs::copy(golden("images/exact0.png"), f.path(name)).unwrap();
    }
    let args =
        ["score", "--model", "tests/golden/a/model", "--data", "many.jsonl", "--micro", "1", "--out", "many.out"];
    let child = f.adfreeze(args).stderr(Stdio::piped()).spawn().unwrap();
    while !f.path("many.out.partial").exists() {
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    fs::write(f.path("late.png"), "gone").unwrap();
    let said = said(child.wait_with_output().unwrap());
    assert_eq!(said.code, Some(1), "{}", said.stderr);
    assert!(
        said.stderr.contains("sample s490")
            && said.stderr.contains("490 of 500 samples are in many.out.partial; the same"),
        "{}",
        said.stderr
    );
    // Once the picture is mended, the same command goes on from there.
    let unfinished = fs::read_to_string(f.path("many.out.partial")).unwrap();
    assert!(unfinished.lines().count() == 490 && !f.path("many.out").exists());
    fs::copy(golden("images/exact0.png"), f.path("late.png")).unwrap();
    let again = f.ok(args).stderr;
    assert!(again.contains("many.out.partial holds 490 of 500 samples: it goes on from there"), "{again}");
    let of_model = fs::read(f.path("many.out")).unwrap();
    assert!(!f.path("many.out.partial").exists());
    // Scores of another model are not gone on with.
    fs::write(f.path("many.out.partial"), &unfinished).unwrap();
    f.model("other", |_| ());
    let weights = f.path("other/model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let end = bytes.len();
    bytes[end - 64..].fill(0);
    fs::write(&weights, bytes).unwrap();
    let other = args.map(|w| if w == "tests/golden/a/model" { "other" } else { w });
    assert!(f.ok(other).stderr.contains("many.out.partial holds scores of another model: it is begun again"));
    assert!(fs::read(f.path("many.out")).unwrap() != of_model);
}

/// A kill takes no more than the samples at hand.
#[test]
fn scores_survive_a_kill() {
    let f = Folder::new();
    fs::copy(golden("images/exact0.png"), f.path("good.png")).unwrap();
    let lines: Vec<String> = (0..300).map(|i| sample(&format!("s{i}"), "good.png")).collect();
    f.write("many.jsonl", &lines.join("\n"));
    let model = golden("model").display().to_string();
    let args =
        |out| ["score", "--model", &model, "--data", "many.jsonl", "--micro", "4", "--out", out].map(String::from);
    f.ok(args("whole"));
    for _ in 0..2 {
        let mut child = f.adfreeze(args("out")).spawn().unwrap();
        let lines = || fs::read_to_string(f.path("out.partial")).map_or(0, |t| t.lines().count());
        let before = lines();
        while lines() <= before + 40 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(lines() > before && !f.path("out").exists());
    }
    let said = f.ok(args("out")).stderr;
    assert!(said.contains("of 300 samples: it goes on from there"), "{said}");
    assert!(fs::read(f.path("out")).unwrap() == fs::read(f.path("whole")).unwrap(), "the same bits");
}

#[test]
fn a_dead_run_is_told() {
    let f = Folder::with(THREE_STAGES);
    let args = ["--stages", "align", "--set", "defaults.max_steps=20", "--set", "stage.align.lr=1e6"];
    let said = f.train(&args).stderr;
    assert!(said.contains("warning: align, step ") && said.contains("has collapsed from"), "{said}");
    assert!(said.contains("has grown from a root mean square of"), "{said}");
    let healthy = Folder::with(THREE_STAGES).train(&[]).stderr;
    assert!(
        !healthy.contains("collapsed") && !healthy.contains("has grown") && !healthy.contains("far above"),
        "{healthy}"
    );
}

/// The hint of a training that has diverged works: what it says to delete is deleted, the rate is lowered, and the run ends.
#[test]
fn the_way_back_from_numbers_that_broke() {
    let f = Folder::with(THREE_STAGES);
    let broken = f.fails(
        &["train", "recipe.toml", "--stages", "align", "--set", "stage.align.lr=1e30"],
        &["align, step ", "lower the learning rate", "--allow-changes"],
    );
    let hint = broken.split("hint: ").nth(1).unwrap();
    if let Some(delete) = hint.strip_prefix("delete ") {
        let names = delete.split(" (what they hold").next().unwrap();
        names.split(", ").for_each(|name| fs::remove_dir_all(f.path(name)).unwrap());
    }
    assert!(hint.contains("begins the stage again"), "{hint}");
    let said = f.train(&["--stages", "align", "--allow-changes"]).stderr;
    assert!(said.contains("align: 10 steps"), "{said}");
    // Sound steps come first: the newest of them is named and used.
    let f = Folder::with(THREE_STAGES);
    let mut child = f.start(&[
        "--stages",
        "align",
        "--set",
        "defaults.max_steps=400",
        "--set",
        "defaults.checkpoint.every_steps=5",
    ]);
    f.wait_for_step(&mut child, "align", 12);
    child.kill().unwrap();
    child.wait().unwrap();
    let long = [
        "--stages",
        "align",
        "--set",
        "defaults.max_steps=400",
        "--set",
        "defaults.checkpoint={every_steps=5,keep=99}",
    ];
    let wild = [&["train", "recipe.toml", "--allow-changes", "--set", "stage.align.lr=1e36"], &long[..]].concat();
    let broken = f.fails(&wild, &["goes on from run/01-align/checkpoints/step-000000"]);
    let hint = broken.split("hint: ").nth(1).unwrap();
    if let Some(delete) = hint.strip_prefix("delete ") {
        let names = delete.split(" (what they hold").next().unwrap();
        names.split(", ").for_each(|name| fs::remove_dir_all(f.path(name)).unwrap());
    }
    let step: usize = hint.split("step-").last().unwrap()[..8].parse().unwrap();
    let short = ["--stages", "align", "--allow-changes", "--set", &format!("defaults.max_steps={}", step + 5)]
        .map(String::from);
    let said = f.train(&short.iter().map(String::as_str).collect::<Vec<_>>()).stderr;
    assert!(said.contains(&format!("align: goes on after step {step} of {}", step + 5)), "{said}");
}

/// A reader that goes away does not end a command, whatever is written to it.
#[test]
fn closed_pipes_never_panic() {
    let f = Folder::with(THREE_STAGES);
    for line in [
        "ADFREEZE_LOG=debug $A train recipe.toml 2>&1 | head -1",
        "$A check recipe.toml 2>&1 | head -1",
        "ADFREEZE_LOG=debug $A --log json train recipe.toml 2>&1 >&- | head -c 10",
    ] {
        let script = format!("{line} >/dev/null; exit ${{PIPESTATUS[0]}}");
        let mut command: Command = f.command("bash");
        let status = command.args(["-c", &script]).env("A", BINARY).output().unwrap();
        assert_eq!(status.status.code(), Some(0), "{line}: {}", String::from_utf8_lossy(&status.stderr));
        let _ = fs::remove_dir_all(f.path("run"));
    }
    for closed in ["2>&-", ">&- 2>&-", "2>/dev/full"] {
        let script = format!("ADFREEZE_LOG=debug $A train recipe.toml {closed}");
        assert!(f.command("bash").args(["-c", &script]).env("A", BINARY).status().unwrap().success(), "{closed}");
        assert!(f.path("run/03-dpo/done.json").exists(), "{closed}");
        fs::remove_dir_all(f.path("run")).unwrap();
    }
}
