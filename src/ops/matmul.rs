//! Matrix products with transposes and in-place accumulation (BLAS `gemm`: C = α·A·B + C), on the `gemm` crate.

use super::gemm::{self, Size, Strided};
use super::launch::{
    Arg, Grid, Path, empty, launch, launch_mixed, launch_plain, narrow, pack, path, upload, wide, widen,
};
use super::{Real, data, dims2, dispatch, on_wide, scratch, tensor, update};
use crate::bail;
use crate::error::Result;
use ::gemm::Parallelism;
use candle_core::{DType, Tensor};

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
    fn strided(&self) -> Result<Strided<'_>> {
        let whole = Strided::rows(self.tensor())?;
        Ok(if matches!(self, Mat::N(_)) { whole } else { whole.t() })
    }
    /// (row stride, column stride) in elements.
    fn strides(&self) -> Result<(isize, isize)> {
        let c = dims2(self.tensor(), "matmul")?.1 as isize;
        Ok(if matches!(self, Mat::N(_)) { (c, 1) } else { (1, c) })
    }
}

/// `A·B`, `[m, k] × [k, n] → [m, n]`, in the operands' type; bf16 is accumulated in f32.
pub fn matmul(a: Mat, b: Mat) -> Result<Tensor> {
    let ((m, k), (k2, n)) = (a.dims("matmul")?, b.dims("matmul")?);
    check_inner(k, k2, (m, n))?;
    if let Some((a, b)) = widened(a, b)? {
        return narrow(&matmul(a.mat(), b.mat())?);
    }
    if !a.tensor().device().is_cpu() {
        let out = empty(a.tensor(), a.tensor().dtype(), (m, n))?;
        whole(&out, 1.0, a, b, 0.0)?;
        return Ok(out);
    }
    dispatch!(a.tensor(), "matmul", T => {
        let mut out = scratch::<T>(m * n);
        product::<T>(&mut out, T::default(), a, b, T::of(1.0))?;
        tensor(out, (m, n))
    })
}

/// [`matmul`] whose result is f32 where the operands are bf16: the sum as it was accumulated.
pub fn matmul_wide(a: Mat, b: Mat) -> Result<Tensor> {
    if let Some((a, b)) = widened(a, b)? {
        return matmul(a.mat(), b.mat());
    }
    if a.tensor().device().is_cpu() {
        return matmul(a, b);
    }
    let ((m, k), (k2, n)) = (a.dims("matmul")?, b.dims("matmul")?);
    check_inner(k, k2, (m, n))?;
    let out = empty(a.tensor(), DType::F32, (m, n))?;
    whole(&out, 1.0, a, b, 0.0)?;
    Ok(out)
}

/// `C += α·A·B` in place; every clone of `c` sees it. C may be f32 where A and B are bf16.
pub fn matmul_add(c: &Tensor, alpha: f64, a: Mat, b: Mat) -> Result<()> {
    let ((m, k), (k2, n)) = (a.dims("matmul_add")?, b.dims("matmul_add")?);
    check_inner(k, k2, (m, n))?;
    if dims2(c, "matmul_add")? != (m, n) {
        bail!("matmul_add: the sum has shape {:?}, the product [{m}, {n}]", c.dims())
    }
    if !c.device().is_cpu() {
        return whole(c, alpha, a, b, 1.0);
    }
    if let Some((a, b)) = widened(a, b)? {
        return on_wide(c, |c| matmul_add(c, alpha, a.mat(), b.mat()));
    }
    dispatch!(c, "matmul_add", T => {
        let mut result = Ok(());
        update::<T>(c, |out| result = product::<T>(out, T::of(1.0), a, b, T::of(alpha)))?;
        result
    })
}

/// `keep·C + α·A·B` of whole matrices, by [`gemm::gemm`].
fn whole(c: &Tensor, alpha: f64, a: Mat, b: Mat, keep: f64) -> Result<()> {
    let (m, k) = a.dims("matmul")?;
    let n = b.dims("matmul")?.1;
    let size = Size { m, n, k, count: 1 };
    gemm::gemm(size, alpha, a.strided()?, b.strided()?, keep, Strided::rows(c)?)
}

/// An operand of its own.
struct Owned(Tensor, bool);

impl Owned {
    fn mat(&self) -> Mat<'_> {
        if self.1 { Mat::T(&self.0) } else { Mat::N(&self.0) }
    }
}

/// Both operands in f32, if they are bf16 on the CPU (whose products are not among our kernels).
fn widened(a: Mat, b: Mat) -> Result<Option<(Owned, Owned)>> {
    let own = |m: Mat| Ok::<_, crate::error::Error>(Owned(widen(m.tensor())?, matches!(m, Mat::T(_))));
    let half = a.tensor().dtype() == DType::BF16 && a.tensor().device().is_cpu();
    half.then(|| Ok((own(a)?, own(b)?))).transpose()
}

