//! Attention on the CPU, in f32 or f64, by blocks of query rows: one task a sequence and head.

use super::super::{Real, Shared, data, gemm, norm, tensor};
use super::{Config, Saved, Segment};
use crate::error::Result;
use ::gemm::Parallelism;
use candle_core::Tensor;
use rayon::prelude::*;
use std::ops::Range;

/// Query rows of one block.
const BLOCK: usize = 64;

/// (o, lse) of [`super::forward`].
pub(super) fn forward<T: Real>(
    cfg: Config,
    segments: &[Segment],
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let (n, qs, ks, vs) = (q.dim(0)?, data::<T>(q)?, data::<T>(k)?, data::<T>(v)?);
    let (qs, ks, vs): (&[T], &[T], &[T]) = (&qs, &ks, &vs);
    // Rows outside every segment stay zero.
    let (mut o, mut lse) = (vec![T::default(); n * cfg.heads * cfg.head_dim], vec![T::default(); n * cfg.heads]);
    let (op, lp) = (Shared::new(&mut o), Shared::new(&mut lse));
    let tasks = cfg.heads * segments.len();
    (0..tasks).into_par_iter().with_min_len(min_tasks(cfg, segments)).for_each(|t| {
        let (seg, h) = (&segments[t / cfg.heads], t % cfg.heads);
        let mut scores = Vec::new();
        for rows in blocks(&seg.q) {
            let (r, w) = (rows.len(), seg.width(cfg.causal, &rows));
            scores.resize(r * w, T::default());
            // SAFETY: one task a (segment, head) writes that head's columns of its rows of o and lse only.
            unsafe {
                score(cfg, qs, ks, h, &rows, seg.k.start, w, &mut scores);
                for i in 0..r {
                    let seen = seg.seen(cfg.causal, rows.start + i - seg.q.start);
                    *lp.at((rows.start + i) * cfg.heads + h) = softmax(&mut scores[i * w..(i + 1) * w], seen);
                }
                let (os, kvs) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
                let vh = vs.as_ptr().add(seg.k.start * kvs + h / cfg.group() * cfg.head_dim);
                gemm::raw(
                    (r, cfg.head_dim, w),
                    op.at(rows.start * os + h * cfg.head_dim),
                    os as isize,
                    T::default(),
                    (scores.as_ptr(), w as isize, 1),
                    (vh, kvs as isize, 1),
                    T::of(1.0),
                    Parallelism::None,
                );
            }
        }
    });
    Ok((tensor(o, (n, cfg.heads * cfg.head_dim))?, tensor(lse, (n, cfg.heads))?))
}

