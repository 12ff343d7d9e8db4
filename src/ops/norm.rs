//! RMSNorm (Zhang & Sennrich 2019) and LayerNorm (Ba et al. 2016) over rows.
//!
//! Backward of y = w·x̂ with x̂ = (x − μ)·r (μ = 0 for RMSNorm, r the inverse root mean square or deviation), g = w·dy:
//! dx = r·(g − [mean(g)] − x̂·mean(g·x̂)), the bracket for LayerNorm only; dw = Σ dy·x̂, db = Σ dy.

use super::launch::{Arg, Grid, Path, empty, launch, narrow, path, wide, widen};
use super::matmul::{add_, reduce_rows};
use super::{Real, data, dims2, dispatch, rows_per_task, scratch, tensor};
use crate::bail;
use crate::error::Result;
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// Which norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Divide by the root mean square.
    Rms,
    /// Subtract the mean, divide by the standard deviation.
    Layer,
}

/// What backward needs beside x: `[N, 2]`, mean and inverse deviation of each row; f32 where x is bf16.
pub struct Stats(pub Tensor);

/// `x` `[N, D]`, `w` `[D]`, `b` `[D]` → y `[N, D]` and the rows' statistics.
pub fn forward(kind: Kind, x: &Tensor, w: &Tensor, b: Option<&Tensor>, eps: f64) -> Result<(Tensor, Stats)> {
    let (n, d) = dims2(x, "norm")?;
    check("norm", d, w, b)?;
    match path("norm", x)? {
        Path::Kernel => {
            let stats = Stats(empty(x, DType::F32, (n, 2))?);
            return Ok((run(kind, x, None, w, b, &stats, Some(eps))?, stats));
        }
        Path::Widened => {
            let (y, stats) = forward(kind, &widen(x)?, &widen(w)?, b.map(widen).transpose()?.as_ref(), eps)?;
            return Ok((narrow(&y)?, stats));
        }
        Path::Reference => {}
    }
    dispatch!(x, "norm", T => {
        let (xs, ws) = (data::<T>(x)?, data::<T>(w)?);
        let bs = b.map(data::<T>).transpose()?;
        let (xs, ws, bs): (&[T], &[T], Option<&[T]>) = (&xs, &ws, bs.as_deref());
        let mut y = scratch::<T>(n * d);
        let mut stats = scratch::<T>(n * 2);
        let rows = rows_per_task(n, d);
        y.par_chunks_mut(rows * d).zip(stats.par_chunks_mut(rows * 2)).zip(xs.par_chunks(rows * d)).for_each(
            |((y, s), x)| {
                for ((y, s), x) in y.chunks_exact_mut(d).zip(s.chunks_exact_mut(2)).zip(x.chunks_exact(d)) {
                    (s[0], s[1]) = row_stats(kind, x, T::of(eps));
                    apply(y, x, ws, bs, s[0], s[1]);
                }
            },
        );
        Ok((tensor(y, (n, d))?, Stats(tensor(stats, (n, 2))?)))
    })
}

/// `x += r` in place and the norm of the sum, in one pass: the residual stream of a transformer block. Every clone of `x`
/// sees the sum.
pub fn forward_residual_(
    kind: Kind,
    x: &Tensor,
    r: &Tensor,
    w: &Tensor,
    b: Option<&Tensor>,
    eps: f64,
) -> Result<(Tensor, Stats)> {
    let (n, d) = dims2(x, "norm")?;
    check("norm", d, w, b)?;
    if r.dims() != x.dims() {
        bail!("norm: {:?} and the residual {:?} differ in shape", x.dims(), r.dims())
    }
    if path("norm", x)? == Path::Kernel {
        let stats = Stats(empty(x, DType::F32, (n, 2))?);
        return Ok((run(kind, x, Some(r), w, b, &stats, Some(eps))?, stats));
    }
    add_(x, 1.0, r)?;
    forward(kind, x, w, b, eps)
}

/// Launches `norm_forward`: with `eps` the statistics are computed and written, without they are read. A residual is
/// added to `x` in place.
fn run(
    kind: Kind,
    x: &Tensor,
    residual: Option<&Tensor>,
    w: &Tensor,
    b: Option<&Tensor>,
    stats: &Stats,
    eps: Option<f64>,
) -> Result<Tensor> {
    let (n, d) = dims2(x, "norm")?;
    let y = empty(x, x.dtype(), (n, d))?;
    let wide = wide(d, &[Some(x), residual, Some(w), b]);
    let args = [
        Arg::In(x),
        Arg::maybe(residual),
        Arg::In(w),
        Arg::maybe(b),
        residual.map_or(Arg::Null, |_| Arg::Out(x)),
        Arg::Out(&y),
        Arg::Out(&stats.0),
        Arg::len(d)?,
        Arg::flag(kind == Kind::Layer),
        Arg::F32(eps.unwrap_or(0.0) as f32),
        Arg::flag(eps.is_none()),
        Arg::flag(wide),
    ];
    launch("norm", "norm_forward", x.dtype(), Grid::line(n, 256), &args)?;
    Ok(y)
}

