//! Input that is made to hurt: memory and time stay bounded, and what is wrong is told.

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
