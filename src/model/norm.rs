//! RMSNorm or LayerNorm with named parameters.

use super::params::{Grads, Param, module};
use crate::error::Result;
use crate::ops::norm::{Kind, ScaleGrads, Stats, backward, backward_into, forward, forward_residual_, rebuild};
use candle_core::Tensor;

/// A norm over rows.
#[derive(Debug, Clone)]
pub struct Norm {
    pub kind: Kind,
    /// `[D]`.
    pub weight: Param,
    /// `[D]`, LayerNorm only.
    pub bias: Option<Param>,
    pub eps: f64,
}

impl Norm {
    /// `x` `[N, D]` → `[N, D]` and the rows' statistics.
    pub fn forward(&self, x: &Tensor) -> Result<(Tensor, Stats)> {
        forward(self.kind, x, self.weight.compute(), self.bias.as_ref().map(Param::compute), self.eps)
    }

    /// Adds `r` to `x` in place and norms the sum.
    pub fn forward_residual_(&self, x: &Tensor, r: &Tensor) -> Result<(Tensor, Stats)> {
        forward_residual_(self.kind, x, r, self.weight.compute(), self.bias.as_ref().map(Param::compute), self.eps)
    }

    /// The output once more, bit for bit.
    pub fn rebuild(&self, x: &Tensor, stats: &Stats) -> Result<Tensor> {
        rebuild(x, self.weight.compute(), self.bias.as_ref().map(Param::compute), stats)
    }

    /// dX; gradients of scale and shift go to `grads` if they train.
    pub fn backward(&self, x: &Tensor, stats: &Stats, dy: &Tensor, grads: &mut Grads) -> Result<Tensor> {
        let (dx, scale) = backward(self.kind, x, self.weight.compute(), stats, dy, self.trains())?;
        self.add_scale(scale, grads)?;
        Ok(dx)
    }

    /// Does scale or shift train?
    pub fn trains(&self) -> bool {
        self.weight.trainable || self.bias.as_ref().is_some_and(|b| b.trainable)
    }

    fn add_scale(&self, scale: Option<ScaleGrads>, grads: &mut Grads) -> Result<()> {
        if let Some(s) = scale {
            if self.weight.trainable {
                grads.add(&self.weight.name, s.weight)?;
            }
            if let Some(b) = self.bias.as_ref().filter(|b| b.trainable) {
                grads.add(&b.name, s.bias)?;
            }
        }
        Ok(())
    }

    /// dX added to the gradient that passes the norm by on the residual road.
    pub fn backward_into(&self, x: &Tensor, stats: &Stats, dy: &Tensor, grads: &mut Grads, sum: &Tensor) -> Result<()> {
        let scale = backward_into(self.kind, x, self.weight.compute(), stats, dy, self.trains(), sum)?;
        self.add_scale(scale, grads)
    }
}

module!(Norm: weight, bias);
