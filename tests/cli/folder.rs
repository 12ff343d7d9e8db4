//! A folder to work in, and the binary running in it.

use adfreeze::checkpoint::safetensors;
use adfreeze::report::without_timing;
use candle_core::Tensor;
use serde_json::Value;
use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

pub const BINARY: &str = env!("CARGO_BIN_EXE_adfreeze");

/// Were the tests started to ignore hang-ups, as `nohup` does? What they start must not be, or it would go on after a SIGHUP.
fn ignores_hangups() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|l| u64::from_str_radix(l.strip_prefix("SigIgn:")?.trim(), 16).ok());
    mask.is_some_and(|mask| mask & 1 == 1)
}

/// A file of the golden fixture.
pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/a").join(name)
}

/// All three stages on the golden model; dropout, accumulation and evaluations included.
pub const THREE_STAGES: &str = r#"
stages     = ["align", "sft", "dpo"]
output_dir = "run"

[model]
source = "${GOLDEN}/model"

[defaults]
batch        = { global = 8, micro = 2 }
lr_scheduler = { cosine = { warmup_steps = 2 } }
checkpoint   = { every_steps = 2, keep = 2 }
max_steps    = 10

[stage.align]
train = ["projector.*"]
data  = [{ path = "${GOLDEN}/data/plain.json", images = "${GOLDEN}/images", template = "plain" }]
lr    = 1e-3
eval  = ["captions"]

[stage.sft]
train        = ["projector.*"]
adapters     = [{ lora = { rank = 4, alpha = 8, dropout = 0.1, target = ["language.layers.*_proj"] } }]
data         = [{ path = "${GOLDEN}/data/sft.json", images = "${GOLDEN}/images" }]
lr           = 2e-3
param_groups = [{ match = ["projector.*"], lr = 1e-3 }]
eval         = ["captions", "preference"]

[stage.dpo]
from      = { stage = "sft", adapters = "continue" }
objective = { dpo = { beta = 0.1, loss = "sigmoid", reference = "start" } }
data      = [{ path = "${GOLDEN}/data/dpo.jsonl", images = "${GOLDEN}/images" }]
lr        = 1e-3
eval      = ["captions", "preference"]

[eval.captions]
metric = "loss"
data   = [{ path = "${GOLDEN}/data/plain.json", images = "${GOLDEN}/images", template = "plain" }]

[eval.preference]
metric = "preference"
data   = [{ path = "${GOLDEN}/data/dpo.jsonl", images = "${GOLDEN}/images" }]
"#;

/// For a stage of one step, which no warm-up may fill.
pub const CONSTANT: &str = "defaults.lr_scheduler={constant={}}";

pub struct Folder {
    dir: tempfile::TempDir,
}

/// What a finished process wrote.
pub struct Said {
    pub stdout: String,
    pub stderr: String,
    pub code: Option<i32>,
}

