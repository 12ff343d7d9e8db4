//! Each kind of adapter through the commands: check, training of all stages, a kill on the way, generation, hand-over.

use super::folder::{Folder, THREE_STAGES, golden};
use adfreeze::checkpoint::safetensors;

const LORA: &str = "{lora={name=\"low\",rank=2,alpha=4,target=[\"language.layers.*_proj\"]}}";
const BOTTLENECK: &str = "{bottleneck={dim=4,norm=true,dropout=0.1,target=[\"language.layers.*.{self_attn,mlp}\",\"vision.encoder.layers[0].mlp\"]}}";
const FLAMINGO: &str = "{cross_attention={every=1,heads=2,head_dim=8}}";
const PREFIX: &str = "{prefix={name=\"soft\",tokens=3}}";

/// A sample without a picture.
const TEXT_ALONE: &str = r#"[{ "id": "a", "conversations": [{ "from": "human", "value": "What is it?" }, { "from": "gpt", "value": "A square." }] }]"#;

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

    f.same_when_killed(&set, &["sft", "dpo"]);
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
    // Soft tokens in PEFT's format are a start, too, and go on being trained.
    let g = Folder::with(THREE_STAGES);
    let start = format!("model.adapter={:?}", at("soft").display().to_string());
    g.train(&["--set", &start, "--set", "stage.sft.adapters=[]", "--set", "defaults.max_steps=2"]);
    let on = safetensors::load(&g.path("run/03-dpo/final/adapters/start/adapter_model.safetensors")).unwrap();
    assert_eq!(on["prompt_embeddings"].dims(), prompt["prompt_embeddings"].dims());
    let values = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    assert_ne!(values(&on["prompt_embeddings"]), values(&prompt["prompt_embeddings"]));
    // The stage before had none of them, the next one trains them on.
    let [sft, dpo] = ["02-sft", "03-dpo"].map(|s| f.path("run").join(s).join("final/adapters/sft/adapter.safetensors"));
    assert_ne!(std::fs::read(sft).unwrap(), std::fs::read(dpo).unwrap());
}

