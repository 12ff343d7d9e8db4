//! LoRA (Hu et al. 2021), with DoRA's magnitudes (Liu et al. 2024) or without, on linear layers of tower and language model:
//! grafting, merging, taking out, in PEFT's terms.

use crate::bail;
use crate::error::Result;
use crate::model::dora::{self, Magnitude};
use crate::model::init::{Fresh, Source};
use crate::model::linear::{Linear, LowRank};
use crate::model::params::Param;
use crate::model::role::{Init, Scope};
use crate::model::vlm::Vlm;
use crate::ops::launch::widen;
use crate::ops::matmul::{Mat, matmul_add};
use crate::ops::random::Key;
use crate::spec;
use crate::spec::pattern::Patterns;
use candle_core::Tensor;
use std::collections::{BTreeMap, BTreeSet};

/// alpha/rank, or alpha/√rank with rsLoRA (Kalajdzievski 2023).
pub fn scale(rank: usize, alpha: f64, rslora: bool) -> f64 {
    if rslora { alpha / (rank as f64).sqrt() } else { alpha / rank as f64 }
}

/// A LoRA adapter: low-rank updates B·A of linear layers.
#[derive(Debug, Clone)]
pub struct LoraAdapter {
    /// Part of its parameters' names.
    pub name: String,
    /// Rank of the modules, unless their tensors have another one.
    pub rank: usize,
    /// Alpha of the modules that have no own one.
    pub alpha: f64,
    /// Alpha of the modules that have their own (PEFT's `alpha_pattern`), by canonical name.
    pub alphas: BTreeMap<String, f64>,
    /// Scale alpha/√rank instead of alpha/rank.
    pub rslora: bool,
    /// Probability of zeroing an input of A while training.
    pub dropout: f64,
    /// Canonical module, e.g. `language.layers.0.self_attn.q_proj` → A [r, in], B [out, r].
    pub tensors: BTreeMap<String, (Tensor, Tensor)>,
    /// DoRA's magnitude `[out]` of every module; none of a plain LoRA.
    pub magnitudes: BTreeMap<String, Tensor>,
}

impl LoraAdapter {
    /// What B·A of `module` is multiplied by.
    pub fn scale(&self, module: &str) -> f64 {
        let alpha = self.alphas.get(module).copied().unwrap_or(self.alpha);
        scale(self.rank_of(module), alpha, self.rslora)
    }

    /// Has it magnitudes?
    pub fn dora(&self) -> bool {
        !self.magnitudes.is_empty()
    }

    /// Rank of `module`: that of its tensors.
    pub fn rank_of(&self, module: &str) -> usize {
        self.tensors.get(module).and_then(|(a, _)| a.dims().first().copied()).unwrap_or(self.rank)
    }
}

/// Kinds of an adapter's tensors on a layer.
const A: &str = "lora_A";
const B: &str = "lora_B";
const MAGNITUDE: &str = "lora_magnitude_vector";

/// Each is called so: `language.layers.0.self_attn.q_proj.lora_A.sft.weight`.
const WEIGHT: &str = "weight";

/// Where one kind of an adapter's tensors stands on a layer.
fn scope(l: &Linear, kind: &str, adapter: &str) -> Scope {
    Scope::of(l.name(), &l.weight.role).adapter(kind, adapter)
}

/// DoRA's lengths, which begin as those that the rows have.
fn magnitude(l: &Linear, adapter: &str, value: Tensor) -> Magnitude {
    let of = scope(l, MAGNITUDE, adapter);
    Magnitude::new(Param::new(format!("{}.{WEIGHT}", of.name()), value, of.role(Init::Ones)))
}

/// Names of the linear layers that `cfg.target` means, in order. A pattern that means none is an error.
pub fn targets(vlm: &Vlm, cfg: &spec::Lora) -> Result<Vec<String>> {
    let names = vlm.linear_names();
    let patterns = Patterns::new(&cfg.target, &names)?;
    Ok(names.into_iter().filter(|n| patterns.matches(n)).collect())
}

