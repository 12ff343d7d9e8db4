//! `generation_config.json`: what a model's folder says of how its answers are made.

use super::fields::Fields;
use crate::error::{Error, Result};
use crate::model::weights::source::read_text;
use serde_json::Value;
use std::path::Path;

/// Name of the file.
pub const GENERATION: &str = "generation_config.json";

/// What of the file decides what is generated.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Generation {
    /// Tokens that end an answer.
    pub eos_token_ids: Vec<u32>,
    /// `key = value` of what changes transformers' greedy text and is not built.
    pub not_built: Vec<String>,
}

/// Keys that change the most probable text, with the value that changes nothing.
const CHANGES_TEXT: [(&str, Option<f64>); 13] = [
    ("repetition_penalty", Some(1.0)),
    ("encoder_repetition_penalty", Some(1.0)),
    ("no_repeat_ngram_size", Some(0.0)),
    ("min_length", Some(0.0)),
    ("min_new_tokens", Some(0.0)),
    ("num_beams", Some(1.0)),
    ("suppress_tokens", None),
    ("begin_suppress_tokens", None),
    ("bad_words_ids", None),
    ("sequence_bias", None),
    ("forced_bos_token_id", None),
    ("forced_eos_token_id", None),
    ("stop_strings", None),
];

impl Generation {
    /// Reads `DIR/generation_config.json`; nothing if it is not there.
    ///
    /// # Errors
    /// If the file is damaged.
    pub fn from_dir(dir: &Path) -> Result<Self> {
        let path = dir.join(GENERATION);
        // A link that leads nowhere is no silence.
        if path.symlink_metadata().is_err() {
            return Ok(Self::default());
        }
        let text = read_text(&path).map_err(|e| {
            e.hint("copy the file itself from where the model comes from, or take it away if the model has none")
        })?;
        let read = || Self::from_json(&serde_json::from_str(&text)?);
        read().map_err(|e: Error| {
            e.context(path.display()).hint(
                "get the file again from where the model comes from, or remove it: config.json names end tokens, too",
            )
        })
    }

    fn from_json(config: &Value) -> Result<Self> {
        let f = Fields::new(config, "")?;
        let changes = |(key, idle): &(&'static str, Option<f64>)| {
            let value = f.get(key)?;
            let idle =
                idle.is_some_and(|idle| value.as_f64() == Some(idle)) || value.as_array().is_some_and(Vec::is_empty);
            (!idle).then(|| format!("{key} = {value}"))
        };
        Ok(Self {
            eos_token_ids: f.tokens("eos_token_id")?.unwrap_or_default(),
            not_built: CHANGES_TEXT.iter().filter_map(changes).collect(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn end_tokens_and_what_changes_the_text() {
        let read = |v: Value| Generation::from_json(&v).unwrap();
        assert_eq!(read(json!({ "eos_token_id": 2, "temperature": 0.6 })).eos_token_ids, [2]);
        let one =
            read(json!({ "eos_token_id": [2, 7], "repetition_penalty": 1.05, "num_beams": 1, "suppress_tokens": [] }));
        assert_eq!((one.eos_token_ids, one.not_built), (vec![2, 7], vec!["repetition_penalty = 1.05".to_string()]));
        assert_eq!(read(json!({ "eos_token_id": null })), Generation::default());
        let wrong = Generation::from_json(&json!({ "eos_token_id": "</s>" })).unwrap_err().report();
        assert!(wrong.contains("`eos_token_id` must be a token id or a list of them"), "{wrong}");
    }
}
