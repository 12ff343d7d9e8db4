//! candle-flash-attn (FlashAttention-2, Dao 2023) for passes that no backward follows: it gives no log-sum-exp that ours could
//! go on from. bf16 on a GPU, the widths of a head that this build holds, sequences that stand one after the other.

use super::{Config, Segment, Sequences, check};
use crate::error::Result;
use candle_core::{DType, Tensor};
use std::ops::Range;

/// Widths of a head that were compiled: `ADFREEZE_FLASH_HEAD_DIMS`.
const WIDTHS: &[usize] = include!(concat!(env!("OUT_DIR"), "/flash_widths.rs"));

/// o of [`super::forward`]; none if this attention is not for candle-flash-attn.
pub(super) fn forward(
    cfg: Config,
    sequences: &Sequences,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
) -> Result<Option<Tensor>> {
    check(cfg, sequences, q, k, v)?;
    // Its rows begin at multiples of 16 bytes.
    let fits =
        |t: &&Tensor| t.device().is_cuda() && t.dtype() == DType::BF16 && t.layout().start_offset().is_multiple_of(8);
    if !WIDTHS.contains(&cfg.head_dim) || ![q, k, v].iter().all(fits) {
        return Ok(None);
    }
    let Some(ends) = sequences.ends([q.dim(0)?, k.dim(0)?], q.device())? else { return Ok(None) };
    let longest = |rows: fn(&Segment) -> &Range<usize>| sequences.iter().map(|s| rows(s).len()).max().unwrap_or(0);
    let heads = |t: &Tensor, heads: usize| t.reshape((t.dim(0)?, heads, cfg.head_dim));
    let o = candle_flash_attn::flash_attn_varlen(
        &heads(q, cfg.heads)?,
        &heads(k, cfg.kv_heads)?,
        &heads(v, cfg.kv_heads)?,
        &ends[0],
        &ends[1],
        longest(|s| &s.q),
        longest(|s| &s.k),
        cfg.scale() as f32,
        cfg.causal,
    )?;
    Ok(Some(o.reshape(q.shape())?))
}
