//! Matrix products with transposes and in-place accumulation (BLAS `gemm`: C = α·A·B + C), on the `gemm` crate.

use super::{Real, data, dims2, dispatch, scratch, tensor, update};
use crate::bail;
use crate::error::Result;
use candle_core::Tensor;
use gemm::Parallelism;

/// A matrix operand, as it stands or transposed.
#[derive(Clone, Copy)]
pub enum Mat<'a> {
    /// As it stands.
    N(&'a Tensor),
    /// Transposed.
    T(&'a Tensor),
}

impl Mat<'_> {
    fn tensor(&self) -> &Tensor {
        match self {
            Mat::N(t) | Mat::T(t) => t,
        }
    }
    fn dims(&self, what: &str) -> Result<(usize, usize)> {
        let (r, c) = dims2(self.tensor(), what)?;
        Ok(if matches!(self, Mat::N(_)) { (r, c) } else { (c, r) })
    }
    /// (row stride, column stride) in elements.
    fn strides(&self) -> Result<(isize, isize)> {
        let c = dims2(self.tensor(), "matmul")?.1 as isize;
        Ok(if matches!(self, Mat::N(_)) { (c, 1) } else { (1, c) })
    }
}

/// `A·B`, `[m, k] × [k, n] → [m, n]`.
pub fn matmul(a: Mat, b: Mat) -> Result<Tensor> {
    let ((m, k), (k2, n)) = (a.dims("matmul")?, b.dims("matmul")?);
    check_inner(k, k2, (m, n))?;
    dispatch!(a.tensor(), "matmul", T => {
        let mut out = scratch::<T>(m * n);
        product::<T>(&mut out, T::default(), a, b, T::of(1.0))?;
        tensor(out, (m, n))
    })
}

/// `C += α·A·B` in place; every clone of `c` sees it.
pub fn matmul_add(c: &Tensor, alpha: f64, a: Mat, b: Mat) -> Result<()> {
    let ((m, k), (k2, n)) = (a.dims("matmul_add")?, b.dims("matmul_add")?);
    check_inner(k, k2, (m, n))?;
    if dims2(c, "matmul_add")? != (m, n) {
        bail!("matmul_add: the sum has shape {:?}, the product [{m}, {n}]", c.dims())
    }
    dispatch!(c, "matmul_add", T => {
        let mut result = Ok(());
        update::<T>(c, |out| result = product::<T>(out, T::of(1.0), a, b, T::of(alpha)))?;
        result
    })
}

/// `x·Wᵀ + b`: `x` `[N, in]`, `w` `[out, in]`, `b` `[out]` → `[N, out]`.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let Some(b) = b else { return matmul(Mat::N(x), Mat::T(w)) };
    let ((m, k), (n, k2)) = (dims2(x, "linear")?, dims2(w, "linear")?);
    check_inner(k, k2, (m, n))?;
    dispatch!(x, "linear", T => {
        let bias = data::<T>(b)?;
        let mut out = Vec::with_capacity(m * n);
        for _ in 0..m {
            out.extend_from_slice(&bias);
        }
        product::<T>(&mut out, T::of(1.0), Mat::N(x), Mat::T(w), T::of(1.0))?;
        tensor(out, (m, n))
    })
}

/// Sum of the rows, `[N, D] → [D]`: the gradient of a bias.
pub fn sum_rows(x: &Tensor) -> Result<Tensor> {
    let (_, d) = dims2(x, "sum_rows")?;
    dispatch!(x, "sum_rows", T => {
        let x = data::<T>(x)?;
        let mut out = vec![T::default(); d];
        for row in x.chunks_exact(d.max(1)) {
            for (o, v) in out.iter_mut().zip(row) {
                *o += *v;
            }
        }
        tensor(out, d)
    })
}

/// `C += α·x`, elementwise, in place.
pub fn add_(c: &Tensor, alpha: f64, x: &Tensor) -> Result<()> {
    if c.dims() != x.dims() {
        bail!("add: shapes {:?} and {:?}", c.dims(), x.dims())
    }
    dispatch!(c, "add", T => {
        let x = data::<T>(x)?;
        let alpha = T::of(alpha);
        update::<T>(c, |c| zip_mut(c, &x, |c, x| *c += alpha * *x))
    })
}

/// `x·s` with one factor a row: `[N, D]`, `s` of length N.
pub fn scale_rows(x: &Tensor, s: &[f64]) -> Result<Tensor> {
    let (n, d) = dims2(x, "scale_rows")?;
    if s.len() != n {
        bail!("scale_rows: {n} rows, {} factors", s.len())
    }
    dispatch!(x, "scale_rows", T => {
        let x = data::<T>(x)?;
        let mut out = Vec::with_capacity(n * d);
        for (row, s) in x.chunks_exact(d.max(1)).zip(s) {
            let s = T::of(*s);
            out.extend(row.iter().map(|v| *v * s));
        }
        tensor(out, (n, d))
    })
}

/// Applies `f` to pairs of elements, on all threads.
pub(super) fn zip_mut<T: Real>(a: &mut [T], b: &[T], f: impl Fn(&mut T, &T) + Sync) {
    use rayon::prelude::*;
    let chunk = super::rows_per_task(a.len(), 1);
    a.par_chunks_mut(chunk).zip(b.par_chunks(chunk)).for_each(|(a, b)| {
        for (a, b) in a.iter_mut().zip(b) {
            f(a, b);
        }
    });
}

fn check_inner(k: usize, k2: usize, (m, n): (usize, usize)) -> Result<()> {
    if k != k2 {
        bail!("matmul: inner sizes {k} and {k2} differ ([{m}, {k}] × [{k2}, {n}])")
    }
    Ok(())
}

/// `out = keep·out + alpha·A·B`; `keep` 0 overwrites.
fn product<T: Real>(out: &mut [T], keep: T, a: Mat, b: Mat, alpha: T) -> Result<()> {
    let ((m, k), n) = (a.dims("matmul")?, b.dims("matmul")?.1);
    let ((ars, acs), (brs, bcs)) = (a.strides()?, b.strides()?);
    let (a, b) = (data::<T>(a.tensor())?, data::<T>(b.tensor())?);
    // SAFETY: out has m·n elements, a m·k and b k·n, each reached through the strides of its own layout.
    unsafe {
        gemm_raw(
            (m, n, k),
            out.as_mut_ptr(),
            n as isize,
            keep,
            (a.as_ptr(), ars, acs),
            (b.as_ptr(), brs, bcs),
            alpha,
            Parallelism::Rayon(0),
        );
    }
    Ok(())
}

/// `C = keep·C + alpha·A·B` on raw strided matrices; C is row-major with row stride `crs`, A and B are (pointer, row stride, column stride).
///
/// # Safety
/// All elements reached through (m, n, k) and the strides must lie in live buffers, C's in no other task's hands.
#[allow(clippy::too_many_arguments, reason = "the operands of one matrix product")]
pub(super) unsafe fn gemm_raw<T: Real>(
    (m, n, k): (usize, usize, usize),
    c: *mut T,
    crs: isize,
    keep: T,
    (a, ars, acs): (*const T, isize, isize),
    (b, brs, bcs): (*const T, isize, isize),
    alpha: T,
    parallelism: Parallelism,
) {
    let read = keep != T::default();
    // SAFETY: the caller's promise.
    unsafe {
        gemm::gemm(m, n, k, c, 1, crs, read, a, acs, ars, b, bcs, brs, keep, alpha, false, false, false, parallelism)
    }
}
