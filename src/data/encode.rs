//! Text to token ids and labels.
//!
//! The rendered text is encoded once and whole, without special tokens added; bos goes in front if the tokenizer uses one;
//! each image token becomes as many copies as its picture takes ([`Sight::image_tokens`]). A token is a target if its first byte
//! lies in a trained span.

mod notices;

pub use notices::Unwritten;

use super::image::ImageRef;
use super::sight::Sight;
use super::source::{Conversation, IMAGE_PLACEHOLDER, Picture, Preference, Role, Turn};
use super::template::{self, ChatTemplate, Marks, Rendered, Source, VICUNA_OPENING, VICUNA_SYSTEM};
use super::tokenizer::TokenizerFiles;
use super::tokenizer::guard::{self, Growth};
use crate::bail;
use crate::error::{Context, Error, Result};
use crate::spec::{Deliver, Template};
use jiff::civil::Date;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};
use tokenizers::{PostProcessorWrapper, Tokenizer};

/// The label of a position that is no target.
pub const IGNORE: i32 = -100;

/// One encoded sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sample {
    pub id: String,
    /// `[T]`; a picture takes [`Sight::image_tokens`] copies of the image token.
    pub ids: Vec<u32>,
    /// `[T]`; `labels[t]` is the target *at* position t, or [`IGNORE`]. The model shifts.
    pub labels: Vec<i32>,
    pub images: Vec<ImageRef>,
    pub category: Option<String>,
    pub absent: Vec<String>,
}

impl Sample {
    /// Label tokens that are predicted (the first position is never).
    pub fn targets(&self) -> usize {
        self.labels.iter().skip(1).filter(|&&l| l != IGNORE).count()
    }
}

/// What the encoder must know beside the tokenizer's files.
#[derive(Debug, Clone)]
pub struct TextSettings {
    /// Text of the image token (`model.image_token`).
    pub image_token: String,
    /// Its id as the model's config.json names it, if it does.
    pub image_token_id: Option<u32>,
    /// Rows of the embedding table.
    pub vocab_size: usize,
    /// How pictures are seen at first; `None`: the model takes none.
    pub sight: Option<Sight>,
    /// bos of config.json, for a tokenizer folder that names none.
    pub bos: Option<u32>,
    /// eos of config.json: further end tokens, and the one of a tokenizer folder that names none.
    pub eos: Vec<u32>,
    /// System text of `vicuna_v1`; `None` is LLaVA's.
    pub system: Option<String>,
    pub max_seq_len: usize,
    pub truncate: bool,
    /// The date that chat templates are told; `None` is today's.
    pub date: Option<Date>,
}

/// A chat template that is compiled when it is first used, so that one that is not used does no harm.
struct Chat {
    source: Source,
    compiled: OnceLock<Result<ChatTemplate>>,
}

/// Ids and labels of a text.
struct Encoded {
    ids: Vec<u32>,
    labels: Vec<i32>,
    /// Is a part of the text written as an unknown token?
    lossy: bool,
}

/// Bytes of text for each token of `max_seq_len`, beyond which a text cannot fit however it is encoded.
const BYTES_PER_TOKEN: usize = 1024;
/// What is encoded in any case, in bytes.
const ALWAYS_ENCODED: usize = 1 << 20;

/// Renders and encodes conversations for one model; a clone shares the tokenizer.
#[derive(Clone)]
pub struct TextEncoder {
    tokenizer: Arc<Tokenizer>,
    post_processor: Option<PostProcessorWrapper>,
    settings: TextSettings,
    bos: Option<u32>,
    eos_ids: Vec<u32>,
    /// `None`: the model takes no pictures.
    image_token_id: Option<u32>,
    image_token_added: bool,
    unknown: Option<u32>,
    growth: Growth,
    marks: Marks,
    chat: Option<Arc<Chat>>,
    /// What was odd about texts that were encoded, shared by all clones.
    notices: Arc<Mutex<BTreeSet<String>>>,
}

