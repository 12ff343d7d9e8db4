//! The keys of a sample as they stand in a data file, with errors in the words of a user.
//!
//! Keys that we do not know (`model`, `source`, …) are allowed, published files are full of them; those that would carry something
//! to be learned, and are not read, are an error. Exports write a null under every key that they have: that is as if it were absent,
//! also beside another name of the same key.

use serde::Deserialize;
use serde::de::{Deserializer, Error};
use serde_json::Value;

#[derive(Deserialize)]
#[serde(expecting = "a sample, an object {…}")]
pub(super) struct RawConversation {
    pub id: Option<Id>,
    #[serde(default)]
    pub image: Paths,
    #[serde(default)]
    pub images: Paths,
    #[serde(alias = "messages")]
    pub conversations: Vec<RawTurn>,
    /// LLaMA-Factory's place for it.
    pub system: Option<String>,
    pub category: Option<String>,
    pub absent: Option<Vec<String>>,
    #[serde(default)]
    chosen: Filled,
    #[serde(default)]
    rejected: Filled,
    /// ms-swift's.
    #[serde(default)]
    rejected_response: Filled,
    #[serde(default)]
    rejected_messages: Filled,
    #[serde(default)]
    history: Filled,
    #[serde(default)]
    tools: Filled,
    #[serde(default)]
    video: Filled,
    #[serde(default)]
    videos: Filled,
    #[serde(default)]
    audio: Filled,
    #[serde(default)]
    audios: Filled,
}

#[derive(Deserialize)]
#[serde(expecting = "a turn, an object {\"from\": …, \"value\": …}")]
pub(super) struct RawTurn {
    #[serde(alias = "role")]
    pub from: String,
    #[serde(alias = "content")]
    pub value: String,
    /// Whether an answer is to be learned, as OpenAI, axolotl and ms-swift write it.
    #[serde(default)]
    weight: Weight,
    #[serde(default)]
    train: Weight,
    #[serde(default)]
    loss: Weight,
    #[serde(default)]
    tool_calls: Filled,
    #[serde(default)]
    function_call: Filled,
    #[serde(default)]
    reasoning_content: Filled,
    #[serde(default)]
    reasoning: Filled,
    #[serde(default)]
    thinking: Filled,
    #[serde(default)]
    image: Filled,
    #[serde(default)]
    images: Filled,
}

impl RawTurn {
    /// Is it to be learned, if it is an answer?
    pub fn is_learned(&self) -> bool {
        [&self.weight, &self.train, &self.loss].iter().all(|w| w.0)
    }
}

#[derive(Deserialize)]
#[serde(expecting = "a pair, an object {…}")]
pub(super) struct RawPreference {
    pub id: Option<Id>,
    #[serde(default)]
    pub image: Paths,
    #[serde(default)]
    pub images: Paths,
    pub prompt: String,
    pub chosen: String,
    pub rejected: String,
    pub system: Option<String>,
    #[serde(default)]
    history: Filled,
    #[serde(default)]
    conversations: Filled,
    #[serde(default)]
    messages: Filled,
    #[serde(default)]
    tools: Filled,
    #[serde(default)]
    video: Filled,
    #[serde(default)]
    videos: Filled,
    #[serde(default)]
    audio: Filled,
    #[serde(default)]
    audios: Filled,
}

/// What a sample says that is not read.
pub(super) trait Unread {
    /// The first key of those, and what to do about it.
    fn unread(&self) -> Option<(&'static str, &'static str)>;
}

const MEDIA: &str = "models here see pictures only: take such samples out, or their frames as pictures";
const TOOLS: &str = "write what a tool does into the texts of the turns, or take such samples out";
const EARLIER: &str = "write all turns, the earlier ones too, into `conversations`";
const THOUGHT: &str = "write what is to be learned of it into the turn's own text";
const SHOWN: &str = "name the pictures in `image` of the sample, and write <image> into the turn where each is shown";
const PAIR: &str = "pairs are data of a stage with the objective dpo; leave the key out to learn the conversation";

fn filled(keys: &[(&'static str, Filled, &'static str)]) -> Option<(&'static str, &'static str)> {
    keys.iter().find(|(_, filled, _)| filled.0).map(|(key, _, hint)| (*key, *hint))
}

