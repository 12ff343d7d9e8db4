//! A Hugging Face tokenizer folder: the tokenizer itself, its special tokens, its chat template.

pub(super) mod guard;
mod special;

use super::file;
use crate::bail;
use crate::error::words::plain;
use crate::error::{Context, Error, Result};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use tokenizers::models::ModelWrapper;
use tokenizers::{AddedToken, PostProcessorWrapper, Tokenizer};

/// What a tokenizer folder holds.
pub(super) struct TokenizerFiles {
    /// Without truncation, padding and post-processor: it encodes just the text, with untrimmed offsets.
    pub tokenizer: Tokenizer,
    pub post_processor: Option<PostProcessorWrapper>,
    /// The special token that the tokenizer itself puts in front of a text: what its post-processor says. As in transformers 5,
    /// `add_bos_token` of `tokenizer_config.json` has no say beside a `tokenizer.json`.
    pub leading: Option<u32>,
    /// Named special tokens (`bos_token`, `eos_token`, …): name → text.
    pub names: BTreeMap<String, String>,
    /// How much longer the normalizer can make a text.
    pub growth: guard::Growth,
    pub chat_template: Option<String>,
    /// What transformers would read otherwise.
    pub warnings: Vec<String>,
}

impl TokenizerFiles {
    /// Reads a folder, or a `tokenizer.json` with its neighbours.
    pub fn read(dir_or_file: &Path) -> Result<Self> {
        let (dir, file) = if dir_or_file.is_dir() {
            (dir_or_file.to_path_buf(), dir_or_file.join("tokenizer.json"))
        } else {
            (dir_or_file.parent().map_or_else(PathBuf::new, Path::to_path_buf), dir_or_file.to_path_buf())
        };
        let bytes = file::optional(&file)?.ok_or_else(|| missing(&dir, &file))?;
        let (mut tokenizer, growth) = open(&file, &bytes)?;
        tokenizer.with_truncation(None).map_err(|e| Error::new(e.to_string()))?;
        tokenizer.with_padding(None);
        let (leading, ending) = added_tokens(&tokenizer).with_context(|| file.display())?;
        let post_processor = tokenizer.get_post_processor().cloned();
        tokenizer.with_post_processor(None::<PostProcessorWrapper>);
        let config = read_json(&dir.join("tokenizer_config.json"))?;
        let map = read_json(&dir.join("special_tokens_map.json"))?;
        let names = special::add(&mut tokenizer, &config, &map)?;
        let warnings = rebuilt(&tokenizer, &config, &file)?.into_iter().chain(left_out(&ending, &file)).collect();
        let chat_template = chat_template(&dir, &config)?;
        Ok(Self { leading, names, growth, chat_template, warnings, tokenizer, post_processor })
    }

    /// The id of the image token, which is added if the tokenizer does not know it; the second value tells.
    ///
    /// `expected` is the id that the model's configuration names. The token needs one of the `rows` of the embedding table, if
    /// there are any: where visual tokens take its place, none is ever read.
    pub fn image_token(&mut self, text: &str, expected: Option<u32>, rows: Option<usize>) -> Result<(u32, bool)> {
        let known = self.tokenizer.token_to_id(text);
        // A token that is there keeps its own `lstrip` and `rstrip`.
        if !self.tokenizer.get_added_tokens_decoder().into_values().any(|t| t.content == text) {
            let token = AddedToken::from(text, true);
            guard::add(&mut self.tokenizer, vec![token])?;
        }
        let Some(id) = self.tokenizer.token_to_id(text) else {
            bail!("the tokenizer cannot take up the image token {text:?}"; "choose another model.image_token");
        };
        if let Some(vocab_size) = rows.filter(|n| id as usize >= *n) {
            let reserved = self.reserved(vocab_size);
            let list = if reserved.is_empty() { "none was found".into() } else { reserved.join(", ") };
            bail!("the image token {text:?} would get the id {id}, but the model's embedding table has {vocab_size} rows, \
                and with deliver = \"cross_attention\" the token itself stands in the text";
                "set model.image_token to a token that the tokenizer has and texts do not use ({list})");
        }
        if let Some(expected) = expected.filter(|&e| e != id) {
            bail!("the image token {text:?} has the id {id}, but the model's config.json says {expected}";
                "set model.image_token to the token with the id {expected}, or use the tokenizer that belongs to the model");
        }
        Ok((id, known.is_none()))
    }