impl TextEncoder {
    /// Reads a tokenizer folder, or a `tokenizer.json` with its neighbours (`tokenizer_config.json`,
    /// `special_tokens_map.json`, `chat_template.jinja`).
    ///
    /// # Errors
    /// If there is no tokenizer, it names no end token, or the image token finds no place in the embedding table.
    pub fn load(dir_or_file: &Path, settings: TextSettings) -> Result<Self> {
        let mut files = TokenizerFiles::read(dir_or_file)?;
        let here = dir_or_file.display();
        // A model without a tower needs no image token, and its embedding table may have no room for one.
        let (image_token_id, image_token_added) = match settings.sight {
            None => (None, false),
            Some(sight) => {
                let (text, expected) = (&settings.image_token, settings.image_token_id);
                let rows = (sight.deliver == Deliver::CrossAttention).then_some(settings.vocab_size);
                let (id, added) = files.image_token(text, expected, rows).with_context(|| &here)?;
                (Some(id), added)
            }
        };
        let bos = files.leading;
        let text_of = |id: &u32| files.tokenizer.id_to_token(*id);
        let own = files.names.get("eos_token").cloned();
        let Some(eos_text) = own.or_else(|| settings.eos.first().and_then(text_of)) else {
            bail!("{here} names no end token"; "set eos_token in tokenizer_config.json, or eos_token_id in config.json");
        };
        let Some(eos) = files.tokenizer.token_to_id(&eos_text) else {
            bail!("{here}: the end token {eos_text:?} is not in the vocabulary"; "correct eos_token in tokenizer_config.json");
        };
        let mut eos_ids = vec![eos];
        eos_ids.extend(settings.eos.iter().filter(|&&id| id != eos));
        let marks = Marks { eos: eos_text, image: settings.image_token.clone() };
        let (special, unknown) = (files.special_texts(), files.unknown());
        let TokenizerFiles { tokenizer, post_processor, names, growth, chat_template, warnings, .. } = files;
        let chat = chat_template.map(|template| {
            let image = marks.image.clone();
            let date = settings.date.unwrap_or_else(|| jiff::Zoned::now().date());
            Arc::new(Chat { source: Source { template, names, special, image, date }, compiled: OnceLock::new() })
        });
        let tokenizer = Arc::new(tokenizer);
        Ok(Self {
            tokenizer,
            post_processor,
            settings,
            bos,
            eos_ids,
            image_token_id,
            image_token_added,
            unknown,
            growth,
            marks,
            chat,
            notices: Arc::new(Mutex::new(warnings.into_iter().collect())),
        })
    }

    /// The end tokens of an answer; the first is the tokenizer's own.
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The token put in front of every text, if the tokenizer uses one.
    pub fn bos(&self) -> Option<u32> {
        self.bos
    }

    pub fn image_token_id(&self) -> Option<u32> {
        self.image_token_id
    }

    /// How it sees pictures.
    pub fn sight(&self) -> Option<Sight> {
        self.settings.sight
    }

    /// The same encoder for a model that sees pictures so.
    pub fn seeing(&self, sight: Option<Sight>) -> Self {
        let settings = TextSettings { sight, ..self.settings.clone() };
        Self { settings, ..self.clone() }
    }

    /// The same encoder with another limit in tokens.
    pub fn holding(&self, max_seq_len: usize) -> Self {
        let settings = TextSettings { max_seq_len, ..self.settings.clone() };
        Self { settings, ..self.clone() }
    }

    /// Pictures as the model sees them; an error if it sees none.
    fn images(&self, pictures: &[Picture]) -> Result<Vec<ImageRef>> {
        let Some(sight) = self.settings.sight else {
            if pictures.is_empty() {
                return Ok(Vec::new());
            }
            bail!("there are {} image(s), but the model has no vision tower", pictures.len();
                "name a tower in model.vision, use a whole LLaVA folder, or leave the pictures out")
        };
        pictures.iter().map(|p| sight.of(p)).collect()
    }

    /// Image tokens of each picture.
    fn image_tokens(&self, images: &[ImageRef]) -> Vec<usize> {
        images.iter().map(|i| self.settings.sight.map_or(0, |s| s.image_tokens(i))).collect()
    }

    /// Whether the image token is new, so that a saved model needs [`Self::tokenizer_json`] and not the original file.
    pub fn image_token_added(&self) -> bool {
        self.image_token_added
    }

    /// The tokenizer with the image token, as `tokenizer.json`.
    pub fn tokenizer_json(&self) -> Result<String> {
        let mut tokenizer = Tokenizer::clone(&self.tokenizer);
        tokenizer.with_post_processor(self.post_processor.clone());
        tokenizer.to_string(true).map_err(|e| Error::new(format!("cannot write the tokenizer: {e}")))
    }

    /// The longest sample in tokens.
    pub fn max_seq_len(&self) -> usize {
        self.settings.max_seq_len
    }

    /// Whether a sample has been cut to [`Self::max_seq_len`]; one that happens to be as long says yes as well.
    pub fn is_cut(&self, s: &Sample) -> bool {
        self.settings.truncate && s.ids.len() >= self.settings.max_seq_len
    }