/// `x·Wᵀ + b`: `x` `[N, in]`, `w` `[out, in]`, `b` `[out]` → `[N, out]`.
pub fn linear(x: &Tensor, w: &Tensor, b: Option<&Tensor>) -> Result<Tensor> {
    let Some(b) = b else { return matmul(Mat::N(x), Mat::T(w)) };
    let ((m, k), (n, k2)) = (dims2(x, "linear")?, dims2(w, "linear")?);
    check_inner(k, k2, (m, n))?;
    match path("linear", x)? {
        Path::Kernel => {
            let y = kernel_fill_rows(b, m)?;
            matmul_add(&y, 1.0, Mat::N(x), Mat::T(w))?;
            return Ok(y);
        }
        Path::Widened => return narrow(&linear(&widen(x)?, &widen(w)?, Some(&widen(b)?))?),
        Path::Reference => {}
    }
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

/// Sum of the rows, `[N, D] → [D]`: the gradient of a bias; f32 where x is bf16.
pub fn sum_rows(x: &Tensor) -> Result<Tensor> {
    let (_, d) = dims2(x, "sum_rows")?;
    match path("sum_rows", x)? {
        Path::Kernel => return kernel_sum_rows(x),
        Path::Widened => return sum_rows(&widen(x)?),
        Path::Reference => {}
    }
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

/// `C += α·x`, elementwise, in place. C may be f32 where x is bf16.
pub fn add_(c: &Tensor, alpha: f64, x: &Tensor) -> Result<()> {
    if c.dims() != x.dims() {
        bail!("add: shapes {:?} and {:?}", c.dims(), x.dims())
    }
    match path("add", x)? {
        Path::Kernel => return kernel_add(c, alpha, x),
        Path::Widened => return on_wide(c, |c| add_(c, alpha, &widen(x)?)),
        Path::Reference => {}
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
    match path("scale_rows", x)? {
        Path::Kernel => return kernel_scale_rows(x, s),
        Path::Widened => return narrow(&scale_rows(&widen(x)?, s)?),
        Path::Reference => {}
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

/// `[m, D]`, every row `b`.
fn kernel_fill_rows(b: &Tensor, m: usize) -> Result<Tensor> {
    let d = b.elem_count();
    let out = empty(b, b.dtype(), (m, d))?;
    let args = [Arg::Out(&out), Arg::In(b), Arg::len(m)?, Arg::len(d)?, Arg::flag(wide(d, &[Some(b)]))];
    launch("elementwise", "fill_rows", b.dtype(), Grid::rows(m, d, pack(&[Some(b)])), &args)?;
    Ok(out)
}

/// Sums of stretches of rows, which are then added in order: no atomics, always the same sum.
fn kernel_sum_rows(x: &Tensor) -> Result<Tensor> {
    const STRETCH: usize = 128;
    let (n, d) = dims2(x, "sum_rows")?;
    let stretches = n.div_ceil(STRETCH).max(1);
    let (part, wide) = (empty(x, DType::F32, (stretches, d))?, wide(d, &[Some(x)]));
    let columns = 32 * if wide { pack(&[Some(x)]) } else { 1 };
    let grid = Grid { grid: [d.div_ceil(columns) as u32, stretches as u32, 1], block: [256, 1, 1], shared: 0 };
    let args = [Arg::In(x), Arg::Out(&part), Arg::len(n)?, Arg::len(d)?, Arg::len(STRETCH)?, Arg::flag(wide)];
    launch("elementwise", "sum_rows", x.dtype(), grid, &args)?;
    Ok(reduce_rows(&part, 1)?.squeeze(0)?)
}

/// `part` `[k·P, D]` → `[k, D]`: every P rows added in order.
pub(super) fn reduce_rows(part: &Tensor, k: usize) -> Result<Tensor> {
    let (n, d) = dims2(part, "reduce_rows")?;
    let out = empty(part, DType::F32, (k, d))?;
    let grid = Grid { grid: [d.div_ceil(256) as u32, k as u32, 1], block: [256, 1, 1], shared: 0 };
    let args = [Arg::In(part), Arg::Out(&out), Arg::len(n / k)?, Arg::len(d)?];
    launch_plain("elementwise", "reduce_rows", grid, &args)?;
    Ok(out)
}

fn kernel_add(c: &Tensor, alpha: f64, x: &Tensor) -> Result<()> {
    let (n, both) = (c.elem_count(), [Some(c), Some(x)]);
    let args = [Arg::Out(c), Arg::In(x), Arg::size(n), Arg::F32(alpha as f32), Arg::flag(wide(n, &both))];
    launch_mixed("elementwise", "add", [c.dtype(), x.dtype()], Grid::flat(n, 2 * pack(&both)), &args)
}

fn kernel_scale_rows(x: &Tensor, s: &[f64]) -> Result<Tensor> {
    let ((n, d), y) = (dims2(x, "scale_rows")?, empty(x, x.dtype(), x.shape())?);
    let s: Vec<f32> = s.iter().map(|s| *s as f32).collect();
    let s = upload(x.device(), &s, n)?;
    let args = [Arg::In(x), Arg::In(&s), Arg::Out(&y), Arg::len(n)?, Arg::len(d)?, Arg::flag(wide(d, &[Some(x)]))];
    launch("elementwise", "scale_rows", x.dtype(), Grid::rows(n, d, pack(&[Some(x)])), &args)?;
    Ok(y)
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
        gemm::raw(
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
