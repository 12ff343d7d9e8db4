//! Signals: a checkpoint and a distinct exit code at the first, a step left between micro-batches at the second.

use super::folder::{BINARY, Folder, THREE_STAGES, assert_same, figures, golden, said};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

fn send(child: &Child, signal: &str) {
    let kill = format!("kill -{signal} {}", child.id());
    assert!(Command::new("sh").args(["-c", &kill]).status().unwrap().success());
}

#[test]
fn a_signal_ends_the_step_writes_a_checkpoint_and_says_how_to_go_on() {
    let whole = Folder::with(THREE_STAGES);
    // No checkpoint but the one that the signal asks for.
    let args = ["--stages", "align", "--set", "defaults.checkpoint.every_steps=0", "--set", "defaults.max_steps=30"];
    whole.train(&args);
    for signal in ["TERM", "INT", "USR1", "HUP"] {
        let f = Folder::with(THREE_STAGES);
        let mut child = f.start(&args);
        f.wait_for_step(&mut child, "align", 2);
        send(&child, signal);
        let said = said(child.wait_with_output().unwrap());
        assert_eq!(said.code, Some(75), "{}", said.stderr);
        assert!(said.stderr.contains("align: asked to stop, stopped after step "), "{}", said.stderr);
        assert!(said.stderr.contains("the same command goes on"), "{}", said.stderr);
        let steps = f.metrics().len();
        assert!(f.path(&format!("run/01-align/checkpoints/step-{steps:08}")).exists());
        assert!(!f.path("run/01-align/done.json").exists());
        assert!(f.train(&args).stderr.contains(&format!("goes on after step {steps} of 30")));
        assert_same(&figures(&whole.path("run")), &figures(&f.path("run")));
    }
}

#[test]
fn a_second_signal_leaves_the_step() {
    let f = Folder::with(THREE_STAGES);
    // A step that takes very long.
    let mut child = f.start(&["--log", "json", "--set", "stage.align.batch.global=200000"]);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
    assert!(lines.any(|l| l.unwrap().contains("stage_start")));
    std::thread::sleep(Duration::from_millis(200));
    send(&child, "TERM");
    std::thread::sleep(Duration::from_millis(200));
    assert!(child.try_wait().unwrap().is_none(), "the first signal must leave the step its time");
    let asked = Instant::now();
    send(&child, "TERM");
    assert_eq!(child.wait().unwrap().code(), Some(75));
    assert!(asked.elapsed() < Duration::from_secs(2));
    assert!(!f.path("run/01-align/checkpoints").exists());
}

/// HUP is as TERM, and the answer comes at once, in words.
#[test]
fn a_first_signal_is_answered_at_once() {
    let f = Folder::with(THREE_STAGES);
    let mut child = f.start(&["--set", "stage.align.batch.global=200000"]);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|l| l == "align: 10 steps"));
    std::thread::sleep(Duration::from_millis(200));
    let asked = Instant::now();
    send(&child, "HUP");
    let answer = lines.next().unwrap();
    assert_eq!(answer, "SIGHUP: asked to stop: finishing the step, then a checkpoint");
    assert!(asked.elapsed() < Duration::from_secs(2), "{:?}", asked.elapsed());
    // The step would take minutes: it is left between micro-batches.
    assert_eq!(child.wait().unwrap().code(), Some(75));
    assert!(asked.elapsed() < Duration::from_secs(20), "{:?}", asked.elapsed());
    assert!(lines.any(|l| l.contains("stopped after step 0 of 10; the same command begins the stage")));
}

