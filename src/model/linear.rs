//! A linear layer with any number of low-rank updates on top: one type for frozen, LoRA (Hu et al. 2021), stacked
//! adapters and full fine-tuning. Backward computes what trains, plus dX if asked for, and nothing else.

use super::init::Place;
use super::params::{Grads, Module, Param};
use super::segment::Side;
use crate::bail;
use crate::error::Result;
use crate::ops::lora;
use crate::ops::matmul::{Mat, linear, matmul, matmul_add, sum_rows};
use candle_core::Tensor;

/// `y = x·Wᵀ + b + Σ s·(drop(x)·Aᵀ)·Bᵀ`.
#[derive(Debug, Clone)]
pub struct Linear {
    /// `[out, in]`.
    pub weight: Param,
    /// `[out]`.
    pub bias: Option<Param>,
    pub deltas: Vec<LowRank>,
}

/// One low-rank update of a linear layer.
#[derive(Debug, Clone)]
pub struct LowRank {
    /// The adapter that it belongs to.
    pub adapter: String,
    /// `[rank, in]`.
    pub a: Param,
    /// `[out, rank]`.
    pub b: Param,
    /// alpha/rank, or alpha/√rank.
    pub scale: f64,
    /// Probability of zeroing an input of A while training.
    pub dropout: f64,
}

impl LowRank {
    fn trains(&self) -> bool {
        self.a.trainable || self.b.trainable
    }

    /// What zeroes inputs of A in this pass, the same in forward and backward.
    fn mask(&self, side: &Side) -> lora::Mask {
        let key = side.dropout.filter(|_| self.dropout > 0.0 && self.trains());
        key.map(|key| (key.child(&self.a.name), self.dropout))
    }
}

/// What backward needs beside x: `drop(x)·Aᵀ` of each update, `[N, rank]`.
pub struct Saved(Vec<Option<Tensor>>);

/// What [`Linear::backward_to_input`] leaves: u of each update whose A trains, `[N, rank]`.
pub struct Rest(Vec<Option<Tensor>>);

/// The gradient of an input that one or several layers share: the first product is written, the others are added.
#[derive(Debug)]
pub enum InputGrad {
    /// Nobody asks for it.
    Unwanted,
    /// Asked for, nothing there yet.
    Empty,
    /// What has come together so far, `[N, in]`.
    Sum(Tensor),
}

impl InputGrad {
    /// No gradient yet, or none at all.
    pub fn new(wanted: bool) -> Self {
        if wanted { Self::Empty } else { Self::Unwanted }
    }

    /// Adds `A·B`.
    fn add_product(&mut self, a: Mat, b: Mat) -> Result<()> {
        match self {
            Self::Unwanted => {}
            Self::Empty => *self = Self::Sum(matmul(a, b)?),
            Self::Sum(sum) => matmul_add(sum, 1.0, a, b)?,
        }
        Ok(())
    }

    /// The sum of what every layer has added.
    pub fn sum(&self) -> Result<&Tensor> {
        match self {
            Self::Sum(t) => Ok(t),
            _ => bail!("the gradient of an input was read before a layer gave one"),
        }
    }

    /// The sum, if it was asked for.
    pub fn take(self) -> Option<Tensor> {
        if let Self::Sum(t) = self { Some(t) } else { None }
    }
}

impl Linear {
    /// Does backward need the layer's input?
    pub fn needs_input(&self) -> bool {
        self.weight.trainable || self.deltas.iter().any(LowRank::trains)
    }

    /// `x` `[N, in]` → `[N, out]`.
    pub fn forward(&self, x: &Tensor, side: &Side) -> Result<(Tensor, Saved)> {
        let y = linear(x, self.weight.compute(), self.bias.as_ref().map(Param::compute))?;
        let mut saved = Vec::with_capacity(self.deltas.len());
        for d in &self.deltas {
            if side.skips(d) {
                saved.push(None);
                continue;
            }
            let h = lora::down(x, d.a.compute(), d.mask(side))?;
            lora::up_(&y, &h, d.b.compute(), d.scale)?;
            saved.push(Some(h));
        }
        Ok((y, Saved(saved)))
    }

    /// Adds this layer's gradients to `grads`, and dX to `dx` if it is wanted.
    ///
    /// `x` is the layer's input; it is read only if [`Linear::needs_input`].
    pub fn backward(
        &self,
        saved: &Saved,
        x: Option<&Tensor>,
        dy: &Tensor,
        side: &Side,
        grads: &mut Grads,
        dx: &mut InputGrad,
    ) -> Result<()> {
        let rest = self.backward_to_input(saved, dy, side, grads, dx)?;
        self.backward_from_input(rest, x, dy, side, grads)
    }

    /// The part of [`Linear::backward`] that does without the layer's input, for who rebuilds it with the help of dX.
    pub fn backward_to_input(
        &self,
        saved: &Saved,
        dy: &Tensor,
        side: &Side,
        grads: &mut Grads,
        dx: &mut InputGrad,
    ) -> Result<Rest> {
        if let Some(b) = self.bias.as_ref().filter(|b| b.trainable) {
            grads.add(&b.name, sum_rows(dy)?)?;
        }
        dx.add_product(Mat::N(dy), Mat::N(self.weight.compute()))?;
        let mut rest = Vec::with_capacity(self.deltas.len());
        for (d, h) in self.deltas.iter().zip(&saved.0) {
            let Some(h) = h.as_ref().filter(|_| d.trains() || !matches!(dx, InputGrad::Unwanted)) else {
                rest.push(None);
                continue;
            };
            let db = if d.b.trainable { Some(grads.slot(&d.b)?) } else { None };
            // u [N, rank] is all that A and x see of dY.
            let u = lora::back(dy, h, d.b.compute(), d.scale, db)?;
            if let InputGrad::Sum(dx) = dx {
                lora::add_dx_(dx, &u, d.a.compute(), d.mask(side))?;
            }
            rest.push(d.a.trainable.then_some(u));
        }
        Ok(Rest(rest))
    }

    /// The rest of [`Linear::backward`]: the gradients that `x`, the layer's input, is a factor of.
    pub fn backward_from_input(
        &self,
        rest: Rest,
        x: Option<&Tensor>,
        dy: &Tensor,
        side: &Side,
        grads: &mut Grads,
    ) -> Result<()> {
        let Some(x) = x else { return Ok(()) };
        if self.weight.trainable {
            grads.add_product(&self.weight, 1.0, Mat::T(dy), Mat::N(x))?;
        }
        for (d, u) in self.deltas.iter().zip(&rest.0) {
            if let Some(u) = u {
                lora::add_da(grads.slot(&d.a)?, u, x, d.mask(side))?;
            }
        }
        Ok(())
    }

    /// Where and in which type it computes.
    pub fn place(&self) -> Place {
        let w = self.weight.compute();
        Place { device: w.device().clone(), dtype: w.dtype() }
    }

    /// `(out, in)`.
    pub fn dims(&self) -> Result<(usize, usize)> {
        Ok(self.weight.value.dims2()?)
    }

    /// The layer's name: its weight's without `.weight`.
    pub fn name(&self) -> &str {
        self.weight.name.strip_suffix(".weight").unwrap_or(&self.weight.name)
    }
}

impl Module for Linear {
    fn visit(&mut self, f: &mut dyn FnMut(&mut Param)) {
        f(&mut self.weight);
        if let Some(b) = &mut self.bias {
            f(b);
        }
        for d in &mut self.deltas {
            f(&mut d.a);
            f(&mut d.b);
        }
    }
}
