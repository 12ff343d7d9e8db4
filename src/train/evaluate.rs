//! Held-out evaluation: loss, exact match, preference accuracy, hallucination rate.
//!
//! Exact match needs no generation: greedy decoding gives exactly the labelled answer if and only if, with the right
//! prefix at every position, the most probable token is the label.

use super::collate::{collate, single, sum_by_owner};
use super::generate::{Sampling, generate};
use super::step::{finite_logps, pair_logps};
use crate::bail;
use crate::data::{
    Dataset, IGNORE, ImageProcessor, ImageRef, Item, Loader, LoaderOptions, Pixels, Sample, TextEncoder,
};
use crate::error::Result;
use crate::model::vlm::{Batch, Mode, Vlm};
use crate::recipe::schema::{Metric, Pictures};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Longest answer that is generated to look for absent things.
const MAX_ANSWER: usize = 48;

/// Figures of one evaluation by name, e.g. `exact_match`, `exact_match/blank`, `exact_match/category/colour`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Figures {
    /// Samples (or pairs) evaluated.
    pub n: usize,
    pub values: BTreeMap<String, f64>,
}

/// Data and settings of one evaluation.
pub struct Evaluation<'a> {
    pub metric: Metric,
    pub items: &'a [Item],
    /// Decodes their pictures; a model without a tower has none.
    pub images: Option<&'a ImageProcessor>,
    pub pictures: &'a [Pictures],
    pub micro: usize,
}

/// Runs one evaluation.
pub fn evaluate(vlm: &Vlm, encoder: &TextEncoder, eval: &Evaluation) -> Result<Figures> {
    let mut out = Figures { n: eval.items.len(), values: BTreeMap::new() };
    let mut feed = Feed::new(eval)?;
    let mut variants = vec![(String::new(), None)];
    variants.extend(eval.pictures.iter().map(|p| (format!("/{}", label(*p)), Some(*p))));
    for (suffix, stand_in) in variants {
        feed.stand_in = stand_in;
        match eval.metric {
            Metric::Loss => {
                out.values.insert(format!("loss{suffix}"), mean_loss(vlm, eval, &mut feed)?);
            }
            Metric::ExactMatch => exact_match(vlm, eval, &mut feed, &suffix, &mut out.values)?,
            Metric::Preference => {
                out.values.insert(format!("preference{suffix}"), preference(vlm, eval, &mut feed)?);
            }
            Metric::Hallucination => {
                out.values.insert(format!("hallucination{suffix}"), hallucination(vlm, encoder, eval, &mut feed)?);
            }
        }
    }
    if eval.metric == Metric::ExactMatch {
        out.values.extend(chance(eval.items)?);
    }
    Ok(out)
}

fn label(p: Pictures) -> &'static str {
    match p {
        Pictures::Blank => "blank",
        Pictures::Shuffled => "shuffled",
    }
}

/// The pictures of an evaluation's batches, pass by pass, decoded ahead of them; what is held is bounded.
struct Feed {
    /// One step a batch, of the passes that show pictures of files.
    loader: Loader,
    /// What takes each picture's place where they are shuffled.
    next: BTreeMap<ImageRef, ImageRef>,
    /// Of the pass that runs.
    stand_in: Option<Pictures>,
}

impl Feed {
    fn new(eval: &Evaluation) -> Result<Self> {
        let all: BTreeSet<&ImageRef> = eval.items.iter().flat_map(Item::images).collect();
        let after = all.iter().cycle().skip(1);
        let next: BTreeMap<ImageRef, ImageRef> =
            all.iter().zip(after).map(|(i, n)| ((*i).clone(), (*n).clone())).collect();
        let mut passes = vec![eval.items.iter().map(|i| bare(i, i.images().to_vec())).collect::<Vec<_>>()];
        for _ in eval.pictures.iter().filter(|p| **p == Pictures::Shuffled) {
            passes.push(
                eval.items.iter().map(|i| bare(i, i.images().iter().map(|i| next[i].clone()).collect())).collect(),
            );
        }
        let (n, micro) = (eval.items.len(), eval.micro.max(1));
        let of_pass =
            move |p: usize| (0..n).step_by(micro).map(move |i| (p * n + i..p * n + n.min(i + micro)).collect());
        let batches: Vec<(usize, Vec<usize>)> = (0..passes.len()).flat_map(of_pass).enumerate().collect();
        let data = Arc::new(Dataset { items: passes.concat() });
        let loader = Loader::new(data, eval.images.cloned().map(Arc::new), batches, LoaderOptions::default())?;
        Ok(Self { loader, next, stand_in: None })
    }

