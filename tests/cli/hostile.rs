//! Input that is made to hurt: memory and time stay bounded, and what is wrong is told.

/// Chat templates and tokenizers.
mod templates {
    use super::super::folder::Folder;
    use serde_json::{Value, json};
    use std::fs;
    use std::time::{Duration, Instant};

    /// The golden model with another chat template, and samples of `turns` turns.
    fn with(template: &str, turns: usize) -> Folder {
        let f = Folder::new();
        f.model("model", |_| ());
        f.write("model/chat_template.jinja", template);
        let turn = |i: usize| json!({"from": ["human", "gpt"][i % 2], "value": "a".repeat(50)});
        let talk: Vec<Value> = (0..turns).map(turn).collect();
        f.write("d.json", &json!([{"conversations": talk}, {"conversations": talk}]).to_string());
        f
    }

    fn tokenizer(change: impl FnOnce(&mut Value)) -> Folder {
        let f = with("", 2);
        let path = f.path("model/tokenizer.json");
        let mut value: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        change(&mut value);
        fs::write(path, value.to_string()).unwrap();
        f
    }

    /// The command must end with this error, in bounded time.
    #[track_caller]
    fn refused(f: &Folder, template: &str, parts: &[&str]) {
        let begin = Instant::now();
        let args = ["score", "--model", "model", "--data", "d.json", "--out", "o", "--template", template];
        let said = f.fails(&args, parts);
        assert!(begin.elapsed() < Duration::from_secs(20), "{:?}: {said}", begin.elapsed());
    }

    const ENDLESS: &str = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}{% endfor %}{{ messages[0].content }}";

    #[test]
    fn chat_templates_come_to_an_end() {
        refused(&with(ENDLESS, 2), "chat", &["does not come to an end"]);
        let doubling = "{% set ns = namespace(s='x') %}{% for a in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ messages[0].content }}";
        refused(&with(doubling, 2), "chat", &["writes without bound"]);
        let itself = "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}{{ messages[0].content }}";
        refused(&with(itself, 2), "chat", &["recursion limit"]);
        let long = "{{ 'x' * 9000000 }}{{ messages[0].content }}";
        refused(&with(long, 2), "chat", &["the chat template makes 9000"]);
        let nested = format!("{}{}", "{% if true %}".repeat(100_000), "{% endif %}".repeat(100_000));
        refused(&with(&nested, 2), "chat", &["recursion limits"]);
    }

    #[test]
    fn a_chat_template_that_is_not_used_does_no_harm() {
        with(ENDLESS, 2).ok(["score", "--model", "model", "--data", "d.json", "--out", "o"]);
    }

    #[test]
    fn many_turns_take_linear_time() {
        let chatml = "{% for m in messages %}{{ '<s>' + m.role + m.content + '</s>' }}{% endfor %}{% if add_generation_prompt %}{{ '<s>assistant' }}{% endif %}";
        // They do not fit; rendering and encoding them is what takes time.
        refused(&with(chatml, 20_000), "chat", &["max_seq_len"]);
    }

    #[test]
    fn patterns_that_backtrack_without_end_are_an_error() {
        let split =
            |r: &str| json!({"type": "Split", "pattern": {"Regex": r}, "behavior": "Isolated", "invert": false});
        refused(&tokenizer(|t| t["pre_tokenizer"] = split("(a+)+b")), "vicuna_v1", &["tries too many ways"]);
        let replace = json!({"type": "Replace", "pattern": {"Regex": "(a|aa)+$b"}, "content": ""});
        refused(&tokenizer(|t| t["normalizer"] = replace), "vicuna_v1", &["tries too many ways"]);
    }

    #[test]
    fn normalizers_that_make_a_text_grow_are_an_error() {
        let prepend = json!({"type": "Prepend", "prepend": "a".repeat(1 << 20)});
        refused(&tokenizer(|t| t["normalizer"] = prepend), "vicuna_v1", &["tokenizer.json", "in front of every text"]);
        let replace = json!({"type": "Replace", "pattern": {"String": "a"}, "content": "a".repeat(1000)});
        let all = json!({"type": "Sequence", "normalizers": vec![replace; 4]});
        refused(&tokenizer(|t| t["normalizer"] = all), "vicuna_v1", &["normalizer can make"]);
    }

    #[test]
    fn a_text_that_cannot_fit_is_not_encoded() {
        let f = with("", 2);
        let long = json!([{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "ab ".repeat(3 << 20)}]}]);
        f.write("d.json", &long.to_string());
        refused(&f, "vicuna_v1", &["bytes of text", "max_seq_len"]);
    }
}

/// Numbers of a recipe and of a model's configuration that would allocate or loop without bound.
mod recipes {
    use crate::cli::folder::{Folder, THREE_STAGES, golden};
    use serde_json::{Value, json};
    use std::fs;
    use std::process::Command;

    #[test]
    fn what_has_no_end_is_no_recipe() {
        let f = Folder::with(THREE_STAGES);
        assert!(Command::new("mkfifo").arg(f.path("fifo.toml")).status().unwrap().success());
        fs::File::create(f.path("sparse.toml")).unwrap().set_len(20 << 30).unwrap();
        for (base, what) in [
            ("/dev/zero", "it is no file but a pipe or a device"),
            ("fifo.toml", "it is no file but a pipe or a device"),
            ("sparse.toml", "it is larger than 16 MiB"),
            (".", "it is a folder"),
        ] {
            f.write("top.toml", &format!("extends = '{base}'\n{THREE_STAGES}"));
            f.fails(&["check", "top.toml"], &[base, what, "top.toml extends it"]);
        }
        f.fails(&["check", "/dev/zero"], &["/dev/zero: the recipe cannot be read: it is no file"]);
    }

