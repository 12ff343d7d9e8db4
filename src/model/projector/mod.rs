//! The connector between tower and language model: features of the tower → visual tokens.
//!
//! Projectors are islands: ordinary differentiable candle modules, run on fresh variables; their small graph lives
//! from forward to backward (see [`super::island`]).

use super::init::Source;
use super::island::{Island, Vars};
use super::params::{Module, Param};
use crate::bail;
use crate::error::Result;
use crate::recipe::schema;
use candle_core::{D, Tensor};

/// `depth` linear layers with an activation between them, after an optional LayerNorm; depth 1 is the linear projector.
#[derive(Debug, Clone)]
pub struct Projector {
    pub act: schema::Activation,
    input_norm: Option<(Param, Param)>,
    /// `linear_1` … `linear_depth`: weight `[out, in]`, bias `[out]`.
    layers: Vec<(Param, Option<Param>)>,
}

const NORM_EPS: f64 = 1e-5;

impl Projector {
    /// From features of width `vision` to embeddings of width `language`.
    pub fn new(
        cfg: &schema::Projector,
        vision: usize,
        language: usize,
        bias: bool,
        src: &mut dyn Source,
    ) -> Result<Self> {
        let (depth, hidden, act, norm) = match cfg {
            schema::Projector::Linear(l) => (1, language, schema::Activation::Gelu, l.input_norm),
            schema::Projector::Mlp(m) => (m.depth, m.hidden.unwrap_or(language), m.act, m.input_norm),
        };
        if depth == 0 {
            bail!("the projector has depth 0"; "set model.projector.mlp.depth to 1 or more")
        }
        let mut get = |name: String, shape: &[usize]| -> Result<Param> {
            let value = src.get(&name, shape)?;
            Ok(Param::new(name, value))
        };
        let input_norm = if norm {
            Some((
                get("projector.input_norm.weight".into(), &[vision])?,
                get("projector.input_norm.bias".into(), &[vision])?,
            ))
        } else {
            None
        };
        let mut layers = Vec::with_capacity(depth);
        for i in 1..=depth {
            let (d_in, d_out) = (if i == 1 { vision } else { hidden }, if i == depth { language } else { hidden });
            let weight = get(format!("projector.linear_{i}.weight"), &[d_out, d_in])?;
            let bias = if bias { Some(get(format!("projector.linear_{i}.bias"), &[d_out])?) } else { None };
            layers.push((weight, bias));
        }
        Ok(Self { act, input_norm, layers })
    }
}

impl Island for Projector {
    /// `[N, vision]` → `[N, language]`.
    fn forward(&self, x: &Tensor, vars: &mut Vars) -> Result<Tensor> {
        let mut x = x.clone();
        if let Some((w, b)) = &self.input_norm {
            let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
            let var = centred.sqr()?.mean_keepdim(D::Minus1)?;
            x = centred.broadcast_div(&(var + NORM_EPS)?.sqrt()?)?;
            x = x.broadcast_mul(&vars.get(w)?)?.broadcast_add(&vars.get(b)?)?;
        }
        for (i, (w, b)) in self.layers.iter().enumerate() {
            if i > 0 {
                x = activate(self.act, &x)?;
            }
            x = x.matmul(&vars.get(w)?.t()?)?;
            if let Some(b) = b {
                x = x.broadcast_add(&vars.get(b)?)?;
            }
        }
        Ok(x)
    }
}

fn activate(act: schema::Activation, x: &Tensor) -> Result<Tensor> {
    use schema::Activation as A;
    Ok(match act {
        A::Gelu => x.gelu_erf()?,
        A::GeluTanh => x.gelu()?,
        A::QuickGelu => (x * candle_nn::ops::sigmoid(&(x * 1.702)?)?)?,
        A::Silu => x.silu()?,
        A::Relu => x.relu()?,
    })
}

impl Module for Projector {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        if let Some((w, b)) = &mut self.input_norm {
            f(w);
            f(b);
        }
        for (w, b) in &mut self.layers {
            f(w);
            if let Some(b) = b {
                f(b);
            }
        }
    }
}