impl Folder {
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// With `recipe.toml`.
    pub fn with(recipe: &str) -> Self {
        let f = Self::new();
        f.write("recipe.toml", recipe);
        f
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, text).unwrap();
        path
    }

    /// `program`, in this folder, with an environment of its own.
    pub fn command(&self, program: &str) -> Command {
        let mut c = Command::new(program);
        c.current_dir(self.dir.path()).env_clear();
        for keep in ["PATH", "LD_LIBRARY_PATH", "RAYON_NUM_THREADS", "TMPDIR"] {
            c.envs(std::env::var_os(keep).map(|v| (keep, v)));
        }
        c.env("GOLDEN", golden("model").parent().unwrap()).env("HF_HOME", self.path("hf")).env("HF_HUB_OFFLINE", "1");
        c.stdin(Stdio::null());
        c
    }

    pub fn adfreeze<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut c = if ignores_hangups() { self.command("env") } else { self.command(BINARY) };
        if ignores_hangups() {
            c.args(["--default-signal=HUP", BINARY]);
        }
        c.args(args);
        c
    }

    /// Runs the binary; it must succeed.
    #[track_caller]
    pub fn ok<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Said {
        let said = said(self.adfreeze(args).output().unwrap());
        assert_eq!(said.code, Some(0), "{}", said.stderr);
        said
    }

    /// `adfreeze train recipe.toml` with `args`; it must succeed.
    #[track_caller]
    pub fn train(&self, args: &[&str]) -> Said {
        self.ok(["train", "recipe.toml"].iter().chain(args))
    }

    /// Runs the binary; it must fail with exit code 1, a cause with all of `parts`, and a hint. Returns stderr.
    #[track_caller]
    pub fn fails(&self, args: &[&str], parts: &[&str]) -> String {
        let said = said(self.adfreeze(args).output().unwrap());
        assert_eq!(said.code, Some(1), "{}", said.stderr);
        assert!(!said.stderr.contains("panicked"), "{}", said.stderr);
        for part in ["error: ", "\n\nhint: "].iter().chain(parts) {
            assert!(said.stderr.contains(part), "`{part}` is not in:\n{}", said.stderr);
        }
        said.stderr
    }

    /// `adfreeze train recipe.toml` with `args`, in the background.
    pub fn start(&self, args: &[&str]) -> Child {
        let mut c = self.adfreeze(["train", "recipe.toml"].iter().chain(args));
        c.stderr(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap()
    }

    /// Waits until `metrics.jsonl` of the run has this step; fails if the process ends before it.
    pub fn wait_for_step(&self, child: &mut Child, stage: &str, step: usize) {
        let path = self.path("run/metrics.jsonl");
        let line = format!("{{\"stage\":\"{stage}\",\"step\":{step},");
        let started = Instant::now();
        while !fs::read_to_string(&path).unwrap_or_default().contains(&line) {
            let ended = child.try_wait().unwrap();
            assert!(ended.is_none() && started.elapsed() < Duration::from_secs(60), "{stage} {step}: {ended:?}");
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    /// Trains with `args` a second time, in a folder of its own, killed after the first step of each of `stages`: it must give this
    /// run's figures.
    pub fn same_when_killed(&self, args: &[&str], stages: &[&str]) {
        let g = Self::with(&fs::read_to_string(self.path("recipe.toml")).unwrap());
        for stage in stages {
            let mut child = g.start(args);
            g.wait_for_step(&mut child, stage, 1);
            child.kill().unwrap();
            child.wait().unwrap();
        }
        g.train(args);
        assert_same(&figures(&self.path("run")), &figures(&g.path("run")));
    }

    /// A copy of the golden model whose tensors `change` has had its way with.
    pub fn model(&self, name: &str, change: impl FnOnce(&mut BTreeMap<String, Tensor>)) -> PathBuf {
        let dir = self.path(name);
        fs::create_dir_all(&dir).unwrap();
        for entry in fs::read_dir(golden("model")).unwrap() {
            let from = entry.unwrap().path();
            fs::copy(&from, dir.join(from.file_name().unwrap())).unwrap();
        }
        let path = dir.join("model.safetensors");
        let mut tensors = safetensors::load(&path).unwrap();
        change(&mut tensors);
        safetensors::save(&path, &tensors, &BTreeMap::new()).unwrap();
        dir
    }

    /// The lines of the run's metrics.
    pub fn metrics(&self) -> Vec<Value> {
        metrics(&self.path("run"))
    }
}

pub fn said(out: Output) -> Said {
    let text = |b| String::from_utf8(b).unwrap();
    Said { stdout: text(out.stdout), stderr: text(out.stderr), code: out.status.code() }
}

pub fn metrics(run: &Path) -> Vec<Value> {
    let text = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    text.lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

/// Everything of a run that must not depend on how often it was stopped: all files but checkpoints and the lock, the
/// metrics without their timing.
pub fn figures(run: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut out = BTreeMap::new();
    collect(run, run, &mut out);
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let bare: Vec<String> = lines.lines().map(|l| without_timing(l).unwrap()).collect();
    out.insert("metrics.jsonl".into(), bare.join("\n").into_bytes());
    out
}

fn collect(root: &Path, dir: &Path, out: &mut BTreeMap<String, Vec<u8>>) {
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        let name = path.strip_prefix(root).unwrap().to_str().unwrap().to_string();
        match path.is_dir() {
            true if name.ends_with("checkpoints") => {}
            true => collect(root, &path, out),
            false if name == ".lock" => {}
            false => {
                out.insert(name, fs::read(&path).unwrap());
            }
        }
    }
}

/// The same files with the same bytes.
#[track_caller]
pub fn assert_same(a: &BTreeMap<String, Vec<u8>>, b: &BTreeMap<String, Vec<u8>>) {
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    for (name, bytes) in a {
        assert!(*bytes == b[name], "{name} differs");
    }
}

/// Largest difference between the tensors of two files of the same names.
#[track_caller]
pub fn distance(a: &Path, b: &Path) -> f64 {
    let (a, b) = (safetensors::load(a).unwrap(), safetensors::load(b).unwrap());
    assert_eq!(a.keys().collect::<Vec<_>>(), b.keys().collect::<Vec<_>>());
    let flat = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    let gap = |(x, y): (&f32, &f32)| f64::from((x - y).abs());
    a.iter().flat_map(|(n, t)| flat(t).iter().zip(&flat(&b[n])).map(gap).collect::<Vec<_>>()).fold(0.0, f64::max)
}
