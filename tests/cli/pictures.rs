//! What a picture's layout and metadata, and a processor's settings, do to pixels.

use super::folder::{Folder, golden};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name)
}

fn args<'a>(model: &'a str, data: &'a str, images: &'a str) -> [&'a str; 9] {
    ["score", "--model", model, "--data", data, "--images", images, "--out", "scores.jsonl"]
}

#[track_caller]
fn scored(f: &Folder, model: &Path, data: &Path, images: &Path) -> Vec<Value> {
    f.ok(args(model.to_str().unwrap(), data.to_str().unwrap(), images.to_str().unwrap()));
    fs::read_to_string(f.path("scores.jsonl")).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn shows(image: &str) -> String {
    let turns = json!([{ "from": "human", "value": "<image>\nWhat?" }, { "from": "gpt", "value": "A circle." }]);
    json!([{ "image": image, "conversations": turns }]).to_string()
}

fn worst(a: &Value, b: &Value) -> f64 {
    let numbers = |v: &Value| v["logps"].as_array().unwrap().iter().map(|n| n.as_f64().unwrap()).collect::<Vec<_>>();
    numbers(a).iter().zip(numbers(b)).map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
}

/// libjpeg does not smooth colours that are at most two samples wide; the PNG holds what Pillow decodes.
#[test]
fn a_narrow_jpeg_is_scored_as_what_pillow_decodes_of_it() {
    let dir = case("15-narrow-jpeg");
    let lines = scored(&Folder::new(), &golden("model"), &dir.join("data.json"), &dir);
    let gap = worst(&lines[0], &lines[1]);
    // 0.076 where they are smoothed.
    assert!(gap < 0.012, "{gap}");
    // Progressive ones, halved in width alone and in both.
    for name in ["wide", "tall"] {
        let f = Folder::new();
        let both = ["jpg", "png"].map(|ending| {
            let data = f.write("d.json", &shows(&format!("{name}.{ending}")));
            scored(&f, &golden("model"), &data, &dir).remove(0)
        });
        let gap = worst(&both[0], &both[1]);
        assert!(gap < 0.012, "{name}: {gap}");
    }
}

/// LLaVA's `do_pad` is the data entry's `resize = "pad"`.
#[test]
fn a_processor_that_pads_pads() {
    let f = Folder::new();
    let model = f.model("model", |_| {});
    let path = model.join("preprocessor_config.json");
    let _ = fs::remove_file(model.join("processor_config.json"));
    let data = f.write("d.json", &shows("landscape.png"));
    let cropped = scored(&f, &model, &data, &golden("images"));
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    config["image_processor_type"] = json!("LlavaImageProcessor");
    config["do_pad"] = json!(true);
    fs::write(&path, config.to_string()).unwrap();
    let padded = scored(&f, &model, &data, &golden("images"));
    assert!(worst(&cropped[0], &padded[0]) > 1e-3);
    let images = golden("images");
    let plain = golden("model");
    let mut by_entry = args(plain.to_str().unwrap(), data.to_str().unwrap(), images.to_str().unwrap()).to_vec();
    by_entry.extend(["--resize", "pad"]);
    f.ok(by_entry);
    let line: Value = serde_json::from_str(fs::read_to_string(f.path("scores.jsonl")).unwrap().trim()).unwrap();
    assert!(worst(&line, &padded[0]) < 1e-6);
    // A key that is not built, by its name and the file's.
    config["do_flip_channel_order"] = json!(true);
    fs::write(&path, config.to_string()).unwrap();
    let (model, data, images) = (model.to_str().unwrap(), data.to_str().unwrap(), images.to_str().unwrap());
    f.fails(&args(model, data, images), &["preprocessor_config.json", "do_flip_channel_order = true is not supported"]);
}

#[test]
fn other_formats_than_png_and_jpeg_are_named() {
    let f = Folder::new();
    let model = golden("model");
    let jpeg = fs::read(golden("images/photo420.jpg")).unwrap();
    let frame = jpeg.windows(2).position(|w| w == [0xff, 0xc0]).unwrap();
    let changed = |at: usize, to: u8| {
        let mut copy = jpeg.clone();
        copy[at] = to;
        copy
    };
    for (bytes, words, hint) in [
        (b"GIF89a\0\0".to_vec(), "it is a GIF picture", "convert it to PNG or JPEG"),
        (b"RIFF\0\0\0\0WEBPVP8 ".to_vec(), "it is a WebP picture", "convert it"),
        (b"BM\0\0\0\0\0\0".to_vec(), "it is a BMP picture", "convert it"),
        (b"II*\0\0\0".to_vec(), "it is a TIFF picture", "convert it"),
        (b"\0\0\0\x18ftypheic".to_vec(), "it is a HEIC picture", "convert it"),
        (b"\0\0\0\x18ftypavif".to_vec(), "it is an AVIF picture", "convert it"),
        (b"<!doctype html><title>404".to_vec(), "an HTML page, not a picture", "download it again"),
        (b"version https://git-lfs.github.com/spec/v1".to_vec(), "pointer of Git LFS", "git lfs pull"),
        (b"PK\x03\x04".to_vec(), "a zip archive, not a picture", "PNG or JPEG"),
        (vec![], "the file is empty", "download it again"),
        (b"hello".to_vec(), "neither PNG nor JPEG", "convert it"),
        (changed(frame + 1, 0xc9), "a JPEG coded with arithmetic coding", "save it again"),
        (changed(frame + 1, 0xc3), "a JPEG coded without loss", "save it again"),
        (changed(frame + 4, 12), "a JPEG of 12 bits a colour", "save it again"),
    ] {
        fs::write(f.path("p.png"), bytes).unwrap();
        let data = f.write("d.json", &shows("p.png"));
        let said = f.fails(
            &args(model.to_str().unwrap(), data.to_str().unwrap(), f.path("").to_str().unwrap()),
            &["p.png: ", words, hint],
        );
        assert!(!said.contains("cannot write"), "{said}");
    }
}