    /// Encodes one conversation.
    ///
    /// # Errors
    /// A sample without label tokens, one longer than `max_seq_len` (unless `truncate`), or one that its template
    /// cannot render; the error names the sample.
    pub fn conversation(&self, c: &Conversation, template: Template) -> Result<Sample> {
        self.sample(c, template).map(|(sample, _)| sample).with_context(|| format!("sample {}", c.id))
    }

    /// Encodes one conversation, and counts its words if the tokenizer cannot write all of them.
    ///
    /// # Errors
    /// As [`Self::conversation`].
    pub fn counted(&self, c: &Conversation, template: Template) -> Result<(Sample, Unwritten)> {
        let encode = || -> Result<_> {
            let (sample, lossy) = self.sample(c, template)?;
            Ok((sample, if lossy { self.unwritten(c, template)? } else { Unwritten::default() }))
        };
        encode().with_context(|| format!("sample {}", c.id))
    }

    /// Encodes both answers: chosen, rejected.
    ///
    /// # Errors
    /// As [`Self::conversation`].
    pub fn preference(&self, p: &Preference, template: Template) -> Result<(Sample, Sample)> {
        let (chosen, rejected) = p.conversations();
        let encode = |c, which: &str| {
            self.sample(c, template).map(|s| s.0).with_context(|| format!("sample {}, {which} answer", p.id))
        };
        Ok((encode(&chosen, "chosen")?, encode(&rejected, "rejected")?))
    }

    /// A sample, and whether a part of it is written as unknown tokens.
    fn sample(&self, c: &Conversation, template: Template) -> Result<(Sample, bool)> {
        let rendered = self.render(c, template)?;
        let mut images = self.images(&c.images)?;
        let tokens = self.image_tokens(&images);
        let Encoded { mut ids, mut labels, lossy } = self.encode(&rendered, &tokens, template)?;
        let max = self.settings.max_seq_len;
        if ids.len() > max {
            let len = ids.len();
            if !self.settings.truncate {
                bail!("{len} tokens are more than max_seq_len = {max}";
                    "raise model.max_seq_len, set model.truncate = true, or shorten the sample");
            }
            images.truncate(self.truncate(&mut ids, max, &tokens));
            labels.truncate(ids.len());
        }
        let (category, absent) = (c.category.clone(), c.absent.clone());
        let sample = Sample { id: c.id.clone(), ids, labels, images, category, absent };
        if sample.targets() == 0 {
            bail!("no label token is left"; "give the sample an answer that begins within max_seq_len = {max} tokens");
        }
        Ok((sample, lossy))
    }

    /// Cuts to `max` tokens, or before a picture that would be cut in two; returns how many pictures are left. `tokens`: of each
    /// picture.
    fn truncate(&self, ids: &mut Vec<u32>, max: usize, tokens: &[usize]) -> usize {
        ids.truncate(max);
        let mut left = ids.iter().filter(|&&id| Some(id) == self.image_token_id).count();
        let mut whole = 0;
        for n in tokens.iter().take_while(|n| **n > 0) {
            if *n > left {
                break;
            }
            (left, whole) = (left - n, whole + 1);
        }
        ids.truncate(ids.len() - left);
        whole
    }

    /// The text of a conversation and its trained spans.
    pub fn render(&self, c: &Conversation, template: Template) -> Result<Rendered> {
        match template {
            Template::Plain => template::plain(c, &self.marks),
            Template::VicunaV1 => Ok(template::vicuna_v1(c, self.system(), &self.marks)),
            Template::Chat => self.chat()?.conversation(c),
        }
    }

    /// The tokens of a question, through the opening of the assistant's answer, and its pictures.
    ///
    /// `text` may say with `<image>` where the pictures are; without, they come first.
    ///
    /// # Errors
    /// If the marks in `text` are neither none nor as many as `pictures`.
    pub fn prompt(&self, text: &str, pictures: &[Picture], template: Template) -> Result<(Vec<u32>, Vec<ImageRef>)> {
        let (images, n_images) = (self.images(pictures)?, pictures.len());
        let marks = text.matches(IMAGE_PLACEHOLDER).count();
        let text = match marks {
            0 => format!("{}{text}", format!("{IMAGE_PLACEHOLDER}\n").repeat(n_images)),
            n if n == n_images => text.to_string(),
            n => bail!("the prompt has {n} {IMAGE_PLACEHOLDER} mark(s), but there are {n_images} image(s)";
                "write one {IMAGE_PLACEHOLDER} for each image, or none at all"),
        };
        let turns = vec![Turn { role: Role::User, text }];
        let rendered = match template {
            Template::Plain => self.marks.image.repeat(n_images) + turns[0].text.replace(IMAGE_PLACEHOLDER, "").trim(),
            Template::VicunaV1 => {
                let c = Conversation { id: String::new(), images: vec![], turns, category: None, absent: vec![] };
                template::vicuna_v1(&c, self.system(), &self.marks).text + VICUNA_OPENING
            }
            Template::Chat => self.chat()?.prompt(&turns)?,
        };
        let rendered = Rendered { text: rendered, trained: vec![], overlapping: false, images: n_images };
        Ok((self.encode(&rendered, &self.image_tokens(&images), template)?.ids, images))
    }

