//! The tokenizer of the built-in data: whole words of a closed vocabulary, in Hugging Face's `tokenizer.json` form.

use super::scene::{Color, Place, Shape};
use serde_json::{Value, json};

/// Ids 0 to 4, in this order.
pub const SPECIALS: [&str; 5] = ["<unk>", "<s>", "</s>", "<pad>", "<image>"];
/// Rows that the language model's embedding needs at most; a round number, so that words can be added.
pub const MAX_VOCAB: usize = 64;

/// All words, in the order of their ids. The role names of the `vicuna_v1` template are words too.
pub fn vocabulary() -> Vec<&'static str> {
    let fixed = "user: assistant: . , ? a is there the what where how many color shape shapes describe picture \
                 yes none one two three";
    let mut words: Vec<&'static str> = SPECIALS.to_vec();
    let all = fixed
        .split_whitespace()
        .chain(Color::ALL.iter().map(|c| c.word()))
        .chain(Shape::ALL.iter().flat_map(|s| [s.word(), s.plural()]))
        .chain(Place::ALL.iter().map(|p| p.word()));
    for word in all {
        if !words.contains(&word) {
            words.push(word);
        }
    }
    words
}

/// `tokenizer.json`: lower case, split at white space and around `.`, `,` and `?`; decoding puts the spaces back.
pub fn tokenizer_json() -> Value {
    let vocabulary: serde_json::Map<String, Value> =
        vocabulary().into_iter().enumerate().map(|(id, word)| (word.into(), json!(id))).collect();
    let added: Vec<Value> = SPECIALS
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({ "id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                    "normalized": false, "special": true })
        })
        .collect();
    json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": { "type": "Lowercase" },
        "pre_tokenizer": { "type": "Sequence", "pretokenizers": [
            { "type": "WhitespaceSplit" },
            { "type": "Split", "pattern": { "Regex": "[.,?]" }, "behavior": "Isolated", "invert": false },
        ] },
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{ "SpecialToken": { "id": "<s>", "type_id": 0 } }, { "Sequence": { "id": "A", "type_id": 0 } }],
            "pair": [{ "Sequence": { "id": "A", "type_id": 0 } }, { "Sequence": { "id": "B", "type_id": 1 } }],
            "special_tokens": { "<s>": { "id": "<s>", "ids": [1], "tokens": ["<s>"] } },
        },
        // Joins with spaces and takes away the one before a punctuation mark; the prefix never occurs.
        "decoder": { "type": "WordPiece", "prefix": "##", "cleanup": true },
        "model": { "type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>" },
    })
}

/// `tokenizer_config.json`.
pub fn tokenizer_config() -> Value {
    json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "image_token": "<image>",
        "add_bos_token": true,
        "add_eos_token": false,
        "padding_side": "right",
        "clean_up_tokenization_spaces": false,
        "model_max_length": 256,
    })
}
