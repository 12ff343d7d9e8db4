//! `bench kernels`, `bench step`, `bench freeze` and `bench zoo` on the CPU, in small.

use super::folder::{Folder, THREE_STAGES};
use serde_json::Value;

/// What a bench wrote with `--json`: the machine, and the records behind it.
fn records(args: &[&str]) -> (Value, Vec<Value>) {
    let said = Folder::new().ok(["bench"].iter().chain(args).chain(&["--json", "--device", "cpu"]));
    let mut all: Vec<Value> = said.stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let machine = all.remove(0);
    assert_eq!(machine["what"], "machine");
    assert_eq!(machine["version"], env!("CARGO_PKG_VERSION"));
    for rate in ["copy_bytes_per_s", "matmul_flops_per_s"] {
        assert!(positive(&machine[rate]), "{machine}");
    }
    for r in &all {
        assert_eq!((&r["device"], &r["dtype"]), (&machine["device"], &machine["dtype"]), "{r}");
        assert!(["median_s", "min_s", "runs", "floor_s"].iter().all(|k| positive(&r[k])), "{r}");
        assert!(r["min_s"].as_f64() <= r["median_s"].as_f64(), "{r}");
    }
    (machine, all)
}

fn positive(v: &Value) -> bool {
    v.as_f64().is_some_and(|v| v.is_finite() && v > 0.0)
}

#[test]
fn kernels_are_measured_beside_their_floors() {
    for dtype in ["f32", "bf16"] {
        let (machine, all) = records(&["kernels", "--small", "--dtype", dtype]);
        assert_eq!(machine["dtype"], dtype);
        assert!(all.len() > 40, "{}", all.len());
        for r in &all {
            let number = |v: &Value, k: &str| v[k].as_f64().unwrap();
            let moving = number(r, "bytes") / number(&machine, "copy_bytes_per_s");
            let computing = number(r, "flops") / number(&machine, "matmul_flops_per_s");
            let floor = number(r, "floor_s");
            assert!((floor / moving.max(computing) - 1.0).abs() < 1e-9, "{r}");
            assert!((number(r, "share_of_floor") * number(r, "median_s") / floor - 1.0).abs() < 1e-9, "{r}");
        }
        // Strided products of bf16 are a GPU's.
        let bordered = all.iter().any(|r| r["what"] == "adapted layer, bordered weight");
        assert_eq!(bordered, dtype == "f32");
    }
}

#[test]
fn a_part_of_the_kernels_is_chosen_by_name() {
    let (_, all) = records(&["kernels", "--only", "attention, causal"]);
    let names: Vec<&str> = all.iter().map(|r| r["what"].as_str().unwrap()).collect();
    let kinds = ["forward", "without gradient", "backward"];
    assert_eq!(names, kinds.map(|k| format!("attention, causal, {k}")));
    Folder::new().fails(&["bench", "kernels", "--only", "no such thing"], &["no such thing", "swiglu, forward"]);
    let text = Folder::new().ok(["bench", "kernels", "--device", "cpu", "--only", "rope"]).stdout;
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 3, "{text}");
    assert!(
        lines[0].contains("copies") && lines[1].starts_with("kernel ") && lines[2].starts_with("rope, q and k"),
        "{text}"
    );
}

