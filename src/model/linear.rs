//! A linear layer with any number of low-rank updates on top: one type for frozen, LoRA (Hu et al. 2021), stacked
//! adapters and full fine-tuning. Backward computes what trains, plus dX if asked for, and nothing else. Layers that share
//! their input (q, k and v; gate and up) run together, so that updates of one kind pass over it once.

use super::init::Place;
use super::params::{Grads, Module, Param};
use super::segment::Side;
use crate::bail;
use crate::error::Result;
use crate::ops::matmul::{Mat, linear, matmul, matmul_add, sum_rows};
use crate::ops::{bytes, lora};
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

    /// Can the two go through one launch?
    fn alike(&self, other: &Self) -> bool {
        let kind = |d: &Self| (d.a.value.dims().first().copied(), d.scale, d.dropout, d.trains());
        kind(self) == kind(other)
    }

    /// What zeroes inputs of A in this pass, the same in forward and backward.
    fn mask(&self, side: &Side) -> lora::Mask {
        let key = side.dropout.filter(|_| self.dropout > 0.0 && self.trains());
        key.map(|key| (key.child(&self.a.name), self.dropout))
    }
}

/// What backward needs beside x of layers that ran together: `drop(x)·Aᵀ` of each group's updates, one below the other.
pub struct Saved(Vec<(Group, Tensor)>);

/// What [`backward_to_input`] leaves: u of each group in which an A trains, laid out as in [`Saved`].
pub struct Rest(Vec<(Group, Tensor)>);

