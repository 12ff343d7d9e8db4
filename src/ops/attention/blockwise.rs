//! Attention by blocks of query rows: for all heads at once, products of strided matrices (`ops::gemm`), and
//! between them the kernels of `kernels/attention_blockwise.cu`. For any width of a head, in f32 whatever the operands'
//! type; and the measure of the faster kernels, which round P and dS to bf16.
//!
//! Forward, for each block: S = scale·QKᵀ, P = softmax(S), O = PV. Backward: S again, G = dO·Vᵀ, P = exp(S − L),
//! dS = P∘(G − rowsum(P∘G))·scale, dQ = dS·K, dK += dSᵀQ, dV += PᵀdO. As O = PV, rowsum(P∘G) is the rowsum(dO∘O) of
//! FlashAttention, without O and its rounding. The sums over blocks and grouped heads run in one order: no atomics.

use super::super::gemm::{Size, Strided, gemm};
use super::super::launch::{Arg, Grid, Path, empty, launch_plain, narrow, path, widen};
use super::{Config, Saved, Segment, check, output};
use crate::bail;
use crate::error::Result;
use candle_core::{DType, Tensor};
use std::ops::Range;

/// Scores of a block, over all heads, at most: 256 MiB. Backward holds two such buffers.
const SCORES: usize = 64 << 20;
/// Query rows of a block at most where it is causal: the more, the more products of hidden keys.
const CAUSAL_ROWS: usize = 256;

/// (o, lse) of [`super::forward`].
pub fn forward(cfg: Config, segments: &[Segment], q: &Tensor, k: &Tensor, v: &Tensor) -> Result<(Tensor, Tensor)> {
    check(cfg, segments, q, k, v)?;
    let (n, dtype) = (on_kernels(q)?, q.dtype());
    let [q, k, v] = [widen(q)?, widen(k)?, widen(v)?];
    let o = output(&q, DType::F32, (n, cfg.heads * cfg.head_dim), segments, |s| &s.q)?;
    let lse = output(&q, DType::F32, (n, cfg.heads), segments, |s| &s.q)?;
    let blocks = blocks(cfg, segments);
    let scores = buffer(&q, &blocks)?;
    for b in &blocks {
        b.each_member(|g| {
            gemm(b.size(b.rows(), b.w, cfg.head_dim), cfg.scale(), b.q(&q, g), b.k(&k).t(), 0.0, b.s(&scores, g))
        })?;
        b.launch("attention_softmax", &[Arg::Out(&scores), Arg::Out(&lse)], &[])?;
        b.each_member(|g| gemm(b.size(b.rows(), cfg.head_dim, b.w), 1.0, b.s(&scores, g), b.k(&v), 0.0, b.q(&o, g)))?;
    }
    Ok((if dtype == DType::BF16 { narrow(&o)? } else { o }, lse))
}

/// (dq, dk, dv) of [`super::backward`]; the saved output is not read.
pub fn backward(cfg: Config, segments: &[Segment], s: Saved, d_o: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    check(cfg, segments, s.q, s.k, s.v)?;
    on_kernels(s.q)?;
    let [q, k, v, d_o] = [widen(s.q)?, widen(s.k)?, widen(s.v)?, widen(d_o)?];
    let dq = output(&q, DType::F32, q.dims2()?, segments, |s| &s.q)?;
    let (dk, dv) = (k.zeros_like()?, v.zeros_like()?);
    let blocks = blocks(cfg, segments);
    let (p, ds) = (buffer(&q, &blocks)?, buffer(&q, &blocks)?);
    for b in &blocks {
        let (r, hd, w) = (b.rows(), cfg.head_dim, b.w);
        b.each_member(|g| {
            gemm(b.size(r, w, hd), cfg.scale(), b.q(&q, g), b.k(&k).t(), 0.0, b.s(&p, g))?;
            gemm(b.size(r, w, hd), 1.0, b.q(&d_o, g), b.k(&v).t(), 0.0, b.s(&ds, g))
        })?;
        let tensors = [Arg::Out(&p), Arg::Out(&ds), Arg::In(s.lse)];
        b.launch("attention_softmax_backward", &tensors, &[Arg::F32(cfg.scale() as f32)])?;
        b.each_member(|g| {
            gemm(b.size(r, hd, w), 1.0, b.s(&ds, g), b.k(&k), 0.0, b.q(&dq, g))?;
            gemm(b.size(w, hd, r), 1.0, b.s(&ds, g).t(), b.q(&q, g), 1.0, b.k(&dk))?;
            gemm(b.size(w, hd, r), 1.0, b.s(&p, g).t(), b.q(&d_o, g), 1.0, b.k(&dv))
        })?;
    }
    let out = |x: Tensor| if s.q.dtype() == DType::BF16 { narrow(&x) } else { Ok(x) };
    Ok((out(dq)?, out(dk)?, out(dv)?))
}

