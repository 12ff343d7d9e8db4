//! Damaged input never panics: every file that a user hands over is read in many mutated forms (bytes flipped, cut out,
//! doubled, swapped for others that mean something), and each reading ends in a value or in an error.
//!
//! The mutations are drawn from a counter, so that a failure names the one to look at.

use adfreeze::checkpoint::{peft, safetensors};
use adfreeze::data::image::{ImageProcessor, decode};
use adfreeze::data::{Picture, Sight, TextEncoder, TextSettings, source};
use adfreeze::model::backbone::{Config, LanguageConfig, VisionConfig};
use adfreeze::model::container::WholeConfig;
use adfreeze::model::weights::{Tensors, Weights};
use adfreeze::ops::random::Key;
use adfreeze::spec::pattern::Patterns;
use adfreeze::spec::{Alpha, Data, Deliver, Resize, Template};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn bytes(path: &Path) -> Vec<u8> {
    std::fs::read(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Pieces that mean something in one of the formats.
const PIECES: [&str; 24] = [
    "{",
    "}",
    "[",
    "]",
    "\"",
    "\\",
    ",",
    ":",
    "=",
    ".",
    "${",
    "$${",
    "{%",
    "%}",
    "{{",
    "*",
    "..",
    "-1",
    "0",
    "1e999",
    "null",
    "9223372036854775807",
    "é",
    "\n",
];

/// The n-th mutation of `text`: one to four changes, the first half of the file more often (that is where headers are).
fn mutated(mut text: Vec<u8>, key: Key) -> Vec<u8> {
    for change in 0..1 + u64::from(key.words(0)[0] % 4) {
        let [kind, at, what, span] = key.words(change + 1);
        let reach = if kind & 64 == 0 { text.len() } else { text.len().min(400) };
        let at = at as usize % (reach + 1);
        let end = (at + 1 + span as usize % 12).min(text.len());
        match kind % 6 {
            0 if at < text.len() => text[at] ^= 1 << (what % 8),
            1 => drop(text.drain(at..end.max(at))),
            2 => {
                let part = text[at..end.max(at)].to_vec();
                text.splice(at..at, part);
            }
            3 => text.truncate(at),
            _ => {
                let piece = PIECES[what as usize % PIECES.len()].bytes();
                text.splice(at..end.max(at).min(at + what as usize % 3), piece);
            }
        }
    }
    text
}

/// Calls `read` with `count` mutations of a file's contents; a panic is a failure that names the mutation.
fn survives(what: &str, original: &[u8], count: u64, mut read: impl FnMut(&[u8])) {
    read(original);
    let broken = (0..count).find(|n| {
        let text = mutated(original.to_vec(), Key::new(1, what).index(*n));
        catch_unwind(AssertUnwindSafe(|| read(&text))).is_err()
    });
    if let Some(n) = broken {
        let text = mutated(original.to_vec(), Key::new(1, what).index(n));
        let path = std::env::temp_dir().join(format!("adfreeze-mutation-{n}"));
        std::fs::write(&path, &text).unwrap();
        panic!("{what}: reading mutation {n} panics; it is in {}", path.display());
    }
}

/// Writes the mutated bytes as `name` into a copy of a folder, then reads the folder.
fn in_folder(what: &str, folder: &str, name: &str, count: u64, read: impl Fn(&Path)) {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(golden(folder)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let original = bytes(&dir.path().join(name));
    survives(what, &original, count, |text| {
        std::fs::write(dir.path().join(name), text).unwrap();
        read(dir.path());
    });
}

fn settings() -> TextSettings {
    TextSettings {
        image_token: "<image>".into(),
        image_token_id: None,
        vocab_size: 384,
        sight: Some(Sight { size: 56, tokens: 16, side: None, deliver: Deliver::Splice }),
        bos: Some(1),
        eos: vec![2],
        system: None,
        date: None,
        max_seq_len: 200,
        truncate: true,
    }
}

/// Loads the tokenizer of a folder and encodes the golden conversations.
fn encode(dir: &Path) {
    let Ok(encoder) = TextEncoder::load(dir, settings()) else { return };
    let data = Data { limit: Some(4), ..Data::new(golden("a/data/sft.json")) };
    for c in source::conversations(&data).unwrap() {
        for template in [Template::VicunaV1, Template::Chat] {
            let _ = encoder.conversation(&c, template).map(|s| encoder.decode(&s.ids));
        }
    }
    let picture = Picture { path: "a.png".into(), resize: Resize::Crop, alpha: Alpha::Drop, grid_pinpoints: None };
    let _ = encoder.prompt("what is this?", &[picture], Template::Chat);
}

#[test]
fn recipes() {
    for name in ["quickstart.toml", "quickstart-backbones.toml"] {
        let recipe = bytes(&Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes").join(name));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(name);
        survives(name, &recipe, 1500, |text| {
            std::fs::write(&path, text).unwrap();
            let _ = adfreeze::recipe::load(&path, &[]).map_err(|e| e.report());
        });
        std::fs::write(&path, &recipe).unwrap();
        survives("--set", b"stage.sft.adapters[0].lora.rank=8", 1500, |text| {
            let set = String::from_utf8_lossy(text).into_owned();
            let _ = adfreeze::recipe::load(&path, &[set]).map_err(|e| e.report());
        });
    }
}

#[test]
fn patterns() {
    let known: Vec<String> = (0..4).map(|i| format!("language.layers.{i}.mlp.up_proj.weight")).collect();
    for pattern in ["language.layers[-2..].{mlp,self_attn.{q,k}_proj}.*", "!*.layers[0..3].*", "{a,b}?[1]"] {
        survives(pattern, pattern.as_bytes(), 3000, |text| {
            let pattern = String::from_utf8_lossy(text).into_owned();
            let _ = Patterns::new(&[pattern], &known).map_err(|e| e.report());
        });
    }
}

#[test]
fn data_files() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["sft.json", "plain.json", "dpo.jsonl"] {
        let data = Data::new(dir.path().join(name));
        survives(name, &bytes(&golden("a/data").join(name)), 600, |text| {
            std::fs::write(&data.path, text).unwrap();
            let _ = source::conversations(&data).map_err(|e| e.report());
            let _ = source::preferences(&data).map_err(|e| e.report());
        });
    }
}

#[test]
fn pictures() {
    for name in ["exact0.png", "palette.png", "rgba.png", "tiny.png", "exif6.jpg", "photo420.jpg"] {
        survives(name, &bytes(&golden("a/images").join(name)), 150, |text| {
            let _ = decode(text, Alpha::White).map_err(|e| e.report());
        });
    }
    for name in ["cmyk.jpg", "gray.jpg", "progressive.jpg", "ycck.jpg"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/pictures").join(name);
        survives(name, &bytes(&path), 150, |text| {
            let _ = decode(text, Alpha::Drop).map_err(|e| e.report());
        });
    }
}

#[test]
fn configurations() {
    in_folder("LLaVA config", "a/model", "config.json", 600, |dir| {
        let _ = WholeConfig::from_dir(dir).map_err(|e| e.report());
    });
    in_folder("LLaMA config", "a/language", "config.json", 600, |dir| {
        let _ = LanguageConfig::from_dir(dir).map_err(|e| e.report());
    });
    in_folder("CLIP config", "a/vision_clip_full", "config.json", 600, |dir| {
        let _ = VisionConfig::from_dir(dir).map_err(|e| e.report());
    });
    in_folder("picture preparation", "a/vision", "preprocessor_config.json", 600, |dir| {
        let _ = ImageProcessor::from_dir(dir).map_err(|e| e.report());
    });
}

#[test]
fn tokenizers_and_chat_templates() {
    in_folder("chat template", "a/model", "chat_template.jinja", 1500, encode);
    in_folder("tokenizer config", "a/model", "tokenizer_config.json", 200, encode);
    in_folder("tokenizer", "a/model", "tokenizer.json", 100, encode);
}

#[test]
fn weights_and_adapters() {
    in_folder("safetensors", "a/lora_init", "adapter_model.safetensors", 300, |dir| {
        let _ = safetensors::load(&dir.join("adapter_model.safetensors")).map_err(|e| e.report());
        let _ = peft::LoraAdapter::load(dir, "x").map_err(|e| e.report());
    });
    in_folder("adapter config", "a/lora_init", "adapter_config.json", 600, |dir| {
        let _ = peft::LoraAdapter::load(dir, "x").map_err(|e| e.report());
    });
    in_folder("shard index", "bin/sharded", "pytorch_model.bin.index.json", 200, |dir| {
        let _ = Weights::language(dir).map_err(|e| e.report());
    });
    in_folder("pickle", "bin/single", "pytorch_model.bin", 300, |dir| {
        let Ok(tensors) = Tensors::open_file(&dir.join("pytorch_model.bin")) else { return };
        for name in tensors.names() {
            let _ = tensors.load(name, &candle_core::Device::Cpu).map_err(|e| e.report());
        }
    });
}