/// The third step is so long that it is left; the second one is not lost with it.
#[test]
fn a_second_signal_does_not_lose_the_last_whole_step() {
    let args = [
        "--stages",
        "align",
        "--set",
        "defaults.checkpoint.every_steps=0",
        "--set",
        "stage.align.batch={global=400,micro=2}",
    ];
    let f = Folder::with(THREE_STAGES);
    let mut child = f.start(&args);
    f.wait_for_step(&mut child, "align", 2);
    std::thread::sleep(Duration::from_millis(50));
    send(&child, "INT");
    std::thread::sleep(Duration::from_millis(100));
    send(&child, "INT");
    let said = said(child.wait_with_output().unwrap());
    assert_eq!(said.code, Some(75), "{}", said.stderr);
    assert!(said.stderr.contains("SIGINT again: leaving it between micro-batches"), "{}", said.stderr);
    let steps = f.metrics().len();
    assert!(f.path(&format!("run/01-align/checkpoints/step-{steps:08}")).is_dir(), "{}", said.stderr);
    assert!(
        f.train(&[&args[..], &["--set", "defaults.max_steps=4", "--allow-changes"]].concat())
            .stderr
            .contains(&format!("goes on after step {steps} of 4"))
    );
}

/// More data than a moment's work, of what a stage does beside its steps.
fn many(f: &Folder, name: &str, file: &str, n: usize) {
    let text = std::fs::read_to_string(golden(&format!("data/{file}"))).unwrap();
    let samples: Vec<serde_json::Value> = match file.ends_with('l') {
        true => text.lines().map(|l| serde_json::from_str(l).unwrap()).collect(),
        false => serde_json::from_str(&text).unwrap(),
    };
    let lines: Vec<String> = (0..n).map(|i| samples[i % samples.len()].to_string()).collect();
    f.write(name, &lines.join("\n"));
}

/// Jobs shorter than the pass over the reference, or than an evaluation, advance nevertheless, to the same bytes.
#[test]
fn passes_beside_the_steps_keep_what_they_have() {
    let recipe = r#"
stages = ["dpo"]
output_dir = "run"
[model]
source = "${GOLDEN}/model"
[defaults]
max_steps  = 2
checkpoint = { every_steps = 0 }
[stage.dpo]
train     = ["projector.*"]
objective = { dpo = { beta = 0.1, loss = "sigmoid", reference = "start" } }
data      = [{ path = "pairs.jsonl", images = "${GOLDEN}/images" }]
batch     = { global = 8, micro = 2 }
lr        = 1e-3
eval      = ["captions"]
[eval.captions]
metric   = "loss"
data     = [{ path = "held.jsonl", images = "${GOLDEN}/images" }]
pictures = ["blank", "shuffled"]
"#;
    let (whole, f) = (Folder::with(recipe), Folder::with(recipe));
    for f in [&whole, &f] {
        many(f, "pairs.jsonl", "dpo.jsonl", 1000);
        many(f, "held.jsonl", "sft.json", 500);
    }
    whole.train(&[]);
    // Until a line begins like this or holds it, then a moment, then a signal; what was said after it.
    let stopped = |at: &str| -> String {
        let mut child = f.start(&[]);
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
        assert!(lines.any(|l| l.contains(at)));
        std::thread::sleep(Duration::from_millis(100));
        send(&child, "TERM");
        let rest = lines.collect::<Vec<_>>().join("\n");
        assert_eq!(child.wait().unwrap().code(), Some(75), "{rest}");
        rest
    };
    let rest = stopped("1000 pairs under the reference");
    // The pass may be over before the signal is answered.
    assert!(rest.contains("asked to stop") && rest.contains("of 1000 pairs"), "{rest}");
    assert!(!f.path("run/01-dpo/checkpoints").exists());
    let rest = stopped("1000 pairs under the reference: goes on after ");
    assert!(rest.contains("of 1000 pairs"), "{rest}");
    let rest = stopped("dpo: done in ");
    assert!(rest.contains("asked to stop in evaluation captions"), "{rest}");
    assert!(f.path("run/01-dpo/checkpoints/step-00000002").is_dir());
    let rest = stopped("evaluation captions: goes on after ");
    assert!(rest.contains("asked to stop in evaluation captions"), "{rest}");
    let last = f.train(&[]).stderr;
    assert!(
        last.contains("dpo: goes on after step 2 of 2") && last.contains("evaluation captions: goes on after "),
        "{last}"
    );
    assert_same(&figures(&whole.path("run")), &figures(&f.path("run")));
    assert!(!f.path("run/01-dpo/checkpoints/evaluations.json").exists());
}

