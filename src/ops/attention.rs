//! Scaled dot-product attention over packed sequences, forward with log-sum-exp and backward from it
//! (the scheme of FlashAttention, Dao et al. 2022): no matrix of all scores is ever held.
//!
//! For a block of queries Q with keys K, values V: S = QKᵀ·scale, P = softmax(S), O = PV, L = logsumexp(S).
//! Backward: P = exp(S − L), D = rowsum(dO∘O), dV = PᵀdO, dS = P∘(dO·Vᵀ − D)·scale, dQ = dS·K, dK = dSᵀQ.
//! Grouped queries: query head h reads key head h / (heads / kv_heads).

mod flash;

use super::gemm;
use super::launch::{Path, narrow, path, widen};
use super::{Real, Shared, data, dims2, dispatch, tensor};
use crate::bail;
use crate::error::Result;
use ::gemm::Parallelism;
use candle_core::{DType, Tensor};
use rayon::prelude::*;
use std::ops::Range;

/// Rows of Q and of K, V that belong to one sequence. A causal query row i of `q` (counted from its end) sees the
/// keys up to the same distance from the end of `k`: with a cache `k` is longer than `q`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Segment {
    /// Its rows of Q.
    pub q: Range<usize>,
    /// Its rows of K and V.
    pub k: Range<usize>,
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
}

/// Query rows of one block.
const BLOCK: usize = 64;

/// `q` `[N, heads·hd]`, `k`, `v` `[M, kv_heads·hd]` → o `[N, heads·hd]` and log-sum-exp `[N, heads]`, which is f32 where
/// the rest is bf16.
pub fn forward(cfg: Config, segments: &[Segment], q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
    let n = check(cfg, segments, q, k, v)?;
    match path("attention", q)? {
        Path::Kernel if flash::fits(cfg, &[q, k, v]) => return flash::forward(cfg, segments, q, k, v),
        _ if q.dtype() == DType::BF16 => {
            let (o, lse) = forward(cfg, segments, &widen(q)?, &widen(k)?, &widen(v)?)?;
            return Ok((narrow(&o)?, lse));
        }
        _ => {}
    }
    dispatch!(q, "attention", T => {
        let (qs, ks, vs) = (data::<T>(q)?, data::<T>(k)?, data::<T>(v)?);
        let (qs, ks, vs): (&[T], &[T], &[T]) = (&qs, &ks, &vs);
        // Rows outside every segment stay zero.
        let (mut o, mut lse) = (vec![T::default(); n * cfg.heads * cfg.head_dim], vec![T::default(); n * cfg.heads]);
        let (op, lp) = (Shared::new(&mut o), Shared::new(&mut lse));
        let tasks = cfg.heads * segments.len();
        (0..tasks).into_par_iter().with_min_len(min_tasks(cfg, segments)).for_each(|t| {
            let (seg, h) = (&segments[t / cfg.heads], t % cfg.heads);
            let mut scores = Vec::new();
            for rows in blocks(&seg.q) {
                let keys = visible(cfg, seg, &rows);
                let (r, w) = (rows.len(), keys.end - seg.k.start);
                scores.resize(r * w, T::default());
                // SAFETY: one task a (segment, head) writes that head's columns of its rows of o and lse only.
                unsafe {
                    score(cfg, qs, ks, h, &rows, seg.k.start, w, &mut scores);
                    for i in 0..r {
                        let seen = visible(cfg, seg, &(rows.start + i..rows.start + i + 1)).end - seg.k.start;
                        let row = &mut scores[i * w..(i + 1) * w];
                        *lp.at((rows.start + i) * cfg.heads + h) = softmax(row, seen);
                    }
                    let (os, kvs) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
                    let vh = vs.as_ptr().add(seg.k.start * kvs + kv_head(cfg, h) * cfg.head_dim);
                    gemm::raw(
                        (r, cfg.head_dim, w), op.at(rows.start * os + h * cfg.head_dim), os as isize, T::default(),
                        (scores.as_ptr(), w as isize, 1), (vh, kvs as isize, 1), T::of(1.0), Parallelism::None,
                    );
                }
            }
        });
        Ok((tensor(o, (n, cfg.heads * cfg.head_dim))?, tensor(lse, (n, cfg.heads))?))
    })
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
pub fn backward(cfg: Config, segments: &[Segment], s: Saved, d_o: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let n = check(cfg, segments, s.q, s.k, s.v)?;
    let m = s.k.dim(0)?;
    match path("attention backward", s.q)? {
        Path::Kernel if flash::fits(cfg, &[s.q, s.k, s.v, s.o, d_o]) => return flash::backward(cfg, segments, s, d_o),
        _ if s.q.dtype() == DType::BF16 => {
            let [q, k, v, o] = [widen(s.q)?, widen(s.k)?, widen(s.v)?, widen(s.o)?];
            let saved = Saved { q: &q, k: &k, v: &v, o: &o, lse: s.lse };
            let (dq, dk, dv) = backward(cfg, segments, saved, &widen(d_o)?)?;
            return Ok((narrow(&dq)?, narrow(&dk)?, narrow(&dv)?));
        }
        _ => {}
    }
    dispatch!(s.q, "attention backward", T => {
        let (q, k, v) = (data::<T>(s.q)?, data::<T>(s.k)?, data::<T>(s.v)?);
        let (o, lse, g) = (data::<T>(s.o)?, data::<T>(s.lse)?, data::<T>(d_o)?);
        let [q, k, v, o, lse, g]: [&[T]; 6] = [&q, &k, &v, &o, &lse, &g];
        let (qw, kw) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
        let (mut dq, mut dk, mut dv) = (vec![T::default(); n * qw], vec![T::default(); m * kw], vec![T::default(); m * kw]);
        let (dqp, dkp, dvp) = (Shared::new(&mut dq), Shared::new(&mut dk), Shared::new(&mut dv));
        let group = cfg.heads / cfg.kv_heads;
        let tasks = cfg.kv_heads * segments.len();
        (0..tasks).into_par_iter().with_min_len(min_tasks(cfg, segments)).for_each(|t| {
            let (seg, kvh) = (&segments[t / cfg.kv_heads], t % cfg.kv_heads);
            let (mut p, mut ds) = (Vec::new(), Vec::new());
            for h in kvh * group..(kvh + 1) * group {
                for rows in blocks(&seg.q) {
                    let (r, w) = (rows.len(), visible(cfg, seg, &rows).end - seg.k.start);
                    p.resize(r * w, T::default());
                    ds.resize(r * w, T::default());
                    let (hd, one) = (cfg.head_dim, T::of(1.0));
                    let (qo, ko) = (rows.start * qw + h * hd, seg.k.start * kw + kvh * hd);
                    // SAFETY: one task a (segment, key head) writes that head's columns of dk, dv and its queries' of dq.
                    unsafe {
                        score(cfg, q, k, h, &rows, seg.k.start, w, &mut p);
                        gemm::raw((r, w, hd), ds.as_mut_ptr(), w as isize, T::default(), (g.as_ptr().add(qo), qw as isize, 1), (v.as_ptr().add(ko), 1, kw as isize), one, Parallelism::None);
                        for i in 0..r {
                            let row = rows.start + i;
                            let seen = visible(cfg, seg, &(row..row + 1)).end - seg.k.start;
                            let (at, l) = (row * qw + h * hd, lse[row * cfg.heads + h]);
                            let delta = super::norm::sum(hd, |c| g[at + c] * o[at + c]);
                            for j in 0..w {
                                let x = i * w + j;
                                let pij = if j < seen { num_traits::Float::exp(p[x] - l) } else { T::default() };
                                ds[x] = pij * (ds[x] - delta) * T::of(cfg.scale());
                                p[x] = pij;
                            }
                        }
                        gemm::raw((r, hd, w), dqp.at(qo), qw as isize, T::default(), (ds.as_ptr(), w as isize, 1), (k.as_ptr().add(ko), kw as isize, 1), one, Parallelism::None);
                        gemm::raw((w, hd, r), dkp.at(ko), kw as isize, one, (ds.as_ptr(), 1, w as isize), (q.as_ptr().add(qo), qw as isize, 1), one, Parallelism::None);
                        gemm::raw((w, hd, r), dvp.at(ko), kw as isize, one, (p.as_ptr(), 1, w as isize), (g.as_ptr().add(qo), qw as isize, 1), one, Parallelism::None);
                    }
                }
            }
        });
        Ok((tensor(dq, (n, qw))?, tensor(dk, (m, kw))?, tensor(dv, (m, kw))?))
    })
}

/// Scaled scores of a block of query rows against the first `w` keys of its segment, row-major `[rows, w]`.
///
/// # Safety
/// `rows` and the keys must lie in `q` and `k`.
#[allow(clippy::too_many_arguments, reason = "the operands of one matrix product")]
unsafe fn score<T: Real>(
    cfg: Config,
    q: &[T],
    k: &[T],
    h: usize,
    rows: &Range<usize>,
    k0: usize,
    w: usize,
    out: &mut [T],
) {
    let (qw, kw, hd) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim, cfg.head_dim);
    // SAFETY: the caller's promise.
    unsafe {
        let a = q.as_ptr().add(rows.start * qw + h * hd);
        let b = k.as_ptr().add(k0 * kw + kv_head(cfg, h) * hd);
        let scale = T::of(cfg.scale());
        gemm::raw(
            (rows.len(), w, hd),
            out.as_mut_ptr(),
            w as isize,
            T::default(),
            (a, qw as isize, 1),
            (b, 1, kw as isize),
            scale,
            Parallelism::None,
        );
    }
}