#[test]
fn steps_are_measured_by_part() {
    let (machine, all) = records(&["step", "--preset", "tiny", "--random-init", "--steps", "2", "--peak", "2"]);
    let works: Vec<&str> = all.iter().map(|r| r["work"].as_str().unwrap()).collect();
    assert_eq!(works, ["align", "sft", "dpo"]);
    let number = |r: &Value, k: &str| r[k].as_f64().unwrap();
    for r in &all {
        let (median, flops) = (number(r, "median_s"), number(r, "flops"));
        assert!((number(r, "tokens_per_s") * median - number(r, "tokens")).abs() < 1e-6, "{r}");
        assert!((number(r, "samples_per_s") * median - number(r, "samples")).abs() < 1e-6, "{r}");
        let rate = number(&machine, "matmul_flops_per_s");
        assert!((number(r, "mfu_measured") * rate * median / flops - 1.0).abs() < 1e-9, "{r}");
        assert!((number(r, "mfu_peak") * 2e12 * median / flops - 1.0).abs() < 1e-9, "{r}");
        assert!(number(r, "loss").is_finite() && number(r, "runs") == 2.0, "{r}");
        let flops_by_part = r["flops_by_part"].as_object().unwrap().values();
        assert_eq!(flops_by_part.map(|f| f.as_f64().unwrap()).sum::<f64>(), flops);
        assert!(r["flops_formula"].as_str().unwrap().contains("4·N"), "{r}");
        assert_eq!(cfg!(target_os = "linux"), positive(&r["peak_memory_bytes"]), "{r}");
    }
    let parts = |i: usize| -> Vec<&str> {
        let parts = all[i]["parts_s"].as_object().unwrap();
        assert!(parts.iter().all(|(k, s)| positive(s) || k == "rest"), "{parts:?}");
        parts.keys().map(String::as_str).collect()
    };
    let forward = ["head", "head backward", "language", "language backward", "optimizer", "projector"];
    assert_eq!(parts(0), [&forward[..], &["projector backward", "rest", "tower"]].concat());
    assert_eq!(parts(1), parts(0));
    assert_eq!(parts(2), [&forward[..], &["rest", "tower"]].concat());
    // Two samples of 32 tokens: the beginning, 16 of a picture, 7 of a prompt, 8 of an answer. Pairs are two sequences each.
    assert_eq!((&all[1]["tokens"], &all[2]["tokens"]), (&64.into(), &128.into()));
    assert_eq!((number(&all[1], "label_tokens"), number(&all[2], "label_tokens")), (16.0, 32.0));
}

#[test]
fn what_a_step_is_made_of_can_be_chosen() {
    let args = ["step", "--preset", "tiny", "--random-init", "--steps", "1", "--work", "sft"];
    let more = ["--micro", "3", "--seq", "24", "--rank", "2", "--activations", "recompute", "--dtype", "bf16"];
    let (machine, all) = records(&[args.as_slice(), &more].concat());
    assert_eq!((all.len(), &machine["dtype"]), (1, &"bf16".into()));
    let r = &all[0];
    assert_eq!((&r["samples"], &r["tokens"], &r["activations"]), (&3.into(), &72.into(), &"recompute".into()));
    assert_eq!(r["mfu_peak"], Value::Null);
    let text = Folder::new().ok(["bench"].iter().chain(&args).chain(&["--peak", "1.5"])).stdout;
    for what in [
        "sft of tiny, 2 × 32 tokens",
        "tokens/s",
        "4·N a token",
        "MFU",
        "of 1.50 TFLOP/s",
        "language backward",
        "peak memory",
    ] {
        assert!(text.contains(what), "{what} in:\n{text}");
    }
}

