//! AdamW's update (Loshchilov & Hutter 2019) of many parameters at once, behind the norm of all their gradients: the CPU
//! reference (`reference`) and the kernels of `kernels/adamw.cu`, which give the same bits on f32 moments.
//!
//! ```text
//! g ← clip·g        m ← m + (1 − β₁)(g − m)        v ← β₂·v + (1 − β₂)·g²
//! p ← p·keep − size · m / (√v / correction + ε)
//! ```
//!
//! A parameter's form says how it is stored. p: f32 (f64 on the CPU), perhaps with a bf16 copy to compute with, or bf16 alone,
//! rounded stochastically. m and v: of the gradient's type, or 8 bits in blocks of 256 with a scale each.

mod kernels;
pub(crate) mod reference;

pub use kernels::Plan;

use super::launch::{Path, host, path, widen};
use super::random::Key;
use super::{Weight, data, dispatch};
use crate::bail;
use crate::error::Result;
use candle_core::{DType, Device, Tensor};

/// Elements that share the scales of 8-bit moments.
pub const BLOCK: usize = 256;

/// First and second moment of one parameter.
#[derive(Debug, Clone)]
pub enum Moments {
    /// Of the gradient's type and shape.
    Full {
        /// m
        mean: Tensor,
        /// v
        square: Tensor,
    },
    /// In 8 bits, stochastically rounded.
    Eight {
        /// m
        mean: Codes,
        /// √v
        square: Codes,
    },
}

/// Numbers in 8 bits, block-wise (`kernels/adamw.cu` has the code).
#[derive(Debug, Clone)]
pub struct Codes {
    /// u8, of the parameter's shape; the first moment's are signed.
    pub codes: Tensor,
    /// f32 `[⌈n / 256⌉]`.
    pub scales: Tensor,
}

impl Moments {
    /// Zeros for a parameter with this gradient.
    pub fn zeros(grad: &Tensor, eight: bool) -> Result<Self> {
        let (shape, device) = (grad.shape(), grad.device());
        if !eight {
            let zeros = || Tensor::zeros(shape, grad.dtype(), device);
            return Ok(Self::Full { mean: zeros()?, square: zeros()? });
        }
        let blocks = grad.elem_count().div_ceil(BLOCK);
        let zeros = || -> Result<Codes> {
            let codes = Tensor::zeros(shape, DType::U8, device)?;
            Ok(Codes { codes, scales: Tensor::zeros(blocks, DType::F32, device)? })
        };
        Ok(Self::Eight { mean: zeros()?, square: zeros()? })
    }

    /// Are they there?
    pub fn is_on(&self, device: &Device) -> bool {
        let first = match self {
            Self::Full { mean, .. } => mean,
            Self::Eight { mean, .. } => &mean.codes,
        };
        first.device().same_device(device)
    }

    /// Moves to where the parameter is.
    pub fn to_device(&mut self, device: &Device) -> Result<()> {
        let tensors = match self {
            Self::Full { mean, square } => vec![mean, square],
            Self::Eight { mean, square } => {
                vec![&mut mean.codes, &mut mean.scales, &mut square.codes, &mut square.scales]
            }
        };
        for t in tensors.into_iter().filter(|t| !t.device().same_device(device)) {
            *t = t.to_device(device)?;
        }
        Ok(())
    }
}

/// Factors of one parameter's update in one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rate {
    /// 1 − lr·λ
    pub keep: f64,
    /// lr / (1 − β₁ᵗ)
    pub size: f64,
    /// √(1 − β₂ᵗ)
    pub correction: f64,
}

/// One parameter in a step; its place in the slice is its name for the noise.
#[derive(Debug)]
pub struct Parameter<'a> {
    /// What is updated.
    pub weight: &'a Weight,
    /// What this step brings; a parameter without a gradient is left as it is, moments included.
    pub update: Option<Gradient<'a>>,
    /// Are its moments stored in 8 bits?
    pub eight: bool,
    /// Its group, for the norms.
    pub group: usize,
}

/// A parameter's gradient, f32 (f64 for an f64 parameter), and what it updates.
#[derive(Debug)]
pub struct Gradient<'a> {
    /// Summed over the step's micro-batches, not yet clipped.
    pub grad: &'a Tensor,
    /// Of the parameter so far.
    pub moments: &'a Moments,
    /// Factors of this update.
    pub rate: Rate,
}

/// What is the same for all parameters of a step.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// β₁, β₂
    pub betas: [f64; 2],
    /// ε
    pub eps: f64,
    /// Gradients of a larger norm, all together, are scaled down to it; 0 switches that off.
    pub max_norm: f64,
    /// Number of groups.
    pub groups: usize,
    /// Stream of the noise that rounds.
    pub noise: Key,
    /// Counter of the noise: the step's index.
    pub index: u32,
}

/// What a step found; where `skipped`, it changed nothing.
#[derive(Debug, Clone, PartialEq)]
pub struct Norms {
    /// Norm of all gradients, before clipping.
    pub total: f64,
    /// What the gradients were multiplied by.
    pub clip: f64,
    /// A gradient was not finite.
    pub skipped: bool,
    /// Norm of each group's gradients, before clipping.
    pub groups: Vec<f64>,
    /// Sum of squares of each parameter's gradient; 0 without one.
    pub squares: Vec<f64>,
}

/// Updates, in place, every parameter that has a gradient; rounded copies follow. `plan` keeps the kernels' tables from step to
/// step. All tensors must be contiguous, and of the shapes and types that [`Parameter`] says.
pub fn step(params: &[Parameter], s: &Step, plan: &mut Option<Plan>) -> Result<Norms> {
    let Some(first) = params.first() else { bail!("an optimizer without parameters") };
    match path("adamw", &first.weight.value)? {
        Path::Kernel => kernels::step(params, s, plan),
        Path::Reference | Path::Widened => reference::step(params, s),
    }
}

/// Factor of clipping, as `torch.nn.utils.clip_grad_norm_`: min(1, max_norm / (norm + 1e-6)); 1 when `max_norm` is 0.
fn clip(norm: f64, max_norm: f64) -> f64 {
    if max_norm == 0.0 { 1.0 } else { (max_norm / (norm + 1e-6)).min(1.0) }
}

/// Σ x² of a tensor, on the host, in f64 and in the kernels' order of sums. Infinite or NaN just where an element is.
pub fn sum_of_squares(x: &Tensor) -> Result<f64> {
    let x = widen(&host(x)?.contiguous()?)?;
    dispatch!(&x, "sum of squares", T => Ok(reference::sum_of_squares(&data::<T>(&x)?)))
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
    fn the_factor_of_clipping_is_torch_s() {
        assert_eq!(clip(0.5, 1.0), 1.0);
        assert_eq!(clip(2.0, 1.0), 1.0 / (2.0 + 1e-6));
        assert_eq!(clip(2.0, 0.0), 1.0);
    }
}