    /// Special tokens whose names say that they are there for later use.
    fn reserved(&self, vocab_size: usize) -> Vec<String> {
        const WORDS: [&str; 10] = [
            "reserved",
            "unused",
            "placeholder",
            "extra_id",
            "fim",
            "repo_name",
            "file_sep",
            "empty_output",
            "image",
            "unk",
        ];
        let mut found: Vec<_> = self.tokenizer.get_added_tokens_decoder().into_iter().collect();
        found.sort_by_key(|(id, _)| *id);
        let fits = |(id, t): &(u32, AddedToken)| {
            (*id as usize) < vocab_size && WORDS.iter().any(|w| t.content.to_lowercase().contains(w))
        };
        found.into_iter().filter(fits).take(5).map(|(_, t)| t.content).collect()
    }

    /// What stands for a text that the tokenizer cannot write.
    pub fn unknown(&self) -> Option<u32> {
        let own = match self.tokenizer.get_model() {
            ModelWrapper::BPE(m) => m.get_unk_token().as_deref(),
            ModelWrapper::WordPiece(m) => Some(m.unk_token.as_str()),
            ModelWrapper::WordLevel(m) => Some(m.unk_token.as_str()),
            ModelWrapper::Unigram(_) => None,
        };
        let text = own.or(self.names.get("unk_token").map(String::as_str));
        text.and_then(|t| self.tokenizer.token_to_id(t))
    }

    /// The texts of all special tokens, by id.
    pub fn special_texts(&self) -> Vec<String> {
        let mut special: Vec<_> =
            self.tokenizer.get_added_tokens_decoder().into_iter().filter(|(_, t)| t.special).collect();
        special.sort_by_key(|(id, _)| *id);
        special.into_iter().map(|(_, t)| t.content).collect()
    }
}

/// All that is read of a `tokenizer.json` before `tokenizers` does.
#[derive(serde::Deserialize)]
#[serde(expecting = "an object")]
struct Outline {
    #[serde(default)]
    normalizer: Value,
}

fn open(file: &Path, bytes: &[u8]) -> Result<(Tokenizer, guard::Growth)> {
    let damaged = |e: &dyn std::fmt::Display| {
        let why = plain(&e.to_string());
        Error::new(format!("cannot read the tokenizer {}: {why}", file.display()))
            .hint("fetch the file again; a Git LFS pointer is a few lines of text")
    };
    // `tokenizers` panics on some files that are no JSON, or that have a part of another kind than it expects.
    let outline: Outline = serde_json::from_slice(bytes).map_err(|e| damaged(&e))?;
    let growth = guard::Growth::of(&outline.normalizer).with_context(|| file.display())?;
    let read = guard::catch(|| Tokenizer::from_bytes(bytes));
    read.ok_or_else(|| damaged(&"a part of it has the wrong form"))?.map_err(|e| damaged(&e)).map(|t| (t, growth))
}

fn missing(dir: &Path, file: &Path) -> Error {
    let e = Error::new(format!("there is no tokenizer {}", file.display()));
    if dir.join("tokenizer.model").is_file() {
        return e.hint(
            "the folder has only a SentencePiece tokenizer.model: point model.language.tokenizer to a folder or \
             repository with the tokenizer.json of the same vocabulary",
        );
    }
    e.hint("point model.language.tokenizer to a folder, file or repository with a tokenizer.json")
}

