//! Launches of the attention kernels (`kernels/attention_forward.cu`, `kernels/attention_backward.cu`): bf16, on tensor
//! cores, without a matrix of scores.

use super::super::launch::{Arg, Grid, empty, launch};
use super::{Config, Saved, Sequences, output};
use crate::error::Result;
use candle_core::{DType, Tensor};

/// Widths of a head that there are kernels for.
const WIDTHS: [usize; 5] = [32, 64, 80, 96, 128];

/// Can the kernels compute this attention? Their rows begin at multiples of 16 bytes.
pub(super) fn fits(cfg: Config, tensors: &[&Tensor]) -> bool {
    let aligned = |t: &&Tensor| t.dtype() == DType::BF16 && t.layout().start_offset().is_multiple_of(8);
    WIDTHS.contains(&cfg.head_dim) && tensors.iter().all(aligned)
}

/// (o, lse) of [`super::forward`].
pub(super) fn forward(
    cfg: Config,
    sequences: &Sequences,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<(Tensor, Tensor)> {
    let n = q.dim(0)?;
    let o = output(q, DType::BF16, (n, cfg.heads * cfg.head_dim), sequences, |s| &s.q)?;
    let lse = output(q, DType::F32, (n, cfg.heads), sequences, |s| &s.q)?;
    let tables = sequences.tables(q.device())?;
    let (table, tiles) = (Arg::In(&tables.segments), Arg::In(&tables.forward.table));
    let tensors = [Arg::In(q), Arg::In(k), Arg::In(v), Arg::Out(&o), Arg::Out(&lse), table, tiles];
    let strides = [Arg::len(cfg.group())?, stride(q)?, stride(k)?, stride(v)?, stride(&o)?];
    let args = [tensors.as_slice(), &strides, &scalars(cfg)].concat();
    let grid = grid(tables.forward.count, cfg.heads, 640 * cfg.head_dim);
    launch("attention_forward", &format!("attention_forward_d{}", cfg.head_dim), q.dtype(), grid, &args)?;
    Ok((o, lse))
}

/// (dq, dk, dv) of [`super::backward`].
pub(super) fn backward(cfg: Config, sequences: &Sequences, s: Saved, d_o: &Tensor) -> Result<(Tensor, Tensor, Tensor)> {
    let (n, m, hd) = (s.q.dim(0)?, s.k.dim(0)?, cfg.head_dim);
    let run = |kernel: &str, grid, args: &[Arg]| {
        launch("attention_backward", &format!("attention_{kernel}_d{hd}"), s.q.dtype(), grid, args)
    };
    // Σ dO∘O of each row and head beside its log-sum-exp.
    let stats = empty(s.q, DType::F32, (n, cfg.heads * 2))?;
    let across = 1 << (hd / 8).trailing_zeros();
    let sizes = [Arg::len(n)?, Arg::len(cfg.heads)?, stride(s.o)?, stride(d_o)?];
    let args = [[Arg::In(s.o), Arg::In(d_o), Arg::In(s.lse), Arg::Out(&stats)], sizes].concat();
    run("rows", Grid::line((n * cfg.heads * across).div_ceil(256), 256), &args)?;

    let dq = output(s.q, DType::BF16, s.q.dims2()?, sequences, |s| &s.q)?;
    let dk = output(s.k, DType::BF16, (m, cfg.kv_heads * hd), sequences, |s| &s.k)?;
    let dv = output(s.v, DType::BF16, (m, cfg.kv_heads * hd), sequences, |s| &s.k)?;
    let tables = sequences.tables(s.q.device())?;
    let table = Arg::In(&tables.segments);
    let inputs = [Arg::In(s.q), Arg::In(s.k), Arg::In(s.v), Arg::In(d_o), Arg::In(&stats)];
    let strides = [stride(s.q)?, stride(s.k)?, stride(s.v)?, stride(d_o)?];

    let outputs = [Arg::Out(&dk), Arg::Out(&dv), table, Arg::In(&tables.keys.table), Arg::len(cfg.heads)?];
    let args = [inputs.as_slice(), &outputs, &strides, &[stride(&dk)?, stride(&dv)?], &scalars(cfg)].concat();
    run("keys", grid(tables.keys.count, cfg.kv_heads, 768 * hd + 1024), &args)?;

    let outputs = [Arg::Out(&dq), table, Arg::In(&tables.queries.table), Arg::len(cfg.group())?];
    let args = [inputs.as_slice(), &outputs, &strides, &[stride(&dq)?], &scalars(cfg)].concat();
    run("queries", grid(tables.queries.count, cfg.heads, 512 * hd), &args)?;
    Ok((dq, dk, dv))
}

fn grid(tiles: usize, heads: usize, shared: usize) -> Grid {
    Grid { grid: [tiles as u32, heads as u32, 1], block: [128, 1, 1], shared: shared as u32 }
}

fn stride(t: &Tensor) -> Result<Arg<'static>> {
    Arg::len(t.dim(1)?)
}

fn scalars(cfg: Config) -> [Arg<'static>; 2] {
    [Arg::F32(cfg.scale() as f32), Arg::flag(cfg.causal)]
}
