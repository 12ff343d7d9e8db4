//! Where a module's parameters come from: files, or fresh random values keyed by (seed, name).

use super::weights::Weights;
use crate::error::Result;
use crate::ops::random::{Key, normal, uniform};
use candle_core::{DType, Device, Tensor};

/// Hands out parameters by canonical name and shape.
pub trait Source {
    /// The tensor `name`, checked to have `shape`.
    fn get(&mut self, name: &str, shape: &[usize]) -> Result<Tensor>;
}

/// Parameters from weight files.
pub struct FromWeights<'a> {
    pub weights: &'a mut Weights,
    pub dtype: DType,
    pub device: &'a Device,
}

impl Source for FromWeights<'_> {
    fn get(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        self.weights.take(name, shape, self.dtype, self.device)
    }
}

/// Fresh parameters.
pub struct Fresh {
    pub key: Key,
    pub dtype: DType,
}

impl Source for Fresh {
    fn get(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        fresh(self.key, name, shape, self.dtype)
    }
}

/// The usual initial values by kind of parameter: norms 1 and 0; backbone matrices and embeddings normal with
/// deviation 0.02 (HF's `initializer_range`), their biases 0; projector layers and LoRA's A uniform in ±1/√in
/// (PyTorch's `nn.Linear` and PEFT, Kaiming with a = √5); LoRA's B zero.
pub fn fresh(key: Key, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
    let key = key.child(name);
    let leaf = name.rsplit('.').next().unwrap_or(name);
    let norm = name.rsplit('.').nth(1).is_some_and(|m| m.contains("norm"));
    let constant = |v: f64| Ok((Tensor::ones(shape, dtype, &Device::Cpu)? * v)?);
    if norm {
        return constant(if leaf == "weight" { 1.0 } else { 0.0 });
    }
    if name.contains(".lora_B.") {
        return constant(0.0);
    }
    if name.starts_with("projector.") || name.contains(".lora_A.") {
        let fan_in = shape.get(1).or(shape.first()).copied().unwrap_or(1).max(1);
        // A bias does not know its layer's input width; its own length is the nearest thing to it, and small either way.
        return uniform(key, shape, 1.0 / (fan_in as f64).sqrt(), dtype);
    }
    if leaf == "bias" { constant(0.0) } else { normal(key, shape, 0.02, dtype) }
}