/// Words of Qwen2's tokenizers, as `transformers/models/qwen2/tokenization_qwen2.py` has them.
const QWEN2: &str =
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// transformers 5 takes only the vocabulary of this class from `tokenizer.json`, and splits words in its own way.
fn rebuilt(tokenizer: &Tokenizer, config: &Value, file: &Path) -> Result<Option<String>> {
    let class = config["tokenizer_class"].as_str().map_or("", |c| c.trim_end_matches("Fast"));
    if class != "Qwen2Tokenizer" {
        return Ok(None);
    }
    let split = serde_json::to_value(tokenizer.get_pre_tokenizer())?;
    let same = split["pretokenizers"][0]["pattern"]["Regex"] == QWEN2;
    let told = || {
        format!(
            "{} splits words otherwise than {class}, the tokenizer_class of tokenizer_config.json: here tokenizer.json is \
             followed, transformers 5 follows the class; set tokenizer_class to \"PreTrainedTokenizerFast\" for the same tokens in both",
            file.display()
        )
    };
    Ok((!same).then(told))
}

/// What encoding with special tokens puts around a text: the id in front, the tokens behind.
fn added_tokens(tokenizer: &Tokenizer) -> Result<(Option<u32>, Vec<String>)> {
    let encode = |special| guard::encode(tokenizer, "a", special);
    let (with, without) = (encode(true)?, encode(false)?);
    let (all, text) = (with.get_ids(), without.get_ids());
    let more = all.len().saturating_sub(text.len());
    let found = (0..=more).find(|&i| !text.is_empty() && all[i..].starts_with(text));
    // A text of no tokens says nothing of what stands behind it.
    let Some(at) = found else { return Ok((all.first().copied().filter(|_| more > 0), vec![])) };
    let named = |tokens: &[String]| tokens.iter().map(|t| format!("{t:?}")).collect::<Vec<_>>().join(", ");
    if at > 1 {
        bail!("its post_processor puts {at} tokens in front of a text ({}), which is not supported", named(&with.get_tokens()[..at]);
            "one at most is: change the post_processor, or use another tokenizer of the same vocabulary")
    }
    Ok((all[..at].first().copied(), with.get_tokens()[at + text.len()..].to_vec()))
}

/// What to say of tokens that the tokenizer itself would put behind a text.
fn left_out(ending: &[String], file: &Path) -> Option<String> {
    let first = ending.first()?;
    Some(format!(
        "{}: its post_processor puts {first:?} behind a text, which is left out here: the template says where an answer ends, as \
         with add_special_tokens=False in transformers",
        file.display()
    ))
}

const AGAIN: &str = "the file is damaged or was edited: get it again from where the model comes from";

/// A JSON file, or `null` if there is none.
fn read_json(path: &Path) -> Result<Value> {
    let Some(bytes) = file::optional(path)? else { return Ok(Value::Null) };
    let damaged =
        |e: serde_json::Error| Error::new(format!("{}: {}", path.display(), plain(&e.to_string()))).hint(AGAIN);
    serde_json::from_slice(&bytes).map_err(damaged)
}

/// `chat_template.jinja`, `additional_chat_templates/default.jinja`, `chat_template.json`, or `tokenizer_config.json`'s entry (text, or a list of named ones).
fn chat_template(dir: &Path, config: &Value) -> Result<Option<String>> {
    for name in ["chat_template.jinja", "additional_chat_templates/default.jinja"] {
        let file = dir.join(name);
        if let Some(bytes) = file::optional(&file)? {
            let text = String::from_utf8(bytes);
            return text.map(Some).map_err(|_| Error::new(format!("{} is not UTF-8 text", file.display())).hint(AGAIN));
        }
    }
    let own = read_json(&dir.join("chat_template.json"))?;
    let entry = if own["chat_template"].is_null() { &config["chat_template"] } else { &own["chat_template"] };
    let named = |list: &Vec<Value>| {
        let default = list.iter().find(|t| t["name"] == "default").or(list.first());
        default.and_then(|t| t["template"].as_str()).map(String::from)
    };
    Ok(entry.as_str().map(String::from).or_else(|| entry.as_array().and_then(named)))
}
