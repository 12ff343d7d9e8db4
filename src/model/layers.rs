//! The layers that projectors and inserts are made of, written as nodes of an island's graph ([`super::island`]).

use crate::error::Result;
use crate::model::init::Source;
use crate::model::island::Vars;
use crate::model::params::{Param, module};
use crate::model::role::{Init, Scope};
use crate::ops::attention::{Segment, Sequences};
use crate::ops::graph;
use crate::spec::Activation;
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
    /// `weight` of a module, and `bias` if it has one.
    pub fn new(of: &Scope, d_in: usize, d_out: usize, bias: bool, src: &mut dyn Source) -> Result<Self> {
        let begin = of.linears();
        let weight = src.master(of, "weight", &[d_out, d_in], begin.weight(d_in))?;
        let bias = if bias { Some(src.master(of, "bias", &[d_out], begin.bias(d_out))?) } else { None };
        Ok(Self { weight, bias })
    }

    /// Does it train?
    pub fn learns(&self) -> bool {
        self.weight.trainable || self.bias.as_ref().is_some_and(|b| b.trainable)
    }

    /// Elements of the weight.
    pub fn weights(&self) -> u64 {
        self.weight.value.elem_count() as u64
    }

    /// `[N, in]` → `[N, out]`.
    pub fn forward(&self, x: &Tensor, vars: &mut Vars) -> Result<Tensor> {
        let bias = self.bias.as_ref().map(|b| vars.get(b)).transpose()?;
        graph::linear(x, &vars.get(&self.weight)?, bias.as_ref())
    }
}

module!(Linear: weight, bias);

/// LayerNorm over rows.
#[derive(Debug, Clone)]
pub struct LayerNorm {
    weight: Param,
    bias: Param,
    eps: f64,
}

impl LayerNorm {
    /// `weight` and `bias` of a module, `[d]` each.
    pub fn new(of: &Scope, d: usize, src: &mut dyn Source) -> Result<Self> {
        let weight = src.master(of, "weight", &[d], Init::Ones)?;
        Ok(Self { weight, bias: src.master(of, "bias", &[d], Init::Zeros)?, eps: NORM_EPS })
    }

    /// With another ε than 10⁻⁵.
    pub fn with_eps(self, eps: f64) -> Self {
        Self { eps, ..self }
    }

    /// Does it train?
    pub fn learns(&self) -> bool {
        self.weight.trainable || self.bias.trainable
    }

    /// `[N, d]` → `[N, d]`.
    pub fn forward(&self, x: &Tensor, vars: &mut Vars) -> Result<Tensor> {
        graph::layer_norm(x, &vars.get(&self.weight)?, &vars.get(&self.bias)?, self.eps)
    }
}

module!(LayerNorm: weight, bias);

/// RMSNorm over rows.
#[derive(Debug, Clone)]
pub struct RmsNorm {
    weight: Param,
    eps: f64,
}

impl RmsNorm {
    /// `weight` of a module, `[d]`.
    pub fn new(of: &Scope, d: usize, eps: f64, src: &mut dyn Source) -> Result<Self> {
        Ok(Self { weight: src.master(of, "weight", &[d], Init::Ones)?, eps })
    }

    /// `[N, d]` → `[N, d]`.
    pub fn forward(&self, x: &Tensor, vars: &mut Vars) -> Result<Tensor> {
        graph::rms_norm(x, &vars.get(&self.weight)?, self.eps)
    }
}

module!(RmsNorm: weight);

/// down(act(gate(x))·up(x)), without biases (Shazeer 2020).
#[derive(Debug, Clone)]
pub struct GatedMlp {
    act: Activation,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl GatedMlp {
    /// `gate_proj`, `up_proj`, `down_proj` of a module, of widths in, hidden, out.
    pub fn new(of: &Scope, widths: [usize; 3], act: Activation, src: &mut dyn Source) -> Result<Self> {
        let [d_in, hidden, d_out] = widths;
        let gate = Linear::new(&of.at("gate_proj"), d_in, hidden, false, src)?;
        let up = Linear::new(&of.at("up_proj"), d_in, hidden, false, src)?;
        Ok(Self { act, gate, up, down: Linear::new(&of.at("down_proj"), hidden, d_out, false, src)? })
    }

    /// Elements of the weights that its input meets, and of the one behind them.
    pub fn weights(&self) -> [u64; 2] {
        [self.gate.weights() + self.up.weights(), self.down.weights()]
    }

    /// `[N, in]` → `[N, out]`.
    pub fn forward(&self, x: &Tensor, vars: &mut Vars) -> Result<Tensor> {
        let (gate, up) = (self.gate.forward(x, vars)?, self.up.forward(x, vars)?);
        let h = match self.act {
            Activation::Silu => graph::swiglu(&gate, &up)?,
            act => (graph::activate(act, &gate)? * up)?,
        };
        self.down.forward(&h, vars)
    }
}

module!(GatedMlp: gate, up, down);

/// Flamingo's MLP: down(gelu(up(norm(x)))), without biases in its linear layers.
#[derive(Debug, Clone)]
pub struct FeedForward {
    norm: LayerNorm,
    up: Linear,
    down: Linear,
}

impl FeedForward {
    /// `0`, `1`, `3` of a module, as in OpenFlamingo; `hidden` wide inside.
    pub fn new(of: &Scope, d: usize, hidden: usize, src: &mut dyn Source) -> Result<Self> {
        let norm = LayerNorm::new(&of.at("0"), d, src)?;
        let up = Linear::new(&of.at("1"), d, hidden, false, src)?;
        Ok(Self { norm, up, down: Linear::new(&of.at("3"), hidden, d, false, src)? })
    }

    /// Does any of it train?
    pub fn learns(&self) -> bool {
        self.norm.learns() || self.up.learns() || self.down.learns()
    }

    /// Elements of its weights.
    pub fn weights(&self) -> u64 {
        self.up.weights() + self.down.weights()
    }

    /// `[N, d]` → `[N, d]`.
    pub fn forward(&self, x: &Tensor, vars: &mut Vars) -> Result<Tensor> {
        let h = self.up.forward(&self.norm.forward(x, vars)?, vars)?;
        self.down.forward(&graph::activate(Activation::Gelu, &h)?, vars)
    }
}

module!(FeedForward: norm, up, down);

/// Of each picture the rows of the one, then those of the other: `[I·A, D]` and `[I·B, D]` → `[I·(A + B), D]`.
pub fn of_each(pictures: usize, [a, b]: [&Tensor; 2]) -> Result<Tensor> {
    let by_picture = |t: &Tensor| t.reshape((pictures, (), t.dim(1)?));
    Ok(Tensor::cat(&[by_picture(a)?, by_picture(b)?], 1)?.flatten(0, 1)?)
}

/// `q` queries and `k` keys of each picture, row after row.
pub fn each_picture(pictures: usize, q: usize, k: usize) -> Sequences {
    let one = |i: usize| Segment::new(i * q..(i + 1) * q, i * k..(i + 1) * k);
    (0..pictures).map(one).collect::<Vec<_>>().into()
}
