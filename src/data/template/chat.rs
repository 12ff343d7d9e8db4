//! A tokenizer's chat template: which form of message it takes, what it writes, and which parts of that are answers.

use super::jinja::{self, NAME, wrong};
use super::marks::{self, Unmarked};
use super::spans::Spans;
use super::{Rendered, user_text};
use crate::bail;
use crate::data::source::{Conversation, IMAGE_PLACEHOLDER, Role, Turn};
use crate::error::Result;
use jiff::civil::Date;
use minijinja::{Environment, Value, context};
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::mpsc;
use std::time::Duration;

/// Work that a template may do: instructions, each worth 64 bytes written; and more for each turn of a long conversation.
const FUEL: u64 = 2_000_000;
const FUEL_PER_TURN: u64 = 5_000;
/// Bytes that a template may write, beside sixteen times the conversation.
const WRITTEN: usize = 1 << 20;
/// Longest conversation that is rendered turn by turn where marks do not survive.
const BY_PREFIX: usize = 64;

/// What the text of a probe says; no template has it of its own.
const PROBE: &str = "adfreeze probe";

/// A template and what it is rendered with.
#[derive(Debug, Clone, Default)]
pub struct Source {
    /// The Jinja text.
    pub template: String,
    /// Named special tokens of the tokenizer (`bos_token`, …): name → text.
    pub names: BTreeMap<String, String>,
    /// The texts of all special tokens: an answer's span ends with the first one after it.
    pub special: Vec<String>,
    /// What stands for a picture in the rendered text.
    pub image: String,
    /// What `strftime_now` says.
    pub date: Date,
}

/// A chat template, ready to render.
#[derive(Debug)]
pub struct ChatTemplate {
    env: Environment<'static>,
    source: Source,
    /// Does it take a message's content as text?
    text: bool,
    /// Does it take a list of parts?
    parts: bool,
    /// Does it mark answers with `{% generation %}`?
    marks: bool,
}

/// How a conversation is to be rendered.
#[derive(Clone, Copy, Default)]
struct How {
    /// With the opening of the assistant's answer.
    open: bool,
    parts: bool,
    /// With a mark behind each turn's text.
    marked: bool,
}

/// How long a look at a template may take. Fuel ends loops; comparing and writing out lists of lists that share their parts takes
/// none, and doubles with each level.
const LONGEST: Duration = Duration::from_secs(20);

/// What `f` gives, or `None` if that takes too long: it then goes on in a thread of its own, until the process ends.
fn within<T: Send + 'static>(limit: Duration, f: impl FnOnce() -> T + Send + 'static) -> Option<T> {
    let (send, receive) = mpsc::channel();
    std::thread::spawn(move || send.send(f()));
    receive.recv_timeout(limit).ok()
}

impl ChatTemplate {
    /// Compiles a template and finds out which forms of message it takes.
    ///
    /// # Errors
    /// If it does not compile or come to an end, or shows no user's text in either form.
    pub fn new(source: Source) -> Result<Self> {
        let probed = within(LONGEST, move || Self::probed(source));
        probed.unwrap_or_else(|| {
            bail!("the chat template cannot be used: it does not come to an end in {} s", LONGEST.as_secs();
                "correct chat_template.jinja of the tokenizer, or use another template (`vicuna_v1`)")
        })
    }

    /// As [`Self::new`], however long it takes.
    fn probed(source: Source) -> Result<Self> {
        let mut env = jinja::environment(&source.template, source.date)?;
        env.set_fuel(Some(FUEL));
        let marks = jinja::has_generation(&source.template);
        let mut template = Self { env, source, text: false, parts: false, marks };
        let turn = |role, text: &str| Turn { role, text: text.into() };
        let question = [turn(Role::User, PROBE)];
        // Some want a system turn.
        let instructed = [turn(Role::System, PROBE), turn(Role::User, PROBE)];
        let parts = |parts| How { open: true, parts, marked: false };
        // A list that is written as such is none that was understood.
        let shown = |turns, how| template.render(turns, how).map(|t| t.contains(PROBE) && !t.contains("'type'"));
        let takes = |how| [&question[..], &instructed].iter().any(|turns| shown(turns, how).unwrap_or(false));
        let (text, some_parts) = (takes(parts(false)), takes(parts(true)));
        // A template that takes both must also show a picture as the model's own token.
        let picture = [turn(Role::User, &format!("{IMAGE_PLACEHOLDER}\n{PROBE}"))];
        let own_token = || {
            let shown = template.render(&picture, parts(true)).unwrap_or_default();
            shown.matches(&template.source.image).count() == 1
        };
        (template.text, template.parts) = (text, some_parts && (!text || own_token()));
        if !template.text && !template.parts {
            template.render(&question, parts(false))?;
            bail!("the chat template does not show the user's text";
                "use another template (`vicuna_v1`), or correct chat_template.jinja")
        }
        // Whether it can is told of each conversation.
        _ = template.example();
        Ok(template)
    }

