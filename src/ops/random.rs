//! Random tensors and masks from a counter (Philox 4×32-10): the same key gives the same numbers whatever ran before,
//! on any number of threads, and after a resume.

use super::launch::{Arg, Grid, Path, empty, launch, narrow, pack, path, wide, widen};
use super::philox::philox4x32;
use super::{data, dispatch, rows_per_task, scratch, tensor};
use crate::error::Result;
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// A stream of random numbers, named by what it is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key {
    key: [u32; 2],
    high: [u32; 2],
}

impl Key {
    /// A stream for `what` under a user's seed.
    pub fn new(seed: u64, what: &str) -> Self {
        let h = fnv(what);
        Self { key: [seed as u32, (seed >> 32) as u32], high: [h as u32, (h >> 32) as u32] }
    }

    /// A stream for a part of this one.
    pub fn child(self, what: &str) -> Self {
        let h = fnv(what);
        let [a, b, ..] = philox4x32(self.key, [self.high[0], self.high[1], h as u32, (h >> 32) as u32]);
        Self { key: self.key, high: [a, b] }
    }

    /// A stream for the n-th part.
    pub fn index(self, n: u64) -> Self {
        let [a, b, ..] = philox4x32(self.key, [self.high[0] ^ 0x9e37_79b9, self.high[1], n as u32, (n >> 32) as u32]);
        Self { key: self.key, high: [a, b] }
    }

    /// Four random words at counter `i`.
    pub fn words(self, i: u64) -> [u32; 4] {
        philox4x32(self.key, [i as u32, (i >> 32) as u32, self.high[0], self.high[1]])
    }

    /// A uniform number in [0, 1) at counter `i`.
    pub fn uniform(self, i: u64) -> f64 {
        unit(self.words(i)[0])
    }
}

impl Key {
    /// A key that stands for this stream, for noise with counters of its own.
    pub(super) fn pair(self) -> [u32; 2] {
        let [a, b, ..] = self.words(0);
        [a, b]
    }

    /// Key, counter's high half and the words below which dropout zeroes, for a kernel that draws the mask itself.
    pub(super) fn stream(self, p: f64) -> (u64, u64, u32) {
        let pair = |[low, high]: [u32; 2]| u64::from(low) | u64::from(high) << 32;
        (pair(self.key), pair(self.high), limit(p))
    }
}

/// Random words below this zero an element with probability `p`.
fn limit(p: f64) -> u32 {
    (p * 2f64.powi(32)).min(f64::from(u32::MAX)) as u32
}

/// FNV-1a: names to counters.
fn fnv(s: &str) -> u64 {
    s.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0000_0100_0000_01b3))
}

fn unit(w: u32) -> f64 {
    f64::from(w >> 8) / f64::from(1u32 << 24)
}

/// Uniform in [−bound, bound).
pub fn uniform(key: Key, shape: &[usize], bound: f64, dtype: DType) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let v: Vec<f64> =
        (0..n.div_ceil(4) as u64).flat_map(|i| key.words(i).map(|w| (2.0 * unit(w) - 1.0) * bound)).take(n).collect();
    Ok(tensor(v, shape)?.to_dtype(dtype)?)
}

/// Normal with mean 0 and the given deviation (Box–Muller).
pub fn normal(key: Key, shape: &[usize], std: f64, dtype: DType) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let v: Vec<f64> = (0..n.div_ceil(4) as u64)
        .flat_map(|i| {
            let w = key.words(i).map(unit);
            let pair = |u: f64, a: f64| {
                let (r, t) = ((-2.0 * (1.0 - u).ln()).sqrt() * std, 2.0 * std::f64::consts::PI * a);
                [r * t.cos(), r * t.sin()]
            };
            let ([a, b], [c, d]) = (pair(w[0], w[1]), pair(w[2], w[3]));
            [a, b, c, d]
        })
        .take(n)
        .collect();
    Ok(tensor(v, shape)?.to_dtype(dtype)?)
}

/// Inverted dropout: each element is zeroed with probability `p`, the rest scaled by 1/(1 − p). Applying the same key
/// to a gradient is the backward pass.
pub fn dropout(key: Key, x: &Tensor, p: f64) -> Result<Tensor> {
    let limit = limit(p);
    match path("dropout", x)? {
        Path::Kernel => return kernel_dropout(key, x, limit, p),
        Path::Widened => return narrow(&dropout(key, &widen(x)?, p)?),
        Path::Reference => {}
    }
    dispatch!(x, "dropout", T => {
        let xs = data::<T>(x)?;
        let xs: &[T] = &xs;
        let keep = <T as super::Real>::of(1.0 / (1.0 - p));
        let mut out = scratch::<T>(xs.len());
        let chunk = rows_per_task(xs.len(), 4).next_multiple_of(4);
        out.par_chunks_mut(chunk).enumerate().for_each(|(c, out)| {
            for (q, four) in out.chunks_mut(4).enumerate() {
                let at = c * chunk + q * 4;
                let words = key.words(at as u64 / 4);
                for (k, o) in four.iter_mut().enumerate() {
                    *o = if words[k] < limit { T::default() } else { xs[at + k] * keep };
                }
            }
        });
        tensor(out, x.dims())
    })
}

fn kernel_dropout(key: Key, x: &Tensor, limit: u32, p: f64) -> Result<Tensor> {
    let (n, y) = (x.elem_count(), empty(x, x.dtype(), x.shape())?);
    let [k, h] = [key.key, key.high];
    let mut args = vec![Arg::In(x), Arg::Out(&y), Arg::size(n)];
    args.extend([k[0], k[1], h[0], h[1], limit].map(Arg::U32));
    args.extend([Arg::F32((1.0 / (1.0 - p)) as f32), Arg::flag(wide(n, &[Some(x)]))]);
    launch("elementwise", "dropout", x.dtype(), Grid::flat(n, 2 * pack(&[Some(x)])), &args)?;
    Ok(y)
}
