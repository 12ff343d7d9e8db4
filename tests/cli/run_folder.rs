//! What a run's folder holds: nobody else's files are touched, damage is noticed, changes are named.

use super::folder::{Folder, THREE_STAGES, assert_same, figures, golden, said};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Every file below a folder with its bytes.
fn tree(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut out = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => out.extend(tree(&path)),
            false => _ = out.insert(path.clone(), fs::read(&path).unwrap()),
        }
    }
    out
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let to = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => copy(&path, &to),
            false => _ = fs::copy(&path, &to).unwrap(),
        }
    }
}

/// A case's inputs, whose paths are relative to the project.
fn case(f: &Folder, name: &str) -> (PathBuf, PathBuf) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    copy(&root.join("tests/cases").join(name), &f.path("mine"));
    (root.to_path_buf(), f.path("mine"))
}

/// Turns one bit in the middle of a file.
fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let at = bytes.len() / 2;
    bytes[at] ^= 4;
    fs::write(path, bytes).unwrap();
}

/// A run that was killed after some step.
fn killed(stage: &str, step: usize) -> Folder {
    let attempt = |_| {
        let f = Folder::with(THREE_STAGES);
        let mut child = f.start(&[]);
        f.wait_for_step(&mut child, stage, step);
        child.kill().unwrap();
        child.wait().unwrap();
        let done = ["run/01-align", "run/02-sft", "run/03-dpo"].map(|d| f.path(d).join("done.json").exists());
        let finished = done.iter().filter(|d| **d).count();
        (finished == ["align", "sft", "dpo"].iter().position(|s| *s == stage).unwrap()).then_some(f)
    };
    (0..20).find_map(attempt).expect("always killed too late")
}

fn newest(f: &Folder, stage: &str) -> PathBuf {
    let all = fs::read_dir(f.path("run").join(stage).join("checkpoints")).unwrap();
    let mut all: Vec<PathBuf> = all.map(|e| e.unwrap().path()).filter(|p| p.extension().is_none()).collect();
    all.sort();
    all.pop().unwrap()
}

const GO_ON: [&str; 2] = ["train", "recipe.toml"];

#[test]
fn files_of_others_stand_in_the_way_and_stay() {
    let f = Folder::new();
    let (project, mine) = case(&f, "01-output-dir-of-the-recipe");
    let before = tree(&mine);
    let run = |command: &str| {
        let mut c = f.adfreeze([Path::new(command), &mine.join("recipe.toml")]);
        said(c.current_dir(&project).output().unwrap())
    };
    for command in ["check", "train"] {
        let got = run(command);
        assert_eq!(got.code, Some(1), "{}", got.stderr);
        for part in
            ["mine/recipe.toml", "mine/results.json", "mine/01-sft/final/notes.txt", "\n\nhint: choose an output_dir"]
        {
            assert!(got.stderr.contains(part), "`{part}` is not in:\n{}", got.stderr);
        }
    }
    assert!(tree(&mine) == before, "something was changed or made");
    // Each alone is enough.
    for name in [
        "inputs.json",
        "metrics.jsonl",
        "SHA256SUMS",
        "01-align/checkpoints/step-00000002/trained.safetensors",
        "01-align",
    ] {
        let g = Folder::with(THREE_STAGES);
        g.write(&format!("run/{name}"), "mine");
        g.write("run/notes.txt", "in nobody's way");
        let before = tree(&g.path("run"));
        g.fails(
            &GO_ON,
            &["run holds files that no run of adfreeze has written", &format!("run/{name}"), "none of them"],
        );
        assert!(tree(&g.path("run")) == before, "{name}");
    }
}

