//! Language models, whole VLMs and adapters of others, in every spelling that changes numbers.

use super::folder::{CONSTANT, Folder, THREE_STAGES, golden};
use adfreeze::checkpoint::peft::{Base, LoraAdapter};
use adfreeze::checkpoint::safetensors;
use candle_core::{Device, Tensor};
use serde_json::Value;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// An input of a known fault.
fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name)
}

fn text(path: &Path) -> String {
    path.display().to_string()
}

/// What `score` says of a model: mean loss of each sample, and stderr.
fn score(f: &Folder, model: &Path, data: &Path, more: &[&str]) -> (Vec<f64>, String) {
    let (model, data, images) = (text(model), text(data), text(&golden("images")));
    let out = f.path("scores.jsonl");
    _ = fs::remove_file(&out);
    let fixed = ["score", "--model", &model, "--data", &data, "--images", &images, "--out", "scores.jsonl"];
    let said = f.ok(fixed.iter().chain(more));
    let lines = fs::read_to_string(out).unwrap();
    let loss = |l: &str| serde_json::from_str::<Value>(l).unwrap()["loss"].as_f64().unwrap();
    (lines.lines().map(loss).collect(), said.stderr)
}

/// Changes a JSON file of a model's folder.
fn edit(path: &Path, change: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    change(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

fn near(a: &[f64], b: &[f64]) {
    assert!(a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 2e-5), "{a:?} {b:?}");
}

const HEAD: &str = "language_model.lm_head.weight";
const EMBEDDINGS: &str = "language_model.model.embed_tokens.weight";

/// Values of transformers 5.23: a head that differs from the embeddings stays although the configuration ties them.
#[test]
fn a_head_of_its_own_beside_tied_embeddings() {
    let (f, at) = (Folder::with(THREE_STAGES), case("03-tied-flag-own-head"));
    let data = at.join("data.json");
    let tied = |name: &str, change: fn(&mut BTreeMap<String, Tensor>)| {
        let dir = f.model(name, change);
        fs::copy(at.join("config.json"), dir.join("config.json")).unwrap();
        dir
    };
    let own = tied("own", |_| ());
    let (losses, said) = score(&f, &own, &data, &[]);
    near(&losses, &[6.918_279]);
    near(&losses, &score(&f, &golden("model"), &data, &[]).0);
    assert!(
        said.contains("warning") && said.contains("own: `tie_word_embeddings` is true") && said.contains(HEAD),
        "{said}"
    );
    // An equal head, none, and a head without embeddings are one and the same model.
    let equal = tied("equal", |t| _ = t.insert(HEAD.into(), t[EMBEDDINGS].clone()));
    let (equal, said) = score(&f, &equal, &data, &[]);
    assert!(!said.contains("tie_word_embeddings"), "{said}");
    near(&equal, &[10.950_942]);
    near(&equal, &score(&f, &tied("none", |t| _ = t.remove(HEAD)), &data, &[]).0);
    let alone = tied("alone", |t| {
        let embeddings = t.remove(EMBEDDINGS).unwrap();
        t.insert(HEAD.into(), embeddings);
    });
    near(&equal, &score(&f, &alone, &data, &[]).0);
    // What is trained from there is exported with its head.
    let source = format!("model.source={:?}", text(&own));
    let set = [
        source.as_str(),
        "stage.align.train=[\"language.norm.weight\"]",
        "defaults.max_steps=1",
        CONSTANT,
        "stage.align.eval=[]",
    ];
    let set: Vec<&str> = set.into_iter().flat_map(|s| ["--set", s]).collect();
    f.train(&[&["--stages", "align"], &set[..]].concat());
    let out = f.path("run/01-align/final/language");
    let config: Value = serde_json::from_slice(&fs::read(out.join("config.json")).unwrap()).unwrap();
    assert_eq!(config["tie_word_embeddings"], false);
    assert!(safetensors::load(&out.join("model.safetensors")).unwrap().contains_key("lm_head.weight"));
}

#[test]
fn end_tokens_of_generation_config() {
    let f = Folder::new();
    let dir = f.model("ends", |_| ());
    let ask = ["generate", "--model", "ends", "--prompt", "Name two colours.", "--max-new-tokens", "24"];
    let long = f.ok(ask).stdout;
    fs::copy(case("05-generation-config-eos/generation_config.json"), dir.join("generation_config.json")).unwrap();
    let short = f.ok(ask);
    assert_eq!(short.stdout, "angle\n");
    assert!(long.starts_with("angle d") && !short.stderr.contains("warning"), "{long:?} {}", short.stderr);
    edit(&dir.join("generation_config.json"), |c| c["repetition_penalty"] = 1.2.into());
    let said = f.ok(ask).stderr;
    assert!(said.contains("repetition_penalty = 1.2, which is not built"), "{said}");
    fs::write(dir.join("generation_config.json"), "{ \"eos_token_id\": ").unwrap();
    f.fails(&ask, &["ends/generation_config.json: ", "get the file again"]);
}

/// The projector that LLaVA's own code trains beside a LoRA. Values of that code's projector under transformers.
#[test]
fn the_projector_beside_a_lora_of_the_original_code() {
    let f = Folder::with(THREE_STAGES);
    let dir = f.path("llava");
    fs::create_dir(&dir).unwrap();
    for name in ["adapter_config.json", "adapter_model.safetensors"] {
        fs::copy(golden("train_sft_lora_final").join(name), dir.join(name)).unwrap();
    }
    let beside = case("08-llava-lora-folder/non_lora_trainables.bin");
    fs::copy(&beside, dir.join("non_lora_trainables.bin")).unwrap();
    let (losses, said) = score(&f, &golden("model"), &golden("data/sft.json"), &["--adapter", "llava"]);
    near(&losses[..2], &[4.397_889, 5.118_494]);
    assert!(!said.contains("warning"), "{said}");
    // It is a start for training, shown among the sources and watched for changes.
    let adapter = format!("model.adapter={:?}", text(&dir));
    let set = [adapter.as_str(), "stage.sft.adapters=[]", "defaults.max_steps=1", "stage.align.eval=[]", CONSTANT];
    let set: Vec<&str> = set.into_iter().flat_map(|s| ["--set", s]).collect();
    let shown = f.ok(["check", "recipe.toml"].iter().chain(&set)).stdout;
    assert!(shown.contains("model.adapter, projector"), "{shown}");
    f.train(&[&["--stages", "align"], &set[..]].concat());
    assert!(fs::read_to_string(f.path("run/inputs.json")).unwrap().contains("non_lora_trainables.bin"));
    // The file alone is a projector.
    let source = format!("model.projector={{mlp={{source={:?}}}}}", text(&beside));
    f.ok(["check", "recipe.toml", "--set", &source]);
    // Anything else is not left out without a word.
    fs::copy(golden("../bin/single/pytorch_model.bin"), dir.join("non_lora_trainables.bin")).unwrap();
    f.fails(
        &["check", "recipe.toml", "--set", &adapter],
        &["non_lora_trainables.bin: `", "no part of a projector", "merge_lora"],
    );
}

/// The folder of LLaVA's own code holds language model and projector; the tower is elsewhere.
#[test]
fn a_whole_model_of_the_original_code() {
    let f = Folder::with(THREE_STAGES);
    let dir = f.path("original");
    fs::create_dir(&dir).unwrap();
    let language = golden("language");
    for entry in fs::read_dir(&language).unwrap() {
        let from = entry.unwrap().path();
        fs::copy(&from, dir.join(from.file_name().unwrap())).unwrap();
    }
    let mut tensors = safetensors::load(&language.join("model.safetensors")).unwrap();
    for (name, t) in safetensors::load(&golden("projector_init.safetensors")).unwrap() {
        let name = name.replace("multi_modal_projector.linear_1", "model.mm_projector.0");
        tensors.insert(name.replace("multi_modal_projector.linear_2", "model.mm_projector.2"), t);
    }
    safetensors::save(&dir.join("model.safetensors"), &tensors, &BTreeMap::new()).unwrap();
    edit(&dir.join("config.json"), |c| {
        c["model_type"] = "llava_llama".into();
        c["architectures"] = serde_json::json!(["LlavaLlamaForCausalLM"]);
        c["mm_vision_tower"] = "openai/clip".into();
    });
    let hint =
        ["`model_type` is llava_llama", "as model.language.source and as model.projector.mlp.source", "openai/clip"];
    let data = text(&golden("data/sft.json"));
    f.fails(&["score", "--model", "original", "--data", &data, "--out", "s"], &hint);
    let (whole, vision) = (text(&dir), text(&golden("vision")));
    let parts = [
        format!("model.language={{source={whole:?}}}"),
        format!("model.projector={{mlp={{source={whole:?}}}}}"),
        format!("model.vision={{source={vision:?}}}"),
    ];
    let recipe = THREE_STAGES.replace("source = \"${GOLDEN}/model\"\n", "");
    f.write("parts.toml", &recipe);
    let args: Vec<&str> = parts.iter().flat_map(|p| ["--set", p.as_str()]).collect();
    f.ok(["check", "parts.toml"].iter().chain(&args));
    let training = ["--stages", "align", "--set", "defaults.max_steps=1", "--set", CONSTANT];
    let whole = f.train(&training).stderr;
    let loss = |f: &Folder| f.metrics()[0]["loss"].as_f64().unwrap();
    let one = loss(&f);
    fs::remove_dir_all(f.path("run")).unwrap();
    f.ok(["train", "parts.toml"].iter().chain(&training).chain(&args));
    assert!((loss(&f) - one).abs() < 1e-9, "{whole}");
}

/// A slice of a wider matrix, as `torch.load` reads it.
#[test]
fn a_slice_in_a_pytorch_file() {
    let file = case("18-slice-in-a-pytorch-file/mm_projector.bin");
    let f = Folder::with(THREE_STAGES);
    let source = format!("model.projector={{mlp={{source={:?}}}}}", text(&file));
    f.ok(["check", "recipe.toml", "--set", &source]);
    let found = adfreeze::model::weights::Tensors::open_file(&file).unwrap();
    let want = safetensors::load(&golden("train_sft_lora_final/projector.safetensors")).unwrap();
    for (i, part) in [("0", "linear_1"), ("2", "linear_2")] {
        let got = found.load(&format!("model.mm_projector.{i}.weight"), &Device::Cpu).unwrap();
        let values = |t: &Tensor| t.to_vec2::<f32>().unwrap();
        assert_eq!(values(&got), values(&want[&format!("multi_modal_projector.{part}.weight")]));
    }
}

#[test]
fn models_of_another_kind_are_called_what_they_are() {
    let f = Folder::with(THREE_STAGES);
    let dir = f.model("other", |_| ());
    let (data, images, other) = (text(&golden("data/sft.json")), text(&golden("images")), text(&dir));
    let ask = ["score", "--model", "other", "--data", &data, "--images", &images, "--out", "s.jsonl"];
    for (kind, class) in
        [("idefics3", "Idefics3ForConditionalGeneration"), ("qwen2_vl", "Qwen2VLForConditionalGeneration")]
    {
        edit(&dir.join("config.json"), |c| (c["model_type"], c["architectures"]) = (kind.into(), vec![class].into()));
        let parts = [format!("`model_type` is {kind} ({class}): a whole vision-language model"), "llava_next".into()];
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        f.fails(&ask, &parts);
        for key in ["model.source", "model.language.source", "model.vision.source"] {
            f.fails(&["check", "recipe.toml", "--set", &format!("{key}={other:?}")], &parts);
        }
    }
    // Code of a folder's own is named, and refused where the class is none that is built.
    edit(&dir.join("config.json"), |c| {
        (c["model_type"], c["architectures"]) = ("llava".into(), vec!["LlavaForConditionalGeneration"].into());
        c["auto_map"] = serde_json::json!({ "AutoModel": "modeling_own.OwnModel" });
    });
    let said = f.ok(ask).stderr;
    assert!(
        said.contains("`auto_map` names code of the model's own (modeling_own.OwnModel), which is not run"),
        "{said}"
    );
    edit(&dir.join("config.json"), |c| c["architectures"] = vec!["OwnModel"].into());
    f.fails(&ask, &["`architectures` is OwnModel", "modeling_own.OwnModel", "never run"]);
}

/// Not files: neither waited for nor mapped.
#[cfg(unix)]
#[test]
fn a_pipe_or_a_folder_in_place_of_a_file() {
    let f = Folder::new();
    let data = text(&golden("data/sft.json"));
    for (name, file) in [("weights", "model.safetensors"), ("config", "config.json")] {
        let path = f.model(name, |_| ()).join(file);
        let ask = ["score", "--model", name, "--data", &data, "--out", "s.jsonl"];
        fs::remove_file(&path).unwrap();
        fs::create_dir(&path).unwrap();
        f.fails(&ask, &[file, "is a folder, not a file"]);
        fs::remove_dir(&path).unwrap();
        assert!(f.command("mkfifo").arg(&path).status().unwrap().success());
        f.fails(&ask, &[file, "is a pipe or a device, not a file"]);
    }
}

/// processor_config.json comes first, as in transformers 5; where the two do not agree, it is said.
#[test]
fn the_two_files_of_a_picture_processor() {
    let f = Folder::new();
    let (dir, data) = (f.model("both", |_| ()), golden("data/sft.json"));
    let (processor, preprocessor) = (dir.join("processor_config.json"), dir.join("preprocessor_config.json"));
    let mut half: Value = serde_json::from_slice(&fs::read(&preprocessor).unwrap()).unwrap();
    half["image_mean"] = serde_json::json!([0.5, 0.5, 0.5]);
    edit(&processor, |c| c["image_processor"] = half.clone());
    let (both, said) = score(&f, &dir, &data, &[]);
    assert!(said.contains("processor_config.json and ") && said.contains("ask for different pictures"), "{said}");
    edit(&processor, |c| _ = c.as_object_mut().unwrap().remove("image_processor"));
    let (old, said) = score(&f, &dir, &data, &[]);
    assert!(!said.contains("ask for different"), "{said}");
    fs::write(&preprocessor, half.to_string()).unwrap();
    let (alone, _) = score(&f, &dir, &data, &[]);
    assert!(both == alone && both != old, "{both:?} {alone:?} {old:?}");
}

#[test]
fn beyond_the_positions() {
    let f = Folder::with(THREE_STAGES);
    let dir = f.model("short", |_| ());
    edit(&dir.join("config.json"), |c| c["text_config"]["max_position_embeddings"] = 60.into());
    // The limit of a model is its positions, not a number of ours; more is an order.
    let data = text(&golden("data/sft.json"));
    let images = text(&golden("images"));
    let ask = ["score", "--model", "short", "--data", &data, "--images", &images, "--out", "o"];
    f.fails(&ask, &["tokens are more than max_seq_len = 60", "raise --max-seq-len"]);
    let (_, said) = score(&f, &dir, &golden("data/sft.json"), &["--max-seq-len", "400"]);
    assert!(said.contains("samples are longer than the 60 positions") && !said.contains("model.max_seq_len"), "{said}");
    edit(&dir.join("config.json"), |c| c["text_config"]["max_position_embeddings"] = 3000.into());
    let answer = "cat ".repeat(1050);
    let turns = format!(r#"[{{"from": "human", "value": "What?"}}, {{"from": "gpt", "value": "{answer}"}}]"#);
    let many = f.write("many.json", &format!(r#"[{{"id": "a", "conversations": {turns}}}]"#));
    score(&f, &dir, &many, &[]);
    let many = text(&many);
    f.ok(["data", "show", "--model", "short", "--data", &many]);
    f.fails(
        &["data", "show", "--model", "short", "--data", &many, "--max-seq-len", "99"],
        &["max_seq_len = 99", "--max-seq-len"],
    );
    edit(&dir.join("config.json"), |c| c["text_config"]["max_position_embeddings"] = 60.into());

    let long = "cat ".repeat(100);
    f.fails(
        &["generate", "--model", "short", "--prompt", &long],
        &["positions, and the language model has 60 (max_position", "--max-seq-len"],
    );
    let say = |prompt: &str, limit: &str| {
        f.ok(["generate", "--model", "short", "--prompt", prompt, "--max-seq-len", limit, "--max-new-tokens", "1000"])
            .stderr
    };
    let said = say(&long, "400");
    assert!(said.contains("beyond the 60 positions"), "{said}");
    let said = say("What?", "55");
    assert!(said.contains("ends here because of --max-seq-len 55"), "{said}");
    f.fails(
        &["generate", "--model", "short", "--prompt", &long, "--max-seq-len", "70"],
        &["--max-seq-len 70 leaves none", "raise --max-seq-len"],
    );
    let said = f.ok(["generate", "--model", "short", "--prompt", "What?", "--max-new-tokens", "1000000"]);
    assert!(said.stderr.contains("ends here because the language model has 60 positions"), "{}", said.stderr);
    let source = format!("model.source={:?}", text(&dir));
    let said = f.ok(["check", "recipe.toml", "--set", &source]).stderr;
    assert!(said.contains("stage.sft: ") && said.contains("longer than the 60 positions"), "{said}");
}

/// A LoRA of PEFT on the whole tower lies on layers above the one whose features are taken, too: the others train on.
#[test]
fn an_adapter_on_layers_that_are_never_computed() {
    let f = Folder::with(THREE_STAGES);
    let random = |seed: f32, shape: (usize, usize)| {
        let values: Vec<f32> = (0..shape.0 * shape.1).map(|i| ((i as f32 + seed) * 0.7).sin() * 0.1).collect();
        Tensor::from_vec(values, shape, &Device::Cpu).unwrap()
    };
    let modules = ["vision.encoder.layers.0", "vision.encoder.layers.2", "language.layers.1"];
    let module = |(i, m): (usize, &&str)| {
        (format!("{m}.self_attn.q_proj"), (random(i as f32, (2, 32)), random(9.0 + i as f32, (32, 2))))
    };
    let adapter = LoraAdapter {
        name: "start".into(),
        rank: 2,
        alpha: 4.0,
        alphas: BTreeMap::new(),
        rslora: false,
        dropout: 0.0,
        tensors: modules.iter().enumerate().map(module).collect(),
        magnitudes: BTreeMap::new(),
    };
    adapter.save(&f.path("peft"), Base::Whole, None).unwrap();
    let set = ["model.adapter=\"peft\"", "stage.sft.adapters=[]", "defaults.max_steps=2", "stage.align.train=[]"];
    let set: Vec<&str> = set.into_iter().flat_map(|s| ["--set", s]).collect();
    let said = f.train(&[&["--stages", "align"], &set[..]].concat()).stderr;
    assert!(
        said.contains("model.adapter: 1 of its 3 modules (vision.encoder.layers.2.self_attn.q_proj, …) lie above"),
        "{said}"
    );
    let out = f.path("run/01-align/final/adapters/start");
    let (before, after) = (&f.path("peft/adapter_model.safetensors"), &out.join("adapter_model.safetensors"));
    let (before, after) = (safetensors::load(before).unwrap(), safetensors::load(after).unwrap());
    for (name, t) in &before {
        let values = |t: &Tensor| t.flatten_all().unwrap().to_vec1::<f32>().unwrap();
        assert_eq!(values(t) == values(&after[name]), name.contains("encoder.layers.2"), "{name}");
    }
    let config: Value = serde_json::from_slice(&fs::read(out.join("adapter_config.json")).unwrap()).unwrap();
    assert_eq!(config["base_model_name_or_path"], text(&golden("model")));
}
