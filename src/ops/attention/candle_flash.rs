//! candle-flash-attn (FlashAttention-2, Dao 2023) for passes that no backward follows: it gives no log-sum-exp that ours could
//! go on from. bf16 on a GPU, the widths of a head that this build holds, sequences that stand one after the other.

use super::super::launch::upload;
use super::{Config, Segment, check};
use crate::error::Result;
use candle_core::{DType, Tensor};
use std::ops::Range;

/// Widths of a head that were compiled: `ADFREEZE_FLASH_HEAD_DIMS`.
const WIDTHS: &[usize] = include!(concat!(env!("OUT_DIR"), "/flash_widths.rs"));

/// o of [`super::forward`]; none if this attention is not for candle-flash-attn.
pub(super) fn forward(cfg: Config, segments: &[Segment], q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Option<Tensor>> {
    check(cfg, segments, q, k, v)?;
    // Its rows begin at multiples of 16 bytes.
    let fits =
        |t: &&Tensor| t.device().is_cuda() && t.dtype() == DType::BF16 && t.layout().start_offset().is_multiple_of(8);
    if !WIDTHS.contains(&cfg.head_dim) || ![q, k, v].iter().all(fits) || segments.iter().any(|s| s.skip.is_some()) {
        return Ok(None);
    }
    let (n, m) = (q.dim(0)?, k.dim(0)?);
    let (Some(q_ends), Some(k_ends)) = (ends(segments, |s| &s.q, n), ends(segments, |s| &s.k, m)) else {
        return Ok(None);
    };
    let longest = |rows: fn(&Segment) -> &Range<usize>| segments.iter().map(|s| rows(s).len()).max().unwrap_or(0);
    let heads = |t: &Tensor, heads: usize| t.reshape((t.dim(0)?, heads, cfg.head_dim));
    let o = candle_flash_attn::flash_attn_varlen(
        &heads(q, cfg.heads)?,
        &heads(k, cfg.kv_heads)?,
        &heads(v, cfg.kv_heads)?,
        &upload(q.device(), &q_ends, q_ends.len())?,
        &upload(q.device(), &k_ends, k_ends.len())?,
        longest(|s| &s.q),
        longest(|s| &s.k),
        cfg.scale() as f32,
        cfg.causal,
    )?;
    Ok(Some(o.reshape(q.shape())?))
}

/// Where each segment's rows end, behind a 0, if together they are all `rows` from the first on.
fn ends(segments: &[Segment], of: impl Fn(&Segment) -> &Range<usize>, rows: usize) -> Option<Vec<u32>> {
    let mut ends = vec![0];
    let mut at = 0;
    for range in segments.iter().map(of) {
        if range.start != at {
            return None;
        }
        at = range.end;
        ends.push(u32::try_from(at).ok()?);
    }
    (at == rows && rows > 0).then_some(ends)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_sequences_without_gaps_have_ends() {
        let s = |q: Range<usize>| Segment::new(q.clone(), q);
        let q = |segments: &[Segment], rows| ends(segments, |s| &s.q, rows);
        assert_eq!(q(&[s(0..3), s(3..4)], 4), Some(vec![0, 3, 4]));
        assert_eq!(q(&[s(0..3), s(3..4)], 5), None);
        assert_eq!(q(&[s(0..3), s(4..5)], 5), None);
        assert_eq!(q(&[], 0), None);
    }
}
