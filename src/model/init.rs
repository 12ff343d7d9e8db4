//! Where a module's parameters come from: files, or fresh random values keyed by (seed, name).

use super::params::{Param, adapter_of, kind_of};
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

    /// The tensor `name` in `dtype`, checked to have `shape`, on the place's device.
    fn get(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor>;

    /// A parameter of a backbone: frozen unless a stage trains it.
    fn param(&mut self, name: String, shape: &[usize]) -> Result<Param> {
        let value = self.get(&name, shape, self.place().dtype)?;
        Ok(Param::new(name, value))
    }

    /// A parameter that exists to be trained.
    fn master(&mut self, name: String, shape: &[usize]) -> Result<Param> {
        let value = self.get(&name, shape, self.place().master())?;
        Param::computed_in(name, value, self.place().dtype)
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
    fn get(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
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
    fn get(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        if self.prefixes.iter().any(|p| name.starts_with(p)) {
            return self.fresh.get(name, shape, dtype);
        }
        self.weights.get(name, shape, dtype)
    }
}

/// Parameters without values, to count them: one zero stands behind all elements of a tensor.
pub struct Shapes(pub Place);

impl Source for Shapes {
    fn place(&self) -> &Place {
        &self.0
    }
    fn get(&mut self, _: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
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
    fn get(&mut self, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
        Ok(fresh(self.key, name, shape, dtype)?.to_device(&self.place.device)?)
    }
}

/// The token that ends a row of tiles.
pub const NEWLINE: &str = "projector.image_newline";

/// The usual initial values by kind of parameter: norms 1 and 0; backbone matrices and embeddings normal with
/// deviation 0.02 (HF's `initializer_range`), their biases 0; projector layers and LoRA's A uniform in ±1/√in
/// (PyTorch's `nn.Linear` and PEFT, Kaiming with a = √5); LoRA's B, a bottleneck's `up`, gates and an adapter's other biases
/// zero; soft tokens normal with deviation 0.02. A Q-Former begins as HF's BERT does, and its queries as LAVIS's: all normal with
/// deviation 0.02; a perceiver's latents with deviation 1, as OpenFlamingo's (at HF's ones they would all be alike); the newline of
/// tiles with deviation 1/√width, as HF's. On the CPU.
pub fn fresh(key: Key, name: &str, shape: &[usize], dtype: DType) -> Result<Tensor> {
    room_for(name, shape, dtype)?;
    let (key, kind) = (key.child(name), kind_of(name));
    let (adapter, name) = (adapter_of(name).is_some(), kind.as_str());
    let leaf = name.rsplit('.').next().unwrap_or(name);
    let module = name.rsplit('.').nth(1).unwrap_or("");
    let constant = |v: f64| Ok((Tensor::ones(shape, dtype, &Device::Cpu)? * v)?);
    // A weight of one dimension scales a norm, whatever that is called; 0 is the first of a Sequential, a norm in OpenFlamingo.
    let sequential = module == "0" && shape.len() == 1;
    if module.contains("norm") || module == "LayerNorm" || sequential || adapter && leaf == "weight" && shape.len() == 1
    {
        return constant(if leaf == "weight" { 1.0 } else { 0.0 });
    }
    if module == "lora_B" || module == "up" || adapter && (leaf == "bias" || leaf.ends_with("_gate")) {
        return constant(0.0);
    }
    if name == NEWLINE {
        return normal(key, shape, 1.0 / (shape.iter().product::<usize>().max(1) as f64).sqrt(), dtype);
    }
    if leaf == "latents" {
        return normal(key, shape, 1.0, dtype);
    }
    let bert = name.starts_with("projector.qformer.") || leaf == "query_tokens";
    if name.starts_with("projector.") && !bert || adapter && module != "prefix" {
        let fan_in = shape.get(1).or(shape.first()).copied().unwrap_or(1).max(1);
        // A bias does not know its layer's input width; its own length is the nearest thing to it, and small either way.
        return uniform(key, shape, 1.0 / (fan_in as f64).sqrt(), dtype);
    }
    if leaf == "bias" { constant(0.0) } else { normal(key, shape, 0.02, dtype) }
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
        let refused =
            |shape: &[usize]| fresh(Key::new(1, "a"), "projector.x.weight", shape, DType::F32).unwrap_err().report();
        let report = refused(&[1 << 40, 1 << 20]);
        assert!(report.contains("`projector.x.weight`, [1099511627776, 1048576], needs 4611686018.4 GB"), "{report}");
        assert!(refused(&[usize::MAX, usize::MAX, usize::MAX]).contains("hint: choose a smaller size"));
    }

    /// Names that are words of ours: the kind of a parameter decides, not what the user calls an adapter.
    #[test]
    fn an_adapters_name_decides_nothing() {
        let layer = "language.layers.0.self_attn.q_proj";
        for adapter in ["sft", "norm_tune", "up", "prefix", "LayerNorm", "bias", "0", "lora_A"] {
            let of = |name: String, shape: &[usize]| -> Vec<f64> {
                let t = fresh(Key::new(1, "a"), &name, shape, DType::F64).unwrap();
                t.flatten_all().unwrap().to_vec1().unwrap()
            };
            let (a, b) = (format!("{layer}.lora_A.{adapter}.weight"), format!("{layer}.lora_B.{adapter}.weight"));
            let a = of(a, &[4, 100]);
            // Uniform in ±1/√100.
            assert!(a.iter().all(|x| x.abs() <= 0.1) && a.iter().any(|x| x.abs() > 0.09), "{adapter}");
            assert!(of(b, &[100, 4]).iter().all(|x| *x == 0.0), "{adapter}");
            let soft = of(format!("language.prefix.{adapter}.weight"), &[8, 100]);
            let (mean, std) =
                (soft.iter().sum::<f64>() / 800.0, (soft.iter().map(|x| x * x).sum::<f64>() / 800.0).sqrt());
            assert!(mean.abs() < 0.003 && (std - 0.02).abs() < 0.002, "{adapter}: {mean} {std}");
            let up = of(format!("language.layers.0.mlp.bottleneck.{adapter}.up.weight"), &[8, 4]);
            let down = of(format!("language.layers.0.mlp.bottleneck.{adapter}.down.weight"), &[4, 8]);
            assert!(up.iter().all(|x| *x == 0.0) && down.iter().all(|x| *x != 0.0), "{adapter}");
            let norm = of(format!("language.layers.0.cross_attention.{adapter}.ff.0.weight"), &[8]);
            assert!(norm.iter().all(|x| *x == 1.0), "{adapter}");
        }
    }
}