/// LoRA on the tower beside DoRA on the language model, LoRA+ on the second; then both are taken into the weights.
#[test]
fn dora_and_lora_plus() {
    const LOW: &str = "{lora={name=\"eyes\",rank=2,alpha=4,target=[\"vision.encoder.layers[0..2].*\"]}}";
    const DORA: &str = "{lora={name=\"words\",rank=2,alpha=3,dora=true,rslora=true,lr_ratio=8,dropout=0.1,target=[\"language.layers.*_proj\"]}}";
    let both = [LOW, DORA].join(",");
    let f = through(&both, &[]);
    let at = |name: &str| f.path("run/03-dpo/final/adapters").join(name);
    let words = |name: &str| -> serde_json::Value {
        serde_json::from_slice(&std::fs::read(at(name).join("adapter_config.json")).unwrap()).unwrap()
    };
    let (eyes, ours) = (words("eyes"), words("words"));
    assert_eq!((eyes["use_dora"].as_bool(), ours["use_dora"].as_bool()), (Some(false), Some(true)));
    assert_eq!((eyes["use_rslora"].as_bool(), ours["use_rslora"].as_bool()), (Some(false), Some(true)));
    let tensors = safetensors::load(&at("words").join("adapter_model.safetensors")).unwrap();
    let magnitudes = tensors.iter().filter(|(n, _)| n.ends_with("_proj.lora_magnitude_vector"));
    assert_eq!((magnitudes.count(), tensors.len()), (21, 3 * 21));
    // Both stages show B's learning rate as what it is: the first declares the adapter, the second goes on with it.
    for (stage, lr) in [("sft", 2e-3), ("dpo", 1e-3)] {
        let metrics = f.metrics();
        let last = metrics.iter().rfind(|m| m["stage"] == stage).unwrap();
        let [plain, fast] =
            ["default", "default ×8"].map(|g| last["lr"][g].as_f64().unwrap_or_else(|| panic!("{last}")));
        assert!(plain > 0.0 && plain <= lr && (fast / plain - 8.0).abs() < 1e-12, "{last}");
        assert!(last["grad_norm"]["default ×8"].is_f64(), "{last}");
    }
    let set = set(&both, &[]);
    let said = f.ok(["check", "recipe.toml"].into_iter().chain(set.iter().map(String::as_str)));
    assert!(said.stdout.contains("default ×8") && said.stdout.contains("1.6e-2"), "{}", said.stdout);

    // What was exported is a start for another run, which answers the same, and merges it in its second stage.
    let start = format!("model.adapter={:?}", at("words").display().to_string());
    let merge = "stage.dpo.from={stage=\"sft\",adapters=\"merge\"}";
    let g = Folder::with(THREE_STAGES);
    let fresh = "stage.dpo.adapters=[{lora={rank=2,alpha=4,target=[\"language.layers.*.q_proj\"]}}]";
    let args: Vec<String> = [&start, merge, fresh, "stage.sft.adapters=[]", "defaults.max_steps=2"]
        .iter()
        .flat_map(|s| ["--set".to_string(), s.to_string()])
        .collect();
    let said = g.train(&args.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(said.stderr.contains("dpo: adapters merged; log-probabilities moved by at most "), "{}", said.stderr);
    let drift = std::fs::read_to_string(g.path("run/03-dpo/merge.json")).unwrap();
    let drift: serde_json::Value = serde_json::from_str(&drift).unwrap();
    let drift = drift["max_abs_logp_difference"].as_f64().unwrap();
    assert!(drift > 0.0 && drift < 1e-4, "{drift}");
    let trained = safetensors::load(&g.path("run/03-dpo/final/trained.safetensors")).unwrap();
    assert!(trained.keys().all(|n| !n.contains("magnitude")) && trained.keys().any(|n| n.ends_with("up_proj.weight")));
    let image = golden("images/exact0.png").display().to_string();
    g.ok(["generate", "--run", "run", "--image", &image, "--prompt", "What is it?", "--max-new-tokens", "4"]);
}

#[test]
fn flamingo() {
    let beside = [
        "model.deliver=\"cross_attention\"",
        "stage.align.max_steps=1",
        "stage.align.lr=1e-30",
        "stage.align.lr_scheduler={constant={}}",
    ];
    let align = format!("stage.align.adapters=[{}]", FLAMINGO.replace("every", "name=\"eyes\",every"));
    let mut more = beside.to_vec();
    more.push(&align);

    through(LORA, &more);
}

/// Gates, B and `up` begin at zero, one behind the other, and an epoch is a single step: what lies behind them has no gradient
/// before the fourth.
#[test]
fn zeros_behind_zeros_have_time_to_move() {
    let f = Folder::with(THREE_STAGES);
    let adapters = [
        FLAMINGO.replace("every", "name=\"gates\",every"),
        "{lora={name=\"tower\",rank=2,alpha=4,target=[\"vision.encoder.layers[0].*.q_proj\"]}}".to_string(),
    ];
    let adapters = format!("stage.align.adapters=[{}]", adapters.join(","));
    let set = [
        "model.deliver=\"cross_attention\"",
        "model.projector={bottleneck={dim=4}}",
        adapters.as_str(),
        "stage.align.batch={global=8,micro=4}",
        "stage.align.max_steps=5",
        "stage.align.eval=[]",
    ];
    let set: Vec<&str> = set.into_iter().flat_map(|s| ["--set", s]).collect();
    f.train(&[&["--stages", "align"], &set[..]].concat());
    let at = |name: &str| safetensors::load(&f.path("run/01-align/final").join(name)).unwrap();
    let zero = |t: &candle_core::Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap().iter().all(|x| *x == 0.0);
    let trained = at("trained.safetensors");
    for part in ["attn_gate", "up.weight", "lora_B.tower.weight"] {
        let (_, t) = trained.iter().find(|(n, _)| n.ends_with(part)).unwrap_or_else(|| panic!("{part}: {trained:?}"));
        assert!(!zero(t), "{part}");
    }
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
    let dora = LORA.replace("low", "dora").replace("rank", "dora=true,lr_ratio=4,rank");
    let set = set(&[BOTTLENECK, LORA, PREFIX, &dora].join(","), &["model.deliver=\"cross_attention\"", &align]);
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
    // No less so where nothing of the visual part trains; for text alone nobody has to look.
    let beside = "model.deliver=\"cross_attention\"";
    let norm = "stage.align.train=[\"language.norm.weight\"]";
    let blind = "stage.align: the data has pictures, but no cross_attention adapter reads the visual tokens";
    fails(LORA, &[beside, norm], &[blind, "model.deliver = \"splice\""]);
    f.fails(&["check", "recipe.toml", "--set", beside, "--set", norm], &[blind]);
    f.write("text.json", TEXT_ALONE);
    let text = |stage: &str| format!("stage.{stage}.data=[{{path=\"text.json\"}}]");
    fails(LORA, &[beside, norm, &text("align")], &["stage.sft: the data has pictures"]);
    let eyeless = [beside, norm, &text("align"), &text("sft")];
    fails(
        FLAMINGO,
        &eyeless,
        &[
            "stage.sft: it trains parameters that no gradient can reach",
            "cross_attention.sft.attn.norm.bias: no sample of this stage has a picture",
            "freeze = true",
        ],
    );
    fails("{bottleneck={dim=0,target=[\"*\"]}}", &[], &["adapters[0].bottleneck: dim = 0"]);
    fails("{bottleneck={dim=2,target=[\"language.layers.*.mpl\"]}}", &[], &["language.layers.*.mpl"]);
    fails("{prefix={tokens=0}}", &[], &["adapters[0].prefix: tokens = 0"]);
    let ratio = LORA.replace("rank", "lr_ratio=0.0,rank");
    fails(&ratio, &[], &["adapters[0].lora: lr_ratio = 0 is not a number above 0"]);
    let frozen = LORA.replace("rank", "lr_ratio=4,freeze=true,rank");
    fails(&frozen, &[], &["adapters[0].lora: lr_ratio = 4 for an adapter that stays as it is"]);
}
