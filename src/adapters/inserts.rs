//! Adapters that are modules of their own: bottlenecks behind attention and MLP, cross-attention before layers, soft tokens.

use crate::bail;
use crate::error::{Context, Result};
use crate::model::init::{Fresh, Place, Source};
use crate::model::insert::Inserts;
use crate::model::insert::bottleneck::Bottleneck;
use crate::model::insert::cross_attention::CrossAttention;
use crate::model::params::Param;
use crate::model::role::{Init, Linears, Scope};
use crate::model::vlm::{Prefix, Vlm};
use crate::ops::random::Key;
use crate::spec::pattern::Patterns;
use crate::spec::{self, PrefixPlace};
use candle_core::Tensor;

/// Calls `f` on every place behind attention and MLP, with its name and the width of its rows, in order.
fn places(vlm: &mut Vlm, f: &mut dyn FnMut(&Scope, usize, &mut Inserts) -> Result<()>) -> Result<()> {
    const PARTS: [&str; 2] = ["self_attn", "mlp"];
    for l in vlm.blocks_mut() {
        let d = l.width()?;
        for (part, inserts) in PARTS.iter().zip(&mut l.after) {
            f(&l.scope.at(part), d, inserts)?;
        }
    }
    Ok(())
}

/// Where the model's adapters compute.
fn place(vlm: &Vlm) -> Place {
    Place { device: vlm.language.device().clone(), dtype: vlm.language.dtype() }
}

/// Puts fresh bottlenecks where the recipe says. A pattern that means no place is an error.
pub fn attach_bottleneck(vlm: &mut Vlm, cfg: &spec::BottleneckAdapter, adapter: &str, key: Key) -> Result<()> {
    let (mut names, mut source) = (Vec::new(), Fresh { key, place: place(vlm) });
    places(vlm, &mut |place, _, _| {
        names.push(place.name().to_string());
        Ok(())
    })?;
    let patterns = Patterns::new(&cfg.target, &names).context("target")?;
    places(vlm, &mut |place, d, inserts| {
        if !patterns.matches(place.name()) {
            return Ok(());
        }
        let insert = Bottleneck::new(cfg, adapter, place, d, &mut source)?;
        inserts.push(Box::new(insert)).with_context(|| place.name())
    })
}

/// Puts fresh cross-attention blocks before every n-th layer of the language model.
pub fn attach_cross_attention(vlm: &mut Vlm, cfg: &spec::CrossAttention, adapter: &str, key: Key) -> Result<()> {
    let n = vlm.language.layers.len();
    if cfg.every > n {
        bail!("every = {}, but the language model has {n} layers", cfg.every; "1 to {n}")
    }
    if vlm.vision.is_none() {
        bail!("the model has no vision tower to look at"; "set model.vision")
    }
    let (d, mut source) = (vlm.language.config.hidden_size, Fresh { key, place: place(vlm) });
    for l in vlm.language.layers.iter_mut().skip(cfg.every - 1).step_by(cfg.every) {
        let insert = CrossAttention::new(cfg, adapter, &l.scope, d, &mut source)?;
        l.before.push(Box::new(insert)).with_context(|| l.scope.name())?;
    }
    Ok(())
}

/// An adapter's soft tokens begin as embeddings do.
const SOFT: Init = Init::Normal(Linears::DEVIATION);

/// Where an adapter's soft tokens stand: `language.prefix.NAME.weight`.
fn prefix(adapter: &str) -> Scope {
    Scope::language().adapter("prefix", adapter)
}

/// Puts the soft tokens `[tokens, D]` of a PEFT folder in front of every sequence.
pub fn attach_loaded_prefix(vlm: &mut Vlm, embeddings: &Tensor, adapter: &str) -> Result<()> {
    let (d, place) = (vlm.language.config.hidden_size, place(vlm));
    if !matches!(embeddings.dims(), [tokens, width] if *tokens > 0 && *width == d) {
        bail!("adapter `{adapter}`: soft tokens {:?} for a language model of width {d}", embeddings.dims();
            "the adapter belongs to another model")
    }
    let value = embeddings.to_dtype(place.master())?.to_device(&place.device)?.copy()?;
    let of = prefix(adapter);
    let embeddings = Param::computed_in(format!("{}.weight", of.name()), value, of.role(SOFT), place.dtype)?;
    vlm.prefixes.push(Prefix { adapter: adapter.to_string(), before: PrefixPlace::Text, embeddings });
    Ok(())
}

/// Puts fresh soft tokens in front of every sequence, or of every picture in one, behind those that are there.
pub fn attach_prefix(vlm: &mut Vlm, cfg: &spec::Prefix, adapter: &str, key: Key) -> Result<()> {
    if vlm.prefixes.iter().any(|p| p.adapter == adapter) {
        bail!("there is already an adapter named `{adapter}`"; "give one of the two another `name`")
    }
    if cfg.before == PrefixPlace::Picture && vlm.vision.is_none() {
        bail!("the model has no vision tower, and no text a picture"; "leave `before` out, or set model.vision")
    }
    let (d, mut source) = (vlm.language.config.hidden_size, Fresh { key, place: place(vlm) });
    let embeddings = source.master(&prefix(adapter), "weight", &[cfg.tokens, d], SOFT)?;
    vlm.prefixes.push(Prefix { adapter: adapter.to_string(), before: cfg.before, embeddings });
    Ok(())
}
