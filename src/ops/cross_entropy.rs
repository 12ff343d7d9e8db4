//! Linear layer and softmax cross-entropy in one, by chunks of rows: the logits of all rows never stand in memory
//! (as in Liger's fused linear cross-entropy).
//!
//! For row x with target t: z = W·x, log p = z_t − logsumexp(z), d log p / dx = Wᵀ·(e_t − softmax(z)).

use super::launch::{Arg, Grid, Path, download, empty, host, launch, path, upload, wide};
use super::matmul::{Mat, matmul, matmul_add, matmul_wide};
use super::{Real, dims2, dispatch, tensor, update};
use crate::bail;
use crate::error::Result;
use candle_core::{DType, Tensor};
use rayon::prelude::*;

/// Rows of one chunk.
const CHUNK: usize = 256;

/// What the head says about its M rows. It stays on the device until somebody asks.
pub struct LogProbs {
    rows: usize,
    /// Log-probabilities and most probable tokens of a chunk of rows each.
    chunks: Vec<(Tensor, Tensor)>,
    /// d log p / dx, `[M, D]`, if asked for.
    pub dx: Option<Tensor>,
}

impl LogProbs {
    /// Rows, one a target.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Log-probability of each row's target. On a GPU this waits for everything before it.
    pub fn logps(&self) -> Result<Vec<f64>> {
        let mut out = Vec::with_capacity(self.rows);
        for (logps, _) in &self.chunks {
            out.extend(download::<f64>(logps)?);
        }
        Ok(out)
    }

    /// Most probable token of each row.
    pub fn argmax(&self) -> Result<Vec<u32>> {
        let mut out = Vec::with_capacity(self.rows);
        for (_, argmax) in &self.chunks {
            out.extend(host(argmax)?.to_vec1::<u32>()?);
        }
        Ok(out)
    }
}

/// `x` `[M, D]`, `w` `[V, D]`, one target a row.
pub fn forward(x: &Tensor, w: &Tensor, targets: &[u32], need_dx: bool) -> Result<LogProbs> {
    let (m, d) = dims2(x, "cross-entropy")?;
    check(m, w, targets)?;
    let mut chunks = Vec::with_capacity(m.div_ceil(CHUNK));
    let dx = if need_dx { Some(Tensor::zeros((m, d), x.dtype(), x.device())?) } else { None };
    for start in (0..m).step_by(CHUNK) {
        let rows = CHUNK.min(m - start);
        let logits = matmul_wide(Mat::N(&x.narrow(0, start, rows)?), Mat::T(w))?;
        let t = &targets[start..start + rows];
        chunks.push(softmax_minus(&logits, t, need_dx)?);
        if let Some(dx) = &dx {
            #[allow(clippy::disallowed_methods, reason = "backward is written out here, not left to a graph")]
            dx.slice_set(&matmul(Mat::N(&logits.to_dtype(x.dtype())?), Mat::N(w))?, 0, start)?;
        }
    }
    Ok(LogProbs { rows: m, chunks, dx })
}

/// `dw += Σ coefᵢ · (e_tᵢ − softmax(W·xᵢ))·xᵢᵀ`: the gradient of Σ coefᵢ·log pᵢ for a trained head.
pub fn add_weight_grad(dw: &Tensor, x: &Tensor, w: &Tensor, targets: &[u32], coefs: &[f64]) -> Result<()> {
    let (m, _) = dims2(x, "cross-entropy")?;
    check(m, w, targets)?;
    if coefs.len() != m {
        bail!("cross-entropy: {m} rows, {} coefficients", coefs.len())
    }
    for start in (0..m).step_by(CHUNK) {
        let rows = CHUNK.min(m - start);
        let xs = x.narrow(0, start, rows)?;
        let logits = matmul_wide(Mat::N(&xs), Mat::T(w))?;
        weighted(&logits, &targets[start..start + rows], &coefs[start..start + rows])?;
        matmul_add(dw, 1.0, Mat::T(&logits.to_dtype(x.dtype())?), Mat::N(&xs))?;
    }
    Ok(())
}