#[test]
fn what_freezing_saves_is_told_beside_what_is_published() {
    let args = ["bench", "freeze", "--preset", "tiny", "--steps", "2", "--device", "cpu"];
    let said = Folder::new().ok(args.iter().chain(&["--json", "--micro", "3"])).stdout;
    let mut all: Vec<Value> = said.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(all.remove(0)["what"], "machine");
    let (records, claims): (Vec<Value>, Vec<Value>) = all.into_iter().partition(|r| r["what"] == "freeze");
    let name = |r: &Value| format!("{} {}", r["policy"].as_str().unwrap(), r["activations"].as_str().unwrap());
    let names: Vec<String> = records.iter().map(name).collect();
    let policies = ["projector only", "LoRA", "last 2 layers", "full"];
    let want: Vec<String> = policies.iter().flat_map(|p| [format!("{p} none"), format!("{p} recompute")]).collect();
    assert_eq!(names, want);
    for r in &records {
        assert!(["median_s", "min_s", "trained", "kept_bytes"].iter().all(|k| positive(&r[k])), "{r}");
        assert_eq!((&r["samples"], &r["tokens"]), (&3.into(), &96.into()));
        assert_eq!(cfg!(target_os = "linux"), positive(&r["peak_memory_bytes"]), "{r}");
        assert!(r["start_memory_bytes"].as_u64() <= r["peak_memory_bytes"].as_u64(), "{r}");
    }
    // tiny: 1584 + 2352 of the projector; the rank-4 updates of 2 layers; both layers; all but one tower layer and a norm.
    let trained: Vec<u64> = records.iter().map(|r| r["trained"].as_u64().unwrap()).step_by(2).collect();
    let layer = 2 * 48 * 48 + 2 * 24 * 48 + 3 * 80 * 48 + 2 * 48;
    let updates = 4 * (2 * (48 + 48) + 2 * (48 + 24) + 3 * (48 + 80));
    assert_eq!(trained[..3], [1584 + 2352, 2 * updates, 2 * layer]);
    assert!(trained[3] > trained[2] + trained[0] && trained[3] < records[6]["parameters"].as_u64().unwrap());
    // What recompute changes is what is kept, and not what is computed.
    for pair in records.chunks(2) {
        assert_eq!(pair[0]["loss"], pair[1]["loss"]);
        assert!(pair[0]["kept_bytes"].as_u64() > pair[1]["kept_bytes"].as_u64(), "{pair:?}");
    }
    let seconds = |i: usize| records[i]["median_s"].as_f64().unwrap();
    let claim = |what: &str| claims.iter().find(|c| c["claim"].as_str().unwrap().starts_with(what)).unwrap();
    let faster = claim("projector only faster than full, activations = \"none\"");
    assert!((faster["here"].as_f64().unwrap() - seconds(6) / seconds(0)).abs() < 1e-9, "{faster}");
    let slower = claim("LoRA: recompute slower");
    assert!((slower["here"].as_f64().unwrap() - (seconds(3) / seconds(2) - 1.0)).abs() < 1e-9, "{slower}");
    assert_eq!((claims.len(), &slower["published"]), (14, &"20 to 30 %".into()));

    let text = Folder::new().ok(args).stdout;
    for what in ["a step of tiny, f32: 2 samples, 64 tokens", "last 2 layers", "beside what is published", "3 to 5 ×"]
    {
        assert!(text.contains(what), "{what} in:\n{text}");
    }
    Folder::new().fails(&["bench", "freeze", "--preset", "tiny", "--seq", "18"], &["--seq 18", "19 or more"]);
    Folder::new().fails(&["bench", "freeze", "--preset", "tiny", "--steps", "0"], &["--steps", "above 0"]);
}

#[test]
fn what_cannot_be_measured_is_said() {
    let fails = |args: &[&str], what: &[&str]| {
        let all = [["bench", "step"].as_slice(), args].concat();
        Folder::new().fails(&all, what);
    };
    fails(&["--preset", "tiny"], &["random weights", "--random-init"]);
    fails(&["--preset", "large", "--random-init"], &["`large`", "`llava-1.5-7b`, `smollm2-135m-dinov2-s`, `tiny`"]);
    fails(&["--preset", "tiny", "--random-init", "--seq", "18"], &["--seq 18", "16 tokens", "19 or more"]);
    fails(&["--preset", "tiny", "--random-init", "--micro", "0"], &["--micro", "above 0"]);
    fails(&["--preset", "tiny", "--random-init", "--peak", "0"], &["--peak", "above 0"]);
    let said = Folder::new()
        .adfreeze(["bench", "step", "--preset", "tiny", "--random-init", "--work", "sft,rl"])
        .output()
        .unwrap();
    let told = String::from_utf8(said.stderr).unwrap();
    assert!(said.status.code() == Some(2) && told.contains("'rl'") && told.contains("align, sft, dpo"), "{told}");
}

