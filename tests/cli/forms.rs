//! Data files in other forms and encodings than ours.

use super::folder::Folder;
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};

fn case(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/cases").join(name)
}

/// The lines of `adfreeze score` on a data file, with the golden model's pictures.
#[track_caller]
fn scored(f: &Folder, data: &Path, images: &Path) -> Vec<Value> {
    f.ok(args(data, images));
    fs::read_to_string(f.path("scores.jsonl")).unwrap().lines().map(|l| serde_json::from_str(l).unwrap()).collect()
}

fn args(data: &Path, images: &Path) -> Vec<String> {
    let model = super::folder::golden("model");
    let flags =
        [("--model", model.as_path()), ("--data", data), ("--images", images), ("--out", Path::new("scores.jsonl"))];
    let flags = flags.iter().flat_map(|(k, v)| [k.to_string(), v.display().to_string()]);
    ["score".to_string()].into_iter().chain(flags).collect()
}

/// A data file that must be refused with all of `parts`; nothing is written.
#[track_caller]
fn refused(f: &Folder, name: &str, bytes: &[u8], parts: &[&str]) -> String {
    let path = f.path(name);
    fs::write(&path, bytes).unwrap();
    let args = args(&path, &super::folder::golden("images"));
    let said = f.fails(&args.iter().map(String::as_str).collect::<Vec<_>>(), parts);
    for word in ["untagged", "RawConversation", "RawTurn", "struct ", "enum ", "Some(", "cannot write"] {
        assert!(!said.contains(word), "`{word}` in:\n{said}");
    }
    assert!(!f.path("scores.jsonl").exists());
    said
}

fn talk() -> Value {
    json!({ "image": "exact0.png", "conversations": [{ "from": "human", "value": "<image>\nWhat?" }, { "from": "gpt", "value": "A circle." }] })
}

#[test]
fn a_byte_order_mark_is_skipped() {
    let f = Folder::new();
    for name in ["array.json", "lines.jsonl"] {
        let dir = case("10-utf8-bom");
        let loss = scored(&f, &dir.join(name), &dir)[0]["loss"].as_f64().unwrap();
        assert!((loss - 6.918_279).abs() < 1e-4, "{name}: {loss}");
    }
}

#[test]
fn ids_keep_every_digit_or_are_refused() {
    let f = Folder::new();
    let large = fs::read(case("14-large-whole-number-ids").join("data.json")).unwrap();
    refused(&f, "d.json", &large, &["[0].id", "too large to be kept digit by digit", "quotes"]);
    let with = |id: Value| {
        let mut sample = talk();
        sample["id"] = id;
        sample
    };
    let data = f.path("ok.json");
    let all = [with(json!(u64::MAX)), with(json!(-7)), with(json!("a")), with(json!("18446744073709551617"))];
    fs::write(&data, serde_json::to_vec(&all).unwrap()).unwrap();
    let ids: Vec<Value> =
        scored(&f, &data, &super::folder::golden("images")).into_iter().map(|l| l["id"].clone()).collect();
    assert_eq!(ids, ["18446744073709551615", "-7", "a", "18446744073709551617"]);
}

#[test]
fn errors_speak_of_the_sample_and_not_of_the_program() {
    let f = Folder::new();
    let dir = case("19-messages-that-mislead");
    let read = |name: &str| fs::read(dir.join(name)).unwrap();
    refused(&f, "list.json", &read("list.json"), &["image must be a path or a list of paths, not {…}"]);
    refused(&f, "id.json", &read("id.json"), &["id must be text or a number, not true"]);
    let said = f.fails(
        &args(&dir.join("picture.json"), &dir).iter().map(String::as_str).collect::<Vec<_>>(),
        &["empty.png", "the file is empty"],
    );
    assert!(!said.contains("cannot write"), "{said}");
    for (sample, words) in [
        (json!("text"), "must be a sample, an object {…}"),
        (json!({ "conversations": ["text"] }), "must be a turn, an object"),
        (json!({ "conversations": {} }), "conversations"),
        (json!({ "image": 3, "conversations": [] }), "image must be a path or a list of paths, not 3"),
    ] {
        refused(&f, "d.json", json!([sample]).to_string().as_bytes(), &["d.json: [0]", words]);
        refused(&f, "d.jsonl", sample.to_string().as_bytes(), &["d.jsonl, line 1", words]);
    }
    let order = json!([{ "conversations": [{ "from": "human", "value": "a" }, { "from": "human", "value": "b" }] }]);
    refused(&f, "d.json", order.to_string().as_bytes(), &["turn 1 is out of order: human after human"]);
}

