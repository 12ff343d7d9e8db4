//! Rotary angles of LLaMA, with the scalings `linear` and `llama3` (HF `modeling_rope_utils`).

use crate::error::Result;
use crate::model::backbone::{LanguageConfig, RopeScaling};
use crate::ops::Real;
use candle_core::{DType, Device, Tensor};

/// Inverse frequencies, one for each pair of a head. HF computes angles in f32, and so do we unless the model is f64.
#[derive(Debug, Clone)]
pub struct Rope {
    inv_freq: Vec<f64>,
}

impl Rope {
    /// Frequencies of a config.
    pub fn new(cfg: &LanguageConfig) -> Self {
        let half = cfg.head_dim / 2;
        let base = (0..half).map(|i| 1.0 / cfg.rope_theta.powf(2.0 * i as f64 / cfg.head_dim as f64));
        Self { inv_freq: base.map(|f| stretch(f, &cfg.rope_scaling)).collect() }
    }

    /// Cosines and sines of the given positions, `[N, hd/2]` each: f64 for a model in f64, else f32.
    pub fn angles(&self, positions: &[usize], dtype: DType, device: &Device) -> Result<(Tensor, Tensor)> {
        fn pair<T: Real>(angles: &[T], shape: (usize, usize), device: &Device) -> Result<(Tensor, Tensor)> {
            let of = |f: fn(T) -> T| Tensor::from_vec(angles.iter().map(|a| f(*a)).collect(), shape, device);
            Ok((of(num_traits::Float::cos)?, of(num_traits::Float::sin)?))
        }
        let shape = (positions.len(), self.inv_freq.len());
        let each = |p: &usize| (*p, self.inv_freq.as_slice());
        if dtype == DType::F64 {
            let a: Vec<f64> =
                positions.iter().map(each).flat_map(|(p, f)| f.iter().map(move |f| p as f64 * f)).collect();
            return pair(&a, shape, device);
        }
        let a: Vec<f32> =
            positions.iter().map(each).flat_map(|(p, f)| f.iter().map(move |f| p as f32 * *f as f32)).collect();
        pair(&a, shape, device)
    }
}

/// llama3: long wavelengths are divided by the factor, short ones kept, those between blended.
fn stretch(f: f64, scaling: &RopeScaling) -> f64 {
    match scaling {
        RopeScaling::None => f,
        RopeScaling::Linear { factor } => f / factor,
        RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
            let turns = original_max_position_embeddings * f / (2.0 * std::f64::consts::PI);
            if turns < *low_freq_factor {
                f / factor
            } else if turns > *high_freq_factor {
                f
            } else {
                let blend = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor);
                (1.0 - blend) * f / factor + blend * f
            }
        }
    }
}
