//! Input that is made to hurt: memory and time stay bounded, and what is wrong is told.

/// Chat templates and tokenizers.
mod templates {
    use super::super::folder::{Folder, golden};
    use serde_json::{Value, json};
    use std::fs;
    use std::process::Command;
    use std::time::{Duration, Instant};

    /// The golden model with another chat template, and samples of `turns` turns.
    fn with(template: &str, turns: usize) -> Folder {
        let f = Folder::new();
        f.model("model", |_| ());
        f.write("model/chat_template.jinja", template);
        let turn = |i: usize| json!({"from": (["human", "gpt"][i % 2]), "value": "a".repeat(50)});
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
        let wide = "{{ '{:>3000000000}'.format('a') }}{{ messages[0].content }}";
        refused(&with(wide, 2), "chat", &["a width of more than 65536 characters"]);
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
        refused(
            &tokenizer(|t| t["normalizer"] = all),
            "vicuna_v1",
            &["tokenizer.json", "normalizer can make a text 1000000000000 times as long"],
        );
    }

    /// Without one of these files a model would be another: what is there but cannot be read is told.
    #[test]
    #[cfg(unix)]
    fn files_beside_a_model_that_lead_nowhere_or_never_end() {
        let image = "<image>";
        for name in [
            "tokenizer.json",
            "tokenizer_config.json",
            "special_tokens_map.json",
            "chat_template.jinja",
            "processor_config.json",
            "preprocessor_config.json",
            "generation_config.json",
        ] {
            for kind in ["link", "pipe", "sparse"] {
                let f = with("", 2);
                fs::copy(golden("images/tiny.png"), f.path("tiny.png")).unwrap();
                let talk = json!([{"from": "human", "value": image}, {"from": "gpt", "value": "a"}]);
                f.write("d.json", &json!([{"image": "tiny.png", "conversations": talk}]).to_string());
                let path = f.path(&format!("model/{name}"));
                _ = fs::remove_file(&path);
                let says = match kind {
                    "link" => {
                        std::os::unix::fs::symlink("../blobs/gone", &path).unwrap();
                        ["a link that leads nowhere", "cannot open"]
                    }
                    "pipe" => {
                        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
                        ["is a pipe", "is a pipe"]
                    }
                    _ => {
                        fs::File::create(&path).unwrap().set_len(40 << 30).unwrap();
                        ["has 40960 MiB", "has 42949672960 bytes"]
                    }
                };
                let args = ["score", "--model", "model", "--data", "d.json", "--out", "o"];
                let said = f.fails(&args, &[name, "hint: copy"]);
                assert!(says.iter().any(|s| said.contains(s)), "{kind}: {said}");
            }
        }
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
            ("model.projector={ mlp = { depth = 1000000 } }", ["model.projector.mlp.depth = 1000000", "at most 100"]),
        ] {
            f.fails(&["check", "recipe.toml", "--set", set], &parts);
        }
    }

    /// Sizes whose product cannot be held are refused where the parameter would be made, with its bytes.
    #[test]
    fn a_parameter_that_cannot_be_held_is_told_in_bytes() {
        let f = Folder::with(THREE_STAGES);
        let huge =
            "stage.sft.adapters=[{ cross_attention = { every = 1, heads = 2147483647, head_dim = 2147483647 } }]";
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
        vision("layer_norm_eps", json!(-1e-5), "a number from 0 on, not -0.00001");
        let processor = |key, value, part| refused("preprocessor_config.json", &[key], value, part);
        processor("size", json!({ "shortest_edge": 1_000_000_000 }), "takes 12000000000.0 GB");
        processor("image_std", json!([0, 0.3, 0.3]), "three numbers above 0");
    }

    /// The same of the command line; nothing panics on the way to a number.
    #[test]
    fn counts_of_the_command_line_have_bounds() {
        let f = Folder::new();
        let (huge, step) = ("1000000000000000000", ["bench", "step", "--preset", "tiny", "--random-init"]);
        let asked = ["generate", "--model", "m", "--prompt", "q", "--max-new-tokens", huge];
        let scored = ["score", "--model", "m", "--data", "d", "--out", "o", "--micro", huge];
        let mut all = vec![asked.to_vec(), scored.to_vec()];
        for flag in ["--micro", "--seq", "--rank", "--steps"] {
            all.push(step.iter().chain(&[flag, huge]).copied().collect());
        }
        for args in all {
            let said = f.adfreeze(&args).output().unwrap();
            let stderr = String::from_utf8(said.stderr).unwrap();
            let stderr = stderr.split_whitespace().collect::<Vec<_>>().join(" ");
            assert_eq!(said.status.code(), Some(2), "{args:?}: {stderr}");
            assert!(stderr.contains(&format!("{huge} is not in ")), "{stderr}");
        }
    }
}