#[test]
fn other_encodings_and_formats_are_named_with_what_to_do() {
    let f = Folder::new();
    let text = json!([talk()]).to_string();
    let wide = |bytes: fn(u16) -> [u8; 2]| text.encode_utf16().flat_map(bytes).collect::<Vec<_>>();
    let (little, big) = (wide(u16::to_le_bytes), wide(u16::to_be_bytes));
    refused(&f, "a.json", &[b"\xff\xfe" as &[u8], &little].concat(), &["text in UTF-16", "iconv -f UTF-16 -t UTF-8"]);
    refused(&f, "a.json", &[b"\xfe\xff" as &[u8], &big].concat(), &["text in UTF-16"]);
    refused(&f, "a.json", &little, &["text in UTF-16"]);
    refused(&f, "a.json", b"[{\"conversations\": [{\"from\": \"human\", \"value\": \"caf\xe9\"}]}]", &["a.json"]);
    let mut tar = vec![0; 1024];
    tar[..6].copy_from_slice(b"0.json");
    tar[257..262].copy_from_slice(b"ustar");
    for (bytes, words, hint) in [
        (&b"\x1f\x8b\x08\0\0"[..], "is gzip-compressed", "gunzip"),
        (b"\x28\xb5\x2f\xfd\0", "is Zstandard-compressed", "zstd -d"),
        (b"PK\x03\x04\0\0", "is a zip archive", "unpack it first"),
        (&tar, "is a tar archive", "pictures to files beside a JSON file"),
        (b"PAR1\x15\x04", "is a Parquet table", "to_json("),
        (b"ARROW1\0\0", "is an Arrow table", "to_json("),
        (b"GIF89a\0", "is a GIF picture", "a sample looks like"),
        (b"<!DOCTYPE html><html>", "is an HTML page", "download it again"),
        (b"version https://git-lfs.github.com/spec/v1\n", "pointer of Git LFS", "git lfs pull"),
        (&[0; 5000], "zero bytes", "a sample looks like"),
    ] {
        refused(&f, "data.json", bytes, &["data.json is ", words, hint]);
    }
    let zip = f.path("images.zip");
    fs::write(&zip, b"PK\x03\x04\0\0").unwrap();
    let data = f.write("d.json", &text);
    let args = args(&data, &zip);
    f.fails(&args.iter().map(String::as_str).collect::<Vec<_>>(), &["images.zip is a file, not a folder", "unpack it"]);
}

/// The hint is the user's own first sample in the form that is wanted.
#[test]
fn tables_captions_and_other_forms_are_answered_with_the_users_own_sample() {
    let f = Folder::new();
    let want = r#"{"image":"a.png","conversations":[{"from":"human","value":"<image>\nWhat is it?"},{"from":"gpt","value":"A cat."}]}"#;
    let caption =
        r#"{"image":"a.png","conversations":[{"from":"human","value":"<image>"},{"from":"gpt","value":"A cat."}]}"#;
    let parts = json!([{ "images": ["a.png"], "messages": [
        { "role": "user", "content": [{ "type": "image" }, { "type": "text", "text": "What is it?" }] }, { "role": "assistant", "content": "A cat." }] }]);
    refused(&f, "d.csv", b"image,question,answer\na.png,What is it?,A cat.\n", &["is a table (CSV), not JSON", want]);
    refused(&f, "d.tsv", b"a.png\tA cat.\nb.png\tA dog.\n", &["is a list of captions, not JSON", caption]);
    refused(&f, "d.json", parts.to_string().as_bytes(), &["[0].messages[0].content", want]);
    refused(&f, "d.json", b"[{\"image\": \"a.png\", \"caption\": \"A cat.\"}]", &["[0]", caption]);
    refused(
        &f,
        "d.jsonl",
        b"{\"query\": \"What is it?\", \"response\": \"A cat.\", \"images\": [\"a.png\"]}",
        &["line 1", want],
    );
    refused(&f, "d.json", b"{\n \"conversations\": []\n}", &["line 1", "whole object", "[{…}, {…}]"]);
    refused(&f, "d.json", b"hello there\n", &["line 1", "a sample looks like"]);
}