    /// A message is to be read, however long the line is that it is about.
    #[test]
    fn messages_about_long_lines_are_short() {
        let f = Folder::with(&format!("x = {}{}\n{THREE_STAGES}", "[".repeat(100_000), "]".repeat(100_000)));
        assert!(f.fails(&["check", "recipe.toml"], &["not valid TOML"]).len() < 2000);
        let braces = format!("stage.align.train=['{}']", "{a,b}".repeat(5000));
        let f = Folder::with(THREE_STAGES);
        let said =
            f.fails(&["check", "recipe.toml", "--set", &braces], &["stage.align", "25000 characters and 5000 braces"]);
        assert!(said.len() < 1000, "{said}");
    }

    #[test]
    fn numbers_that_no_machine_can_follow() {
        let f = Folder::with(THREE_STAGES);
        for (set, parts) in [
            (
                "defaults.batch.global=4611686018427387904",
                ["stage.align.batch.global = 4611686018427387904", "alone takes 36893488147.4 GB"],
            ),
            (
                "defaults.max_steps=4611686018427387904",
                ["stage.align.max_steps = 4611686018427387904", "at most 1000000000"],
            ),
            ("stage.sft.epochs=1e300", ["stage.sft: epochs = 1e300", "is more than 1000000"]),
            (
                "defaults.checkpoint.keep=4611686018427387904",
                ["checkpoint.keep = 4611686018427387904", "at most 2147483647"],
            ),
            (
                "stage.sft.adapters[0].lora.rank=4611686018427387904",
                ["stage.sft.adapters[0].lora.rank", "at most 2147483647"],
            ),
            ("stage.sft.adapters[0].lora.alpha=1e300", ["alpha = 1e300", "once or twice the rank"]),
            ("stage.align.image_size=999992", ["stage.align.image_size = 999992", "at most 8192"]),
            ("eval.captions.micro=4611686018427387904", ["eval.captions.micro", "at most 65536"]),
            ("model.projector={ mlp = { depth = 1000000 } }", ["model.projector.mlp.depth = 1000000", "at most 1000"]),
        ] {
            f.fails(&["check", "recipe.toml", "--set", set], &parts);
        }
    }

    /// Sizes whose product cannot be held are refused where the parameter would be made, with its bytes.
    #[test]
    fn a_parameter_that_cannot_be_held_is_told_in_bytes() {
        let f = Folder::with(THREE_STAGES);
        let huge = "stage.sft.adapters=[{ cross_attention = { heads = 2147483647, head_dim = 2147483647 } }]";
        let sets = ["--set", "model.deliver=cross_attention", "--set", huge, "--set", "stages=['sft']"];

        let recipe = fs::read_to_string(f.path("recipe.toml")).unwrap();
        let (head, rest) = recipe.split_once("[stage.align]").unwrap();
        let (sft, eval) = (
            rest.split_once("[stage.sft]").unwrap().1.split_once("[stage.dpo]").unwrap().0,
            rest.split_once("[eval.captions]").unwrap().1,
        );
        f.write("recipe.toml", &format!("{head}[stage.sft]{sft}[eval.captions]{eval}"));
        f.fails(
            &["check", "recipe.toml"].iter().chain(&sets).copied().collect::<Vec<_>>(),
            &["GB of memory, and", "GB are free"],
        );
    }

    #[test]
    fn a_configuration_that_no_model_has() {
        let f = Folder::with(&THREE_STAGES.replace("${GOLDEN}/model", "model"));
        fs::create_dir(f.path("model")).unwrap();
        for entry in fs::read_dir(golden("model")).unwrap() {
            let path = entry.unwrap().path();
            fs::copy(&path, f.path("model").join(path.file_name().unwrap())).unwrap();
        }
        let refused = |file: &str, keys: &[&str], value: Value, part: &str| {
            let path = f.path("model").join(file);
            let good = fs::read_to_string(&path).unwrap();
            let mut json: Value = serde_json::from_str(&good).unwrap();
            *keys.iter().fold(&mut json, |at, key| &mut at[*key]) = value;
            fs::write(&path, json.to_string()).unwrap();
            f.fails(&["check", "recipe.toml"], &[keys.last().unwrap(), part]);
            fs::write(&path, good).unwrap();
        };
        let text = |key, value, part| refused("config.json", &["text_config", key], value, part);
        text("num_hidden_layers", json!(1_000_000_000), "more layers than any model has");
        text("vocab_size", json!(1u64 << 62), "more than any model has");
        text("rms_norm_eps", json!(-1), "a number from 0 on, not -1");
        let vision = |key, value, part| refused("config.json", &["vision_config", key], value, part);
        vision("num_hidden_layers", json!(1u64 << 62), "more than any model has");
        vision("image_size", json!(999_992), "up to 8192");
        vision("layer_norm_eps", json!(-1e-5), "a number from 0 on, not -1e-5");
        let processor = |key, value, part| refused("preprocessor_config.json", &[key], value, part);
        processor("size", json!({ "shortest_edge": 1_000_000_000 }), "takes 12000000000.0 GB");
        processor("image_std", json!([0, 0.3, 0.3]), "three numbers above 0");
    }
}
