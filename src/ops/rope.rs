//! Rotary position embedding (Su et al. 2021) in the half-split layout of HF's LLaMA, in place.
//!
//! Each head's first and second half form pairs: (a, b) → (a·cos − b·sin, b·cos + a·sin). The rotation is
//! orthogonal, so backward is the rotation by the negative angle.

use super::{data, dims2, dispatch, rows_per_task, update};
use crate::bail;
use crate::error::Result;
use candle_core::Tensor;
use rayon::prelude::*;

/// Rotates `x` `[N, heads·hd]` in place by the angles whose cosines and sines are given a row, `[N, hd/2]` each.
pub fn rotate_(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<()> {
    turn(x, cos, sin, 1.0)
}

/// Rotates a gradient back, in place.
pub fn rotate_back_(dx: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<()> {
    turn(dx, cos, sin, -1.0)
}

fn turn(x: &Tensor, cos: &Tensor, sin: &Tensor, sign: f64) -> Result<()> {
    let ((n, width), (rows, half)) = (dims2(x, "rope")?, dims2(cos, "rope")?);
    if rows != n || half == 0 || width % (2 * half) != 0 || sin.dims() != cos.dims() {
        bail!("rope: x {:?} does not fit cos {:?}, sin {:?}", x.dims(), cos.dims(), sin.dims())
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
