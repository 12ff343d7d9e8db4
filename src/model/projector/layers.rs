//! The layers that projectors are made of.

use crate::error::Result;
use crate::model::init::Source;
use crate::model::island::Vars;
use crate::model::params::{Module, Param};
use crate::ops::graph;
use candle_core::Tensor;

const NORM_EPS: f64 = 1e-5;

/// x·Wᵀ + b.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out, in]`
    weight: Param,
    /// `[out]`
    bias: Option<Param>,
}

impl Linear {
    /// `projector.{name}.weight`, and `.bias` if `bias`.
    pub fn new(name: &str, d_in: usize, d_out: usize, bias: bool, src: &mut dyn Source) -> Result<Self> {
        Self::named(&format!("projector.{name}"), d_in, d_out, bias, src)
    }

    /// `{name}.weight`, and `.bias` if `bias`.
    pub fn named(name: &str, d_in: usize, d_out: usize, bias: bool, src: &mut dyn Source) -> Result<Self> {
        let weight = src.master(format!("{name}.weight"), &[d_out, d_in])?;
        let bias = if bias { Some(src.master(format!("{name}.bias"), &[d_out])?) } else { None };
        Ok(Self { weight, bias })
    }

    /// Does it train?
    pub fn learns(&self) -> bool {
        self.weight.trainable || self.bias.as_ref().is_some_and(|b| b.trainable)
    }

    /// `[N, in]` → `[N, out]`.
    pub fn forward(&self, x: &Tensor, vars: &mut Vars) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(|b| vars.get(b)).transpose()?;
        graph::linear(x, &vars.get(&self.weight)?, bias.as_ref())
    }
}

impl Module for Linear {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        f(&mut self.weight);
        self.bias.iter_mut().for_each(f);
    }
}

/// LayerNorm over rows.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Param,
    bias: Param,
}

impl LayerNorm {
    /// `projector.{name}.weight` and `.bias`, `[d]` each.
    pub fn new(name: &str, d: usize, src: &mut dyn Source) -> Result<Self> {
        Self::named(&format!("projector.{name}"), d, src)
    }

    /// `{name}.weight` and `.bias`, `[d]` each.
    pub fn named(name: &str, d: usize, src: &mut dyn Source) -> Result<Self> {
        let weight = src.master(format!("{name}.weight"), &[d])?;
        Ok(Self { weight, bias: src.master(format!("{name}.bias"), &[d])? })
    }

    /// Does it train?
    pub fn learns(&self) -> bool {
        self.weight.trainable || self.bias.trainable
    }

    /// `[N, d]` → `[N, d]`.
    pub fn forward(&self, x: &Tensor, vars: &mut Vars) -> Result<Tensor> {
        graph::layer_norm(x, &vars.get(&self.weight)?, &vars.get(&self.bias)?, NORM_EPS)
    }
}

impl Module for LayerNorm {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        f(&mut self.weight);
        f(&mut self.bias);
    }
}