/// Softmax over the first `seen` scores, zero for the rest; returns log-sum-exp.
fn softmax<T: Real>(row: &mut [T], seen: usize) -> T {
    let (live, dead) = row.split_at_mut(seen);
    dead.fill(T::default());
    let max = live.iter().copied().fold(T::neg_infinity(), num_traits::Float::max);
    let mut total = T::default();
    for v in live.iter_mut() {
        *v = num_traits::Float::exp(*v - max);
        total += *v;
    }
    let inv = T::of(1.0) / total;
    for v in live.iter_mut() {
        *v *= inv;
    }
    max + num_traits::Float::ln(total)
}

fn kv_head(cfg: Config, h: usize) -> usize {
    h / (cfg.heads / cfg.kv_heads)
}

fn blocks(rows: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = rows.end;
    rows.clone().step_by(BLOCK).map(move |s| s..(s + BLOCK).min(end))
}

/// Keys that the last of `rows` sees.
fn visible(cfg: Config, seg: &Segment, rows: &Range<usize>) -> Range<usize> {
    if cfg.causal { seg.k.start..seg.k.end - (seg.q.end - rows.end) } else { seg.k.clone() }
}

/// Small attentions are bundled, so that a task is worth its overhead.
fn min_tasks(cfg: Config, segments: &[Segment]) -> usize {
    let longest = segments.iter().map(|s| s.q.len() * s.k.len()).max().unwrap_or(1);
    (64 * 1024 / (longest * cfg.head_dim).max(1)).max(1)
}

fn check(cfg: Config, segments: &[Segment], q: &Tensor, k: &Tensor, v: &Tensor) -> Result<usize> {
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
    }
    Ok(n)
}
