//! Rotary position embedding (Su et al. 2021) in the half-split layout of HF's LLaMA, in place.
//!
//! Each head's first and second half form pairs: (a, b) → (a·cos − b·sin, b·cos + a·sin). The rotation is
//! orthogonal, so backward is the rotation by the negative angle.

use super::launch::{Arg, Grid, Path, launch, pack, path, wide};
use super::{data, dims2, dispatch, on_wide, rows_per_task, update};
use crate::bail;
use crate::error::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// Rotates queries `[N, heads·hd]` and keys `[N, kv_heads·hd]` in place by the angles whose cosines and sines are given a
/// row, `[N, hd/2]` each; they are f32 where q and k are bf16.
pub fn rotate_(q: &Tensor, k: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<()> {
    turn_both(q, k, cos, sin, 1.0)
}

/// Rotates the gradients back, in place.
pub fn rotate_back_(dq: &Tensor, dk: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<()> {
    turn_both(dq, dk, cos, sin, -1.0)
}

fn turn_both(q: &Tensor, k: &Tensor, cos: &Tensor, sin: &Tensor, sign: f64) -> Result<()> {
    let half = dims2(cos, "rope")?.1;
    for x in [q, k] {
        let (n, width) = dims2(x, "rope")?;
        if cos.dim(0)? != n || half == 0 || !width.is_multiple_of(2 * half) || sin.dims() != cos.dims() {
            bail!("rope: x {:?} does not fit cos {:?}, sin {:?}", x.dims(), cos.dims(), sin.dims())
        }
    }
    if path("rope", q)? == Path::Kernel {
        return kernel(q, k, cos, sin, sign);
    }
    turn(q, cos, sin, sign)?;
    turn(k, cos, sin, sign)
}

/// One launch for both.
fn kernel(q: &Tensor, k: &Tensor, cos: &Tensor, sin: &Tensor, sign: f64) -> Result<()> {
    let ((n, width), half) = (dims2(q, "rope")?, dims2(cos, "rope")?.1);
    let (heads, kv_heads) = (width / (2 * half), k.dim(1)? / (2 * half));
    let (v, wide) = (pack(&[Some(q)]), wide(half, &[Some(q), Some(k)]) && wide(half, &[Some(cos), Some(sin)]));
    let x = half.div_ceil(if wide { v } else { 1 }).min(64);
    let y = (heads + kv_heads).div_ceil(4).min(256 / x);
    let z = (256 / (x * y)).clamp(1, 64);
    let grid = Grid { grid: [n.div_ceil(z) as u32, 1, 1], block: [x as u32, y as u32, z as u32], shared: 0 };
    let tensors = [Arg::Out(q), Arg::Out(k), Arg::In(cos), Arg::In(sin)];
    let sizes = [Arg::len(n)?, Arg::len(heads)?, Arg::len(kv_heads)?, Arg::len(2 * half)?];
    let args = [tensors.as_slice(), &sizes, &[Arg::F32(sign as f32), Arg::flag(wide)]].concat();
    launch("rope", "rope", q.dtype(), grid, &args)
}

fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor, sign: f64) -> Result<()> {
    let ((n, width), half) = (dims2(x, "rope")?, dims2(cos, "rope")?.1);
    if path("rope", x)? == Path::Widened {
        return on_wide(x, |x| turn(x, cos, sin, sign));
    }
    dispatch!(x, "rope", T => {
        let (c, s) = (data::<T>(cos)?, data::<T>(sin)?);
        let (c, s): (&[T], &[T]) = (&c, &s);
        let sign = <T as super::Real>::of(sign);
        update::<T>(x, |x| {
            x.par_chunks_mut(width).enumerate().with_min_len(rows_per_task(n, width)).for_each(|(i, row)| {
                let (c, s) = (&c[i * half..(i + 1) * half], &s[i * half..(i + 1) * half]);
                for head in row.chunks_exact_mut(2 * half) {
                    let (a, b) = head.split_at_mut(half);
                    for k in 0..half {
                        let (u, v) = (a[k], b[k]);
                        a[k] = u * c[k] - sign * v * s[k];
                        b[k] = v * c[k] + sign * u * s[k];
                    }
                }
            });
        })
    })
}
