//! The special tokens that stand beside `tokenizer.json`, as transformers 5.23 reads them (`TokenizersBackend.__init__`).

use crate::error::Result;
use serde_json::Value;
use std::collections::BTreeMap;
use tokenizers::{AddedToken, Tokenizer};

/// In the order in which they are added.
const NAMED: [&str; 7] = ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Adds what `tokenizer_config.json` and `special_tokens_map.json` name and the tokenizer does not know as one token; returns
/// the named ones: name → text.
pub(super) fn add(tokenizer: &mut Tokenizer, config: &Value, map: &Value) -> Result<BTreeMap<String, String>> {
    let described: Vec<AddedToken> = match config["added_tokens_decoder"].as_object() {
        Some(tokens) => {
            let mut by_id: Vec<_> = tokens.iter().map(|(id, t)| (id.parse::<u64>().unwrap_or(u64::MAX), t)).collect();
            by_id.sort_by_key(|(id, _)| *id);
            by_id.into_iter().filter_map(|(_, t)| token(t, false)).collect()
        }
        None => Vec::new(),
    };
    // The older file counts only where the newer one does not describe the tokens.
    let first = if described.is_empty() { [map, config] } else { [config, map] };
    let find = |key: &str| first.iter().find_map(|file| token(&file[key], true));
    let mut named: Vec<(String, AddedToken)> = NAMED.iter().filter_map(|k| Some((k.to_string(), find(k)?))).collect();
    for file in first {
        let own = file.as_object().into_iter().flatten().filter(|(k, _)| k.ends_with("_token"));
        let models = ["model_specific_special_tokens", "extra_special_tokens"];
        let further = models.iter().filter_map(|k| file[k].as_object()).flatten();
        for (key, value) in own.chain(further) {
            if !named.iter().any(|(k, _)| k == key) {
                named.extend(token(value, true).map(|t| (key.clone(), t)));
            }
        }
    }
    let lists = ["extra_special_tokens", "additional_special_tokens"];
    let extra = first.iter().flat_map(|file| lists.iter().filter_map(|k| file[k].as_array())).flatten();
    let extra: Vec<AddedToken> = extra.filter_map(|t| token(t, true)).collect();

    let known: BTreeMap<String, AddedToken> =
        tokenizer.get_added_tokens_decoder().into_values().map(|t| (t.content.clone(), t)).collect();
    let mut new: Vec<AddedToken> = described.into_iter().filter(|t| known.get(&t.content) != Some(t)).collect();
    let special = named.iter().map(|(_, t)| t).chain(&extra);
    for t in special {
        let there = known.contains_key(&t.content) || new.iter().any(|n| n.content == t.content);
        // An end token without an id is an error of its own.
        let lost = named.iter().any(|(k, n)| k == "eos_token" && n == t) && tokenizer.token_to_id(&t.content).is_none();
        if !there && !lost {
            new.push(t.clone());
        }
    }
    for t in &mut new {
        t.special |= named.iter().any(|(_, n)| n.content == t.content);
    }
    super::guard::add(tokenizer, new)?;
    Ok(named.into_iter().map(|(k, t)| (k, t.content)).collect())
}

/// A token as text, or as an object with `content` and flags.
fn token(v: &Value, special: bool) -> Option<AddedToken> {
    let content = v.as_str().or_else(|| v["content"].as_str()).filter(|c| !c.is_empty())?;
    let flag = |key: &str| v[key].as_bool();
    let special = flag("special").unwrap_or(special);
    Some(AddedToken {
        content: content.to_string(),
        single_word: flag("single_word").unwrap_or(false),
        lstrip: flag("lstrip").unwrap_or(false),
        rstrip: flag("rstrip").unwrap_or(false),
        normalized: flag("normalized").unwrap_or(!special),
        special,
    })
}