    /// The text of some turns and the opening of the assistant's answer.
    ///
    /// # Errors
    /// If the template raises one, or does not come to an end.
    pub fn prompt(&self, turns: &[Turn]) -> Result<String> {
        self.render(turns, How { open: true, parts: self.as_parts(turns), marked: false })
    }

    /// Parts where there are pictures, and where nothing else is understood.
    fn as_parts(&self, turns: &[Turn]) -> bool {
        let picture = |t: &Turn| t.role == Role::User && t.text.contains(IMAGE_PLACEHOLDER);
        self.parts && (!self.text || turns.iter().any(picture))
    }

    fn render(&self, turns: &[Turn], how: How) -> Result<String> {
        Ok(self.unmarked(turns, how)?.text)
    }

    fn unmarked(&self, turns: &[Turn], how: How) -> Result<Unmarked> {
        if let Some(turn) = turns.iter().position(|t| t.text.contains(marks::is_mark)) {
            bail!("turn {turn} has one of the characters U+FDD0 … U+FDD3, which Unicode keeps from texts"; "take it out")
        }
        let messages: Vec<Value> = turns.iter().enumerate().map(|(i, t)| self.message(t, i, how)).collect();
        let mut vars: BTreeMap<&str, Value> =
            self.source.names.iter().map(|(name, text)| (name.as_str(), Value::from(text.as_str()))).collect();
        let none = || Value::from(());
        vars.extend([("messages", Value::from(messages)), ("tools", none()), ("documents", none())]);
        vars.insert("add_generation_prompt", how.open.into());
        let read: usize = turns.iter().map(|t| t.text.len()).sum();
        let fuel = FUEL_PER_TURN * turns.len() as u64 + read as u64;
        let longer = (fuel > FUEL).then(|| {
            let mut env = self.env.clone();
            env.set_fuel(Some(fuel));
            env
        });
        let env = longer.as_ref().unwrap_or(&self.env);
        let text = env.get_template(NAME).and_then(|t| t.render(vars)).map_err(|e| wrong(&e))?;
        if text.len() > WRITTEN + 16 * (read + 64 * turns.len()) {
            bail!("the chat template makes {} bytes of a conversation of {read}", text.len();
                "use another template (`vicuna_v1`), or correct chat_template.jinja of the tokenizer")
        }
        Ok(Unmarked::new(&text))
    }

    fn message(&self, turn: &Turn, number: usize, how: How) -> Value {
        let role = match turn.role {
            Role::System => "system",
            Role::User => "user",
            Role::Assistant => "assistant",
        };
        let images = if turn.role == Role::User { turn.text.matches(IMAGE_PLACEHOLDER).count() } else { 0 };
        let text = match turn.role {
            Role::User if how.parts && images > 0 => turn.text.replace(IMAGE_PLACEHOLDER, "").trim().to_string(),
            Role::User => user_text(&turn.text, &self.source.image),
            _ => turn.text.clone(),
        };
        let text = if how.marked { marks::turn(&text, number) } else { text };
        if !how.parts {
            return context! { role, content => text };
        }
        let mut parts = vec![context! { type => "image" }; images];
        parts.push(context! { type => "text", text });
        context! { role, content => parts }
    }

    /// The whole conversation with its trained spans: what the template marks with `{% generation %}`; without, each answer
    /// from the end of the generation prompt through its end token.
    ///
    /// # Errors
    /// If no span can be told.
    pub fn conversation(&self, c: &Conversation) -> Result<Rendered> {
        let parts = self.as_parts(&c.turns);
        let how = How { parts, ..How::default() };
        let Unmarked { text, generated, .. } = self.unmarked(&c.turns, how)?;
        let answers = c.turns.iter().filter(|t| t.role == Role::Assistant).count();
        let trained = match self.marks {
            true if generated.is_empty() && answers > 0 => {
                bail!("the chat template marks nothing of this conversation with {{% generation %}}, so nothing is trained on";
                    "correct the blocks in chat_template.jinja, or take them out: then every answer is trained on")
            }
            true => generated,
            false if answers == 0 => Vec::new(),
            false => match self.by_marks(&c.turns, &text, how) {
                Some(spans) => spans,
                None => self.by_prefix(&c.turns, &text, how)?,
            },
        };
        Ok(Rendered { text, trained, overlapping: self.marks, images: c.images.len() })
    }

