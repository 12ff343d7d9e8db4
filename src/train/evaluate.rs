//! Held-out evaluation: loss, exact match, preference accuracy, hallucination rate.
//!
//! Exact match needs no generation: greedy decoding gives exactly the labelled answer if and only if, with the right
//! prefix at every position, the most probable token is the label, or any end token where the label is one.

use super::collate::{collate, single, sum_by_owner};
use super::generate::{Sampling, generate};
use super::step::{finite_logps, pair_logps};
use crate::bail;
use crate::data::{
    Dataset, IGNORE, ImageProcessor, ImageRef, Item, Loader, LoaderOptions, Pixels, Sample, TextEncoder,
};
use crate::error::Result;
use crate::model::vlm::{Batch, Mode, Vlm};
use crate::spec::{Metric, Pictures};
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use tokenizers::NormalizedString;

/// Figures of one evaluation by name, e.g. `exact_match`, `exact_match/blank`, `exact_match/category/colour`. `hallucination/cut`,
/// which is there where any were, is the share of answers that had not ended at `max_new_tokens`.
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
    /// Longest answer that is generated.
    pub max_new_tokens: usize,
}

/// What the batches of an evaluation came to so far, by pass (`` as it is, `/blank`, `/shuffled`): of a loss each batch's sum and
/// label tokens, else one number a sample or pair (`hallucinates` says what it is there). An evaluation that was stopped goes on from it to the same figures.
pub type Outcomes = BTreeMap<String, Vec<f64>>;

/// Runs one evaluation from where `so_far` ends. `on` hears of every batch, with its samples, what there is so far and whether that
/// is the end of a pass, and says whether to go on; `None` if it did not.
pub fn evaluate(
    vlm: &Vlm,
    encoder: &TextEncoder,
    eval: &Evaluation,
    so_far: &mut Outcomes,
    on: &mut dyn FnMut(usize, &Outcomes) -> Result<bool>,
) -> Result<Option<Figures>> {
    let mut feed = Feed::new(eval, so_far)?;
    for (suffix, stand_in) in passes(eval) {
        feed.stand_in = stand_in;
        for items in eval.items.chunks(eval.micro.max(1)).skip(batches_done(eval, so_far, &suffix)) {
            let outcome = batch(vlm, encoder, eval, items, &feed.pixels(items)?)?;
            so_far.entry(suffix.clone()).or_default().extend(outcome);
            if !on(items.len(), so_far)? {
                return Ok(None);
            }
        }
    }
    figures(eval, so_far).map(Some)
}

/// Batches of all passes.
pub fn samples_of_all_passes(eval: &Evaluation) -> usize {
    eval.items.len() * (1 + eval.pictures.len())
}

/// Samples that are done.
pub fn samples_done(eval: &Evaluation, so_far: &Outcomes) -> usize {
    let done =
        |(suffix, _): &(String, _)| (batches_done(eval, so_far, suffix) * eval.micro.max(1)).min(eval.items.len());
    passes(eval).iter().map(done).sum()
}

/// The passes by what their figures end in.
fn passes(eval: &Evaluation) -> Vec<(String, Option<Pictures>)> {
    let more = eval.pictures.iter().map(|p| (format!("/{}", label(*p)), Some(*p)));
    std::iter::once((String::new(), None)).chain(more).collect()
}

fn batches_done(eval: &Evaluation, so_far: &Outcomes, suffix: &str) -> usize {
    let numbers = so_far.get(suffix).map_or(0, Vec::len);
    match eval.metric {
        Metric::Loss => numbers / 2,
        _ => numbers.div_ceil(eval.micro.max(1)),
    }
}