impl Saved {
    /// Bytes that it holds.
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|(_, h)| bytes(h)).sum()
    }
}

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
        let ([y], saved) = forward_all([self], x, side)?;
        Ok((y, saved))
    }

    /// [`backward_all`] of this layer alone.
    pub fn backward(
        &self,
        saved: &Saved,
        x: Option<&Tensor>,
        dy: &Tensor,
        side: &Side,
        grads: &mut Grads,
        dx: &mut InputGrad,
    ) -> Result<()> {
        backward_all(&[self], saved, x, &[dy], side, grads, dx)
    }

    /// Bytes a token that [`Saved`] takes for this layer.
    pub fn saved_bytes(&self) -> Result<usize> {
        let mut ranks = 0;
        for d in &self.deltas {
            ranks += d.a.value.dim(0)?;
        }
        Ok(ranks * self.place().dtype.size_in_bytes())
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

/// `x` `[N, in]` → `[N, out]` of each layer.
pub fn forward_all<const N: usize>(layers: [&Linear; N], x: &Tensor, side: &Side) -> Result<([Tensor; N], Saved)> {
    let mut y = Vec::with_capacity(N);
    for l in layers {
        y.push(linear(x, l.weight.compute(), l.bias.as_ref().map(Param::compute))?);
    }
    let mut saved = Vec::new();
    for group in groups(&layers, x, side)? {
        let updates = group.updates(&layers, side);
        let h = lora::down(x, &updates)?;
        lora::up_(&group.of(&y), &h, &updates)?;
        saved.push((group, h));
    }
    match y.try_into() {
        Ok(y) => Ok((y, Saved(saved))),
        Err(y) => bail!("{N} layers gave {} outputs", y.len()),
    }
}

/// Adds the layers' gradients to `grads`, and the gradient of their common input to `dx` if it is wanted.
///
/// `x` is that input; it is read only if one of them [`Linear::needs_input`].
pub fn backward_all(
    layers: &[&Linear],
    saved: &Saved,
    x: Option<&Tensor>,
    dy: &[&Tensor],
    side: &Side,
    grads: &mut Grads,
    dx: &mut InputGrad,
) -> Result<()> {
    let rest = backward_to_input(layers, saved, dy, side, grads, dx)?;
    backward_from_input(layers, rest, x, dy, side, grads)
}

/// The part of [`backward_all`] that does without the input, for who rebuilds it with the help of dX.
pub fn backward_to_input(
    layers: &[&Linear],
    saved: &Saved,
    dy: &[&Tensor],
    side: &Side,
    grads: &mut Grads,
    dx: &mut InputGrad,
) -> Result<Rest> {
    let mut us = Vec::with_capacity(saved.0.len());
    for (group, h) in &saved.0 {
        let mut db = Vec::with_capacity(group.0.len());
        for d in group.deltas(layers) {
            db.push(if d.b.trainable { Some(grads.slot(&d.b)?.clone()) } else { None });
        }
        let trains = group.deltas(layers).any(LowRank::trains);
        // u [N, rank] is all that A and x see of dY.
        let u = (trains || !matches!(dx, InputGrad::Unwanted)).then(|| {
            let db: Vec<_> = db.iter().map(Option::as_ref).collect();
            lora::back(&group.of(dy), h, &group.updates(layers, side), &db)
        });
        us.push(u.transpose()?);
    }
    for (i, (l, dy)) in layers.iter().zip(dy).enumerate() {
        if let Some(b) = l.bias.as_ref().filter(|b| b.trainable) {
            grads.add(&b.name, sum_rows(dy)?)?;
        }
        dx.add_product(Mat::N(dy), Mat::N(l.weight.compute()))?;
        // A group's updates meet dX once, after the product of its last layer.
        for ((group, _), u) in saved.0.iter().zip(&us).filter(|((g, _), _)| g.last() == Some(i)) {
            if let (InputGrad::Sum(dx), Some(u)) = (&*dx, u) {
                lora::add_dx_(dx, u, &group.updates(layers, side))?;
            }
        }
    }
    let mut rest = Vec::new();
    for ((group, _), u) in saved.0.iter().zip(us) {
        if let (Some(u), true) = (u, group.deltas(layers).any(|d| d.a.trainable)) {
            rest.push((group.clone(), u));
        }
    }
    Ok(Rest(rest))
}

/// The rest of [`backward_all`]: the gradients that `x`, the input, is a factor of.
pub fn backward_from_input(
    layers: &[&Linear],
    rest: Rest,
    x: Option<&Tensor>,
    dy: &[&Tensor],
    side: &Side,
    grads: &mut Grads,
) -> Result<()> {
    let Some(x) = x else { return Ok(()) };
    for (l, dy) in layers.iter().zip(dy).filter(|(l, _)| l.weight.trainable) {
        grads.add_product(&l.weight, 1.0, Mat::T(dy), Mat::N(x))?;
    }
    for (group, u) in &rest.0 {
        let mut da = Vec::with_capacity(group.0.len());
        for d in group.deltas(layers) {
            da.push(if d.a.trainable { Some(grads.slot(&d.a)?.clone()) } else { None });
        }
        let da: Vec<_> = da.iter().map(Option::as_ref).collect();
        lora::add_da(&da, u, x, &group.updates(layers, side))?;
    }
    Ok(())
}

/// Updates that run together: the index of each one's layer, in rising order, and its index among that layer's updates.
#[derive(Debug, Clone)]
struct Group(Vec<(usize, usize)>);

impl Group {
    fn deltas<'a>(&'a self, layers: &'a [&Linear]) -> impl Iterator<Item = &'a LowRank> {
        self.0.iter().map(|(i, j)| &layers[*i].deltas[*j])
    }

    fn updates<'a>(&'a self, layers: &'a [&Linear], side: &Side) -> Vec<lora::Update<'a>> {
        let of =
            |d: &'a LowRank| lora::Update { a: d.a.compute(), b: d.b.compute(), scale: d.scale, mask: d.mask(side) };
        self.deltas(layers).map(of).collect()
    }

    /// Each member's of what there is one for each layer.
    fn of<'a, T: std::borrow::Borrow<Tensor>>(&self, each: &'a [T]) -> Vec<&'a Tensor> {
        self.0.iter().map(|(i, _)| each[*i].borrow()).collect()
    }

    /// The last layer that has a member.
    fn last(&self) -> Option<usize> {
        self.0.last().map(|(i, _)| *i)
    }
}

/// The layers' updates of this pass, those of one kind together where that gains anything. A layer's own updates keep their order,
/// and no two of them share a group.
fn groups(layers: &[&Linear], x: &Tensor, side: &Side) -> Result<Vec<Group>> {
    let mut groups: Vec<Group> = Vec::new();
    for (i, l) in layers.iter().enumerate() {
        let mut from = 0;
        for (j, d) in l.deltas.iter().enumerate().filter(|(_, d)| !side.skips(d)) {
            let joins = |g: &Group| g.0.first().is_some_and(|(i, j)| layers[*i].deltas[*j].alike(d));
            let open = groups.iter().skip(from).position(joins).map(|at| at + from);
            match open.filter(|_| layers.len() > 1) {
                Some(at) if lora::gains_from_groups(d.a.value.dim(0)?, x)? => {
                    groups[at].0.push((i, j));
                    from = at + 1;
                }
                _ => {
                    groups.push(Group(vec![(i, j)]));
                    from = groups.len();
                }
            }
        }
    }
    Ok(groups)
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
