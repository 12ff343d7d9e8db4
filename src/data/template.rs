//! Conversations as text, with the spans that are trained on.
//!
//! `plain` and `vicuna_v1` follow LLaVA (`llava/conversation.py`, `llava/train/train.py`): loss on the caption and its
//! newline, or on each answer (with the space before it) and its end token. `chat` renders the tokenizer's own Jinja
//! template; its spans are what each assistant message adds after the generation prompt, through its end token.

use super::source::{Conversation, IMAGE_PLACEHOLDER, Role, Turn};
use crate::bail;
use crate::error::{Error, Result};
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};
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
    /// How many image tokens `text` holds.
    pub images: usize,
}

/// Special tokens as text, as the templates need them.
#[derive(Debug, Clone, Default)]
pub struct Marks {
    pub bos: String,
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
    Ok(Rendered { text, trained: std::iter::once(start..end).collect(), images: c.images.len() })
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
    Rendered { text, trained, images: c.images.len() }
}

/// What opens the answer to the last turn of `c` in `vicuna_v1`.
pub const VICUNA_OPENING: &str = "ASSISTANT:";

/// A tokenizer's chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    marks: Marks,
    /// Whether the template wants a message's content as a list of parts.
    parts: bool,
    /// The texts of all special tokens: an answer's span ends with the first one after it.
    special: Vec<String>,
}

const NAME: &str = "chat_template";

impl ChatTemplate {
    /// Compiles a template and finds out which form of message it takes.
    ///
    /// # Errors
    /// If it does not compile, or shows no user's text in either form.
    pub fn new(source: &str, marks: Marks, special: Vec<String>) -> Result<Self> {
        let mut env = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build().map_err(|e| wrong(&e))?;
        env.set_syntax(syntax);
        env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        env.add_function("raise_exception", |message: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        env.add_template_owned(NAME, without_generation_tags(source)).map_err(|e| wrong(&e))?;
        let mut template = Self { env, marks, parts: false, special };
        let probe = [Turn { role: Role::User, text: "adfreeze probe".into() }];
        for parts in [false, true] {
            template.parts = parts;
            if template.render(&probe, true).is_ok_and(|text| text.contains("adfreeze probe")) {
                return Ok(template);
            }
        }
        template.parts = false;
        template.render(&probe, true)?;
        bail!("the chat template does not show the user's text";
            "use another template (`vicuna_v1`), or correct chat_template.jinja")
    }

    /// The text of some turns; `open` adds the opening of the assistant's answer.
    pub fn render(&self, turns: &[Turn], open: bool) -> Result<String> {
        let messages: Vec<Value> = turns.iter().map(|t| self.message(t)).collect();
        let vars = context! {
            messages,
            add_generation_prompt => open,
            bos_token => self.marks.bos.as_str(),
            eos_token => self.marks.eos.as_str(),
        };
        self.env.get_template(NAME).and_then(|t| t.render(vars)).map_err(|e| wrong(&e))
    }

    fn message(&self, turn: &Turn) -> Value {
        let role = match turn.role {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        if !self.parts {
            let text = match turn.role {
                Role::User => user_text(&turn.text, &self.marks.image),
                _ => turn.text.clone(),
            };
            return context! { role, content => text };
        }
        let images = if turn.role == Role::User { turn.text.matches(IMAGE_PLACEHOLDER).count() } else { 0 };
        let text = match images {
            0 => turn.text.clone(),
            _ => turn.text.replace(IMAGE_PLACEHOLDER, "").trim().to_string(),
        };
        let mut parts = vec![context! { type => "image" }; images];
        parts.push(context! { type => "text", text });
        context! { role, content => parts }
    }

    /// The whole conversation with its trained spans.
    ///
    /// # Errors
    /// If the text up to a turn is not the beginning of the whole text: then no span can be told.
    pub fn conversation(&self, c: &Conversation) -> Result<Rendered> {
        let text = self.render(&c.turns, false)?;
        let mut trained = vec![];
        for (i, turn) in c.turns.iter().enumerate().filter(|(_, t)| t.role == Role::Assistant) {
            let before = self.render(&c.turns[..i], true)?;
            let through = self.render(&c.turns[..=i], false)?;
            if !through.starts_with(&before) || !text.starts_with(&through) {
                bail!("the chat template writes turn {i} differently when later turns follow, so its answer cannot be told apart";
                    "split the conversation into one sample for each answer, or use the template `vicuna_v1`");
            }
            let end = before.len() + self.answer_end(&through[before.len()..], &turn.text);
            trained.push(before.len()..end);
        }
        Ok(Rendered { text, trained, images: c.images.len() })
    }

    /// Bytes of `added` (answer, end token, what follows) through the end token.
    fn answer_end(&self, added: &str, answer: &str) -> usize {
        let answer = answer.trim();
        let from = added.find(answer).map_or(0, |at| at + answer.len());
        let tokens = self.special.iter().filter_map(|s| Some((added[from..].find(s.as_str())?, s.len())));
        // The earliest; of those that begin together the longest.
        let first = tokens.min_by_key(|&(at, len)| (at, std::cmp::Reverse(len)));
        first.map_or(added.len(), |(at, len)| from + at + len)
    }
}

fn wrong(e: &minijinja::Error) -> Error {
    let cause = e.detail().map_or_else(|| e.kind().to_string(), ToString::to_string);
    let line = e.line().map_or_else(String::new, |l| format!(", line {l}"));
    Error::new(format!("the chat template cannot be used{line}: {cause}"))
        .hint("use another template (`vicuna_v1`), or correct chat_template.jinja of the tokenizer")
}

/// HF's `{% generation %}` blocks mark answers for its own masks; they add nothing to the text.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(open) = rest.find("{%") {
        let Some(len) = rest[open + 2..].find("%}") else { break };
        let tag = &rest[open + 2..open + 2 + len];
        let word = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match word {
            "generation" => tag.replace("generation", "if true"),
            "endgeneration" => tag.replace("endgeneration", "endif"),
            _ => tag.to_string(),
        };
        out.push_str(&rest[..open + 2]);
        out.push_str(&replacement);
        out.push_str("%}");
        rest = &rest[open + len + 4..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
