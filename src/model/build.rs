//! Small builders that the backbones share.

use super::init::Source;
use super::linear::Linear;
use super::norm::Norm;
use super::params::Param;
use crate::error::Result;
use crate::ops::norm::Kind;

/// `name.weight` `[out, in]`, and `name.bias` `[out]` if `bias`.
pub fn linear(src: &mut dyn Source, name: &str, d_out: usize, d_in: usize, bias: bool) -> Result<Linear> {
    let weight = param(src, format!("{name}.weight"), &[d_out, d_in])?;
    let bias = if bias { Some(param(src, format!("{name}.bias"), &[d_out])?) } else { None };
    Ok(Linear { weight, bias, deltas: Vec::new() })
}

/// `name.weight` `[d]`, and `name.bias` for a LayerNorm.
pub fn norm(src: &mut dyn Source, kind: Kind, name: &str, d: usize, eps: f64) -> Result<Norm> {
    let weight = param(src, format!("{name}.weight"), &[d])?;
    let bias = if kind == Kind::Layer { Some(param(src, format!("{name}.bias"), &[d])?) } else { None };
    Ok(Norm { kind, weight, bias, eps })
}

/// One frozen parameter.
pub fn param(src: &mut dyn Source, name: String, shape: &[usize]) -> Result<Param> {
    src.param(name, shape)
}
