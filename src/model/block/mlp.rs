//! The MLP of a block: `close(act(open(x)))`, or gated (Shazeer 2020), `close(act(gate(x))∘up(x))`.

use super::{Names, Shape};
use crate::error::Result;
use crate::model::build::linear;
use crate::model::init::Source;
use crate::model::linear::{self, InputGrad, Linear};
use crate::model::params::{Grads, module};
use crate::model::role::Scope;
use crate::model::segment::{Side, kept_or};
use crate::ops::activation::{self, swiglu, swiglu_backward};
use crate::spec::Activation;
use candle_core::Tensor;

/// Which kind an MLP is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MlpKind {
    /// One layer, then the activation.
    Plain(Activation),
    /// Gate and up, by SiLU (SwiGLU).
    Gated,
}

/// An MLP.
#[derive(Debug, Clone)]
pub struct Mlp {
    kind: MlpKind,
    /// On the input: one layer, or gate and up.
    pub(super) open: Vec<Linear>,
    /// On the activation.
    pub(super) close: Linear,
}

module!(Mlp: open, close);

/// Rows before the activation, `[N, hidden]` of each layer that the MLP begins with.
pub(super) type Inner = Vec<Tensor>;

impl Mlp {
    pub(super) fn new(of: &Scope, shape: &Shape, names: &Names, src: &mut dyn Source) -> Result<Self> {
        let (d, m, bias) = (shape.width, shape.hidden, shape.mlp_bias);
        let mut open = Vec::with_capacity(names.open.len());
        for name in names.open {
            open.push(linear(src, &of.at(name), m, d, bias)?);
        }
        let close = linear(src, &of.at(names.close), d, m, bias)?;
        Ok(Self { kind: shape.mlp, open, close })
    }

    pub(super) fn layers(&self) -> impl Iterator<Item = &Linear> {
        self.open.iter().chain([&self.close])
    }

    pub(super) fn layers_mut(&mut self) -> impl Iterator<Item = &mut Linear> {
        self.open.iter_mut().chain([&mut self.close])
    }

    /// The layers on the input.
    pub(super) fn open(&self, h: &Tensor, side: &Side) -> Result<(Inner, linear::Saved)> {
        linear::forward_list(&self.open.iter().collect::<Vec<_>>(), h, side)
    }

    pub(super) fn activate(&self, inner: &Inner) -> Result<Tensor> {
        match self.kind {
            MlpKind::Plain(act) => activation::forward(act, &inner[0]),
            MlpKind::Gated => swiglu(&inner[0], &inner[1]),
        }
    }

    /// From the output's gradient to that of each row of [`Inner`]; `act`: the activation's output, if it was kept.
    pub(super) fn backward(
        &self,
        inner: &Inner,
        closed: &linear::Saved,
        act: Option<Tensor>,
        dy: &Tensor,
        side: &Side,
        grads: &mut Grads,
    ) -> Result<Inner> {
        let needed = self.close.needs_input();
        let mut dact = InputGrad::Empty;
        match self.kind {
            MlpKind::Plain(kind) => {
                let act = kept_or(act, needed, || activation::forward(kind, &inner[0]))?;
                self.close.backward(closed, act.as_ref(), dy, side, grads, &mut dact)?;
                Ok(vec![activation::backward(kind, &inner[0], dact.sum()?)?])
            }
            MlpKind::Gated => {
                // The activation, where it is needed, is made again in the pass that gives the gradients.
                let close = [&self.close];
                let rest = linear::backward_to_input(&close, closed, &[dy], side, grads, &mut dact)?;
                let d = swiglu_backward(&inner[0], &inner[1], dact.sum()?, needed && act.is_none())?;
                linear::backward_from_input(&close, rest, act.or(d.y).as_ref(), side, grads)?;
                Ok(vec![d.gate, d.up])
            }
        }
    }
}
