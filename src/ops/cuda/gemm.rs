//! Strided products by cuBLAS. It counts in columns, we in rows: Cᵀ = Bᵀ·Aᵀ is the same memory.

use super::super::gemm::{Size, Strided};
use super::address;
use crate::bail;
use crate::error::{Context, Error, Result};
use candle_core::cuda_backend::CudaDevice;
use candle_core::cuda_backend::cudarc::cublas::{result, sys};
use candle_core::{DType, Tensor};
use sys::cublasOperation_t as Operation;

/// Partial sums of products that are split along the sum (split-K) meet in f32; cuBLAS may else round them to bf16 first.
pub(super) fn sum_in_f32(device: &CudaDevice) -> Result<()> {
    let mode = sys::cublasMath_t::CUBLAS_MATH_DISALLOW_REDUCED_PRECISION_REDUCTION;
    // SAFETY: the handle lives as long as `device`.
    unsafe { sys::cublasSetMathMode(*device.cublas_handle().handle(), mode) }
        .result()
        .map_err(|e| Error::new(format!("cuBLAS: {e:?}")))
}

/// As `ops::gemm::gemm`, whose checks have passed. f32 operands are multiplied in f32, not in TF32; bf16 ones on tensor cores
/// with f32 sums.
pub(in crate::ops) fn gemm(
    device: &CudaDevice,
    s: Size,
    alpha: f64,
    a: Strided,
    b: Strided,
    keep: f64,
    c: Strided,
) -> Result<()> {
    let (a_type, b_type, c_type) = (kind(a.tensor)?, kind(b.tensor)?, kind(c.tensor)?);
    if a.tensor.dtype() != b.tensor.dtype() || (c.tensor.dtype() == DType::BF16 && a.tensor.dtype() != DType::BF16) {
        bail!("gemm: {:?} · {:?} into {:?}", a.tensor.dtype(), b.tensor.dtype(), c.tensor.dtype())
    }
    let (left, left_lead) = side(b, s.n, s.k);
    let (right, right_lead) = side(a, s.k, s.m);
    let lead = c.row.max(s.n);
    let at =
        |x: &Strided| Ok::<_, Error>(address(x.tensor, device)? + (x.start * x.tensor.dtype().size_in_bytes()) as u64);
    let (ap, bp, cp) = (at(&a)?, at(&b)?, at(&c)?);
    let (alpha, keep) = (alpha as f32, keep as f32);
    // SAFETY: every element that the strides reach lies in its tensor (checked by the caller), all on this device; scalars
    // are read on the host during the call.
    unsafe {
        result::gemm_strided_batched_ex(
            *device.cublas_handle().handle(),
            left,
            right,
            int(s.n)?,
            int(s.m)?,
            int(s.k)?,
            (&raw const alpha).cast(),
            bp as *const _,
            b_type,
            int(left_lead)?,
            b.next as i64,
            ap as *const _,
            a_type,
            int(right_lead)?,
            a.next as i64,
            (&raw const keep).cast(),
            cp as *mut _,
            c_type,
            int(lead)?,
            c.next as i64,
            int(s.count)?,
            sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
            sys::cublasGemmAlgo_t::CUBLAS_GEMM_DEFAULT,
        )
    }
    .map_err(|e| Error::new(format!("cuBLAS: {e:?}")))
    .with_context(|| format!("gemm of {} × {} × {}, {} times", s.m, s.n, s.k, s.count))
}

/// How cuBLAS reads our row-major matrix whose transposed it multiplies, `rows` × `columns` of that: as it stands, its rows
/// being columns, or transposed; and the leading dimension.
fn side(m: Strided, rows: usize, columns: usize) -> (Operation, usize) {
    if m.column == 1 {
        (Operation::CUBLAS_OP_N, m.row.max(rows))
    } else {
        (Operation::CUBLAS_OP_T, m.column.max(columns))
    }
}

fn kind(t: &Tensor) -> Result<sys::cudaDataType> {
    Ok(match t.dtype() {
        DType::F32 => sys::cudaDataType_t::CUDA_R_32F,
        DType::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        other => bail!("gemm: {other:?} is not supported on a GPU"; "f32 and bf16 are"),
    })
}

fn int(n: usize) -> Result<i32> {
    i32::try_from(n).map_err(|_| Error::new(format!("cuBLAS counts to 2³¹ − 1, not to {n}")))
}
