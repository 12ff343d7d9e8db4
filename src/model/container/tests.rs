use super::*;
use crate::model::backbone::{LANGUAGES, TOWERS};
use serde_json::json;

fn known(name: &str) -> Name {
    Name::Known(name.into())
}

fn whole(kind: &str) -> WholeConfig {
    WholeConfig::from_json(&json!({ "model_type": kind })).unwrap()
}

#[test]
fn every_spelling_of_the_golden_map_has_one_canonical_name() {
    let map = include_str!("../../../tests/golden/a/key_map.json");
    let map: Vec<Value> = serde_json::from_str(map).unwrap();
    assert_eq!(map.len(), 89);
    let whole = whole("llava");
    let (tower, language) = (whole.vision.architecture, whole.text.architecture);
    for entry in &map {
        let spelling = |key: &str| entry[key].as_str().unwrap();
        let Name::Known(name) = whole.canonical(spelling("hub_file")) else { panic!("{entry}") };
        assert_eq!(known(&name), whole.canonical(spelling("transformers5_file")));
        assert_eq!(known(&name), whole.canonical(spelling("module")));
        assert_eq!(whole.stored(&name).as_deref(), Some(spelling("hub_file")));
        let (canonical, stored) = match name.split_once('.').unwrap().0 {
            "vision" => (tower.canonical, tower.stored),
            "language" => (language.canonical, language.stored),
            _ => {
                assert_eq!(names::canonical(spelling("module")), Some(name));
                continue;
            }
        };
        assert_eq!(known(&name), canonical(spelling("standalone")));
        assert_eq!(known(&name), canonical(&stored(&name).unwrap()));
    }
}

#[test]
fn parts_that_are_not_used() {
    let (tower, language) = (TOWERS[0], LANGUAGES[0]);
    for name in ["text_model.final_layer_norm.bias", "visual_projection.weight", "logit_scale"] {
        assert_eq!((tower.canonical)(name), Name::Ignored, "{name}");
    }
    assert_eq!(whole("llava").canonical("vision_queries"), Name::Unknown);
    assert_eq!((tower.stored)("language.norm.weight"), None);
    // Of the original LLaVA code's whole model.
    assert_eq!((language.canonical)("model.mm_projector.0.bias"), Name::Ignored);
    assert_eq!((language.canonical)("model.image_newline"), Name::Ignored);
    assert_eq!((language.canonical)("model.norm.weight"), known("language.norm.weight"));
}

#[test]
fn the_newline_of_tiles() {
    let whole = whole("llava_next");
    for name in ["image_newline", "model.image_newline"] {
        assert_eq!(whole.canonical(name), known("projector.image_newline"));
    }
    assert_eq!(whole.stored("projector.image_newline").unwrap(), "image_newline");
}

#[test]
fn json_round_trips() {
    for kind in ["llava", "llava_next"] {
        let config = whole(kind);
        assert_eq!(config, WholeConfig::from_json(&config.to_json()).unwrap());
        assert_eq!((config.newline, config.to_json()["model_type"].as_str()), (kind == "llava_next", Some(kind)));
    }
}

#[test]
fn an_unknown_whole_model_is_said_to_be_one_and_those_that_are_built_are_listed() {
    let fails = |v: Value| WholeConfig::from_json(&v).unwrap_err().report();
    let other = fails(
        json!({ "model_type": "idefics9", "image_token_id": 3, "architectures": ["Idefics9ForConditionalGeneration"] }),
    );
    assert!(other.contains("idefics9 (Idefics9ForConditionalGeneration): a whole vision-language model"), "{other}");
    let none = fails(json!({ "model_type": "bert" }));
    assert!(none.contains("supported: llava, llava_next"), "{none}");
}

#[test]
fn the_golden_model_has_exactly_these_tensors() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/a/model");
    let (config, weights) = crate::model::weights::Weights::whole(&dir).unwrap();
    let found = weights.names().map(|n| (n.to_string(), weights.info(n).unwrap().shape.clone())).collect();
    assert_eq!(config.parameters().unwrap(), found);
}
