//! Elementwise activations and SwiGLU (Shazeer 2020), with their derivatives.
//!
//! gelu: x·Φ(x); gelu_tanh: Hendrycks & Gimpel's tanh form; quick_gelu: x·σ(1.702x); silu: x·σ(x).

use super::launch::{Arg, Grid, Path, empty, launch, narrow, pack, path, wide, widen};
use super::{Real, Shared, data, dispatch, rows_per_task, scratch, tensor};
use crate::error::Result;
use crate::spec::Activation;
use candle_core::Tensor;
use rayon::prelude::*;

/// `act(x)`, any shape.
pub fn forward(act: Activation, x: &Tensor) -> Result<Tensor> {
    match path("activation", x)? {
        Path::Kernel => kernel(act, x, None),
        Path::Widened => narrow(&forward(act, &widen(x)?)?),
        Path::Reference => map2(x, x, move |x, _| value(act, x), move |x, _| value(act, x)),
    }
}

/// `dy · act′(x)`.
pub fn backward(act: Activation, x: &Tensor, dy: &Tensor) -> Result<Tensor> {
    match path("activation", x)? {
        Path::Kernel => kernel(act, x, Some(dy)),
        Path::Widened => narrow(&backward(act, &widen(x)?, &widen(dy)?)?),
        Path::Reference => map2(x, dy, move |x, g| g * slope(act, x), move |x, g| g * slope(act, x)),
    }
}

/// `silu(gate)·up`.
pub fn swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    match path("swiglu", gate)? {
        Path::Kernel => kernel_swiglu(gate, up),
        Path::Widened => narrow(&swiglu(&widen(gate)?, &widen(up)?)?),
        Path::Reference => map2(gate, up, |g, u| value(Activation::Silu, g) * u, |g, u| value(Activation::Silu, g) * u),
    }
}

/// What [`swiglu_backward`] gives, each of gate's shape.
pub struct SwigluGrads {
    /// With respect to gate.
    pub gate: Tensor,
    /// With respect to up.
    pub up: Tensor,
    /// `silu(gate)·up` once more, the bits of [`swiglu`], if asked for.
    pub y: Option<Tensor>,
}

/// Gradients with respect to gate and up, and y again if `rebuild`: all from one pass over gate and up.
pub fn swiglu_backward(gate: &Tensor, up: &Tensor, dy: &Tensor, rebuild: bool) -> Result<SwigluGrads> {
    match path("swiglu", gate)? {
        Path::Kernel => return kernel_swiglu_backward(gate, up, dy, rebuild),
        Path::Widened => {
            let g = swiglu_backward(&widen(gate)?, &widen(up)?, &widen(dy)?, rebuild)?;
            let y = g.y.as_ref().map(narrow).transpose()?;
            return Ok(SwigluGrads { gate: narrow(&g.gate)?, up: narrow(&g.up)?, y });
        }
        Path::Reference => {}
    }
    dispatch!(gate, "swiglu", T => {
        let (gs, us, ds) = (data::<T>(gate)?, data::<T>(up)?, data::<T>(dy)?);
        let (gs, us, ds): (&[T], &[T], &[T]) = (&gs, &us, &ds);
        let (mut dg, mut du) = (scratch::<T>(gs.len()), scratch::<T>(gs.len()));
        let mut y = scratch::<T>(if rebuild { gs.len() } else { 0 });
        let (chunk, yp) = (rows_per_task(gs.len(), 1), Shared::new(&mut y));
        dg.par_chunks_mut(chunk).zip(du.par_chunks_mut(chunk)).enumerate().for_each(|(i, (dg, du))| {
            let at = i * chunk;
            for k in 0..dg.len() {
                let (g, u, d) = (gs[at + k], us[at + k], ds[at + k]);
                let s = sigmoid(g);
                du[k] = d * g * s;
                dg[k] = d * u * s * (T::of(1.0) + g * (T::of(1.0) - s));
                if rebuild {
                    // SAFETY: y is as long as gate then, and each element is one task's.
                    unsafe { *yp.at(at + k) = g * s * u };
                }
            }
        });
        let y = if rebuild { Some(tensor(y, gate.dims())?) } else { None };
        Ok(SwigluGrads { gate: tensor(dg, gate.dims())?, up: tensor(du, gate.dims())?, y })
    })
}

fn map2(
    a: &Tensor,
    b: &Tensor,
    f32_fn: impl Fn(f32, f32) -> f32 + Sync,
    f64_fn: impl Fn(f64, f64) -> f64 + Sync,
) -> Result<Tensor> {
    fn run<T: Real>(a: &Tensor, b: &Tensor, f: impl Fn(T, T) -> T + Sync) -> Result<Tensor> {
        let (xs, ys) = (data::<T>(a)?, data::<T>(b)?);
        let (xs, ys): (&[T], &[T]) = (&xs, &ys);
        let mut out = scratch::<T>(xs.len());
        let chunk = rows_per_task(xs.len(), 1);
        out.par_chunks_mut(chunk).zip(xs.par_chunks(chunk)).zip(ys.par_chunks(chunk)).for_each(|((o, x), y)| {
            for k in 0..o.len() {
                o[k] = f(x[k], y[k]);
            }
        });
        tensor(out, a.dims())
    }
    match a.dtype() {
        candle_core::DType::F32 => run::<f32>(a, b, f32_fn),
        _ => run::<f64>(a, b, f64_fn),
    }
}

