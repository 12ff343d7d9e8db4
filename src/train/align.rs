//! How near visual tokens have come to the words that describe them: a first look at whether a projector has learnt anything.
//!
//! For each sample v is the mean of its pictures' projected tokens and c the mean of the language model's input embeddings of its
//! label tokens. Told are the mean cosine of v and c, and how often the caption whose c is nearest to v is the sample's own
//! (retrieval among all samples, as CLIP is judged by; Radford et al. 2021). Captions of the same tokens are one caption.

use super::collate::{collate, single};
use crate::bail;
use crate::data::{IGNORE, Item, Pixels, Sample};
use crate::error::{Error, Result};
use crate::model::visual;
use crate::model::vlm::Vlm;
use crate::ops::launch::{host, widen};
use candle_core::{DType, Tensor};

/// Samples' pictures beside their captions.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Alignment {
    /// Samples.
    pub n: usize,
    /// Mean cosine of a sample's pictures and its caption, −1 to 1.
    pub cosine: f64,
    /// Share of the samples whose pictures find their own caption.
    pub retrieval: f64,
    /// The share that guessing would find.
    pub chance: f64,
}

/// Measures `items`, conversations with pictures, `micro` at a time; `load` brings the pictures of each part.
pub fn measure(
    vlm: &Vlm,
    items: &[&Item],
    micro: usize,
    load: impl Fn(&[&Item]) -> Result<Pixels>,
) -> Result<Alignment> {
    let (mut seen, mut said, mut captions) = (Vec::new(), Vec::new(), Vec::new());
    for part in items.chunks(micro.max(1)) {
        let samples: Vec<&Sample> = part.iter().map(|i| single(i)).collect::<Result<_>>()?;
        let batch = collate(&samples, &load(part)?)?;
        let Some((_, tokens)) = batch.pixels.as_ref().map(|p| vlm.project(p)).transpose()?.flatten() else {
            bail!("{}: there is no picture to look at", samples[0].id)
        };
        let (tokens, per) = (rows(&tokens)?, vlm.visual_tokens_per_image()?);
        let pieces = tokens.len() / per.max(1);
        let of_picture = visual::rows(&batch.layouts, pieces, per)?;
        let mut pictures = batch.pictures.iter();
        for s in samples {
            let own = pictures.by_ref().take(s.images.len()).map(|p| *p as usize);
            // Behind them all stands the newline of tiles, which shows nothing.
            let v = direction(
                own.flat_map(|p| of_picture.iter().skip(p).take(1).flatten())
                    .filter_map(|row| tokens.get(*row as usize)),
            );
            let caption: Vec<u32> = s.labels.iter().skip(1).filter(|l| **l != IGNORE).map(|l| *l as u32).collect();
            let c = direction(rows(&vlm.language.embed(&caption)?)?.iter());
            if v.iter().chain(&c).any(|x| !x.is_finite()) {
                let hint =
                    "the weights are damaged, or training broke them: lower the learning rate or lengthen the warm-up";
                let cause = format!("{}: its visual tokens or the embeddings of its caption are not numbers", s.id);
                return Err(Error::new(cause).hint(hint).diverged());
            }
            seen.push(v);
            said.push(c);
            captions.push(caption);
        }
    }
    Ok(compare(&seen, &said, &captions))
}

/// `seen` and `said`: unit vectors of the same samples.
fn compare(seen: &[Vec<f64>], said: &[Vec<f64>], captions: &[Vec<u32>]) -> Alignment {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>();
    let n = seen.len().max(1) as f64;
    let (mut cosine, mut hits, mut alike) = (0.0, 0.0, 0.0);
    for (i, v) in seen.iter().enumerate() {
        let mut best = (f64::NEG_INFINITY, i);
        for (j, c) in said.iter().enumerate() {
            let cos = dot(v, c);
            // Of captions that are equally near the first counts: a projector that makes all pictures alike finds only its own.
            if cos > best.0 {
                best = (cos, j);
            }
            cosine += if i == j { cos } else { 0.0 };
            alike += f64::from(u8::from(captions[i] == captions[j]));
        }
        hits += f64::from(u8::from(captions[i] == captions[best.1]));
    }
    Alignment { n: seen.len(), cosine: cosine / n, retrieval: hits / n, chance: alike / (n * n) }
}

/// A tensor's rows on the host.
fn rows(t: &Tensor) -> Result<Vec<Vec<f64>>> {
    Ok(host(&widen(t)?)?.to_dtype(DType::F64)?.to_vec2()?)
}

/// The mean of `rows`, scaled to length 1; 0 if it is 0.
fn direction<'a>(rows: impl Iterator<Item = &'a Vec<f64>>) -> Vec<f64> {
    let mut sum: Vec<f64> = Vec::new();
    for row in rows {
        sum.resize(row.len(), 0.0);
        sum.iter_mut().zip(row).for_each(|(s, x)| *s += x);
    }
    let length = sum.iter().map(|x| x * x).sum::<f64>().sqrt();
    if length > 0.0 {
        sum.iter_mut().for_each(|x| *x /= length);
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn directions_are_means_of_length_one() {
        let d = direction([vec![1.0, 0.0], vec![5.0, 8.0]].iter());
        assert_eq!(d, [0.6, 0.8]);
        assert_eq!(direction([vec![1.0, -1.0], vec![-1.0, 1.0]].iter()), [0.0, 0.0]);
    }

    #[test]
    fn cosines_and_hits_by_hand() {
        let captions = [vec![1], vec![2], vec![1], vec![3]];
        let said = [vec![1.0, 0.0], vec![0.0, 1.0], vec![1.0, 0.0], vec![-1.0, 0.0]];
        // The third finds the first's caption, which reads as its own; the last finds the second's.
        let seen = [vec![0.8, 0.6], vec![0.6, 0.8], vec![1.0, 0.0], vec![0.0, 1.0]];
        let a = compare(&seen, &said, &captions);
        assert_eq!((a.n, a.retrieval, a.chance), (4, 0.75, 6.0 / 16.0));
        assert!((a.cosine - (0.8 + 0.8 + 1.0 + 0.0) / 4.0).abs() < 1e-12, "{a:?}");
        // A projector that makes everything alike finds one caption for all.
        let flat = compare(&vec![vec![0.6, 0.8]; 4], &said, &captions);
        assert_eq!(flat.retrieval, 0.25);
    }
}