impl Unread for RawConversation {
    fn unread(&self) -> Option<(&'static str, &'static str)> {
        let turns = self.conversations.iter().find_map(|t| {
            filled(&[
                ("tool_calls", t.tool_calls, TOOLS),
                ("function_call", t.function_call, TOOLS),
                ("reasoning_content", t.reasoning_content, THOUGHT),
                ("reasoning", t.reasoning, THOUGHT),
                ("thinking", t.thinking, THOUGHT),
                ("image", t.image, SHOWN),
                ("images", t.images, SHOWN),
            ])
        });
        turns.or(filled(&[
            ("chosen", self.chosen, PAIR),
            ("rejected", self.rejected, PAIR),
            ("rejected_response", self.rejected_response, PAIR),
            ("rejected_messages", self.rejected_messages, PAIR),
            ("history", self.history, EARLIER),
            ("tools", self.tools, TOOLS),
            ("video", self.video, MEDIA),
            ("videos", self.videos, MEDIA),
            ("audio", self.audio, MEDIA),
            ("audios", self.audios, MEDIA),
        ]))
    }
}

impl Unread for RawPreference {
    fn unread(&self) -> Option<(&'static str, &'static str)> {
        let one = "a pair has one question, `prompt`: write what was said before into it";
        filled(&[
            ("history", self.history, one),
            ("conversations", self.conversations, one),
            ("messages", self.messages, one),
            ("tools", self.tools, TOOLS),
            ("video", self.video, MEDIA),
            ("videos", self.videos, MEDIA),
            ("audio", self.audio, MEDIA),
            ("audios", self.audios, MEDIA),
        ])
    }
}

/// A value as a message shows it.
fn shown(v: &Value) -> String {
    match v {
        Value::Object(_) => "{…}".into(),
        Value::Array(_) => "[…]".into(),
        other => other.to_string(),
    }
}

/// Text, or a whole number, digit by digit.
pub(super) struct Id(pub String);

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        match Value::deserialize(d)? {
            Value::String(s) => Ok(Self(s)),
            // Whole numbers beyond 64 bits come as this, rounded: two of them would be one.
            Value::Number(n) if n.is_f64() && n.as_f64().is_none_or(|v| v.abs() >= 2f64.powi(53)) => {
                Err(D::Error::custom("id is a number too large to be kept digit by digit: put it in quotes"))
            }
            Value::Number(n) => Ok(Self(n.to_string())),
            other => Err(D::Error::custom(format!("id must be text or a number, not {}", shown(&other)))),
        }
    }
}

/// A path, a list of paths, or nothing: null, or an empty text as in texts of LLaVA's mixtures.
#[derive(Default)]
pub(super) struct Paths(pub Vec<String>);

impl Paths {
    /// The one of two names of the key that holds something; `None` if both do, and not the same.
    pub fn or(self, other: Self) -> Option<Self> {
        match (self.0.is_empty(), other.0.is_empty()) {
            (true, _) => Some(other),
            (_, true) => Some(self),
            _ => (self.0 == other.0).then_some(self),
        }
    }

    fn add(&mut self, v: Value) -> Result<(), String> {
        match v {
            Value::Null => Ok(()),
            Value::String(s) => {
                self.0.extend(Some(s).filter(|s| !s.is_empty()));
                Ok(())
            }
            Value::Array(list) => list.into_iter().try_for_each(|v| self.add(v)),
            other => Err(format!("image must be a path or a list of paths, not {}", shown(&other))),
        }
    }
}

impl<'de> Deserialize<'de> for Paths {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let mut paths = Self::default();
        paths.add(Value::deserialize(d)?).map_err(D::Error::custom)?;
        Ok(paths)
    }
}

/// Whether a turn is to be learned: 1 or true (the default), 0 or false.
struct Weight(bool);

impl Default for Weight {
    fn default() -> Self {
        Self(true)
    }
}

impl<'de> Deserialize<'de> for Weight {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let v = Value::deserialize(d)?;
        match (&v, v.as_f64()) {
            (Value::Null, _) => Ok(Self(true)),
            (Value::Bool(learned), _) => Ok(Self(*learned)),
            (_, Some(0.0)) => Ok(Self(false)),
            (_, Some(1.0)) => Ok(Self(true)),
            (_, Some(_)) => {
                Err(D::Error::custom(format!("the weight of a turn is {v}: only whole turns are learned, or not")))
            }
            _ => Err(D::Error::custom(format!(
                "the weight of a turn must be 0 or 1, or true or false, not {}",
                shown(&v)
            ))),
        }
    }
}

/// Whether a key that is not read has anything in it.
#[derive(Clone, Copy, Default)]
struct Filled(bool);

impl<'de> Deserialize<'de> for Filled {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        Ok(Self(match Value::deserialize(d)? {
            Value::Null => false,
            Value::Bool(b) => b,
            Value::Number(_) => true,
            // Tools are a list in a text, often an empty one.
            Value::String(s) => !matches!(s.trim(), "" | "[]" | "{}" | "null"),
            Value::Array(list) => !list.is_empty(),
            Value::Object(keys) => !keys.is_empty(),
        }))
    }
}