/// What a stage does behind its last step may take long, and until then its steps may be in memory alone.
#[test]
fn a_signal_behind_the_last_step_loses_no_step() {
    let f = Folder::with(THREE_STAGES);
    many(&f, "captions.jsonl", "plain.json", 600);
    let data = format!(
        "stage.align.data=[{{path='captions.jsonl',images='{}',template='plain'}}]",
        golden("images").display()
    );
    let mut args = vec!["--set", &data];
    for more in [
        "stage.align.eval=[]",
        "stage.align.align_check={threshold=-1.0,samples=600}",
        "defaults.checkpoint.every_steps=0",
        "defaults.max_steps=4",
    ] {
        args.extend(["--set", more]);
    }
    let mut child = f.start(&args);
    let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(lines.any(|l| l.starts_with("align: done in ")));
    std::thread::sleep(Duration::from_millis(50));
    send(&child, "TERM");
    let rest = lines.collect::<Vec<_>>().join("\n");
    assert_eq!(child.wait().unwrap().code(), Some(75), "{rest}");
    assert!(rest.contains("SIGTERM: asked to stop: finishing the stage"), "{rest}");
    assert!(rest.contains("asked to stop, stopped behind align; the same command goes on from there"), "{rest}");
    assert!(f.path("run/01-align/done.json").exists() && !f.path("run/02-sft").exists());
    let again = f.train(&args).stderr;
    assert!(again.contains("align: done (4 steps") && again.contains("sft: 4 steps"), "{again}");
}

/// `nohup` starts a command with SIGHUP ignored, and so it must stay.
#[test]
#[cfg(target_os = "linux")]
fn a_run_under_nohup_goes_on_when_its_terminal_closes() {
    let f = Folder::with(THREE_STAGES);
    let line = format!("trap '' HUP; exec {BINARY} train recipe.toml --stages align");
    let mut child = f.command("sh").args(["-c", &line]).stderr(Stdio::piped()).spawn().unwrap();
    f.wait_for_step(&mut child, "align", 2);
    send(&child, "HUP");
    let said = said(child.wait_with_output().unwrap());
    assert_eq!(said.code, Some(0), "{}", said.stderr);
    assert!(!said.stderr.contains("asked to stop"), "{}", said.stderr);
}

/// To a shell, a command that does not go on ends by the signal; score says what it has.
#[test]
fn generate_and_score_end_as_shells_tell_of_signals() {
    let f = Folder::new();
    let lines: Vec<String> = (0..20_000)
        .map(|_| {
            r#"{"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A circle."}]}"#
                .to_string()
        })
        .collect();
    f.write("many.jsonl", &lines.join("\n"));
    let model = golden("model").display().to_string();
    for (signal, number) in [("INT", 2), ("TERM", 15), ("HUP", 1)] {
        let args = ["generate", "--model", &model, "--prompt", "What?", "--max-new-tokens", "1000000"];
        let mut child = f.adfreeze(args).stdout(Stdio::piped()).spawn().unwrap();
        child.stdout.take().unwrap().read_exact(&mut [0]).unwrap();
        send(&child, signal);
        let ended = child.wait().unwrap();
        // By the signal itself, which a shell tells as 128 and its number; an answer that ends before is none.
        assert!(ended.signal() == Some(number) || ended.success(), "{ended:?}");

        let args = ["score", "--model", &model, "--data", "many.jsonl", "--out", "scores.jsonl"];
        let child = f.adfreeze(args).stderr(Stdio::piped()).spawn().unwrap();
        let lines = || std::fs::read_to_string(f.path("scores.jsonl.partial")).map_or(0, |t| t.lines().count());
        let before = lines();
        while lines() <= before + 8 {
            std::thread::sleep(Duration::from_millis(1));
        }
        send(&child, signal);
        let said = said(child.wait_with_output().unwrap());
        assert_eq!(said.code, Some(128 + number), "{}", said.stderr);
        let told = format!("asked to stop: {} of 20000 samples are in scores.jsonl.partial; the same command", lines());
        assert!(said.stderr.contains(&told), "{}", said.stderr);
        assert!(!f.path("scores.jsonl").exists());
    }
}