/// Rows of Q, if kernels compute on its device and in its type.
fn on_kernels(q: &Tensor) -> Result<usize> {
    match path("attention by blocks", q)? {
        Path::Kernel => Ok(q.dim(0)?),
        _ => bail!("attention by blocks: nothing here runs kernels for {:?}", q.dtype()),
    }
}

/// Query rows of one sequence, and the keys that they see some of.
struct Block<'a> {
    cfg: Config,
    segment: &'a Segment,
    q: Range<usize>,
    /// Keys from the segment's first on.
    w: usize,
}

fn blocks(cfg: Config, segments: &[Segment]) -> Vec<Block<'_>> {
    let mut blocks = Vec::new();
    for segment in segments.iter().filter(|s| !s.k.is_empty()) {
        let fit = SCORES / (cfg.heads * stride(segment.k.len()));
        let rows = fit.clamp(1, if cfg.causal { CAUSAL_ROWS } else { segment.q.len().max(1) });
        for start in segment.q.clone().step_by(rows) {
            let q = start..(start + rows).min(segment.q.end);
            let w = segment.width(cfg.causal, &q);
            blocks.push(Block { cfg, segment, q, w });
        }
    }
    blocks
}

/// From one row of scores to the next: rows begin at multiples of 16 bytes.
fn stride(w: usize) -> usize {
    w.next_multiple_of(4)
}

/// Room for the scores of the largest block.
fn buffer(like: &Tensor, blocks: &[Block]) -> Result<Tensor> {
    let size = |b: &Block| b.cfg.heads * b.rows() * stride(b.w);
    empty(like, DType::F32, blocks.iter().map(size).max().unwrap_or(0))
}

impl Block<'_> {
    fn rows(&self) -> usize {
        self.q.len()
    }

    /// A product for every key head.
    fn size(&self, m: usize, n: usize, k: usize) -> Size {
        Size { m, n, k, count: self.cfg.kv_heads }
    }

    /// One product for every key head with its g-th query head, g = 0, 1, …
    fn each_member(&self, f: impl FnMut(usize) -> Result<()>) -> Result<()> {
        (0..self.cfg.group()).try_for_each(f)
    }

    /// The g-th query heads' columns of the block's rows in a tensor of Q's shape.
    fn q<'a>(&self, tensor: &'a Tensor, g: usize) -> Strided<'a> {
        let (hd, row) = (self.cfg.head_dim, self.cfg.heads * self.cfg.head_dim);
        Strided { tensor, start: self.q.start * row + g * hd, row, column: 1, next: self.cfg.group() * hd }
    }

    /// The heads' columns of the keys' rows in a tensor of K's shape.
    fn k<'a>(&self, tensor: &'a Tensor) -> Strided<'a> {
        let (hd, row) = (self.cfg.head_dim, self.cfg.kv_heads * self.cfg.head_dim);
        Strided { tensor, start: self.segment.k.start * row, row, column: 1, next: hd }
    }

    /// The g-th query heads' scores in a buffer `[heads, rows, stride]`.
    fn s<'a>(&self, tensor: &'a Tensor, g: usize) -> Strided<'a> {
        let row = stride(self.w);
        let one = self.rows() * row;
        Strided { tensor, start: g * one, row, column: 1, next: self.cfg.group() * one }
    }

    /// Launches a kernel with a warp for each row of scores.
    fn launch(&self, kernel: &str, tensors: &[Arg], scalars: &[Arg]) -> Result<()> {
        let (s, skip) = (self.segment, self.segment.skip.clone());
        let (from, keys) = skip.map_or((0, 0..0), |skip| (skip.from, skip.keys));
        let (q_len, k_len) = (s.q.len(), s.k.len());
        let lengths = [
            self.cfg.heads,
            self.rows(),
            stride(self.w),
            self.q.start,
            self.q.start - s.q.start,
            k_len,
            if self.cfg.causal { k_len - q_len } else { k_len },
            from,
            keys.start,
            keys.end,
        ];
        let lengths = lengths.into_iter().map(Arg::len).collect::<Result<Vec<_>>>()?;
        let grid = Grid::line((self.cfg.heads * self.rows()).div_ceil(8), 256);
        launch_plain("attention_blockwise", kernel, grid, &[tensors, &lengths, scalars].concat())
    }
}
