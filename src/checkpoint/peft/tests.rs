use super::*;
use std::path::PathBuf;

fn golden(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/a").join(folder)
}

fn zeros(rows: usize, columns: usize) -> Tensor {
    Tensor::zeros((rows, columns), candle_core::DType::F32, &Device::Cpu).unwrap()
}

fn adapter(modules: &[(&str, usize)]) -> LoraAdapter {
    let pair = |(module, rank): &(&str, usize)| (module.to_string(), (zeros(*rank, 6), zeros(5, *rank)));
    LoraAdapter {
        name: "sft".into(),
        rank: 2,
        alpha: 8.0,
        alphas: BTreeMap::new(),
        rslora: false,
        dropout: 0.05,
        tensors: modules.iter().map(pair).collect(),
        magnitudes: BTreeMap::new(),
    }
}

/// Writes a folder with this configuration and keys, each A [2, 6], B [5, 2], a magnitude [5].
fn folder(dir: &Path, config: Value, keys: &[&str]) -> PathBuf {
    let shape = |key: &str| match key {
        k if k.contains("lora_A") => zeros(2, 6),
        k if k.contains("magnitude") => zeros(1, 5).squeeze(0).unwrap(),
        k if k.contains("prompt") => zeros(3, 6),
        _ => zeros(5, 2),
    };
    let tensors = keys.iter().map(|k| (k.to_string(), shape(k))).collect();
    safetensors::save(&dir.join("adapter_model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    std::fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    dir.to_path_buf()
}

#[test]
fn an_adapter_of_peft_round_trips_to_the_byte() {
    let adapter = LoraAdapter::load(&golden("lora_init"), "sft").unwrap();
    assert_eq!((adapter.rank, adapter.alpha, adapter.rslora, adapter.dropout), (4, 8.0, false, 0.0));
    assert_eq!((adapter.tensors.len(), adapter.scale("language.layers.0.mlp.up_proj")), (21, 2.0));
    let (a, b) = &adapter.tensors["language.layers.2.mlp.down_proj"];
    assert_eq!((a.dims(), b.dims()), ([4, 88].as_slice(), [32, 4].as_slice()));
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("adapter");
    adapter.save(&path, Base::Whole, Some("model")).unwrap();
    let bytes = |dir: &Path| std::fs::read(dir.join("adapter_model.safetensors")).unwrap();
    assert!(bytes(&path) == bytes(&golden("lora_init")));
    let again = LoraAdapter::load(&path, "sft").unwrap();
    assert_eq!((again.rank, again.alpha, again.tensors.len()), (4, 8.0, 21));
}

#[test]
fn every_spelling_of_a_key_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let read = |path: &str| {
        let keys = ["A", "B"].map(|half| format!("base_model.model.{path}.lora_{half}.weight"));
        let dir = folder(dir.path(), json!({ "r": 2 }), &[&keys[0], &keys[1]]);
        LoraAdapter::load(&dir, "x").unwrap().tensors.into_keys().next().unwrap()
    };
    let q = "language.layers.0.self_attn.q_proj";
    assert_eq!(read("model.language_model.layers.0.self_attn.q_proj"), q);
    assert_eq!(read("language_model.model.layers.0.self_attn.q_proj"), q);
    assert_eq!(read("model.layers.0.self_attn.q_proj"), q);
    assert_eq!(read("lm_head"), "language.lm_head");
    assert_eq!(read("language_model.lm_head"), "language.lm_head");
    let fc1 = "vision.encoder.layers.1.mlp.fc1";
    assert_eq!(read("model.vision_tower.encoder.layers.1.mlp.fc1"), fc1);
    assert_eq!(read("model.vision_tower.vision_model.encoder.layers.1.mlp.fc1"), fc1);
    assert_eq!(read("vision_tower.vision_model.encoder.layers.1.mlp.fc1"), fc1);
    assert_eq!(read("vision_model.encoder.layers.1.mlp.fc1"), fc1);
    assert_eq!(read("model.multi_modal_projector.linear_1"), "projector.linear_1");
}

#[test]
fn ranks_and_alphas_by_module_round_trip() {
    let mut written = adapter(&[("language.layers.0.mlp.up_proj", 2), ("language.layers.1.mlp.up_proj", 4)]);
    written.rslora = true;
    written.alphas = BTreeMap::from([("language.layers.1.mlp.up_proj".to_string(), 12.5)]);
    let dir = tempfile::tempdir().unwrap();
    written.save(&dir.path().join("a"), Base::Language, None).unwrap();
    let read = LoraAdapter::load(&dir.path().join("a"), "sft").unwrap();
    assert_eq!((read.rank, read.alpha, read.dropout, &read.alphas), (2, 8.0, 0.05, &written.alphas));
    assert_eq!(read.scale("language.layers.0.mlp.up_proj"), 8.0 / 2f64.sqrt());
    assert_eq!(read.scale("language.layers.1.mlp.up_proj"), 12.5 / 2.0);
}

#[test]
fn of_entries_that_fit_the_first_in_the_file_counts() {
    let (short, long) = ("q_proj", "layers.0.self_attn.q_proj");
    let scales = |entries: [(&str, i64); 2]| {
        let dir = tempfile::tempdir().unwrap();
        let [q, other] = [0, 1].map(|i| format!("language.layers.{i}.self_attn.q_proj"));
        let keys: Vec<String> = [0, 1]
            .into_iter()
            .flat_map(|i| {
                ["A", "B"].map(|m| format!("base_model.model.model.layers.{i}.self_attn.q_proj.lora_{m}.weight"))
            })
            .collect();
        let alphas: serde_json::Map<_, _> = entries.into_iter().map(|(k, v)| (k.to_string(), json!(v))).collect();
        let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
        let dir = folder(dir.path(), json!({ "r": 2, "lora_alpha": 8, "alpha_pattern": alphas }), &keys);
        let read = LoraAdapter::load(&dir, "x").unwrap();
        [read.scale(&q), read.scale(&other)]
    };
    assert_eq!(scales([(short, 32), (long, 64)]), [16.0, 16.0]);
    assert_eq!(scales([(long, 64), (short, 32)]), [32.0, 16.0]);
}

#[test]
fn patterns_of_target_modules() {
    let modules = |list: &[&str], base| target_modules(list.iter().copied(), base);
    let both = [
        "language.layers.0.mlp.up_proj",
        "language.layers.10.mlp.up_proj",
        "language.layers.0.self_attn.q_proj",
        "language.layers.10.self_attn.q_proj",
    ];
    assert_eq!(
        modules(&both, Base::Whole),
        r"(.*\.)?language_model\.(model\.)?layers\.(0|10)\.(mlp\.up_proj|self_attn\.q_proj)"
    );
    assert_eq!(modules(&both[..1], Base::Language), r"(model\.)?layers\.(0)\.(mlp\.up_proj)");
    let mixed = ["language.lm_head", "projector.linear_1", "vision.encoder.layers.3.mlp.fc1"];
    assert_eq!(
        modules(&mixed, Base::Whole),
        r"(.*\.)?lm_head|(.*\.)?multi_modal_projector\.linear_1|(.*\.)?vision_tower\.(vision_model\.)?encoder\.layers\.(3)\.(mlp\.fc1)"
    );
}

#[test]
fn what_would_change_the_result_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let q = [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight",
    ];
    let report =
        |config: Value, keys: &[&str]| LoraAdapter::load(&folder(dir.path(), config, keys), "x").unwrap_err().report();
    let config = |key: &str, value: Value| report(json!({ "r": 2, key: value }), &q);
    assert!(config("bias", json!("all")).contains("`bias` is all"));
    let magnitude = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector";
    let three = [q[0], q[1], magnitude];
    assert!(
        config("use_dora", json!(true)).contains("`use_dora` is true, but `model.layers.0.self_attn.q_proj` has no")
    );
    assert!(report(json!({ "r": 2 }), &three).contains("has a magnitude, but `use_dora` is false"));
    assert!(report(json!({ "r": 2, "use_dora": true }), &three[1..]).contains("has only one of lora_A and lora_B"));
    for magnitude in [magnitude.to_string(), format!("{magnitude}.default.weight")] {
        let dir = folder(dir.path(), json!({ "r": 2, "use_dora": true }), &[q[0], q[1], &magnitude]);
        let read = LoraAdapter::load(&dir, "x").unwrap();
        assert_eq!(read.magnitudes["language.layers.0.self_attn.q_proj"].dims(), [5], "{magnitude}");
    }
    assert!(config("lora_bias", json!(true)).contains("`lora_bias` is true, which is not supported\n\nhint: merge"));
    assert!(config("modules_to_save", json!(["lm_head"])).contains(r#"`modules_to_save` is ["lm_head"]"#));
    assert!(config("peft_type", json!("IA3")).contains("`peft_type` is IA3"));
    assert!(config("init_lora_weights", json!("pissa")).contains("also changes the base model"));
    assert!(config("r", json!(4)).contains("has rank 2, the configuration says 4"));
    assert!(config("rank_pattern", json!({ "q_pro(j)?": 4 })).contains("`rank_pattern` has the entry"));
    assert!(report(json!({ "r": 2 }), &q[..1]).contains("has only one of lora_A and lora_B"));
    let strange = report(json!({ "r": 2 }), &["base_model.model.model.embed_tokens.lora_embedding_A"]);
    assert!(strange.contains("is no part of a LoRA on a linear layer"), "{strange}");
    assert!(
        adapter(&[("vision.encoder.layers.0.mlp.fc1", 2)]).save(&dir.path().join("x"), Base::Language, None).is_err()
    );
}

#[test]
fn soft_tokens_that_are_not_what_they_say() {
    let dir = tempfile::tempdir().unwrap();
    let read = |config: Value, keys: &[&str]| load(&folder(dir.path(), config, keys), "x");
    let config = |tokens: usize| json!({ "peft_type": "PROMPT_TUNING", "num_virtual_tokens": tokens });
    let Loaded::Prompt(soft) = read(config(3), &["prompt_embeddings"]).unwrap() else { panic!("a LoRA") };
    assert_eq!(soft.dims(), [3, 6]);
    let e = read(config(4), &["prompt_embeddings"]).unwrap_err().report();
    assert!(e.contains("`prompt_embeddings` is [3, 6], the configuration says 4 tokens"), "{e}");
    let e = read(config(3), &["prompt_embeddings", "base_model.prompt"]).unwrap_err().report();
    assert!(e.contains("`base_model.prompt` is no part of prompt tuning"), "{e}");
    let twice = json!({ "peft_type": "PROMPT_TUNING", "num_transformer_submodules": 2 });
    assert!(read(twice, &["prompt_embeddings"]).unwrap_err().report().contains("`num_transformer_submodules` is 2"));
    assert!(read(json!({ "peft_type": "IA3" }), &["x"]).unwrap_err().report().contains("only LORA and PROMPT_TUNING"));
}
