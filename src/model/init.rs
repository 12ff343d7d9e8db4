//! Where a module's parameters come from: files, or fresh random values keyed by (seed, name).

use super::params::Param;
use super::role::{Init, Scope};
use super::weights::Weights;
use crate::bail;
use crate::error::Result;
use crate::ops::host;
use crate::ops::random::{Key, normal, uniform};
use crate::spec;
use candle_core::{DType, Device, Tensor};

/// Where a model computes, and in which type: f32 or bf16 (f64 in tests).
#[derive(Debug, Clone)]
pub struct Place {
    pub device: Device,
    pub dtype: DType,
}

impl Place {
    /// What the recipe's `model.dtype` means on a device.
    pub fn new(device: Device, dtype: spec::DType) -> Self {
        let dtype = match dtype {
            spec::DType::Auto if device.is_cpu() => DType::F32,
            spec::DType::F32 => DType::F32,
            spec::DType::Auto | spec::DType::Bf16 => DType::BF16,
        };
        Self { device, dtype }
    }

    /// f32 on the CPU.
    pub fn cpu() -> Self {
        Self::new(Device::Cpu, spec::DType::F32)
    }

    /// The type of values that are trained beside it: f32 with bf16.
    pub fn master(&self) -> DType {
        if self.dtype == DType::BF16 { DType::F32 } else { self.dtype }
    }
}

/// Hands out parameters by canonical name and shape.
pub trait Source {
    /// Where the model will compute.
    fn place(&self) -> &Place;

    /// The tensor `name` in `dtype`, checked to have `shape`, on the place's device; begun by `init` where nothing gives its values.
    fn get(&mut self, name: &str, shape: &[usize], dtype: DType, init: Init) -> Result<Tensor>;

    /// The parameter `leaf` of a backbone's module: frozen unless a stage trains it.
    fn param(&mut self, of: &Scope, leaf: &str, shape: &[usize], init: Init) -> Result<Param> {
        let name = format!("{}.{leaf}", of.name());
        let value = self.get(&name, shape, self.place().dtype, init)?;
        Ok(Param::new(name, value, of.role(init)))
    }

    /// The parameter `leaf` of a module that exists to be trained.
    fn master(&mut self, of: &Scope, leaf: &str, shape: &[usize], init: Init) -> Result<Param> {
        let name = format!("{}.{leaf}", of.name());
        let value = self.get(&name, shape, self.place().master(), init)?;
        Param::computed_in(name, value, of.role(init), self.place().dtype)
    }
}

/// Parameters from weight files.
pub struct FromWeights<'a> {
    pub weights: &'a mut Weights,
    pub place: &'a Place,
}

impl Source for FromWeights<'_> {
    fn place(&self) -> &Place {
        self.place
    }
    fn get(&mut self, name: &str, shape: &[usize], dtype: DType, _: Init) -> Result<Tensor> {
        self.weights.take(name, shape, dtype, &self.place.device)
    }
}

/// Fresh values for the parameters whose names begin with one of `prefixes`, all others from weight files.
pub struct Partly<'a> {
    pub weights: FromWeights<'a>,
    pub fresh: Fresh,
    pub prefixes: &'a [&'a str],
}

impl Source for Partly<'_> {
    fn place(&self) -> &Place {
        self.weights.place
    }
    fn get(&mut self, name: &str, shape: &[usize], dtype: DType, init: Init) -> Result<Tensor> {
        if self.prefixes.iter().any(|p| name.starts_with(p)) {
            return self.fresh.get(name, shape, dtype, init);
        }
        self.weights.get(name, shape, dtype, init)
    }
}

/// Parameters without values, to count them: one zero stands behind all elements of a tensor.
pub struct Shapes(pub Place);

impl Source for Shapes {
    fn place(&self) -> &Place {
        &self.0
    }
    fn get(&mut self, _: &str, shape: &[usize], dtype: DType, _: Init) -> Result<Tensor> {
        Ok(Tensor::zeros(vec![1; shape.len()], dtype, &self.0.device)?.broadcast_as(shape)?)
    }
}

/// Fresh parameters.
pub struct Fresh {
    pub key: Key,
    pub place: Place,
}

impl Source for Fresh {
    fn place(&self) -> &Place {
        &self.place
    }
    fn get(&mut self, name: &str, shape: &[usize], dtype: DType, init: Init) -> Result<Tensor> {
        Ok(fresh(self.key, name, shape, dtype, init)?.to_device(&self.place.device)?)
    }
}

/// The token that ends a row of tiles.
pub const NEWLINE: &str = "projector.image_newline";

/// The token that ends a row of tiles, `[width]`.
pub fn newline(width: usize, src: &mut dyn Source) -> Result<Param> {
    let init = Init::Normal(1.0 / (width.max(1) as f64).sqrt());
    src.master(&Scope::projector(), "image_newline", &[width], init)
}

/// Fresh values of the parameter `name`, on the CPU: they follow from the key, the name and the shape.
///
/// Which [`Init`] is usual says the module that asks: norms 1 and 0; backbones and Q-Formers as HF's BERT; projectors as PyTorch's
/// `nn.Linear`; LoRA's A as PEFT's, its B, a bottleneck's `up`, gates and an adapter's biases 0; soft tokens as embeddings; a
/// perceiver's latents with deviation 1, as OpenFlamingo's (at HF's ones they would all be alike); the newline of tiles with
/// deviation 1/√width, as HF's.
pub fn fresh(key: Key, name: &str, shape: &[usize], dtype: DType, init: Init) -> Result<Tensor> {
    room_for(name, shape, dtype)?;
    let key = key.child(name);
    match init {
        Init::Zeros => Ok(Tensor::zeros(shape, dtype, &Device::Cpu)?),
        Init::Ones => Ok(Tensor::ones(shape, dtype, &Device::Cpu)?),
        Init::Normal(deviation) => normal(key, shape, deviation, dtype),
        Init::Uniform(bound) => uniform(key, shape, bound, dtype),
    }
}

/// Refuses a parameter that cannot be held, before an allocation of it ends the process without a word.
fn room_for(name: &str, shape: &[usize], dtype: DType) -> Result<()> {
    /// What fits anywhere is not worth a look at the machine.
    const SMALL: u128 = 64 << 20;
    let bytes = shape.iter().fold(dtype.size_in_bytes() as u128, |n, d| n.saturating_mul(*d as u128));
    // What no machine can address, where it does not tell what it has.
    let free = if bytes < SMALL { return Ok(()) } else { host::free_memory().unwrap_or(1 << 62) };
    if bytes > u128::from(free) {
        let gb = |n: f64| format!("{:.1} GB", n / 1e9);
        bail!("`{name}`, {shape:?}, needs {} of memory, and {} are free", gb(bytes as f64), gb(free as f64);
            "choose a smaller size in the recipe (rank, dim, tokens, hidden, queries, …), or, for a backbone from `init`, in its config");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_held_is_refused_with_its_bytes() {
        let refused = |shape: &[usize]| {
            fresh(Key::new(1, "a"), "projector.x.weight", shape, DType::F32, Init::Zeros).unwrap_err().report()
        };
        let report = refused(&[1 << 40, 1 << 20]);
        assert!(report.contains("`projector.x.weight`, [1099511627776, 1048576], needs 4611686018.4 GB"), "{report}");
        assert!(refused(&[usize::MAX, usize::MAX, usize::MAX]).contains("hint: choose a smaller size"));
    }
}