#[test]
fn the_zoo_is_run_entry_by_entry() {
    let exact = "\n[eval.exact]\nmetric = \"exact_match\"\ndata = [{ path = \"${GOLDEN}/data/sft.json\", images = \"${GOLDEN}/images\" }]\n";
    let f = Folder::with(&format!("{THREE_STAGES}{exact}"));
    let sets = ["--set", "defaults.max_steps=2", "--set", "stage.sft.eval=[\"captions\",\"exact\"]"];
    let zoo = |only: &str| {
        let args = ["bench", "zoo", "recipe.toml", "--json", "--only", only];
        let said = f.ok(args.iter().chain(&sets));
        said.stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect::<Vec<Value>>()
    };
    let [found] = &zoo("cross_attention, gated")[..] else { panic!() };
    assert_eq!((&found["entry"], &found["visual_tokens"]), (&"cross_attention, gated".into(), &16.into()));
    assert!(positive(&found["parameters"]) && positive(&found["second_stage_step_s"]), "{found}");
    assert_eq!(found["exact_match"][0][0], "exact");
    let trained = f.path("runs/zoo/cross_attention-gated/02-sft/final/adapters/eyes/adapter.safetensors");
    let before = trained.metadata().unwrap().modified().unwrap();
    assert_eq!(&zoo("cross_attention, gated")[0], found, "what is done is read");
    assert_eq!(trained.metadata().unwrap().modified().unwrap(), before, "and not run again");
    let unknown: Vec<&str> = ["bench", "zoo", "recipe.toml", "--only", "elephant"].into_iter().chain(sets).collect();
    f.fails(&unknown, &["elephant", "pixel_shuffle"]);
    f.fails(&["bench", "zoo", "recipe.toml"], &["no exact matches are counted at the end of `sft`"]);
}

/// Tiles need visual tokens that keep their places; a look at the second stage, and its size of pictures, take nothing with them.
#[test]
fn what_the_zoo_cannot_run_is_told_before_it_begins() {
    let exact = "\n[eval.exact]\nmetric = \"exact_match\"\ndata = [{ path = \"${GOLDEN}/data/sft.json\", images = \"${GOLDEN}/images\" }]\n";
    let tiled = THREE_STAGES.replace(
        "sft.json\", images = \"${GOLDEN}/images\"",
        "sft.json\", images = \"${GOLDEN}/images\", resize = \"anyres\"",
    );
    let f = Folder::with(&format!("{tiled}{exact}"));
    let sets = [
        "--set",
        "defaults.max_steps=2",
        "--set",
        "stage.align.train=[\"!projector.image_newline\",\"projector.*\"]",
        "--set",
        "stage.sft.eval=[\"captions\",\"exact\"]",
        "--set",
        "stage.sft.align_check={samples=2}",
        "--set",
        "stage.sft.image_size=28",
    ];
    let zoo = |only: &'static str| ["bench", "zoo", "recipe.toml", "--json", "--only", only].into_iter().chain(sets);
    let said = f.ok(zoo("er"));
    let all: Vec<Value> = said.stdout.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    let names: Vec<&str> = all.iter().map(|r| r["entry"].as_str().unwrap()).collect();
    let cannot = ["perceiver", "resampler", "qformer", "cross_attention, resampler"];
    assert_eq!(names, [&cannot[..], &["no adapter", "bottleneck adapter"]].concat());
    for (i, r) in all.iter().enumerate() {
        let told = r["cannot"].as_str().unwrap_or_default();
        assert_eq!(told.contains("do not stand as a square"), i < cannot.len(), "{r}");
        // 28 px in patches of 14.
        assert!(i < cannot.len() || r["visual_tokens"] == 4, "{r}");
    }
    f.fails(&zoo("qformer").collect::<Vec<_>>(), &["qformer: ", "do not stand as a square"]);
    // Beside the text nothing could be looked at.
    f.ok(zoo("cross_attention, gated"));
}
