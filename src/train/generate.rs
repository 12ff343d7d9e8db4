//! Generation with a key-value cache: greedy, or sampled with temperature and top-p.

use crate::bail;
use crate::error::Result;
use crate::model::vlm::{Batch, Vlm};
use crate::ops::launch::host;
use crate::ops::random::Key;
use candle_core::DType;

/// How the next token is chosen.
#[derive(Debug, Clone, Copy)]
pub struct Sampling {
    /// 0: the most probable token.
    pub temperature: f64,
    /// Smallest set of tokens whose probability reaches this; 1: all.
    pub top_p: f64,
    pub seed: u64,
    pub max_new_tokens: usize,
    /// Positions that prompt and answer take at most; `None`: those that the language model was made for.
    pub max_positions: Option<usize>,
}

impl Sampling {
    /// Greedy decoding.
    pub fn greedy(max_new_tokens: usize) -> Self {
        Self { temperature: 0.0, top_p: 1.0, seed: 0, max_new_tokens, max_positions: None }
    }

    /// How many positions there are, and how many of them a prompt of `tokens` takes, soft tokens included.
    pub fn positions(&self, vlm: &Vlm, tokens: usize) -> (usize, usize) {
        let own = vlm.language.config.max_position_embeddings;
        (self.max_positions.unwrap_or(own), tokens + vlm.prefix_rows()[0])
    }
}

/// A prompt of `tokens` must leave room for an answer.
pub fn fits(vlm: &Vlm, tokens: usize, how: &Sampling) -> Result<()> {
    let (positions, taken) = how.positions(vlm, tokens);
    if taken < positions {
        return Ok(());
    }
    match how.max_positions {
        Some(_) => bail!("the prompt takes {taken} positions, and --max-seq-len {positions} leaves none for an answer";
            "raise --max-seq-len, shorten the prompt, or show fewer pictures or fewer tiles of them"),
        None => {
            bail!("the prompt takes {taken} positions, and the language model has {positions} (max_position_embeddings in its config.json)";
            "shorten the prompt, show fewer pictures or fewer tiles of them, or go beyond what the model was made for with --max-seq-len")
        }
    }
}

/// Continues one prompt (a batch of one sequence) until an end token, or until the language model has no position left; calls
/// `emit` with each new token. The end token is not among those returned.
pub fn generate(vlm: &Vlm, prompt: &Batch, eos: &[u32], how: Sampling, mut emit: impl FnMut(u32)) -> Result<Vec<u32>> {
    if prompt.lengths.len() != 1 || prompt.ids.is_empty() {
        bail!("generation takes one prompt of at least one token")
    }
    let key = Key::new(how.seed, "generate");
    let mut cache = vlm.language.cache();
    let (x, [here, after]) = vlm.prompt(prompt)?;
    let (positions, mut taken) = how.positions(vlm, prompt.ids.len());
    let mut logits = vlm.language.extend(x, here.as_ref(), &mut cache)?;
    let mut out = Vec::new();
    while out.len() < how.max_new_tokens {
        let z: Vec<f64> = host(&logits.to_dtype(DType::F64)?)?.to_vec1()?;
        let next = pick(&z, how, key.uniform(out.len() as u64))?;
        if eos.contains(&next) {
            break;
        }
        emit(next);
        out.push(next);
        if taken >= positions {
            break;
        }
        taken += 1;
        if out.len() < how.max_new_tokens {
            logits = vlm.language.extend(vlm.language.embed(&[next])?, after.as_ref(), &mut cache)?;
        }
    }
    Ok(out)
}

/// The next token from logits and a uniform number.
fn pick(z: &[f64], how: Sampling, u: f64) -> Result<u32> {
    let Some(best) = (0..z.len()).filter(|i| !z[*i].is_nan()).max_by(|a, b| z[*a].total_cmp(&z[*b]).then(b.cmp(a)))
    else {
        bail!("every logit is NaN"; "the weights are damaged: look at the run's metrics for a step where the loss broke")
    };
    if how.temperature <= 0.0 {
        return Ok(best as u32);
    }
    let mut p: Vec<(usize, f64)> = z.iter().map(|x| ((x - z[best]) / how.temperature).exp()).enumerate().collect();
    p.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    let total: f64 = p.iter().map(|x| x.1).sum();
    let mut kept = 0.0;
    let cut = p.iter().position(|x| {
        kept += x.1 / total;
        kept >= how.top_p
    });
    p.truncate(cut.map_or(p.len(), |c| c + 1));
    let mut left = u * p.iter().map(|x| x.1).sum::<f64>();
    for (i, q) in &p {
        left -= q;
        if left < 0.0 {
            return Ok(*i as u32);
        }
    }
    Ok(p.last().map_or(best, |x| x.0) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sampling_follows_the_distribution_and_top_p_cuts_it() {
        let z = [0.0, 3f64.ln(), 6f64.ln()];
        let how = Sampling { temperature: 1.0, seed: 1, ..Sampling::greedy(1) };
        let mut n = [0; 3];
        for i in 0..10_000 {
            n[pick(&z, how, (i as f64 + 0.5) / 10_000.0).unwrap() as usize] += 1;
        }
        assert_eq!(n, [1000, 3000, 6000]);
        let cut = Sampling { top_p: 0.5, ..how };
        assert!((0..100).all(|i| pick(&z, cut, i as f64 / 100.0).unwrap() == 2));
        assert_eq!(pick(&z, Sampling::greedy(1), 0.99).unwrap(), 2);
        assert!(pick(&[f64::NAN], how, 0.5).is_err());
    }
}
