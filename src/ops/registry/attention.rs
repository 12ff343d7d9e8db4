//! Cases of attention.

use super::super::attention::{self, Config, Saved, Segment, Sequences, Skip};
use super::super::tensor;
use super::Case;
use crate::error::Result;
use candle_core::{D, Tensor};
use std::ops::Range;

/// Sequences in a row: queries and keys of each.
type Spans = &'static [(usize, usize)];

const ONE: Spans = &[(1, 1)];
const ODD: Spans = &[(5, 5), (1, 1), (9, 9)];
const LONG: Spans = &[(70, 70), (130, 130)];
/// Keys of earlier queries come from a cache.
const CACHED: Spans = &[(3, 11), (1, 6)];
/// More than one block of queries in every way that attention is computed.
const BLOCKS: Spans = &[(7, 7), (300, 310)];

pub(super) fn cases() -> Vec<Case> {
    let mut out = Vec::new();
    let mut add = |spans: Spans, heads, kv_heads, head_dim, causal| {
        let cfg = Config { heads, kv_heads, head_dim, causal };
        out.push(case(cfg, &format!("{spans:?}"), packed(spans)));
    };
    for (heads, kv_heads, head_dim) in [(1, 1, 4), (4, 2, 8), (6, 2, 5)] {
        for spans in [ONE, ODD, LONG, CACHED] {
            add(spans, heads, kv_heads, head_dim, true);
            add(spans, heads, kv_heads, head_dim, false);
        }
    }
    // Widths of kernels on tensor cores, then others.
    for (width, spans) in [(32, ODD), (64, LONG), (64, CACHED), (80, ODD), (96, CACHED), (128, ODD)] {
        add(spans, 2, 1, width, true);
        add(spans, 3, 3, width, false);
    }
    for (width, spans) in [(40, ODD), (40, CACHED), (72, LONG), (72, CACHED), (256, ODD)] {
        add(spans, 4, 2, width, true);
        add(spans, 3, 3, width, false);
    }
    add(BLOCKS, 2, 1, 40, true);
    add(BLOCKS, 1, 1, 72, false);
    for head_dim in [8, 40, 64] {
        out.extend(masked_cases(head_dim));
    }
    for (width, spans) in [(32, CACHED), (64, LONG), (96, ODD), (128, CACHED)] {
        for (kv_heads, causal) in [(1, true), (2, false)] {
            let cfg = Config { heads: 2, kv_heads, head_dim: width, causal };
            out.push(without_gradient(case(cfg, &format!("{spans:?}"), packed(spans)), cfg, packed(spans)));
        }
    }
    out
}

fn packed(spans: Spans) -> Vec<Segment> {
    let (mut n, mut m) = (0, 0);
    let next = |(q, k): &(usize, usize)| {
        let s = Segment::new(n..n + q, m..m + k);
        (n, m) = (n + q, m + k);
        s
    };
    spans.iter().map(next).collect()
}

/// Skipped keys, queries that see nothing, and rows of no sequence.
fn masked_cases(head_dim: usize) -> Vec<Case> {
    let cfg = |causal| Config { heads: 2, kv_heads: 1, head_dim, causal };
    let skipping = |q: Range<usize>, k: Range<usize>, from, keys| Segment { q, k, skip: Some(Skip { from, keys }) };
    let answers = vec![Segment::two_answers(0, 5, 9, 4), Segment::new(18..25, 18..25)];
    vec![
        case(cfg(true), "two answers", answers),
        case(cfg(true), "two long answers", vec![Segment::two_answers(0, 70, 131, 90)]),
        case(cfg(true), "a skip in a cache", vec![skipping(0..9, 0..30, 4, 5..21)]),
        case(cfg(false), "a skip for all", vec![skipping(0..6, 0..75, 0, 3..70)]),
        case(cfg(false), "queries that see nothing", vec![skipping(0..70, 0..12, 3, 0..12)]),
        case(cfg(false), "a block of queries that sees nothing", vec![skipping(0..200, 0..12, 128, 0..12)]),
        case(cfg(false), "blocks of keys that no query sees", vec![skipping(0..6, 0..140, 0, 0..128)]),
        case(
            cfg(true),
            "gaps",
            vec![Segment::new(2..6, 1..8), Segment::new(9..10, 11..13), Segment::new(10..10, 0..0)],
        ),
    ]
}