/// Grafts a fresh adapter (A Kaiming-uniform, B zero) on the layers that the recipe names; returns those layers' names.
pub fn attach(vlm: &mut Vlm, cfg: &spec::Lora, adapter: &str, key: Key) -> Result<Vec<String>> {
    if cfg.rank == 0 {
        bail!("adapter `{adapter}`: rank 0 adapts nothing"; "set rank to 1 or more")
    }
    let names = targets(vlm, cfg)?;
    graft(vlm, &names, adapter, |l| {
        let ((d_out, d_in), place) = (l.dims()?, l.place());
        let mut source = Fresh { key, place };
        let (a, b) = (scope(l, A, adapter), scope(l, B, adapter));
        let a = source.master(&a, WEIGHT, &[cfg.rank, d_in], a.linears().weight(d_in))?;
        let b = source.master(&b, WEIGHT, &[d_out, cfg.rank], Init::Zeros)?;
        let scale = scale(cfg.rank, cfg.alpha, cfg.rslora);
        let unchanged = || dora::unchanged(l.name(), l.weight.compute(), a.compute(), b.compute(), scale);
        let magnitude = |value| magnitude(l, adapter, value);
        let magnitude = if cfg.dora { Some(magnitude(unchanged()?)) } else { None };
        Ok(LowRank { adapter: adapter.to_string(), a, b, magnitude, scale, dropout: cfg.dropout })
    })?;
    Ok(names)
}

/// Gives magnitudes whose names `which` picks the lengths that the rows have with A and B as they are.
pub fn reset_magnitudes(vlm: &Vlm, which: impl Fn(&str) -> bool) -> Result<()> {
    for l in vlm.linears() {
        for d in &l.deltas {
            if let Some(m) = d.magnitude.as_ref().filter(|m| which(&m.param.name)) {
                let value = dora::unchanged(l.name(), l.weight.compute(), d.a.compute(), d.b.compute(), d.scale)?;
                m.param.overwrite(&value)?;
            }
        }
    }
    Ok(())
}

/// Grafts an adapter that was read from a PEFT folder.
pub fn attach_loaded(vlm: &mut Vlm, loaded: &LoraAdapter) -> Result<()> {
    let known = vlm.linear_names();
    if let Some(name) = loaded.tensors.keys().find(|n| !known.contains(n)) {
        if !name.contains(".layers.") {
            bail!("adapter `{}` adapts `{name}`, and a LoRA is built for the linear layers of tower and language model alone", loaded.name;
                "merge the adapter into its model with PEFT (merge_and_unload) and start from that")
        }
        bail!("adapter `{}`: this model has no linear layer `{name}`", loaded.name;
            "the adapter belongs to another model, or to layers that the recipe leaves out")
    }
    let names: Vec<String> = loaded.tensors.keys().cloned().collect();
    graft(vlm, &names, &loaded.name, |l| {
        let (a, b) = &loaded.tensors[l.name()];
        let ((d_out, d_in), (rank, a_in)) = (l.dims()?, a.dims2()?);
        if a_in != d_in || b.dims2()? != (d_out, rank) {
            bail!(
                "adapter `{}`, {}: A {:?} and B {:?} do not fit a layer of [{d_out}, {d_in}]",
                loaded.name,
                l.name(),
                a.dims(),
                b.dims()
            )
        }
        let place = l.place();
        let matrix = |kind: &str, t: &Tensor| -> Result<Param> {
            let value = t.to_dtype(place.master())?.to_device(&place.device)?.copy()?;
            let of = scope(l, kind, &loaded.name);
            let init = if kind == A { of.linears().weight(d_in) } else { Init::Zeros };
            Param::computed_in(format!("{}.{WEIGHT}", of.name()), value, of.role(init), place.dtype)
        };
        let (a, b, scale) = (matrix(A, a)?, matrix(B, b)?, loaded.scale(l.name()));
        let given = |m: &Tensor| -> Result<Magnitude> {
            if m.dims() != [d_out] {
                bail!("adapter `{}`, {}: a magnitude {:?} for {d_out} rows", loaded.name, l.name(), m.dims())
            }
            dora::unchanged(l.name(), l.weight.compute(), a.compute(), b.compute(), scale)?;
            let value = m.to_dtype(place.master())?.to_device(&place.device)?.copy()?;
            Ok(magnitude(l, &loaded.name, value))
        };
        let magnitude = loaded.magnitudes.get(l.name()).map(given).transpose()?;
        Ok(LowRank { adapter: loaded.name.clone(), a, b, magnitude, scale, dropout: loaded.dropout })
    })
}