/// Data files and pictures that never end, are no files, or ask for more memory than they are worth.
#[cfg(unix)]
mod data {
    use super::super::folder::{Folder, golden, said};
    use serde_json::json;
    use std::fs;
    use std::io::Write;
    use std::path::{Path, PathBuf};
    use std::process::{Command, Output, Stdio};
    use std::time::{Duration, Instant};

    /// A process that must end within a minute.
    fn bounded(mut command: Command) -> Output {
        let mut child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let started = Instant::now();
        while child.try_wait().unwrap().is_none() {
            if started.elapsed() > Duration::from_secs(60) {
                child.kill().unwrap();
                panic!("it does not end");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        child.wait_with_output().unwrap()
    }

    /// `adfreeze score` on a data file and a folder of pictures, within 6 GB of addresses.
    fn score(f: &Folder, data: &Path, images: &Path) -> Output {
        let mut c = f.command("bash");
        // The binary's threads reserve addresses; what is refused here asks for far more.
        c.args(["-c", "ulimit -v 6000000; exec \"$0\" \"$@\"", super::super::folder::BINARY, "score", "--model"]);
        c.arg(golden("model")).arg("--data").arg(data).arg("--images").arg(images).args(["--out", "s.jsonl"]);
        c.env("RAYON_NUM_THREADS", "2");
        bounded(c)
    }

    #[track_caller]
    fn refused(out: Output, parts: &[&str]) {
        let said = said(out);
        assert_eq!(said.code, Some(1), "{}", said.stderr);
        for part in [&["error: ", "\n\nhint: "], parts].concat() {
            assert!(said.stderr.contains(part), "`{part}` is not in:\n{}", said.stderr);
        }
        assert!(!said.stderr.contains("panicked") && said.stderr.len() < 3000, "{}", said.stderr);
    }

    fn sparse(path: &Path, begin: &[u8], bytes: u64) {
        let mut file = fs::File::create(path).unwrap();
        file.write_all(begin).unwrap();
        file.set_len(bytes).unwrap();
    }

    fn fifo(path: &Path) {
        assert!(Command::new("mkfifo").arg(path).status().unwrap().success());
    }

    /// One sample that shows a picture.
    fn shows(f: &Folder, image: &str) -> PathBuf {
        let turns = json!([{ "from": "human", "value": "<image>\nWhat?" }, { "from": "gpt", "value": "A circle." }]);
        f.write("d.json", &json!([{ "id": "x", "image": image, "conversations": turns }]).to_string())
    }

    #[test]
    fn data_that_are_no_file_or_never_end() {
        let f = Folder::new();
        let images = golden("images");
        fifo(&f.path("pipe"));
        refused(score(&f, &f.path("pipe"), &images), &["pipe: it is a pipe, not a file", "copy what is in it"]);
        refused(score(&f, Path::new("/dev/zero"), &images), &["/dev/zero: it is a device, not a file"]);
        refused(score(&f, Path::new("/dev/null"), &images), &["/dev/null: it is a device, not a file"]);
        refused(score(&f, f.path("").as_path(), &images), &["it is a folder, not a file", "JSON lines file"]);
        std::os::unix::fs::symlink("loop", f.path("loop")).unwrap();
        refused(score(&f, &f.path("loop"), &images), &["cannot read the data file"]);
        sparse(&f.path("zeros"), b"", 20 << 30);
        refused(score(&f, &f.path("zeros"), &images), &["zeros is no text: it has zero bytes"]);
        let padded = [b"[".to_vec(), vec![b' '; 5000]].concat();
        sparse(&f.path("list"), &padded, 20 << 30);
        refused(score(&f, &f.path("list"), &images), &["list has 20 GiB", "JSON lines"]);
        let line = [b"{\"id\": \"".to_vec(), vec![b'a'; 5000]].concat();
        sparse(&f.path("line"), &line, 20 << 30);
        refused(score(&f, &f.path("line"), &images), &["line, line 1 is longer than 64 MiB"]);
        for (name, text) in [("deep", "[".repeat(200_000)), ("deeper", format!("[{{\"x\":{}", "[".repeat(200_000)))] {
            refused(score(&f, &f.write(name, &text), &images), &[name, "a sample looks like"]);
        }
    }

    #[test]
    fn pictures_that_are_no_file_or_never_end() {
        let f = Folder::new();
        let dir = f.path("images");
        fs::create_dir(&dir).unwrap();
        fifo(&dir.join("pipe.png"));
        refused(score(&f, &shows(&f, "pipe.png"), &dir), &["sample x", "pipe.png is a pipe, not a file"]);
        refused(score(&f, &shows(&f, "/dev/zero"), &dir), &["sample x", "/dev/zero is a device, not a file"]);
        refused(score(&f, &shows(&f, "."), &dir), &["sample x", "is a folder, not a file"]);
        sparse(&dir.join("zeros.png"), b"", 20 << 30);
        refused(score(&f, &shows(&f, "zeros.png"), &dir), &["zeros.png: neither PNG nor JPEG"]);
        let png = fs::read(golden("images/exact0.png")).unwrap();
        sparse(&dir.join("tail.png"), &png, 20 << 30);
        refused(score(&f, &shows(&f, "tail.png"), &dir), &["tail.png: 20480 MiB are too many for"]);
    }

    /// A PNG of one colour, as a file of some kilobytes.
    fn png(width: u32, height: u32) -> Vec<u8> {
        let mut out = vec![];
        let mut encoder = png::Encoder::new(&mut out, width, height);
        encoder.set_color(png::ColorType::Grayscale);
        let mut writer = encoder.write_header().unwrap();
        let mut stream = writer.stream_writer().unwrap();
        let row = vec![7; width as usize];
        for _ in 0..height {
            stream.write_all(&row).unwrap();
        }
        stream.finish().unwrap();
        drop(writer);
        out
    }

    /// Puts a chunk behind a PNG's header.
    fn with_chunk(png: &[u8], kind: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let length = (body.len() as u32).to_be_bytes();
        // Its checksum is wrong: nobody looks.
        [&png[..33], &length, kind, body, &[0; 4], &png[33..]].concat()
    }

    #[test]
    fn texts_and_profiles_of_hundreds_of_megabytes_are_not_unpacked() {
        let f = Folder::new();
        let dir = f.path("images");
        fs::create_dir(&dir).unwrap();
        let mut packed = flate2::write::ZlibEncoder::new(vec![], flate2::Compression::fast());
        let part = vec![0; 1 << 20];
        (0..256).for_each(|_| packed.write_all(&part).unwrap());
        let packed = packed.finish().unwrap();
        let whole = fs::read(golden("images/exact0.png")).unwrap();
        for (kind, key) in [
            (b"iCCP", &b"k\0\0"[..]),
            (b"zTXt", b"k\0\0"),
            (b"zTXt", b"Raw profile type exif\0\0"),
            (b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0"),
        ] {
            fs::write(dir.join("bomb.png"), with_chunk(&whole, kind, &[key, &packed].concat())).unwrap();
            let out = said(score(&f, &shows(&f, "bomb.png"), &dir));
            assert_eq!(out.code, Some(0), "{}", out.stderr);
        }
    }

    #[test]
    fn pictures_of_too_many_pixels_are_refused_and_large_ones_wait_for_each_other() {
        let f = Folder::new();
        let dir = f.path("images");
        fs::create_dir(&dir).unwrap();
        let small = png(8, 8);
        let claims = |width: u32, height: u32| {
            [&small[..16], &width.to_be_bytes(), &height.to_be_bytes(), &small[24..]].concat()
        };
        for (width, height) in [(100_000, 100_000), (14_000, 14_000)] {
            fs::write(dir.join("b.png"), claims(width, height)).unwrap();
            refused(
                score(&f, &shows(&f, "b.png"), &dir),
                &["b.png", &format!("{width} × {height} pixels"), "scale the picture down"],
            );
        }
        fs::write(dir.join("b.png"), claims(0, 5)).unwrap();
        refused(score(&f, &shows(&f, "b.png"), &dir), &["b.png", "no pixels (0 × 5)", "replace the file"]);
        // Four of 36 megapixels, one after the other: 108 MB of RGB each, with a budget of 64 MiB.
        let large = png(6000, 6000);
        let turns = json!([{ "from": "human", "value": "<image>\nWhat?" }, { "from": "gpt", "value": "A circle." }]);
        let samples: Vec<_> = (0..4).map(|i| json!({ "image": format!("{i}.png"), "conversations": turns })).collect();
        (0..4).for_each(|i| fs::write(dir.join(format!("{i}.png")), &large).unwrap());
        let data = f.write("four.json", &json!(samples).to_string());
        let run = |mib: &str| {
            let mut c = f.adfreeze(["score", "--out", "s.jsonl", "--model"]);
            c.arg(golden("model")).arg("--data").arg(&data).arg("--images").arg(&dir);
            bounded({
                c.env("RAYON_NUM_THREADS", "4").env("ADFREEZE_DECODE_MIB", mib);
                c
            })
        };
        let out = said(run("64"));
        assert_eq!(out.code, Some(0), "{}", out.stderr);
        assert_eq!(fs::read_to_string(f.path("s.jsonl")).unwrap().lines().count(), 4);
        refused(run("lots"), &["ADFREEZE_DECODE_MIB is no number of MiB", "ADFREEZE_DECODE_MIB=2048"]);
    }
}
