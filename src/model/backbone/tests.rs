use super::*;
use crate::model::container::WholeConfig;
use crate::spec::Activation;
use serde_json::json;
use std::path::PathBuf;

fn golden(folder: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/a").join(folder)
}

#[test]
fn all_spellings_of_one_model_agree() {
    let new = WholeConfig::from_dir(&golden("model")).unwrap();
    assert_eq!(new, WholeConfig::from_dir(&golden("model_hub_naming")).unwrap());
    assert_eq!(new.text, LanguageConfig::from_dir(&golden("language")).unwrap());
    assert_eq!(new.vision, VisionConfig::from_dir(&golden("vision")).unwrap());
    assert_eq!(new.vision, VisionConfig::from_dir(&golden("vision_clip_full")).unwrap());
    assert_eq!((new.image_token_index, new.select_layer, new.tokens_per_image()), (380, -2, 16));
    assert_eq!((new.text.head_dim, new.text.pad_token_id), (8, Some(381)));
}

#[test]
fn json_round_trips() {
    let mut config = WholeConfig::from_dir(&golden("model")).unwrap();
    config.text.rope_theta = 5e5;
    config.text.rope_scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_max_position_embeddings: 8192.0,
    };
    config.text.eos_token_ids = vec![2, 7];
    config.text.tie_word_embeddings = true;
    assert_eq!(config, WholeConfig::from_json(&config.to_json()).unwrap());
    config.text.rope_scaling = RopeScaling::Linear { factor: 2.5 };
    (config.text.bos_token_id, config.text.pad_token_id, config.text.eos_token_ids) = (None, None, vec![]);
    assert_eq!(config.text, LanguageConfig::from_json(&config.text.to_json()).unwrap());
    assert_eq!(config.vision, VisionConfig::from_json(&config.vision.to_json()).unwrap());
}

#[test]
fn almost_empty_hub_files_mean_vicuna_7b_and_clip_large() {
    let config = WholeConfig::from_json(&json!({
        "model_type": "llava",
        "text_config": { "model_type": "llama", "vocab_size": 32064, "rms_norm_eps": 1e-5, "max_position_embeddings": 4096 },
    }))
    .unwrap();
    let text = &config.text;
    assert_eq!((text.hidden_size, text.intermediate_size, text.num_hidden_layers), (4096, 11008, 32));
    assert_eq!((text.head_dim, text.num_key_value_heads, text.vocab_size), (128, 32, 32064));
    assert_eq!((text.rope_theta, text.bos_token_id, text.eos_token_ids.as_slice()), (10000.0, Some(1), [2].as_slice()));
    assert_eq!((config.vision.hidden_size, config.vision.num_patches(), config.image_token_index), (1024, 576, 32000));
    assert_eq!(config.vision.hidden_act, Activation::QuickGelu);
}

#[test]
fn old_clip_and_llama_files() {
    let clip = json!({ "model_type": "clip", "vision_config": { "hidden_size": 64, "image_size": [28, 28] },
        "vision_config_dict": { "hidden_size": 48, "patch_size": 14 } });
    let clip = VisionConfig::from_json(&clip).unwrap();
    assert_eq!((clip.hidden_size, clip.num_patches(), clip.num_hidden_layers), (48, 4, 12));
    let llama = json!({ "rope_theta": 5e5, "rope_scaling": { "type": "linear", "factor": 4.0 }, "pad_token_id": -1,
        "eos_token_id": [2, 3] });
    let llama = LanguageConfig::from_json(&llama).unwrap();
    assert_eq!((llama.rope_theta, &llama.rope_scaling), (5e5, &RopeScaling::Linear { factor: 4.0 }));
    assert_eq!((llama.pad_token_id, llama.eos_token_ids), (None, vec![2, 3]));
}