fn graft(vlm: &mut Vlm, names: &[String], adapter: &str, make: impl Fn(&Linear) -> Result<LowRank>) -> Result<()> {
    for l in vlm.linears_mut().filter(|l| names.iter().any(|n| n == l.name())) {
        if l.deltas.iter().any(|d| d.adapter == adapter) {
            bail!("{} already has an adapter named `{adapter}`", l.name(); "give one of the two another `name`")
        }
        let delta = make(l)?;
        l.deltas.push(delta);
    }
    Ok(())
}

/// Puts all adapters into the weights, in the weight's dtype, and takes them off. Each layer's go in the order in which they act:
/// W += s·B·A, and with a magnitude the rows of the sum are scaled as the layer scales its outputs.
pub fn merge(vlm: &mut Vlm) -> Result<()> {
    for l in vlm.linears_mut() {
        let deltas = std::mem::take(&mut l.deltas);
        if !deltas.is_empty() {
            merge_into(&l.weight, &deltas)?;
        }
    }
    Ok(())
}

/// The sum is in f32 (or the weight's own type) until it is whole.
fn merge_into(w: &Param, deltas: &[LowRank]) -> Result<()> {
    let base = widen(&w.value)?;
    let mut sum = base.copy()?;
    for d in deltas {
        matmul_add(&sum, d.scale, Mat::N(&d.b.value), Mat::N(&d.a.value))?;
        if let Some(m) = &d.magnitude {
            let lengths = dora::lengths(&base, &dora::row_squares(&base)?, &d.a.value, &d.b.value, d.scale)?;
            sum = sum.broadcast_mul(&(&m.param.value / lengths)?.unsqueeze(1)?)?;
        }
    }
    w.overwrite(&sum)
}

/// Names of all adapters on the model, sorted.
pub fn names(vlm: &Vlm) -> Vec<String> {
    let all = vlm.linears().flat_map(|l| &l.deltas).map(|d| d.adapter.clone());
    all.collect::<BTreeSet<_>>().into_iter().collect()
}

/// An adapter as it is saved. Modules whose scale comes from an alpha of their own keep it.
pub fn export(vlm: &Vlm, adapter: &str, cfg: &spec::Lora) -> Result<LoraAdapter> {
    let (mut tensors, mut magnitudes, mut alphas) = (BTreeMap::new(), BTreeMap::new(), BTreeMap::new());
    for (name, d) in vlm.deltas(adapter) {
        let rank = d.a.value.dim(0)? as f64;
        let alpha = d.scale * if cfg.rslora { rank.sqrt() } else { rank };
        if (alpha - cfg.alpha).abs() > 1e-9 * cfg.alpha.abs() {
            alphas.insert(name.clone(), alpha);
        }
        magnitudes.extend(d.magnitude.map(|m| (name.clone(), m.param.value)));
        tensors.insert(name, (d.a.value, d.b.value));
    }
    let (name, rank) = (adapter.to_string(), cfg.rank);
    Ok(LoraAdapter {
        name,
        rank,
        alpha: cfg.alpha,
        rslora: cfg.rslora,
        dropout: cfg.dropout,
        alphas,
        tensors,
        magnitudes,
    })
}