    /// The text of some tokens, special ones left out.
    pub fn decode(&self, ids: &[u32]) -> Result<String> {
        self.tokenizer.decode(ids, true).map_err(|e| Error::new(format!("cannot decode tokens: {e}")))
    }

    fn system(&self) -> &str {
        self.settings.system.as_deref().unwrap_or(VICUNA_SYSTEM)
    }

    fn chat(&self) -> Result<&ChatTemplate> {
        let hint = "use the template `vicuna_v1`, or a tokenizer with chat_template.jinja";
        let Some(chat) = &self.chat else { bail!("the tokenizer has no chat template"; "{hint}") };
        let compiled = chat.compiled.get_or_init(|| ChatTemplate::new(chat.source.clone()));
        compiled.as_ref().map_err(|e| Error::new(e.to_string()).hint(e.hint_text().unwrap_or(hint)))
    }

    /// bos, where transformers puts it in front: a tokenizer alone renders chat templates without one, a processor, which a model
    /// with pictures has, adds it.
    fn front(&self, template: Template) -> Option<u32> {
        self.bos.filter(|_| template != Template::Chat || self.settings.sight.is_some())
    }

    /// As much of a text as `max_seq_len` can need.
    fn bounded<'a>(&self, text: &'a str) -> Result<&'a str> {
        let most = self.settings.max_seq_len.saturating_mul(BYTES_PER_TOKEN).max(ALWAYS_ENCODED);
        let text = if text.len() <= most {
            text
        } else if self.settings.truncate {
            &text[..(0..=most).rev().find(|&at| text.is_char_boundary(at)).unwrap_or(0)]
        } else {
            bail!("{} bytes of text are more than max_seq_len = {} tokens can hold", text.len(), self.settings.max_seq_len;
                "raise model.max_seq_len, set model.truncate = true, or shorten the sample");
        };
        self.growth.check(text, most.saturating_mul(64))?;
        Ok(text)
    }

    /// Ids and labels of a rendered text; its pictures take `image_tokens`.
    fn encode(&self, r: &Rendered, image_tokens: &[usize], template: Template) -> Result<Encoded> {
        let text = self.bounded(&r.text)?;
        let encoding = guard::encode(&self.tokenizer, text, false)?;
        let tokens = encoding.get_ids();
        let mut ids = Vec::with_capacity(tokens.len() + 1 + image_tokens.iter().sum::<usize>());
        // A chat template may write bos itself.
        ids.extend(self.front(template).filter(|bos| tokens.first() != Some(bos)));
        let mut labels = vec![IGNORE; ids.len()];
        let (mut images, mut lossy) = (0, false);
        for (&id, &(start, end)) in tokens.iter().zip(encoding.get_offsets()) {
            if Some(id) == self.image_token_id {
                ids.extend(std::iter::repeat_n(id, image_tokens.get(images).copied().unwrap_or(0)));
                images += 1;
                labels.resize(ids.len(), IGNORE);
                continue;
            }
            if id as usize >= self.settings.vocab_size {
                let token = self.tokenizer.id_to_token(id).unwrap_or_default();
                bail!("the token {token:?} has the id {id}, but the embedding table has {} rows", self.settings.vocab_size;
                    "use the tokenizer that belongs to the language model");
            }
            lossy |= Some(id) == self.unknown;
            let span = r.trained.get(r.trained.partition_point(|span| span.end <= start));
            let inside = |span: &std::ops::Range<usize>| span.start <= start || r.overlapping && span.start < end;
            ids.push(id);
            labels.push(if span.is_some_and(inside) { id as i32 } else { IGNORE });
        }
        if images != r.images && text.len() == r.text.len() {
            bail!("the text has {images} image token(s), but there are {} image(s)", r.images;
                "an answer or system text must not contain {}; set model.image_token to a token that texts do not use",
                self.marks.image);
        }
        Ok(Encoded { ids, labels, lossy })
    }
}

#[cfg(test)]
#[path = "encode_tests.rs"]
mod tests;