/// Log-probabilities and arg-max of rows of logits; overwrites them with e_t − softmax if `overwrite`.
fn softmax_minus(logits: &Tensor, targets: &[u32], overwrite: bool) -> Result<(Tensor, Tensor)> {
    let (_, v) = dims2(logits, "cross-entropy")?;
    if path("cross-entropy", logits)? == Path::Kernel {
        let n = targets.len();
        let (logps, argmax) = (empty(logits, DType::F32, n)?, empty(logits, DType::U32, n)?);
        kernel(logits, targets, None, Some([&logps, &argmax]), overwrite)?;
        return Ok((logps, argmax));
    }
    dispatch!(logits, "cross-entropy", T => {
        let mut out = vec![(0f64, 0u32); targets.len()];
        update::<T>(logits, |z| {
            z.par_chunks_mut(v).zip(targets.par_iter()).zip(out.par_iter_mut()).for_each(|((z, &t), out)| {
                let (mut best, mut max) = (0, <T as num_traits::Float>::neg_infinity());
                for (j, &x) in z.iter().enumerate() {
                    if x > max {
                        (best, max) = (j, x);
                    }
                }
                let mut total = 0f64;
                let zt = z[t as usize];
                for x in z.iter_mut() {
                    let e = num_traits::Float::exp(*x - max);
                    total += e.f64();
                    if overwrite {
                        *x = e;
                    }
                }
                *out = ((zt - max).f64() - total.ln(), best as u32);
                if overwrite {
                    let inv = T::of(-1.0 / total);
                    for x in z.iter_mut() {
                        *x *= inv;
                    }
                    z[t as usize] += T::of(1.0);
                }
            });
        })?;
        let (logps, argmax): (Vec<f64>, Vec<u32>) = out.into_iter().unzip();
        let n = targets.len();
        Ok((tensor(logps, n)?, tensor(argmax, n)?))
    })
}

/// Overwrites rows of logits with coefᵢ·(e_t − softmax).
fn weighted(logits: &Tensor, targets: &[u32], coefs: &[f64]) -> Result<()> {
    let (n, v) = dims2(logits, "cross-entropy")?;
    if path("cross-entropy", logits)? == Path::Kernel {
        let coefs: Vec<f32> = coefs.iter().map(|c| *c as f32).collect();
        return kernel(logits, targets, Some(&upload(logits.device(), &coefs, n)?), None, true);
    }
    softmax_minus(logits, targets, true)?;
    dispatch!(logits, "cross-entropy", T => {
        update::<T>(logits, |z| {
            z.par_chunks_mut(v).zip(coefs).for_each(|(z, c)| z.iter_mut().for_each(|x| *x *= T::of(*c)));
        })
    })
}

/// `out`: log-probabilities and arg-max.
fn kernel(
    logits: &Tensor,
    targets: &[u32],
    coefs: Option<&Tensor>,
    out: Option<[&Tensor; 2]>,
    overwrite: bool,
) -> Result<()> {
    let (n, v) = dims2(logits, "cross-entropy")?;
    let targets = upload(logits.device(), targets, n)?;
    let inputs = [if overwrite { Arg::Out(logits) } else { Arg::In(logits) }, Arg::In(&targets), Arg::maybe(coefs)];
    let outputs = out.map_or([Arg::Null; 2], |out| out.map(Arg::Out));
    let rest = [Arg::len(v)?, Arg::flag(overwrite), Arg::flag(wide(v, &[Some(logits)]))];
    let args = [inputs.as_slice(), &outputs, &rest].concat();
    launch("cross_entropy", "cross_entropy", logits.dtype(), Grid::line(n, 512), &args)
}

fn check(m: usize, w: &Tensor, targets: &[u32]) -> Result<()> {
    let (v, _) = dims2(w, "cross-entropy head")?;
    if targets.len() != m {
        bail!("cross-entropy: {m} rows, {} targets", targets.len())
    }
    if let Some(t) = targets.iter().find(|t| **t as usize >= v) {
        bail!("cross-entropy: target {t} is outside the vocabulary of {v}")
    }
    Ok(())
}

/// Rows of plain logits `[M, V]`, for generation and tests; f32 where x is bf16.
pub fn logits(x: &Tensor, w: &Tensor) -> Result<Tensor> {
    matmul_wide(Mat::N(x), Mat::T(w))
}
