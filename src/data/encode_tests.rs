use super::*;
use crate::data::source;
use crate::spec::{Alpha, Data, Deliver, Resize};
use serde_json::Value;
use std::path::PathBuf;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/a");

fn golden() -> PathBuf {
    std::env::var_os("ADFREEZE_GOLDEN").map_or_else(|| GOLDEN.into(), PathBuf::from)
}

fn json(path: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden().join(path)).unwrap()).unwrap()
}

fn sight(tokens: usize) -> Option<Sight> {
    Some(Sight { size: 56, tokens, side: None, deliver: Deliver::Splice })
}

fn pictures(n: usize) -> Vec<Picture> {
    vec![Picture { path: "a.png".into(), resize: Resize::Crop, alpha: Alpha::Drop, grid_pinpoints: None }; n]
}

fn settings() -> TextSettings {
    let (tokens, config) = (json("tokens.json"), json("model/config.json"));
    TextSettings {
        image_token: "<image>".into(),
        image_token_id: config["image_token_index"].as_u64().map(|n| n as u32),
        vocab_size: config["text_config"]["vocab_size"].as_u64().unwrap() as usize,
        sight: sight(tokens["n_image_tokens"].as_u64().unwrap() as usize),
        bos: None,
        eos: vec![],
        system: None,
        max_seq_len: 2048,
        truncate: false,
        date: None,
    }
}

fn encoder() -> TextEncoder {
    TextEncoder::load(&golden().join("model"), settings()).unwrap()
}

fn data(file: &str) -> Data {
    let path = golden().join("data").join(file);
    let images = Some(golden().join("images"));
    Data { images, ..Data::new(path) }
}

fn numbers<T: TryFrom<i64>>(v: &Value) -> Vec<T> {
    v.as_array().unwrap().iter().map(|n| T::try_from(n.as_i64().unwrap()).ok().unwrap()).collect()
}

#[track_caller]
fn same(got: &Sample, want: &Value, prefix: &str) {
    assert_eq!(got.ids, numbers::<u32>(&want[format!("{prefix}input_ids")]), "{} ids", got.id);
    assert_eq!(got.labels, numbers::<i32>(&want[format!("{prefix}labels")]), "{} labels", got.id);
}

#[test]
fn ids_and_labels_equal_the_reference() {
    let (encoder, want) = (encoder(), json("tokens.json"));
    assert_eq!(encoder.bos(), want["bos_token_id"].as_u64().map(|n| n as u32));
    assert_eq!(u64::from(encoder.eos_ids()[0]), want["eos_token_id"].as_u64().unwrap());
    let cases = [
        ("sft.json", Template::VicunaV1, "vicuna_v1"),
        ("plain.json", Template::Plain, "plain"),
        ("sft.json", Template::Chat, "vicuna_v1"),
    ];
    for (file, template, key) in cases {
        let conversations = source::conversations(&data(file)).unwrap();
        let want = want[key].as_array().unwrap();
        assert_eq!(conversations.len(), want.len());
        for (c, want) in conversations.iter().zip(want) {
            assert_eq!(c.id, want["id"]);
            assert_eq!(encoder.render(c, template).unwrap().text, want["text"], "{}", c.id);
            same(&encoder.conversation(c, template).unwrap(), want, "");
        }
    }
}

#[test]
fn preferences_equal_the_reference() {
    let (encoder, want) = (encoder(), json("tokens.json"));
    let pairs = source::preferences(&data("dpo.jsonl")).unwrap();
    for (p, want) in pairs.iter().zip(want["dpo"].as_array().unwrap()) {
        let (chosen, rejected) = encoder.preference(p, Template::VicunaV1).unwrap();
        same(&chosen, want, "chosen_");
        same(&rejected, want, "rejected_");
    }
}

#[test]
fn a_prompt_is_what_comes_before_the_first_label() {
    let encoder = encoder();
    for c in source::conversations(&data("sft.json")).unwrap() {
        for template in [Template::VicunaV1, Template::Chat] {
            let sample = encoder.conversation(&c, template).unwrap();
            let shown = pictures(usize::from(c.turns[0].text.contains("<image>")));
            let prompt = encoder.prompt(&c.turns[0].text, &shown, template).map(|p| p.0);
            let first = sample.labels.iter().position(|&l| l != IGNORE).unwrap();
            assert_eq!(prompt.unwrap(), &sample.ids[..first], "{}", c.id);
        }
    }
    let front = encoder.prompt("What is it?", &pictures(1), Template::VicunaV1).unwrap();
    assert_eq!(front, encoder.prompt("What is <image>it?", &pictures(1), Template::VicunaV1).unwrap());
    assert!(encoder.prompt("<image><image>", &pictures(1), Template::VicunaV1).is_err());
    // The beginning of a caption.
    let begun = encoder.prompt("A red", &pictures(1), Template::Plain).unwrap().0;
    let bare = encoder.prompt("", &pictures(1), Template::Plain).unwrap().0;
    assert!(begun.len() > bare.len() && begun.starts_with(&bare));
}

fn text_only(turns: &[(Role, &str)]) -> Conversation {
    let turns = turns.iter().map(|&(role, text)| Turn { role, text: text.into() }).collect();
    Conversation { id: "s1".into(), images: vec![], turns, category: None, absent: vec![] }
}