    /// Spans from marks behind the turns; `None` if the template does not let them through unchanged.
    fn by_marks(&self, turns: &[Turn], text: &str, how: How) -> Option<Vec<Range<usize>>> {
        let marked = How { marked: true, ..how };
        let whole = self.unmarked(turns, marked).ok().filter(|whole| whole.text == text)?;
        let ends = whole.ends(turns.len())?;
        let first = turns.iter().position(|t| t.role == Role::Assistant)?;
        let last = turns.iter().rposition(|t| t.role == Role::Assistant)?;
        let prompt = self.unmarked(&turns[..first], How { open: true, ..marked }).ok()?;
        let through = if last + 1 == turns.len() { None } else { Some(self.unmarked(&turns[..=last], marked).ok()?) };
        let spans = Spans { turns, text, ends: &ends, special: &self.source.special, eos: self.eos() };
        spans.find(&prompt, through.as_ref().unwrap_or(&whole))
    }

    /// Spans from rendering the conversation as far as each answer, without and with it.
    fn by_prefix(&self, turns: &[Turn], text: &str, how: How) -> Result<Vec<Range<usize>>> {
        let hint = "mark the answers in chat_template.jinja with {% generation %} … {% endgeneration %}, split the \
            conversation into one sample for each answer, or use the template `vicuna_v1`";
        if turns.len() > BY_PREFIX {
            bail!("the chat template changes the texts of turns, so that answers cannot be told apart in {} turns", turns.len(); "{hint}")
        }
        let mut trained = vec![];
        for (i, turn) in turns.iter().enumerate().filter(|(_, t)| t.role == Role::Assistant) {
            let before = self.render(&turns[..i], How { open: true, ..how })?;
            let through = self.render(&turns[..=i], how)?;
            if !text.starts_with(&through) {
                bail!("the chat template writes turn {i} differently when later turns follow, so its answer cannot be told apart"; "{hint}")
            }
            let Some(added) = through.strip_prefix(&before) else {
                bail!("the chat template opens an answer with {:?}, but does not write turn {i} so, and changes its text: the answer cannot be told apart",
                    before.chars().rev().take(24).collect::<Vec<_>>().into_iter().rev().collect::<String>(); "{hint}")
            };
            trained.push(before.len()..before.len() + self.answer_end(added, &turn.text));
        }
        Ok(trained)
    }

    /// Bytes of `added` (answer, end token, what follows) through the end token.
    fn answer_end(&self, added: &str, answer: &str) -> usize {
        let answer = answer.trim();
        let from = added.find(answer).map_or(0, |at| at + answer.len());
        let tokens = self.source.special.iter().filter_map(|s| Some((added[from..].find(s.as_str())?, s.len())));
        let first = tokens.min_by_key(|&(at, len)| (at, std::cmp::Reverse(len)));
        first.map_or(added.len(), |(at, len)| from + at + len)
    }

    fn eos(&self) -> &str {
        self.source.names.get("eos_token").map_or("", String::as_str)
    }

    /// A question and its answer, as they are trained on: what a look at a template begins with.
    fn example(&self) -> Result<Rendered> {
        let turn = |role| Turn { role, text: PROBE.into() };
        let turns = vec![turn(Role::User), turn(Role::Assistant)];
        self.conversation(&Conversation { id: String::new(), images: vec![], turns, category: None, absent: vec![] })
    }

    /// The special token that the trained part of an answer ends with; `None` if it ends with none.
    pub fn end_token(&self) -> Option<&str> {
        let example = self.example().ok()?;
        let answer = example.text[example.trained.last()?.clone()].trim_end().to_string();
        let ends = self.source.special.iter().filter(|s| !s.is_empty() && answer.ends_with(s.as_str()));
        ends.max_by_key(|s| s.len()).map(String::as_str)
    }

    /// What is odd about the template, although it can be used.
    pub fn warnings(&self) -> Vec<String> {
        let question = [Turn { role: Role::User, text: PROBE.into() }];
        let (Ok(example), Ok(prompt)) = (self.example(), self.prompt(&question)) else { return Vec::new() };
        if example.text.starts_with(&prompt) {
            return Vec::new();
        }
        let behind = |text: &str| {
            let from = text.find(PROBE).map_or(0, |at| at + PROBE.len());
            text[from..].chars().take(40).collect::<String>()
        };
        vec![format!(
            "the chat template asks for an answer with {:?}, but writes answers as {:?}: what is trained on is not how `generate` asks",
            behind(&prompt),
            behind(&example.text)
        )]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_look_that_takes_too_long_is_given_up() {
        assert_eq!(within(LONGEST, || 7), Some(7));
        let slow = || std::thread::sleep(Duration::from_secs(10));
        assert_eq!(within(Duration::from_millis(20), slow), None);
    }
}
