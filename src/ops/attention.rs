//! Scaled dot-product attention over packed sequences, forward with log-sum-exp and backward from it
//! (the scheme of FlashAttention, Dao et al. 2022): no matrix of all scores is ever held.
//!
//! For a block of queries Q with keys K, values V: S = QKᵀ·scale, P = softmax(S), O = PV, L = logsumexp(S).
//! Backward: P = exp(S − L), D = rowsum(dO∘O), dV = PᵀdO, dS = P∘(dO·Vᵀ − D)·scale, dQ = dS·K, dK = dSᵀQ.
//! Grouped queries: query head h reads key head h / (heads / kv_heads).
//!
//! Three ways compute it: `reference` on the CPU; `flash`, kernels on tensor cores for bf16 and common widths of a head;
//! [`blockwise`], products of strided matrices for whatever else runs on kernels. Where no backward pass follows, the
//! feature `flash-attn` adds a fourth: `candle_flash`.

pub mod blockwise;
#[cfg(feature = "flash-attn")]
mod candle_flash;
mod flash;
mod reference;
mod sequences;

pub use sequences::Sequences;

use super::launch::{Path, empty, narrow, path, widen};
use super::{dims2, dispatch};
use crate::bail;
use crate::error::Result;
use candle_core::{DType, Tensor};
use std::ops::Range;

/// Rows of Q and of K, V that belong to one sequence. A causal query row i of `q` (counted from its end) sees the
/// keys up to the same distance from the end of `k`: with a cache `k` is longer than `q`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its rows of Q.
    pub q: Range<usize>,
    /// Its rows of K and V.
    pub k: Range<usize>,
    /// Keys that some of its queries do not see, causal or not.
    pub skip: Option<Skip>,
}

/// Keys hidden from a segment's later queries. A query that sees no key at all has o = 0, a log-sum-exp of −∞ and no
/// gradient.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skip {
    /// The first query that does not see them, counted from the segment's first.
    pub from: usize,
    /// The keys, counted from the segment's first.
    pub keys: Range<usize>,
}

impl Segment {
    /// All of `k` for all of `q`.
    pub fn new(q: Range<usize>, k: Range<usize>) -> Self {
        Self { q, k, skip: None }
    }

    /// Two answers behind one prompt that stands there once, for causal attention: from row `start` on, `prompt` rows,
    /// `first` rows of one answer and `second` rows of the other, which do not see the first answer's. Each answer is
    /// computed as if it alone followed the prompt; its positions (rope) are to count on from the prompt's, too.
    pub fn two_answers(start: usize, prompt: usize, first: usize, second: usize) -> Self {
        let rows = start..start + prompt + first + second;
        Self { q: rows.clone(), k: rows, skip: Some(Skip { from: prompt + first, keys: prompt..prompt + first }) }
    }

    /// The keys that query `i` sees, both counted from the segment's first: two ranges in order, either may be empty.
    fn seen(&self, causal: bool, i: usize) -> [Range<usize>; 2] {
        let end = if causal { self.k.len() - (self.q.len() - 1 - i) } else { self.k.len() };
        match &self.skip {
            Some(s) if i >= s.from => [0..s.keys.start.min(end), s.keys.end.min(end)..end],
            _ => [0..end, end..end],
        }
    }

    /// Keys from the segment's first to the last that the last of `rows` may see.
    fn width(&self, causal: bool, rows: &Range<usize>) -> usize {
        if causal { self.k.len() - (self.q.end - rows.end) } else { self.k.len() }
    }
}

/// Shape of an attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Config {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Whether a query sees only the keys up to its own place.
    pub causal: bool,
}

impl Config {
    fn scale(&self) -> f64 {
        1.0 / (self.head_dim as f64).sqrt()
    }

    /// Query heads that read one key head.
    fn group(&self) -> usize {
        self.heads / self.kv_heads
    }
}

/// `q` `[N, heads·hd]`, `k`, `v` `[M, kv_heads·hd]` → o `[N, heads·hd]` and log-sum-exp `[N, heads]`, which is f32 where
/// the rest is bf16. Rows outside every segment are zero.
pub fn forward(cfg: Config, sequences: &Sequences, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
    check(cfg, sequences, q, k, v)?;
    match path("attention", q)? {
        Path::Kernel if flash::fits(cfg, &[q, k, v]) => flash::forward(cfg, sequences, q, k, v),
        Path::Kernel => blockwise::forward(cfg, sequences, q, k, v),
        Path::Widened => {
            let (o, lse) = forward(cfg, sequences, &widen(q)?, &widen(k)?, &widen(v)?)?;
            Ok((narrow(&o)?, lse))
        }
        Path::Reference => dispatch!(q, "attention", T => reference::forward::<T>(cfg, sequences, q, k, v)),
    }
}

