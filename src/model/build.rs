//! Small builders that the backbones share.

use super::init::Source;
use super::linear::Linear;
use super::norm::Norm;
use super::role::{Init, Scope};
use crate::error::Result;
use crate::ops::norm::Kind;

/// `weight` `[out, in]` of a module, and `bias` `[out]` if it has one.
pub fn linear(src: &mut dyn Source, of: &Scope, d_out: usize, d_in: usize, bias: bool) -> Result<Linear> {
    let begin = of.linears();
    let weight = src.param(of, "weight", &[d_out, d_in], begin.weight(d_in))?;
    let bias = if bias { Some(src.param(of, "bias", &[d_out], begin.bias(d_out))?) } else { None };
    Ok(Linear { weight, bias, deltas: Vec::new() })
}

/// `weight` `[d]` of a module, and `bias` for a LayerNorm.
pub fn norm(src: &mut dyn Source, kind: Kind, of: &Scope, d: usize, eps: f64) -> Result<Norm> {
    let weight = src.param(of, "weight", &[d], Init::Ones)?;
    let bias = if kind == Kind::Layer { Some(src.param(of, "bias", &[d], Init::Zeros)?) } else { None };
    Ok(Norm { kind, weight, bias, eps })
}