fn check(op: &str, d: usize, w: &Tensor, b: Option<&Tensor>) -> Result<()> {
    if w.dims() != [d] || b.is_some_and(|b| b.dims() != [d]) {
        bail!("{op}: rows of {d} do not fit scale {:?}, shift {:?}", w.dims(), b.map(Tensor::dims))
    }
    Ok(())
}

/// The norm's output again, from x and its saved statistics: the same bits as [`forward`].
pub fn rebuild(x: &Tensor, w: &Tensor, b: Option<&Tensor>, stats: &Stats) -> Result<Tensor> {
    let (n, d) = dims2(x, "norm")?;
    check("norm", d, w, b)?;
    match path("norm", x)? {
        Path::Kernel => return run(Kind::Layer, x, None, w, b, stats, None),
        Path::Widened => {
            return narrow(&rebuild(&widen(x)?, &widen(w)?, b.map(widen).transpose()?.as_ref(), stats)?);
        }
        Path::Reference => {}
    }
    dispatch!(x, "norm", T => {
        let (xs, ws, ss) = (data::<T>(x)?, data::<T>(w)?, data::<T>(&stats.0)?);
        let bs = b.map(data::<T>).transpose()?;
        let ([xs, ws, ss], bs): ([&[T]; 3], Option<&[T]>) = ([&xs, &ws, &ss], bs.as_deref());
        let mut y = scratch::<T>(n * d);
        y.par_chunks_mut(d).enumerate().with_min_len(rows_per_task(n, d)).for_each(|(i, y)| {
            apply(y, &xs[i * d..(i + 1) * d], ws, bs, ss[2 * i], ss[2 * i + 1]);
        });
        tensor(y, (n, d))
    })
}

/// Gradients of a norm's scale and shift.
pub struct ScaleGrads {
    /// `[D]`.
    pub weight: Tensor,
    /// `[D]`.
    pub bias: Tensor,
}

/// dx `[N, D]`, and the gradients of scale and shift if `need_scale`.
pub fn backward(
    kind: Kind,
    x: &Tensor,
    w: &Tensor,
    stats: &Stats,
    dy: &Tensor,
    need_scale: bool,
) -> Result<(Tensor, Option<ScaleGrads>)> {
    let (n, d) = dims2(x, "norm backward")?;
    match path("norm backward", x)? {
        Path::Kernel => {
            let dx = run_backward(kind, x, w, stats, dy, None)?;
            return Ok((dx, need_scale.then(|| scale_grads(x, stats, dy)).transpose()?));
        }
        Path::Widened => {
            let (dx, scale) = backward(kind, &widen(x)?, &widen(w)?, stats, &widen(dy)?, need_scale)?;
            return Ok((narrow(&dx)?, scale));
        }
        Path::Reference => {}
    }
    dispatch!(x, "norm backward", T => {
        let (xs, ws, ss, gs) = (data::<T>(x)?, data::<T>(w)?, data::<T>(&stats.0)?, data::<T>(dy)?);
        let (xs, ws, ss, gs): (&[T], &[T], &[T], &[T]) = (&xs, &ws, &ss, &gs);
        let mut dx = scratch::<T>(n * d);
        dx.par_chunks_mut(d).enumerate().with_min_len(rows_per_task(n, d)).for_each(|(i, dx)| {
            let (x, g, mean, r) = (&xs[i * d..(i + 1) * d], &gs[i * d..(i + 1) * d], ss[2 * i], ss[2 * i + 1]);
            let inv_d = T::of(1.0 / d as f64);
            let along = sum(d, |k| g[k] * ws[k] * (x[k] - mean)) * r * inv_d;
            let shift = if kind == Kind::Layer { sum(d, |k| g[k] * ws[k]) * inv_d } else { T::default() };
            for k in 0..d {
                dx[k] = r * (g[k] * ws[k] - shift - (x[k] - mean) * r * along);
            }
        });
        let scale = if need_scale {
            let (mut dw, mut db) = (vec![T::default(); d], vec![T::default(); d]);
            for i in 0..n {
                let (mean, r) = (ss[2 * i], ss[2 * i + 1]);
                for k in 0..d {
                    let g = gs[i * d + k];
                    dw[k] += g * (xs[i * d + k] - mean) * r;
                    db[k] += g;
                }
            }
            Some(ScaleGrads { weight: tensor(dw, d)?, bias: tensor(db, d)? })
        } else {
            None
        };
        Ok((tensor(dx, (n, d))?, scale))
    })
}