/// `activation_forward`, or `activation_backward` if there is a gradient.
fn kernel(act: Activation, x: &Tensor, dy: Option<&Tensor>) -> Result<Tensor> {
    let (n, y) = (x.elem_count(), empty(x, x.dtype(), x.shape())?);
    let kind = Arg::I32(match act {
        Activation::Gelu => 0,
        Activation::GeluTanh => 1,
        Activation::QuickGelu => 2,
        Activation::Silu => 3,
        Activation::Relu => 4,
    });
    let wide = wide(n, &[Some(x), dy]);
    let each = pack(&[Some(x)]);
    match dy {
        None => {
            let args = [Arg::In(x), Arg::Out(&y), Arg::size(n), kind, Arg::flag(wide)];
            launch("activation", "activation_forward", x.dtype(), Grid::flat(n, 4 * each), &args)?;
        }
        Some(dy) => {
            let args = [Arg::In(x), Arg::In(dy), Arg::Out(&y), Arg::size(n), kind, Arg::flag(wide)];
            launch("activation", "activation_backward", x.dtype(), Grid::flat(n, 2 * each), &args)?;
        }
    }
    Ok(y)
}

fn kernel_swiglu(gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let (n, y) = (gate.elem_count(), empty(gate, gate.dtype(), gate.shape())?);
    let wide = wide(n, &[Some(gate), Some(up)]);
    let args = [Arg::In(gate), Arg::In(up), Arg::Out(&y), Arg::size(n), Arg::flag(wide)];
    launch("activation", "swiglu_forward", gate.dtype(), Grid::flat(n, 2 * pack(&[Some(gate)])), &args)?;
    Ok(y)
}

fn kernel_swiglu_backward(gate: &Tensor, up: &Tensor, dy: &Tensor, rebuild: bool) -> Result<SwigluGrads> {
    let (n, out) = (gate.elem_count(), || empty(gate, gate.dtype(), gate.shape()));
    let (dgate, dup, y) = (out()?, out()?, rebuild.then(out).transpose()?);
    let wide = wide(n, &[Some(gate), Some(up), Some(dy)]);
    let inputs = [Arg::In(gate), Arg::In(up), Arg::In(dy)];
    let outputs =
        [Arg::Out(&dgate), Arg::Out(&dup), y.as_ref().map_or(Arg::Null, Arg::Out), Arg::size(n), Arg::flag(wide)];
    let grid = Grid::flat(n, 2 * pack(&[Some(gate)]));
    launch("activation", "swiglu_backward", gate.dtype(), grid, &[inputs.as_slice(), &outputs].concat())?;
    Ok(SwigluGrads { gate: dgate, up: dup, y })
}

fn sigmoid<T: Real>(x: T) -> T {
    T::of(1.0) / (T::of(1.0) + num_traits::Float::exp(-x))
}

/// √(2/π) and the cubic coefficient of gelu_tanh.
const TANH: (f64, f64) = (0.797_884_560_802_865_4, 0.044_715);
const QUICK: f64 = 1.702;

fn value<T: Real>(act: Activation, x: T) -> T {
    let half = T::of(0.5);
    match act {
        Activation::Gelu => half * x * (T::of(1.0) + (x * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf()),
        Activation::GeluTanh => {
            let u = T::of(TANH.0) * (x + T::of(TANH.1) * x * x * x);
            half * x * (T::of(1.0) + num_traits::Float::tanh(u))
        }
        Activation::QuickGelu => x * sigmoid(T::of(QUICK) * x),
        Activation::Silu => x * sigmoid(x),
        Activation::Relu => {
            if x > T::default() {
                x
            } else {
                T::default()
            }
        }
    }
}

fn slope<T: Real>(act: Activation, x: T) -> T {
    let (half, one) = (T::of(0.5), T::of(1.0));
    match act {
        Activation::Gelu => {
            let phi = num_traits::Float::exp(-half * x * x) * T::of(1.0 / (2.0 * std::f64::consts::PI).sqrt());
            half * (one + (x * T::of(std::f64::consts::FRAC_1_SQRT_2)).erf()) + x * phi
        }
        Activation::GeluTanh => {
            let t = num_traits::Float::tanh(T::of(TANH.0) * (x + T::of(TANH.1) * x * x * x));
            half * (one + t) + half * x * (one - t * t) * T::of(TANH.0) * (one + T::of(3.0 * TANH.1) * x * x)
        }
        Activation::QuickGelu => {
            let s = sigmoid(T::of(QUICK) * x);
            s * (one + T::of(QUICK) * x * (one - s))
        }
        Activation::Silu => {
            let s = sigmoid(x);
            s * (one + x * (one - s))
        }
        Activation::Relu => {
            if x > T::default() {
                one
            } else {
                T::default()
            }
        }
    }
}