/// (dq, dk, dv) of [`super::backward`].
pub(super) fn backward<T: Real>(
    cfg: Config,
    segments: &[Segment],
    s: Saved,
    d_o: &Tensor,
) -> Result<(Tensor, Tensor, Tensor)> {
    let (q, k, v) = (data::<T>(s.q)?, data::<T>(s.k)?, data::<T>(s.v)?);
    let (o, lse, g) = (data::<T>(s.o)?, data::<T>(s.lse)?, data::<T>(d_o)?);
    let [q, k, v, o, lse, g]: [&[T]; 6] = [&q, &k, &v, &o, &lse, &g];
    let ((n, qw), (m, kw)) = (s.q.dims2()?, s.k.dims2()?);
    let (mut dq, mut dk, mut dv) = (vec![T::default(); n * qw], vec![T::default(); m * kw], vec![T::default(); m * kw]);
    let (dqp, dkp, dvp) = (Shared::new(&mut dq), Shared::new(&mut dk), Shared::new(&mut dv));
    let tasks = cfg.kv_heads * segments.len();
    (0..tasks).into_par_iter().with_min_len(min_tasks(cfg, segments)).for_each(|t| {
        let (seg, kvh) = (&segments[t / cfg.kv_heads], t % cfg.kv_heads);
        let (mut p, mut ds) = (Vec::new(), Vec::new());
        for h in kvh * cfg.group()..(kvh + 1) * cfg.group() {
            for rows in blocks(&seg.q) {
                let (r, w) = (rows.len(), seg.width(cfg.causal, &rows));
                p.resize(r * w, T::default());
                ds.resize(r * w, T::default());
                let (hd, one, zero, alone) = (cfg.head_dim, T::of(1.0), T::default(), Parallelism::None);
                let (qo, ko, ws) = (rows.start * qw + h * hd, seg.k.start * kw + kvh * hd, w as isize);
                let (qs, ks) = (qw as isize, kw as isize);
                // SAFETY: one task a (segment, key head) writes that head's columns of dk, dv and its queries' of dq.
                unsafe {
                    let (qp, kp, vp, gp) =
                        (q.as_ptr().add(qo), k.as_ptr().add(ko), v.as_ptr().add(ko), g.as_ptr().add(qo));
                    score(cfg, q, k, h, &rows, seg.k.start, w, &mut p);
                    gemm::raw((r, w, hd), ds.as_mut_ptr(), ws, zero, (gp, qs, 1), (vp, 1, ks), one, alone);
                    for i in 0..r {
                        let row = rows.start + i;
                        let (at, l) = (row * qw + h * hd, lse[row * cfg.heads + h]);
                        let delta = norm::sum(hd, |c| g[at + c] * o[at + c]);
                        let seen = seg.seen(cfg.causal, row - seg.q.start);
                        let (p, ds) = (&mut p[i * w..(i + 1) * w], &mut ds[i * w..(i + 1) * w]);
                        slope(p, ds, seen, l, delta, T::of(cfg.scale()));
                    }
                    gemm::raw((r, hd, w), dqp.at(qo), qs, zero, (ds.as_ptr(), ws, 1), (kp, ks, 1), one, alone);
                    gemm::raw((w, hd, r), dkp.at(ko), ks, one, (ds.as_ptr(), 1, ws), (qp, qs, 1), one, alone);
                    gemm::raw((w, hd, r), dvp.at(ko), ks, one, (p.as_ptr(), 1, ws), (gp, qs, 1), one, alone);
                }
            }
        }
    });
    Ok((tensor(dq, (n, qw))?, tensor(dk, (m, kw))?, tensor(dv, (m, kw))?))
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
        let b = k.as_ptr().add(k0 * kw + h / cfg.group() * hd);
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

/// Softmax over the scores of the keys that are `seen`, zero for the rest; returns log-sum-exp.
fn softmax<T: Real>(row: &mut [T], seen: [Range<usize>; 2]) -> T {
    let [near, far] = seen;
    row[near.end..far.start].fill(T::default());
    row[far.end..].fill(T::default());
    let live = [near, far];
    let mut max = T::neg_infinity();
    for r in &live {
        max = row[r.clone()].iter().copied().fold(max, num_traits::Float::max);
    }
    if max == T::neg_infinity() {
        return max;
    }
    let mut total = T::default();
    for r in &live {
        for v in &mut row[r.clone()] {
            *v = num_traits::Float::exp(*v - max);
            total += *v;
        }
    }
    let inv = T::of(1.0) / total;
    for r in live {
        row[r].iter_mut().for_each(|v| *v *= inv);
    }
    max + num_traits::Float::ln(total)
}

/// A row's scores become P, its dO·Vᵀ becomes dS; both are zero at keys that are not `seen`.
fn slope<T: Real>(p: &mut [T], ds: &mut [T], seen: [Range<usize>; 2], lse: T, delta: T, scale: T) {
    let [near, far] = seen;
    for gap in [near.end..far.start, far.end..p.len()] {
        p[gap.clone()].fill(T::default());
        ds[gap].fill(T::default());
    }
    for r in [near, far] {
        for (p, ds) in p[r.clone()].iter_mut().zip(&mut ds[r]) {
            *p = num_traits::Float::exp(*p - lse);
            *ds = *p * (*ds - delta) * scale;
        }
    }
}

fn blocks(rows: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let end = rows.end;
    rows.clone().step_by(BLOCK).map(move |s| s..(s + BLOCK).min(end))
}

/// Small attentions are bundled, so that a task is worth its overhead.
fn min_tasks(cfg: Config, segments: &[Segment]) -> usize {
    let longest = segments.iter().map(|s| s.q.len() * s.k.len()).max().unwrap_or(1);
    (64 * 1024 / (longest * cfg.head_dim).max(1)).max(1)
}
