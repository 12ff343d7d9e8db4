//! Many products of strided matrices in one call, C = keep·C + α·A·B for each: on a GPU by cuBLAS, on the CPU by the `gemm`
//! crate. [`super::matmul`] has the products of whole matrices.

use super::{Real, data, dispatch, update};
use crate::bail;
use crate::error::Result;
use ::gemm::Parallelism;
use candle_core::Tensor;

/// C is m × n, A m × k, B k × n; `count` such products.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Size {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub count: usize,
}

/// Matrices in a contiguous tensor: element (i, j) of the b-th stands at `start + b·next + i·row + j·column`, counted in
/// elements from the tensor's first. One of `row` and `column` is 1; `next` 0 takes one matrix for all products.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strided<'a> {
    pub tensor: &'a Tensor,
    pub start: usize,
    pub row: usize,
    pub column: usize,
    pub next: usize,
}

impl<'a> Strided<'a> {
    /// One row-major matrix that fills its tensor, `[rows, columns]`.
    pub(crate) fn rows(tensor: &'a Tensor) -> Result<Self> {
        let (_, d) = super::dims2(tensor, "gemm")?;
        Ok(Self { tensor, start: 0, row: d, column: 1, next: 0 })
    }

    /// The transposed of what this is.
    pub(crate) fn t(self) -> Self {
        Self { row: self.column, column: self.row, ..self }
    }

    /// Do `count` matrices of `rows` × `columns` lie in the tensor?
    fn check(&self, name: &str, rows: usize, columns: usize, count: usize) -> Result<()> {
        let last = |n: usize, stride: usize| n.saturating_sub(1) * stride;
        let end = self.start + last(count, self.next) + last(rows, self.row) + last(columns, self.column);
        let total = self.tensor.elem_count();
        if (rows * columns * count > 0 && end >= total) || !self.tensor.is_contiguous() {
            bail!("gemm: {count} matrices {name} of {rows} × {columns} reach element {end} of {total}: {self:?}")
        }
        if self.row != 1 && self.column != 1 {
            bail!("gemm: {name} has strides {} and {}; one must be 1", self.row, self.column)
        }
        Ok(())
    }
}

/// `keep·C + α·A·B` into C, `keep` 0 overwrites. A and B of one type, f32 or f64 on the CPU, f32 or bf16 on a GPU; C of
/// that type, or f32 with bf16 operands. C's matrices must not overlap, and its storage must not be A's or B's.
pub(crate) fn gemm(s: Size, alpha: f64, a: Strided, b: Strided, keep: f64, c: Strided) -> Result<()> {
    a.check("A", s.m, s.k, s.count)?;
    b.check("B", s.k, s.n, s.count)?;
    c.check("C", s.m, s.n, s.count)?;
    if s.m * s.n * s.count == 0 {
        return Ok(());
    }
    if c.column != 1 {
        bail!("gemm: C is row-major")
    }
    #[cfg(feature = "cuda")]
    if let candle_core::Device::Cuda(device) = c.tensor.device() {
        return super::cuda::gemm(device, s, alpha, a, b, keep, c);
    }
    dispatch!(c.tensor, "gemm", T => {
        let (at, bt) = (data::<T>(a.tensor)?, data::<T>(b.tensor)?);
        let (at, bt): (&[T], &[T]) = (&at, &bt);
        update::<T>(c.tensor, |ct| {
            for i in 0..s.count {
                let (ap, bp) = (a.start + i * a.next, b.start + i * b.next);
                // SAFETY: `check` has found every element that the strides reach in its tensor.
                unsafe {
                    raw(
                        (s.m, s.n, s.k),
                        ct.as_mut_ptr().add(c.start + i * c.next),
                        c.row as isize,
                        T::of(keep),
                        (at.as_ptr().add(ap), a.row as isize, a.column as isize),
                        (bt.as_ptr().add(bp), b.row as isize, b.column as isize),
                        T::of(alpha),
                        Parallelism::Rayon(0),
                    );
                }
            }
        })
    })
}

/// `C = keep·C + alpha·A·B` on raw strided matrices; C is row-major with row stride `crs`, A and B are (pointer, row stride, column stride).
///
/// # Safety
/// All elements reached through (m, n, k) and the strides must lie in live buffers, C's in no other task's hands.
#[allow(clippy::too_many_arguments, reason = "the operands of one matrix product")]
pub(super) unsafe fn raw<T: Real>(
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
        ::gemm::gemm(m, n, k, c, 1, crs, read, a, acs, ars, b, bcs, brs, keep, alpha, false, false, false, parallelism)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    #[test]
    fn strided_products_agree_with_loops() {
        // Heads of width 2 side by side in rows of 6: S_h = Q_h·K_hᵀ for 3 heads at once.
        let q: Vec<f64> = (0..24).map(|i| f64::from(i * 7 % 11) - 4.0).collect();
        let k: Vec<f64> = (0..18).map(|i| f64::from(i * 5 % 13) - 6.0).collect();
        let (qt, kt) = (Tensor::new(q.clone(), &Device::Cpu).unwrap(), Tensor::new(k.clone(), &Device::Cpu).unwrap());
        let c = Tensor::ones(3 * 4 * 3, candle_core::DType::F64, &Device::Cpu).unwrap();
        let head = |tensor, row| Strided { tensor, start: 0, row, column: 1, next: 2 };
        let size = Size { m: 4, n: 3, k: 2, count: 3 };
        let sum = Strided { tensor: &c, start: 0, row: 3, column: 1, next: 12 };
        gemm(size, 0.5, head(&qt, 6), head(&kt, 6).t(), 2.0, sum).unwrap();
        let got = c.to_vec1::<f64>().unwrap();
        for (h, i, j) in (0..3).flat_map(|h| (0..4).flat_map(move |i| (0..3).map(move |j| (h, i, j)))) {
            let dot: f64 = (0..2).map(|x| q[i * 6 + h * 2 + x] * k[j * 6 + h * 2 + x]).sum();
            assert_eq!(got[h * 12 + i * 3 + j], 2.0 + 0.5 * dot);
        }
        let e = gemm(Size { count: 4, ..size }, 1.0, head(&qt, 6), head(&kt, 6).t(), 0.0, sum).unwrap_err();
        assert!(e.cause().contains("4 matrices A"), "{e}");
    }
}
