//! Linear layer and softmax cross-entropy in one, by chunks of rows: the logits of all rows never stand in memory
//! (as in Liger's fused linear cross-entropy).
//!
//! For row x with target t: z = W·x, log p = z_t − logsumexp(z), d log p / dx = Wᵀ·(e_t − softmax(z)).

use super::launch::{Arg, Grid, Path, download, empty, launch, path, upload, wide};
use super::matmul::{Mat, matmul, matmul_add, matmul_wide, scale_rows};
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
            out.extend(argmax.to_vec1::<u32>()?);
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
    for start in (0..m).step_by(CHUNK) {
        let rows = CHUNK.min(m - start);
        let xs = x.narrow(0, start, rows)?;
        let logits = matmul_wide(Mat::N(&xs), Mat::T(w))?;
        softmax_minus(&logits, &targets[start..start + rows], true)?;
        let dz = scale_rows(&logits, &coefs[start..start + rows])?.to_dtype(x.dtype())?;
        matmul_add(dw, 1.0, Mat::T(&dz), Mat::N(&xs))?;
    }
    Ok(())
}

/// Log-probabilities and arg-max of rows of logits; overwrites them with e_t − softmax if `overwrite`.
fn softmax_minus(logits: &Tensor, targets: &[u32], overwrite: bool) -> Result<(Tensor, Tensor)> {
    let (_, v) = dims2(logits, "cross-entropy")?;
    if path("cross-entropy", logits)? == Path::Kernel {
        return kernel(logits, targets, overwrite);
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

fn kernel(logits: &Tensor, targets: &[u32], overwrite: bool) -> Result<(Tensor, Tensor)> {
    let (n, v) = dims2(logits, "cross-entropy")?;
    let targets = upload(logits, targets, n)?;
    let (logps, argmax) = (empty(logits, DType::F32, n)?, empty(logits, DType::U32, n)?);
    let inputs = [if overwrite { Arg::Out(logits) } else { Arg::In(logits) }, Arg::In(&targets), Arg::Null];
    let outputs = [Arg::Out(&logps), Arg::Out(&argmax), Arg::Null, Arg::len(v)?, Arg::size(v)];
    let flags = [Arg::flag(overwrite), Arg::flag(wide(v, &[Some(logits)]))];
    let args = [inputs.as_slice(), &outputs, &flags].concat();
    launch("cross_entropy", "cross_entropy", logits.dtype(), Grid::line(n, 512), &args)?;
    Ok((logps, argmax))
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