#[test]
fn files_that_are_added_or_edited_later_stay() {
    let f = Folder::with(THREE_STAGES);
    f.write("run/.lock", "mine");
    f.write("run/.notes.aB3dE6.tmp", "mine");
    f.train(&["--stages", "align"]);
    // Beside what is finished they disturb nobody.
    f.write("run/01-align/final/notes.txt", "mine");
    f.train(&["--stages", "align"]);
    fs::remove_file(f.path("run/01-align/done.json")).unwrap();
    f.fails(&GO_ON, &["run/01-align/final/notes.txt", "move these files away"]);
    fs::remove_file(f.path("run/01-align/final/notes.txt")).unwrap();
    f.write("run/01-align/final/projector.safetensors", "mine");
    f.fails(&GO_ON, &["run/01-align/final/projector.safetensors"]);
    fs::remove_dir_all(f.path("run/01-align/final")).unwrap();
    f.write("run/02-sft/params.json", "mine");
    f.fails(&GO_ON, &["run/02-sft/params.json"]);
    fs::remove_file(f.path("run/02-sft/params.json")).unwrap();
    let recipe = fs::read_to_string(f.path("run/recipe.toml")).unwrap();
    f.write("run/recipe.toml", &format!("# best so far\n{recipe}"));
    f.fails(&GO_ON, &["run/recipe.toml is damaged or was edited", "move it away"]);
    assert!(fs::read_to_string(f.path("run/recipe.toml")).unwrap().starts_with("# best"));
    // Its checksum tells that nothing has changed.
    fs::remove_file(f.path("run/recipe.toml")).unwrap();
    let said = f.train(&["--stages", "align"]);
    assert!(said.stderr.contains("warning: run/recipe.toml was missing and is written again"), "{}", said.stderr);
    assert_eq!(fs::read_to_string(f.path("run/recipe.toml")).unwrap(), recipe);
    for name in ["run/.lock", "run/.notes.aB3dE6.tmp"] {
        assert_eq!(fs::read_to_string(f.path(name)).unwrap(), "mine", "{name}");
    }
}

#[test]
fn a_damaged_checkpoint_is_named_and_the_one_before_it_is_used() {
    let whole = Folder::with(THREE_STAGES);
    whole.train(&[]);
    for file in ["trained.safetensors", "optimizer.safetensors", "SHA256SUMS"] {
        let f = killed("sft", 7);
        let dir = newest(&f, "02-sft");
        let name = dir.file_name().unwrap().to_str().unwrap().to_string();
        match file {
            "SHA256SUMS" => fs::remove_file(dir.join(file)).unwrap(),
            _ => flip(&dir.join(file)),
        }
        let told = f.train(&[]).stderr;
        let before = format!("step-{:08}", name[5..].parse::<usize>().unwrap() - 2);
        let parts = [
            format!("warning: the checkpoint run/02-sft/checkpoints/{name} is damaged ("),
            format!("goes on from step {}", before[5..].parse::<usize>().unwrap()),
            format!("{name}.damaged"),
        ];
        for part in parts {
            assert!(told.contains(&part), "`{part}` is not in:\n{told}");
        }
        assert_same(&figures(&whole.path("run")), &figures(&f.path("run")));
    }
    let f = killed("align", 7);
    for folder in fs::read_dir(f.path("run/01-align/checkpoints")).unwrap() {
        flip(&folder.unwrap().path().join("optimizer.safetensors"));
    }
    f.fails(&GO_ON, &["is damaged (optimizer.safetensors is damaged", "and so are all before it", "delete "]);
}

