//! Conversations as text, with the spans that are trained on.
//!
//! `plain` and `vicuna_v1` follow LLaVA (`llava/conversation.py`, `llava/train/train.py`): loss on the caption and its
//! newline, or on each answer (with the space before it) and its end token. `chat` renders the tokenizer's own Jinja
//! template ([`ChatTemplate`]).

mod chat;
mod jinja;
mod json;
mod marks;
mod python;
mod spans;

pub use chat::{ChatTemplate, Source};

use super::source::{Conversation, IMAGE_PLACEHOLDER, Role, Turn};
use crate::bail;
use crate::error::Result;
use std::ops::Range;

/// LLaVA's system text of `vicuna_v1`.
pub const VICUNA_SYSTEM: &str = "A chat between a curious user and an artificial intelligence assistant. \
    The assistant gives helpful, detailed, and polite answers to the user's questions.";

/// A conversation as text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rendered {
    /// Without a leading bos, unless a chat template writes one.
    pub text: String,
    /// Byte ranges of `text` that are trained on, in order.
    pub trained: Vec<Range<usize>>,
    /// Is a token trained on that only overlaps a range, as in the masks of transformers? Else its first byte decides.
    pub overlapping: bool,
    /// How many image tokens `text` holds.
    pub images: usize,
}

/// Special tokens as text, as the templates need them.
#[derive(Debug, Clone, Default)]
pub struct Marks {
    pub eos: String,
    /// What stands for a picture in the rendered text.
    pub image: String,
}

/// Every `<image>` of a user's text goes to the front, each on a line of its own; other texts are left as they are.
fn user_text(text: &str, image: &str) -> String {
    let marks = text.matches(IMAGE_PLACEHOLDER).count();
    if marks == 0 {
        return text.to_string();
    }
    let rest = text.replace(IMAGE_PLACEHOLDER, "");
    format!("{}{}", format!("{image}\n").repeat(marks), rest.trim()).trim().to_string()
}

/// `<image>` caption newline. The user's text is dropped.
pub fn plain(c: &Conversation, marks: &Marks) -> Result<Rendered> {
    let [Turn { role: Role::User, .. }, Turn { role: Role::Assistant, text: caption }] = c.turns.as_slice() else {
        bail!("the template `plain` needs one human and one gpt turn, this has {} turns", c.turns.len();
            "use the template `vicuna_v1` or `chat` for conversations");
    };
    let mut text = marks.image.repeat(c.images.len());
    let start = text.len();
    text.push_str(caption);
    text.push('\n');
    let end = text.len();
    Ok(Rendered { text, trained: std::iter::once(start..end).collect(), overlapping: false, images: c.images.len() })
}

/// `SYSTEM USER: question ASSISTANT: answer</s>USER: …`; a system turn takes the place of `system`.
pub fn vicuna_v1(c: &Conversation, system: &str, marks: &Marks) -> Rendered {
    let mut text = String::new();
    let mut trained = vec![];
    let own = c.turns.first().filter(|t| t.role == Role::System);
    text.push_str(own.map_or(system, |t| &t.text));
    text.push(' ');
    for turn in &c.turns {
        match turn.role {
            Role::System => {}
            Role::User => text.push_str(&format!("USER: {} ", user_text(&turn.text, &marks.image))),
            Role::Assistant => {
                text.push_str("ASSISTANT:");
                let start = text.len();
                text.push_str(&format!(" {}{}", turn.text, marks.eos));
                trained.push(start..text.len());
            }
        }
    }
    Rendered { text, trained, overlapping: false, images: c.images.len() }
}

/// What opens the answer to the last turn of `c` in `vicuna_v1`.
pub const VICUNA_OPENING: &str = "ASSISTANT:";

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