/// What one batch comes to, as in [`Outcomes`].
fn batch(vlm: &Vlm, encoder: &TextEncoder, eval: &Evaluation, items: &[Item], pixels: &Pixels) -> Result<Vec<f64>> {
    match eval.metric {
        Metric::Loss => {
            let (_, lp, _) = forward(vlm, items, pixels)?;
            Ok(vec![lp.iter().sum::<f64>(), lp.len() as f64])
        }
        Metric::ExactMatch => {
            let (batch, _, argmax) = forward(vlm, items, pixels)?;
            let misses = misses(&batch.targets, &argmax, encoder.eos_ids());
            Ok(sum_by_owner(&batch, &misses).into_iter().map(|n| f64::from(u8::from(n == 0.0))).collect())
        }
        Metric::Preference => {
            let indexed: Vec<(usize, &Item)> = items.iter().enumerate().collect();
            let table = pair_logps(vlm, &indexed, pixels, false)?;
            // The same tokens have the same probability, whatever rounding makes of it.
            let hit = |(i, (c, r)): (&usize, &(f64, f64))| match items[*i].is_tie() {
                true => 0.5,
                false => f64::from(u8::from(c > r)),
            };
            Ok(table.iter().map(hit).collect())
        }
        Metric::Hallucination => {
            items.iter().map(|item| hallucinates(vlm, encoder, item, pixels, eval.max_new_tokens)).collect()
        }
    }
}

/// The figures of passes that are whole.
fn figures(eval: &Evaluation, outcomes: &Outcomes) -> Result<Figures> {
    let mut out = Figures { n: eval.items.len(), values: BTreeMap::new() };
    for (suffix, _) in passes(eval) {
        let all = outcomes.get(&suffix).map_or(&[][..], Vec::as_slice);
        let (name, value) = match eval.metric {
            Metric::Loss => {
                let (mut sum, mut n) = (0.0, 0.0);
                for of_batch in all.chunks_exact(2) {
                    (sum, n) = (sum - of_batch[0], n + of_batch[1]);
                }
                ("loss", sum / f64::max(n, 1.0))
            }
            Metric::ExactMatch => {
                if suffix.is_empty() {
                    out.values.extend(by_category(eval.items, all)?);
                }
                ("exact_match", mean(all))
            }
            Metric::Preference => ("preference", mean(all)),
            Metric::Hallucination => {
                let share = |bit: u8| mean(&all.iter().map(|x| f64::from(((*x as u8) >> bit) & 1)).collect::<Vec<_>>());
                let cut = share(1);
                out.values.extend((cut > 0.0).then(|| (format!("hallucination{suffix}/cut"), cut)));
                ("hallucination", share(0))
            }
        };
        out.values.insert(format!("{name}{suffix}"), value);
    }
    if eval.metric == Metric::ExactMatch {
        out.values.extend(chance(eval.items)?);
    }
    Ok(out)
}