/// [`forward`], with the log-sum-exp only if the pass is `recorded`, so that a backward one may follow.
pub fn forward_kept(
    cfg: Config,
    sequences: &Sequences,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    recorded: bool,
) -> Result<(Tensor, Option<Tensor>)> {
    #[cfg(feature = "flash-attn")]
    if !recorded && let Some(o) = candle_flash::forward(cfg, sequences, q, k, v)? {
        return Ok((o, None));
    }
    let (o, lse) = forward(cfg, sequences, q, k, v)?;
    Ok((o, recorded.then_some(lse)))
}

/// The log-sum-exp of a recorded pass.
pub fn kept(lse: Option<&Tensor>) -> Result<&Tensor> {
    match lse {
        Some(lse) => Ok(lse),
        None => bail!("attention: a backward pass behind one that was not recorded"),
    }
}

/// What [`backward`] needs of the forward pass.
pub struct Saved<'a> {
    /// `[N, heads·hd]`.
    pub q: &'a Tensor,
    /// `[M, kv_heads·hd]`.
    pub k: &'a Tensor,
    /// `[M, kv_heads·hd]`.
    pub v: &'a Tensor,
    /// The output, `[N, heads·hd]`.
    pub o: &'a Tensor,
    /// Log-sum-exp of each row's scores, `[N, heads]`.
    pub lse: &'a Tensor,
}

/// (dq, dk, dv) of the shapes of q, k, v.
pub fn backward(cfg: Config, sequences: &Sequences, s: Saved, d_o: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    check(cfg, sequences, s.q, s.k, s.v)?;
    match path("attention backward", s.q)? {
        Path::Kernel if flash::fits(cfg, &[s.q, s.k, s.v, s.o, d_o]) => flash::backward(cfg, sequences, s, d_o),
        Path::Kernel => blockwise::backward(cfg, sequences, s, d_o),
        Path::Widened => {
            let [q, k, v, o] = [widen(s.q)?, widen(s.k)?, widen(s.v)?, widen(s.o)?];
            let saved = Saved { q: &q, k: &k, v: &v, o: &o, lse: s.lse };
            let (dq, dk, dv) = backward(cfg, sequences, saved, &widen(d_o)?)?;
            Ok((narrow(&dq)?, narrow(&dk)?, narrow(&dv)?))
        }
        Path::Reference => dispatch!(s.q, "attention backward", T => reference::backward::<T>(cfg, sequences, s, d_o)),
    }
}

/// A kernel's output, zero where rows lie outside every segment: the kernels do not write those.
fn output(
    like: &Tensor,
    dtype: DType,
    shape: (usize, usize),
    segments: &[Segment],
    rows: impl Fn(&Segment) -> &Range<usize>,
) -> Result<Tensor> {
    // A segment without keys gives its queries nothing.
    let covered: usize = segments.iter().filter(|s| !s.k.is_empty()).map(|s| rows(s).len()).sum();
    if covered == shape.0 { empty(like, dtype, shape) } else { Ok(Tensor::zeros(shape, dtype, like.device())?) }
}

fn check(cfg: Config, segments: &[Segment], q: &Tensor, k: &Tensor, v: &Tensor) -> Result<()> {
    let ((n, qw), (m, kw)) = (dims2(q, "attention q")?, dims2(k, "attention k")?);
    if qw != cfg.heads * cfg.head_dim
        || kw != cfg.kv_heads * cfg.head_dim
        || v.dims() != k.dims()
        || !cfg.heads.is_multiple_of(cfg.kv_heads)
    {
        bail!("attention: q {:?}, k {:?}, v {:?} do not fit {cfg:?}", q.dims(), k.dims(), v.dims())
    }
    for s in segments {
        if s.q.end > n || s.k.end > m || (cfg.causal && s.k.len() < s.q.len()) || s.k.is_empty() != s.q.is_empty() {
            bail!("attention: segment {s:?} does not fit {n} queries and {m} keys")
        }
        let beyond =
            |skip: &Skip| skip.from > s.q.len() || skip.keys.start > skip.keys.end || skip.keys.end > s.k.len();
        if s.skip.as_ref().is_some_and(beyond) {
            bail!("attention: segment {s:?} skips keys or begins to at a query that it has not")
        }
    }
    Ok(())
}