/// [`backward`] with dx added to `sum`, the gradient that passes the norm by on the residual road.
pub fn backward_into(
    kind: Kind,
    x: &Tensor,
    w: &Tensor,
    stats: &Stats,
    dy: &Tensor,
    need_scale: bool,
    sum: &Tensor,
) -> Result<Option<ScaleGrads>> {
    if path("norm backward", x)? == Path::Kernel {
        run_backward(kind, x, w, stats, dy, Some(sum))?;
        return need_scale.then(|| scale_grads(x, stats, dy)).transpose();
    }
    let (dx, scale) = backward(kind, x, w, stats, dy, need_scale)?;
    add_(sum, 1.0, &dx)?;
    Ok(scale)
}

fn run_backward(
    kind: Kind,
    x: &Tensor,
    w: &Tensor,
    stats: &Stats,
    dy: &Tensor,
    sum: Option<&Tensor>,
) -> Result<Tensor> {
    let (n, d) = dims2(x, "norm backward")?;
    let dx = sum.cloned().map_or_else(|| empty(x, x.dtype(), (n, d)), Ok)?;
    let args = [
        Arg::In(x),
        Arg::In(w),
        Arg::In(&stats.0),
        Arg::In(dy),
        sum.map_or(Arg::Null, Arg::Out),
        Arg::Out(&dx),
        Arg::len(d)?,
        Arg::flag(kind == Kind::Layer),
        Arg::flag(wide(d, &[Some(x), Some(w), Some(dy), sum])),
    ];
    launch("norm", "norm_backward", x.dtype(), Grid::line(n, 256), &args)?;
    Ok(dx)
}

/// Launches `norm_scale`: sums over stretches of rows, which are then added in order.
fn scale_grads(x: &Tensor, stats: &Stats, dy: &Tensor) -> Result<ScaleGrads> {
    const STRETCH: usize = 128;
    let (n, d) = dims2(x, "norm backward")?;
    let stretches = n.div_ceil(STRETCH).max(1);
    let part = empty(x, DType::F32, (2 * stretches, d))?;
    let grid = Grid { grid: [d.div_ceil(32) as u32, stretches as u32, 1], block: [256, 1, 1], shared: 0 };
    let args = [Arg::In(x), Arg::In(&stats.0), Arg::In(dy), Arg::Out(&part), Arg::len(n)?, Arg::len(d)?];
    launch("norm", "norm_scale", x.dtype(), grid, &[args.as_slice(), &[Arg::len(STRETCH)?]].concat())?;
    let sums = reduce_rows(&part, 2)?;
    Ok(ScaleGrads { weight: sums.get(0)?, bias: sums.get(1)? })
}

fn row_stats<T: Real>(kind: Kind, x: &[T], eps: T) -> (T, T) {
    let (d, inv_d) = (x.len(), T::of(1.0 / x.len() as f64));
    let mean = if kind == Kind::Layer { sum(d, |k| x[k]) * inv_d } else { T::default() };
    let var = sum(d, |k| (x[k] - mean) * (x[k] - mean)) * inv_d;
    (mean, T::of(1.0) / (var + eps).sqrt())
}

fn apply<T: Real>(y: &mut [T], x: &[T], w: &[T], b: Option<&[T]>, mean: T, r: T) {
    for k in 0..y.len() {
        y[k] = (x[k] - mean) * r * w[k];
    }
    if let Some(b) = b {
        for (y, b) in y.iter_mut().zip(b) {
            *y += *b;
        }
    }
}

/// Sum over `0..n` in eight lanes: vectorises, and rounds less than one running sum.
pub(super) fn sum<T: Real>(n: usize, f: impl Fn(usize) -> T) -> T {
    const LANES: usize = 8;
    let mut acc = [T::default(); LANES];
    let whole = n / LANES * LANES;
    for i in (0..whole).step_by(LANES) {
        for (l, a) in acc.iter_mut().enumerate() {
            *a += f(i + l);
        }
    }
    let mut total = T::default();
    for i in whole..n {
        total += f(i);
    }
    for a in acc {
        total += a;
    }
    total
}