#[test]
fn damage_to_what_a_stage_left_is_noticed_where_it_is_used() {
    let f = killed("sft", 5);
    let keep = tree(&f.path("run"));
    let restore = || {
        fs::remove_dir_all(f.path("run")).unwrap();
        for (path, bytes) in &keep {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
    };
    let ask = ["generate", "--run", "run", "--prompt", "Hi", "--max-new-tokens", "2"];
    let (data, images) = (golden("data/sft.json"), golden("images"));
    let score = ["score", "--run", "run", "--data", data.to_str().unwrap(), "--images", images.to_str().unwrap()];
    let score = [&score[..], &["--out", "scores.jsonl"]].concat();
    for (file, commands, parts) in [
        (
            "01-align/final/trained.safetensors",
            &[&GO_ON[..], &ask, &score][..],
            &["run/01-align/final/trained.safetensors is damaged", "done.json beside it"][..],
        ),
        (
            "01-align/done.json",
            &[&GO_ON[..], &ask],
            &["run/01-align/done.json is damaged", "delete run/01-align/done.json"],
        ),
        ("01-align/recipe.toml", &[&GO_ON[..], &ask], &["run/01-align/recipe.toml is damaged", "put it back"]),
        ("recipe.toml", &[&GO_ON[..], &ask], &["run/recipe.toml is damaged"]),
        ("inputs.json", &[&GO_ON[..]], &["run/inputs.json is damaged"]),
        ("results.json", &[&GO_ON[..]], &["run/results.json is damaged", "--allow-changes"]),
        ("metrics.jsonl", &[&GO_ON[..]], &["run/metrics.jsonl: ", "line"]),
    ] {
        for command in commands {
            flip(&f.path("run").join(file));
            f.fails(command, parts);
            restore();
        }
    }
    assert!(!f.path("scores.jsonl").exists());
    fs::remove_file(f.path("run/01-align/final/trained.safetensors")).unwrap();
    f.fails(&ask, &["cannot read the weights of stage `align`", "copy it back, or delete run/01-align/final"]);
    restore();
    fs::remove_file(f.path("run/01-align/done.json")).unwrap();
    f.fails(&ask, &["run/01-align/done.json is missing, though stage `align` has been finished", "--stage"]);
    f.train(&[]);
}

/// In words, with what to do; and the run goes on where that is allowed.
#[test]
fn what_is_missing_is_named() {
    let f = killed("sft", 5);
    let at = |name: &str| f.path("run").join(name);
    let metrics = fs::read_to_string(at("metrics.jsonl")).unwrap();
    let cut: String = metrics.split_inclusive('\n').filter(|l| !l.contains("\"align\",\"step\":3,")).collect();
    fs::write(at("metrics.jsonl"), cut).unwrap();
    let lines = "run/metrics.jsonl: lines of stage `align` up to its step 10 are missing or damaged";
    f.fails(&GO_ON, &[lines, "--allow-changes"]);
    fs::remove_file(at("metrics.jsonl")).unwrap();
    f.fails(&GO_ON, &[lines]);
    fs::write(at("metrics.jsonl"), &metrics).unwrap();
    fs::remove_file(at("results.json")).unwrap();
    f.fails(&GO_ON, &["run/results.json is missing", "--allow-changes"]);
    fs::remove_file(at("inputs.json")).unwrap();
    let lr = ["train", "recipe.toml", "--set", "stage.dpo.lr=1e-2"];
    fs::remove_file(at("recipe.toml")).unwrap();
    f.fails(&lr, &["run/recipe.toml is missing, so that it cannot be told whether the recipe has changed"]);
    // Unchanged ones need not be compared.
    f.fails(&GO_ON, &["run/results.json is missing"]);
    let said = f.train(&["--allow-changes"]);
    for part in
        ["run/inputs.json was missing and is written again", "run/recipe.toml was missing", "figures of finished"]
    {
        assert!(said.stderr.contains(part), "`{part}` is not in:\n{}", said.stderr);
    }
}

#[test]
fn a_finished_stage_is_never_made_another_model() {
    let f = Folder::with(THREE_STAGES);
    f.train(&[]);
    let before = tree(&f.path("run"));
    let alpha = "stage.sft.adapters[0].lora.alpha=16";
    let change = [&GO_ON[..], &["--set", alpha]].concat();
    let parts = ["stage `sft` is finished in run, and its weights are of another model", "alpha: was 8.0, is 16.0"];
    let hint = "delete run/02-sft and run/03-dpo to train again";
    for more in [&[][..], &["--allow-changes"]] {
        f.fails(&[&change[..], more].concat(), &[&parts[..], &[hint]].concat());
    }
    f.fails(&[&GO_ON[..], &["--allow-changes", "--set", "model.projector={linear={}}"]].concat(), &["model.projector"]);
    assert!(tree(&f.path("run")) == before);
    // It was trained with other settings: kept, in words, with the recipe of its training.
    let lr = ["--set", "stage.sft.lr=1e-9", "--allow-changes"];
    let said = f.train(&lr);
    for part in [
        "nothing to do",
        "stage `sft` is finished and kept as it was trained",
        "stage.sft.lr: was 0.002, is 0.000000001",
        hint,
    ] {
        assert!(said.stderr.contains(part), "`{part}` is not in:\n{}", said.stderr);
    }
    assert!(!said.stderr.contains("`align` is finished"), "{}", said.stderr);
    let path = f.path("run/02-sft/recipe.toml");
    assert_eq!(fs::read(&path).unwrap(), before[&path]);
    // As the hint says.
    for stage in ["02-sft", "03-dpo"] {
        fs::remove_dir_all(f.path("run").join(stage)).unwrap();
    }
    let said = f.train(&["--set", alpha, "--allow-changes"]);
    assert!(said.stderr.contains("align: done") && said.stderr.contains("sft: 10 steps"), "{}", said.stderr);
    let whole = Folder::with(THREE_STAGES);
    whole.train(&["--set", alpha]);
    let last = |f: &Folder| fs::read(f.path("run/03-dpo/final/trained.safetensors")).unwrap();
    assert!(last(&f) == last(&whole));
}

/// How often a run is saved and what is measured is no change of the run.
#[test]
fn checkpoints_and_evaluations_change_freely() {
    let f = killed("sft", 5);
    let sets = [
        "stage.sft.checkpoint={every_steps=3,keep=1}",
        "stage.align.eval=[]",
        "stage.dpo.eval=['again']",
        "eval.again={metric='loss',data=[{path='${GOLDEN}/data/sft.json',images='${GOLDEN}/images'}]}",
    ];
    let sets: Vec<&str> = sets.iter().flat_map(|s| ["--set", s]).collect();
    let said = f.train(&sets);
    assert!(said.stderr.contains("sft: goes on after step 4") && !said.stderr.contains("although"), "{}", said.stderr);
    let whole = Folder::with(THREE_STAGES);
    whole.train(&[]);
    let last = |f: &Folder| fs::read(f.path("run/03-dpo/final/trained.safetensors")).unwrap();
    assert!(last(&f) == last(&whole));
}

/// Without any checksum, as earlier versions left it.
#[test]
fn a_run_of_an_earlier_version_goes_on_and_answers() {
    let whole = Folder::with(THREE_STAGES);
    whole.train(&[]);
    let f = killed("sft", 5);
    for path in tree(&f.path("run")).into_keys() {
        let name = path.strip_prefix(f.path("run")).unwrap().to_str().unwrap().to_string();
        if name.ends_with("SHA256SUMS") || (name.contains('/') && name.ends_with("recipe.toml")) {
            fs::remove_file(path).unwrap();
        }
    }
    f.ok(["generate", "--run", "run", "--prompt", "Hi", "--max-new-tokens", "2"]);
    let told = f.train(&[]).stderr;
    assert!(
        told.contains("run was begun by a version that kept no checksums") && told.contains("sft: goes on"),
        "{told}"
    );
    assert_same(&figures(&whole.path("run")), &figures(&f.path("run")));
}

#[test]
fn a_folder_that_goes_away_ends_the_run_with_an_error() {
    for gone in ["run", "run/02-sft", "run/01-align", "run/recipe.toml", "run/metrics.jsonl", "run/.lock"] {
        let f = Folder::with(THREE_STAGES);
        let mut child = f.start(&["--set", "stage.sft.max_steps=4000"]);
        f.wait_for_step(&mut child, "sft", 3);
        // While the run makes files in it, a folder may not be empty when it is to be removed.
        let path = f.path(gone);
        let removed = match path.is_dir() {
            true => (0..1000).any(|_| fs::remove_dir_all(&path).is_ok() || !path.exists()),
            false => fs::remove_file(&path).is_ok(),
        };
        assert!(removed, "{gone}");
        let got = said(child.wait_with_output().unwrap());
        assert_eq!(got.code, Some(1), "{gone}: {}", got.stderr);
        let named =
            ["has gone while the run", "has been removed", "No such file"].iter().any(|p| got.stderr.contains(p));
        assert!(named && got.stderr.contains("\n\nhint: "), "{gone}: {}", got.stderr);
        if gone == "run" {
            assert!(!f.path("run/recipe.toml").exists(), "half a folder");
        }
    }
}

/// As network file systems do while a file is open elsewhere.
#[test]
fn an_old_checkpoint_that_cannot_be_deleted_is_a_warning() {
    let f = Folder::with(THREE_STAGES);
    let mut child = f.start(&["--stages", "align"]);
    f.wait_for_step(&mut child, "align", 3);
    child.kill().unwrap();
    child.wait().unwrap();
    // A folder where its file should be, which is what can be deleted.
    let sum = "0".repeat(64);
    let list = format!("# Written by adfreeze; check with: sha256sum -c SHA256SUMS\n{sum}  trained.safetensors\n");
    f.write("run/01-align/checkpoints/step-00000001/SHA256SUMS", &list);
    f.write("run/01-align/checkpoints/step-00000001/trained.safetensors/open", "in use");
    let said = f.train(&["--stages", "align"]);
    let told = "warning: cannot delete the old checkpoint run/01-align/checkpoints/step-00000001";
    assert!(said.stderr.matches(told).count() > 1, "{}", said.stderr);
    assert!(f.path("run/01-align/done.json").exists());
}

/// With an old checkpoint only what it was written with is deleted, and only what is one.
#[test]
fn files_of_others_in_old_checkpoints_stay() {
    let f = Folder::with(THREE_STAGES);
    let mut child = f.start(&["--stages", "align"]);
    f.wait_for_step(&mut child, "align", 3);
    child.kill().unwrap();
    child.wait().unwrap();
    let newest = newest(&f, "01-align");
    fs::write(newest.join("notes.txt"), "the best so far").unwrap();
    let (other, left) = (f.path("run/01-align/checkpoints/step-1"), ".evaluations.json.aB3dE6.tmp");
    f.write("run/01-align/checkpoints/step-1/mine.txt", "mine");
    f.write(&format!("run/01-align/checkpoints/{left}"), "of a killed process");
    let said = f.train(&["--stages", "align"]).stderr;
    let name = newest.file_name().unwrap().to_str().unwrap();
    let told = format!("warning: the old checkpoint run/01-align/checkpoints/{name} is deleted, but for files");
    assert_eq!(said.matches(&told).count(), 1, "{said}");
    assert!(said.contains(&format!("{name}/notes.txt")) && !said.contains("step-1/"), "{said}");
    let there: Vec<PathBuf> = fs::read_dir(&newest).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(there, [newest.join("notes.txt")]);
    assert_eq!(fs::read(other.join("mine.txt")).unwrap(), b"mine");
    assert!(!f.path("run/01-align/checkpoints").join(left).exists());
}

/// Folders of others beside a run's stages are no stages of it.
#[test]
fn checkpoints_of_others_are_no_run() {
    let f = Folder::with(THREE_STAGES);
    f.write("run/llava/checkpoints/checkpoint-500/trainer_state.json", "{}");
    f.write("run/old-run/done.json", "{}");
    let said = f.train(&["--stages", "align"]).stderr;
    assert!(!said.contains("warning"), "{said}");
    assert!(f.path("run/old-run/done.json").exists());
    f.train(&["--stages", "align"]);
}

/// A stage that is finished says so when the one before it has been trained again to other weights, and not when to the same.
#[test]
fn a_stage_whose_start_was_trained_again_is_told() {
    let f = Folder::with(THREE_STAGES);
    f.train(&[]);
    let last = fs::read(f.path("run/03-dpo/final/trained.safetensors")).unwrap();
    let told = "warning: stage `dpo` is finished and kept as it was trained, but from an earlier `sft`";
    fs::remove_dir_all(f.path("run/02-sft")).unwrap();
    let said = f.train(&[]).stderr;
    assert!(said.contains("sft: 10 steps") && said.contains("dpo: done") && !said.contains(told), "{said}");
    fs::remove_dir_all(f.path("run/02-sft")).unwrap();
    for _ in 0..2 {
        let said = f.train(&["--allow-changes", "--set", "stage.sft.lr=5e-3"]).stderr;
        assert!(said.contains(told) && said.contains("delete run/03-dpo"), "{said}");
    }
    assert!(fs::read(f.path("run/03-dpo/final/trained.safetensors")).unwrap() == last);
    fs::remove_dir_all(f.path("run/03-dpo")).unwrap();
    let said = f.train(&["--set", "stage.sft.lr=5e-3"]).stderr;
    assert!(said.contains("dpo: 10 steps") && !said.contains(told), "{said}");
    assert!(fs::read(f.path("run/03-dpo/final/trained.safetensors")).unwrap() != last);
}

#[test]
fn fewer_steps_than_were_done_are_refused() {
    let f = Folder::new();
    let (project, mine) = case(&f, "17-fewer-steps-than-were-done");
    let out = format!("output_dir='{}'", f.path("run").display());
    let train = |more: &[&str]| {
        let mut c: Command = f.adfreeze(["train", mine.join("recipe.toml").to_str().unwrap(), "--set", &out]);
        c.args(more).current_dir(&project);
        c
    };
    let mut child = train(&[]).stderr(Stdio::null()).spawn().unwrap();
    f.wait_for_step(&mut child, "sft", 21);
    child.kill().unwrap();
    child.wait().unwrap();
    let fewer = ["--allow-changes", "--set", "stage.sft.max_steps=5"];
    let got = said(train(&fewer).output().unwrap());
    assert_eq!(got.code, Some(1), "{}", got.stderr);
    for part in [
        "stage.sft: max_steps ends the stage after 5 steps, but its checkpoint is of step 20",
        "hint: set max_steps = 20",
    ] {
        assert!(got.stderr.contains(part), "`{part}` is not in:\n{}", got.stderr);
    }
    assert!(!f.path("run/01-sft/done.json").exists());
    let got = said(train(&["--allow-changes", "--set", "stage.sft.max_steps=22"]).output().unwrap());
    assert_eq!(got.code, Some(0), "{}", got.stderr);
    assert!(fs::read_to_string(f.path("run/01-sft/done.json")).unwrap().contains("\"steps\": 22"));
}

#[test]
fn scores_replace_nothing_but_scores() {
    let f = Folder::new();
    let data = f.write("sft.json", &fs::read_to_string(golden("data/sft.json")).unwrap());
    let notes = f.write("notes.txt", "mine");
    let model = f.model("model", |_| ());
    let score = |out: &str| {
        let words = ["score", "--model", "model", "--data", "sft.json", "--images", "IMAGES", "--out", out];
        words.map(|w| if w == "IMAGES" { golden("images").display().to_string() } else { w.to_string() })
    };
    for out in ["sft.json", "./model/../sft.json", "notes.txt", "model/config.json", "model/model.safetensors"] {
        let before = (tree(&model), fs::read(&data).unwrap(), fs::read(&notes).unwrap());
        let words = score(out);
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        f.fails(&words, &["--out: ", out, "is there already, and it holds no scores", "another name"]);
        assert!(before == (tree(&model), fs::read(&data).unwrap(), fs::read(&notes).unwrap()), "{out}");
    }
    for _ in 0..2 {
        f.ok(score("scores.jsonl"));
    }
}

#[test]
fn built_in_data_replaces_nothing_of_others() {
    let f = Folder::new();
    f.write("data/captions_train.json", "mine");
    let synth = ["synth", "shapes", "--out", "data", "--n", "4"];
    f.fails(&synth, &["data holds files that adfreeze did not write", "data/captions_train.json", "another folder"]);
    assert_eq!(tree(&f.path("data")).len(), 1);
    fs::remove_file(f.path("data/captions_train.json")).unwrap();
    f.ok(synth);
    f.ok(synth);
}

/// A picture that was mended is named, and does not forbid to go on.
#[test]
fn pictures_that_have_changed_are_named() {
    let f = Folder::with(&THREE_STAGES.replace("${GOLDEN}/images", "images"));
    copy(&golden("images"), &f.path("images"));
    f.train(&["--stages", "align"]);
    let changed = fs::read_dir(f.path("images")).unwrap().map(|e| e.unwrap().path());
    let mut names: Vec<String> = changed.map(|p| p.file_name().unwrap().to_str().unwrap().to_string()).collect();
    names.sort();
    let used = fs::read_to_string(golden("data/sft.json")).unwrap();
    let name = names.into_iter().find(|n| n.ends_with(".png") && used.contains(n.as_str())).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    let mut bytes = fs::read(f.path("images").join(&name)).unwrap();
    bytes.extend(b"more behind its end");
    fs::write(f.path("images").join(&name), bytes).unwrap();
    let said = f.train(&["--stages", "align,sft"]);
    assert!(
        said.stderr.contains(&format!("pictures have changed since the run began (images/{name})")),
        "{}",
        said.stderr
    );
}
