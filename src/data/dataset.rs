//! All samples of a stage, encoded and checked.

use super::encode::{Sample, TextEncoder, Unwritten};
use super::file;
use super::image::ImageRef;
use super::source;
use crate::error::{Error, Result, near};
use crate::spec::{Data, Template};
use rayon::prelude::*;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// Problems named in one error.
const NAMED: usize = 20;

/// What a batch is made of: a sample, or a pair of answers to one prompt.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Item {
    Sample(Sample),
    /// Chosen, rejected.
    Pair(Sample, Sample),
}

impl Item {
    pub fn id(&self) -> &str {
        match self {
            Self::Sample(s) | Self::Pair(s, _) => &s.id,
        }
    }

    /// The sample, or chosen and rejected.
    pub fn samples(&self) -> impl Iterator<Item = &Sample> {
        let (first, second) = match self {
            Self::Sample(s) => (s, None),
            Self::Pair(chosen, rejected) => (chosen, Some(rejected)),
        };
        std::iter::once(first).chain(second)
    }

    /// Two answers that are the same tokens, so that neither is the better one.
    pub fn is_tie(&self) -> bool {
        matches!(self, Self::Pair(chosen, rejected) if chosen.ids == rejected.ids && chosen.labels == rejected.labels)
    }

    /// The pictures; both answers of a pair have the same.
    pub fn images(&self) -> &[ImageRef] {
        match self {
            Self::Sample(s) | Self::Pair(s, _) => &s.images,
        }
    }

    /// Tokens, of the longer answer for a pair.
    pub fn len(&self) -> usize {
        self.samples().map(|s| s.ids.len()).max().unwrap_or(0)
    }

    /// Whether there are no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The samples of a stage or an evaluation.
#[derive(Debug, Clone, Default)]
pub struct Dataset {
    pub items: Vec<Item>,
}

/// What a dataset consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stats {
    pub items: usize,
    /// Items without a picture.
    pub text_only: usize,
    /// Pictures, counted once a file.
    pub images: usize,
    /// Tokens, image tokens included.
    pub tokens: usize,
    /// Label tokens.
    pub labels: usize,
    pub min_len: usize,
    pub median_len: usize,
    pub max_len: usize,
}

impl Dataset {
    /// Reads and encodes conversations; `template` is for entries that name none.
    ///
    /// # Errors
    /// All problems of samples and image files together, the first twenty by name.
    pub fn conversations(data: &[Data], encoder: &TextEncoder, template: Template) -> Result<Self> {
        Self::read(data, encoder, template, source::conversations, |c, template| {
            encoder.counted(c, template).map(|(sample, unwritten)| (Item::Sample(sample), unwritten))
        })
    }

    /// Reads and encodes preference pairs.
    ///
    /// # Errors
    /// As [`Self::conversations`].
    pub fn preferences(data: &[Data], encoder: &TextEncoder, template: Template) -> Result<Self> {
        Self::read(data, encoder, template, source::preferences, |p, template| {
            let (chosen, rejected) = encoder.preference(p, template)?;
            let unknown = |s: &Sample| encoder.unknown().is_some_and(|unknown| s.ids.contains(&unknown));
            let mut unwritten = Unwritten::default();
            if unknown(&chosen) || unknown(&rejected) {
                let (a, b) = p.conversations();
                for c in [a, b] {
                    unwritten += encoder.unwritten(&c, template)?;
                }
            }
            Ok((Item::Pair(chosen, rejected), unwritten))
        })
    }

    fn read<T: Sync>(
        data: &[Data],
        encoder: &TextEncoder,
        template: Template,
        read: impl Fn(&Data) -> Result<Vec<T>>,
        encode: impl Fn(&T, Template) -> Result<(Item, Unwritten)> + Sync,
    ) -> Result<Self> {
        let mut items = vec![];
        let mut problems = vec![];
        for entry in data {
            let template = entry.template.unwrap_or(template);
            let encoded: Vec<_> = read(entry)?.par_iter().map(|raw| encode(raw, template)).collect();
            let (mut samples, mut unwritten) = (0, Unwritten::default());
            for item in encoded {
                match item {
                    Ok((item, words)) => {
                        samples += usize::from(words.unknown > 0);
                        unwritten += words;
                        items.push(item);
                    }
                    Err(e) => problems.push(e.context(entry.path.display())),
                }
            }
            encoder.notice(&entry.path, template, samples, unwritten);
        }
        problems.extend(missing_images(&items));
        together(problems)?;
        Ok(Self { items })
    }

    /// Every picture, once.
    pub fn images(&self) -> BTreeSet<&ImageRef> {
        self.items.iter().flat_map(Item::images).collect()
    }

    pub fn stats(&self) -> Stats {
        let mut lengths: Vec<usize> = self.items.iter().map(Item::len).collect();
        lengths.sort_unstable();
        let samples = || self.items.iter().flat_map(Item::samples);
        Stats {
            items: self.items.len(),
            text_only: self.items.iter().filter(|i| i.images().is_empty()).count(),
            images: self.images().len(),
            tokens: samples().map(|s| s.ids.len()).sum(),
            labels: samples().map(Sample::targets).sum(),
            min_len: lengths.first().copied().unwrap_or(0),
            median_len: lengths.get(lengths.len() / 2).copied().unwrap_or(0),
            max_len: lengths.last().copied().unwrap_or(0),
        }
    }
}

