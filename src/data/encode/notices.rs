//! What is odd about texts, although they can be encoded; and the date that templates are told.

use super::{Chat, TextEncoder, TextSettings};
use crate::data::source::Conversation;
use crate::data::template::Source;
use crate::data::tokenizer::guard;
use crate::error::Result;
use crate::spec::Template;
use jiff::civil::Date;
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// Text that the tokenizer cannot write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Unwritten {
    /// Words with an unknown token.
    pub unknown: usize,
    /// All words.
    pub words: usize,
}

impl std::ops::AddAssign for Unwritten {
    fn add_assign(&mut self, other: Self) {
        self.unknown += other.unknown;
        self.words += other.words;
    }
}

impl TextEncoder {
    /// Does the chat template ask for the date?
    pub fn asks_the_date(&self) -> bool {
        self.chat.as_ref().is_some_and(|c| c.source.template.contains("strftime_now"))
    }

    /// The date that the chat template is told.
    pub fn date(&self) -> Option<Date> {
        self.chat.as_ref().map(|c| c.source.date)
    }

    /// The same encoder on another day.
    pub fn on(&self, date: Date) -> Self {
        let chat = self
            .chat
            .as_ref()
            .map(|c| Arc::new(Chat { source: Source { date, ..c.source.clone() }, compiled: OnceLock::new() }));
        Self { chat, settings: TextSettings { date: Some(date), ..self.settings.clone() }, ..self.clone() }
    }

    /// Keeps what is odd about an entry's texts, although they can be encoded: about its template, and that `unwritten` of the words
    /// in `samples` of its samples cannot be written.
    pub fn notice(&self, path: &Path, template: Template, samples: usize, unwritten: Unwritten) {
        let mut all = self.warnings(template);
        if let Some(token) = self.unknown_token().filter(|_| unwritten.unknown > 0) {
            all.push(format!(
                "{}: the tokenizer cannot write {} of {} words in {samples} sample(s): they become {token}, and nothing of them \
                 is learnt; use a tokenizer that knows this language, or look at `adfreeze data show`",
                path.display(),
                unwritten.unknown,
                unwritten.words,
            ));
        }
        if let Ok(mut notices) = self.notices.lock() {
            notices.extend(all);
        }
    }

    /// Takes out what was kept.
    pub fn notices(&self) -> Vec<String> {
        self.notices.lock().map(|mut all| std::mem::take(&mut *all).into_iter().collect()).unwrap_or_default()
    }

    /// What is odd about a template, although it can be used.
    pub fn warnings(&self, template: Template) -> Vec<String> {
        let Some(chat) = (template == Template::Chat).then(|| self.chat().ok()).flatten() else { return Vec::new() };
        let mut out = chat.warnings();
        let (eos, id) = (&self.marks.eos, chat.end_token().map(|t| (t, self.tokenizer.token_to_id(t))));
        match id {
            None => out.push(format!(
                "the chat template ends answers with no special token: the model is not taught to stop; write {eos} behind \
                 each answer in chat_template.jinja, or use the template `vicuna_v1`"
            )),
            Some((token, id)) if !id.is_some_and(|id| self.eos_ids.contains(&id)) => out.push(format!(
                "the chat template ends answers with {token}, but generation stops at {eos}; add the id of {token} to \
                 eos_token_id in generation_config.json or config.json"
            )),
            Some(_) => {}
        }
        out
    }

    /// How many words of a conversation the tokenizer writes as unknown tokens.
    pub fn unwritten(&self, c: &Conversation, template: Template) -> Result<Unwritten> {
        let rendered = self.render(c, template)?;
        let text = self.bounded(&rendered.text)?;
        let encoding = guard::encode(&self.tokenizer, text, false)?;
        let tokens = encoding.get_ids().iter().zip(encoding.get_offsets());
        let unknown: Vec<usize> = tokens.filter(|(id, _)| Some(**id) == self.unknown).map(|(_, at)| at.0).collect();
        let mut out = Unwritten::default();
        for word in text.split_whitespace() {
            let start = word.as_ptr() as usize - text.as_ptr() as usize;
            let first = unknown.partition_point(|at| *at < start);
            out.words += 1;
            out.unknown += usize::from(unknown.get(first).is_some_and(|at| *at < start + word.len()));
        }
        Ok(out)
    }

    /// What stands for text that the tokenizer cannot write.
    pub fn unknown(&self) -> Option<u32> {
        self.unknown
    }

    /// The text of the unknown token.
    pub fn unknown_token(&self) -> Option<String> {
        self.tokenizer.id_to_token(self.unknown?)
    }

    /// A token as the vocabulary writes it.
    pub fn piece(&self, id: u32) -> String {
        self.tokenizer.id_to_token(id).unwrap_or_default()
    }
}
