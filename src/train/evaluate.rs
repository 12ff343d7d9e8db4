//! Held-out evaluation: loss, exact match, preference accuracy, hallucination rate.
//!
//! Exact match needs no generation: greedy decoding gives exactly the labelled answer if and only if, with the right
//! prefix at every position, the most probable token is the label.

use super::collate::{collate, single, sum_by_owner};
use super::generate::{Sampling, generate};
use super::step::{finite_logps, pair_logps};
use crate::data::{IGNORE, Item, Pixels, Sample, TextEncoder};
use crate::error::Result;
use crate::model::vlm::{Batch, Mode, Vlm};
use crate::recipe::schema::{Metric, Pictures};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
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
    pub pixels: &'a Pixels,
    pub pictures: &'a [Pictures],
    pub micro: usize,
}

/// Runs one evaluation.
pub fn evaluate(vlm: &Vlm, encoder: &TextEncoder, eval: &Evaluation) -> Result<Figures> {
    let mut out = Figures { n: eval.items.len(), values: BTreeMap::new() };
    let mut variants = vec![(String::new(), None)];
    variants.extend(eval.pictures.iter().map(|p| (format!("/{}", label(*p)), Some(*p))));
    for (suffix, stand_in) in variants {
        let swapped;
        let pixels = match stand_in {
            None => eval.pixels,
            Some(p) => {
                swapped = stand_in_pixels(eval.pixels, p);
                &swapped
            }
        };
        match eval.metric {
            Metric::Loss => {
                out.values.insert(format!("loss{suffix}"), mean_loss(vlm, eval, pixels)?);
            }
            Metric::ExactMatch => exact_match(vlm, eval, pixels, &suffix, &mut out.values)?,
            Metric::Preference => {
                out.values.insert(format!("preference{suffix}"), preference(vlm, eval, pixels)?);
            }
            Metric::Hallucination => {
                out.values.insert(format!("hallucination{suffix}"), hallucination(vlm, encoder, eval, pixels)?);
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

/// Blank: the mean colour (zero after normalisation). Shuffled: each picture's place is taken by the next one, which is cut off
/// or begun again where it has more or fewer tiles.
fn stand_in_pixels(pixels: &Pixels, how: Pictures) -> Pixels {
    let all: Vec<_> = pixels.iter().collect();
    let swap = |i: usize| match how {
        Pictures::Blank => Arc::new(vec![0.0; all[i].1.len()]),
        Pictures::Shuffled => {
            let (n, next) = (all[i].1.len(), all[(i + 1) % all.len()].1);
            if next.len() == n { next.clone() } else { Arc::new(next.iter().copied().cycle().take(n).collect()) }
        }
    };
    all.iter().enumerate().map(|(i, (k, _))| ((*k).clone(), swap(i))).collect()
}

/// Calls `f` with each micro-batch's samples, its packed form, log-probabilities (all finite) and most probable tokens.
fn each_batch(
    vlm: &Vlm,
    eval: &Evaluation,
    pixels: &Pixels,
    mut f: impl FnMut(&[&Sample], &Batch, &[f64], &[u32]),
) -> Result<()> {
    for items in eval.items.chunks(eval.micro.max(1)) {
        let samples: Vec<&Sample> = items.iter().map(single).collect::<Result<_>>()?;
        let batch = collate(&samples, pixels)?;
        let (lp, _) = vlm.forward(&batch, Mode::default())?;
        let logps = lp.logps()?;
        finite_logps(&logps, &samples)?;
        f(&samples, &batch, &logps, &lp.argmax()?);
    }
    Ok(())
}

fn mean_loss(vlm: &Vlm, eval: &Evaluation, pixels: &Pixels) -> Result<f64> {
    let (mut sum, mut n) = (0.0, 0);
    each_batch(vlm, eval, pixels, |_, _, lp, _| {
        sum -= lp.iter().sum::<f64>();
        n += lp.len();
    })?;
    Ok(sum / n.max(1) as f64)
}

fn exact_match(
    vlm: &Vlm,
    eval: &Evaluation,
    pixels: &Pixels,
    suffix: &str,
    out: &mut BTreeMap<String, f64>,
) -> Result<()> {
    let mut all = Vec::with_capacity(eval.items.len());
    let mut by_category: BTreeMap<String, Vec<f64>> = BTreeMap::new();
    each_batch(vlm, eval, pixels, |samples, batch, _, argmax| {
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

fn preference(vlm: &Vlm, eval: &Evaluation, pixels: &Pixels) -> Result<f64> {
    let mut hits = Vec::with_capacity(eval.items.len());
    for items in eval.items.chunks(eval.micro.max(1)) {
        let indexed: Vec<(usize, &Item)> = items.iter().enumerate().collect();
        let table = pair_logps(vlm, &indexed, pixels, false)?;
        hits.extend(table.values().map(|(c, r)| f64::from(u8::from(c > r))));
    }
    Ok(mean(&hits))
}

fn hallucination(vlm: &Vlm, encoder: &TextEncoder, eval: &Evaluation, pixels: &Pixels) -> Result<f64> {
    let mut hits = Vec::with_capacity(eval.items.len());
    for item in eval.items {
        let s = single(item)?;
        let end = s.labels.iter().position(|l| *l != IGNORE).unwrap_or(s.labels.len());
        let prompt = Sample { ids: s.ids[..end].to_vec(), labels: vec![IGNORE; end], ..s.clone() };
        let batch = collate(&[&prompt], pixels)?;
        let ids = generate(vlm, &batch, encoder.eos_ids(), Sampling::greedy(MAX_ANSWER), |_| ())?;
        let answer = encoder.decode(&ids)?.to_lowercase();
        hits.push(f64::from(u8::from(s.absent.iter().any(|a| names(&answer, &a.to_lowercase())))));
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