    /// What the next batch, which is `items`, shows. Blank: the mean colour (zero after normalisation). Shuffled: each picture's
    /// place is taken by the next one, which is cut off or begun again where it has more or fewer tiles.
    fn pixels(&mut self, items: &[Item]) -> Result<Pixels> {
        let shown = items.iter().flat_map(Item::images);
        if self.stand_in == Some(Pictures::Blank) {
            return Ok(shown.map(|i| (i.clone(), Arc::new(vec![0.0; i.numbers()]))).collect());
        }
        let Some(step) = self.loader.next() else { bail!("the evaluation has more batches than were to be loaded") };
        let pixels = step?.pixels;
        if self.stand_in.is_none() {
            return Ok(pixels);
        }
        let swap = |i: &ImageRef| {
            let (n, next) = (i.numbers(), &pixels[&self.next[i]]);
            if next.len() == n { next.clone() } else { Arc::new(next.iter().copied().cycle().take(n).collect()) }
        };
        Ok(shown.map(|i| (i.clone(), swap(i))).collect())
    }
}

/// An item that is nothing but pictures.
fn bare(item: &Item, images: Vec<ImageRef>) -> Item {
    let (ids, labels, absent) = (Vec::new(), Vec::new(), Vec::new());
    Item::Sample(Sample { id: item.id().to_string(), ids, labels, images, category: None, absent })
}

/// Calls `f` with each micro-batch's samples, its packed form, log-probabilities (all finite) and most probable tokens.
fn each_batch(
    vlm: &Vlm,
    eval: &Evaluation,
    feed: &mut Feed,
    mut f: impl FnMut(&[&Sample], &Batch, &[f64], &[u32]),
) -> Result<()> {
    for items in eval.items.chunks(eval.micro.max(1)) {
        let samples: Vec<&Sample> = items.iter().map(single).collect::<Result<_>>()?;
        let batch = collate(&samples, &feed.pixels(items)?)?;
        let (lp, _) = vlm.forward(&batch, Mode::default())?;
        let logps = lp.logps()?;
        finite_logps(&logps, &samples)?;
        f(&samples, &batch, &logps, &lp.argmax()?);
    }
    Ok(())
}

fn mean_loss(vlm: &Vlm, eval: &Evaluation, feed: &mut Feed) -> Result<f64> {
    let (mut sum, mut n) = (0.0, 0);
    each_batch(vlm, eval, feed, |_, _, lp, _| {
        sum -= lp.iter().sum::<f64>();
        n += lp.len();
    })?;
    Ok(sum / n.max(1) as f64)
}

fn exact_match(
    vlm: &Vlm,
    eval: &Evaluation,
    feed: &mut Feed,
    suffix: &str,
    out: &mut BTreeMap<String, f64>,
) -> Result<()> {
    let mut all = Vec::with_capacity(eval.items.len());
    let mut by_category: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    each_batch(vlm, eval, feed, |samples, batch, _, argmax| {
        let misses: Vec<f64> =
            batch.targets.iter().zip(argmax).map(|((_, want), got)| f64::from(u8::from(want != got))).collect();
        for (s, misses) in samples.iter().zip(sum_by_owner(batch, &misses)) {
            let hit = f64::from(u8::from(misses == 0.0));
            all.push(hit);
            if let Some(c) = &s.category {
                by_category.entry(c.clone()).or_default().push(hit);
            }
        }
    })?;
    out.insert(format!("exact_match{suffix}"), mean(&all));
    if suffix.is_empty() {
        out.extend(by_category.iter().map(|(c, hits)| (format!("exact_match/category/{c}"), mean(hits))));
    }
    Ok(())
}

/// What guessing reaches, knowing each category's answers: one of them at random, or always the most frequent.
fn chance(items: &[Item]) -> Result<BTreeMap<String, f64>> {
    let mut answers: BTreeMap<Option<String>, BTreeMap<Vec<i32>, usize>> = BTreeMap::new();
    for s in items.iter().map(single) {
        let s = s?;
        let answer = s.labels.iter().copied().filter(|l| *l != IGNORE).collect();
        *answers.entry(s.category.clone()).or_default().entry(answer).or_default() += 1;
    }
    let (mut uniform, mut frequent) = (0.0, 0.0);
    for counts in answers.values() {
        uniform += counts.values().sum::<usize>() as f64 / counts.len() as f64;
        frequent += counts.values().max().copied().unwrap_or(0) as f64;
    }
    let n = items.len().max(1) as f64;
    Ok(BTreeMap::from([
        ("chance/uniform".to_string(), uniform / n),
        ("chance/most_frequent".to_string(), frequent / n),
    ]))
}