#[test]
fn messages_of_role_and_content_are_conversations_too() {
    let f = Folder::new();
    let images = super::folder::golden("images");
    let write = |name: &str, v: Value| f.write(name, &v.to_string());
    let spelled = json!([{ "images": ["exact0.png"], "messages": [{ "role": "user", "content": "<image>\nWhat?" }, { "role": "assistant", "content": "A circle." }] }]);
    let ours = scored(&f, &write("a.json", json!([talk()])), &images);
    assert_eq!(scored(&f, &write("b.json", spelled), &images)[0]["logps"], ours[0]["logps"]);
}

/// A key that carries something to be learned is read or refused, never dropped.
#[test]
fn a_system_key_is_a_system_turn_and_other_content_is_refused_by_name() {
    let f = Folder::new();
    let images = super::folder::golden("images");
    let with = |key: &str, value: Value| {
        let mut sample = talk();
        sample[key] = value;
        sample
    };
    let write = |name: &str, v: &Value| f.write(name, &json!([v]).to_string());
    let mut turn = talk();
    turn["conversations"].as_array_mut().unwrap().insert(0, json!({ "from": "system", "value": "Be brief." }));
    let by_turn = scored(&f, &write("a.json", &turn), &images);
    let by_key = scored(&f, &write("b.json", &with("system", json!("Be brief."))), &images);
    let without = scored(&f, &write("c.json", &with("system", json!(""))), &images);
    assert_eq!(by_turn[0]["logps"], by_key[0]["logps"]);
    assert_ne!(by_turn[0]["logps"], without[0]["logps"]);
    fs::remove_file(f.path("scores.jsonl")).unwrap();
    for (key, value) in [
        ("tools", json!("[{\"name\": \"x\"}]")),
        ("history", json!([["q", "a"]])),
        ("videos", json!(["a.mp4"])),
        ("chosen", json!({ "from": "gpt", "value": "x" })),
        ("rejected_response", json!("A square.")),
    ] {
        let said = format!("`{key}` is not read");
        refused(&f, "d.json", json!([with(key, value)]).to_string().as_bytes(), &["sample ", &said]);
    }
    for (key, value) in [("thinking", json!("Round.")), ("reasoning", json!("Round.")), ("images", json!(["a.png"]))] {
        let mut sample = talk();
        sample["conversations"][1][key] = value;
        let said = format!("`{key}` is not read");
        refused(&f, "d.json", json!([sample]).to_string().as_bytes(), &["sample ", &said]);
    }
    let weighted =
        json!([{ "conversations": [{ "from": "human", "value": "q" }, { "from": "gpt", "value": "a", "weight": 0 }] }]);
    refused(&f, "d.json", weighted.to_string().as_bytes(), &["turn 1 is an answer that is not to be learned"]);
    for (key, value) in
        [("tools", json!("[]")), ("history", json!([])), ("videos", json!(null)), ("source", json!("web"))]
    {
        scored(&f, &write("e.json", &with(key, value)), &images);
    }
}

/// What exports write: a null under every key that any sample has, several names of one key among them.
#[test]
fn nulls_are_as_if_they_were_absent() {
    let f = Folder::new();
    let images = super::folder::golden("images");
    let write = |name: &str, v: Value| f.write(name, &json!([v]).to_string());
    let ours = scored(&f, &write("a.json", talk()), &images)[0]["logps"].clone();
    let answer = json!({ "role": "assistant", "content": "A circle.", "refusal": null, "audio": null, "function_call": null,
        "tool_calls": null, "reasoning": null, "reasoning_content": null, "weight": null, "train": 1, "loss": true });
    let dumped = json!({ "id": null, "image": null, "images": ["exact0.png"], "video": null, "videos": [], "audios": null, "system": null,
        "category": null, "absent": null, "messages": [{ "role": "user", "content": "<image>\nWhat?", "name": null }, answer] });
    assert_eq!(scored(&f, &write("b.json", dumped), &images)[0]["logps"], ours);
    let mut both = talk();
    both["images"] = json!(["exact0.png"]);
    assert_eq!(scored(&f, &write("c.json", both.clone()), &images)[0]["logps"], ours);
    fs::remove_file(f.path("scores.jsonl")).unwrap();
    both["images"] = json!(["exact1.png"]);
    let bytes = json!([both]).to_string();
    refused(&f, "d.json", bytes.as_bytes(), &["sample ", "`image` and `images` name different pictures"]);
}
