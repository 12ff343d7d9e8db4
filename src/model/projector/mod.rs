//! The connector between tower and language model: features of the tower → visual tokens.
//!
//! Projectors are islands: ordinary differentiable candle modules, run on fresh variables; their small graph lives
//! from forward to backward (see [`super::island`]).

use super::init::Source;
use super::island::{Island, Vars};
use super::params::{Module, Param};
use crate::bail;
use crate::error::Result;
use crate::ops::graph::{activate, layer_norm, linear};
use crate::recipe::schema;
use candle_core::Tensor;

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
        let mut get = |name: String, shape: &[usize]| -> Result<Param> { src.master(name, shape) };
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
            x = layer_norm(&x, &vars.get(w)?, &vars.get(b)?, NORM_EPS)?;
        }
        for (i, (w, b)) in self.layers.iter().enumerate() {
            if i > 0 {
                x = activate(self.act, &x)?;
            }
            let bias = b.as_ref().map(|b| vars.get(b)).transpose()?;
            x = linear(&x, &vars.get(w)?, bias.as_ref())?;
        }
        Ok(x)
    }
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