fn preference(vlm: &Vlm, eval: &Evaluation, feed: &mut Feed) -> Result<f64> {
    let mut hits = Vec::with_capacity(eval.items.len());
    for items in eval.items.chunks(eval.micro.max(1)) {
        let indexed: Vec<(usize, &Item)> = items.iter().enumerate().collect();
        let table = pair_logps(vlm, &indexed, &feed.pixels(items)?, false)?;
        hits.extend(table.values().map(|(c, r)| f64::from(u8::from(c > r))));
    }
    Ok(mean(&hits))
}

fn hallucination(vlm: &Vlm, encoder: &TextEncoder, eval: &Evaluation, feed: &mut Feed) -> Result<f64> {
    let mut hits = Vec::with_capacity(eval.items.len());
    for items in eval.items.chunks(eval.micro.max(1)) {
        let pixels = feed.pixels(items)?;
        for item in items {
            let s = single(item)?;
            let end = s.labels.iter().position(|l| *l != IGNORE).unwrap_or(s.labels.len());
            let prompt = Sample { ids: s.ids[..end].to_vec(), labels: vec![IGNORE; end], ..s.clone() };
            let batch = collate(&[&prompt], &pixels)?;
            let ids = generate(vlm, &batch, encoder.eos_ids(), Sampling::greedy(MAX_ANSWER), |_| ())?;
            let answer = encoder.decode(&ids)?.to_lowercase();
            hits.push(f64::from(u8::from(s.absent.iter().any(|a| names(&answer, &a.to_lowercase())))));
        }
    }
    Ok(mean(&hits))
}

/// Does `text` contain `phrase` as whole words?
fn names(text: &str, phrase: &str) -> bool {
    let words = |s: &str| -> Vec<String> {
        s.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).map(str::to_string).collect()
    };
    let (text, phrase) = (words(text), words(phrase));
    !phrase.is_empty() && text.windows(phrase.len()).any(|w| w == phrase)
}

fn mean(v: &[f64]) -> f64 {
    v.iter().sum::<f64>() / v.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::recipe::schema::{Alpha, Resize};
    use std::path::Path;

    /// Each batch's own pictures and no others, as they are, blank, and with the next one's in their place.
    #[test]
    fn pictures_come_batch_by_batch_and_pass_by_pass() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/a");
        let processor = ImageProcessor::from_dir(&folder.join("model")).unwrap();
        let image = |name: &str, size| {
            let path = folder.join(format!("images/{name}.png"));
            ImageRef { path, resize: Resize::Crop, alpha: Alpha::Drop, size, tiles: None }
        };
        // In the order of their paths; the second of them is smaller.
        let all = [image("exact0", 56), image("gray", 28), image("landscape", 56)];
        let item = |images: &[&ImageRef]| {
            let (ids, labels) = (vec![1, 2], vec![IGNORE, 2]);
            let images = images.iter().map(|i| (*i).clone()).collect();
            Item::Sample(Sample { id: "s".into(), ids, labels, images, category: None, absent: vec![] })
        };
        let items = [item(&[&all[2], &all[0]]), item(&[]), item(&[&all[1]])];
        let pictures = [Pictures::Shuffled, Pictures::Blank, Pictures::Shuffled];
        let eval =
            Evaluation { metric: Metric::Loss, items: &items, images: Some(&processor), pictures: &pictures, micro: 2 };
        let px = all.clone().map(|i| processor.load(&i).unwrap());
        let again = |p: &[f32], n: usize| p.iter().copied().cycle().take(n).collect::<Vec<f32>>();
        let mut feed = Feed::new(&eval).unwrap();
        for stand_in in std::iter::once(None).chain(pictures.map(Some)) {
            feed.stand_in = stand_in;
            let want = match stand_in {
                None => px.clone(),
                Some(Pictures::Blank) => px.clone().map(|p| vec![0.0; p.len()]),
                Some(Pictures::Shuffled) => [again(&px[1], px[0].len()), px[2][..px[1].len()].to_vec(), px[0].clone()],
            };
            for (batch, own) in items.chunks(2).zip([vec![0, 2], vec![1]]) {
                let got = feed.pixels(batch).unwrap();
                assert_eq!(got.keys().collect::<Vec<_>>(), own.iter().map(|i| &all[*i]).collect::<Vec<_>>());
                assert!(own.iter().all(|i| *got[&all[*i]] == want[*i]), "{stand_in:?}");
            }
        }
        assert!(feed.loader.next().is_none());
    }
}
