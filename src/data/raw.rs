//! The keys of a sample as they stand in a data file, with errors in the words of a user.
//!
//! Keys that we do not know (`model`, `source`, …) are allowed, published files are full of them; those that would carry something
//! to be learned, and are not read, are an error.

use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::fmt;

#[derive(Deserialize)]
#[serde(expecting = "a sample, an object {…}")]
pub(super) struct RawConversation {
    pub id: Option<Id>,
    #[serde(default, alias = "images")]
    pub image: Paths,
    #[serde(alias = "messages")]
    pub conversations: Vec<RawTurn>,
    /// LLaMA-Factory's place for it.
    pub system: Option<String>,
    pub category: Option<String>,
    #[serde(default)]
    pub absent: Vec<String>,
    #[serde(default)]
    chosen: Filled,
    #[serde(default)]
    rejected: Filled,
    #[serde(default)]
    history: Filled,
    #[serde(default)]
    tools: Filled,
    #[serde(default, alias = "videos")]
    video: Filled,
    #[serde(default, alias = "audios")]
    audio: Filled,
}

#[derive(Deserialize)]
#[serde(expecting = "a turn, an object {\"from\": …, \"value\": …}")]
pub(super) struct RawTurn {
    #[serde(alias = "role")]
    pub from: String,
    #[serde(alias = "content")]
    pub value: String,
    /// Whether an answer is to be learned, as OpenAI, axolotl and ms-swift write it.
    #[serde(default, alias = "train", alias = "loss")]
    pub weight: Weight,
    #[serde(default, alias = "function_call")]
    tool_calls: Filled,
    #[serde(default, alias = "reasoning")]
    reasoning_content: Filled,
}

#[derive(Deserialize)]
#[serde(expecting = "a pair, an object {…}")]
pub(super) struct RawPreference {
    pub id: Option<Id>,
    #[serde(default, alias = "images")]
    pub image: Paths,
    pub prompt: String,
    pub chosen: String,
    pub rejected: String,
    pub system: Option<String>,
    #[serde(default)]
    history: Filled,
    #[serde(default, alias = "messages")]
    conversations: Filled,
    #[serde(default)]
    tools: Filled,
    #[serde(default, alias = "videos")]
    video: Filled,
    #[serde(default, alias = "audios")]
    audio: Filled,
}

/// What a sample says that is not read.
pub(super) trait Unread {
    /// The first key of those, and what to do about it.
    fn unread(&self) -> Option<(&'static str, &'static str)>;
}

const MEDIA: &str = "models here see pictures only: take such samples out, or their frames as pictures";
const TOOLS: &str = "write what a tool does into the texts of the turns, or take such samples out";
const EARLIER: &str = "write all turns, the earlier ones too, into `conversations`";

fn filled(keys: &[(&'static str, Filled, &'static str)]) -> Option<(&'static str, &'static str)> {
    keys.iter().find(|(_, filled, _)| filled.0).map(|(key, _, hint)| (*key, *hint))
}

impl Unread for RawConversation {
    fn unread(&self) -> Option<(&'static str, &'static str)> {
        let pair = "pairs are data of a stage with the objective dpo; leave the key out to learn the conversation";
        let turns = self.conversations.iter().find_map(|t| {
            filled(&[
                ("tool_calls", t.tool_calls, TOOLS),
                (
                    "reasoning_content",
                    t.reasoning_content,
                    "write what is to be learned of it into the turn's own text",
                ),
            ])
        });
        turns.or(filled(&[
            ("chosen", self.chosen, pair),
            ("rejected", self.rejected, pair),
            ("history", self.history, EARLIER),
            ("tools", self.tools, TOOLS),
            ("video", self.video, MEDIA),
            ("audio", self.audio, MEDIA),
        ]))
    }
}

impl Unread for RawPreference {
    fn unread(&self) -> Option<(&'static str, &'static str)> {
        let one = "a pair has one question, `prompt`: write what was said before into it";
        filled(&[
            ("history", self.history, one),
            ("conversations", self.conversations, one),
            ("tools", self.tools, TOOLS),
            ("video", self.video, MEDIA),
            ("audio", self.audio, MEDIA),
        ])
    }
}

/// Text, or a whole number, digit by digit.
pub(super) struct Id(pub String);

impl<'de> Deserialize<'de> for Id {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Seen;
        impl<'de> Visitor<'de> for Seen {
            type Value = Id;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("text or a number")
            }

            fn visit_str<E: Error>(self, v: &str) -> Result<Id, E> {
                Ok(Id(v.into()))
            }

            fn visit_u64<E: Error>(self, v: u64) -> Result<Id, E> {
                Ok(Id(v.to_string()))
            }

            fn visit_i64<E: Error>(self, v: i64) -> Result<Id, E> {
                Ok(Id(v.to_string()))
            }