/// Values of `LanguageConfig.from_dict` of transformers 5.23.
#[test]
fn rope_in_both_spellings() {
    let read = |v: Value| LanguageConfig::from_json(&v).map(|c| (c.rope_theta, c.rope_scaling));
    let new = json!({ "rope_type": "linear", "factor": 2.0, "rope_theta": 5e5 });
    let old = json!({ "rope_type": "linear", "factor": 4.0 });
    let linear = |factor| RopeScaling::Linear { factor };
    assert_eq!(read(json!({ "rope_parameters": new, "rope_scaling": old })).unwrap(), (1e4, linear(4.0)));
    assert_eq!(
        read(json!({ "rope_parameters": new, "rope_scaling": old, "rope_theta": 7 })).unwrap(),
        (7.0, linear(4.0))
    );
    assert_eq!(read(json!({ "rope_parameters": new, "rope_scaling": {} })).unwrap(), (5e5, linear(2.0)));
    assert_eq!(
        read(json!({ "rope_parameters": new, "rope_scaling": null, "rope_theta": 3 })).unwrap(),
        (5e5, linear(2.0))
    );
    let llama3 = json!({ "rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0 });
    let (_, scaling) = read(json!({ "rope_scaling": llama3, "max_position_embeddings": 512 })).unwrap();
    assert!(
        matches!(scaling, RopeScaling::Llama3 { original_max_position_embeddings, .. } if original_max_position_embeddings == 512.0)
    );
    // A part of a head is turned only where there is scaling; layers with parameters of their own are another architecture's.
    assert!(read(json!({ "partial_rotary_factor": 0.5 })).is_ok());
    let fails = |v: Value| read(v).unwrap_err().report();
    assert!(
        fails(json!({ "rope_scaling": old, "partial_rotary_factor": 0.5 }))
            .contains("`rope_scaling.partial_rotary_factor` is 0.5")
    );
    for factor in [0.0, -2.0] {
        let stretched = fails(json!({ "rope_scaling": { "type": "linear", "factor": factor } }));
        assert!(stretched.contains("`rope_scaling.factor` must be a number above 0"), "{stretched}");
    }
    let nested = fails(json!({ "rope_parameters": { "full_attention": old } }));
    assert!(nested.contains("`rope_parameters.full_attention` is {"), "{nested}");
}

#[test]
fn what_is_not_built_is_an_error_that_names_the_key() {
    let llama = |v: Value| LanguageConfig::from_json(&v).unwrap_err().report();
    let yarn = llama(json!({ "rope_scaling": { "rope_type": "yarn", "factor": 4.0 } }));
    assert!(yarn.contains("`rope_scaling.rope_type` is yarn") && yarn.contains("supported: default, linear"), "{yarn}");
    assert!(
        llama(json!({ "rope_parameters": { "rope_type": "linear" } })).contains("`rope_parameters.factor` is missing")
    );
    assert!(llama(json!({ "sliding_window": 4096 })).contains("`sliding_window` is 4096"));
    assert!(llama(json!({ "model_type": "qwen2" })).contains("`model_type` is qwen2"));
    assert!(llama(json!({ "hidden_act": "gelu" })).contains("`hidden_act` is gelu"));
    assert!(
        llama(json!({ "hidden_size": "big" })).contains("`hidden_size` must be a positive whole number, not \"big\"")
    );
    assert!(llama(json!({ "hidden_size": 30, "num_attention_heads": 4 })).contains("(30) is not a multiple of"));
    let llava = |v: Value| WholeConfig::from_json(&v).unwrap_err().report();
    assert!(llava(json!({ "model_type": "llava_llama" })).contains("llava-hf/llava-1.5-7b-hf"));
    let id = json!({ "model_type": "llava", "image_token_index": 1_000_000_000_000_u64 });
    assert!(llava(id).contains("`image_token_index` must be a token id, not 1000000000000"));
    let siglip = json!({ "model_type": "llava", "vision_config": { "model_type": "siglip_vision_model" } });
    assert!(llava(siglip).contains("`vision_config.model_type` is siglip_vision_model"));
    let clip = VisionConfig::from_json(&json!({ "hidden_act": "mish" })).unwrap_err().report();
    assert!(clip.contains("`hidden_act` is mish") && clip.contains("quick_gelu"), "{clip}");
}

#[test]
fn a_table_written_by_hand_may_not_hold_unknown_keys() {
    let error = VisionConfig::from_init(&json!({ "hiden_size": 64 })).unwrap_err().report();
    assert_eq!(error, "unknown key `hiden_size`\n\nhint: did you mean `hidden_size`?");
    assert!(
        LanguageConfig::from_init(&json!({ "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 100 })).is_ok()
    );
    let missing = VisionConfig::from_dir(Path::new("nowhere")).unwrap_err().report();
    assert!(missing.contains("nowhere/config.json") || missing.contains("nowhere\\config.json"), "{missing}");
}