#[test]
fn decodes_what_it_encoded() {
    let encoder = encoder();
    let c = text_only(&[(Role::User, "q"), (Role::Assistant, "naïve 🙂")]);
    let sample = encoder.conversation(&c, Template::VicunaV1).unwrap();
    let answer: Vec<u32> = sample.labels.iter().filter(|&&l| l != IGNORE).map(|&l| l as u32).collect();
    assert_eq!(encoder.decode(&answer).unwrap().trim(), "naïve 🙂");
}

#[test]
fn refuses_or_cuts_long_samples() {
    let c = source::conversations(&data("sft.json")).unwrap().swap_remove(1);
    let whole = encoder().conversation(&c, Template::VicunaV1).unwrap();
    let with = |max_seq_len, truncate| {
        let settings = TextSettings { max_seq_len, truncate, ..settings() };
        TextEncoder::load(&golden().join("model"), settings).unwrap().conversation(&c, Template::VicunaV1)
    };
    let first = whole.labels.iter().position(|&l| l != IGNORE).unwrap();
    let e = with(first + 1, false).unwrap_err();
    assert!(e.cause().contains(&c.id) && e.cause().contains("max_seq_len"), "{e}");
    let cut = with(first + 1, true).unwrap();
    assert_eq!((cut.targets(), cut.images.len(), cut.ids.len()), (1, 1, first + 1));
    let e = with(first, true).unwrap_err();
    assert!(e.cause().contains(&c.id) && e.cause().contains("no label"), "{e}");
}

#[test]
fn a_cut_through_a_picture_takes_the_whole_picture_away() {
    let encoder = encoder();
    let (img, n) = (encoder.image_token_id().unwrap(), encoder.sight().unwrap().tokens);
    let mut ids = vec![encoder.eos_ids()[0]; 2];
    ids.extend(std::iter::repeat_n(img, n));
    ids.push(encoder.eos_ids()[0]);
    ids.extend(std::iter::repeat_n(img, n));
    let end = ids.len();
    assert_eq!(encoder.truncate(&mut ids, end - 1, &[n, n]), 1);
    assert_eq!(ids.len(), end - n);
    // Pictures of different sizes; the second one is cut.
    let mut ids = vec![img; 5];
    assert_eq!(encoder.truncate(&mut ids, 4, &[2, 3]), 1);
    assert_eq!(ids.len(), 2);
}

#[test]
fn an_image_token_in_an_answer_is_an_error() {
    let c = text_only(&[(Role::User, "q"), (Role::Assistant, "an <image> tag")]);
    let e = encoder().conversation(&c, Template::VicunaV1).unwrap_err();
    assert!(e.cause().contains("s1") && e.cause().contains("1 image token(s)"), "{e}");
}

#[test]
fn finds_a_place_for_the_image_token() {
    let dir = golden().join("model");
    let base = TextSettings { image_token: "<picture>".into(), image_token_id: None, ..settings() };
    let free = TextEncoder::load(&dir, base.clone()).unwrap();
    assert!(free.image_token_added());
    assert!(free.tokenizer_json().unwrap().contains("<picture>"));
    let ids: Vec<u32> = free.prompt("", &pictures(1), Template::Plain).unwrap().0;
    assert_eq!(ids[1..], vec![free.image_token_id().unwrap(); free.sight().unwrap().tokens]);
    let full = TextSettings { vocab_size: free.image_token_id().unwrap() as usize, ..base.clone() };
    let no_tower = TextEncoder::load(&dir, TextSettings { sight: None, ..full.clone() }).unwrap();
    assert_eq!((no_tower.image_token_id(), no_tower.image_token_added()), (None, false));
    assert!(no_tower.prompt("hello", &pictures(0), Template::VicunaV1).is_ok());
    assert!(
        no_tower.prompt("hello", &pictures(1), Template::VicunaV1).unwrap_err().cause().contains("no vision tower")
    );
    // Visual tokens take its place: it needs no row.
    let beyond = TextEncoder::load(&dir, full.clone()).unwrap();
    assert_eq!(beyond.prompt("", &pictures(1), Template::Plain).unwrap().0, ids);
    let beside = full.sight.map(|s| Sight { deliver: Deliver::CrossAttention, ..s });
    let e = TextEncoder::load(&dir, TextSettings { sight: beside, ..full }).err().unwrap();
    assert!(e.cause().contains("embedding table") && e.hint_text().unwrap().contains("model.image_token"), "{e}");
    let other = TextSettings { image_token_id: Some(7), ..base };
    assert!(TextEncoder::load(&dir, other).err().unwrap().cause().contains("config.json says 7"));
    let e = TextEncoder::load(Path::new("/nonexistent"), settings()).err().unwrap();
    assert!(e.hint_text().unwrap().contains("model.language.tokenizer"), "{e}");
}

#[test]
fn a_damaged_tokenizer_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("tokenizer.json");
    let whole = std::fs::read_to_string(golden().join("model/tokenizer.json")).unwrap();
    let in_decoder = whole.find("\"decoder\"").unwrap() + 20;
    let mut odd: Value = serde_json::from_str(&whole).unwrap();
    odd["decoder"] = 5.into();
    for text in [&whole[..in_decoder], "", "version https://git-lfs.github.com/spec/v1\n", &odd.to_string()] {
        std::fs::write(&file, text).unwrap();
        let e = TextEncoder::load(&file, settings()).err().unwrap();
        assert!(e.cause().contains("cannot read the tokenizer") && e.cause().contains("tokenizer.json"), "{e}");
        assert!(e.hint_text().is_some());
    }
}
