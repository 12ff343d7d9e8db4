//! Gradient norms and clipping by the global norm.
//!
//! As `torch.nn.utils.clip_grad_norm_`: every gradient is scaled by min(1, max_norm / (norm + 1e-6)). The squares are
//! summed in f64, in chunks of a fixed size and in a fixed order, so the result does not depend on the threads.

use crate::bail;
use crate::error::{Context, Result};
use candle_core::{CpuStorage, DType, Device, Storage, Tensor};
use rayon::prelude::*;

const CHUNK: usize = 1 << 15;

/// Σ x² of a tensor, on the host, in f64; f32 or f64. Infinite or NaN if an element is.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    let x = x.to_device(&Device::Cpu)?.contiguous()?;
    let (storage, layout) = x.storage_and_layout();
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("a contiguous tensor has strides") };
    match &*storage {
        Storage::Cpu(CpuStorage::F32(v)) => Ok(sum(&v[start..end], f64::from)),
        Storage::Cpu(CpuStorage::F64(v)) => Ok(sum(&v[start..end], |x| x)),
        _ => bail!("a gradient is {:?} on {:?}; gradients are f32 (or f64) on the CPU", x.dtype(), x.device()),
    }
}

fn sum<T: Copy + Sync>(x: &[T], to_f64: impl Fn(T) -> f64 + Sync) -> f64 {
    // Independent lanes, or the sum would wait for each addition.
    let square = |chunk: &[T]| {
        let mut lanes = [0.0; 8];
        for part in chunk.chunks(lanes.len()) {
            for (lane, &x) in lanes.iter_mut().zip(part) {
                let x = to_f64(x);
                *lane += x * x;
            }
        }
        lanes.iter().sum::<f64>()
    };
    let parts: Vec<f64> = x.par_chunks(CHUNK).map(square).collect();
    parts.iter().sum()
}

/// The factor that brings a gradient of global norm `norm` down to `max_norm`; 1 when `max_norm` is 0 (clipping off).
pub fn factor(norm: f64, max_norm: f64) -> f64 {
    if max_norm == 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) }
}

/// As [`sum_of_squares`], but an error that names the parameter when the gradient is not finite or not ours to use.
pub(super) fn finite_sum_of_squares(name: &str, grad: &Tensor) -> Result<f64> {
    let s = sum_of_squares(grad).with_context(|| format!("gradient of `{name}`"))?;
    if !s.is_finite() {
        let kind = if s.is_nan() { "NaN" } else { "infinite" };
        bail!(
            "the gradient of `{name}` is {kind}";
            "lower `lr`, lengthen the warm-up, set `max_grad_norm = 1.0`; if it happens in the first steps, check the data and the weights"
        );
    }
    Ok(s)
}

/// True for the types that the optimizer can update.
pub(super) fn is_supported(dtype: DType) -> bool {
    matches!(dtype, DType::F32 | DType::F64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn squares_are_summed_in_f64() {
        let n = 100_003;
        let x: Vec<f32> = (0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 7.0).collect();
        let want: f64 = x.iter().map(|&x| (x as f64).powi(2)).sum();
        let t = Tensor::from_vec(x, n, &Device::Cpu).unwrap();
        let got = sum_of_squares(&t).unwrap();
        assert!((got / want - 1.0).abs() < 1e-12);
        assert_eq!(got, sum_of_squares(&t).unwrap());
        let transposed = t.narrow(0, 0, 6).unwrap().reshape((2, 3)).unwrap().t().unwrap();
        let head: f64 = sum_of_squares(&t.narrow(0, 0, 6).unwrap()).unwrap();
        assert!((sum_of_squares(&transposed).unwrap() - head).abs() < 1e-12);
        assert!(sum_of_squares(&t.to_dtype(DType::U8).unwrap()).is_err());
    }

    #[test]
    fn the_factor_is_torch_s() {
        assert_eq!(factor(0.5, 1.0), 1.0);
        assert_eq!(factor(2.0, 1.0), 1.0 / (2.0 + 1e-6));
        assert_eq!(factor(2.0, 0.0), 1.0);
    }

    #[test]
    fn a_gradient_that_is_not_finite_is_named() {
        let t = Tensor::new(&[1f32, f32::NAN], &Device::Cpu).unwrap();
        let e = finite_sum_of_squares("projector.linear_1.bias", &t).unwrap_err();
        assert!(e.cause().contains("`projector.linear_1.bias` is NaN") && e.hint_text().is_some(), "{e}");
        let t = Tensor::new(&[1f32, f32::NEG_INFINITY], &Device::Cpu).unwrap();
        assert!(finite_sum_of_squares("w", &t).unwrap_err().cause().contains("infinite"));
    }
}