/// One row of queries and of keys behind the last sequence belongs to none where there are gaps before it.
fn case(cfg: Config, name: &str, segments: Vec<Segment>) -> Case {
    let covered: usize = segments.iter().map(|s| s.q.len()).sum();
    let end = |rows: fn(&Segment) -> &Range<usize>| segments.iter().map(|s| rows(s).end).max().unwrap_or(0);
    let spare = usize::from(covered < end(|s| &s.q));
    let (n, m) = (end(|s| &s.q) + spare, end(|s| &s.k) + spare);
    let (qw, kw) = (cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim);
    let sequences = Sequences::from(segments.clone());
    let again = sequences.clone();
    Case {
        op: "attention",
        label: format!(
            "{name} heads {}/{} of {}{}",
            cfg.heads,
            cfg.kv_heads,
            cfg.head_dim,
            if cfg.causal { " causal" } else { "" }
        ),
        inputs: vec![vec![n, qw], vec![m, kw], vec![m, kw]],
        forward: Box::new(move |t| Ok(attention::forward(cfg, &sequences, &t[0], &t[1], &t[2])?.0)),
        backward: Box::new(move |t, dy| {
            let (o, lse) = attention::forward(cfg, &again, &t[0], &t[1], &t[2])?;
            let saved = Saved { q: &t[0], k: &t[1], v: &t[2], o: &o, lse: &lse };
            let (dq, dk, dv) = attention::backward(cfg, &again, saved, dy)?;
            Ok(vec![Some(dq), Some(dk), Some(dv)])
        }),
        oracle: Box::new(move |t| composed(cfg, &segments, &t[0], &t[1], &t[2])),
    }
}

/// The same where no backward pass follows: with the feature `flash-attn` other kernels compute it.
fn without_gradient(case: Case, cfg: Config, segments: Vec<Segment>) -> Case {
    let sequences = Sequences::from(segments);
    let forward = move |t: &[Tensor]| Ok(attention::forward_kept(cfg, &sequences, &t[0], &t[1], &t[2], false)?.0);
    let none = |t: &[Tensor], _: &Tensor| Ok(vec![None; t.len()]);
    Case { op: "attention_unrecorded", forward: Box::new(forward), backward: Box::new(none), ..case }
}

/// Attention with all scores materialised, one sequence and head after the other.
fn composed(cfg: Config, segments: &[Segment], q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (n, width) = q.dims2()?;
    let none = |rows: usize| Tensor::zeros((rows, width), q.dtype(), q.device());
    let (mut rows, mut at) = (Vec::new(), 0);
    for s in segments.iter().filter(|s| !s.q.is_empty()) {
        rows.push(none(s.q.start - at)?);
        let heads = (0..cfg.heads).map(|h| composed_head(cfg, s, h, q, k, v)).collect::<Result<Vec<_>>>()?;
        rows.push(Tensor::cat(&heads, 1)?);
        at = s.q.end;
    }
    rows.push(none(n - at)?);
    rows.retain(|r| r.elem_count() > 0);
    Ok(Tensor::cat(&rows, 0)?)
}

fn composed_head(cfg: Config, s: &Segment, h: usize, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let (hd, kvh) = (cfg.head_dim, h / (cfg.heads / cfg.kv_heads));
    let part = |x: &Tensor, r: &Range<usize>, h: usize| -> Result<Tensor> {
        Ok(x.narrow(0, r.start, r.len())?.narrow(1, h * hd, hd)?.contiguous()?)
    };
    let (q, k, v) = (part(q, &s.q, h)?, part(k, &s.k, kvh)?, part(v, &s.k, kvh)?);
    let (l, w) = (s.q.len(), s.k.len());
    let sees = |i: usize, j: usize| {
        let skips = s.skip.as_ref().is_some_and(|skip| i >= skip.from && skip.keys.contains(&j));
        !skips && (!cfg.causal || j + l <= i + w)
    };
    let mask: Vec<f64> = (0..l * w).map(|at| f64::from(u8::from(sees(at / w, at % w)))).collect();
    let mask = tensor(mask, (l, w))?.to_dtype(q.dtype())?;
    // Far below all other scores, and exactly zero in the end also where a query sees nothing.
    let scores = ((q.matmul(&k.t()?)? / (hd as f64).sqrt())? + ((&mask - 1.0)? * 1e4)?)?;
    Ok((candle_nn::ops::softmax(&scores, D::Minus1)? * mask)?.matmul(&v)?)
}