/// Exact match by the category of the samples that name one.
fn by_category(items: &[Item], hits: &[f64]) -> Result<BTreeMap<String, f64>> {
    let mut of: BTreeMap<&String, Vec<f64>> = BTreeMap::new();
    for (item, hit) in items.iter().zip(hits) {
        if let Some(c) = &single(item)?.category {
            of.entry(c).or_default().push(*hit);
        }
    }
    Ok(of.into_iter().map(|(c, hits)| (format!("exact_match/category/{c}"), mean(&hits))).collect())
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
    /// Of the batches that are not done.
    fn new(eval: &Evaluation, so_far: &Outcomes) -> Result<Self> {
        let all: BTreeSet<&ImageRef> = eval.items.iter().flat_map(Item::images).collect();
        // The same file, seen another way, is no other picture.
        let others = |(at, i): (usize, &&ImageRef)| {
            let next = all.iter().cycle().skip(at + 1).take(all.len()).find(|n| n.path != i.path).unwrap_or(i);
            ((*i).clone(), (*next).clone())
        };
        let next: BTreeMap<ImageRef, ImageRef> = all.iter().enumerate().map(others).collect();
        let (n, micro) = (eval.items.len(), eval.micro.max(1));
        let (mut shown, mut batches) = (Vec::new(), Vec::new());
        for (suffix, stand_in) in passes(eval).iter().filter(|(_, p)| *p != Some(Pictures::Blank)) {
            let image = |i: &ImageRef| if stand_in.is_some() { next[i].clone() } else { i.clone() };
            let first = shown.len();
            shown.extend(eval.items.iter().map(|i| bare(i, i.images().iter().map(image).collect())));
            let whole = (0..n).step_by(micro).map(|i| (first + i..first + n.min(i + micro)).collect::<Vec<usize>>());
            batches.extend(whole.skip(batches_done(eval, so_far, suffix)));
        }
        let batches: Vec<(usize, Vec<usize>)> = batches.into_iter().enumerate().collect();
        let data = Arc::new(Dataset { items: shown });
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

/// A batch of conversations in its packed form, its log-probabilities (all finite) and most probable tokens.
fn forward(vlm: &Vlm, items: &[Item], pixels: &Pixels) -> Result<(Batch, Vec<f64>, Vec<u32>)> {
    let samples: Vec<&Sample> = items.iter().map(single).collect::<Result<_>>()?;
    let batch = collate(&samples, pixels)?;
    let (lp, _) = vlm.forward(&batch, Mode::default())?;
    let logps = lp.logps()?;
    finite_logps(&logps, &samples)?;
    let argmax = lp.argmax()?;
    Ok((batch, logps, argmax))
}

/// 1 for each target (a row, and the label there) that greedy decoding would not give, else 0. Every end token ends an answer.
fn misses(targets: &[(u32, u32)], argmax: &[u32], eos: &[u32]) -> Vec<f64> {
    let ends = |token: &u32| eos.contains(token);
    let miss = |((_, want), got): (&(u32, u32), &u32)| want != got && !(ends(want) && ends(got));
    targets.iter().zip(argmax).map(|x| f64::from(u8::from(miss(x)))).collect()
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

/// 1 if the model's own answer names what is absent, and 2 more if it had not ended after `limit` tokens or at the last position.
fn hallucinates(vlm: &Vlm, encoder: &TextEncoder, item: &Item, pixels: &Pixels, limit: usize) -> Result<f64> {
    let s = single(item)?;
    let end = s.labels.iter().position(|l| *l != IGNORE).unwrap_or(s.labels.len());
    let prompt = Sample { ids: s.ids[..end].to_vec(), labels: vec![IGNORE; end], ..s.clone() };
    let batch = collate(&[&prompt], pixels)?;
    let (positions, taken) = Sampling::greedy(limit).positions(vlm, end);
    let limit = limit.min(positions.saturating_sub(taken)).max(1);
    // One more tells whether the answer ends at the limit.
    let ids = generate(vlm, &batch, encoder.eos_ids(), Sampling::greedy(limit + 1), |_| ())?;
    let answer = encoder.decode(&ids[..ids.len().min(limit)])?;
    let (named, cut) = (s.absent.iter().any(|a| names(&answer, a)), ids.len() > limit);
    Ok(f64::from(u8::from(named) | (u8::from(cut) << 1)))
}

/// Does `text` contain `phrase` as whole words, in any case?
fn names(text: &str, phrase: &str) -> bool {
    let (text, phrase) = (words(text), words(phrase));
    !phrase.is_empty() && text.windows(phrase.len()).any(|w| w == phrase)
}

/// The words of a text in lower case and Unicode's form KC: runs of letters and digits. In scripts that put no spaces between
/// words, and in Korean, which writes particles onto them, each letter is one.
fn words(text: &str) -> Vec<String> {
    let mut normal = NormalizedString::from(text);
    normal.nfkc().lowercase();
    let mut words: Vec<String> = Vec::new();
    let mut open = false;
    for c in normal.get().chars() {
        match (stands_alone(c), c.is_alphanumeric()) {
            (true, _) => words.push(c.to_string()),
            (false, true) if open => words.last_mut().into_iter().for_each(|w| w.push(c)),
            (false, true) => words.push(c.to_string()),
            // Part of the word, though no letter of it.
            _ if open && joins(c) => continue,
            _ => (),
        }
        open = c.is_alphanumeric() && !stands_alone(c);
    }
    words
}

/// A character of a script whose words are not told apart by spaces: Thai, Lao, Tibetan, Burmese, Khmer, kana, Han; or of Hangul.
fn stands_alone(c: char) -> bool {
    matches!(c, '\u{0e01}'..='\u{0fff}' | '\u{1000}'..='\u{109f}' | '\u{1100}'..='\u{11ff}' | '\u{1780}'..='\u{17ff}'
        | '\u{3040}'..='\u{31ff}' | '\u{3400}'..='\u{4dbf}' | '\u{4e00}'..='\u{9fff}' | '\u{a960}'..='\u{a97f}'
        | '\u{ac00}'..='\u{d7ff}' | '\u{f900}'..='\u{faff}' | '\u{20000}'..='\u{3ffff}')
}

/// A mark within a word that is no letter: accents without a letter of their own, points and signs of Hebrew and Arabic, nukta and
/// virama of the scripts of India (at the same place of each block), joiners.
fn joins(c: char) -> bool {
    let of_india = |c: char| matches!(u32::from(c), 0x900..=0xdff) && [0x3c, 0x4d].contains(&(u32::from(c) & 0x7f));
    matches!(c, '\u{300}'..='\u{36f}' | '\u{591}'..='\u{5bd}' | '\u{5bf}'..='\u{5c2}' | '\u{610}'..='\u{61a}'
        | '\u{640}' | '\u{64b}'..='\u{65f}' | '\u{6d6}'..='\u{6ed}' | '\u{dca}' | '\u{200c}' | '\u{200d}'
        | '\u{fe20}'..='\u{fe2f}')
        || of_india(c)
}

fn mean(v: &[f64]) -> f64 {
    v.iter().sum::<f64>() / v.len().max(1) as f64
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::{Alpha, Resize};
    use std::path::Path;

    #[test]
    fn any_end_token_ends_an_answer() {
        let targets = [(0, 7), (1, 8), (2, 2), (3, 7), (4, 2)];
        assert_eq!(misses(&targets, &[7, 8, 2, 2, 7], &[2]), [0.0, 0.0, 0.0, 1.0, 1.0]);
        assert_eq!(misses(&targets, &[7, 8, 3, 2, 7], &[2, 3]), [0.0, 0.0, 0.0, 1.0, 1.0]);
        assert_eq!(misses(&targets, &[7, 8, 3, 2, 7], &[2]), [0.0, 0.0, 1.0, 1.0, 1.0]);
    }

    #[test]
    fn phrases_are_found_in_any_script() {
        for (text, phrase) in [
            ("Beside it lies a Cat.", "cat"),
            ("the cat's tail", "cat"),
            ("a T-shirt", "t-shirt"),
            ("Ein GRÜNER Würfel", "grüner würfel"),
            ("un café", "cafe\u{301}"),
            ("红色的圆形旁边有一只猫。", "猫"),
            ("テーブルの上に猫がいます", "猫"),
            ("탁자 위에 고양이가 있다", "고양이"),
            ("มีแมวอยู่บนโต๊ะ", "แมว"),
            ("two red cubes", "red cubes"),
            ("मेज़ पर एक बिल्ली है", "बिल्ली"),
            ("टेबल पर मेज़", "मेज\u{93c}"),
        ] {
            assert!(names(text, phrase), "{phrase} in {text}");
        }
        for (text, phrase) in [
            ("a category", "cat"),
            ("red and cubes", "red cubes"),
            ("two cats", "cat"),
            ("红色的圆形", "猫"),
            ("cafes", "cafe"),
            ("a cat", "…"),
            ("मेज़ पर एक बिल्ली है", "ली"),
            ("x\u{302}cat", "cat"),
        ] {
            assert!(!names(text, phrase), "{phrase} in {text}");
        }
    }

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
        let eval = Evaluation {
            metric: Metric::Loss,
            items: &items,
            images: Some(&processor),
            pictures: &pictures,
            micro: 2,
            max_new_tokens: 8,
        };
        let px = all.clone().map(|i| processor.load(&i).unwrap());
        let again = |p: &[f32], n: usize| p.iter().copied().cycle().take(n).collect::<Vec<f32>>();
        let mut feed = Feed::new(&eval, &Outcomes::new()).unwrap();
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