/// One problem for each image file that is not there, with the first sample that wants it.
fn missing_images(items: &[Item]) -> Vec<Error> {
    let mut seen = BTreeSet::new();
    let mut first: Vec<_> = vec![];
    for item in items {
        for image in item.images() {
            if seen.insert(&image.path) {
                first.push((&image.path, item.id()));
            }
        }
    }
    let problems: Vec<(&PathBuf, Error)> = first
        .par_iter()
        .filter_map(|(path, id)| Some((*path, no_image(path)?.context(format!("sample {id}")))))
        .collect();
    // Only for the first, whose hint is given for all: folders may be large.
    let near = problems.first().and_then(|(path, _)| near::path(path));
    let hinted = |(i, (_, e)): (usize, (&PathBuf, Error))| match (&near, e.hint_text()) {
        (Some(near), Some(hint)) if i == 0 => {
            let hint = format!("did you mean {}? {hint}", near.display());
            e.hint(hint)
        }
        _ => e,
    };
    problems.into_iter().enumerate().map(hinted).collect()
}

/// Why there is no picture at a path.
fn no_image(path: &Path) -> Option<Error> {
    let shown = file::shown(path);
    let hint = "check the sample's `image` and the `images` folder of its data entry";
    match std::fs::metadata(path) {
        Ok(found) => {
            let kind = file::no_file(&found)?;
            Some(Error::new(format!("the image {shown} is {kind}, not a file")).hint(hint))
        }
        Err(_) => Some(match path.ancestors().skip(1).find(|a| a.is_file()) {
            Some(archive) => {
                Error::new(format!("there is no image {shown}: {} is a file, not a folder", file::shown(archive)))
                    .hint("unpack it, and name the folder with the pictures in `images` of the data entry")
            }
            None => Error::new(format!("there is no image {shown}")).hint(hint),
        }),
    }
}

/// One error out of several.
fn together(mut problems: Vec<Error>) -> Result<()> {
    let n = problems.len();
    if n < 2 {
        return problems.pop().map_or(Ok(()), Err);
    }
    let hint = problems[0].hint_text().map(String::from);
    let mut lines: Vec<String> = problems.iter().take(NAMED).map(|e| format!("\n  {e}")).collect();
    if n > NAMED {
        lines.push(format!("\n  and {} more", n - NAMED));
    }
    let e = Error::new(format!("{n} problems in the data:{}", lines.concat()));
    Err(match hint {
        Some(hint) => e.hint(hint),
        None => e,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::encode::TextSettings;
    use crate::data::sight::Sight;
    use crate::spec::Deliver;
    use std::path::PathBuf;

    fn golden(name: &str) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/a").join(name)
    }

    fn encoder(max_seq_len: usize) -> TextEncoder {
        let settings = TextSettings {
            image_token: "<image>".into(),
            image_token_id: None,
            vocab_size: 384,
            sight: Some(Sight { size: 56, tokens: 16, side: None, deliver: Deliver::Splice }),
            bos: None,
            eos: vec![],
            system: None,
            max_seq_len,
            truncate: false,
            date: None,
        };
        TextEncoder::load(&golden("model"), settings).unwrap()
    }

    fn entry(file: &str, template: Option<Template>) -> Data {
        let (path, images) = (golden("data").join(file), Some(golden("images")));
        Data { images, template, ..Data::new(path) }
    }

    #[test]
    fn joins_entries_and_counts() {
        let data = [entry("sft.json", None), Data { limit: Some(2), ..entry("plain.json", Some(Template::Plain)) }];
        let ds = Dataset::conversations(&data, &encoder(2048), Template::VicunaV1).unwrap();
        let stats = ds.stats();
        assert_eq!((stats.items, stats.text_only, stats.images), (12, 2, 6));
        assert!(stats.min_len < stats.median_len && stats.median_len < stats.max_len);
        assert!(0 < stats.labels && stats.labels < stats.tokens);
        let pairs = Dataset::preferences(&[entry("dpo.jsonl", None)], &encoder(2048), Template::VicunaV1).unwrap();
        assert_eq!((pairs.items.len(), pairs.stats().items, pairs.items[0].samples().count()), (8, 8, 2));
    }

    #[test]
    fn names_all_problems_together() {
        let (long, encoder) = (entry("sft.json", None), encoder(90));
        let e = Dataset::conversations(&[long], &encoder, Template::VicunaV1).unwrap_err();
        assert!(e.cause().contains("problems in the data") && e.cause().contains("sample long"), "{e}");
        assert!(e.hint_text().unwrap().contains("max_seq_len"));
        let elsewhere = Data { images: Some("nowhere".into()), ..entry("plain.json", Some(Template::Plain)) };
        let e = Dataset::conversations(&[elsewhere], &encoder, Template::Plain).unwrap_err();
        assert!(e.cause().starts_with("6 problems") && e.cause().contains("nowhere/exact0.png"), "{e}");
        let one = Data { images: Some("nowhere".into()), limit: Some(1), ..entry("plain.json", Some(Template::Plain)) };
        let e = Dataset::conversations(&[one], &encoder, Template::Plain).unwrap_err();
        assert!(e.cause().starts_with("sample plain-0: there is no image"), "{e}");
    }

    #[test]
    fn names_twenty_problems_at_most() {
        let e = together((0..25).map(|i| Error::new(format!("p{i}")).hint("h")).collect()).unwrap_err();
        assert!(e.cause().contains("p19") && !e.cause().contains("p20") && e.cause().contains("and 5 more"), "{e}");
    }
}