            fn visit_f64<E: Error>(self, v: f64) -> Result<Id, E> {
                // Whole numbers beyond 64 bits come as this, rounded: two of them would be one.
                match serde_json::Number::from_f64(v) {
                    Some(n) if v.abs() < 2f64.powi(53) => Ok(Id(n.to_string())),
                    _ => Err(E::custom("id is a number too large to be kept digit by digit: put it in quotes")),
                }
            }

            fn visit_bool<E: Error>(self, v: bool) -> Result<Id, E> {
                Err(E::custom(format!("id must be text or a number, not {v}")))
            }

            fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<Id, A::Error> {
                Err(A::Error::custom("id must be text or a number, not {…}"))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, _: A) -> Result<Id, A::Error> {
                Err(A::Error::custom("id must be text or a number, not […]"))
            }
        }
        d.deserialize_any(Seen)
    }
}

/// A path, a list of paths, or nothing: null, or an empty text as in texts of LLaVA's mixtures.
#[derive(Default)]
pub(super) struct Paths(pub Vec<String>);

impl<'de> Deserialize<'de> for Paths {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        const WANTED: &str = "image must be a path or a list of paths";
        struct Seen;
        impl<'de> Visitor<'de> for Seen {
            type Value = Paths;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a path or a list of paths")
            }

            fn visit_unit<E: Error>(self) -> Result<Paths, E> {
                Ok(Paths::default())
            }

            fn visit_str<E: Error>(self, v: &str) -> Result<Paths, E> {
                Ok(Paths(if v.is_empty() { vec![] } else { vec![v.into()] }))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Paths, A::Error> {
                let mut paths = vec![];
                while let Some(Paths(one)) = list.next_element()? {
                    paths.extend(one);
                }
                Ok(Paths(paths))
            }

            fn visit_map<A: MapAccess<'de>>(self, _: A) -> Result<Paths, A::Error> {
                Err(A::Error::custom(format!("{WANTED}, not {{…}}")))
            }

            fn visit_bool<E: Error>(self, v: bool) -> Result<Paths, E> {
                Err(E::custom(format!("{WANTED}, not {v}")))
            }

            fn visit_u64<E: Error>(self, v: u64) -> Result<Paths, E> {
                Err(E::custom(format!("{WANTED}, not {v}")))
            }
        }
        d.deserialize_any(Seen)
    }
}

/// Whether a turn is to be learned: 1 or true (the default), 0 or false.
pub(super) struct Weight(pub bool);

impl Default for Weight {
    fn default() -> Self {
        Self(true)
    }
}

impl<'de> Deserialize<'de> for Weight {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Seen;
        impl Visitor<'_> for Seen {
            type Value = Weight;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("a weight of 0 or 1, or true or false")
            }

            fn visit_unit<E: Error>(self) -> Result<Weight, E> {
                Ok(Weight(true))
            }

            fn visit_bool<E: Error>(self, v: bool) -> Result<Weight, E> {
                Ok(Weight(v))
            }

            fn visit_u64<E: Error>(self, v: u64) -> Result<Weight, E> {
                self.visit_f64(v as f64)
            }

            fn visit_f64<E: Error>(self, v: f64) -> Result<Weight, E> {
                match v {
                    0.0 => Ok(Weight(false)),
                    1.0 => Ok(Weight(true)),
                    v => Err(E::custom(format!("the weight of a turn is {v}: only whole turns are learned, or not"))),
                }
            }
        }
        d.deserialize_any(Seen)
    }
}

/// Whether a key that is not read has anything in it.
#[derive(Clone, Copy, Default)]
pub(super) struct Filled(bool);

impl<'de> Deserialize<'de> for Filled {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Seen;
        impl<'de> Visitor<'de> for Seen {
            type Value = Filled;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("anything")
            }

            fn visit_unit<E: Error>(self) -> Result<Filled, E> {
                Ok(Filled(false))
            }

            fn visit_bool<E: Error>(self, v: bool) -> Result<Filled, E> {
                Ok(Filled(v))
            }

            fn visit_str<E: Error>(self, v: &str) -> Result<Filled, E> {
                // Tools are a list in a text, often an empty one.
                Ok(Filled(!matches!(v.trim(), "" | "[]" | "{}" | "null")))
            }

            fn visit_u64<E: Error>(self, _: u64) -> Result<Filled, E> {
                Ok(Filled(true))
            }

            fn visit_i64<E: Error>(self, _: i64) -> Result<Filled, E> {
                Ok(Filled(true))
            }

            fn visit_f64<E: Error>(self, _: f64) -> Result<Filled, E> {
                Ok(Filled(true))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Filled, A::Error> {
                let mut filled = false;
                while list.next_element::<IgnoredAny>()?.is_some() {
                    filled = true;
                }
                Ok(Filled(filled))
            }

            fn visit_map<A: MapAccess<'de>>(self, mut keys: A) -> Result<Filled, A::Error> {
                let mut filled = false;
                while keys.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {
                    filled = true;
                }
                Ok(Filled(filled))
            }
        }
        d.deserialize_any(Seen)
    }
}
